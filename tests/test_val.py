"""val.py from the command line and from Python: golden figures, defaults, what is written, mistakes refused."""

import json
import logging
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import val
from models.inference import evaluation as val_tasks
from models.load import read_weights
from models.yolo import Model
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.files import ROOT, write_yaml

NAMES = {0: "cat", 1: "dog", 2: "cow"}


@pytest.fixture
def data(tmp_path):
    """Four small images with a box each, as a data set YAML."""
    generator = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for index in range(4):
        image = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "set" / "images" / f"{index}.png"), image)
        (tmp_path / "set" / "labels" / f"{index}.txt").write_text(f"{index % 3} 0.5 0.5 0.4 0.6\n")
    file = tmp_path / "set" / "data.yaml"
    write_yaml(file, {"path": str(tmp_path / "set"), "train": "images", "val": "images", "names": NAMES})
    return file


@pytest.fixture
def weights(tmp_path, data):
    """An untrained yolov5n for the three classes that says it was trained on `data` at 64 pixels."""
    torch.manual_seed(0)
    model = Model("yolov5n.yaml", nc=3)
    checkpoint = {
        "format": "yolov5-slim",
        "format_version": 1,
        "epoch": -1,
        "model": model.state_dict(),
        "ema": None,
        "yaml": model.yaml,
        "names": NAMES,
        "nc": 3,
        "stride": [8, 16, 32],
        "opt": {"imgsz": 64},
        "hyp": {},
        "data": str(data),
    }
    file = tmp_path / "best.pt"
    save_checkpoint(file, checkpoint)
    assert read_weights(file).source == "ours"
    return file


def run(tmp_path, **options):
    return val.run(**{"device": "cpu", "workers": 0, "project": str(tmp_path / "runs"), "imgsz": 64, **options})


def test_checkpoint_of_ours_needs_no_data_option(tmp_path, weights):
    figures, maps, speed = run(tmp_path, weights=str(weights), save_txt=True, save_json=True, save_conf=True)
    assert len(figures) == 7 and all(0 <= value <= 1 for value in figures)
    assert maps.shape == (3,) and len(speed) == 3
    folder = tmp_path / "runs" / "exp"
    written = {path.name for path in folder.iterdir()}
    assert {"PR_curve.png", "confusion_matrix.png", "val_batch0_pred.jpg", "best_predictions.json"} <= written
    assert {path.stem for path in (folder / "labels").iterdir()} <= {"0", "1", "2", "3"}
    assert all(row["image_id"] in range(4) for row in json.loads((folder / "best_predictions.json").read_text()))


def test_runs_are_numbered_and_noplots_draws_nothing(tmp_path, weights):
    for options in ({}, {}, {"exist_ok": True}, {"name": "mine"}):
        run(tmp_path, weights=str(weights), plots=False, **options)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["exp", "exp2", "mine"]
    assert [path.name for path in (tmp_path / "runs" / "exp").iterdir()] == ["metrics.json"]


def test_figures_and_the_report_are_written(tmp_path, weights, data):
    figures, maps, _ = run(tmp_path, weights=str(weights), max_det=20)
    folder = tmp_path / "runs" / "exp"
    content = json.loads((folder / "metrics.json").read_text())
    assert [content[key] for key in ("precision", "recall", "map50", "map")] == pytest.approx(figures[:4], abs=1e-6)
    assert (content["images"], content["labels"], content["split"], content["imgsz"]) == (4, 4, "val", 64)
    assert [one["map"] for one in content["classes"]] == pytest.approx(maps.tolist(), abs=1e-6)
    assert content["data"] == str(data) and content["options"]["max_det"] == 20 and "model" not in content["options"]
    assert content["versions"]["torch"] == torch.__version__ and content["seconds"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in page and "max_det" in page and "<h2>Training</h2>" not in page


def coco_file(data, categories):
    images = [{"id": 100 + index, "file_name": f"{index}.png"} for index in range(4)]
    boxes = [
        {"id": 1 + index, "image_id": 100 + index, "category_id": list(categories)[0], "bbox": [20, 10, 25, 28]}
        for index in range(4)
    ]
    named = [{"id": number, "name": name} for number, name in categories.items()]
    file = data.parent / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": named}))
    return str(file)


def test_annotations_give_the_json_their_ids(tmp_path, weights, data):
    file = coco_file(data, {7: "cow", 5: "cat", 9: "dog", 2: "goat"})
    run(tmp_path, weights=str(weights), annotations=file, plots=False)
    folder = tmp_path / "runs" / "exp"
    rows = json.loads((folder / "best_predictions.json").read_text())
    assert rows and {row["image_id"] for row in rows} <= {100, 101, 102, 103}
    content = json.loads((folder / "metrics.json").read_text())
    assert {one["name"]: one["category_id"] for one in content["classes"]} == {"cat": 5, "dog": 9, "cow": 7}
    assert {row["category_id"] for row in rows} <= {5, 7, 9} and content["coco"]["ap"] is not None


def test_annotations_that_do_not_fit_are_refused_before_the_work(tmp_path, weights, data):
    for categories, message in (({5: "cat", 9: "dog"}, "has the name of class 'cow'"), ({1: "cow"}, "'cat'")):
        with pytest.raises(UserError, match=message):
            run(tmp_path, weights=str(weights), annotations=coco_file(data, categories), plots=False)
    with pytest.raises(UserError, match="--annotations is for the images of a split"):
        run(tmp_path, weights=str(weights), annotations=coco_file(data, {1: "cow"}), task="speed")
    assert not (tmp_path / "runs").exists()


def test_size_is_rounded_up_and_the_trained_size_named(tmp_path, weights, caplog):
    with caplog.at_level(logging.INFO, "yolov5"):
        run(tmp_path, weights=str(weights), imgsz=70, plots=False)
    assert "--img-size 70 must be a multiple of the model's stride 32" in caplog.text
    assert "trained at 64" in caplog.text


def other_classes(data):
    file = data.with_name("two.yaml")
    write_yaml(file, {"path": str(data.parent), "train": "images", "val": "images", "names": ["cat", "dog"]})
    return file


@pytest.mark.parametrize(
    "options, message",
    [
        ({"half": True}, "--half .* needs a CUDA GPU"),
        ({"half": True, "bf16": True}, "choose one"),
        ({"task": "test"}, "test"),
        ({"weights": "nosuch.pt"}, "nosuch.pt"),
        ({"data": "nosuch.yaml"}, "nosuch.yaml"),
        ({"iou_thress": 0.5}, "unknown option 'iou_thress'.*iou_thres"),
        ({"data": other_classes}, "knows 3 classes, .*two.yaml has 2"),
    ],
)
def test_mistakes_are_named(tmp_path, weights, data, options, message):
    options = {key: str(value(data)) if callable(value) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        run(tmp_path, **{"weights": str(weights), **options})
    assert not (tmp_path / "runs").exists()


def test_original_checkpoint_without_data_is_refused(tmp_path, golden_dir):
    with pytest.raises(UserError, match="give --data"):
        run(tmp_path, weights=str(golden_dir / "yolov5n-v6-coco.pt"))


def test_names_that_differ_are_pointed_out(tmp_path, weights, data, caplog):
    file = data.with_name("renamed.yaml")
    names = {0: "cat", 1: "hound", 2: "cow"}
    write_yaml(file, {"path": str(data.parent), "train": "images", "val": "images", "names": names})
    with caplog.at_level(logging.WARNING, "yolov5"):
        run(tmp_path, weights=str(weights), data=str(file), plots=False)
    assert "'hound' was 'dog'" in caplog.text


def test_high_confidence_threshold_is_warned_of(tmp_path, weights, caplog):
    with caplog.at_level(logging.WARNING, "yolov5"):
        run(tmp_path, weights=str(weights), conf_thres=0.25, plots=False)
    assert "mAP comes out too low" in caplog.text


def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    done = subprocess.run([sys.executable, "val.py", "--weights", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "text.pt" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_golden_figures_on_coco128(tmp_path, golden_dir, datasets_dir, monkeypatch):
    """YOLOv5 7.0's four figures within 0.001; COCO's own mAP within 0.003 of ours."""
    results = []
    measured = val_tasks.evaluate
    monkeypatch.setattr(val_tasks, "evaluate", lambda *args, **kw: results.append(measured(*args, **kw)) or results[-1])
    figures, _, _ = val.run(
        datasets_dir / "coco128" / "coco128.yaml",
        weights=str(golden_dir / "yolov5n-v6-coco.pt"),
        batch_size=16,
        device="cpu",
        coco_metrics=True,
        plots=False,
        project=str(tmp_path),
    )
    golden = json.loads((golden_dir / "val_coco128.json").read_text())
    ours = dict(zip(("P", "R", "mAP50", "mAP50-95"), figures[:4], strict=True))
    assert ours == pytest.approx(golden, abs=0.001)
    assert results[0].coco.ap == pytest.approx(ours["mAP50-95"], abs=0.003)
