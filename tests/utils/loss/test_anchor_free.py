"""The anchor-free loss against scenes worked out by hand and against a plain loop over images, labels and points."""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from models.heads import DetectAF
from utils.boxes import xywhn2xyxy
from utils.loss import AnchorFreeLoss, anchor_free
from utils.loss.anchor_free import distribution_loss
from utils.loss.assigners import assign_points
from utils.loss.base import BatchReduction
from utils.loss.iou import WIOU_MOMENTUM

BINS, NC, STRIDES = 8, 3, (8, 16, 32)
GAINS = {"af_box": 7.5, "af_cls": 0.5, "af_dfl": 1.5}


def loss_of(nc=NC, strides=STRIDES, **gains):
    head = SimpleNamespace(bins=BINS, nc=nc, stride=torch.tensor(strides), distances=DetectAF.distances)
    return AnchorFreeLoss(SimpleNamespace(model=[head], hyp={**GAINS, **gains}))


def certain(sides):
    """Logits (4 * BINS,) of whole distances: one bin is sure of each."""
    logits = torch.full((4, BINS), -60.0)
    logits[range(4), sides] = 60.0
    return logits.flatten()


def random_scene(seed, images=2, labels=9, grids=((8, 10), (4, 5), (2, 3)), spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    outputs = [spread * torch.randn(images, 1, *grid, 4 * BINS + NC, generator=generator) for grid in grids]
    targets = torch.rand(labels, 6, generator=generator)
    targets[:, 0] = torch.randint(0, images, (labels,), generator=generator).sort().values
    targets[:, 1] = torch.randint(0, NC, (labels,), generator=generator)
    targets[:, 4:] = targets[:, 4:] * 0.6 + 0.02
    return outputs, targets


# ----------------------------------------------------------------------------------------------- a plain loop


def ciou(a, b):
    """CIoU of two boxes (x1, y1, x2, y2) by the paper's formulas (arXiv:1911.08287)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    shared = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    iou = shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)
    diagonal = (max(ax2, bx2) - min(ax1, bx1)) ** 2 + (max(ay2, by2) - min(ay1, by1)) ** 2
    centres = ((ax1 + ax2 - bx1 - bx2) ** 2 + (ay1 + ay2 - by1 - by2) ** 2) / 4
    v = 4 / math.pi**2 * (math.atan((bx2 - bx1) / (by2 - by1)) - math.atan((ax2 - ax1) / (ay2 - ay1))) ** 2
    return iou - centres / diagonal - v * (v / (1 - iou + v) if v else 0)


class Point(NamedTuple):
    x: float
    y: float
    stride: int
    box: tuple  # predicted
    log_p: list  # of each side and bin
    scores: list


def read(outputs, image, strides):
    """Returns an image's points, each with what is predicted there."""
    points = []
    for output, stride in zip(outputs, strides, strict=True):
        _, _, height, width, _ = output.shape
        logits = output[image, 0, ..., : 4 * BINS].double().unflatten(-1, (4, BINS))
        sides = (logits.softmax(-1) * torch.arange(BINS)).sum(-1).mul(stride).tolist()
        log_p, scores = logits.log_softmax(-1).tolist(), output[image, 0, ..., 4 * BINS :].double().sigmoid().tolist()
        for row, column in itertools.product(range(height), range(width)):
            x, y, (left, up, right, down) = (column + 0.5) * stride, (row + 0.5) * stride, sides[row][column]
            box = (x - left, y - up, x + right, y + down)
            points.append(Point(x, y, stride, box, log_p[row][column], scores[row][column]))
    return points


def plain_assignment(points, labels):
    """Returns {point: (label, degree)} of an image's labels [(class, box)]."""
    wanted = {}  # (label, point) -> alignment, CIoU
    for label, (cls, box) in enumerate(labels):
        (x1, y1, x2, y2), found = box, []
        for number, point in enumerate(points):
            inside_x = abs(point.x - (x1 + x2) / 2) < max(x2 - x1, 16) / 2
            if inside_x and abs(point.y - (y1 + y2) / 2) < max(y2 - y1, 16) / 2:
                overlap = max(ciou(point.box, box), 0)
                found.append((point.scores[cls] ** 0.5 * overlap**6, overlap, number))
        wanted |= {(label, number): pair for *pair, number in sorted(found, reverse=True)[:10] if pair[0] > 0}
    learnt = {}
    for number in {number for _, number in wanted}:
        rivals = {label: overlap for (label, at), (_, overlap) in wanted.items() if at == number}
        learnt[number] = max(rivals, key=rivals.get)
    degrees = {}
    for number, label in learnt.items():
        own = [wanted[label, other] for other, owner in learnt.items() if owner == label]
        best, largest = (max(values) for values in zip(*own, strict=True))
        degrees[number] = label, wanted[label, number][0] / best * largest
    return degrees


def plain_terms(points, labels, learnt):
    """Returns the three sums of an image."""
    box_sum = cls_sum = dfl_sum = 0.0
    for number, point in enumerate(points):
        label, degree = learnt.get(number, (None, 0))
        for cls, p in enumerate(point.scores):
            aim = degree if label is not None and cls == labels[label][0] else 0
            cls_sum -= aim * math.log(p) + (1 - aim) * math.log(1 - p)
        if label is None:
            continue
        box = labels[label][1]
        box_sum += (1 - ciou(point.box, box)) * degree
        for side, distance in enumerate((point.x - box[0], point.y - box[1], box[2] - point.x, box[3] - point.y)):
            distance = min(max(distance / point.stride, 0), BINS - 1.01)
            lower, log_p = int(distance), point.log_p[side]
            dfl_sum -= ((lower + 1 - distance) * log_p[lower] + (distance - lower) * log_p[lower + 1]) / 4 * degree
    return box_sum, cls_sum, dfl_sum


def plain_loss(outputs, targets, strides=STRIDES):
    """Returns the three terms without gains, and {(image, point): (label, degree)}."""
    height, width = (side * strides[0] for side in outputs[0].shape[2:4])
    sums, degrees = [], {}
    for image in range(len(outputs[0])):
        points, labels, numbers = read(outputs, image, strides), [], []
        for number, (own, cls, x, y, w, h) in enumerate(targets.tolist()):
            if own == image:
                labels.append((int(cls), tuple(xywhn2xyxy(np.array([x, y, w, h]), width, height).tolist())))
                numbers.append(number)
        learnt = plain_assignment(points, labels)
        sums.append(plain_terms(points, labels, learnt))
        degrees |= {(image, point): (numbers[label], degree) for point, (label, degree) in learnt.items()}
    total = max(sum(degree for _, degree in degrees.values()), 1)
    return [sum(term) / total for term in zip(*sums, strict=True)], degrees


def assigned(outputs, targets, strides=STRIDES):
    """{(image, point): (label, degree)} of the program, by way of its loss."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_free, "assign_points", lambda *given: kept.append(assign_points(*given)) or kept[-1])
        loss_of(strides=strides).compute(outputs, targets)
    count = sum(output[0, ..., 0].numel() for output in outputs)
    rows = zip(*(one.tolist() for one in kept[0]), strict=True)
    return {divmod(point, count): (label, degree) for label, point, degree in rows if degree > 0}


@pytest.mark.parametrize("seed", range(4))
def test_terms_and_assignment_are_those_of_a_plain_loop(seed):
    outputs, targets = random_scene(seed)
    terms, learnt = plain_loss(outputs, targets)
    found = assigned(outputs, targets)
    assert {key: label for key, (label, _) in found.items()} == {key: label for key, (label, _) in learnt.items()}
    assert [found[key][1] for key in found] == pytest.approx([learnt[key][1] for key in found], rel=1e-3)
    result = loss_of(af_box=1.0, af_cls=1.0, af_dfl=1.0).compute(outputs, targets)
    assert result.items.tolist() == pytest.approx(terms, rel=1e-4)
    assert result.total.item() == pytest.approx(2 * sum(terms), rel=1e-4) and result.labels == 9
    usual = loss_of().compute(outputs, targets).items.tolist()
    assert usual == pytest.approx([7.5 * terms[0], 0.5 * terms[1], 1.5 * terms[2]], rel=1e-4)


# ------------------------------------------------------------------------------------------- scenes worked by hand


def scene(sides, scores, labels, stride=8, cells=4):
    """One image and level of square cells.

    Args:
        sides: whole distances in cells, of all points or {(x, y) in px: of one}.
        scores: of the three classes, likewise.
        labels: [class, x1, y1, x2, y2 in px].
    """
    output = torch.empty(1, 1, cells, cells, 4 * BINS + NC)
    for row, column in itertools.product(range(cells), repeat=2):
        at = ((column + 0.5) * stride, (row + 0.5) * stride)
        own_sides, own_scores = (one.get(at, one[None]) if isinstance(one, dict) else one for one in (sides, scores))
        output[0, 0, row, column, : 4 * BINS] = certain(own_sides)
        output[0, 0, row, column, 4 * BINS :] = torch.tensor(own_scores).logit()
    rows = [[0, cls, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1] for cls, x1, y1, x2, y2 in labels]
    targets = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    targets[:, 2:] /= stride * cells
    return [output], targets


def learnt_at(outputs, targets, stride=8):
    """{(x, y) in px: (label, degree)}."""
    cells = outputs[0].shape[3]
    found = assigned(outputs, targets, (stride,))
    return {
        ((point % cells + 0.5) * stride, (point // cells + 0.5) * stride): value for (_, point), value in found.items()
    }


def test_points_of_two_labels_go_to_the_one_that_they_overlap_more():
    """Every box is 16 px wide, about its point; label 0 is (0 .. 24), label 1 (8 .. 24), both ways.

    At (12, 12): IoU 256 / 576 = 0.444 with label 0, about the same centre. With label 1 there, as at the three points
    to the right and below: IoU 144 / 368, less 32 / 800 for the centres: 0.351. Those overlap label 0 by 0.253
    (192 / 640 - 64 / 1360) and 0.128 (144 / 688 - 128 / 1568). Degrees go with the root of the score: at (20, 20) it is
    twice the others', so these have 0.351 / sqrt 2.
    """
    scores = {None: (0.5, 0.25, 0.5), (20.0, 20.0): (0.5, 0.5, 0.5)}
    found = learnt_at(*scene((1, 1, 1, 1), scores, [(0, 0, 0, 24, 24), (1, 8, 8, 24, 24)]))
    of_second = {at: degree for at, (label, degree) in found.items() if label == 1}
    best = 144 / 368 - 32 / 800
    rest = pytest.approx(best / math.sqrt(2), rel=1e-4)
    assert of_second == {(20, 20): pytest.approx(best, rel=1e-4), (12, 20): rest, (20, 12): rest}
    assert found[12, 12] == (0, pytest.approx(256 / 576, rel=1e-4)) and len(found) == 9


def test_the_first_of_two_equal_labels_learns_and_the_other_takes_nothing():
    found = learnt_at(*scene((1, 1, 1, 1), (0.5, 0.5, 0.5), [(2, 0, 0, 24, 24), (1, 0, 0, 24, 24)]))
    assert len(found) == 9 and {label for label, _ in found.values()} == {0}


def test_a_label_of_six_pixels_finds_the_points_around_it():
    """It lies at 13 .. 19, between four points; one of them predicts 12 .. 20: IoU 36 / 64 about the same centre."""
    sides = {None: (5, 5, 5, 5), (12.0, 12.0): (0, 0, 1, 1)}
    found = learnt_at(*scene(sides, (0.5, 0.5, 0.5), [(0, 13, 13, 19, 19)]))
    assert sorted(found) == [(12, 12), (12, 20), (20, 12), (20, 20)]
    assert found.pop((12, 12)) == (0, pytest.approx(36 / 64, rel=1e-4))
    assert all(degree < 1e-12 for _, degree in found.values())


def test_points_on_an_edge_are_outside():
    found = learnt_at(*scene((1, 1, 1, 1), (0.5, 0.5, 0.5), [(0, 4, 4, 28, 20)]))
    assert sorted(found) == [(12, 12), (20, 12)]


@pytest.mark.parametrize(
    "labels", [[], [(1, 29, 29, 35, 35)]], ids=["no labels", "between the points of a coarse grid"]
)
def test_what_nothing_learns_has_classes_alone(labels):
    """Four points and three classes at a score of 1/4, all to be 0: 12 ln 4/3, divided by 1 for want of degrees."""
    outputs, targets = scene((1, 1, 1, 1), (0.25, 0.25, 0.25), labels, stride=32, cells=2)
    outputs[0].requires_grad_()
    result = loss_of(strides=(32,)).compute(outputs, targets)
    assert result.items.tolist() == pytest.approx([0, 0.5 * 12 * math.log(4 / 3), 0]) and result.labels == len(labels)
    result.total.backward()
    assert not outputs[0].grad[..., : 4 * BINS].any() and (outputs[0].grad[..., 4 * BINS :] > 0).all()


def test_a_distance_is_learnt_by_the_two_bins_beside_it():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = -(0.75 * math.log(0.2) + 0.25 * math.log(0.3))
    assert distribution_loss(p.log(), torch.tensor(1.25)).item() == pytest.approx(expected)


def test_what_lies_beyond_the_bins_is_learnt_as_their_end():
    """A label of 32 px at one point of a stride of 2: 8 cells a side, 7 is the last bin."""
    outputs, targets = scene((6, 6, 6, 6), (0.5, 0.5, 0.5), [(0, 0, 0, 32, 32)], stride=2, cells=16)
    dfl = loss_of(strides=(2,)).compute(outputs, targets).items[2]
    assert torch.isfinite(dfl)


def test_another_box_loss_is_told_by_name_and_keeps_its_mean():
    """One point learns its label to the degree IoU = 36 / 64; WIoU follows 1 - IoU, from 1."""
    outputs, targets = scene({None: (7, 7, 7, 7), (12.0, 12.0): (0, 0, 1, 1)}, (0.5,) * 3, [(0, 13, 13, 19, 19)])
    outputs[0].requires_grad_()
    loss = loss_of(strides=(8,), box_loss="wiou", af_box=1.0)
    loss.compute(outputs, targets)
    assert 1 - loss.state_dict()["mean_distance"] == pytest.approx(WIOU_MOMENTUM * 36 / 64, rel=1e-2)
    again = loss_of(strides=(8,), box_loss="wiou")
    again.load_state_dict(loss.state_dict())
    assert again.state_dict() == loss.state_dict()
    giou = loss_of(strides=(8,), box_loss="giou", af_box=1.0).compute(outputs, targets).items[0]
    assert giou.item() == pytest.approx((1 - 36 / 64) * 36 / 64, rel=1e-4)  # nothing around both is empty


# --------------------------------------------------------------------------------------------------- the whole


def test_sixteen_bits_lose_only_the_digits_of_the_outputs():
    outputs, targets = random_scene(1)
    rough = [output.bfloat16() for output in outputs]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of().compute(rough, targets)
    exact = loss_of().compute([output.float() for output in rough], targets)
    assert found.total.dtype == torch.float32 and torch.equal(found.items, exact.items)


def test_parts_of_a_batch_add_up_to_the_whole():
    """Three images as two parts of two processes, the second without labels of its own."""
    outputs, targets = random_scene(2, images=3)
    targets = targets[targets[:, 0] < 2]
    loss, figures = loss_of(), []
    leaves = [[output.clone().requires_grad_() for output in outputs] for _ in range(2)]
    whole = loss.compute(leaves[0], targets)
    whole.total.backward()
    parts = [([level[:2] for level in leaves[1]], targets), ([level[2:] for level in leaves[1]], targets[:0])]
    for part in parts:
        loss.compute(*part, BatchReduction(lambda own: figures.append(own) or own, 2))
    results = [loss.compute(*part, BatchReduction(lambda _: sum(figures), 2)) for part in parts]
    (sum(result.total for result in results) / 2).backward()
    for result in results:
        assert result.items.tolist() == pytest.approx(whole.items.tolist(), rel=1e-5)
        assert result.labels == whole.labels
    for own, other in zip(*leaves, strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-4, atol=1e-6)
