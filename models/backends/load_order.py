"""Libraries that crash the process when they are loaded in the wrong order."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

COMPILER = "triton"


def before_tensorflow() -> None:
    """Loads triton's compiler, where PyTorch has brought it along, so that TensorFlow finds it in place.

    Both carry LLVM. With TensorFlow loaded first, triton ends the process with a segmentation fault; and PyTorch loads
    triton by itself, late, for its exporter or torchvision. Where PyTorch is not in use, nothing is loaded.
    """
    if "torch" in sys.modules and "tensorflow" not in sys.modules and find_spec(COMPILER) is not None:
        importlib.import_module(COMPILER)
