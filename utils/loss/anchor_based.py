"""The loss of YOLOv5's anchor-based head: box, objectness and class terms, and the class that weighs them.

The terms are pure functions that return a sum and a count. The gradient is the same to the bit in every run on a CPU:
rows are gathered by `index_select`, and a cell that several labels claim is settled explicitly. Matching is in
`utils.loss.assigners`, and done on the CPU whatever the device: what the device is asked for has shapes that are known,
so that nothing waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError
from utils.loss.assigners import LayerTargets, match_targets
from utils.loss.base import Loss, Mean
from utils.loss.iou import BoxLoss

if TYPE_CHECKING:
    from utils.train.hyp import Hyp

_BALANCE_3 = (4.0, 1.0, 0.4)  # weight of the objectness of each layer, finest first, for three layers
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)  # for any other number
_BALANCE_DECAY = 0.9999
_REFERENCE_STRIDE = 16  # autobalance keeps this layer's weight at 1


def smooth_BCE(eps: float = 0.1) -> tuple[float, float]:
    """Returns the targets of the right and of the wrong classes for a label smoothing (Szegedy 2016, 1512.00567)."""
    return 1.0 - 0.5 * eps, 0.5 * eps


def bce_sum(
    logits: Tensor, targets: Tensor, pos_weight: float = 1.0, gamma: float = 0.0, alpha: float = 0.25
) -> Tensor:
    """Returns the sum () of the binary cross entropy, focal where gamma is above 0 (Lin et al. 2017, arXiv:1708.02002).

    Args:
        logits: any shape, float32.
        targets: the same shape, 0 to 1.
        pos_weight: weight of the positive part.
        gamma: focal exponent.
        alpha: focal weight of positives, 1 - alpha of negatives.
    """
    weight = None if pos_weight == 1.0 else logits.new_full((1,), pos_weight)
    if gamma <= 0:
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    probability = logits.sigmoid()
    of_target = targets * probability + (1 - targets) * (1 - probability)
    weights = targets * alpha + (1 - targets) * (1 - alpha)
    wrong = (1.0 - of_target).clamp(min=torch.finfo(logits.dtype).tiny)  # at 0 a root's slope is infinite
    return (entropy * weights * wrong**gamma).sum()


def box_term(losses: Tensor) -> Mean:
    """Returns the mean of the box losses of (n,) matched rows."""
    return Mean(losses.sum(), losses.numel())


def objectness_term(
    logits: Tensor, cells: Tensor, overlap: Tensor, pos_weight: float = 1.0, gamma: float = 0.0
) -> Mean:
    """Returns the cross entropy of every cell with the overlap that it reached.

    Args:
        logits: (cells,) float32, all cells of a layer, images and anchors included.
        cells: (n,) int64, the cell of each matched row, each but once (`last_of_each`).
        overlap: (n,) float32, CIoU of each row, without gradient; below 0 counts as 0.
        pos_weight: weight of the positive part.
        gamma: focal exponent.
    """
    targets = torch.zeros_like(logits).index_copy_(0, cells, overlap.clamp(min=0))
    return Mean(bce_sum(logits, targets, pos_weight, gamma), logits.numel())


def class_term(
    logits: Tensor, cls: Tensor, smoothing: tuple[float, float], pos_weight: float = 1.0, gamma: float = 0.0
) -> Mean:
    """Returns the cross entropy of (n, nc) logits with classes (n,) int64, over all n * nc of them."""
    positive, negative = smoothing
    targets = torch.full_like(logits, negative).scatter_(1, cls[:, None], positive)
    return Mean(bce_sum(logits, targets, pos_weight, gamma), logits.numel())


def last_of_each(values: Tensor) -> Tensor:
    """Returns the position of the last occurrence of each distinct value of (n,) integers."""
    ordered, positions = values.sort(stable=True)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return positions[is_last]


def _sent(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copies tensors of the CPU to a device; to CUDA by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda":
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


class _RowsAndObjectness(torch.autograd.Function):
    """Takes the matched rows and the objectness column out of a layer's output, both in float32.

    The gradient of both is written into one buffer; two plain indexings would fill and add up two of the full size.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, flat: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Takes flat (cells, 5 + nc) and cells (n,) int64; returns rows (n, 5 + nc) and objectness (cells,)."""
        ctx.save_for_backward(cells)
        ctx.shape, ctx.dtype = flat.shape, flat.dtype
        # copy: in float32 the column would otherwise be a view of the input
        return flat.index_select(0, cells).float(), flat[:, 4].to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, rows_grad: Tensor, obj_grad: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient (cells, 5 + nc) in the output's own type."""
        (cells,) = ctx.saved_tensors
        grad = rows_grad.new_zeros(ctx.shape)
        grad[:, 4] = obj_grad
        return grad.index_add_(0, cells, rows_grad).to(ctx.dtype), None


class ComputeLoss(Loss):
    """The loss of a model whose last layer is a `Detect`.

    Attributes:
        na, nc, nl: anchors a layer, classes, layers.
        anchors: (nl, na, 2) in cells, as they were when the loss was made.
        balance: weights (nl) of the layers' objectness.
        box_loss: what a box costs.
    """

    terms = ("box", "obj", "cls")
    gains = ("box", "obj", "cls", "obj_pw", "cls_pw", "anchor_t", "fl_gamma")

    def __init__(self, model: nn.Module, autobalance: bool = False) -> None:
        """Takes a model as `Loss` does; `autobalance` lets the layers' objectness weights follow their losses.

        Raises:
            UserError: `model.hyp` is missing or lacks a gain; autobalance of a model without a layer of stride 16.
        """
        super().__init__(model)
        self.na, self.nc, self.nl = self.head.na, self.head.nc, self.head.nl
        self.anchors = self.head.anchors.detach().float()
        self.balance = list(_BALANCE_3) if self.nl == 3 else list(_BALANCE[: self.nl])
        self._reference_layer: int | None = None
        if autobalance:
            pixels = [int(stride) for stride in self.head.stride]
            if _REFERENCE_STRIDE not in pixels:
                raise UserError(f"autobalance needs a layer of stride {_REFERENCE_STRIDE}; this model has {pixels}.")
            self._reference_layer = pixels.index(_REFERENCE_STRIDE)
        self._smoothing = smooth_BCE(self.hyp.get("label_smoothing", 0.0))
        self.box_loss = BoxLoss(self.hyp)

    @staticmethod
    def scaled(hyp: Hyp, head: nn.Module, imgsz: int) -> Hyp:
        """Returns hyperparameters whose gains suit a head and images of `imgsz` px; call it once on what a file holds.

        All gains go with 3 / layers, the class gain with classes / 80, the objectness gain with (imgsz / 640) squared.
        """
        layers = 3 / head.nl
        return dataclasses.replace(
            hyp,
            box=hyp.box * layers,
            cls=hyp.cls * head.nc / 80 * layers,
            obj=hyp.obj * (imgsz / 640) ** 2 * layers,
        )

    @functools.cached_property
    def _anchors_on_cpu(self) -> Tensor:
        return self.anchors.cpu()

    def means(self, outputs: Sequence[Tensor], targets: Tensor) -> list[Mean]:
        """Returns box, objectness, class and `BoxLoss`'s means of each layer in turn; arguments as of `Loss.means`."""
        grids = [(output.shape[2], output.shape[3]) for output in outputs]
        matches = match_targets(targets.cpu().float(), self._anchors_on_cpu, grids, self.hyp["anchor_t"])
        layers = [self._layer_means(output, match) for output, match in zip(outputs, matches, strict=True)]
        return [mean for layer in layers for mean in layer]

    def _layer_means(self, output: Tensor, match: LayerTargets) -> tuple[Mean, Mean, Mean, Mean]:
        """Returns the means of one layer (batch, na, ny, nx, 5 + nc), whose labels are on the CPU."""
        _, na, ny, nx, width = output.shape
        cells = match.flat_cells(na, ny, nx)
        last = last_of_each(cells)
        cells, last, last_cells, box_xywh, anchor_wh, classes = _sent(
            output.device, cells, last, cells[last], match.box_xywh, match.anchor_wh, match.cls
        )
        rows, objectness = _RowsAndObjectness.apply(output.reshape(-1, width), cells)
        xy, wh = rows[:, :4].sigmoid().split(2, dim=1)
        boxes = torch.cat(self.head.decode_boxes(xy, wh, 2.0, -0.5, 4 * anchor_wh), dim=1)  # as `box_xywh`
        pairs = self.box_loss.pairs(boxes, box_xywh, (nx, ny), xywh=True)
        box, distance = box_term(self.box_loss(pairs)), self.box_loss.distance_mean(pairs)
        gamma = self.hyp["fl_gamma"]
        obj = objectness_term(objectness, last_cells, pairs.ciou.detach()[last], self.hyp["obj_pw"], gamma)
        if self.nc == 1:
            return box, obj, Mean(rows.new_zeros(()), 0), distance
        cls = class_term(rows[:, 5:], classes, self._smoothing, self.hyp["cls_pw"], gamma)
        return box, obj, cls, distance

    def weigh(self, means: Sequence[Mean]) -> Tensor:
        """Returns the three terms (3,): sums over the layers, of objectness with the layers' weights."""
        terms = []
        for index, term in enumerate(self.terms):
            weights = self.balance if term == "obj" else [1.0] * self.nl
            values = [mean.value() * weight for mean, weight in zip(means[index::4], weights, strict=True)]
            terms.append(torch.stack(values).sum() * self.hyp[term])
        return torch.stack(terms)

    def after_training_batch(self, means: Sequence[Mean]) -> None:
        """Moves the layers' weights towards the inverse of their losses, the stride-16 layer's staying at 1.

        Does so with autobalance alone; `box_loss` follows always.
        """
        self.box_loss.follow(means[3::4])
        if self._reference_layer is None:
            return
        losses = torch.stack([mean.value() for mean in means[1::4]]).tolist()
        moved = [
            _BALANCE_DECAY * weight + (1 - _BALANCE_DECAY) / loss
            for weight, loss in zip(self.balance, losses, strict=True)
        ]
        self.balance = [weight / moved[self._reference_layer] for weight in moved]

    def state_dict(self) -> dict[str, Any]:
        """Returns the layers' objectness weights and the state of the box loss."""
        return {"balance": list(self.balance), **self.box_loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of an interrupted run."""
        self.balance = list(state["balance"])
        self.box_loss.load_state_dict(state)

    def build_targets(self, p: Sequence[Tensor], targets: Tensor) -> tuple[list, list, list, list]:
        """Returns which cells and anchors learn which label: for each of nl layers n rows, one a (label, anchor, cell).

        Args:
            p: nl raw outputs (batch, na, ny, nx, 5 + nc).
            targets: (N, 6) [image index, class, x, y, w, h], boxes as fractions of the image.

        Returns:
            Classes (n,); boxes xywh (n, 4) in cells, the centre relative to the cell's corner; image, anchor, cell y
            and cell x, (n,) each; anchors (n, 2) in cells.
        """
        grids = [(output.shape[2], output.shape[3]) for output in p]
        matches = match_targets(targets.float(), self.anchors, grids, self.hyp["anchor_t"])
        return (
            [match.cls for match in matches],
            [match.box_xywh for match in matches],
            [(match.image, match.anchor, match.cell_y, match.cell_x) for match in matches],
            [match.anchor_wh for match in matches],
        )
