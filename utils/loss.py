"""YOLOv5's `utils.loss`: the names that scripts import from there."""

from utils.compat.losses import BCEBlurWithLogitsLoss, ComputeLoss, FocalLoss, QFocalLoss, smooth_BCE

__all__ = [
    "BCEBlurWithLogitsLoss",
    "ComputeLoss",
    "FocalLoss",
    "QFocalLoss",
    "smooth_BCE",
]
