"""YOLOv5's `utils.activations`: the names that scripts import from there."""

from functools import partial

from torch.nn import Hardswish, Mish, SiLU
from torch.nn import Mish as MemoryEfficientMish

from utils.compat.lookup import look_up

__all__ = [
    "Hardswish",
    "MemoryEfficientMish",
    "Mish",
    "SiLU",
]

__getattr__ = partial(look_up, __name__)
