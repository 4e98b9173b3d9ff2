"""Box losses by name: what a predicted box costs beside its label. Written from the papers' formulas.

`BOX_LOSSES` is the table; the losses of the heads call `BoxLoss`. Each function takes `BoxPairs` and returns (n,), 0
for equal boxes, with a finite gradient for every pair of boxes. IoU is 6.1's (`utils.boxes.bbox_iou`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.boxes import bbox_iou, xywh2xyxy
from utils.loss.base import Mean

EPS = 1e-7  # keeps divisions finite
FOCAL_GAMMA = 0.5
SIOU_THETA = 4
WIOU_ALPHA, WIOU_DELTA = 1.9, 3.0
WIOU_MOMENTUM = 1 - 0.5 ** (1 / 7000)  # a batch's share of the running mean: half of it is of the last 7000 batches
ALPHA = 3
INNER_RATIO = 0.75


@dataclass(frozen=True)
class BoxPairs:
    """Predicted boxes and their labels, row by row, in one unit (cells or pixels), and what losses measure of them.

    Attributes:
        pred: corners (n, 4) float32.
        target: corners (n, 4) float32.
        size_wh: width and height of the image in the boxes' unit: of the grid, if that is cells.
        mean_distance: running mean () of 1 - IoU in training, above 0.
    """

    pred: Tensor
    target: Tensor
    size_wh: tuple[float, float]
    mean_distance: Tensor

    @functools.cached_property
    def iou(self) -> Tensor:
        """IoU (n,)."""
        return bbox_iou(self.pred, self.target, xywh=False)

    @functools.cached_property
    def ciou(self) -> Tensor:
        """CIoU (n,), the overlap that objectness and assignment go by, whatever the box loss."""
        return bbox_iou(self.pred, self.target, xywh=False, CIoU=True)

    @functools.cached_property
    def pred_wh(self) -> Tensor:
        """Sides (n, 2) of the predicted boxes."""
        return self.pred[:, 2:] - self.pred[:, :2]

    @functools.cached_property
    def target_wh(self) -> Tensor:
        """Sides (n, 2) of the labels."""
        return self.target[:, 2:] - self.target[:, :2]

    @functools.cached_property
    def offset_squares(self) -> Tensor:
        """Squares (n, 2) of the distances of the centres along x and y."""
        return ((self.pred[:, :2] + self.pred[:, 2:] - self.target[:, :2] - self.target[:, 2:]) / 2) ** 2

    @functools.cached_property
    def hull_squares(self) -> Tensor:
        """Squares (n, 2) of the sides of the smallest box around both."""
        corner = self.pred[:, 2:].maximum(self.target[:, 2:])
        return (corner - self.pred[:, :2].minimum(self.target[:, :2])) ** 2

    @functools.cached_property
    def center_distance(self) -> Tensor:
        """Square of the centres' distance as a share (n,) of that of the diagonal around both: DIoU's penalty."""
        return self.offset_squares.sum(1) / (self.hull_squares.sum(1) + EPS)


def ciou(pairs: BoxPairs) -> Tensor:
    """Complete IoU: distance of the centres and aspect ratio (Zheng et al. 2020, arXiv:1911.08287)."""
    return 1.0 - pairs.ciou


def giou(pairs: BoxPairs) -> Tensor:
    """Generalised IoU: the share of the box around both that neither fills (Rezatofighi 2019, arXiv:1902.09630)."""
    overlap = bbox_iou(pairs.pred, pairs.target, xywh=False, GIoU=True)
    return 1.0 - overlap.minimum(pairs.iou)  # of boxes without a height the former is out of all bounds


def diou(pairs: BoxPairs) -> Tensor:
    """Distance IoU (Zheng et al. 2020, arXiv:1911.08287)."""
    return 1.0 - pairs.iou + pairs.center_distance


def eiou(pairs: BoxPairs) -> Tensor:
    """Efficient IoU: distance of the centres and of the sides (Zhang et al. 2021, arXiv:2101.08158)."""
    sides = ((pairs.pred_wh - pairs.target_wh) ** 2 / (pairs.hull_squares + EPS)).sum(1)
    return diou(pairs) + sides


def focal_eiou(pairs: BoxPairs) -> Tensor:
    """EIoU times IoU^0.5 without its gradient: boxes far off count less, those apart not at all (of the same paper)."""
    return pairs.iou.detach() ** FOCAL_GAMMA * eiou(pairs)


def siou(pairs: BoxPairs) -> Tensor:
    """SCYLLA-IoU: distance that also goes by the angle between the centres, and shape (Gevorgyan 2022, 2205.12740).

    The angle cost sin(2 asin(dy / r)) is 2 dx dy / r^2, which needs no arc sine.
    """
    dx, dy = pairs.offset_squares.unbind(1)
    x, y = ((pairs.pred[:, axis::2].sum(1) - pairs.target[:, axis::2].sum(1)).abs() / 2 for axis in (0, 1))
    angle = 2 * x * y / (dx + dy + EPS)
    shares = pairs.offset_squares / (pairs.hull_squares + EPS)
    distance = (1 - ((angle - 2)[:, None] * shares).exp()).sum(1)
    difference = (pairs.pred_wh - pairs.target_wh).abs() / (pairs.pred_wh.maximum(pairs.target_wh) + EPS)
    shape = ((1 - (-difference).exp()) ** SIOU_THETA).sum(1)
    return 1.0 - pairs.iou + (distance + shape) / 2


def wiou(pairs: BoxPairs) -> Tensor:
    """Wise IoU, version 3: neither very good boxes nor outliers set the pace (Tong et al. 2023, arXiv:2301.10051).

    A pair's outlier degree is its 1 - IoU over the running mean. The diagonal around both boxes has no gradient.
    """
    distance = 1.0 - pairs.iou
    attention = (pairs.offset_squares.sum(1) / (pairs.hull_squares.sum(1).detach() + EPS)).exp()
    outlier = distance.detach() / pairs.mean_distance
    return outlier / (WIOU_DELTA * WIOU_ALPHA ** (outlier - WIOU_DELTA)) * attention * distance


def alpha_iou(pairs: BoxPairs) -> Tensor:
    """Alpha-CIoU: IoU and both penalties of CIoU to the power of 3 (He et al. 2021, arXiv:2110.13675)."""
    angles = [torch.atan(wh[:, 0] / (wh[:, 1] + EPS)) for wh in (pairs.pred_wh, pairs.target_wh)]
    v = (4 / math.pi**2) * (angles[0] - angles[1]) ** 2
    beta = (v / (v - pairs.iou + (1 + EPS))).detach()
    return 1.0 - pairs.iou**ALPHA + pairs.center_distance**ALPHA + (beta * v) ** ALPHA


def inner_ciou(pairs: BoxPairs) -> Tensor:
    """CIoU with the IoU of both boxes shrunk about their centres to 0.75 (Zhang et al. 2023, arXiv:2311.02877)."""
    margins = (torch.cat((wh, -wh), 1) * ((1 - INNER_RATIO) / 2) for wh in (pairs.pred_wh, pairs.target_wh))
    inner = (box + margin for box, margin in zip((pairs.pred, pairs.target), margins, strict=True))
    return ciou(pairs) + pairs.iou - bbox_iou(*inner, xywh=False)


def mpdiou(pairs: BoxPairs) -> Tensor:
    """Minimum point distance: of both corners, by the image's diagonal (Ma and Xu 2023, arXiv:2307.07662)."""
    width, height = pairs.size_wh
    return 1.0 - pairs.iou + ((pairs.pred - pairs.target) ** 2).sum(1) / (width**2 + height**2)


BOX_LOSSES: dict[str, Callable[[BoxPairs], Tensor]] = {  # the choices of `--box-loss` and the key `box_loss`
    "ciou": ciou,
    "giou": giou,
    "diou": diou,
    "eiou": eiou,
    "focal-eiou": focal_eiou,
    "siou": siou,
    "wiou": wiou,
    "alpha-iou": alpha_iou,
    "inner-ciou": inner_ciou,
    "mpdiou": mpdiou,
}


class BoxLoss:
    """The box loss that hyperparameters name (`box_loss`, CIoU without it), and WIoU's running mean.

    Attributes:
        name: a key of `BOX_LOSSES`.
        mean_distance: () float32, running mean of 1 - IoU over the batches of training; 1 at first.
    """

    def __init__(self, hyp: Mapping[str, Any]) -> None:
        self.name: str = hyp.get("box_loss", "ciou")
        self.mean_distance = torch.ones(())

    def pairs(self, pred: Tensor, target: Tensor, size_wh: tuple[float, float], xywh: bool = False) -> BoxPairs:
        """Returns predicted boxes and their labels (n, 4) as pairs; `xywh`: centre and size, else corners."""
        pred, target = (xywh2xyxy(boxes) if xywh else boxes for boxes in (pred, target))
        return BoxPairs(pred, target, size_wh, self.mean_distance)

    def __call__(self, pairs: BoxPairs) -> Tensor:
        """Returns what each pair costs (n,)."""
        return BOX_LOSSES[self.name](pairs)

    def distance_mean(self, pairs: BoxPairs, weights: Tensor | None = None) -> Mean:
        """Returns the mean of 1 - IoU for `follow`, by weights (n,); an empty one, where there is no running mean."""
        if self.name != "wiou":
            return Mean(pairs.pred.new_zeros(()), 0)
        distance = 1.0 - pairs.iou.detach()
        return Mean(distance.sum(), len(distance)) if weights is None else Mean(distance @ weights, weights.sum())

    def follow(self, means: Sequence[Mean]) -> None:
        """Moves the running mean towards that of a whole batch of training, given in parts; empty ones move nothing."""
        if count := sum(mean.count for mean in means):
            mean = torch.stack([mean.total for mean in means]).sum() / count
            self.mean_distance = (1 - WIOU_MOMENTUM) * self.mean_distance + WIOU_MOMENTUM * mean

    def state_dict(self) -> dict[str, Any]:
        """Returns the running mean, where there is one, as plain data."""
        return {"mean_distance": float(self.mean_distance)} if self.name == "wiou" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the running mean of an interrupted run."""
        if self.name == "wiou":
            self.mean_distance = torch.tensor(state["mean_distance"])
