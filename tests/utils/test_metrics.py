"""Matching, average precision and the confusion matrix on scenes small enough to work out by hand, and golden AP."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import boxes, metrics
from utils.boxes import box_iou
from utils.errors import UserError
from utils.metrics import IOU_THRESHOLDS, ConfusionMatrix, ap_per_class, compute_ap, fitness, match_detections
from utils.plots import evaluation as plots


def detections(*values):
    return np.array(values, np.float32).reshape(-1, 6)


def labels(*values):
    return np.array(values, np.float32).reshape(-1, 5)


LABEL = [0, 0, 0, 10, 10]


@pytest.mark.parametrize(
    ("found", "truth", "thresholds"),
    [
        # IoU 100/140 = 0.714, right at 0.5 to 0.7; where it falls short, the exact one of lower confidence is right
        ([[0, 0, 10, 14, 0.9, 0], [0, 0, 10, 10, 0.8, 0]], [LABEL], [5, 5]),
        # both overlap the first label most (0.92, 0.81): the second gets no second choice, though it overlaps the other
        ([[0, 0, 10, 9.2, 0.9, 0], [0, 0, 10, 8.1, 0.8, 0]], [LABEL, [0, 0, 0, 10, 6]], [9, 0]),
        ([[0, 0, 10, 10, 0.9, 1], [0, 0, 10, 5, 0.9, 0]], [LABEL], [0, 1]),  # another class; exactly 0.5
        ([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10, 0.8, 0]], [LABEL, LABEL], [10, 0]),  # of equal labels the first
        ([[0, 0, 10, 10, 0.9, 0]], [], [0]),
        ([], [LABEL], []),
        ([], [], []),
    ],
)
def test_each_threshold_is_matched_on_its_own(found, truth, thresholds):
    """How many of the ten thresholds each detection reaches."""
    assert match_detections(detections(*found), labels(*truth)).sum(1).tolist() == thresholds


def slow_match(found, truth, threshold):
    """The rule in plain loops."""
    right, taken = [], set()
    for x1, y1, x2, y2, _, class_id in found:
        overlaps = [
            float(box_iou(label[None, 1:], np.array([[x1, y1, x2, y2]], np.float32))[0, 0])
            if label[0] == class_id
            else -1.0
            for label in truth
        ]
        best = int(np.argmax(overlaps)) if overlaps else -1
        good = best >= 0 and overlaps[best] >= threshold and best not in taken
        if good:
            taken.add(best)
        right.append(good)
    return right


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), m=st.integers(1, 12))
def test_matching_equals_plain_loops(seed, n, m):
    generator = np.random.default_rng(seed)

    def boxes(count):
        corner = generator.integers(0, 12, (count, 2))
        return np.concatenate((corner, corner + generator.integers(4, 16, (count, 2))), 1)

    found = np.concatenate((boxes(n), np.linspace(1, 0.1, n)[:, None], generator.integers(0, 2, (n, 1))), 1)
    truth = np.concatenate((generator.integers(0, 2, (m, 1)), boxes(m)), 1)
    found, truth = found.astype(np.float32), truth.astype(np.float32)
    matched = match_detections(found, truth)
    for column, threshold in enumerate(IOU_THRESHOLDS):
        assert matched[:, column].tolist() == slow_match(found, truth, threshold)
    assert (np.diff(matched.sum(0)) <= 0).all()  # stricter thresholds never find more


@pytest.mark.parametrize(
    ("right", "confidence", "label_count", "expected"),
    [
        # The closing point (recall 1, precision 0) takes half of the last of 100 trapezoids.
        ([1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6], 4, 1 - 0.5 / 100),
        # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: the envelope is 1 at recalls 0 to 0.49, 2/3 at 0.50 to 0.99.
        ([1, 0, 1], [0.9, 0.8, 0.7], 2, (1 / 2 + 49 + 50 * 2 / 3) / 100),
        ([1, 0], [0.7, 0.7], 1, 1 - 0.5 / 100),  # of equal confidence: ranked as given
        ([0, 1], [0.7, 0.7], 1, (1 / 4 + 99 / 2) / 100),  # the envelope is 1/2 up to recall 0.99
    ],
)
def test_average_precision_worked_by_hand(right, confidence, label_count, expected):
    correct = np.tile(np.array(right, bool)[:, None], (1, 10))
    result = ap_per_class(correct, np.array(confidence), np.zeros(len(right)), np.zeros(label_count))
    assert result.map50 == pytest.approx(expected) and result.map == pytest.approx(expected)
    assert (result.true_positives.tolist(), result.mean_recall) == ([sum(right)], 1)
    assert result.false_positives.tolist() == [len(right) - sum(right)]
    assert result.mean_precision == pytest.approx(sum(right) / len(right))
    assert (result.precision_curve[0, -1], result.recall_curve[0, -1]) == (1, 0)  # above all confidences


def test_classes_without_detections_count_as_zero_and_without_labels_not_at_all():
    """Class 0 is perfect, class 2 has labels only, class 3 detections only: mAP is (0.995 + 0) / 2."""
    correct = np.array([[1], [0]], bool)
    result = ap_per_class(correct, np.array([0.9, 0.8]), np.array([0, 3]), np.array([0, 2, 2]))
    assert result.classes.tolist() == [0, 2]
    assert result.label_counts.tolist() == [1, 2]
    assert result.map50 == pytest.approx(0.995 / 2)
    np.testing.assert_allclose(result.maps(4), [0.995, 0.995 / 2, 0, 0.995 / 2])


@pytest.mark.parametrize("detected, labelled", [(0, 0), (0, 3), (3, 0)])
def test_nothing_detected_or_labelled_is_zero(detected, labelled):
    correct = np.zeros((detected, 10), bool)
    result = ap_per_class(correct, np.ones(detected), np.zeros(detected), np.zeros(labelled))
    assert (result.mean_precision, result.mean_recall, result.map50, result.map) == (0, 0, 0, 0)
    assert result.maps(2).tolist() == [0, 0]


def test_golden_average_precision(golden_dir: Path):
    for case in json.loads((golden_dir / "ap.json").read_text()):
        arrays = [np.array(case[key]) for key in ("tp", "conf", "pred_cls", "target_cls")]
        tp, fp, precision, recall, f1, ap, classes = ap_per_class(*arrays)
        for key, values in {"precision": precision, "recall": recall, "f1": f1, "ap": ap, "classes": classes}.items():
            np.testing.assert_allclose(values, case[key], atol=1e-6, err_msg=key)
        counts = np.array([(arrays[3] == number).sum() for number in classes])
        assert classes.dtype == np.int32 and (tp == np.round(recall * counts)).all() and (fp >= 0).all()


def test_curves_are_drawn_on_demand(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plots, "plot_curves", lambda *arguments: asked.append(arguments))
    arrays = np.ones((4, 10), bool), np.linspace(0.9, 0.6, 4), np.zeros(4), np.zeros(4)
    ap_per_class(*arrays)
    result = ap_per_class(*arrays, plot=True, save_dir=str(tmp_path), names=["cat"])
    ((drawn, lettering, folder),) = asked
    assert (drawn is result, lettering.names, folder) == (True, {0: "cat"}, tmp_path)


def test_the_curve_that_was_integrated():
    ap, mpre, mrec = compute_ap([0.25, 0.5, 1.0], [0.5, 1.0, 0.8])
    assert mrec.tolist() == [0, 0.25, 0.5, 1, 1] and mpre.tolist() == [1, 1, 1, 0.8, 0]
    assert ap == pytest.approx(0.5 + 0.5 * 0.9 - 0.004)  # the last trapezoid lacks its 0.8


def test_fitness_weighs_map50_a_tenth():
    assert fitness(np.array([[0.5, 0.5, 0.8, 0.6, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0]])) == pytest.approx([0.62, 0.1])


@pytest.mark.parametrize("name", ["IoU", "GIoU", "DIoU", "CIoU"])
def test_overlap_takes_boxes_as_yolov5_does(golden_dir, name):
    """The first box is 4 x n, or one to be compared with all."""
    golden = json.loads((golden_dir / "iou.json").read_text())
    first, second, expected = (torch.tensor(golden[key]) for key in ("box1_xywh", "box2_xywh", name))
    option = {} if name == "IoU" else {name: True}
    found = metrics.bbox_iou(first.T, second, x1y1x2y2=False, **option)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    first, second = boxes.xywh2xyxy(first), boxes.xywh2xyxy(second)
    torch.testing.assert_close(metrics.bbox_iou(first.T, second, **option), expected, rtol=0, atol=1e-5)
    one = metrics.bbox_iou(first[0], second, **option)
    torch.testing.assert_close(one, metrics.bbox_iou(first[:1].expand(len(second), 4).T, second, **option))


def test_confusion_matrix_counts_every_image(tmp_path, caplog):
    """Image 1: label 0 found as 1, label 1 missed. Image 2: no labels, one invented 0. Image 3: nothing found."""
    matrix = ConfusionMatrix(2)
    found = torch.tensor([[0.0, 0, 10, 10, 0.9, 1]])  # a tensor, as scripts have it
    matrix.process_batch(found, torch.tensor([[0.0, 0, 0, 10, 10], [1, 50, 50, 60, 60]]))
    matrix.process_batch(detections([0, 0, 10, 10, 0.9, 0], [0, 0, 9, 9, 0.2, 0]), labels())  # 0.2 is below the limit
    matrix.process_batch(None, labels([1, 0, 0, 10, 10]))
    assert matrix.matrix.tolist() == [[0, 0, 1], [1, 0, 0], [0, 2, 0]]
    np.testing.assert_allclose(matrix.normalised()[:, 1], [0, 0, 1])
    true_positives, false_positives = matrix.tp_fp()
    assert true_positives.tolist() == [0, 0] and false_positives.tolist() == [1, 1]
    matrix.plot(save_dir=tmp_path, names={0: "a", 1: "b"})
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 1000
    with pytest.raises(UserError, match="matrix"):
        matrix.plot(normalize=False)
    with caplog.at_level("INFO", "yolov5"):
        matrix.print()
    assert caplog.messages == ["0 0 1", "1 0 0", "0 2 0"]


def test_confusion_matrix_pairs_by_overlap_not_by_confidence():
    """Two detections of one label: the exact one of class 1 wins over the confident, loose one of class 0.

    The other label and the detection of class 1 on it overlap by 0.4 only.
    """
    matrix = ConfusionMatrix(2)
    found = detections([0, 0, 10, 14, 0.9, 0], [0, 0, 10, 10, 0.5, 1], [50, 50, 60, 54, 0.5, 1])
    matrix.process_batch(found, labels([1, 0, 0, 10, 10], [0, 50, 50, 60, 60]))
    assert matrix.matrix.tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 20), m=st.integers(0, 20))
def test_confusion_matrix_books_every_box_once(seed, n, m):
    generator = np.random.default_rng(seed)
    found = np.concatenate((generator.random((n, 2)) * 9, 9 + generator.random((n, 2)) * 9), 1)
    truth = np.concatenate((generator.random((m, 2)) * 9, 9 + generator.random((m, 2)) * 9), 1)
    classes_found, classes_true = generator.integers(0, 3, (n, 1)), generator.integers(0, 3, (m, 1))
    matrix = ConfusionMatrix(3)
    found = np.concatenate((found, np.full((n, 1), 0.9), classes_found), 1)
    matrix.process_batch(found, np.concatenate((classes_true, truth), 1))
    np.testing.assert_array_equal(matrix.matrix.sum(1)[:3], np.bincount(classes_found[:, 0], minlength=3))
    np.testing.assert_array_equal(matrix.matrix.sum(0)[:3], np.bincount(classes_true[:, 0], minlength=3))
    assert matrix.matrix[3, 3] == 0


def scored_images(generator, images=6, nc=3):
    """Detections, most confident first and no two equally sure, and labels, some of which they hit."""
    scenes = []
    confidences = generator.permutation(images * 8) / (images * 8) * 0.98 + 0.01
    for image in range(images):
        labels = np.concatenate((generator.integers(0, nc, (4, 1)), _random_boxes(generator, 4)), 1)
        aims = labels[generator.integers(0, 4, 8)]
        near = aims[:, 1:] + generator.normal(0, 2, (8, 4))
        classes = np.where(generator.random(8) < 0.8, aims[:, 0], generator.integers(0, nc, 8))
        found = np.concatenate((near, confidences[image * 8 : image * 8 + 8, None], classes[:, None]), 1)
        scenes.append((found[np.argsort(-found[:, 4])], labels))
    return scenes


def _random_boxes(generator, count):
    start = generator.uniform(0, 60, (count, 2))
    return np.concatenate((start, start + generator.uniform(8, 40, (count, 2))), 1)


def figures_of(scenes):
    correct = np.concatenate([match_detections(found, labels) for found, labels in scenes])
    found, labels = (np.concatenate([scene[part] for scene in scenes]) for part in (0, 1))
    return ap_per_class(correct, found[:, 4], found[:, 5], labels[:, 0])


def tied_images(generator):
    """As `scored_images`, but of five confidences only: in an image, and between images, many are equal."""
    scenes = []
    for found, labels in scored_images(generator, images=8):
        found[:, 4] = np.ceil(found[:, 4] * 5) / 5
        scenes.append((found, labels))  # still most confident first
    return scenes


def plain_average_precision(hits, label_count):
    """Area under the envelope, recall by recall, of detections (n,) in their final order."""
    points = [(0.0, 1.0)]  # (recall, precision)
    for rank in range(1, len(hits) + 1):
        right = sum(hits[:rank])
        points.append((right / label_count, right / rank))
    points.append((1.0, 0.0))
    heights = [max(precision for _, precision in points[start:]) for start in range(len(points))]
    values = np.interp(np.linspace(0, 1, 101), [recall for recall, _ in points], heights)
    return np.trapezoid(values, dx=0.01)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equal_confidences_rank_in_the_order_of_the_images_whatever_the_classes_are_called(seed):
    """The rule: sorted by confidence; of equals, what came first, so that only ties may feel the images' order."""
    generator = np.random.default_rng(seed)
    scenes = tied_images(generator)
    for order in (range(len(scenes)), generator.permutation(len(scenes))):
        ordered = [scenes[index] for index in order]
        correct = np.concatenate([match_detections(found, labels) for found, labels in ordered])
        found, labels = (np.concatenate([scene[part] for scene in ordered]) for part in (0, 1))
        ranked = sorted(range(len(found)), key=lambda row: (-found[row, 4], row))
        result = figures_of(ordered)
        for class_id, ap in zip(result.classes, result.ap, strict=True):
            mine = [row for row in ranked if found[row, 5] == class_id]
            count = int((labels[:, 0] == class_id).sum())
            expected = [plain_average_precision(correct[mine, column].tolist(), count) for column in range(10)]
            np.testing.assert_allclose(ap, expected, atol=1e-9)
    numbers = generator.permutation(9)[:3]
    for found, labels in scenes:
        found[:, 5], labels[:, 0] = numbers[found[:, 5].astype(int)], numbers[labels[:, 0].astype(int)]
    renamed, again = figures_of([scenes[index] for index in order]), np.argsort(numbers[result.classes])
    np.testing.assert_array_equal(renamed.ap, result.ap[again])
    assert renamed.map == pytest.approx(result.map) and renamed.confidence == result.confidence


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), class_id=st.integers(0, 2), count=st.integers(1, 3))
def test_a_false_detection_above_all_true_ones_lowers_the_average_precision_at_every_threshold(seed, class_id, count):
    """Every precision right / rank becomes right / (rank + count), so wherever anything is right the area shrinks."""
    scenes = scored_images(np.random.default_rng(seed))
    before = figures_of(scenes)
    found, labels = scenes[0]
    nowhere = np.tile(np.array([[500.0, 500, 510, 510, 0.999, class_id]]), (count, 1))
    after = figures_of([(np.concatenate((nowhere, found)), labels), *scenes[1:]])
    correct = np.concatenate([match_detections(*scene) for scene in scenes])
    classes = np.concatenate([found[:, 5] for found, _ in scenes])
    for row in np.flatnonzero(before.classes == class_id):
        something_right = correct[classes == class_id].any(axis=0)
        assert (after.ap[row] < before.ap[row])[something_right].all()
        assert (after.ap[row] == before.ap[row])[~something_right].all()
    others = before.classes != class_id
    np.testing.assert_array_equal(after.ap[others], before.ap[others])
