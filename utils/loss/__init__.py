"""The losses by name, and YOLOv5's names for their parts: `ComputeLoss`, `FocalLoss`, `smooth_BCE` ..."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.loss.anchor_based import ComputeLoss, smooth_BCE
from utils.loss.anchor_free import AnchorFreeLoss
from utils.loss.base import Loss

__all__ = [
    "LOSSES",
    "AnchorFreeLoss",
    "BCEBlurWithLogitsLoss",
    "ComputeLoss",
    "FocalLoss",
    "QFocalLoss",
    "smooth_BCE",
]

LOSSES: dict[str, type[Loss]] = {  # a head names its own: `models.heads.Head.loss`
    "anchor_based": ComputeLoss,
    "anchor_free": AnchorFreeLoss,
}


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


class FocalLoss(nn.Module):
    """Makes less of what is predicted well (Lin et al. 2017, arXiv:1708.02002)."""

    def __init__(self, loss_fcn: nn.BCEWithLogitsLoss, gamma: float = 1.5, alpha: float = 0.25) -> None:
        """Takes the cross entropy (its `reduction` becomes 'none'), the exponent, and the weight of positives."""
        super().__init__()
        self.loss_fcn, self.gamma, self.alpha = loss_fcn, gamma, alpha
        self.reduction, loss_fcn.reduction = loss_fcn.reduction, "none"

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        """Returns the loss of logits and targets of one shape: its mean (), sum () or elements."""
        balance = true * self.alpha + (1 - true) * (1 - self.alpha)
        loss = self.loss_fcn(pred, true) * balance * self.distance(pred.sigmoid(), true) ** self.gamma
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()

    def distance(self, probability: Tensor, true: Tensor) -> Tensor:
        """Returns how far probabilities are from their targets, 0 to 1."""
        return 1 - (true * probability + (1 - true) * (1 - probability))


class QFocalLoss(FocalLoss):
    """The focal loss for targets between 0 and 1 (Li et al. 2020, arXiv:2006.04388)."""

    def distance(self, probability: Tensor, true: Tensor) -> Tensor:
        """Returns how far probabilities are from their targets, 0 to 1."""
        return (true - probability).abs()
