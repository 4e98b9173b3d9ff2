"""Which cells answer for which label: YOLOv5's anchor matching, and task-aligned assignment without anchors.

- `match_targets`: a label matches every anchor whose sides differ from its own by less than `anchor_t` times, and is
  learnt by the cell that holds its centre and by up to two neighbours, those nearest to the centre.
- `candidate_points`, `assign_points`: a label is learnt by the cells inside it whose predictions already fit it best,
  each to a degree.

Pure functions of tensors on any device; the losses that use the results are `utils.loss.anchor_based` and
`utils.loss.anchor_free`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.boxes import bbox_iou

_STEPS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))  # own cell, left, up, right, down
_NEAR = 0.5  # a neighbour joins in when the centre lies in the half of the cell that borders it

_LEAST_SIDE_PX = 16.0  # below it a label's side is taken for as much in the search for candidates
_BEST = 10  # candidates of a label that may learn it
_SCORE_POWER, _OVERLAP_POWER = 0.5, 6.0


class LayerTargets(NamedTuple):
    """Matches of one detection layer: n rows, one for each (label, anchor, cell)."""

    image: Tensor  # (n,) int64, index in the batch
    anchor: Tensor  # (n,) int64, index in the layer
    cell_y: Tensor  # (n,) int64, 0 .. ny - 1
    cell_x: Tensor  # (n,) int64, 0 .. nx - 1
    box_xywh: Tensor  # (n, 4) float32, centre relative to the cell's corner and size, in cells
    anchor_wh: Tensor  # (n, 2) float32, in cells
    cls: Tensor  # (n,) int64

    def flat_cells(self, na: int, ny: int, nx: int) -> Tensor:
        """Returns the row (n,) int64 of each match in a (batch * na * ny * nx, ...) view of the layer's output."""
        return ((self.image * na + self.anchor) * ny + self.cell_y) * nx + self.cell_x


def match_targets(
    targets: Tensor, anchors: Tensor, grid_shapes: Sequence[tuple[int, int]], anchor_t: float
) -> list[LayerTargets]:
    """Matches a batch's labels with the anchors and cells of every detection layer.

    Args:
        targets: (N, 6) float32 [image index, class, x, y, w, h], boxes as fractions of the image.
        anchors: (nl, na, 2) float32 widths and heights in cells of their layer.
        grid_shapes: (ny, nx) of each layer.
        anchor_t: largest ratio of a label's and an anchor's sides.

    Returns:
        One result a layer, its rows in the order: own cells, left, upper, right, lower neighbours; within each by
        anchor, then by label. A centre exactly on a border between two cells counts its own cell twice, as in YOLOv5.
    """
    found = []
    for anchors_wh, (ny, nx) in zip(anchors, grid_shapes, strict=True):
        grid_wh = targets.new_tensor((nx, ny))
        centres, sizes = targets[:, 2:4] * grid_wh, targets[:, 4:6] * grid_wh
        ratio = sizes[None] / anchors_wh[:, None]
        fitting = torch.maximum(ratio, 1 / ratio).amax(dim=2) < anchor_t  # (na, N)
        pair_anchor, pair_label = fitting.nonzero(as_tuple=True)
        # A neighbour outside the grid never learns: the centre must lie more than one cell from that edge
        near, from_far = centres[pair_label], grid_wh - centres[pair_label]
        left_up, right_down = ((side % 1 < _NEAR) & (side > 1) for side in (near, from_far))
        learning = torch.cat((torch.ones_like(left_up[:, :1]), left_up, right_down), dim=1).T  # (5, pairs)
        candidate, pair = learning.nonzero(as_tuple=True)
        label, anchor = pair_label[pair], pair_anchor[pair]
        centre = centres[label]
        cells = (centre - targets.new_tensor(_STEPS)[candidate]).long()  # truncates
        cell_x, cell_y = cells[:, 0].clamp(0, nx - 1), cells[:, 1].clamp(0, ny - 1)
        offsets = centre - torch.stack((cell_x, cell_y), dim=1)
        found.append(
            LayerTargets(
                image=targets[label, 0].long(),
                anchor=anchor,
                cell_y=cell_y,
                cell_x=cell_x,
                box_xywh=torch.cat((offsets, sizes[label]), dim=1),
                anchor_wh=anchors_wh[anchor],
                cls=targets[label, 1].long(),
            )
        )
    return found


class Candidates(NamedTuple):
    """Pairs of a label and a point inside it: P rows, label by label."""

    label: Tensor  # (P,) int64, number of the label
    point: Tensor  # (P,) int64, the point's row in a (batch * points, ...) view of the outputs
    place: Tensor  # (P,) int64, number of the pair among its label's
    first: Tensor  # (M,) int64, row of each label's first pair
    most: int  # pairs of the label that has most


class PointTargets(NamedTuple):
    """What points learn: k rows a label, as many as the best; those that are left over have the degree 0."""

    label: Tensor  # (M * k,) int64
    point: Tensor  # (M * k,) int64, row in a (batch * points, ...) view; each has one row above 0 at most
    degree: Tensor  # (M * k,) float32, the class score to be learnt, 0 to 1


def candidate_points(
    boxes_xyxy: Tensor, image: Tensor, grid_shapes: Sequence[tuple[int, int]], strides_px: Sequence[float]
) -> Candidates:
    """Returns the points that lie strictly inside each label, its sides taken for 16 px at least.

    A point is the centre of a cell. The points of an image count level by level, then by y, x.

    Args:
        boxes_xyxy: (M, 4) float32, corners in px.
        image: (M,) int64, index in the batch.
        grid_shapes: (ny, nx) of each level.
        strides_px: pixels per cell of each level.
    """
    centre, half = (boxes_xyxy[:, 2:] + boxes_xyxy[:, :2]) / 2, (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) / 2
    half = half.clamp(min=_LEAST_SIDE_PX / 2)
    levels = []
    for (ny, nx), stride in zip(grid_shapes, strides_px, strict=True):
        across, down = (
            ((torch.arange(count, device=half.device) + 0.5) * stride - centre[:, axis, None]).abs()
            < half[:, axis, None]
            for axis, count in ((0, nx), (1, ny))
        )
        levels.append((down[:, :, None] & across[:, None]).flatten(1))
    inside = torch.cat(levels, dim=1)
    label, point = inside.nonzero(as_tuple=True)
    counts = inside.sum(1)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(label), device=label.device) - first[label]
    most = int(counts.max()) if len(counts) else 0
    return Candidates(label, image[label] * inside.shape[1] + point, place, first, most)


def assign_points(
    candidates: Candidates, boxes_xyxy: Tensor, cls: Tensor, scores: Tensor, predicted_xyxy: Tensor
) -> PointTargets:
    """Chooses the points that learn each label by how well they predict it (Feng et al. 2021, TOOD, arXiv:2108.07755).

    A candidate's alignment is score^0.5 * CIoU^6. A label takes its 10 best candidates above 0; a point taken by
    several goes to that of the largest CIoU, among equals to the first. A point's degree is its alignment scaled so
    that the best point of each label has the largest CIoU that any of them reached. No shape depends on values, so that
    a device need not be waited for.

    Args:
        candidates: of `candidate_points`, on the device of the rest.
        boxes_xyxy: (M, 4) float32, corners of the labels in px.
        cls: (M,) int64.
        scores: (batch * points, nc) float32, 0 to 1.
        predicted_xyxy: (batch * points, 4) float32, corners in px.
    """
    label, point, place, first, most = candidates
    if most == 0:
        return PointTargets(label, point, scores.new_zeros(0))
    overlap = bbox_iou(predicted_xyxy[point], boxes_xyxy[label], xywh=False, CIoU=True).clamp(min=0)
    alignment = scores[point, cls[label]] ** _SCORE_POWER * overlap**_OVERLAP_POWER
    table = scores.new_zeros(len(first), most)
    table[label, place] = alignment
    alignment, chosen = table.topk(min(_BEST, most), dim=1)
    pair = (first[:, None] + chosen).clamp(max=len(label) - 1)
    point, overlap = point[pair], overlap[pair]
    number = torch.arange(len(first), device=label.device)[:, None].expand_as(point)
    # Of the rows that want a point those of the largest CIoU win, then the first label's
    taken = alignment > 0
    largest = scores.new_zeros(len(scores)).scatter_reduce(0, point.flatten(), (overlap * taken).flatten(), "amax")
    taken &= overlap == largest[point]
    ranks = torch.where(taken, number, len(first))
    owner = ranks.new_full((len(scores),), len(first)).scatter_reduce(0, point.flatten(), ranks.flatten(), "amin")
    taken &= number == owner[point]
    alignment, overlap = alignment * taken, overlap * taken
    best = alignment.amax(1, keepdim=True)
    degree = alignment / torch.where(best > 0, best, 1.0) * overlap.amax(1, keepdim=True)
    return PointTargets(number.flatten(), point.flatten(), degree.flatten())
