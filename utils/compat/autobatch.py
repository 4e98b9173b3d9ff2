"""The largest training batch by YOLOv5 6.1's signatures, over `utils.train.autobatch`."""

from __future__ import annotations

from torch import nn

from utils.devices import resolve_amp
from utils.log import LOGGER
from utils.train.autobatch import FRACTION, choose_batch_size


def check_train_batch_size(model: nn.Module, imgsz: int = 640) -> int:
    """Returns the largest batch that trains on the model's GPU with automatic mixed precision; 16 on a CPU."""
    return autobatch(model, imgsz)


def autobatch(model: nn.Module, imgsz: int = 640, fraction: float = FRACTION, batch_size: int = 16) -> int:
    """Returns the largest batch that trains within `fraction` of the free memory of the model's GPU.

    Args:
        model: on its device.
        imgsz: image side, px.
        fraction: 0 to 1.
        batch_size: the answer on a CPU, which has no memory of its own to fill.

    Raises:
        UserError: not even one image fits.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        LOGGER.info(f"AutoBatch: needs a CUDA GPU; using {batch_size} images a batch on {device.type}")
        return batch_size
    return choose_batch_size(model, imgsz, device, resolve_amp("auto", device), fraction)
