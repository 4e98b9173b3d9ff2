"""YOLOv5's `utils.metrics`: the names that scripts import from there."""

from utils.boxes import bbox_ioa, box_iou
from utils.compat.boxes import bbox_iou, wh_iou
from utils.compat.metrics import ConfusionMatrix, ap_per_class, compute_ap, fitness

__all__ = [
    "ConfusionMatrix",
    "ap_per_class",
    "bbox_ioa",
    "bbox_iou",
    "box_iou",
    "compute_ap",
    "fitness",
    "wh_iou",
]
