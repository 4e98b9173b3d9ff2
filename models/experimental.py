"""What scripts written for YOLOv5 import from here, and saved models name; nothing in this repository imports it."""

from models.common import CrossConv, MixConv2d, Sum
from models.inference.multibackend import Ensemble, attempt_load

__all__ = ["CrossConv", "Ensemble", "MixConv2d", "Sum", "attempt_load"]
