"""The box losses by name: values worked out by hand, gradients, the running mean of WIoU."""

import itertools
import math

import pytest
import torch

from utils.loss.iou import BOX_LOSSES, WIOU_MOMENTUM, BoxLoss, BoxPairs

SIZE_WH = (30.0, 40.0)  # a diagonal of 50
MEAN = torch.tensor(0.5)  # running mean of 1 - IoU


def aspect(iou, wh, target_wh):
    """The penalty alpha * v of CIoU."""
    v = 4 / math.pi**2 * (math.atan(target_wh[0] / target_wh[1]) - math.atan(wh[0] / wh[1])) ** 2
    return v / (1 - iou + v) * v


def focused(outlier):
    return outlier / (3 * 1.9 ** (outlier - 3))


def falling(*exponents):
    """The sum of 1 - e^-x."""
    return sum(1 - math.exp(-exponent) for exponent in exponents)


A, N = aspect(0, (2, 2), (4, 2)), aspect(1 / 8, (8, 4), (2, 2))
BOXES = {  # prediction, label; IoU, squares of the centres' distance and of the diagonal around both
    "apart": ((0, 0, 2, 2), (3, 0, 7, 2)),  # 0, 16, 7^2 + 2^2
    "overlapping": ((0, 0, 4, 4), (2, 1, 6, 5)),  # 6 / 26, 5, 6^2 + 5^2
    "nested": ((0, 0, 8, 4), (2, 1, 4, 3)),  # 4 / 32, 1, 8^2 + 4^2
    "equal": ((1, 2, 3, 5), (1, 2, 3, 5)),
}
EXPECTED = {  # in the order of BOXES; equal boxes cost nothing
    "ciou": (1 + 16 / 53 + A, 10 / 13 + 5 / 61, 7 / 8 + 1 / 80 + N),
    "giou": (1 + 2 / 14, 10 / 13 + 4 / 30, 7 / 8),
    "diou": (1 + 16 / 53, 10 / 13 + 5 / 61, 7 / 8 + 1 / 80),
    "eiou": (1 + 16 / 53 + 4 / 49, 10 / 13 + 5 / 61, 7 / 8 + 1 / 80 + 36 / 64 + 4 / 16),
    "focal-eiou": (0, (3 / 13) ** 0.5 * (10 / 13 + 5 / 61), 0.125**0.5 * (7 / 8 + 1 / 80 + 36 / 64 + 4 / 16)),
    "siou": (
        1 + (falling(2 * 16 / 49) + falling(2 / 4) ** 4) / 2,
        10 / 13 + falling(1.2 * 4 / 36, 1.2 * 1 / 25) / 2,  # an angle cost of 2 * 2 * 1 / 5 = 0.8
        7 / 8 + (falling(2 * 1 / 64) + falling(6 / 8) ** 4 + falling(2 / 4) ** 4) / 2,
    ),
    "wiou": (
        focused(2) * math.exp(16 / 53),
        focused(20 / 13) * math.exp(5 / 61) * 10 / 13,
        focused(7 / 4) * math.exp(1 / 80) * 7 / 8,
    ),
    "alpha-iou": (1 + (16 / 53) ** 3 + A**3, 1 - (3 / 13) ** 3 + (5 / 61) ** 3, 1 - 1 / 512 + (1 / 80) ** 3 + N**3),
    # sides of 3 overlap by 1 x 2 of 16; the last two keep their ratio
    "inner-ciou": (1 + 16 / 53 + A, 7 / 8 + 5 / 61, 7 / 8 + 1 / 80 + N),
    "mpdiou": (1 + (9 + 25) / 2500, 10 / 13 + (5 + 5) / 2500, 7 / 8 + (5 + 17) / 2500),
}


def pairs_of(*boxes):
    pred, target = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    return BoxPairs(pred.requires_grad_(), target, SIZE_WH, MEAN)


def gradient(name, boxes):
    pairs = pairs_of(boxes)
    BOX_LOSSES[name](pairs).sum().backward()
    return pairs.pred.grad[0]


def test_each_has_its_values():
    assert list(BOX_LOSSES) == list(EXPECTED)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_values_by_hand(name):
    found = BOX_LOSSES[name](pairs_of(*BOXES.values())).tolist()
    assert found == pytest.approx([*EXPECTED[name], 0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_loss_and_gradient_are_finite_for_every_pair_within_ten_thousand(name):
    """All boxes of five coordinates: nested, equal, touching, apart, without an area, close to each other."""
    spans = list(itertools.combinations_with_replacement((0.0, 1e-4, 1.0, 1.001, 1e4), 2))
    boxes = torch.tensor([(x1, y1, x2, y2) for (x1, x2), (y1, y2) in itertools.product(spans, spans)])
    pred, target = boxes.repeat_interleave(len(boxes), 0).requires_grad_(), boxes.repeat(len(boxes), 1)
    losses = BOX_LOSSES[name](BoxPairs(pred, target, SIZE_WH, torch.tensor(1e-3)))
    losses.sum().backward()
    assert losses.shape == (225 * 225,) and losses.isfinite().all() and losses.min() > -1e-5
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_a_step_against_the_gradient_costs_less(name):
    pred, target = (torch.tensor([box]) for box in ((0.0, 0.0, 4.0, 3.0), (1.5, 1.0, 4.5, 5.0)))
    pred.requires_grad_()
    loss = BOX_LOSSES[name](BoxPairs(pred, target, SIZE_WH, MEAN))
    (slope,) = torch.autograd.grad(loss.sum(), pred)
    moved = BOX_LOSSES[name](BoxPairs(pred - 0.1 * slope, target, SIZE_WH, MEAN))
    assert moved < loss


def test_the_focal_weight_has_no_gradient():
    weighed = math.sqrt(3 / 13) * gradient("eiou", BOXES["overlapping"])
    torch.testing.assert_close(gradient("focal-eiou", BOXES["overlapping"]), weighed)


def test_of_wise_iou_only_iou_and_the_centres_distance_have_a_gradient():
    """Apart, IoU's is 0. The centre is 4 to the left, each corner moves it by half: -2 * 4 / 2 of a diagonal of 53."""
    slope = focused(2) * math.exp(16 / 53) * -4 / 53
    assert gradient("wiou", BOXES["apart"]).tolist() == pytest.approx([slope, 0, slope, 0], rel=1e-5)


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_centre_and_size_cost_what_corners_do(name):
    box_loss = BoxLoss({"box_loss": name})
    box_loss.mean_distance = MEAN
    pred, target = torch.tensor([[2.0, 2, 4, 4]]), torch.tensor([[4.0, 3, 4, 4]])  # the overlapping ones
    losses = box_loss(box_loss.pairs(pred, target, SIZE_WH, xywh=True))
    assert losses.tolist() == pytest.approx([EXPECTED[name][1]], rel=1e-5)


def test_the_running_mean_follows_whole_batches_and_passes_over_empty_ones():
    """Distances of 1, 10 / 13 and 7 / 8 in two parts; a mean of parts would differ from that of the whole."""
    box_loss, boxes = BoxLoss({"box_loss": "wiou"}), list(BOXES.values())
    parts = [box_loss.distance_mean(pairs_of(*part)) for part in (boxes[:2], boxes[2:3])]
    box_loss.follow(parts)
    mean = (1 + 10 / 13 + 7 / 8) / 3
    assert box_loss.mean_distance.item() == pytest.approx(1 - WIOU_MOMENTUM * (1 - mean), abs=1e-7)
    assert 1 - box_loss.mean_distance.item() > 1e-5
    before = box_loss.state_dict()
    box_loss.follow([parts[0]._replace(total=torch.tensor(0.0), count=0)])
    assert box_loss.state_dict() == before
    resumed = BoxLoss({"box_loss": "wiou"})
    resumed.load_state_dict(before)
    assert torch.equal(resumed.mean_distance, box_loss.mean_distance)


def test_after_7000_batches_half_of_the_running_mean_is_theirs():
    box_loss = BoxLoss({"box_loss": "wiou"})
    perfect = [box_loss.distance_mean(pairs_of(BOXES["equal"]))]
    for _ in range(7000):
        box_loss.follow(perfect)
    assert box_loss.mean_distance.item() == pytest.approx(0.5, abs=1e-3)
