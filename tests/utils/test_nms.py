"""NMS: contract's rules on small scenes, NumPy and torch alike, against a plain reference, and on real images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.boxes import scale_boxes
from utils.errors import UserError
from utils.images import letterbox, read_image
from utils.nms import MAX_SIDE_PX, NMSConfig, non_max_suppression, suppress_again


def rows(*values, nc=2):
    """One image's prediction (1, n, 5 + nc) from [x, y, w, h, obj, class probabilities...]."""
    return np.array(values, np.float32).reshape(1, -1, 5 + nc)


def both(prediction, **options):
    """The result of NumPy, having checked that torch's is equal."""
    from_numpy = non_max_suppression(prediction, **options)
    from_torch = non_max_suppression(torch.from_numpy(prediction), **options)
    for ours, theirs in zip(from_numpy, from_torch, strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    return from_numpy


def test_overlap_of_the_same_class_is_suppressed_and_of_another_is_not():
    near = [50, 50, 20, 20, 0.8]  # IoU with the first: 19/21
    scene = rows([50, 51, 20, 20, 0.9, 1, 0], [*near, 1, 0], [*near, 0, 1])
    (found,) = both(scene, conf_thres=0.1)
    np.testing.assert_allclose(found, [[40, 41, 60, 61, 0.9, 0], [40, 40, 60, 60, 0.8, 1]], rtol=1e-6)
    (found,) = both(scene, conf_thres=0.1, agnostic=True)
    assert found[:, 5].tolist() == [0]


def test_overlap_equal_to_the_threshold_is_kept():
    # Intersection 10 x 20, union 20 x 20 + 20 x 20 - 200 = 600: IoU 1/3.
    scene = rows([50, 50, 20, 20, 0.9, 1, 0], [60, 50, 20, 20, 0.8, 1, 0])
    assert len(both(scene, iou_thres=0.34)[0]) == 2
    assert len(both(scene, iou_thres=0.33)[0]) == 1


def test_multi_label_makes_a_detection_of_every_class_above_the_threshold():
    scene = rows([50, 50, 20, 20, 0.5, 0.8, 0.6])
    np.testing.assert_allclose(both(scene, multi_label=True)[0][:, 4:], [[0.4, 0], [0.3, 1]], rtol=1e-6)
    np.testing.assert_allclose(both(scene)[0][:, 4:], [[0.4, 0]], rtol=1e-6)
    # The score, not the probability, must exceed the threshold.
    assert len(both(scene, multi_label=True, conf_thres=0.35)[0]) == 1


def test_one_class_scores_objectness_times_probability():
    np.testing.assert_allclose(both(rows([9, 9, 4, 4, 0.5, 0.8], nc=1), multi_label=True)[0][:, 4:], [[0.4, 0]])


@pytest.mark.parametrize("side, kept", [(1.9, False), (2, True), (MAX_SIDE_PX, True), (MAX_SIDE_PX + 1, False)])
def test_size_limits(side, kept):
    assert len(both(rows([50, 50, side, 100, 0.9, 1, 0]))[0]) == kept


def test_classes_filter_takes_the_best_class_first():
    scene = rows([50, 50, 20, 20, 0.9, 1, 0.9], [150, 50, 20, 20, 0.9, 0.5, 1])
    assert both(scene, classes=[1])[0][:, 0].tolist() == [140]
    assert len(both(scene, classes=[1], multi_label=True)[0]) == 2


def test_equal_scores_keep_the_models_order_and_max_det_cuts():
    scene = np.tile(rows([0, 50, 20, 20, 0.9, 1, 0]), (1, 600, 1))
    scene[0, :, 0] = np.arange(600) * 30
    (found,) = both(scene, max_det=7)
    assert found[:, 0].tolist() == [30.0 * i - 10 for i in range(7)]
    assert len(both(scene, max_det=1000)[0]) == 600


def test_thirty_thousand_candidates_are_looked_at_and_no_more():
    """All but the first of one place are suppressed; the 30,000th is elsewhere, and so is the next."""
    scene = np.tile(rows([50, 50, 20, 20, 0.9, 1, 0]), (1, 30_001, 1))
    scene[0, 29_999:, 0] = 150, 250
    assert both(scene)[0][:, 0].tolist() == [40, 140]


def test_known_labels_join_with_score_one():
    labels = [np.array([[1, 50, 50, 20, 20]], np.float32), np.zeros((0, 5), np.float32)]
    scene = np.concatenate([rows([50, 50, 20, 20, 0.9, 0, 1])] * 2)
    found = non_max_suppression(scene, labels=labels)
    np.testing.assert_allclose([image[0, 4] for image in found], [1, 0.9], rtol=1e-6)


def test_classes_stay_apart_at_large_coordinates():
    # Two images' width of coordinates: class 1 shifted by a fixed 7680 would fall on the neighbour of class 0.
    scene = rows([7700, 7700, 40, 40, 0.9, 1, 0], [20, 20, 40, 40, 0.8, 0, 1])
    assert len(both(scene, iou_thres=0.1)[0]) == 2


def test_many_classes_do_not_blur_small_overlaps():
    """79 classes apart, float32 offsets would round these boxes to sixteenths of a pixel and lose the IoU of 0.6."""
    scene = np.zeros((1, 2, 85), np.float32)
    scene[0, :, :5] = [[5000.0, 5000, 4.0, 4.0, 0.9], [5000.99, 5000, 4.0, 4.0, 0.8]]  # IoU 3.01/4.99 = 0.603
    scene[0, :, 84] = 1
    assert len(both(scene, iou_thres=0.605)[0]) == 2
    assert len(both(scene, iou_thres=0.6)[0]) == 1


def test_input_is_left_alone_and_nothing_found_is_empty():
    scene = torch.rand(2, 50, 7, generator=torch.Generator().manual_seed(0)) * 10
    before = scene.clone()
    non_max_suppression(scene, multi_label=True)
    assert torch.equal(scene, before)
    assert [tuple(found.shape) for found in non_max_suppression(torch.zeros(2, 5, 7))] == [(0, 6), (0, 6)]


def test_half_precision_comes_back_as_float32():
    (found,) = non_max_suppression(torch.tensor([[[50, 50, 20, 20, 0.5, 1, 0]]], dtype=torch.float16))
    assert found.dtype == torch.float32 and len(found) == 1


@pytest.mark.parametrize("option", [{"conf_thres": 1.5}, {"iou_thres": -0.1}])
def test_thresholds_out_of_range_are_refused(option):
    with pytest.raises(UserError, match="between 0 and 1"):
        non_max_suppression(np.zeros((1, 1, 6), np.float32), **option)


def reference(rows, conf, iou, max_det=None, multi_label=False, agnostic=False, classes=None):
    """NMS of one image in plain loops; of equal scores the row that the model wrote first goes first."""
    found = []
    for x, y, w, h, obj, *probabilities in rows.tolist():
        scores = [float(np.float32(obj) * np.float32(probability)) for probability in probabilities]
        taken = range(len(scores)) if multi_label else [scores.index(max(scores))]
        if obj > conf and 2 <= min(w, h) and max(w, h) <= MAX_SIDE_PX:
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            wanted = [number for number in taken if classes is None or number in classes]
            found += [(*corners, scores[number], number) for number in wanted if scores[number] > conf]
    kept = []
    for box in sorted(found, key=lambda item: -item[4]):  # stable
        if all(_iou(box, other) <= iou for other in kept if agnostic or other[5] == box[5]):
            kept.append(box)
    return np.array(kept[:max_det]).reshape(-1, 6)


def _iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return w * h / (sum(areas) - w * h)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 700), nc=st.integers(2, 4), max_det=st.integers(1, 200))
def test_equals_a_plain_reference(seed, count, nc, max_det):
    generator = np.random.default_rng(seed)
    scene = generator.random((1, count, 5 + nc), dtype=np.float32)
    scene[..., :2] *= 300
    scene[..., 2:4] = 1 + scene[..., 2:4] * 60
    (found,) = both(scene, conf_thres=0.05, iou_thres=0.5, multi_label=True, max_det=max_det)
    np.testing.assert_allclose(found, reference(scene[0], 0.05, 0.5, max_det, multi_label=True), rtol=1e-5, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 60),
    nc=st.integers(1, 3),
    agnostic=st.booleans(),
    classes=st.sampled_from([None, [0], [1, 2]]),
    iou=st.sampled_from([0.1003, 0.4503, 0.6503]),  # no quotient of small whole numbers is so near that rounding counts
)
def test_equals_a_plain_reference_where_many_scores_are_equal(seed, count, nc, agnostic, classes, iou):
    """Whole-numbered boxes on a small grid and scores of three levels: nearly every comparison is between equals."""
    generator = np.random.default_rng(seed)
    boxes_xywh = np.concatenate((generator.integers(5, 15, (count, 2)), 2 * generator.integers(1, 7, (count, 2))), 1)
    levels = generator.choice(np.float32([0.25, 0.5, 1.0]), (count, 1 + nc))
    scene = np.concatenate((boxes_xywh.astype(np.float32), levels), 1)
    expected = reference(scene, 0.1, iou, agnostic=agnostic, classes=classes)
    (found,) = both(scene[None], conf_thres=0.1, iou_thres=iou, agnostic=agnostic, classes=classes)
    np.testing.assert_array_equal(found, expected)


def test_detections_of_the_golden_checkpoint(golden_dir: Path):
    from models.load import load_model

    golden = json.loads((golden_dir / "detections.json").read_text())
    model = load_model(golden_dir / "yolov5n-v6-coco.pt", fuse=True)
    for name, expected in golden["images"].items():
        image = read_image(golden_dir / "images" / name)
        padded = letterbox(image, golden["imgsz"], auto=True, stride=32).image
        batch = torch.from_numpy(np.ascontiguousarray(padded[..., ::-1].transpose(2, 0, 1)))[None].float() / 255
        with torch.no_grad():
            decoded = model(batch)[0]
        assert decoded.mean().item() == pytest.approx(expected["raw_mean"], rel=1e-4)
        (found,) = non_max_suppression(decoded, golden["conf_thres"], golden["iou_thres"], max_det=1000)
        found = found.numpy()
        boxes = scale_boxes(batch.shape[2:], found[:, :4], image.shape[:2])
        wanted = np.array(expected["detections_x1y1x2y2_conf_cls"])
        np.testing.assert_allclose(boxes.round(), wanted[:, :4], atol=1)
        np.testing.assert_allclose(found[:, 4], wanted[:, 4], atol=1e-3)
        assert found[:, 5].tolist() == wanted[:, 5].tolist()


def test_detections_are_suppressed_as_they_were_when_they_were_rows():
    generator = np.random.default_rng(3)
    prediction = generator.random((1, 400, 7), np.float32) * np.float32([200, 200, 60, 60, 1, 1, 1])
    everything = non_max_suppression(prediction, 0.1, iou_thres=1.0, max_det=400)[0]
    for agnostic in (False, True):
        (expected,) = non_max_suppression(prediction, 0.1, 0.4, agnostic=agnostic, max_det=50)
        shuffled = everything[generator.permutation(len(everything))]
        for rows in (shuffled, torch.from_numpy(shuffled)):
            found = suppress_again(rows, NMSConfig(iou_thres=0.4, max_det=50, agnostic=agnostic))
            np.testing.assert_array_equal(found, expected)
