"""Runtimes that a model may run on, one file each; `load_backend` chooses by the weights' suffix.

A runtime's libraries are imported only when a file of its kind is loaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from models.backends.base import Backend
from utils.checks import UserError

__all__ = ["BACKENDS", "Backend", "load_backend"]

# suffix -> module of this package with a `load(weights, device, half)`
BACKENDS = {".pt": "pytorch"}


def load_backend(weights: str | Path, device: str = "", half: bool = False) -> Backend:
    """Loads a model for inference on the runtime that its suffix names; logs the device.

    Args:
        weights: a checkpoint or an exported model.
        device: as `--device`; empty chooses.
        half: compute in float16 where the device can; elsewhere float32, and says so.

    Raises:
        UserError: an unknown suffix, or a file that cannot be loaded.
    """
    suffix = Path(weights).suffix.lower()
    if suffix not in BACKENDS:
        known = ", ".join(sorted(BACKENDS))
        raise UserError(f"--weights '{weights}': no runtime for files ending in '{suffix}'. Known: {known}.")
    return importlib.import_module(f"models.backends.{BACKENDS[suffix]}").load(weights, device, half)
