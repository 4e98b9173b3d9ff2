"""ExecuTorch programs (.pte) on the CPU, by the runtime of PyTorch's package `executorch`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.backends.base import cannot_load, cpu_only, require, thread_count, without_half
from models.backends.metadata import graph_of
from models.backends.tflite import read_texts
from models.backends.torchscript import TensorBackend
from utils.log import LOGGER

__all__ = ["ExecuTorchBackend", "load", "read_texts"]


class ExecuTorchBackend(TensorBackend):
    """The method `forward` of a program."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: ExecuTorch is missing or cannot read it, it is no YOLOv5 detector, or another device than the
                CPU.
        """
        cpu_only(device, "ExecuTorch")
        without_half(half, "ExecuTorch")
        texts = read_texts(path)
        runtime = require("executorch.runtime", "executorch", path).Runtime.get()
        self._device, self._dtype = torch.device("cpu"), torch.float32
        pool = require("executorch.extension.pybindings.portable_lib", "executorch", path)
        if pool._threadpool_get_thread_count() != thread_count():
            pool._unsafe_reset_threadpool(thread_count())  # safe here: nothing runs
        try:
            self._method = runtime.load_program(str(path)).load_method("forward")
            said = self._method.metadata
            shapes = said.input_tensor_meta(0).sizes(), said.output_tensor_meta(0).sizes()
        except (IndexError, RuntimeError) as error:
            raise cannot_load(path, "ExecuTorch", error) from error
        self.device = f"ExecuTorch CPU ({thread_count()} threads)"
        LOGGER.info(f"{path}: {self.device}")
        self.take_description(texts, graph_of(*map(list, shapes), path), path)

    def run(self, inputs: Tensor) -> Tensor:
        """Returns the rows of images (b, 3, h, w)."""
        outputs = self._method.execute([inputs.contiguous()])
        if self._raw is None:
            return outputs[0].clone()  # the program's own memory
        return torch.from_numpy(self.rows([output.numpy() for output in outputs]))


load = ExecuTorchBackend
