"""COCO's figures on a scene worked out by hand, result files, and what is said when the library is missing."""

import json

import numpy as np
import pytest

from utils.errors import UserError
from utils.eval import coco
from utils.eval.coco import COCO80_TO_91, ImageRecord, detection_rows
from utils.files import ROOT, read_yaml


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


def box(image, category, *bbox):
    return {"id": 7, "image_id": image, "category_id": category, "bbox": list(bbox)}


def annotation_file(tmp_path, **changes):
    """The scene's boxes in a file of its own numbers: image a is 31, b is 5; category 4 is "cat".

    Beside them there are an image and a category that are not evaluated, with a box each.
    """
    content = {
        "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 31, "file_name": "a.jpg"}, {"id": 1, "file_name": "c.jpg"}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [box(31, 4, 10, 10, 20, 20), box(31, 4, 50, 50, 100, 100), box(1, 4, 0, 0, 50, 50)],
    }
    content["annotations"].append(box(31, 9, 0, 0, 50, 50))
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({**content, **changes}))
    return file


def test_annotation_file_gives_its_numbers_and_the_figures_of_what_was_evaluated(tmp_path):
    """Neither the third image nor the dog counts, though both have boxes that nothing was to find."""
    truth = coco.Annotations(annotation_file(tmp_path))
    categories, ids = truth.category_ids({0: "cat"}), truth.image_ids(["x/a.jpg", "x/b.jpg"])
    assert (categories, ids) == ([4], [31, 5])
    rows = [
        row
        for one, image in zip(scene(), ids, strict=True)
        for row in detection_rows(image, one.detections, categories)
    ]
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(31, 4), (5, 4)]
    assert truth.figures(rows, ids, categories) == pytest.approx(coco.coco_figures(scene(), nc=1))


@pytest.mark.parametrize(
    ("names", "ids"),
    [(["dog", "cat"], [9, 4]), (["Cat"], [4]), (["cat", "Cat"], None), (["cow", "cat"], None)],
)
def test_categories_are_found_by_name(tmp_path, names, ids):
    truth = coco.Annotations(annotation_file(tmp_path))
    if ids is None:
        with pytest.raises(UserError, match=r"instances\.json: no one of its categories \('dog', 'cat'\)"):
            truth.category_ids(dict(enumerate(names)))
    else:
        assert truth.category_ids(dict(enumerate(names))) == ids


def test_capitals_matter_where_they_distinguish(tmp_path):
    categories = [{"id": 1, "name": "Cat"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "DOG"}]
    truth = coco.Annotations(annotation_file(tmp_path, categories=categories))
    assert truth.category_ids({0: "cat", 1: "Cat", 2: "DOG"}) == [2, 1, 3]
    with pytest.raises(UserError, match="no one of its categories .* class 'cat'"):
        truth.category_ids({0: "cat", 1: "dog"})


def test_images_are_found_by_as_much_of_their_path_as_the_file_names(tmp_path):
    images = [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": "b/1.jpg"}, {"id": 3, "file_name": "2.jpg"}]
    truth = coco.Annotations(annotation_file(tmp_path, images=images))
    assert truth.image_ids(["/x/b/1.jpg", "/x/a/1.jpg", "/x/a/2.jpg"]) == [2, 1, 3]
    with pytest.raises(UserError, match=r"lists no single image /x/c/1\.jpg \(1 of 2 images\)"):
        truth.image_ids(["/x/a/1.jpg", "/x/c/1.jpg"])
    with pytest.raises(UserError, match="it does not tell their folders"):
        truth.image_ids(["/x/a/2.jpg", "/x/b/2.jpg"])


def test_an_image_without_detections_is_scored_too(tmp_path):
    assert coco.Annotations(annotation_file(tmp_path)).figures([], [31, 5], [4]).ap == 0


@pytest.mark.parametrize(
    "changes",
    [
        *({"images": [{"id": 1}]}, {"annotations": [{"image_id": 31}]}, {"categories": 3}),
        *({"images": [{"id": "1", "file_name": "a.jpg"}]}, {"annotations": [box("31", 4, 0, 0, 9, 9)]}),
    ],
)
def test_a_file_that_is_no_annotation_file_is_named(tmp_path, changes):
    with pytest.raises(UserError, match=r"instances\.json: not a COCO annotation file"):
        coco.Annotations(annotation_file(tmp_path, **changes))


def test_results_are_rounded_as_coco_writes_them():
    rows = detection_rows(139, np.float32([[1.23456, 2, 4.5, 6, 0.1234567, 79]]), COCO80_TO_91)
    assert rows == [{"image_id": 139, "category_id": 90, "bbox": [1.235, 2, 3.265, 4], "score": 0.12346}]


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["/x/a/000000000139.jpg", "/x/b/cat 1.jpg"], [139, "cat 1"]),
        (["/x/a/0001.jpg", "/x/b/1.jpg", "/x/b/cat.jpg"], ["a/0001.jpg", "b/1.jpg", "b/cat.jpg"]),
        (["/x/a/cat.jpg", "/x/a/cat.png"], ["cat.jpg", "cat.png"]),
    ],
)
def test_no_two_images_share_an_identifier(paths, ids, caplog):
    with caplog.at_level("WARNING", "yolov5"):
        assert coco.image_ids(paths) == ids
    assert ("would share the image_id" in caplog.text) == ("/" in str(ids[0]) or "." in str(ids[0]))


def test_coco_s_own_numbers_are_for_coco_alone(tmp_path):
    assert [COCO80_TO_91[index] for index in (0, 11, 79)] == [1, 13, 90]
    assert len(COCO80_TO_91) == 80
    listed = [tmp_path / "coco" / "val2017.txt"]
    names = read_yaml(ROOT / "data" / "coco.yaml")["names"]
    assert coco.category_ids(listed, names) == COCO80_TO_91
    for count in (3, 80, 100):
        assert list(coco.category_ids(listed, dict(enumerate(map(str, range(count)))))) == list(range(count))
    assert list(coco.category_ids([tmp_path / "coco128"], names)) == list(range(80))


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(coco, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        coco.coco_figures(scene(), nc=1)
