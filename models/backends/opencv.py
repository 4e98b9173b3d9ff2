"""ONNX files in OpenCV's own network module (`--dnn`): no runtime to install; CPU, float32.

OpenCV lacks operators that open image sizes need, so files exported with --dynamic may be refused.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from models.backends.base import ArrayBackend, cpu_only, thread_count, without_half
from models.backends.metadata import graph_of
from models.backends.onnxruntime import read_texts
from models.backends.safety import read_onnx
from utils.errors import UserError
from utils.log import LOGGER

__all__ = ["OpenCvBackend", "load", "read_texts"]


class OpenCvBackend(ArrayBackend):
    """An ONNX file in a `cv2.dnn.Net`."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: OpenCV cannot read it, it takes tensors from outside its folder, it is no YOLOv5 detector, or
                another device than the CPU.
        """
        cpu_only(device, "OpenCV")
        content = read_onnx(path)
        graph = graph_of(content.input_shape, content.output_shape, path)
        without_half(half, "OpenCV")
        cv2.setNumThreads(thread_count())
        self.device = f"OpenCV {cv2.__version__} CPU ({thread_count()} threads)"
        LOGGER.info(f"{path}: {self.device}")
        graph = graph._replace(batch=graph.batch or 1)  # it plans for the number that it meets first
        try:
            self._network = cv2.dnn.readNetFromONNX(str(path))
            self.take_description(content.texts, graph._replace(columns=None), path)
        except cv2.error as error:
            hint = "Leave out --dnn, or export the model for one image size (without --dynamic)."
            raise UserError(f"--weights {path}: OpenCV cannot run it ({error.err or error}). {hint}") from error

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the rows or detections of images (b, 3, h, w)."""
        self._network.setInput(np.ascontiguousarray(inputs))
        if self._raw is not None:
            return self.rows(self._network.forward(self._network.getUnconnectedOutLayersNames()))
        output = self._network.forward()
        return output if output.ndim == 3 else output.reshape(len(inputs), *output.shape[-2:])


load = OpenCvBackend
