"""The loss of the anchor-free head: task-aligned classes, boxes, and the distributions that boxes are made of.

Candidates are found on the CPU, which has the labels; what the device is asked for has shapes that are known, so that
nothing waits for it (`utils.loss.assigners`). The gradient is the same to the bit in every run on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.boxes import xywh2xyxy
from utils.loss.assigners import Candidates, assign_points, candidate_points
from utils.loss.base import Loss, Mean
from utils.loss.iou import BoxLoss

_INSIDE = 0.01  # a side is learnt to be this much nearer than the last bin, so that it has a bin on either hand


def distribution_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Returns the cross entropy (...) of distributions over bins with the two bins beside each distance.

    Each of the two weighs by how near it is (Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388).

    Args:
        logits: (..., bins) float32.
        distances: (...) float32, from 0 to below bins - 1.
    """
    lower = distances.long()
    share = distances - lower
    log_p = logits.log_softmax(-1)
    at_lower, at_upper = (log_p.gather(-1, (lower + step)[..., None])[..., 0] for step in (0, 1))
    return -(at_lower * (1 - share) + at_upper * share)


class AnchorFreeLoss(Loss):
    """The loss of a model whose last layer is a `DetectAF`.

    All three terms are sums over points, divided by the sum of the degrees to which points learn (of all processes, at
    least 1): "cls" the binary cross entropy of all points and classes with the degrees, "box" the box loss and "dfl"
    the mean cross entropy of the four sides' distributions, both times the degree. With one class "cls" stays: it is
    the confidence.

    The gains are the hyperparameters af_box, af_cls and af_dfl, which files leave out (7.5, 0.5 and 1.5, the usual
    ones). Files' box, cls and obj are gains of YOLOv5's loss, whose terms are means of other things.
    """

    terms = ("box", "cls", "dfl")
    gains = ("af_box", "af_cls", "af_dfl")
    unread = {"label_smoothing": 0.0, "fl_gamma": 0.0, "cls_pw": 1.0}

    def __init__(self, model: nn.Module) -> None:
        """Takes a model as `Loss` does."""
        super().__init__(model)
        self.box_loss = BoxLoss(self.hyp)

    @functools.cached_property
    def _strides_px(self) -> list[float]:
        return self.head.stride.tolist()

    def means(self, outputs: Sequence[Tensor], targets: Tensor) -> list[Mean]:
        """Returns the means of the terms, and `BoxLoss`'s; arguments as of `Loss.means`."""
        bins, nc, device = self.head.bins, self.head.nc, outputs[0].device
        grids = [(output.shape[2], output.shape[3]) for output in outputs]
        rows = torch.cat([output.flatten(1, 3) for output in outputs], dim=1).float().flatten(0, 1)
        points, strides = grid_points(grids, self._strides_px, len(outputs[0]), device)

        targets = targets.cpu().float()
        size_px = torch.tensor(grids[0]).flip(0) * self._strides_px[0]
        labels_xyxy = xywh2xyxy(targets[:, 2:6] * size_px.repeat(2))
        *found, most = candidate_points(labels_xyxy, targets[:, 0].long(), grids, self._strides_px)
        candidates = Candidates(*(numbers.to(device, non_blocking=True) for numbers in found), most)
        labels_xyxy, cls = labels_xyxy.to(device, non_blocking=True), targets[:, 1].long().to(device, non_blocking=True)

        with torch.no_grad():
            sides = self._sides(rows[:, : 4 * bins].unflatten(1, (4, bins)))
            boxes = corners(points, sides * strides)
            label, point, degree = assign_points(candidates, labels_xyxy, cls, rows[:, 4 * bins :].sigmoid(), boxes)
            wanted = rows.new_zeros(len(rows) * nc).index_add_(0, point * nc + cls[label], degree).view(-1, nc)
            points, strides, labels_xyxy = points[point], strides[point], labels_xyxy[label]
            to_sides = torch.cat((points - labels_xyxy[:, :2], labels_xyxy[:, 2:] - points), dim=1) / strides
            to_sides = to_sides.clamp(0, bins - 1 - _INSIDE)
        logits = rows.index_select(0, point)[:, : 4 * bins].unflatten(1, (4, bins))
        pairs = self.box_loss.pairs(corners(points, self._sides(logits) * strides), labels_xyxy, size_px.tolist())
        entropy = F.binary_cross_entropy_with_logits(rows[:, 4 * bins :], wanted, reduction="sum")
        count = degree.sum()
        return [
            Mean((self.box_loss(pairs) * degree).sum(), count),
            Mean(entropy, count),
            Mean((distribution_loss(logits, to_sides).mean(1) * degree).sum(), count),
            self.box_loss.distance_mean(pairs, degree),
        ]

    def _sides(self, logits: Tensor) -> Tensor:
        """Returns the distances (n, 4) in cells that logits (n, 4, bins) mean."""
        bins = torch.arange(self.head.bins, device=logits.device, dtype=logits.dtype)
        return self.head.distances(logits, bins, -1)[..., 0]

    def weigh(self, means: Sequence[Mean]) -> Tensor:
        """Returns the three terms (3,) with their gains."""
        return torch.stack([mean.value() * self.hyp[gain] for mean, gain in zip(means[:3], self.gains, strict=True)])

    def after_training_batch(self, means: Sequence[Mean]) -> None:
        """Lets the box loss follow."""
        self.box_loss.follow(means[3:])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the box loss."""
        return self.box_loss.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of an interrupted run."""
        self.box_loss.load_state_dict(state)


def grid_points(
    grid_shapes: Sequence[tuple[int, int]], strides_px: Sequence[float], images: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the centres of all cells (images * points, 2) x and y in px, and their strides (images * points, 1)."""
    points, strides = [], []
    for (ny, nx), stride in zip(grid_shapes, strides_px, strict=True):
        y, x = (torch.arange(count, device=device, dtype=torch.float32) + 0.5 for count in (ny, nx))
        points.append(torch.cartesian_prod(y, x).flip(1) * stride)
        strides.append(torch.full((ny * nx, 1), stride, device=device))
    return torch.cat(points).repeat(images, 1), torch.cat(strides).repeat(images, 1)


def corners(points: Tensor, sides: Tensor) -> Tensor:
    """Returns xyxy (n, 4) of boxes whose left, upper, right and lower sides lie `sides` (n, 4) from points (n, 2)."""
    return torch.cat((points - sides[:, :2], points + sides[:, 2:]), dim=1)
