"""TensorRT engines on NVIDIA GPUs; PyTorch holds the memory, so tensors go in and come out.

An engine fits the GPU and the TensorRT version that it was built with. TensorRT does not run code of the host that an
engine may bring, unless told to, and it is not told to here; still, engines of strangers are better built anew from
ONNX. Needs TensorRT 10 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import ArrayBackend, describe, find_export, graph_of, require, without_half
from utils.devices import device_line, select_device
from utils.errors import UserError
from utils.log import LOGGER

LEAST_VERSION = 10  # the first with tensors by name alone


class TensorRtBackend(ArrayBackend):
    """An engine with its execution context."""

    def __init__(self, trt: Any, engine: Any, device: torch.device, where: Path) -> None:
        """Takes a deserialised engine.

        Args:
            trt: the library.
            engine: `tensorrt.ICudaEngine`.
            device: the GPU that it is on.
            where: the file, for messages.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._engine, self._context, self._device = engine, engine.create_execution_context(), device
        self.device = f"TensorRT {trt.__version__}, {device_line(device)}"
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or not self._outputs:
            raise UserError(f"{where}: one input is expected, and an output; it has {inputs} and {self._outputs}.")
        self._input = inputs[0]
        self._dtypes = {name: _dtype(trt, engine.get_tensor_dtype(name), where) for name in names}
        shapes = [list(engine.get_tensor_shape(name)) for name in (self._input, self._outputs[0])]
        if len(shapes[0]) != 4:
            raise UserError(f"{where}: its input has the shape {shapes[0]}, not that of images (b, 3, h, w).")
        graph = graph_of(*shapes)
        if graph.columns is None:
            shape = [int(length) for length in engine.get_tensor_profile_shape(self._input, 0)[0]]  # the least
            output = self.run(torch.zeros(shape, dtype=self._dtypes[self._input], device=device))
            graph = graph._replace(columns=output.shape[2] if output.dim() == 3 else None)
        self.metadata = describe({"metadata": engine.name} if engine.name.startswith("{") else {}, graph, where)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch
        self.most = graph.batch or int(engine.get_tensor_profile_shape(self._input, 0)[2][0])

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the GPU."""
        inputs = torch.from_numpy(images).to(self._device, memory_format=torch.contiguous_format)
        return inputs.to(self._dtypes[self._input]).div_(255)

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

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the outputs of several runs as one."""
        return torch.cat(tuple(parts))

    def filled(self, part: Tensor, missing: int) -> Tensor:
        """Returns inputs with `missing` empty images behind them."""
        return torch.cat((part, part.new_zeros((missing, *part.shape[1:]))))

    def warm_up(self, height: int, width: int) -> None:
        """Runs once: the first run loads kernels."""
        self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for CUDA's queue."""
        torch.cuda.synchronize(self._device)


def load(weights: str | Path, device: str = "", half: bool = False) -> TensorRtBackend:
    """Loads a TensorRT engine.

    Raises:
        UserError: no such file, no CUDA GPU, TensorRT is missing, too old, or does not take the engine.
    """
    path = find_export(weights)
    chosen = select_device(device)
    if chosen.type != "cuda":
        raise UserError(f"--weights {path}: TensorRT engines run on a CUDA GPU only, this is {chosen.type}.")
    trt = require("tensorrt", "tensorrt", path)
    if int(trt.__version__.split(".")[0]) < LEAST_VERSION:
        raise UserError(f"{path}: TensorRT {LEAST_VERSION} or newer is needed, this is {trt.__version__}.")
    without_half(half, "TensorRT")
    torch.cuda.set_device(chosen)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise UserError(
            f"--weights {path}: TensorRT {trt.__version__} does not take this engine, which fits one version and one "
            "kind of GPU: build it on this machine (export.py --include engine --device 0)."
        )
    backend = TensorRtBackend(trt, engine, chosen, path)
    LOGGER.info(f"{path}: {backend.device}")
    return backend


def _dtype(trt: Any, kind: Any, where: Path) -> torch.dtype:
    """Returns torch's type for TensorRT's.

    Raises:
        UserError: neither float32 nor float16.
    """
    known = {trt.float32: torch.float32, trt.float16: torch.float16}
    if kind not in known:
        raise UserError(f"{where}: has tensors of type {kind}; float32 or float16 is expected.")
    return known[kind]
