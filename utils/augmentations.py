"""YOLOv5's `utils.augmentations`: the names that scripts import from there."""

from functools import partial

from utils.compat.augment import augment_hsv, hist_equalize, letterbox, mixup, random_perspective
from utils.compat.lookup import look_up

__all__ = [
    "augment_hsv",
    "hist_equalize",
    "letterbox",
    "mixup",
    "random_perspective",
]

__getattr__ = partial(look_up, __name__)
