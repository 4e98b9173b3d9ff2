"""TensorFlow's SavedModel folders and frozen graphs (.pb), on the CPU or a GPU.

Both are programs, and some of TensorFlow's operators read and write files: a file with any operator that is not on the
list below is refused before TensorFlow runs it. Only the two functions that store and fetch a SavedModel's variables
may hold such operators, and nothing that TensorFlow runs may name those two. Inputs are (b, h, w, 3), boxes fractions
of the image, as in YOLOv5.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.backends.base import (
    ArrayBackend,
    before_tensorflow,
    describe,
    find_export,
    graph_of,
    plain_texts,
    require,
    texts_of_yaml,
    thread_count,
    without_half,
)
from utils.errors import UserError
from utils.log import LOGGER

# Arithmetic, shapes and calls: what exported detectors consist of, NMS inside among it.
ALLOWED = frozenset(
    """Abs Add AddN AddV2 All Any ArgMax ArgMin AvgPool BatchMatMul BatchMatMulV2 BiasAdd BroadcastTo Cast Ceil
    ClipByValue CombinedNonMaxSuppression Concat ConcatV2 Const Conv2D DepthToSpace DepthwiseConv2dNative Div Einsum Elu
    Equal Exp ExpandDims Fill Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV3 Gather GatherNd GatherV2 Greater
    GreaterEqual Identity IdentityN LeakyRelu Less LessEqual Log LogicalAnd LogicalNot LogicalOr MatMul Max MaxPool
    MaxPoolV2 Maximum Mean Min Minimum MirrorPad Mul Neg NoOp NonMaxSuppressionV2 NonMaxSuppressionV3
    NonMaxSuppressionV4 NonMaxSuppressionV5 NotEqual OneHot Pack Pad PadV2 PartitionedCall Placeholder
    PlaceholderWithDefault Pow Prod Range Rank ReadVariableOp RealDiv Reciprocal Relu Relu6 Reshape ResizeBilinear
    ResizeNearestNeighbor Round Rsqrt ScatterNd Select SelectV2 Shape Sigmoid Size Slice Softmax Softplus SpaceToDepth
    Split SplitV Sqrt Square SquaredDifference Squeeze StatefulPartitionedCall StopGradient StridedSlice Sub Sum Tanh
    Tile TopKV2 Transpose Unpack VarHandleOp Where ZerosLike""".split()
)
# The two functions in every SavedModel that store and fetch its variables. TensorFlow numbers functions anew when it
# loads them, so any name with this word in it may become that of a saver, also of one that was loaded before.
SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
SAVER_WORD = re.compile(r"traced_(save|restore)")
SAVER_OPERATORS = frozenset(
    """AssignVariableOp Cast Const DisableCopyOnRead Identity IdentityN MergeV2Checkpoints NoOp Pack Placeholder
    ReadVariableOp RestoreV2 SaveV2 Select SelectV2 ShardedFilename StaticRegexFullMatch StringJoin""".split()
)
REPLACEABLE = "api_implements"  # functions with this attribute may be run in place of one another
OBJECTS = frozenset("user_object function bare_concrete_function variable constant captured_tensor".split())
METADATA_FILES = ("metadata.yaml", "metadata.json")  # JSON is YAML, too
METADATA_NODE = "metadata"
SIGNATURE = "serving_default"


class TensorFlowBackend(ArrayBackend):
    """A function of TensorFlow's."""

    channels_last = True

    def __init__(
        self,
        function: Callable[[np.ndarray], Any],
        shapes: tuple[list[int | None], list[int | None]],
        texts: Mapping[str, str],
        where: Path,
        device: str,
    ) -> None:
        """Takes a function from images (b, h, w, 3) to a tensor of rows.

        Args:
            function: it.
            shapes: of its input and of its output, None for open lengths.
            texts: what the file says of itself.
            where: the file, for messages.
            device: where it runs, in words.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._function, self.device = function, device
        if len(shapes[0]) != 4:
            raise UserError(f"{where}: its input has the shape {shapes[0]}, not that of images (b, h, w, 3).")
        graph = graph_of(*shapes, channels_last=True)
        self.metadata = describe(texts, graph, where, boxes_normalised=True)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for images (b, h, w, 3)."""
        return self._function(inputs).numpy().astype(np.float32, copy=False)


def load(weights: str | Path, device: str = "", half: bool = False) -> TensorFlowBackend:
    """Loads a folder `*_saved_model` or a frozen graph.

    Raises:
        UserError: nothing there, TensorFlow is missing or cannot read it, it does more than arithmetic, or an unknown
            device.
    """
    path = find_export(weights)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when TensorFlow is imported
    before_tensorflow()
    tensorflow = require("tensorflow", "tensorflow", path)
    without_half(half, "TensorFlow")
    place = _place(tensorflow, device)
    words = f"TensorFlow {tensorflow.__version__} {place}"
    LOGGER.info(f"{path}: {words}")
    try:
        with tensorflow.device(place):
            parts = _load_folder(tensorflow, path) if path.is_dir() else _load_graph(tensorflow, path)
    except (OSError, ValueError, KeyError, tensorflow.errors.OpError) as error:
        raise UserError(f"--weights {path}: TensorFlow cannot load it ({str(error).splitlines()[0]}).") from error
    function, shapes, texts = parts

    def placed(inputs: np.ndarray) -> Any:
        with tensorflow.device(place):
            return function(inputs)

    return TensorFlowBackend(placed, shapes, texts, path, words)


def _place(tensorflow: ModuleType, device: str) -> str:
    """Returns TensorFlow's name for --device; gives the CPU its threads while that can still be done.

    Raises:
        UserError: it does not have this device.
    """
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


def _load_folder(tensorflow: ModuleType, path: Path) -> tuple[Any, tuple, dict[str, str]]:
    """Returns the function of a SavedModel, the shapes of its input and output, and its texts."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    _parse(content, path / "saved_model.pb")
    _check_saved_model(content, path)
    loaded = tensorflow.saved_model.load(str(path))
    signature = loaded.signatures[SIGNATURE]
    ((argument, images),) = signature.structured_input_signature[1].items()
    name, output = sorted(signature.structured_outputs.items())[0]

    def function(inputs: np.ndarray, loaded: Any = loaded) -> Any:  # the variables live as long as what was loaded
        return signature(**{argument: tensorflow.constant(inputs)})[name]

    beside = [file for folder in (path, path / "assets") for file in map(folder.joinpath, METADATA_FILES)]
    found = next((file for file in beside if file.is_file()), None)
    return function, (images.shape.as_list(), output.shape.as_list()), texts_of_yaml(found) if found else {}


def _load_graph(tensorflow: ModuleType, path: Path) -> tuple[Any, tuple, dict[str, str]]:
    """Returns the function of a frozen graph, the shapes of its input and output, and its texts."""
    graph = tensorflow.compat.v1.GraphDef()
    _parse(graph, path)
    _check_operators(graph.node, path)
    for called in graph.library.function:
        _check_operators(called.node_def, path)
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
    shapes = (images.shape.as_list(), output.shape.as_list())
    return (lambda values: pruned(tensorflow.constant(values))), shapes, _texts_of(graph)


def _parse(message: Any, path: Path) -> None:
    """Reads a Protocol Buffers message from a file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    from google.protobuf.message import DecodeError

    try:
        message.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    except DecodeError as error:
        raise UserError(f"--weights {path}: is not a TensorFlow model, or is damaged ({error}).") from error


def _check_saved_model(content: Any, path: Path) -> None:
    """Makes sure that nothing but arithmetic can run, apart from fetching variables, which TensorFlow does itself.

    Raises:
        UserError: another operator, a way to the functions that reach files, an object that runs something when it is
            loaded, or several graphs, of which TensorFlow would choose one.
    """
    if len(content.meta_graphs) != 1:
        raise UserError(f"--weights {path}: one graph is expected in it, it has {len(content.meta_graphs)}: refused.")
    (part,) = content.meta_graphs
    _check_operators(part.graph_def.node, path)
    for called in part.graph_def.library.function:
        saver = SAVER.fullmatch(called.signature.name)
        _check_operators(called.node_def, path, SAVER_OPERATORS if saver else ALLOWED)
        if REPLACEABLE in called.attr:
            raise UserError(f"--weights {path}: {called.signature.name} may be replaced by another function: refused.")
    for place, text in _texts_in(part):
        if _names_saver(text) and place not in _harmless_places(part):
            raise UserError(f"--weights {path}: its {place} leads to a function that reads or writes files: refused.")
    for node in part.object_graph_def.nodes:
        kind = node.WhichOneof("kind")
        if kind not in OBJECTS:
            raise UserError(f"--weights {path}: holds objects of kind {kind}: refused.")
        if node.saveable_objects or node.registered_name or node.registered_saver:
            raise UserError(f"--weights {path}: holds objects with a way of their own to be loaded: refused.")


def _names_saver(text: str | bytes) -> bool:
    """Tells whether a text may name a function that stores or fetches variables."""
    return bool(SAVER_WORD.search(text if isinstance(text, str) else text.decode("latin-1")))


def _harmless_places(part: Any) -> tuple[str, ...]:
    """Returns where a SavedModel may name its savers: where they are defined, and in the graph for other languages.

    TensorFlow runs that graph itself where there are no objects, as in SavedModels of TensorFlow 1.
    """
    defined = "graph_def.library.function.signature.name"
    return (defined, "graph_def.node.attr.func.name") if part.object_graph_def.nodes else (defined,)


def _texts_in(value: Any, place: str = "") -> Iterator[tuple[str, str | bytes]]:
    """Yields every text in a message, keys of maps among them, with the names of the fields that lead to it."""
    if isinstance(value, (str, bytes)):
        yield place, value
    elif hasattr(value, "ListFields"):
        for field, inner in value.ListFields():
            if field.cpp_type in (field.CPPTYPE_STRING, field.CPPTYPE_MESSAGE):
                yield from _texts_in(inner, f"{place}.{field.name}".lstrip("."))
    elif hasattr(value, "items"):
        for pair in value.items():
            yield from _texts_in(pair, place)
    elif not isinstance(value, (bool, int, float)):  # repeated fields; not all of them have __iter__
        for inner in value:
            yield from _texts_in(inner, place)


def _check_operators(nodes: Iterable[Any], path: Path, allowed: Container[str] = ALLOWED) -> None:
    """Refuses nodes whose operator is not on the list.

    Raises:
        UserError: there are such.
    """
    unknown = sorted({node.op for node in nodes if node.op not in allowed})
    if unknown:
        raise UserError(f"--weights {path}: its graph does more than arithmetic ({', '.join(unknown)}): refused.")


def _texts_of(graph: Any) -> dict[str, str]:
    """Returns the texts in a frozen graph's constant `metadata`, {} without one."""
    found = [node for node in graph.node if node.name == METADATA_NODE and node.op == "Const"]
    if not found or not found[0].attr["value"].tensor.string_val:
        return {}
    content = json.loads(found[0].attr["value"].tensor.string_val[0].decode())
    texts = plain_texts(content)
    return texts if "metadata" in texts else {"metadata": json.dumps(content)}
