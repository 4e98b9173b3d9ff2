"""val.py beyond one checkpoint on one split: series, ensembles, views, labels among detections, held models."""

import json
import logging
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import val
from models.backends import ArrayBackend, Metadata
from models.inference import evaluation as val_tasks
from models.inference.evaluation import make_loader
from models.load import load_model
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import load_labels
from utils.errors import UserError
from utils.files import read_yaml, write_yaml
from utils.nms import NMSConfig

SIDE_PX = 128

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(golden_dir):
    return golden_dir / "yolov5n-v6-coco.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory, datasets_dir):
    """Eight images of coco128: five to validate on, two to train, one to test."""
    coco = datasets_dir / "coco128"
    folder = tmp_path_factory.mktemp("coco8")
    images = sorted((coco / "images" / "train2017").glob("*.jpg"))[:8]
    for split, some in (("val", images[:5]), ("train", images[5:7]), ("test", images[7:])):
        (folder / f"{split}.txt").write_text("\n".join(map(str, some)))
    splits = {split: f"{split}.txt" for split in ("train", "val", "test")}
    file = folder / "eight.yaml"
    write_yaml(file, {"path": str(folder), **splits, "names": read_yaml(coco / "coco128.yaml")["names"]})
    return file


@pytest.fixture
def run(tmp_path, data):
    """Validates at 128 px on the CPU, without images."""

    def run(weights=(), **options):
        plain = {"data": str(data), "device": "cpu", "workers": 0, "plots": False, "imgsz": SIDE_PX}
        return val.run(weights=weights, **{**plain, "project": str(tmp_path / "runs"), **options})

    return run


@pytest.fixture
def calls(monkeypatch):
    """What `evaluate` was called with, one mapping for each call."""
    seen, measured = [], val_tasks.evaluate

    def evaluate(predictor, loader, **options):
        seen.append({"nms": predictor.nms, "loader": loader, **options})
        return measured(predictor, loader, **options)

    monkeypatch.setattr(val_tasks, "evaluate", evaluate)
    return seen


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights)


@pytest.fixture(scope="module")
def batches(model, data):
    """The batches of the five images at 128 px."""
    spec = load_spec(str(data), need=("val",))
    return list(make_loader(spec, SIDE_PX, 32, workers=0))


def images_of(batches):
    """Yields each image's path, its label file's rows (n, 5), and its height and width."""
    for batch in batches:
        for path, shape in zip(batch.paths, batch.shapes, strict=True):
            label = Path(path.replace("/images/", "/labels/")).with_suffix(".txt")
            yield path, np.loadtxt(label, ndmin=2), shape.original_hw


def lines_of(folder):
    return [line.split() for file in sorted((folder / "labels").iterdir()) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- single options


def test_thresholds_and_the_limit_change_what_is_found(tmp_path, run, weights):
    found = {}
    for name, options in (
        ("usual", {}),
        ("sure", {"conf_thres": 0.3}),
        ("apart", {"iou_thres": 0.1}),
        ("few", {"max_det": 2}),
    ):
        run(weights, save_txt=True, save_conf=True, name=name, **options)
        found[name] = lines_of(tmp_path / "runs" / name)
    assert {len(line) for line in found["usual"]} == {6}
    assert min(float(line[5]) for line in found["usual"]) < 0.3 <= min(float(line[5]) for line in found["sure"])
    assert 0 < len(found["sure"]) < len(found["apart"]) < len(found["usual"])
    assert len(found["few"]) <= 5 * 2


@pytest.mark.parametrize(("task", "count"), [("train", 2), ("val", 5), ("test", 1)])
def test_the_task_names_the_split(run, weights, caplog, task, count):
    with caplog.at_level(logging.INFO, "yolov5"):
        run(weights, task=task)
    (row,) = [line.split() for line in caplog.messages if line.split()[:1] == ["all"]]
    assert row[1] == str(count)


def test_worker_processes_change_nothing(run, weights):
    assert run(weights, workers=2, batch_size=2)[0] == run(weights, batch_size=2)[0]


def test_reduced_precision_and_batch_size_change_little(run, weights):
    """Confidences in bfloat16 are others, in the third digit. Of one shape, images are padded alike in any batch."""
    shape = [SIDE_PX, SIDE_PX]
    plain = run(weights, imgsz=shape)[0]
    reduced, alone = run(weights, imgsz=shape, bf16=True)[0], run(weights, imgsz=shape, batch_size=1)[0]
    assert plain[3] > 0.2
    assert reduced != plain and reduced[2:4] == pytest.approx(plain[2:4], abs=0.05)
    assert alone == pytest.approx(plain, abs=1e-3)


def test_as_one_class_it_does_not_matter_which(tmp_path, run, weights, data):
    """Labels of which every one is of a wrong class, and one of a class that the data set does not have."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    for image in map(Path, (data.parent / "val.txt").read_text().splitlines()):
        shutil.copy(image, folder)
        rows = np.loadtxt(str(image.with_suffix(".txt")).replace("images", "labels"), ndmin=2)
        rows[:, 0] = 900 + rows[:, 0] % 2
        np.savetxt((folder / image.name).with_suffix(".txt"), rows, "%g")
    spec = {"path": str(folder), "train": ".", "val": ".", "names": ["thing"]}
    figures, maps, _ = run(weights, data=spec, single_cls=True)
    assert maps.shape == (1,) and figures[2] > 0.2
    with pytest.raises(UserError, match="knows 80 classes"):
        run(weights, data=spec)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_on_cuda_scores_about_the_same(run, weights):
    assert run(weights, device="0", half=True)[0] == pytest.approx(run(weights, device="0")[0], abs=0.03)


# --------------------------------------------------------------------------------------------------------- series


def test_speed_measures_a_model_as_it_is_in_use(tmp_path, data, weights, calls, caplog):
    """Confidence 0.25, IoU 0.45, no border, no JSON, no images, and no folder where nothing is written."""
    text = f"--task speed --weights {weights} {weights} --data {data} --img {SIDE_PX} --device cpu --workers 0"
    options = val.build_parser().parse_args([*text.split(), "--save-json", "--project", str(tmp_path / "runs")])
    with caplog.at_level(logging.INFO, "yolov5"):
        val.main(options)
    assert len(calls) == 2
    for call in calls:
        assert (call["nms"].conf_thres, call["nms"].iou_thres) == (0.25, 0.45)
        assert not call["save_json"] and not call["plots"] and call["save_dir"] is None
        assert call["loader"].dataset.batch_shapes_hw.tolist() == [[128, 128]]
    assert not (tmp_path / "runs").exists()
    assert "Ensemble" not in caplog.text and "mAP comes out too low" not in caplog.text
    if not torch.cuda.is_available():
        assert "in float32 (float16 needs a CUDA GPU)" in caplog.text


def test_a_usual_run_has_the_border(run, weights, calls):
    run(weights)
    assert calls[0]["loader"].dataset.batch_shapes_hw.tolist() == [[160, 160]]


def test_study_writes_a_row_for_each_size_and_a_table_for_each_model(tmp_path, run, weights, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "yolov5"):
        last = run([weights, str(weights)], task="study", imgsz=[64, 96], plots=True)
    tables = ["study_eight_yolov5n-v6-coco.txt", "study_eight_yolov5n-v6-coco_2.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {*tables, "study.zip", "study.png"}
    with zipfile.ZipFile("study.zip") as archive:
        assert archive.namelist() == tables
        assert archive.read(tables[0]).decode() == (tmp_path / tables[0]).read_text()
    rows = np.loadtxt(tables[1])
    assert rows.shape == (2, 10)
    assert {len(line) for line in (tmp_path / tables[1]).read_text().splitlines()} == {10 * 11 - 1}
    np.testing.assert_allclose(rows[1, :7], last[0], rtol=1e-3)
    np.testing.assert_allclose(rows[1, 7:], last[2], rtol=1e-3)
    np.testing.assert_allclose(rows[0, :4], run(weights, imgsz=64)[0][:4], rtol=1e-3)
    assert "Study saved to study_eight" in caplog.text


def test_tables_of_models_named_alike_do_not_overwrite_each_other():
    tables = []
    for stem in ("a_2", "a", "a", "a_2"):
        tables.append(val_tasks.unused_name(stem, tables))
    assert tables == ["a_2", "a", "a_3", "a_2_2"]


def test_a_study_goes_from_256_to_1536(tmp_path, run, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, measured = [], val_tasks.validate

    def validate(config, model):
        sizes.extend(config.imgsz)
        return measured(replace(config, imgsz=[64]), model)

    monkeypatch.setattr(val_tasks, "validate", validate)
    run(weights, task="study", imgsz=None, single_cls=True)
    assert sizes == [256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536]
    assert not (tmp_path / "study.png").exists()  # no images were asked for


def test_a_study_needs_to_know_its_data_before_it_begins(run, weights, calls):
    with pytest.raises(UserError, match="does not say which data set it was trained on: give --data"):
        run([weights], task="study", data="")
    assert not calls


def test_the_data_of_the_training_that_is_gone_is_named_and_asked_for(run, more_weights, tmp_path):
    moved = more_weights(tmp_path / "moved.pt", {0: "a"})
    save_checkpoint(moved, {**load_checkpoint(moved), "data": str(tmp_path / "gone.yaml")})
    with pytest.raises(UserError, match=r"moved\.pt was trained on .*gone\.yaml, which is not there: give --data"):
        run([moved], data="")


def test_a_study_refuses_a_model_of_one_size_before_it_begins(tmp_path, run, weights, calls, monkeypatch):
    opened, fixed = val_tasks.open_model, shutil.copy(weights, tmp_path / "fixed.pt")

    def open_model(file, *options):
        found = opened(file, *options)
        return replace(found, metadata=replace(found.metadata, dynamic=found.path.name != "fixed.pt"))

    monkeypatch.setattr(val_tasks, "open_model", open_model)
    with pytest.raises(UserError, match=r"fixed\.pt takes one: export it with --dynamic"):
        run([weights, fixed], task="study")
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "study", "weights": ["nosuch.pt"]}, "nosuch.pt"),
        ({"task": "speed", "dataloader": []}, "give weights and data alone"),
        ({"task": "speed", "weights": ["a.onnx"], "augment": True}, r"--augment is for checkpoints \(\.pt\)"),
        ({"task": "benchmark"}, "--task 'benchmark': one of train, val, test, speed, study is expected"),
    ],
)
def test_series_refuse_what_they_cannot_do_before_anything_is_evaluated(
    tmp_path, monkeypatch, run, calls, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("a.onnx").touch()
    with pytest.raises(UserError, match=message):
        run(**options)
    assert not calls


def test_coco_results_of_one_s_own_data_are_scored_by_the_numbers_of_its_file(tmp_path, run, weights, data, batches):
    """The file counts categories backwards, and numbers images by itself; COCO's mAP is about ours."""
    names = read_yaml(data)["names"]
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": 100 - number, "name": name} for number, name in names.items()]
    for path, rows, (height, width) in images_of(batches):
        content["images"].append({"id": len(content["images"]) + 1, "file_name": Path(path).name})
        for class_id, x, y, w, h in rows.tolist():
            bbox = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            one = {"image_id": len(content["images"]), "category_id": 100 - int(class_id), "bbox": bbox}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **one})
    file = data.parent / "annotations" / "instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    try:
        figures = run(weights, save_json=True)[0]
    finally:
        shutil.rmtree(file.parent)
    ours = run(weights)[0]
    assert figures[:2] == ours[:2]
    assert figures[2:4] == pytest.approx(ours[2:4], abs=0.02) and figures[3] != ours[3] > 0.1
    rows = json.loads((tmp_path / "runs" / "exp" / "yolov5n-v6-coco_predictions.json").read_text())
    assert {row["image_id"] for row in rows} <= set(range(1, 6)) and {row["category_id"] for row in rows} & {100}


@pytest.mark.parametrize(
    ("empty", "tile", "said"),
    [(False, None, "No label file found for any of 2"), (True, 400, "2 label files are empty")],
)
def test_a_blind_split_gives_predictions(tmp_path, run, weights, data, caplog, empty, tile, said):
    """Twice: the second time its label cache is there already."""
    folder = tmp_path / "blind"
    folder.mkdir()
    for image in (data.parent / "val.txt").read_text().splitlines()[:2]:
        shutil.copy(image, folder)
        if empty:
            (folder / Path(image).name).with_suffix(".txt").touch()
    spec = {"path": str(folder), "train": ".", "val": ".", "test": ".", "names": read_yaml(data)["names"]}
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "yolov5"):
            figures = run(weights, data=spec, task="test", save_json=True, save_txt=True, tile=tile, exist_ok=True)[0]
        assert np.isnan(figures[:4]).all() and said in caplog.text and "without labels there is no P" in caplog.text
    assert lines_of(tmp_path / "runs" / "exp")
    assert json.loads((tmp_path / "runs" / "exp" / "yolov5n-v6-coco_predictions.json").read_text())
    with pytest.raises(UserError, match=said):  # to train on it would teach nothing
        load_labels([folder])


# ------------------------------------------------------------------------------------------- ensembles and views


def test_a_model_twice_scores_as_once(run, weights, caplog):
    """Each row's twin is suppressed by it."""
    with caplog.at_level(logging.INFO, "yolov5"):
        figures = run([str(weights), str(weights)])[0]
    assert f"Ensemble created with ['{weights}', '{weights}']" in caplog.text
    assert figures == pytest.approx(run(weights)[0], abs=1e-4)
    assert figures[3] > 0.1


def test_views_are_the_same_for_the_model_and_for_what_is_made_of_it(run, weights, model):
    augmented = run(weights, augment=True)[0]
    assert augmented == pytest.approx(run(model=model, augment=True)[0], abs=1e-3)
    assert augmented != pytest.approx(run(weights)[0], abs=1e-3)


def test_exports_have_no_views(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    Path("best.onnx").touch()
    with pytest.raises(UserError, match=r"--augment is for checkpoints \(\.pt\), not for exported models"):
        run("best.onnx", augment=True)


# ------------------------------------------------------------------------------------- labels among the detections


def test_labels_among_the_detections_win_and_are_written(tmp_path, run, weights, batches, caplog):
    with caplog.at_level(logging.WARNING, "yolov5"):
        figures = run(weights, save_hybrid=True, save_conf=True)[0]
    assert figures[2:4] == pytest.approx((0.995, 0.995), abs=1e-3)
    assert "P, R and mAP mean nothing" in caplog.text
    lines = lines_of(tmp_path / "runs" / "exp")
    labels = sum(len(batch.targets) for batch in batches)
    sure = sum(line[5] == "1" for line in lines)
    assert 0.9 * labels <= sure <= labels < len(lines)  # of labels that cover each other one alone is kept


def test_labels_join_raw_rows_only(run, weights):
    with pytest.raises(UserError, match="--save-hybrid puts labels among the rows of whole images, which --tile"):
        run(weights, save_hybrid=True, tile=64)


# --------------------------------------------------------------------------------------------- from a script alone


def test_a_held_model_gives_its_files_figures_and_its_losses(tmp_path, run, weights, model, batches):
    heard = []
    callbacks = Callbacks()
    callbacks.register_action("on_val_end", callback=lambda: heard.append("end"))
    model.train()
    figures, maps, speed = val.run(
        model=model,
        dataloader=batches,
        save_dir=tmp_path / "held",
        save_json=True,
        plots=False,
        callbacks=callbacks,
        compute_loss=lambda raw, targets: (None, torch.tensor([len(raw), raw[0].shape[4], len(targets)])),
    )
    assert model.training and heard == ["end"]
    model.eval()
    assert figures[:4] == pytest.approx(run(weights)[0][:4], abs=1e-3)
    assert figures[4:] == pytest.approx((3, 85, sum(len(batch.targets) for batch in batches) / len(batches)))
    assert maps.shape == (80,) and len(speed) == 3
    assert {path.name for path in (tmp_path / "held").iterdir()} == {"model_predictions.json", "metrics.json"}


def test_a_held_model_takes_a_data_set_by_its_content(run, weights, model, data):
    content = read_yaml(data)
    del content["train"]
    assert run(model=model, data=content)[0] == pytest.approx(run(weights)[0], abs=1e-3)


class Stubborn(ArrayBackend):
    """A runtime that finds nothing, and chooses that itself."""

    batch, dynamic, device = None, True, "nowhere"
    metadata = Metadata({}, 32, (64, 64), nms=NMSConfig())

    def run(self, inputs):
        return np.zeros((len(inputs), 1, 6), np.float32)


def test_any_runtime_will_do(run, batches):
    figures, maps, _ = run(model=Stubborn(), dataloader=batches)
    assert figures == (0,) * 7 and maps.shape == (80,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": Stubborn(), "weights": "best.pt"}, "weights or a model, not both"),
        ({"model": Stubborn(), "compute_loss": print}, "compute_loss needs a PyTorch model's raw outputs"),
        ({"model": Stubborn(), "bf16": True}, "this model computes as it was made"),
        ({"model": Stubborn(), "save_hybrid": True}, "labels among the rows .* NMS inside model"),
        ({"model": torch.nn.Identity(), "dataloader": [], "data": ""}, "does not name its classes: give data"),
        ({"model": torch.nn.Identity(), "dataloader": [1], "tile": 64}, "--tile cuts images of full size"),
        ({"model": torch.nn.Identity(), "half": True}, "--half .* needs a CUDA GPU, this is cpu"),
    ],
)
def test_what_does_not_go_together_is_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


def test_process_batch_matches_for_each_threshold():
    """Boxes 10 x 10; the first detection has IoU 9 / 11 = 0.82 with the label, the second 1/3, the third is no cat."""
    detections = torch.tensor([[0.0, 1, 10, 11, 0.9, 0], [5.0, 0, 15, 10, 0.8, 0], [0.0, 0, 10, 10, 0.7, 1]])
    right = val.process_batch(detections, torch.tensor([[0.0, 0, 0, 10, 10]]), torch.tensor([0.3, 0.5, 0.8, 0.9]))
    assert right.dtype == torch.bool
    assert right.tolist() == [[True, True, True, False], [False] * 4, [False] * 4]


def test_one_image_is_written_as_text_and_json(tmp_path):
    detections = torch.tensor([[10.0, 20, 30, 60, 0.9, 2]])
    for save_conf in (False, True):
        val.save_one_txt(detections, save_conf, (100, 200), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "2 0.1 0.4 0.1 0.4\n2 0.1 0.4 0.1 0.4 0.9\n"
    results = [{"image_id": 1}]
    val.save_one_json(detections, results, tmp_path / "000042.jpg", [1, 2, 91])
    assert results[1:] == [{"image_id": 42, "category_id": 91, "bbox": [10, 20, 20, 40], "score": 0.9}]
