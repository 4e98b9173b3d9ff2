"""OpenVINO models on Intel and other CPUs, and on the GPUs and NPUs that OpenVINO finds.

Float32 unless --half asks for less: left alone, OpenVINO computes in bfloat16 on CPUs that have it. Quantised models
run in int8 either way. Beside our own, reads YOLOv5's folders, which keep names and stride in a YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.backends.base import (
    ArrayBackend,
    Graph,
    describe,
    find_export,
    find_part,
    plain_texts,
    refuse_links,
    require,
    texts_of_yaml,
    thread_count,
)
from utils.errors import UserError
from utils.log import LOGGER

HALF_HINTS = {"FP16": "f16", "BF16": "bf16"}  # a device's word for what it can -> the hint's, the better one first
HEAD = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?<net[\s>]")
HEAD_BYTES = 1024


class OpenVinoBackend(ArrayBackend):
    """A compiled model with one request, which is used again and again."""

    def __init__(self, compiled: Any, texts: Mapping[str, str], where: Path, device: str) -> None:
        """Takes an `openvino.CompiledModel`.

        Args:
            compiled: it.
            texts: what the file says of itself.
            where: the file, for messages.
            device: where it runs, in words.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._request, self.device = compiled.create_infer_request(), device
        images, output = (_lengths(port.partial_shape) for port in (compiled.inputs[0], compiled.outputs[0]))
        if len(images) != 4 or len(output) != 3:
            raise UserError(f"{where}: maps {images} to {output}, which is no YOLOv5 detector.")
        graph = Graph(images[0], *images[2:], *output[1:])
        self.input_dtype = compiled.inputs[0].element_type.to_dtype().type
        self.metadata = describe(texts, graph, where)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, 3, h, w); the next call writes over it."""
        self._request.infer([np.ascontiguousarray(inputs)], share_inputs=True)
        output = self._request.get_output_tensor(0).data
        return output if output.dtype == np.float32 else output.astype(np.float32)


def load(weights: str | Path, device: str = "", half: bool = False) -> OpenVinoBackend:
    """Loads a folder `*_openvino_model`, or the .xml file in it.

    Raises:
        UserError: nothing there, OpenVINO is missing or cannot read it, or an unknown device.
    """
    path = find_export(weights)
    path = find_part(path, "*.xml", "OpenVINO graph") if path.is_dir() else path
    _check_graph(path)
    openvino = require("openvino", "openvino", path)
    core = openvino.Core()
    name = _device(core, device)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _precision(core, name, half)}
    if name == "CPU":
        settings["INFERENCE_NUM_THREADS"] = thread_count()
    try:
        model = core.read_model(str(path))
        compiled = core.compile_model(model, name, settings)
    except RuntimeError as error:
        raise UserError(f"--weights {path}: OpenVINO cannot load it ({str(error).splitlines()[-1]}).") from error
    precision = settings["INFERENCE_PRECISION_HINT"]
    words = f"OpenVINO {openvino.__version__.split('-')[0]} {name} {precision}"
    words += f" ({thread_count()} threads)" * (name == "CPU")
    LOGGER.info(f"{path}: {words}")
    return OpenVinoBackend(compiled, _texts(model, path), path, words)


def _check_graph(path: Path) -> None:
    """Makes sure that a file is an OpenVINO graph, for OpenVINO would also read others, and that its weights are here.

    Raises:
        UserError: another kind of file, or the weights are a link out of the folder.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    if not HEAD.match(head):
        raise UserError(f"--weights {path}: is not an OpenVINO graph (<net> in XML).")
    refuse_links(path.parent, [path.with_suffix(".bin")])


def _device(core: Any, device: str) -> str:
    """Returns OpenVINO's name for --device.

    Raises:
        UserError: it does not have this device.
    """
    name = device.strip().upper() or "CPU"
    if name not in core.available_devices:
        have = ", ".join(core.available_devices).lower()
        raise UserError(f"--device {device}: OpenVINO has {have} here.")
    return name


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
        if hasattr(value, "items"):
            texts |= _flattened(value)
        else:
            texts |= plain_texts({key: value})
    return texts


def _lengths(shape: Any) -> list[int | None]:
    """Returns the lengths of a partial shape, None for open ones."""
    return [None if length.is_dynamic else length.get_length() for length in shape]
