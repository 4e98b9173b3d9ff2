"""YOLOv5's `utils.autoanchor`: the names that scripts import from there."""

from utils.compat.anchors import check_anchor_order, check_anchors, kmean_anchors

__all__ = [
    "check_anchor_order",
    "check_anchors",
    "kmean_anchors",
]
