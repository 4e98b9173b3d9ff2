"""The evaluation loop on scenes that a scripted model 'detects': figures, native pixels, losses, files, hooks."""

import gc
import json
import logging
import weakref
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.backends import ArrayBackend, Metadata
from models.inference.evaluation import module_predictor
from models.inference.predictor import Predictor
from utils.callbacks import Callbacks
from utils.dataloaders.dataset import ShapeInfo
from utils.dataloaders.loader import Batch
from utils.errors import UserError
from utils.eval import evaluate as evaluation
from utils.eval.evaluate import NMS, EvalOptions
from utils.eval.report import HEADER, speed_line

NAMES = {0: "cat", 1: "dog"}


def evaluate(model, loader, conf_thres=0.001, **options):
    """Evaluates a PyTorch module or a runtime."""
    nms = replace(NMS, conf_thres=conf_thres, agnostic=options.get("single_cls", False))
    predictor = module_predictor(model, nms) if isinstance(model, nn.Module) else Predictor(model, nms)
    return evaluation.evaluate(predictor, loader, **options)


class Scripted(nn.Module):
    """Returns the given rows [x, y, w, h, obj, class probabilities] for each batch in turn."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = [torch.tensor(batch, dtype=torch.float32) for batch in batches]
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.batches[len(self.seen) - 1], [torch.ones(1, dtype=torch.bfloat16)]


def wide_batch(name="a"):
    """Image 200 x 100 letterboxed to 128 x 128: ratio 0.6, drawn 120 x 60, padding 4 and 34.

    Its label is a cat with corners (50, 20) to (150, 80), in padded pixels (34, 46) to (94, 82).
    """
    target = [0, 0, 64 / 128, 64 / 128, 60 / 128, 36 / 128]
    shape = ShapeInfo((100, 200), ((0.6, 0.6), (4.0, 34.0)))
    images = torch.full((1, 3, 128, 128), 51, dtype=torch.uint8)
    return Batch(images, torch.tensor([target]), [f"x/{name}.jpg"], [shape])


EXACT = [64, 64, 60, 36, 0.9, 1, 0]
ELSEWHERE = [20, 100, 30, 30, 0.8, 0, 1]


def test_exact_detection_scores_0_995_in_native_pixels(tmp_path):
    result = evaluate(Scripted([[EXACT]]), [wide_batch()], names=NAMES, coco_metrics=True)
    assert result.as_tuple() == pytest.approx((1, 1, 0.995, 0.995, 0, 0, 0))
    assert result.maps == pytest.approx([0.995, 0.995])  # no dogs anywhere: the overall figure
    assert result.fitness == pytest.approx(0.995)
    assert result.seen == 1
    (record,) = result.records
    np.testing.assert_allclose(record.labels, [[0, 50, 20, 150, 80]], atol=1e-4)
    np.testing.assert_allclose(record.detections, [[50, 20, 150, 80, 0.9, 0]], atol=1e-4)
    assert result.coco.ap == pytest.approx(1)


class Forgetful(nn.Module):
    """Finds the same in every image and keeps nothing but a weak reference to what it returned."""

    def __init__(self):
        super().__init__()
        self.returned = []

    def forward(self, images):
        rows, raw = torch.tensor([[EXACT]] * len(images)), torch.ones(len(images))
        self.returned += [weakref.ref(rows), weakref.ref(raw), weakref.ref(images)]
        return rows, [raw]


def test_nothing_of_a_batch_is_kept_once_it_was_evaluated():
    """So a data set of any size takes the memory of one batch and the next, and the figures of each image."""
    model, alive, images = Forgetful(), [], []

    class Batches:
        def __len__(self):
            return 12

        def __iter__(self):
            for index in range(len(self)):
                gc.collect()
                alive.append(sum(reference() is not None for reference in images + model.returned))
                batch = wide_batch(str(index))
                images.append(weakref.ref(batch.images))
                yield batch

    result = evaluate(model, Batches(), names=NAMES, compute_loss=lambda *_: (None, torch.zeros(3)))
    gc.collect()
    assert result.seen == 12 and result.records == [] and len(model.returned) == 36
    assert max(alive) <= 4, alive  # of the batch before: its image, what the model had of it and returned
    assert not [reference for reference in images + model.returned if reference() is not None]


def test_images_reach_the_model_as_fractions_in_channels_last():
    model = Scripted([[EXACT]])
    evaluate(model, [wide_batch()], names=NAMES)
    (images,) = model.seen
    assert images.dtype == torch.float32 and images.unique().item() == pytest.approx(0.2)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_boxes_of_labels_and_detections_are_clipped_alike():
    """A label that reaches into the padding and the detection of its visible part are the same box: IoU 1."""
    batch = wide_batch()
    batch.targets[0, 2:] = torch.tensor([64, 40, 60, 36]) / 128  # 22 to 58; the image begins at 34
    model = Scripted([[[64, 46, 60, 24, 0.9, 1, 0]]])  # 34 to 58
    assert evaluate(model, [batch], names=NAMES).map == pytest.approx(0.995)


def test_boxes_of_a_long_strip_come_back_to_their_place(tmp_path):
    """200 x 3000 at 640 px is resized to 43 x 640, not to 42.67: each axis has its own ratio."""
    label_xyxy = np.array([2700, 20, 2940, 180])
    seen = label_xyxy * [640 / 3000, 43 / 200, 640 / 3000, 43 / 200] + [0, 10.5, 0, 10.5]
    seen_xywh = np.array([seen[0] + seen[2], seen[1] + seen[3], 2 * (seen[2] - seen[0]), 2 * (seen[3] - seen[1])]) / 2
    shape = ShapeInfo((200, 3000), ((43 / 200, 640 / 3000), (0.0, 10.5)))
    target = torch.tensor([[0, 0, *seen_xywh / [640, 64, 640, 64]]])
    batch = Batch(torch.zeros((1, 3, 64, 640), dtype=torch.uint8), target, ["x/strip.jpg"], [shape])
    model = Scripted([[[*seen_xywh, 0.9, 1, 0]]])
    options = {"save_dir": tmp_path, "save_json": True, "save_txt": True}
    result = evaluate(model, [batch], names=NAMES, **options)
    np.testing.assert_allclose(result.records[0].labels, [[0, *label_xyxy]], atol=1e-3)
    (row,) = json.loads((tmp_path / "predictions.json").read_text())
    assert row["bbox"] == pytest.approx([2700, 20, 240, 160], abs=1e-2)
    line = np.loadtxt(tmp_path / "labels" / "strip.txt")
    np.testing.assert_allclose(line, [0, 2820 / 3000, 0.5, 240 / 3000, 160 / 200], atol=1e-5)


def test_single_class_ignores_classes():
    model = Scripted([[[64, 64, 60, 36, 0.9, 0, 1]]])
    assert evaluate(model, [wide_batch()], names=NAMES).map == 0
    model = Scripted([[[64, 64, 60, 36, 0.9, 0, 1]]])
    result = evaluate(model, [wide_batch()], names=NAMES, single_cls=True)
    assert result.map == pytest.approx(0.995)
    assert result.maps.shape == (1,)


def test_labels_join_the_candidates_as_sure_detections():
    """The model sees a dog in the cat's place, half as sure: its label stands beside it, in native pixels."""
    model = Scripted([[[64, 64, 60, 36, 0.5, 0, 1]]])
    result = evaluate(model, [wide_batch()], names=NAMES, save_hybrid=True, coco_metrics=True)
    np.testing.assert_allclose(
        result.records[0].detections, [[50, 20, 150, 80, 1, 0], [50, 20, 150, 80, 0.5, 1]], atol=1e-4
    )
    model = Scripted([[[64, 64, 60, 36, 0.5, 0, 1]]])
    assert evaluate(model, [wide_batch()], names=NAMES, save_hybrid=True, single_cls=True).map > 0.99


class Viewed(Scripted):
    """Moves what it finds when asked to look in several views."""

    def forward(self, images, augment=False):
        rows, raw = super().forward(images)
        return (rows + torch.tensor([100, 0, 0, 0, 0, 0, 0]), None) if augment else (rows, raw)


def test_a_module_is_asked_for_its_views_through_the_predictor():
    backend = module_predictor(Viewed([[EXACT]], [[EXACT]]).train(), NMS).backend
    assert evaluation.evaluate(Predictor(backend, NMS), [wide_batch()], names=NAMES).map > 0.99
    assert len(backend.raw) == 1
    assert evaluation.evaluate(Predictor(backend, NMS, augment=True), [wide_batch()], names=NAMES).map == 0
    assert len(backend.raw) == 0  # views have no raw outputs


def test_losses_are_means_over_batches_in_float32():
    seen = []

    def loss(raw, targets):
        seen.append((raw[0].dtype, len(targets)))
        return torch.zeros(1), torch.tensor([1.0, 2.0, 3.0]) * len(seen)

    result = evaluate(Scripted([[EXACT]], [[EXACT]]), [wide_batch(), wide_batch()], names=NAMES, compute_loss=loss)
    assert result.losses == pytest.approx((1.5, 3, 4.5))
    assert seen == [(torch.float32, 1)] * 2


def test_training_mode_is_restored_and_no_gradients_are_kept():
    model = Scripted([[EXACT]]).train()
    evaluate(model, [wide_batch()], names=NAMES, training=True)
    assert model.training
    with pytest.raises(RuntimeError, match="stop here"):
        evaluate(Failing().train(), [wide_batch()], names=NAMES)


class Failing(nn.Module):
    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        raise RuntimeError("stop here")


def test_table_lists_classes_and_speed(caplog):
    with caplog.at_level(logging.INFO, "yolov5"):
        evaluate(Scripted([[EXACT, ELSEWHERE]]), [wide_batch()], names=NAMES)
    rows = [line.split() for line in caplog.messages]
    assert ["all", "1", "1", "1", "1", "0.995", "0.995"] in rows
    assert ["cat", "1", "1", "1", "1", "0.995", "0.995"] in rows
    assert not any(row[0] == "dog" for row in rows)
    assert "ms NMS per image at shape (1, 3, 128, 128)" in caplog.messages[-1]
    assert HEADER.split() == ["Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95"]


def test_training_logs_one_row_and_many_classes_need_verbose(caplog):
    names = {index: f"class{index}" for index in range(60)}
    for options, classes in (({"training": True}, 0), ({}, 0), ({"verbose": True}, 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "yolov5"):
            evaluate(Scripted([[[*EXACT[:5], 1, *[0] * 59]]]), [wide_batch()], names=names, **options)
        assert sum("class0" in line for line in caplog.messages) == classes


def test_without_labels_detections_are_written_and_figures_absent(tmp_path, caplog):
    """Two of three images have a detection above 0.25, one of them two; a third is at 0.2."""
    batches = [wide_batch(name)._replace(targets=torch.zeros(0, 6)) for name in "abc"]
    model = Scripted([[EXACT, ELSEWHERE]], [[EXACT, [0] * 7]], [[[*EXACT[:4], 0.2, 1, 0]]])
    options = {"save_dir": tmp_path, "plots": True, "save_txt": True, "save_json": True, "coco_metrics": True}
    with caplog.at_level(logging.INFO, "yolov5"):
        result = evaluate(model, batches, names=NAMES, **options)
    assert np.isnan(result.as_tuple()[:4]).all() and np.isnan(result.maps).all() and np.isnan(result.fitness)
    assert ["all", "3", "0", "-", "-", "-", "-"] in [line.split() for line in caplog.messages]
    assert result.confusion.matrix[:2, 2].tolist() == [2, 1] and result.alarmed == 2
    assert "no P, R or mAP. Detections above confidence 0.25: 3, in 2 of 3 images" in caplog.text
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 4
    assert len(list((tmp_path / "labels").iterdir())) == 3
    assert [file.name for file in tmp_path.glob("*.png")] == ["confusion_matrix.png"]  # no curves without figures


def test_files_of_a_run(tmp_path):
    model = Scripted([[EXACT, ELSEWHERE]], [[[0] * 7]])
    evaluate(
        model,
        [wide_batch("000012"), wide_batch("b")],
        names=NAMES,
        save_dir=tmp_path,
        plots=True,
        save_txt=True,
        save_conf=True,
        save_json=True,
        json_name="best_predictions.json",
        categories=[17, 18],
    )
    images = {f"val_batch{batch}_{kind}.jpg" for batch in range(2) for kind in ("labels", "pred")}
    curves = {f"{name}.png" for name in ("PR_curve", "F1_curve", "P_curve", "R_curve", "confusion_matrix")}
    assert {path.name for path in tmp_path.iterdir()} == images | curves | {"labels", "best_predictions.json"}
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["000012.txt"]  # none without detections
    first, *_ = (tmp_path / "labels" / "000012.txt").read_text().splitlines()
    assert [float(value) for value in first.split()] == pytest.approx([0, 0.5, 0.5, 0.5, 0.6, 0.9], abs=1e-5)
    rows = json.loads((tmp_path / "best_predictions.json").read_text())
    assert rows[0] == {"image_id": 12, "category_id": 17, "bbox": [50, 20, 100, 60], "score": 0.9}
    assert [row["category_id"] for row in rows] == [17, 18]


@pytest.mark.parametrize(
    ("categories", "file_name", "said"),
    [
        (["dog", "cat"], "12.jpg", ""),
        (["dog", "kitten"], "12.jpg", "has the name of class 'cat'"),
        (["dog", "cat"], "13.jpg", "lists no single image x/12.jpg"),
    ],
)
def test_annotations_replace_map_where_names_and_images_fit(tmp_path, caplog, categories, file_name, said):
    """Categories are counted from 1 in the file's own order, and the image has a number of its own."""
    annotations = tmp_path / "instances.json"
    truth = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [50, 20, 100, 60], "area": 6000, "iscrowd": 0}
    dataset = {"images": [{"id": 7, "file_name": file_name}], "annotations": [truth]}
    dataset["categories"] = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    annotations.write_text(json.dumps(dataset))
    options = {"save_dir": tmp_path, "save_json": True, "annotations": annotations}
    with caplog.at_level(logging.WARNING, "yolov5"):
        result = evaluate(Scripted([[EXACT]]), [wide_batch("12")], names=NAMES, **options)
    (row,) = json.loads((tmp_path / "predictions.json").read_text())
    assert result.map == pytest.approx(0.995 if said else 1)
    assert (row["image_id"], row["category_id"]) == (12 if said else 7, 2 if "cat" in categories else 0)
    assert said in caplog.text and bool(caplog.text) == bool(said)


class Files(list):
    """Batches of a data set whose images are known."""

    dataset = Namespace(table=Namespace(image_paths=("x/a.jpg", "y/a.jpg", "y/a-2.jpg", "y/a_2.jpg", "z/none.jpg")))


FOUND_IN = {"x/a.jpg": [EXACT], "y/a.jpg": [ELSEWHERE], "y/a-2.jpg": [[30, 60, 9, 9, 0.7, 1, 0]]}


@pytest.mark.parametrize("known", [True, False])
def test_every_image_has_a_label_file_of_its_own(tmp_path, caplog, known):
    """Whatever their order: y/a.jpg comes first, and takes the name only where the others are not known."""
    paths = ["y/a.jpg", "x/a.jpg", "y/a_2.jpg", "z/none.jpg", "y/a-2.jpg"]
    batches = [wide_batch()._replace(paths=[path]) for path in paths]
    model = Scripted(*[[FOUND_IN.get(path, [[0] * 7])] for path in paths])
    (tmp_path / "labels").mkdir()
    for stale in ("none", "a_2", "other"):  # of a former run: two of images in which nothing is found now
        (tmp_path / "labels" / f"{stale}.txt").write_text("1 0.5 0.5 1 1\n")
    with caplog.at_level(logging.INFO, "yolov5"):
        loader = Files(batches) if known else batches
        evaluate(model, loader, names=NAMES, save_dir=tmp_path, save_txt=True)
    widths = {file.stem: float(file.read_text().split()[3]) for file in (tmp_path / "labels").iterdir()}
    names = ["a", "a-3", "a-2"] if known else ["a-2", "a", "a-2-2"]
    assert widths == pytest.approx(
        {**dict(zip(names, (60 / 120, 30 / 120, 9 / 120), strict=True)), "other": 1}, rel=1e-3
    )
    assert f"3 labels saved to {tmp_path / 'labels'}" in caplog.text
    assert f"a-{3 if known else 2}.txt is of {'y' if known else 'x'}/a.jpg" in caplog.text


def test_label_folder_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "labels").write_text("a file")
    with pytest.raises(UserError, match="labels"):
        evaluate(Scripted(), [], names=NAMES, save_dir=tmp_path, save_txt=True)


def test_hooks_are_called_in_order():
    calls, callbacks = [], Callbacks()
    for hook in ("on_val_start", "on_val_batch_start", "on_val_image_end", "on_val_batch_end", "on_val_end"):
        callbacks.register_action(hook, callback=lambda *args, hook=hook: calls.append((hook, len(args))))
    evaluate(Scripted([[EXACT]]), [wide_batch()], names=NAMES, callbacks=callbacks)
    expected = [("on_val_start", 0), ("on_val_batch_start", 0), ("on_val_image_end", 5), ("on_val_batch_end", 0)]
    assert calls == [*expected, ("on_val_end", 0)]


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="save_dir"):
        EvalOptions(plots=True)
    with pytest.raises(TypeError):
        evaluate(Scripted(), [], names=NAMES, colour="red")


def test_speed_line_is_what_scripts_look_for():
    line = speed_line((0.52, 40.16, 3.0), (16, 3, 672, 672))
    assert line == "Speed: 0.5ms pre-process, 40.2ms inference, 3.0ms NMS per image at shape (16, 3, 672, 672)"


class Runtime(ArrayBackend):
    """Answers NumPy arrays that may not be written to, and counts what it is asked."""

    batch, dynamic, device = None, True, "nowhere"

    def __init__(self, rows, nms=None):
        self.rows, self.images, self.waited = np.float32([rows]), None, 0
        self.rows.flags.writeable = False
        self.metadata = Metadata(NAMES, 32, (128, 128), nms=nms)

    def preprocess(self, images):
        self.images = images
        return super().preprocess(images)

    def run(self, inputs):
        return self.rows

    def synchronize(self):
        self.waited += 1


@pytest.mark.filterwarnings("error")
def test_a_runtime_of_numpy_rows_scores_as_a_module_does():
    runtime = Runtime([EXACT, ELSEWHERE])
    result = evaluate(runtime, [wide_batch()], names=NAMES)
    module = evaluate(Scripted([[EXACT, ELSEWHERE]]), [wide_batch()], names=NAMES)
    assert result.as_tuple() == module.as_tuple()
    assert isinstance(runtime.images, np.ndarray) and runtime.images.dtype == np.uint8 and runtime.waited == 3


def test_detections_chosen_by_the_model_are_taken_as_they_are():
    """Two boxes that NMS would make one of stay two; the zeros that fill the list up are no detections."""
    rows = [[34, 46, 94, 82, 0.9, 0], [34, 46, 94, 82, 0.8, 0], [0, 0, 0, 0, 0, 0]]
    result = evaluate(Runtime(rows, nms=NMS), [wide_batch()], names=NAMES, coco_metrics=True)
    np.testing.assert_allclose(result.records[0].detections[:, 4], [0.9, 0.8])
    assert result.map == pytest.approx(0.995)
    result = evaluate(Runtime(rows, nms=NMS), [wide_batch()], names=NAMES, coco_metrics=True, conf_thres=0.85)
    assert len(result.records[0].detections) == 1
    rows = [[34, 46, 94, 82, 0.9, 1]]
    assert evaluate(Runtime(rows, nms=NMS), [wide_batch()], names=NAMES, single_cls=True).map50 > 0.99


def test_quiet_evaluation_logs_nothing(caplog):
    with caplog.at_level(logging.INFO, "yolov5"):
        evaluate(Scripted([[EXACT]]), [wide_batch()], names=NAMES, quiet=True)
    assert not caplog.records
