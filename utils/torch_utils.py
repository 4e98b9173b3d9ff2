"""YOLOv5's names that scripts import from `utils.torch_utils`; nothing here is used by this program itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from utils import devices
from utils.dataloaders.loader import torch_distributed_zero_first
from utils.log import LOGGER
from utils.train import ema
from utils.train.ema import EarlyStopping

__all__ = [
    "EarlyStopping",
    "ModelEMA",
    "copy_attr",
    "de_parallel",
    "fuse_conv_and_bn",
    "initialize_weights",
    "is_parallel",
    "model_info",
    "select_device",
    "smart_inference_mode",
    "time_sync",
    "torch_distributed_zero_first",
]

BN_EPS, BN_MOMENTUM = 1e-3, 0.03
INPLACE = (nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.SiLU)


def select_device(device: str | torch.device = "", batch_size: int = 0, newline: bool = True) -> torch.device:
    """Returns the device that `device` names and logs a line about it, an empty one behind it with `newline`.

    Raises:
        UserError: see `utils.devices.select_device`.
    """
    chosen = devices.select_device(str(device), batch_size or 0)
    LOGGER.info(devices.device_line(chosen) + ("\n" if newline else ""))
    return chosen


def time_sync() -> float:
    """Returns the time in seconds, once a GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def smart_inference_mode() -> Any:
    """Returns a decorator that switches gradients off (7.0's name)."""
    return torch.inference_mode()


def is_parallel(model: nn.Module) -> bool:
    """Tells whether a model is wrapped for several GPUs."""
    return isinstance(model, (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel))


def de_parallel(model: nn.Module) -> nn.Module:
    """Returns the model inside a wrapper for several GPUs, or the model itself."""
    return model.module if is_parallel(model) else model


def initialize_weights(model: nn.Module) -> None:
    """Gives batch norms YOLOv5's constants and lets activations work in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = BN_EPS, BN_MOMENTUM
        elif isinstance(module, INPLACE):
            module.inplace = True


def fuse_conv_and_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Returns a convolution, without gradient, that does what `conv` and then `bn` do in evaluation."""
    fused = copy.deepcopy(conv)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return fused.requires_grad_(False)


def model_info(model: nn.Module, verbose: bool = False, img_size: int = 640) -> None:
    """Logs the summary line of a `models.yolo.Model`, GFLOPs at `img_size`; `verbose` lists its parameters before."""
    for name, parameter in model.named_parameters() if verbose else ():
        LOGGER.info(f"{name:>40} {list(parameter.shape)!s:>20} {parameter.numel():>10} {parameter.requires_grad!s:>6}")
    LOGGER.info(model.info(img_size))


def copy_attr(a: Any, b: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
    """Copies the attributes of `b` to `a`: those of `include`, or all, less `exclude` and those that begin with _."""
    for name, value in vars(b).items():
        if not name.startswith("_") and name not in exclude and (name in include or not include):
            setattr(a, name, value)


class ModelEMA(ema.ModelEMA):
    """The moving average of a model's weights, in `ema`; models may be wrapped for several GPUs."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, updates: int = 0) -> None:
        """Copies the model; `updates` is how often the copy was updated before."""
        super().__init__(de_parallel(model), decay, updates=updates)

    def update_attr(
        self, model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ("process_group", "reducer")
    ) -> None:
        """Copies the model's attributes to the average; see `copy_attr`."""
        copy_attr(self.ema, de_parallel(model), include, exclude)
