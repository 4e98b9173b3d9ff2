"""Checkpoints (`.pt`) on PyTorch, rewritten for inference (`models.deploy`), channels last."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.base import Backend, LayerHook
from models.backends.metadata import Metadata
from models.deploy import rewrite
from models.load import Weights, model_from, read_weights
from utils.checks import grid_stride
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.log import LOGGER

DEFAULT_PX = 640  # image size of checkpoints that do not say what they were trained at
PRECISIONS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class PyTorchBackend(Backend):
    """A trained model."""

    dynamic = True

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        metadata: Metadata | None = None,
    ) -> None:
        """Rewrites a model for inference and takes it to `device`.

        Args:
            model: `models.yolo.Model`, batch norm folded or not; it stays as it is.
            device: where to run.
            dtype: what the convolutions compute in; boxes are decoded in float32.
            metadata: what the checkpoint says of itself; None for what the model knows.
        """
        self.metadata = metadata or describe_model(model, dtype=dtype)
        self.device = device_line(device)
        self._trained, self._device, self._dtype = model, device, dtype
        self._model = rewrite(copy.deepcopy(model).cpu().float()).to(device, memory_format=torch.channels_last)
        self._model.trunk.to(dtype)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        inputs = torch.from_numpy(images).to(self._device)
        return inputs.to(self._dtype, memory_format=torch.channels_last).div_(255)

    def infer(self, inputs: Tensor, visualize: LayerHook | None = None) -> Tensor:
        """Returns decoded rows (b, n, 5 + nc), float32.

        With `visualize` the trained model runs, whose layers have their channels in their own order.
        """
        with torch.inference_mode():
            if visualize is None:
                return self._model(inputs)

            def show(layer: nn.Module, output: Tensor) -> None:
                visualize(layer.i, layer.type.rpartition(".")[2], output.detach().float().cpu().numpy())

            return self._shown_model(inputs, visualize=show)[0]

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._device.type == "cuda":
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @cached_property
    def _shown_model(self) -> nn.Module:
        """The trained model where and as the other one runs, made when it is first asked for."""
        model = copy.deepcopy(self._trained).to(self._device, self._dtype, memory_format=torch.channels_last)
        return model.fuse().eval()


def load(weights: str | Path, device: str = "", half: bool = False) -> PyTorchBackend:
    """Loads a checkpoint of ours or an original YOLOv5 one.

    Raises:
        UserError: no checkpoint, or an unknown device.
    """
    chosen = select_device(device)
    prepare_cpu_memory(chosen)
    LOGGER.info(device_line(chosen))
    dtype = torch.float32
    if half and chosen.type == "cuda":
        dtype = torch.float16
    elif half:
        LOGGER.warning(f"WARNING: --half needs a CUDA device; computing in float32 on {chosen.type}.")
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
        content = read_weights(weights)
        model = model_from(content).requires_grad_(False)
    LOGGER.info("Fusing layers... ")
    model.fuse()
    LOGGER.info(model.info(gflops=False))
    return PyTorchBackend(model, chosen, dtype, describe_model(model, content, dtype))


def describe_model(model: nn.Module, weights: Weights | None = None, dtype: torch.dtype = torch.float32) -> Metadata:
    """Returns what a model, and the weights file that it was read from, say of it."""
    meta = weights.meta if weights else {}
    options = meta.get("opt") if isinstance(meta.get("opt"), dict) else {}
    return Metadata(
        names=dict(model.names),
        stride=grid_stride(model.stride),
        shape_hw=_sides(options.get("imgsz", options.get("img_size"))),
        dynamic=True,
        precision=PRECISIONS[dtype],
        date=str(meta.get("date") or ""),
        data=str(meta.get("data") or ""),
    )


def _sides(imgsz: Any) -> tuple[int, int]:
    """Returns height and width that a model was trained at, as its options say: a side, or a list of them."""
    side = imgsz[0] if isinstance(imgsz, (list, tuple)) and imgsz else imgsz
    return (side, side) if isinstance(side, int) and side > 0 else (DEFAULT_PX, DEFAULT_PX)
