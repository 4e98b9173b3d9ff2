"""Tools for torch modules and devices by YOLOv5 6.1's signatures, over `utils.devices` and `utils.train`."""

from __future__ import annotations

import copy
import datetime
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as pruning
from torch.nn.utils.fusion import fuse_conv_bn_weights

from utils import devices
from utils.files import ROOT
from utils.log import LOGGER
from utils.train import ema
from utils.train import ema as stopper

PAD_VALUE = 0.447  # about the mean of photographs
BN_EPS, BN_MOMENTUM = 1e-3, 0.03
INPLACE = (nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.SiLU)


def date_modified(path: str | Path = ROOT / "train.py") -> str:
    """Returns the day of a file's last change, such as `2022-2-22`."""
    day = datetime.datetime.fromtimestamp(Path(path).stat().st_mtime)
    return f"{day.year}-{day.month}-{day.day}"


def git_describe(path: str | Path = ROOT) -> str:
    """Returns what git calls a repository's commit, such as `v6.1-3-gabc1234`; empty outside a repository."""
    command = ["git", "-C", str(path), "describe", "--tags", "--long", "--always"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        LOGGER.debug(f"{path}: {error}")
        return ""


def device_count() -> int:
    """Returns how many CUDA devices there are."""
    return torch.cuda.device_count()


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


def sparsity(model: nn.Module) -> float:
    """Returns the share of parameters that are zero."""
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    return zeros / sum(parameter.numel() for parameter in model.parameters())


def prune(model: nn.Module, amount: float = 0.3) -> None:
    """Sets the share `amount` of each convolution's weights, the smallest, to zero for good."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            pruning.l1_unstructured(module, name="weight", amount=amount)
            pruning.remove(module, "weight")
    LOGGER.info(f"Pruned: {sparsity(model):.3g} of all parameters are zero")


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


def scale_img(img: Tensor, ratio: float = 1.0, same_shape: bool = False, gs: int = 32) -> Tensor:
    """Resizes images (b, 3, h, w) by `ratio` and pads them on the right and below.

    Args:
        img: values 0 to 1.
        ratio: of the sides.
        same_shape: pad to the sides that the images had (crop, where they grew).
        gs: else to multiples of this.
    """
    if ratio == 1.0:
        return img
    height, width = img.shape[2:]
    resized = F.interpolate(img, (int(height * ratio), int(width * ratio)), mode="bilinear", align_corners=False)
    if not same_shape:
        height, width = (math.ceil(side * ratio / gs) * gs for side in (height, width))
    return F.pad(resized, (0, width - resized.shape[3], 0, height - resized.shape[2]), value=PAD_VALUE)


def copy_attr(a: Any, b: Any, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
    """Copies the attributes of `b` to `a`: those of `include`, or all, less `exclude` and those that begin with _."""
    for name, value in vars(b).items():
        if not name.startswith("_") and name not in exclude and (name in include or not include):
            setattr(a, name, value)


class EarlyStopping(stopper.EarlyStopping):
    """Early stopping with 6.1's patience; call it with `epoch=` and `fitness=`."""

    def __init__(self, patience: int = 30) -> None:
        """Starts with no epoch seen; a patience of 0 never stops."""
        super().__init__(patience)


class ModelEMA(ema.ModelEMA):
    """The moving average of a model's weights, in `ema`; models may be wrapped for several GPUs."""

    def __init__(self, model: nn.Module, decay: float = 0.9999, updates: int = 0) -> None:
        """Copies the model; `updates` is how often the copy was updated before."""
        super().__init__(de_parallel(model), decay, updates=updates)

    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model; call it after every optimizer step."""
        super().update(de_parallel(model))

    def update_attr(
        self, model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ("process_group", "reducer")
    ) -> None:
        """Copies the model's attributes to the average; see `copy_attr`."""
        copy_attr(self.ema, de_parallel(model), include, exclude)
