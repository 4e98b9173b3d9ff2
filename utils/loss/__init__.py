"""YOLOv5's names for the loss: `ComputeLoss`, `FocalLoss`, `QFocalLoss`, `BCEBlurWithLogitsLoss`, `smooth_BCE`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import ROOT, read_yaml
from utils.loss.anchor_based import DetectionLoss, smooth_bce
from utils.loss.assigners import match_targets

__all__ = [
    "BCEBlurWithLogitsLoss",
    "ComputeLoss",
    "FocalLoss",
    "QFocalLoss",
    "smooth_BCE",
]

DEFAULT_HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"
LOSS_KEYS = ("box", "obj", "cls", "obj_pw", "cls_pw", "anchor_t", "fl_gamma")  # what a model's `hyp` must hold


def smooth_BCE(eps: float = 0.1) -> tuple[float, float]:
    """Returns the targets of the right and of the wrong classes for a label smoothing of `eps`."""
    return smooth_bce(eps)


class BCEBlurWithLogitsLoss(nn.Module):
    """Binary cross entropy that makes less of labels which may be missing: confident predictions without a target."""

    def __init__(self, alpha: float = 0.05) -> None:
        """Takes how fast the weight falls: 1 - exp((p - t - 1) / (alpha + 1e-4))."""
        super().__init__()
        self.loss_fcn = nn.BCEWithLogitsLoss(reduction="none")
        self.alpha = alpha

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        """Returns the mean () over logits and targets of one shape."""
        excess = pred.sigmoid() - true
        return (self.loss_fcn(pred, true) * (1 - torch.exp((excess - 1) / (self.alpha + 1e-4)))).mean()


class _Weighted(nn.Module):
    """Wraps a cross entropy whose elements are weighted before they are reduced as it says."""

    def __init__(self, loss_fcn: nn.BCEWithLogitsLoss, gamma: float = 1.5, alpha: float = 0.25) -> None:
        """Takes the cross entropy (its `reduction` becomes 'none'), the exponent, and the weight of positives."""
        super().__init__()
        self.loss_fcn, self.gamma, self.alpha = loss_fcn, gamma, alpha
        self.reduction, loss_fcn.reduction = loss_fcn.reduction, "none"

    def weighted(self, pred: Tensor, true: Tensor, distance: Tensor) -> Tensor:
        """Returns the loss: its mean (), sum () or elements.

        Args:
            pred: logits, any shape.
            true: targets of that shape, 0 to 1.
            distance: how far predictions are from their targets, 0 to 1, of that shape.
        """
        balance = true * self.alpha + (1 - true) * (1 - self.alpha)
        loss = self.loss_fcn(pred, true) * balance * distance**self.gamma
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()


class FocalLoss(_Weighted):
    """Makes less of what is predicted well (Lin et al. 2017, arXiv:1708.02002)."""

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        """Returns the loss of logits and targets of one shape."""
        probability = pred.sigmoid()
        return self.weighted(pred, true, 1 - (true * probability + (1 - true) * (1 - probability)))


class QFocalLoss(_Weighted):
    """The focal loss for targets between 0 and 1 (Li et al. 2020, arXiv:2006.04388)."""

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        """Returns the loss of logits and targets of one shape."""
        return self.weighted(pred, true, (true - pred.sigmoid()).abs())


class Built(NamedTuple):
    """What `ComputeLoss.build_targets` returns: for each of nl layers, n rows, one for each (label, anchor, cell)."""

    tcls: list[Tensor]  # (n,) int64
    tbox: list[Tensor]  # (n, 4) xywh in cells, the centre relative to the cell's corner
    indices: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # image, anchor, cell y, cell x: (n,) int64 each
    anchors: list[Tensor]  # (n, 2) in cells


class ComputeLoss:
    """The loss of a model whose attribute `hyp` holds the gains, already scaled to it.

    Attributes:
        hyp: the model's mapping.
        na, nc, nl: anchors a layer, classes, layers.
        anchors: (nl, na, 2) in cells.
    """

    def __init__(self, model: nn.Module, autobalance: bool = False) -> None:
        """Takes a `models.yolo.Model`, bare or wrapped for several GPUs.

        Raises:
            UserError: `model.hyp` is missing or lacks a gain.
        """
        model = getattr(model, "module", model)  # of DataParallel and its kind
        detect = model.model[-1]
        self.hyp: dict[str, Any] = getattr(model, "hyp", None) or {}
        missing = [key for key in LOSS_KEYS if key not in self.hyp]
        if missing:
            raise UserError(f"ComputeLoss: model.hyp lacks {', '.join(missing)}: set it before, as in data/hyps.")
        gains = {key: float(self.hyp[key]) for key in (*LOSS_KEYS, "label_smoothing") if key in self.hyp}
        hyp = SimpleNamespace(**read_yaml(DEFAULT_HYP) | {"label_smoothing": 0.0} | gains)
        self._loss = DetectionLoss(hyp, detect.anchors, detect.stride, detect.nc, autobalance)
        self.na, self.nc, self.nl, self.anchors = detect.na, detect.nc, detect.nl, self._loss.anchors

    @property
    def balance(self) -> list[float]:
        """Weights (nl) of the layers' objectness."""
        return self._loss.balance

    def __call__(self, p: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss (1,), times the batch size, and its items (3,): box, objectness, class, without gradient.

        Args:
            p: nl raw outputs (batch, na, ny, nx, 5 + nc).
            targets: (N, 6) [image index, class, x, y, w, h], boxes as fractions of the image.
        """
        result = self._loss(p, targets)
        return result.total.reshape(1), result.items

    def build_targets(self, p: Sequence[Tensor], targets: Tensor) -> Built:
        """Returns which cells and anchors learn which label; arguments as of a call."""
        grids = [(output.shape[2], output.shape[3]) for output in p]
        matches = match_targets(targets.float(), self.anchors, grids, self.hyp["anchor_t"])
        return Built(
            [match.cls for match in matches],
            [match.box_xywh for match in matches],
            [(match.image, match.anchor, match.cell_y, match.cell_x) for match in matches],
            [match.anchor_wh for match in matches],
        )
