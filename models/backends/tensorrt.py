"""TensorRT engines on NVIDIA GPUs; PyTorch holds the memory, so tensors go in and come out.

An engine fits the GPU and the TensorRT version that it was built with. TensorRT does not run code of the host that an
engine may bring, unless told to, and it is not told to here; still, engines of strangers are better built anew from
ONNX. Needs TensorRT 10 or newer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import require, without_half
from models.backends.metadata import graph_of
from models.backends.torchscript import TensorBackend
from utils.devices import device_line, select_device
from utils.errors import UserError
from utils.log import LOGGER

LEAST_VERSION = 10  # the first with tensors by name alone


class TensorRtBackend(TensorBackend):
    """An engine with its execution context."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads an engine.

        Raises:
            UserError: no CUDA GPU, TensorRT is missing, too old, or does not take the engine, or it is no YOLOv5
                detector.
        """
        self._device = select_device(device)
        if self._device.type != "cuda":
            raise UserError(f"--weights {path}: TensorRT engines run on a CUDA GPU only, this is {self._device.type}.")
        trt = require("tensorrt", "tensorrt", path)
        if int(trt.__version__.split(".")[0]) < LEAST_VERSION:
            raise UserError(f"{path}: TensorRT {LEAST_VERSION} or newer is needed, this is {trt.__version__}.")
        without_half(half, "TensorRT")
        torch.cuda.set_device(self._device)
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise UserError(
                f"--weights {path}: TensorRT {trt.__version__} does not take this engine, which fits one version and "
                "one kind of GPU: build it on this machine (export.py --include engine --device 0)."
            )
        self.device = f"TensorRT {trt.__version__}, {device_line(self._device)}"
        LOGGER.info(f"{path}: {self.device}")
        self._engine, self._context = engine, engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or not self._outputs:
            raise UserError(f"{path}: one input is expected, and an output; it has {inputs} and {self._outputs}.")
        self._input = inputs[0]
        self._dtypes = {name: _dtype(trt, engine.get_tensor_dtype(name), path) for name in names}
        self._dtype = self._dtypes[self._input]
        graph = graph_of(*(list(engine.get_tensor_shape(name)) for name in (self._input, self._outputs[0])), path)
        least, _, most = engine.get_tensor_profile_shape(self._input, 0)
        if graph.columns is None:
            output = self.run(torch.zeros(tuple(least), dtype=self._dtype, device=self._device))
            graph = graph._replace(columns=output.shape[2] if output.dim() == 3 else 0)
        self.take_description({"metadata": engine.name} if engine.name.startswith("{") else {}, graph, path)
        self.most = graph.batch or int(most[0])

    def run(self, inputs: Tensor) -> Tensor:
        """Returns the first output for images (b, 3, h, w).

        Raises:
            UserError: more or larger images than the engine was built for.
        """
        inputs = inputs.contiguous()
        if not self._context.set_input_shape(self._input, tuple(inputs.shape)):
            least, _, most = self._engine.get_tensor_profile_shape(self._input, 0)
            raise UserError(
                f"this engine takes images from {tuple(least)} to {tuple(most)}, not {tuple(inputs.shape)}."
            )
        self._context.set_tensor_address(self._input, inputs.data_ptr())
        outputs = {}
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self._dtypes[name], device=self._device)
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        stream = torch.cuda.current_stream(self._device)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise UserError("TensorRT could not run the engine: build it anew on this machine (export.py).")
        return outputs[self._outputs[0]].float()

    def warm_up(self, height: int, width: int) -> None:
        """Runs once: the first run loads kernels."""
        self.predict(np.zeros((1, 3, height, width), np.uint8))


def _dtype(trt: Any, kind: Any, path: Path) -> torch.dtype:
    known = {trt.float32: torch.float32, trt.float16: torch.float16}
    if kind not in known:
        raise UserError(f"{path}: has tensors of type {kind}; float32 or float16 is expected.")
    return known[kind]


load = TensorRtBackend
