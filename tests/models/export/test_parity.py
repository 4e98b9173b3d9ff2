"""The comparison of an export with its checkpoint: what it measures, and that it finds what is wrong."""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import export
from models.backends import ModelFile
from models.deploy import rewrite
from models.export import verify as tested
from models.export.formats import TOLERANCES, ExportConfig, Tolerance
from models.export.run import make_jobs
from models.export.torchscript import export as write_torchscript
from models.export.verify import Parity, check_parity, model_inputs, sample_images
from utils.errors import UserError
from utils.images import read_image
from utils.nms import NMSConfig

EXACT = TOLERANCES["float32"]
BOX = [10, 10, 50, 50]


def job_for(weights, *words):
    options = export.build_parser().parse_args(["--weights", str(weights), *words])
    (job,) = make_jobs(Path(weights), ExportConfig(**vars(options)).checked(), torch.device("cpu"))
    return job


@pytest.fixture(scope="module")
def images(golden_dir):
    return sample_images(sorted((golden_dir / "images").glob("*.jpg")))


@pytest.fixture(scope="module")
def published(golden_dir, tmp_path_factory):
    """The published checkpoint, exported to TorchScript for rectangles."""
    weights = tmp_path_factory.mktemp("parity") / "n.pt"
    weights.write_bytes((golden_dir / "yolov5n-v6-coco.pt").read_bytes())
    job = job_for(weights, "--include", "torchscript", "--img", "256", "320", "--dynamic")
    return job, write_torchscript(job)


def test_a_good_export_agrees_on_real_detections(published, images):
    found = check_parity(*published, images, EXACT)
    assert found.problems(EXACT) == []
    assert found.detections >= 10 and found.missed == 0 and 0 < found.box_px < 0.01
    assert found.images == len(images) + tested.BATCH
    assert f"{found.detections} of {found.detections} detections" in found.summary()


def test_a_file_of_other_weights_is_found_out(published, images):
    job, path = published
    source = copy.deepcopy(job.source)
    source.head.anchors *= 1.05
    found = check_parity(replace(job, source=source), path, images, EXACT)
    assert found.box_px > 1 and found.missed > 0
    assert len(found.problems(EXACT)) >= 2


def test_swapped_classes_are_found_out(published, images, tmp_path):
    job, _ = published
    source = copy.deepcopy(job.source)
    for conv in source.head.m:
        for tensor in (conv.weight, conv.bias):
            by_anchor = tensor.view(3, 85, *tensor.shape[1:])
            by_anchor[:, [5, 10]] = by_anchor[:, [10, 5]].clone()  # person and bus
    wrong = replace(job, model=rewrite(source), weights=tmp_path / "swapped.pt")
    found = check_parity(job, write_torchscript(wrong), images, EXACT)
    assert found.missed > 0 and found.score > 0.5 and found.box_px < 0.01


def test_detections_at_the_threshold_are_not_missed():
    job = argparse.Namespace(metadata=argparse.Namespace(nms=NMSConfig(0.25, 0.45, 10, False)))
    job.config = argparse.Namespace(topk_per_class=10)
    rows = np.array([[[30, 30, 40, 40, 0.9, 1.0], [200, 200, 40, 40, 0.2505, 1.0]]], np.float32)
    one = np.array([[*BOX, 0.9, 0], [0] * 6], np.float32)
    close, far = Parity(), Parity()
    tested._compare_detections(close, job, rows, [one], margin=1e-3)
    tested._compare_detections(far, job, rows, [one], margin=1e-4)
    assert (close.missed, close.detections) == (0, 2)
    assert (far.missed, far.detections) == (1, 3)


def test_limits_on_numbers_of_detections_hold_for_the_checkpoint_too():
    """Three boxes of class 0 and one of class 1; two of a class and three in all are kept: 0.9, 0.8 and 0.6."""
    job = argparse.Namespace(metadata=argparse.Namespace(nms=NMSConfig(0.25, 0.45, 3, False)))
    job.config = argparse.Namespace(topk_per_class=2)
    centres = [50, 150, 250, 350]
    classes = [[1, 0], [1, 0], [1, 0], [0, 1]]
    confidences = [0.9, 0.8, 0.7, 0.6]
    rows = [[x, 50, 40, 40, conf, *one] for x, conf, one in zip(centres, confidences, classes, strict=True)]
    kept = [[x - 20, 30, x + 20, 70, conf, kind] for x, conf, kind in ((50, 0.9, 0), (150, 0.8, 0), (350, 0.6, 1))]
    found = Parity()
    tested._compare_detections(found, job, np.array([rows], np.float32), [np.array(kept, np.float32)], margin=1e-3)
    assert (found.missed, found.confidence) == (0, pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(
    ("other", "missed"),
    [
        ([*BOX, 0.8, 1], 0),
        ([*BOX, 0.8, 2], 1),  # another class
        ([10, 10, 50, 51, 0.8, 1], 0),  # IoU 40/41
        ([10, 10, 50, 53, 0.8, 1], 1),  # IoU 40/43
    ],
)
def test_a_counterpart_has_the_class_and_the_place(other, missed):
    found = Parity()
    tested._match(found, np.array([[*BOX, 0.9, 1]]), np.array([other]))
    assert (found.detections, found.missed) == (1, missed)
    assert found.confidence == pytest.approx(0 if missed else 0.1)


def test_none_found_on_the_other_side_is_all_missed():
    found = Parity()
    tested._match(found, np.array([[*BOX, 0.9, 1]]), np.zeros((0, 6)))
    assert (found.detections, found.missed) == (1, 1)


def test_outputs_that_cannot_be_compared_are_problems():
    rows = np.full((1, 4, 7), 0.5, np.float32)
    for output, words in ((rows[:, :3], "instead of"), (np.full_like(rows, np.nan), "no numbers")):
        found = Parity()
        tested._compare_rows(found, rows, output, EXACT)
        assert len(found.problems(EXACT)) == 1 and words in found.problems(EXACT)[0]


def test_boxes_count_where_nothing_is_sure_enough_to_be_detected():
    """500 rows at confidence 0.01 to 0.2: of each image the 100 most confident are looked at."""
    rows = np.random.default_rng(0).uniform(50, 100, (2, 500, 6)).astype(np.float32)
    rows[..., 4], rows[..., 5] = np.linspace(0.2, 0.01, 500), 1
    for moved, shift, limit in ((3, 20, EXACT), (0, 0.2, EXACT), (0, 20, TOLERANCES["int8"])):
        output = rows.copy()
        output[0, 10:13, 0] += shift
        output[:, 100:, :4] = 0
        found = Parity()
        tested._compare_rows(found, rows, output, limit)
        assert (found.moved, found.boxes) == (moved, 200)
        assert found.problems(limit) == []  # 3 of 200 are within the limit of a share
    output[1, :10, 1] += 30
    found = Parity()
    tested._compare_rows(found, rows, output, EXACT)
    (problem,) = found.problems(EXACT)
    assert problem == "a share of 0.065 of the raw boxes lies elsewhere (limit 0.02)"


class Silent:
    """An export with NMS inside that never finds anything."""

    has_nms = True

    def predict(self, images):
        return np.zeros((len(images), 300, 6), np.float32)


@pytest.mark.parametrize(("conf_thres", "missed"), [(0.999, False), (0.25, True)])
def test_an_export_that_finds_nothing_fails_also_where_nothing_is_to_be_found(published, images, conf_thres, missed):
    job, path = published
    job = replace(job, metadata=replace(job.metadata, nms=NMSConfig(conf_thres, 0.45, 300, False)))
    found = check_parity(job, ModelFile(path, job.metadata, None, Silent), images[:1], EXACT)
    (problem,) = found.problems(EXACT)
    assert ("no counterpart" if missed else "nothing was compared") in problem
    assert bool(found.missed) == missed
    assert found.problems(TOLERANCES["int8"]) == []  # its mAP decides


def test_limits_are_inclusive_and_each_is_named():
    limit = Tolerance(box_px=1, score=0.5, unmatched=0.25)
    assert Parity(box_px=1, score=0.5, confidence=0.5, detections=4, missed=1).problems(limit) == []
    beyond = Parity(box_px=1.5, score=0.6, confidence=0.7, detections=4, missed=2).problems(limit)
    assert [problem.split()[0] for problem in beyond] == ["boxes", "scores", "confidences", "a"]
    assert "1.5 px (limit 1)" in beyond[0]


def test_images_are_upright_and_wide_dark_and_tiny(images, golden_dir):
    paths = sorted((golden_dir / "images").glob("*.jpg"))
    assert len(images) == min(len(paths), tested.SAMPLES) + 3
    turned, dark, tiny = images[-3:]
    assert turned.shape[:2] == images[0].shape[1::-1]
    assert dark.mean() < 0.2 * read_image(paths[1]).mean()
    assert max(tiny.shape) == 40


def test_a_damaged_picture_is_named_and_left_out(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((20, 30, 3), 200, np.uint8))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with caplog.at_level("WARNING", "yolov5"):
        assert len(sample_images([tmp_path / "a.png", tmp_path / "b.png"])) == 4
    assert any("b.png" in message for message in caplog.messages)
    with pytest.raises(UserError, match="no image to compare with: .*b.png"):
        sample_images([tmp_path / "b.png"])


@pytest.mark.parametrize(
    ("words", "shapes"),
    [
        ("--include torchscript --img 64 96", [(5, 3, 64, 96)]),
        ("--include torchscript --img 64 96 --dynamic", [(1, 3, 64, 96), (1, 3, 64, 32), (3, 3, 64, 96)]),
        ("--include yolov5 --img 64", [(1, 3, 64, 64), (1, 3, 64, 32), (3, 3, 64, 64)]),
    ],
)
def test_fixed_files_get_padding_and_dynamic_ones_rectangles(write_checkpoint, words, shapes):
    job = job_for(write_checkpoint("yolov5n.yaml"), *words.split())
    wide, tall = np.zeros((60, 90, 3), np.uint8), np.zeros((90, 45, 3), np.uint8)
    seen = [images.shape for images in model_inputs([wide, tall, wide, tall, wide], job)]
    assert set(seen) == set(shapes) and seen[-1] == shapes[-1]
