"""YOLOv5's `utils.callbacks`: the names that scripts import from there."""

from utils.train.callbacks import Callbacks

__all__ = [
    "Callbacks",
]
