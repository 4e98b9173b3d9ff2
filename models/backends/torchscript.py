"""TorchScript files on PyTorch; such a file is a program (see `models.backends.safety`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import ArrayBackend, cannot_load, without_half
from models.backends.metadata import PARSING_ERRORS, Graph, damaged, plain_texts
from models.backends.safety import check_torchscript
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.errors import UserError
from utils.log import LOGGER

DEFAULT_SHAPE = (1, 3, 640, 640)  # of files that do not say


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a file says of itself, once its code has been checked: YOLOv5's `config.txt`, our `metadata`."""
    return _described(path)[0]


class TensorBackend(ArrayBackend):
    """A runtime that takes and gives tensors of `dtype` on a device of torch's."""

    _device: torch.device
    _dtype: torch.dtype

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        inputs = torch.from_numpy(images).to(self._device, memory_format=torch.contiguous_format)
        return inputs.to(self._dtype).div_(255)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the outputs of several runs as one."""
        return torch.cat(tuple(parts))

    def filled(self, part: Tensor, missing: int) -> Tensor:
        """Returns inputs with `missing` empty images behind them."""
        return torch.cat((part, part.new_zeros((missing, *part.shape[1:]))))

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class TorchScriptBackend(TensorBackend):
    """A TorchScript module."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: not TorchScript, its code names what it has no business with, it is no YOLOv5 detector, or an
                unknown device.
        """
        self._device = select_device(device)
        prepare_cpu_memory(self._device)
        texts, shape = _described(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
                warnings.simplefilter("ignore", FutureWarning)
                self._module = torch.jit.load(str(path), map_location=self._device).eval()
        except (RuntimeError, ValueError) as error:
            raise cannot_load(path, "torch", error) from error
        self.device = device_line(self._device)
        LOGGER.info(f"{path}: TorchScript, {self.device}")
        tensors = (*self._module.parameters(), *self._module.buffers())
        self._dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        without_half(half and self._dtype != torch.float16, "TorchScript")
        batch, _, height, width = shape or (None,) * 4
        try:
            self.take_description(texts, Graph(batch, height, width, None, None), path)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--weights {path}: does not run on images {shape or ''} ({reason}).") from error

    def run(self, inputs: Tensor) -> Tensor:
        """Returns the first output for images (b, 3, h, w)."""
        with torch.inference_mode():
            output = self._module(inputs)
        return (output if isinstance(output, Tensor) else output[0]).float()

    def warm_up(self, height: int, width: int) -> None:
        """Runs twice on CUDA, where torch watches the first run and compiles in the second."""
        for _ in range(2 * (self._device.type == "cuda")):
            self.predict(np.zeros((1, 3, height, width), np.uint8))


def _described(path: Path) -> tuple[dict[str, str], list[int] | None]:
    """Returns a checked file's texts, and the shape (b, 3, h, w) that it was traced with; None if any will do."""
    records = check_torchscript(path)
    there = set(records.get_all_records())
    try:
        config, said = (
            records.get_record(f"extra/{name}").decode() if f"extra/{name}" in there else ""
            for name in ("config.txt", "metadata")
        )
        parsed: Any = json.loads(config or "{}")
        shape = [int(length) for length in parsed.get("shape", DEFAULT_SHAPE)]
        dynamic = bool(json.loads(said or "{}").get("dynamic"))
        texts = plain_texts(parsed) | ({"metadata": said} if said else {})
    except PARSING_ERRORS as error:
        raise damaged(path, error) from error
    if len(shape) != len(DEFAULT_SHAPE):
        raise UserError(f"{path}: was traced with {shape}, not with images (b, 3, h, w).")
    return texts, None if dynamic else shape


load = TorchScriptBackend
