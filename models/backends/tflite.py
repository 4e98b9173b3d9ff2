"""TensorFlow Lite files on LiteRT, and on Google's Edge TPU (`*_edgetpu.tflite`).

Takes the interpreter that is installed: ai-edge-litert, or tflite-runtime on older boards. Files of other people's may
have int8 or uint8 inputs and outputs; they are scaled by what the file says. No operators beyond TFLite's own are
loaded, so nothing but arithmetic runs.
"""

from __future__ import annotations

import ast
import json
import platform
import zipfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from models.backends.base import ArrayBackend, cannot_load, cpu_only, require, thread_count, without_half
from models.backends.metadata import PARSING_ERRORS, damaged, graph_of, plain_texts
from utils.errors import UserError
from utils.log import LOGGER

EDGETPU_SUFFIX = "_edgetpu.tflite"
EDGETPU_LIBRARIES = {"Linux": "libedgetpu.so.1", "Darwin": "libedgetpu.1.dylib", "Windows": "edgetpu.dll"}
INTERPRETERS = {"ai_edge_litert.interpreter": "LiteRT", "tflite_runtime.interpreter": "TFLite"}  # module -> name
MAX_TEXT_BYTES = 1 << 20


def read_texts(path: Path) -> dict[str, str]:
    """Returns the texts in the zip archive at a file's end: ours (JSON) or YOLOv5's (a Python dict); {} without one.

    Raises:
        UserError: they are damaged.
    """
    if not zipfile.is_zipfile(path):
        return {}
    texts: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                suffix = Path(member.filename).suffix
                if suffix in (".json", ".txt") and member.file_size <= MAX_TEXT_BYTES:
                    text = archive.read(member).decode("utf-8")
                    content = json.loads(text) if suffix == ".json" else ast.literal_eval(text)
                    texts |= plain_texts(content) if isinstance(content, dict) else {}
    except (OSError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, *PARSING_ERRORS) as error:
        raise damaged(path, error) from error
    return texts


class TfliteBackend(ArrayBackend):
    """An interpreter with its tensors allocated."""

    channels_last = True

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: no interpreter is installed or it cannot read the file, it is no YOLOv5 detector, no Edge TPU for
                a file that needs one, or another device than the CPU.
        """
        cpu_only(device, "TensorFlow Lite")
        texts = read_texts(path)
        module, name = _interpreter_module(path)
        without_half(half, name)
        delegates, self.device = None, f"{name} CPU ({thread_count()} threads)"
        if path.name.lower().endswith(EDGETPU_SUFFIX):
            delegates, self.device = [_edgetpu(module.load_delegate, path)], f"{name} Edge TPU"
        try:
            self._interpreter = module.Interpreter(
                model_path=str(path), num_threads=thread_count(), experimental_delegates=delegates
            )
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise cannot_load(path, name, error) from error
        LOGGER.info(f"{path}: {self.device}")
        self._input, self._outputs = self._interpreter.get_input_details()[0], self._interpreter.get_output_details()
        shapes = (self._input["shape"].tolist(), self._outputs[0]["shape"].tolist())
        self.take_description(texts, graph_of(*shapes, path, channels_last=True), path, normalised=True)
        if self._raw is None:
            del self._outputs[1:]
        self.dynamic = False

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the rows or detections of images (b, h, w, 3)."""
        self._interpreter.set_tensor(self._input["index"], _quantised(inputs, self._input))
        self._interpreter.invoke()
        return self.rows([_floats(self._interpreter.get_tensor(port["index"]), port) for port in self._outputs])


def _interpreter_module(path: Path) -> tuple[Any, str]:
    """Returns the first of the interpreters' modules that is installed, and its name.

    Raises:
        UserError: none is.
    """
    for module, name in INTERPRETERS.items():
        if find_spec(module.split(".")[0]) is not None:
            return require(module, module.split(".")[0].replace("_", "-"), path), name
    raise UserError(f"{path} needs ai-edge-litert: pip install ai-edge-litert")


def _edgetpu(load_delegate: Callable[[str], Any], path: Path) -> Any:
    """Returns the delegate that hands operators to an Edge TPU.

    Raises:
        UserError: its library is missing, or no device is plugged in.
    """
    library = EDGETPU_LIBRARIES.get(platform.system(), "")
    try:
        return load_delegate(library)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} needs an Edge TPU and its library {library}, which cannot be loaded ({error}): "
            "plug one in and install libedgetpu (coral.ai/software), or give the -int8.tflite file."
        ) from error


def _quantised(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Turns floats into what a tensor holds: q = value / scale + zero point, rounded."""
    kind, (scale, zero_point) = details["dtype"], details["quantization"]
    if np.issubdtype(kind, np.floating) or not scale:
        return values.astype(kind, copy=False)
    limits = np.iinfo(kind)
    return np.clip(np.rint(values / scale + zero_point), limits.min, limits.max).astype(kind)


def _floats(values: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """Turns what a tensor holds into float32: (q - zero point) * scale."""
    scale, zero_point = details["quantization"]
    if np.issubdtype(details["dtype"], np.floating) or not scale:
        return values.astype(np.float32, copy=False)
    return (values.astype(np.float32) - zero_point) * np.float32(scale)


load = TfliteBackend
