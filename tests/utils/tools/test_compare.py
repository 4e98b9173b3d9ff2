"""Comparisons: hand-worked scores, detections as val.py writes them, mistakes named, a page on its own."""

import json
import logging
import re

import cv2
import numpy as np
import pytest

from utils.boxes import Detections
from utils.errors import UserError
from utils.eval import report_page
from utils.eval.coco import detection_rows, image_ids
from utils.media.writers import LabelWriter, OutputStems
from utils.tools import compare, convert

CAT, DOGS = (10, 20, 50, 60), [(0, 0, 40, 40), (50, 50, 90, 100)]
NOTHING = np.zeros((0, 6))


def detections(*rows):
    return np.array(rows, float).reshape(-1, 6)


# of a (one cat), b (two dogs), c (none)
FIRST = [detections((*CAT, 0.9, 0)), detections((*DOGS[0], 0.8, 1)), NOTHING]
SECOND = [
    detections((*CAT, 0.3, 1)),  # a dog where a cat is
    detections((*DOGS[0], 0.8, 1), (*DOGS[1], 0.7, 1)),
    detections((5, 5, 9, 9, 0.1, 0)),  # too weak to count
]


@pytest.fixture
def data(tmp_path):
    for name, text in (("a", "0 0.3 0.4 0.4 0.4\n"), ("b", "1 0.2 0.2 0.4 0.4\n1 0.7 0.75 0.4 0.5\n"), ("c", "")):
        for kind in ("images", "labels"):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "set" / "images" / f"{name}.png"), np.full((100, 100, 3), 90, np.uint8))
        (tmp_path / "set" / "labels" / f"{name}.txt").write_text(text)
    (tmp_path / "set" / "d.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [cat, <dog>]\n")
    return tmp_path / "set" / "d.yaml"


def write_json(folder, arrays, ids):
    folder.mkdir()
    rows = [row for image, some in zip(ids, arrays, strict=True) for row in detection_rows(image, some, [0, 1])]
    (folder / "best_predictions.json").write_text(json.dumps(rows))
    return folder


def write_texts(folder, arrays, paths, confidences=True):
    writer, stems = LabelWriter(folder / "labels", confidences), OutputStems(paths)
    for path, some in zip(paths, arrays, strict=True):
        writer.write(stems[path], Detections.from_rows(some), (100, 100))
    return folder


@pytest.fixture
def truth(data):
    return compare.read_truth(str(data), "val")


def run(*arguments):
    return compare.main(compare.build_parser().parse_args([*map(str, arguments)]))


def test_scores_and_changes_by_hand(truth):
    a, b = (compare.score(truth, some) for some in (FIRST, SECOND))
    assert a.counts.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]] and a.f1.tolist() == [1, 2 / 3, 1]
    b = compare.score(truth, SECOND, 0.2)
    assert b.counts.tolist() == [[0, 1, 1], [2, 0, 0], [0, 0, 0]] and b.f1.tolist() == [0, 1, 1]
    worse, better = compare.changes(a, b)
    assert worse.tolist() == [0] and better.tolist() == [1]
    # The dogs of the first run: precision 1 up to a recall of 0.5, then falling to 0 at 1: 0.5 + 0.25.
    assert compare.class_rows(truth, a, b) == [
        ("all", "3", "0.873", "0.497", "-0.375", "0.873", "0.497", "-0.375"),
        ("cat", "1", "0.995", "0.000", "-0.995", "0.995", "0.000", "-0.995"),
        ("<dog>", "2", "0.750", "0.995", "+0.245", "0.750", "0.995", "+0.245"),
    ]


def test_of_equal_changes_the_one_with_more_errors_comes_first():
    def scores(counts):
        return compare.Scores(
            0.5, [], None, np.array(counts), np.array([2 * c[0] / (2 * c[0] + sum(c[1:])) for c in counts])
        )

    a, b = scores([[1, 0, 0], [3, 0, 0], [1, 1, 0]]), scores([[0, 1, 1], [0, 3, 3], [1, 0, 0]])
    worse, better = compare.changes(a, b)
    assert worse.tolist() == [1, 0] and better.tolist() == [2]


def test_what_validation_writes_is_read_back_alike(data, truth, tmp_path):
    folders = (
        write_json(tmp_path / "j", SECOND, image_ids(truth.paths)),
        write_texts(tmp_path / "t", SECOND, truth.paths),
    )
    for folder in folders:
        for found, expected in zip(compare.read_run(folder, truth), SECOND, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-3)
    coco = tmp_path / "coco"
    convert.main(convert.build_parser().parse_args([str(data), "--out", str(coco), "--to", "coco"]))
    other = compare.read_truth(str(coco / "annotations" / "instances_train.json"), "val")
    assert [path.rpartition("/")[2] for path in other.paths] == ["a.png", "b.png", "c.png"] and other.ids == [1, 2, 3]
    found = compare.read_run(write_json(tmp_path / "k", SECOND, other.ids), other)
    np.testing.assert_array_equal(compare.score(other, found).counts, compare.score(truth, SECOND).counts)


def test_the_page_stands_alone(data, truth, tmp_path, caplog):
    runs = write_json(tmp_path / "A<b>", FIRST, ["a", "b", "c"]), write_texts(tmp_path / "B", SECOND, truth.paths)
    html = tmp_path / "page.html"
    with caplog.at_level(logging.INFO, logger="yolov5"):
        run(*runs, "--data", data, "--conf-thres", "0.2", "--html", html)
    text = html.read_text()
    assert "1 images are worse in B, 1 better, 1 as good" in caplog.text
    assert "A&lt;b&gt;" in text and "A<b>" not in text and "&lt;dog&gt;" in text
    assert text.count('<img src="data:image/jpeg;base64,') == 4 and not re.search(r'(src|href)="(?!data:)', text)
    worse, better = (
        text.index("a.png. A: F1 1.00, 1 right, 0 wrong, 0 missed. B: F1 0.00"),
        text.index("b.png. A: F1 0.67"),
    )
    assert text.index("Worse: 1 images") < worse < text.index("Better: 1 images") < better


def test_pictures_tell_right_wrong_and_missed_apart(truth):
    texts = []

    def colours(scores, image, truth=truth):
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report_page.Annotator, "annotate", lambda _, annotations: drawn.extend(annotations))
            compare.picture(truth, scores, image)
        texts[:] = [one.label for one in drawn]
        return [(np.rint(np.array(one.box_xyxy) * 100 / report_page.PICTURE_PX).tolist(), one.color) for one in drawn]

    a, b = (compare.score(truth, some, 0.2) for some in (FIRST, SECOND))
    for gone in ("", "gone.png"):
        assert compare.picture(truth._replace(paths=[gone] * 3), a, 0).startswith("<span>")
    assert colours(a, 1) == [([*DOGS[1]], report_page.MISSED), ([*DOGS[0]], report_page.RIGHT)]
    both = truth._replace(labels=[np.array([(0, *CAT), (1, *CAT)], float)])  # a cat and a dog at the same place
    dog = compare.score(both, [detections((*CAT, 0.9, 1))], 0.2)
    assert colours(dog, 0, both) == [([*CAT], report_page.MISSED), ([*CAT], report_page.RIGHT)] and texts == ["cat", ""]
    assert colours(b, 0) == [([*CAT], report_page.MISSED), ([*CAT], report_page.WRONG)]


ROW = {"image_id": "a", "category_id": 0, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ROW | {"image_id": "d"}], "image_id 'd' is not in the data set"),
        ([ROW | {"image_id": []}], "not COCO results"),
        ([ROW | {"category_id": 2}], "category_id 2 is not in the data set"),
        ([ROW | {"bbox": [1, 2, 3]}], "not COCO results"),
        ([ROW | {"score": float("nan")}], "not finite"),
        ({"a": 1}, "not COCO results"),
        (5, "not COCO results"),
    ],
)
def test_results_that_do_not_fit_are_named(truth, tmp_path, content, message):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        compare.read_run(tmp_path / "r.json", truth)


def test_folders_without_usable_detections_are_named(truth, tmp_path):
    def message(folder):
        with pytest.raises(UserError) as error:
            compare.read_run(folder, truth)
        return str(error.value)

    (tmp_path / "train" / "weights").mkdir(parents=True)
    (tmp_path / "train" / "weights" / "best.pt").touch()
    assert f"val.py --weights {tmp_path}/train/weights/best.pt" in message(tmp_path / "train")
    assert "--save-conf" in message(write_texts(tmp_path / "plain", FIRST, truth.paths, confidences=False))
    write_texts(tmp_path / "other", FIRST, ["x.png", "y.png", "z.png"])
    assert "is of no image" in message(tmp_path / "other")
    write_json(tmp_path / "two", FIRST, ["a", "b", "c"])
    (tmp_path / "two" / "last_predictions.json").touch()
    assert "several results" in message(tmp_path / "two")
