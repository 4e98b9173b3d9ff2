"""ONNX files on ONNX Runtime: CPU, or CUDA where its build has it.

Computes in the file's own precision. Files of other people's need one image input and YOLOv5's rows as first output.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.backends.base import ArrayBackend, cannot_load, require, thread_count, without_half
from models.backends.metadata import graph_of
from models.backends.safety import read_onnx
from utils.errors import UserError
from utils.log import LOGGER

INPUT_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
FATAL = 4  # lowest severity that is printed: errors are raised as well, and are then told once
# Threads that wait awake make bare inference 8 % faster and detection slower: they keep the cores from reading,
# drawing and writing, and where other programs run as well from the inference itself (measured: twice the time).
WAIT_ASLEEP = "0"


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a file says of itself, once it has been found that its tensors lie beside it."""
    return read_onnx(path).texts


class OnnxRuntimeBackend(ArrayBackend):
    """An ONNX file in a session."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: ONNX Runtime is missing or cannot read it, it takes tensors from outside its folder, it is no
                YOLOv5 detector, or an unknown device.
        """
        texts = read_texts(path)
        runtime = require("onnxruntime", "onnxruntime", path)
        options = runtime.SessionOptions()
        options.log_severity_level = FATAL
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = thread_count()
        options.add_session_config_entry("session.intra_op.allow_spinning", WAIT_ASLEEP)
        # as it was read, whatever its name ends in
        options.add_session_config_entry("session.load_model_format", "ONNX")
        providers = _providers(runtime, device)
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its errors have no class in common
            raise cannot_load(path, "ONNX Runtime", error) from error
        used = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        self._cuda = used == "CUDA"
        self.device = f"ONNX Runtime {runtime.__version__} {used}" + f" ({thread_count()} threads)" * (used == "CPU")
        LOGGER.info(f"{path}: {self.device}")
        images, output = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._input = images.name
        if images.type not in INPUT_DTYPES or len(images.shape) != 4:
            raise UserError(f"{path}: its input is {images.type} {images.shape}, not float images (b, 3, h, w).")
        self.input_dtype = INPUT_DTYPES[images.type]
        without_half(half and self.input_dtype != np.float16, "ONNX Runtime")
        self._outputs = [output.name]
        self.take_description(texts, graph_of(images.shape, output.shape, path), path)
        if self._raw is not None:
            self._outputs = None  # all of them

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the rows or detections of images (b, 3, h, w)."""
        return self.rows(self._session.run(self._outputs, {self._input: np.ascontiguousarray(inputs)}))

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._cuda:
            self.predict(np.zeros((1, 3, height, width), np.uint8))


def _providers(runtime: ModuleType, device: str) -> list[Any]:
    """Returns what is to run the graph, in order of preference."""
    name = device.strip().lower().removeprefix("cuda:")
    cuda = "CUDAExecutionProvider" in runtime.get_available_providers()
    if name == "cpu" or (not name and not cuda):
        return ["CPUExecutionProvider"]
    if not cuda or not (name or "0").isdecimal():
        have = "cpu or a GPU's number" if cuda else "cpu (a GPU needs onnxruntime-gpu)"
        raise UserError(f"--device {device}: ONNX Runtime has {have} here.")
    return [("CUDAExecutionProvider", {"device_id": int(name or 0)}), "CPUExecutionProvider"]


load = OnnxRuntimeBackend
