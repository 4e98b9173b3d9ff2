"""OpenVINO models on Intel and other CPUs, and on the GPUs and NPUs that OpenVINO finds.

Float32 unless --half asks for less: left alone, OpenVINO computes in bfloat16 on CPUs that have it. Quantised models
run in int8 either way. Beside our own, reads YOLOv5's folders, which keep names and stride in a YAML file.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np

from models.backends.base import ArrayBackend, cannot_load, find_part, require, thread_count
from models.backends.metadata import Graph, plain_texts, texts_of_yaml
from models.backends.safety import check_openvino
from utils.errors import UserError
from utils.log import LOGGER

HALF_HINTS = {"FP16": "f16", "BF16": "bf16"}  # a device's word for what it can -> the hint's, the better one first
METADATA = re.compile(r'<metadata value="([^"]*)" ?/>')  # in a graph's rt_info


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a graph of ours says of itself."""
    graph = _graph_file(path)
    found = METADATA.search(graph.read_text(encoding="utf-8", errors="replace"))
    return {"metadata": html.unescape(found[1])} if found else {}


class OpenVinoBackend(ArrayBackend):
    """A compiled model of a folder `*_openvino_model`, or of the .xml file in it, with one request."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a model.

        Raises:
            UserError: OpenVINO is missing or cannot read it, it is no YOLOv5 detector, or an unknown device.
        """
        path = _graph_file(path)
        openvino = require("openvino", "openvino", path)
        core = openvino.Core()
        name = device.strip().upper() or "CPU"
        if name not in core.available_devices:
            raise UserError(f"--device {device}: OpenVINO has {', '.join(core.available_devices).lower()} here.")
        precision = _precision(core, name, half)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if name == "CPU":
            settings["INFERENCE_NUM_THREADS"] = thread_count()
        try:
            model = core.read_model(str(path))
            compiled = core.compile_model(model, name, settings)
        except RuntimeError as error:
            raise cannot_load(path, "OpenVINO", str(error).splitlines()[-1]) from error
        self.device = f"OpenVINO {openvino.__version__.split('-')[0]} {name} {precision}"
        self.device += f" ({thread_count()} threads)" * (name == "CPU")
        LOGGER.info(f"{path}: {self.device}")
        self._request = compiled.create_infer_request()
        images, output = (  # None for open lengths
            [None if length.is_dynamic else length.get_length() for length in port.partial_shape]
            for port in (compiled.inputs[0], compiled.outputs[0])
        )
        if len(images) != 4 or len(output) != 3:
            raise UserError(f"{path}: maps {images} to {output}, which is no YOLOv5 detector.")
        self.input_dtype = compiled.inputs[0].element_type.to_dtype().type
        self.take_description(_texts(model, path), Graph(images[0], *images[2:], *output[1:]), path)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, 3, h, w); the next call writes over it."""
        self._request.infer([np.ascontiguousarray(inputs)], share_inputs=True)
        output = self._request.get_output_tensor(0).data
        return output if output.dtype == np.float32 else output.astype(np.float32)


def _graph_file(path: Path) -> Path:
    path = find_part(path, "*.xml", "OpenVINO graph") if path.is_dir() else path
    check_openvino(path)
    return path


def _precision(core: Any, device: str, half: bool) -> str:
    """Returns the number format to compute in; says so where --half cannot be had."""
    if not half:
        return "f32"
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    found = next((hint for word, hint in HALF_HINTS.items() if word in able), "f32")
    if found == "f32":
        LOGGER.warning(f"WARNING: --half: this {device} computes in float32 only.")
    return found


def _texts(model: Any, path: Path) -> dict[str, str]:
    """Returns what a model says of itself: its rt_info, else the YAML file beside it."""
    found = _flattened(model.get_rt_info())
    if "metadata" in found or {"stride", "names"} <= set(found):
        return found
    beside = [file for file in (path.with_suffix(".yaml"), path.with_name("metadata.yaml")) if file.is_file()]
    return texts_of_yaml(beside[0]) if beside else {}


def _flattened(info: Any) -> dict[str, str]:
    """Returns the texts of an rt_info, those of the maps in it among them."""
    texts: dict[str, str] = {}
    for key, entry in info.items():
        value = getattr(entry, "value", entry)
        texts |= _flattened(value) if hasattr(value, "items") else plain_texts({key: value})
    return texts


load = OpenVinoBackend
