"""metrics.json and what it is made of: errors told apart, AP by size, worked out by hand; nothing unmeasured in it."""

import json

import numpy as np
import pytest
import torch

from tests.utils.eval.test_evaluate import ELSEWHERE, EXACT, NAMES, Scripted, evaluate, wide_batch
from utils.eval.coco import ImageRecord
from utils.eval.figures import ERROR_KINDS, judge, metrics_content, size_results, write_metrics


def rows(*values):
    return np.array(values, float).reshape(-1, 6)


def test_errors_are_told_apart():
    labels = np.array([(0, 0, 0, 100, 100), (1, 200, 0, 300, 100), (0, 400, 0, 500, 100)], float)
    found = rows(
        (0, 0, 100, 100, 0.9, 0),  # right
        (0, 0, 100, 90, 0.8, 0),  # a second one there
        (200, 0, 300, 100, 0.7, 0),  # a dog is there
        (440, 0, 540, 100, 0.6, 0),  # IoU 60 / 140
        (480, 0, 580, 100, 0.5, 1),  # on a cat, but neither its place nor its class
        (0, 400, 50, 450, 0.4, 0),
    )
    verdict = judge(found, labels)
    assert verdict.right.tolist() == [True] + [False] * 5
    kinds = [ERROR_KINDS[kind] for kind in verdict.kinds[1:]]
    assert kinds == ["duplicate", "wrong class", "badly placed", "background", "background"]
    assert verdict.kinds[0] == -1 and verdict.missed.tolist() == [1, 2] and verdict.counts == (1, 5, 2)
    nothing, no_labels = judge(rows(), labels), judge(found, labels[:0])
    assert nothing.counts == (0, 0, 3) and no_labels.counts == (0, 6, 0)
    assert {ERROR_KINDS[kind] for kind in no_labels.kinds} == {"background"}


def test_a_detection_counts_with_the_size_of_what_it_finds():
    small, medium, large = (
        (0, 0, 31, 31),
        (100, 0, 196, 96),
        (300, 0, 500, 200),
    )  # 96 x 96 itself is large, as 32 is medium
    labels = np.array([(0, *small), (0, *medium), (0, *large)], float)
    found = rows((0, 0, 33, 33, 0.9, 0), (300, 0, 500, 200, 0.8, 0), (600, 0, 700, 100, 0.7, 0))
    records = [ImageRecord("a", (300, 800), found, labels), ImageRecord("b", (300, 800), rows(), labels[:0])]
    sizes = size_results(records)
    assert [int(of_size.label_counts.sum()) for of_size in sizes.values()] == [1, 0, 2]
    assert sizes["small"].map50 == pytest.approx(0.995)  # though the box found is itself of medium size
    assert sizes["small"].ap[0].tolist() == pytest.approx([0.995] * 8 + [0, 0])  # IoU 31^2 / 33^2 = 0.88
    # of two large ones one is found, with a false positive after it: precision 1 to recall 0.5, 0.5 there, then falling
    assert 0.5 < sizes["large"].map50 < 0.76 and len(sizes["medium"].classes) == 0


def test_the_file_holds_what_was_found(tmp_path):
    result = evaluate(Scripted([[EXACT, ELSEWHERE]]), [wide_batch()], names=NAMES, keep_records=True)
    write_metrics(tmp_path / "metrics.json", metrics_content(result, {"split": "val", "options": {"a": tmp_path}}))
    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    cat, dog = content["classes"]
    assert content["format"] == "yolov5-slim-metrics" and content["options"] == {"a": str(tmp_path)}
    assert (content["map50"], content["map"], content["images"], content["labels"]) == (0.995, 0.995, 1, 1)
    assert cat["labels"] == 1 and cat["ap_by_iou"] == [0.995] * 10 and cat["category_id"] == 0
    assert dog == {"id": 1, "name": "dog", "labels": 0, "category_id": 1}
    curves, axis = cat["curves"], content["curve_axis"]
    assert set(map(len, (*curves.values(), axis))) == {101} and axis[25] == 0.25
    assert curves["recall"][0] == 1 and curves["recall"][100] == 0 and curves["f1"][50] == pytest.approx(1)
    assert cat["best_f1"] == pytest.approx(1) and cat["best_confidence"] < 0.9
    assert content["sizes"]["medium"] == {"labels": 1, "map50": 0.995, "map": 0.995}  # 100 x 60 px
    assert content["sizes"]["small"] == {"labels": 0, "map50": None, "map": None}
    matrix = content["confusion_matrix"]
    assert matrix["names"] == ["cat", "dog", "background"] and matrix["counts"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert content["speed_ms"].keys() == {"pre_process", "inference", "nms"} and content["coco"] is None


def test_without_labels_figures_are_null(tmp_path):
    batch = wide_batch()._replace(targets=torch.zeros(0, 6))
    result = evaluate(Scripted([[EXACT]]), [batch], names=NAMES, keep_records=True, coco_metrics=True)
    write_metrics(tmp_path / "metrics.json", metrics_content(result, {}))
    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert {content[key] for key in ("precision", "recall", "map50", "map", "fitness", "confidence")} == {None}
    assert content["background_images_with_detections"] == 1 and content["labels"] == 0
    assert content["sizes"]["large"] == {"labels": 0, "map50": None, "map": None}
    assert content["coco"]["ap"] == -1  # COCO's word for it


def test_categories_are_the_jsons_even_of_all_classes_as_one(tmp_path):
    how = {"names": NAMES, "save_json": True, "save_dir": tmp_path, "categories": (7, 9)}
    for options, expected in (({}, [7, 9]), ({"single_cls": True}, [7])):
        result = evaluate(Scripted([[EXACT]]), [wide_batch()], **how, **options)
        assert [one["category_id"] for one in metrics_content(result, {})["classes"]] == expected
