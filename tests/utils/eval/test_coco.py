"""COCO's figures on a scene worked out by hand, result files, and what is said when the library is missing."""

import json

import numpy as np
import pytest

from utils.checks import UserError
from utils.eval import coco
from utils.eval.coco import COCO80_TO_91, ImageRecord


def record(path, detections, labels, shape_hw=(200, 200)):
    detections = np.array(detections, np.float32).reshape(-1, 6)
    return ImageRecord(path, shape_hw, detections, np.array(labels, np.float32).reshape(-1, 5))


def scene():
    """Image a: a 20 x 20 (small) found exactly and a 100 x 100 (large) missed; image b: a false detection.

    One class. At the detection of 0.9 recall is 1/2 and precision 1, the false one of 0.8 changes nothing at higher
    confidence: AP is 51 of 101 recalls (0 to 0.50) = 0.50495. Small: 1. Large: 0. Medium: no label, -1.
    """
    return [
        record("a.jpg", [[10, 10, 30, 30, 0.9, 0]], [[0, 10, 10, 30, 30], [0, 50, 50, 150, 150]]),
        record("b.jpg", [[10, 10, 30, 30, 0.8, 0]], []),
    ]


def test_figures_of_a_small_scene():
    figures = coco.coco_figures(scene(), nc=1)
    assert figures.ap == pytest.approx(51 / 101)
    assert figures.ap50 == figures.ap75 == pytest.approx(51 / 101)
    assert (figures.ap_medium, figures.ap_large) == (-1, 0)
    assert figures.ap_small == pytest.approx(1)
    assert (figures.ar_1, figures.ar_100, figures.ar_small) == (0.5, 0.5, 1)


def test_nothing_detected_is_zero():
    assert coco.coco_figures([record("a.jpg", [], [[0, 10, 10, 30, 30]])], nc=2).ap == 0


def test_lines_name_all_twelve():
    lines = coco.figure_lines(coco.coco_figures(scene(), nc=1))
    assert len(lines) == 12
    assert lines[0].endswith("0.505") and "0.50:0.95" in lines[0]


def test_annotation_file_gives_the_same_as_labels_in_memory(tmp_path):
    records = [r._replace(path=f"{number:012d}.jpg") for number, r in enumerate(scene())]
    annotations = [
        {"id": 7 + row, "image_id": 0, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for row, box in enumerate([[10, 10, 20, 20], [50, 50, 100, 100]])
    ]
    images = [{"id": number, "height": 200, "width": 200} for number in range(3)]
    dataset = {"images": images, "categories": [{"id": 1, "name": "x"}], "annotations": annotations}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(dataset))
    rows = coco.predictions(records, [1])
    assert coco.annotated_figures(rows, [0, 1], file) == pytest.approx(coco.coco_figures(records, nc=1))
    with pytest.raises(UserError, match="lists no image 9"):
        coco.annotated_figures(rows, [0, 9], file)
    file.write_text("{}")
    with pytest.raises(UserError, match="not a COCO annotation file"):
        coco.annotated_figures(rows, [0, 1], file)


def test_results_are_rounded_as_coco_writes_them():
    rows = coco.predictions([record("dir/000000000139.jpg", [[1.23456, 2, 4.5, 6, 0.1234567, 79]], [])], COCO80_TO_91)
    assert rows == [{"image_id": 139, "category_id": 90, "bbox": [1.235, 2, 3.265, 4], "score": 0.12346}]
    assert record("dir/cat 1.jpg", [], []).image_id == "cat 1"


def test_categories(tmp_path):
    assert [COCO80_TO_91[index] for index in (0, 11, 79)] == [1, 13, 90]
    assert len(COCO80_TO_91) == 80
    assert coco.category_ids([tmp_path / "coco" / "val2017.txt"], 80) == COCO80_TO_91
    assert list(coco.category_ids([tmp_path / "mine" / "val"], 3)) == [0, 1, 2]


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(coco, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        coco.coco_figures(scene(), nc=1)
