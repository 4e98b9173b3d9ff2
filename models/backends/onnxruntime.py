"""ONNX files on ONNX Runtime: CPU, or CUDA where its build has it.

Computes in the file's own precision. Files of other people's need one image input and YOLOv5's rows as first output.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.backends.base import (
    ArrayBackend,
    Graph,
    describe,
    find_export,
    graph_of,
    require,
    thread_count,
    without_half,
)
from models.backends.safety import read_onnx
from utils.errors import UserError
from utils.log import LOGGER

INPUT_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
FATAL = 4  # lowest severity that is printed: errors are raised as well, and are then told once
# Threads that wait awake make bare inference 8 % faster and detection slower: they keep the cores from reading,
# drawing and writing, and where other programs run as well from the inference itself (measured: twice the time).
WAIT_ASLEEP = "0"
PROBE_PX = 64  # side of the image that shows the output's columns where the graph leaves them open


class OnnxRuntimeBackend(ArrayBackend):
    """A session."""

    def __init__(self, session: Any, where: Path, device: str) -> None:
        """Takes an `onnxruntime.InferenceSession`.

        Args:
            session: it.
            where: the file, for messages.
            device: where it runs, in words.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._session, self.device = session, device
        images = session.get_inputs()[0]
        self._input, self._output = images.name, session.get_outputs()[0].name
        if images.type not in INPUT_DTYPES or len(images.shape) != 4:
            raise UserError(f"{where}: its input is {images.type} {images.shape}, not float images (b, 3, h, w).")
        self.input_dtype = INPUT_DTYPES[images.type]
        graph = graph_of(images.shape, session.get_outputs()[0].shape)
        if graph.columns is None:
            graph = graph._replace(columns=self._probe(graph))
        self.metadata = describe(session.get_modelmeta().custom_metadata_map, graph, where)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, 3, h, w)."""
        output = self._session.run([self._output], {self._input: np.ascontiguousarray(inputs)})[0]
        return output if output.dtype == np.float32 else output.astype(np.float32)

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._session.get_providers()[0].startswith("CUDA"):
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def _probe(self, graph: Graph) -> int | None:
        """Returns the last length of the output for an empty image; None where it is not (b, n, columns)."""
        shape = (graph.batch or 1, 3, graph.height or PROBE_PX, graph.width or PROBE_PX)
        output = self.run(np.zeros(shape, self.input_dtype))
        return output.shape[2] if output.ndim == 3 else None


def load(weights: str | Path, device: str = "", half: bool = False) -> OnnxRuntimeBackend:
    """Loads an ONNX file.

    Raises:
        UserError: no such file, ONNX Runtime is missing or cannot read it, it takes tensors from outside its folder, or
            an unknown device.
    """
    path = find_export(weights)
    read_onnx(path)  # refuses tensors from elsewhere
    runtime = require("onnxruntime", "onnxruntime", path)
    providers = _providers(runtime, device)
    options = runtime.SessionOptions()
    options.log_severity_level = FATAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = thread_count()
    options.add_session_config_entry("session.intra_op.allow_spinning", WAIT_ASLEEP)
    options.add_session_config_entry("session.load_model_format", "ONNX")  # as it was read, whatever its name ends in
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its errors have no class in common
        raise UserError(f"--weights {path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]}).") from error
    used = session.get_providers()[0].removesuffix("ExecutionProvider")
    words = f"ONNX Runtime {runtime.__version__} {used}" + f" ({thread_count()} threads)" * (used == "CPU")
    LOGGER.info(f"{path}: {words}")
    backend = OnnxRuntimeBackend(session, path, words)
    without_half(half and backend.input_dtype != np.float16, "ONNX Runtime")
    return backend


def _providers(runtime: ModuleType, device: str) -> list[Any]:
    """Returns what is to run the graph, in order of preference.

    Raises:
        UserError: a device that this build does not have.
    """
    name = device.strip().lower().removeprefix("cuda:")
    cuda = "CUDAExecutionProvider" in runtime.get_available_providers()
    if name == "cpu" or (not name and not cuda):
        return ["CPUExecutionProvider"]
    if not cuda or not (name or "0").isdecimal():
        have = "cpu or a GPU's number" if cuda else "cpu (a GPU needs onnxruntime-gpu)"
        raise UserError(f"--device {device}: ONNX Runtime has {have} here.")
    return [("CUDAExecutionProvider", {"device_id": int(name or 0)}), "CPUExecutionProvider"]
