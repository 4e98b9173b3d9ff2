"""Augmentations, by the names and arguments that YOLOv5 gives them; training itself calls these.

Images are uint8 (h, w, 3), labels float32 (n, 5) [class, x1, y1, x2, y2 in px]. What is random comes from the generator
handed in, or from a new one that nothing seeds.
"""

from utils.augmentations.pixels import augment_hsv, hist_equalize, mixup
from utils.augmentations.warp import random_perspective
from utils.images import letterbox

__all__ = ["augment_hsv", "hist_equalize", "letterbox", "mixup", "random_perspective"]
