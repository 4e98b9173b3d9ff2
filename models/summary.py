"""What a model costs: its summary, its table of layers, GFLOPs, and the time each layer takes.

All take a `models.yolo.Model`; nothing here changes it.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from models.config import gather
from utils.log import LOGGER


def log_layers(model: nn.Module) -> None:
    """Logs the table of layers: row, from, repeats, parameters, class, arguments."""
    LOGGER.info(f"\n{'':>3}{'from':>18}{'n':>3}{'params':>10}  {'module':<40}{'arguments':<30}")
    for layer in model.model:
        numbers = f"{layer.i:>3}{str(layer.f):>18}{layer.repeats:>3}{layer.np:>10}"
        LOGGER.info(f"{numbers}  {layer.type:<40}{str(layer.arguments):<30}")


def summary_line(model: nn.Module, imgsz: int = 640, gflops: bool = True) -> str:
    """Returns modules, parameters and trained ones, and with `gflops` the GFLOPs for an image of side `imgsz`."""
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    counted = count_gflops(model, imgsz) if gflops else None
    cost = "" if counted is None else f", {counted:.1f} GFLOPs"
    layers = sum(1 for _ in model.modules())
    return f"Model Summary: {layers} layers, {total} parameters, {trained} gradients{cost}"


def count_gflops(model: nn.Module, imgsz: int = 640) -> float | None:
    """Returns 2e-9 times the multiply-adds for one image of side `imgsz`, None where thop does not import.

    Counted on a small image and scaled by area. Its side is the largest stride, but at least 32: a model without a
    level for large objects still divides by 32 on the way.
    """
    try:
        from thop import profile
    except ImportError:  # thop is optional, and needs distutils, which Python 3.12 leaves to setuptools
        return None
    side = max(int(model.stride.max()), 32)
    weight = next(model.parameters())
    image = torch.zeros(1, model.yaml["ch"], side, side, device=weight.device, dtype=weight.dtype)
    operations, _ = profile(copy.deepcopy(model).eval(), inputs=(image,), verbose=False)
    return operations * 2e-9 * (imgsz / side) ** 2


def profile_layers(model: nn.Module, image: Tensor, repeats: int = 10) -> None:
    """Logs each layer's mean time on `image` (b, ch, h, w) and its parameters, and the sum."""
    milliseconds = [0.0] * len(model.model)
    outputs: list[Any] = []

    def synchronised_time() -> float:
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        return time.perf_counter()

    x = image
    for layer in model.model:
        x = x if layer.f == -1 else gather(layer.f, x, outputs)
        layer(x)  # warm-up
        start = synchronised_time()
        for _ in range(repeats):
            y = layer(x)
        milliseconds[layer.i] = (synchronised_time() - start) / repeats * 1e3
        x = y
        outputs.append(x)
    LOGGER.info(f"{'time (ms)':>10}{'params':>10}  module")
    for layer, spent in zip(model.model, milliseconds, strict=True):
        LOGGER.info(f"{spent:10.2f}{layer.np:10.0f}  {layer.type}")
    LOGGER.info(f"{sum(milliseconds):10.2f}{'':>10}  total")
