"""Which cells and anchors answer for which label: YOLOv5's anchor matching.

A label matches every anchor whose sides differ from its own by less than `anchor_t` times, and is learnt by the cell
that holds its centre and by up to two neighbours, those nearest to the centre. Pure functions of tensors on any
device; the loss that uses the result is in `utils.loss.anchor_based`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))  # own cell, left, up, right, down
_NEAR = 0.5  # a neighbour joins in when the centre lies in the half of the cell that borders it


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
