"""The detection loss: box, objectness and class terms, and the class that weighs them.

The terms are pure functions that return a sum and a count, so that means can be taken over several processes that share
a batch (`BatchReduction`). All is computed in float32, also under autocast, and the gradient is the same to the bit in
every run on a CPU: rows are gathered by `index_select`, and a cell that several labels claim is settled explicitly.
Matching is in `utils.loss.assigners`, and done on the CPU whatever the device: what the device is asked for has shapes
that are known, so that nothing waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boxes import bbox_iou
from utils.errors import UserError
from utils.loss.assigners import LayerTargets, match_targets

if TYPE_CHECKING:
    from utils.train.hyp import Hyp

TERMS = ("box", "obj", "cls")
_BALANCE_3 = (4.0, 1.0, 0.4)  # weight of the objectness of each layer, finest first, for three layers
_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)  # for any other number
_BALANCE_DECAY = 0.9999
_REFERENCE_STRIDE = 16  # autobalance keeps this layer's weight at 1


class Mean(NamedTuple):
    """A mean before its division."""

    total: Tensor  # () float32
    count: int

    def value(self) -> Tensor:
        """Returns the mean () float32; 0 of nothing."""
        return self.total / max(self.count, 1)


LayerTerms = tuple[Mean, Mean, Mean]  # box, objectness, class


class SmoothedTargets(NamedTuple):
    """Class targets after label smoothing (Szegedy et al. 2016, arXiv:1512.00567)."""

    positive: float
    negative: float


class LossResult(NamedTuple):
    """What one batch costs and holds, over all processes that share it."""

    total: Tensor  # () float32 with gradient: the items' sum times the batch size, or see `BatchReduction`
    items: Tensor  # (3,) float32, detached: box, objectness, class, each with its gain
    images: int
    labels: int

    def bad_term(self) -> str | None:
        """Names the first term that is not finite ('box', 'obj' or 'cls'), or None."""
        finite = torch.isfinite(self.items).tolist()
        return next((name for name, good in zip(TERMS, finite, strict=True) if not good), None)


class BatchReduction(NamedTuple):
    """How several processes that each compute a part of a batch come to the figures of the whole.

    Each divides the sums of its own part by the counts of all, and takes its total times the number of processes: the
    average of their gradients, which is what DistributedDataParallel makes, is then the gradient of the whole batch.
    """

    all_reduce_sum: Callable[[Tensor], Tensor]  # adds (n,) float64 on the CPU up over the processes
    processes: int
    weight: float = 1.0  # 0 for a part that another process answers for


def smooth_bce(eps: float) -> SmoothedTargets:
    """Returns the targets of the right and of the wrong classes for a smoothing of `eps`."""
    return SmoothedTargets(1.0 - 0.5 * eps, 0.5 * eps)


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


def decode_boxes(logits: Tensor, anchor_wh: Tensor) -> Tensor:
    """Turns (n, 4) raw outputs and (n, 2) anchors into xywh boxes (n, 4), relative to their cells, in cells."""
    xy, wh = logits.sigmoid().split(2, dim=1)
    return torch.cat((xy * 2 - 0.5, (wh * 2) ** 2 * anchor_wh), dim=1)


def box_term(ciou: Tensor) -> Mean:
    """Returns 1 - CIoU over (n,) matched rows."""
    return Mean((1.0 - ciou).sum(), ciou.numel())


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
    logits: Tensor, cls: Tensor, smoothing: SmoothedTargets, pos_weight: float = 1.0, gamma: float = 0.0
) -> Mean:
    """Returns the cross entropy of (n, nc) logits with classes (n,) int64, over all n * nc of them."""
    targets = torch.full_like(logits, smoothing.negative).scatter_(1, cls[:, None], smoothing.positive)
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


class DetectionLoss:
    """Weighs the three terms over all layers."""

    def __init__(
        self, hyp: Hyp, anchors: Tensor, strides: Sequence[float] | Tensor, nc: int, autobalance: bool = False
    ) -> None:
        """Prepares the loss of one model.

        Args:
            hyp: hyperparameters with gains already scaled (`Hyp.scaled`).
            anchors: (nl, na, 2) in cells of their layer; as they are at the first call.
            strides: (nl,) pixels a cell.
            nc: number of classes; with one the class term is 0.
            autobalance: let the layers' objectness weights follow their losses.

        Raises:
            UserError: autobalance of a model without a layer of stride 16.
        """
        self.hyp = hyp
        self.anchors = anchors.detach().float()
        self.nc = nc
        nl = len(anchors)
        self.balance = list(_BALANCE_3) if nl == 3 else list(_BALANCE[:nl])
        self.reference_layer: int | None = None
        if autobalance:
            pixels = [int(stride) for stride in strides]
            if _REFERENCE_STRIDE not in pixels:
                raise UserError(f"autobalance needs a layer of stride {_REFERENCE_STRIDE}; this model has {pixels}.")
            self.reference_layer = pixels.index(_REFERENCE_STRIDE)
        self._smoothing = smooth_bce(hyp.label_smoothing)

    def __call__(self, outputs: Sequence[Tensor], targets: Tensor, pool: BatchReduction | None = None) -> LossResult:
        """Returns the loss of a batch.

        Args:
            outputs: nl raw outputs (batch, na, ny, nx, 5 + nc), any float type.
            targets: (N, 6) float32 [image index, class, x, y, w, h], boxes as fractions of the image; best on the CPU.
            pool: how to reckon with other processes, where this batch is a part of a common one.
        """
        with torch.autocast(outputs[0].device.type, enabled=False):
            grids = [(output.shape[2], output.shape[3]) for output in outputs]
            matches = match_targets(targets.cpu().float(), self._anchors_here, grids, self.hyp.anchor_t)
            layers = [self.layer_terms(output, match) for output, match in zip(outputs, matches, strict=True)]
            images, labels = outputs[0].shape[0], len(targets)
            if pool is None:
                terms = self._terms(layers)
                total, items = terms.sum() * images, terms.detach()
            else:
                own, layers, images, labels = _pooled(layers, images, labels, pool)
                total = self._terms(own).sum() * images * pool.processes
                items = self._terms(layers)
        if self.reference_layer is not None and total.requires_grad:  # training, not validation
            self._rebalance(torch.stack([obj.value() for _, obj, _ in layers]).tolist())
        return LossResult(total, items, images, labels)

    @functools.cached_property
    def _anchors_here(self) -> Tensor:
        """The anchors on the CPU."""
        return self.anchors.cpu()

    def layer_terms(self, output: Tensor, match: LayerTargets) -> LayerTerms:
        """Returns the box, objectness and class terms of one layer (batch, na, ny, nx, 5 + nc), without gains.

        Args:
            output: raw, any float type, on any device.
            match: the layer's labels, on the CPU.
        """
        _, na, ny, nx, width = output.shape
        cells = match.flat_cells(na, ny, nx)
        last = last_of_each(cells)
        cells, last, last_cells, box_xywh, anchor_wh, classes = _sent(
            output.device, cells, last, cells[last], match.box_xywh, match.anchor_wh, match.cls
        )
        rows, objectness = _RowsAndObjectness.apply(output.reshape(-1, width), cells)
        ciou = bbox_iou(decode_boxes(rows[:, :4], anchor_wh), box_xywh, xywh=True, CIoU=True)
        obj = objectness_term(objectness, last_cells, ciou.detach()[last], self.hyp.obj_pw, self.hyp.fl_gamma)
        if self.nc == 1:
            return box_term(ciou), obj, Mean(rows.new_zeros(()), 0)
        cls = class_term(rows[:, 5:], classes, self._smoothing, self.hyp.cls_pw, self.hyp.fl_gamma)
        return box_term(ciou), obj, cls

    def _terms(self, layers: Sequence[LayerTerms]) -> Tensor:
        """Returns the three terms (3,) float32, with their gains."""
        return torch.stack([self._combine(layers, index) for index in range(len(TERMS))])

    def _combine(self, layers: Sequence[LayerTerms], index: int) -> Tensor:
        """Adds one term () over the layers and applies its gain; objectness with the layers' weights."""
        weights = self.balance if TERMS[index] == "obj" else [1.0] * len(layers)
        values = [terms[index].value() * weight for terms, weight in zip(layers, weights, strict=True)]
        return torch.stack(values).sum() * getattr(self.hyp, TERMS[index])

    def _rebalance(self, objectness: Sequence[float]) -> None:
        """Moves the layers' weights towards the inverse of their losses, the stride-16 layer's staying at 1."""
        moved = [
            _BALANCE_DECAY * weight + (1 - _BALANCE_DECAY) / loss
            for weight, loss in zip(self.balance, objectness, strict=True)
        ]
        self.balance = [weight / moved[self.reference_layer] for weight in moved]

    def state_dict(self) -> dict[str, list[float]]:
        """Returns what must outlive an interruption: the layers' objectness weights."""
        return {"balance": list(self.balance)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Takes over the layers' objectness weights of an interrupted run."""
        self.balance = list(state["balance"])


class _Pooled(NamedTuple):
    """A part of a batch and the whole of it."""

    own: list[LayerTerms]  # this process's sums, with gradient, over all processes' counts
    all: list[LayerTerms]  # all processes' sums and counts
    images: int
    labels: int


def _pooled(layers: Sequence[LayerTerms], images: int, labels: int, pool: BatchReduction) -> _Pooled:
    """Adds sums, counts, images and labels up over the processes, in one exchange."""
    means = [mean for layer in layers for mean in layer]
    totals = torch.stack([mean.total for mean in means]) * pool.weight
    counts = torch.tensor([*(mean.count for mean in means), images, labels], dtype=torch.float64) * pool.weight
    summed = pool.all_reduce_sum(torch.cat((totals.detach().double().cpu(), counts)))
    summed_totals = summed[: len(means)].to(totals.dtype)  # stay on the CPU
    *summed_counts, images, labels = (int(count) for count in summed[len(means) :].tolist())
    own, whole = (
        [Mean(total, count) for total, count in zip(sums, summed_counts, strict=True)]
        for sums in (totals.unbind(), summed_totals.unbind())
    )
    width = len(TERMS)
    starts = range(0, len(means), width)
    return _Pooled(*([tuple(flat[start : start + width]) for start in starts] for flat in (own, whole)), images, labels)
