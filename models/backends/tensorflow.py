"""TensorFlow's SavedModel folders and frozen graphs (.pb), on the CPU or a GPU.

Both are programs, and may hold arithmetic alone (`models.backends.safety`). Inputs are (b, h, w, 3), boxes fractions of
the image, as in YOLOv5.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.backends.base import ArrayBackend, before_tensorflow, cannot_load, require, thread_count, without_half
from models.backends.metadata import PARSING_ERRORS, damaged, graph_of, plain_texts, texts_of_yaml
from models.backends.safety import check_frozen_graph, check_saved_model
from utils.errors import UserError
from utils.log import LOGGER

METADATA_FILES = ("metadata.yaml", "metadata.json")  # JSON is YAML, too
METADATA_NODE = "metadata"
SIGNATURE = "serving_default"


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a folder says of its SavedModel; {} for a frozen graph, which TensorFlow must read."""
    beside = [file for folder in (path, path / "assets") for file in map(folder.joinpath, METADATA_FILES)]
    found = next((file for file in beside if file.is_file()), None)
    return texts_of_yaml(found) if found else {}


class TensorFlowBackend(ArrayBackend):
    """The function of a folder `*_saved_model` or a frozen graph."""

    channels_last = True

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a model.

        Raises:
            UserError: TensorFlow is missing or cannot read it, it does more than arithmetic, it is no YOLOv5 detector,
                or an unknown device.
        """
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when TensorFlow is imported
        before_tensorflow()
        tensorflow = require("tensorflow", "tensorflow", path)
        without_half(half, "TensorFlow")
        place = _place(tensorflow, device)
        self.device = f"TensorFlow {tensorflow.__version__} {place}"
        LOGGER.info(f"{path}: {self.device}")
        self._placed = lambda: tensorflow.device(place)
        try:
            with self._placed():
                load = _load_folder if path.is_dir() else _load_graph
                self._function, images, output, texts = load(tensorflow, path)
        except (OSError, ValueError, KeyError, tensorflow.errors.OpError) as error:
            raise cannot_load(path, "TensorFlow", error) from error
        graph = graph_of(images.shape.as_list(), output.shape.as_list(), path, channels_last=True)
        self.take_description(texts, graph, path, normalised=True)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, h, w, 3)."""
        with self._placed():
            return self._function(inputs).numpy().astype(np.float32, copy=False)


def _place(tensorflow: ModuleType, device: str) -> str:
    """Returns TensorFlow's name for --device; gives the CPU its threads while that can still be done."""
    name = device.strip().lower().removeprefix("cuda:")
    gpus = len(tensorflow.config.list_physical_devices("GPU"))
    if name == "cpu" or (not name and not gpus):
        if tensorflow.config.threading.get_intra_op_parallelism_threads() != thread_count():
            try:
                tensorflow.config.threading.set_intra_op_parallelism_threads(thread_count())
            except RuntimeError:
                LOGGER.warning("WARNING: TensorFlow is running already: its number of threads stays as it is.")
        return "/CPU:0"
    if not (name or "0").isdecimal() or int(name or 0) >= gpus:
        raise UserError(f"--device {device}: TensorFlow sees {gpus or 'no'} GPUs here. Use --device cpu.")
    return f"/GPU:{name or 0}"


def _load_folder(tensorflow: ModuleType, path: Path) -> tuple[Any, Any, Any, dict[str, str]]:
    """Returns the function of a SavedModel, its input and output, and its texts."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    _parse(content, path / "saved_model.pb")
    check_saved_model(content, path)
    loaded = tensorflow.saved_model.load(str(path))
    signature = loaded.signatures[SIGNATURE]
    ((argument, images),) = signature.structured_input_signature[1].items()
    name, output = sorted(signature.structured_outputs.items())[0]

    def function(inputs: np.ndarray, loaded: Any = loaded) -> Any:  # the variables live as long as what was loaded
        return signature(**{argument: tensorflow.constant(inputs)})[name]

    return function, images, output, read_texts(path)


def _load_graph(tensorflow: ModuleType, path: Path) -> tuple[Any, Any, Any, dict[str, str]]:
    """Returns the function of a frozen graph, its input and output, and the texts in its constant `metadata`."""
    graph = tensorflow.compat.v1.GraphDef()
    _parse(graph, path)
    check_frozen_graph(graph, path)
    inputs = [node.name for node in graph.node if node.op == "Placeholder"]
    read = {source.split(":")[0].lstrip("^") for node in graph.node for source in node.input}
    outputs = [node.name for node in graph.node if node.name not in read and node.op not in ("Const", "NoOp")]
    if len(inputs) != 1 or not outputs:
        raise UserError(f"--weights {path}: one input is expected, and an output; it has {inputs} and {outputs}.")
    wrapped = tensorflow.compat.v1.wrap_function(
        lambda: tensorflow.compat.v1.import_graph_def(graph, name=""), signature=[]
    )
    images, output = (wrapped.graph.get_tensor_by_name(f"{name}:0") for name in (inputs[0], outputs[0]))
    pruned = wrapped.prune(images, output)
    texts: dict[str, str] = {}
    for node in graph.node:
        if node.name == METADATA_NODE and node.op == "Const" and node.attr["value"].tensor.string_val:
            try:
                content = json.loads(node.attr["value"].tensor.string_val[0].decode())
                texts = plain_texts(content if "metadata" in content else {"metadata": content})
            except PARSING_ERRORS as error:
                raise damaged(path, error) from error
    return (lambda values: pruned(tensorflow.constant(values))), images, output, texts


def _parse(message: Any, path: Path) -> None:
    """Reads a Protocol Buffers message from a file."""
    from google.protobuf.message import DecodeError

    try:
        message.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    except DecodeError as error:
        raise UserError(f"--weights {path}: is not a TensorFlow model, or is damaged ({error}).") from error


load = TensorFlowBackend
