"""YOLOv5's `utils.autobatch`: the names that scripts import from there."""

from utils.compat.autobatch import autobatch, check_train_batch_size

__all__ = [
    "autobatch",
    "check_train_batch_size",
]
