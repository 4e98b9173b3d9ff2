"""YOLOv5's `utils.activations`: the names that scripts import from there."""

from torch.nn import Hardswish, Mish, SiLU
from torch.nn import Mish as MemoryEfficientMish

__all__ = [
    "Hardswish",
    "MemoryEfficientMish",
    "Mish",
    "SiLU",
]
