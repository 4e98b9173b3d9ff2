"""Checkpoints (`.pt`) on PyTorch: batch norm folded, channels last, float32 or on CUDA float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.base import Backend, LayerHook
from models.load import load_model
from utils.checks import grid_stride
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.log import LOGGER


class PyTorchBackend(Backend):
    """A checkpoint, loaded and folded."""

    dynamic = True

    def __init__(self, model: nn.Module, device: torch.device, half: bool = False) -> None:
        """Takes a model in evaluation mode to `device` in the memory format and precision of inference.

        Args:
            model: `models.yolo.Model`, batch norm folded.
            device: where to run.
            half: compute in float16; CUDA only.
        """
        self.names = dict(model.names)
        self.stride = grid_stride(model.stride)
        self._device = device
        self._dtype = torch.float16 if half else torch.float32
        self._model = model.to(device=device, dtype=self._dtype, memory_format=torch.channels_last).eval()

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        inputs = torch.from_numpy(images).to(self._device)
        return inputs.to(self._dtype, memory_format=torch.channels_last).div_(255)

    def infer(self, inputs: Tensor, visualize: LayerHook | None = None) -> Tensor:
        """Returns decoded rows (b, n, 5 + nc), float32."""

        def show(layer: nn.Module, output: Tensor) -> None:
            visualize(layer.i, layer.type.rpartition(".")[2], output.detach().float().cpu().numpy())

        with torch.inference_mode():
            rows, _ = self._model(inputs, visualize=show if visualize else None)
        return rows

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._device.type == "cuda":
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def load(weights: str | Path, device: str = "", half: bool = False) -> PyTorchBackend:
    """Loads a checkpoint of ours or an original YOLOv5 one.

    Raises:
        UserError: no checkpoint, or an unknown device.
    """
    chosen = select_device(device)
    prepare_cpu_memory(chosen)
    LOGGER.info(device_line(chosen))
    if half and chosen.type != "cuda":
        LOGGER.warning(f"WARNING: --half needs a CUDA device; computing in float32 on {chosen.type}.")
        half = False
    return PyTorchBackend(load_model(weights, chosen, fuse=True), chosen, half)
