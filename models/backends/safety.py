"""What a model file may contain: checked before its runtime sees it, so that no runtime reads or runs anything else.

- Every format: paths that native code cannot take, and links out of a model's folder, are refused.
- ONNX: a tensor may name a file that holds its values, and older runtimes read whatever file that is; here it must lie
  beside the model. The walk follows the messages of the format (onnx.proto) that lead to tensors, and refuses what it
  cannot be sure of: parts that the format did not have when this was written, and bytes that libraries read in
  different ways. It needs no library, and also tells what the file says of itself.
- OpenVINO would also read other kinds of files; NCNN takes the memory that a graph's counts ask for before it reads on.
- TorchScript is a program: its modules' code is text, which torch compiles and interprets without Python. It has no
  access to Python, the shell or the network, but some of torch's operators read and write files, and code may run while
  the file is loaded. Code that names such an operator, or operators of an extension, or writes names in a way that
  hides them, is refused. Bugs in torch's interpreter remain possible: open files of strangers as ONNX.
- TensorFlow's files are programs, too, and some operators read and write files: any operator that is not on the list
  below is refused. Only the two functions that store and fetch a SavedModel's variables may hold such operators, and
  nothing that TensorFlow runs may name those two.
"""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError, shown
from utils.files import native_path


def check_path(path: Path) -> Path:
    """Returns a model's path once native code can take it, and nothing in its folder is a link out of it.

    Raises:
        UserError: it cannot, or something is: a runtime would read what lies there.
    """
    if isinstance(native_path(path), bytes):
        raise UserError(f"--weights {path}: runtimes take no path that is not UTF-8: rename the file or its folder.")
    if path.is_dir():
        _refuse_links(path, path.rglob("*"))
    return path


def _refuse_links(folder: Path, files: Iterable[Path]) -> None:
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--weights {folder}: '{file.name}' is a link to {file.resolve()}, outside it: refused.")


_PLAIN = ""  # fields that lead to no tensor
# message -> {field number: message in it}; an "entry" is a pair of texts
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {**dict.fromkeys((1, 2, 3, 4, 5, 6, 8, 14, 26), _PLAIN), 7: "graph", 20: "training", 25: "function"},
    "training": {**dict.fromkeys((3, 4), _PLAIN), 1: "graph", 2: "graph"},
    "graph": {**dict.fromkeys((2, 10, 11, 12, 13, 14, 16), _PLAIN), 1: "node", 5: "tensor", 15: "sparse"},
    "function": {**dict.fromkeys((1, 4, 5, 6, 8, 9, 10, 12, 13, 14), _PLAIN), 7: "node", 11: "attribute"},
    "node": {**dict.fromkeys((1, 2, 3, 4, 6, 7, 8, 9, 10), _PLAIN), 5: "attribute"},
    "attribute": {
        **dict.fromkeys((1, 2, 3, 4, 7, 8, 9, 13, 14, 15, 20, 21), _PLAIN),
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    },
    "sparse": {3: _PLAIN, 1: "tensor", 2: "tensor"},
    "tensor": {**dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16), _PLAIN), 13: "entry"},
}
_MODEL_GRAPH, _MODEL_TEXTS = 7, 14
_GRAPH_INPUT, _GRAPH_OUTPUT = 11, 12
_DIMENSIONS = (2, 1, 2, 1)  # from a graph's input: type, tensor_type, shape, dim
_DIMENSION_LENGTH = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of Protocol Buffers
_MAX_VARINT, _MAX_KEY = 10, 5  # bytes
_FILE_NAME = re.compile(r"[^/\\:\0]+")  # no path, and none of the addresses that ONNX Runtime hides in one
_MAX_DEPTH = 100


class OnnxFile(NamedTuple):
    """What a file says of itself: its texts, and the lengths of its first input and output (None for open ones)."""

    texts: dict[str, str]
    input_shape: list[int | None]
    output_shape: list[int | None]


class Field(NamedTuple):
    """One field of a message: a number, or the bytes [start, end)."""

    tag: int
    start: int
    end: int
    number: int | None


def read_onnx(path: Path) -> OnnxFile:
    """Reads what an ONNX file says of itself, and makes sure that its tensors lie in it or in files beside it.

    Raises:
        UserError: no ONNX file, or it has parts that cannot be checked, or refers to a file that is elsewhere, also by
            way of a link, or missing.
    """
    folder = path.parent.resolve()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            locations = set(_locations(content, 0, len(content), "model"))
            found = _describe(content)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"--weights {path}: is not an ONNX file, or is damaged ({error}).") from error
    for location in sorted(locations):
        words = f"--weights {path}: takes tensors from '{shown(location)}'"
        if not _FILE_NAME.fullmatch(location) or not (folder / location).resolve().is_relative_to(folder):
            raise UserError(f"{words}, which is outside its folder: refused.")
        if not (folder / location).is_file():
            raise UserError(f"{words}, and there is no such file: put it beside the model.")
    return found


def _describe(content: mmap.mmap) -> OnnxFile:
    """Returns a file's texts and shapes."""
    fields = list(_fields(content, 0, len(content)))
    entries = [_entry(content, field) for field in fields if field.tag == _MODEL_TEXTS]
    texts = {entry[1].decode(): entry.get(2, b"").decode() for entry in entries if 1 in entry}
    shapes: dict[int, list[int | None]] = {}
    for graph in (field for field in fields if field.tag == _MODEL_GRAPH):
        for field in _fields(content, graph.start, graph.end):
            if field.tag in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                shapes.setdefault(field.tag, _shape(content, field))
    if not {_GRAPH_INPUT, _GRAPH_OUTPUT} <= set(shapes):
        raise ValueError("it has no graph with an input and an output")
    return OnnxFile(texts, shapes[_GRAPH_INPUT], shapes[_GRAPH_OUTPUT])


def _shape(content: mmap.mmap, info: Field) -> list[int | None]:
    """Returns the lengths of an input or output of a graph."""
    found = [info]
    for tag in _DIMENSIONS:
        found = [field for outer in found for field in _fields(content, outer.start, outer.end) if field.tag == tag]
    lengths = []
    for dimension in found:
        inner = {field.tag: field.number for field in _fields(content, dimension.start, dimension.end)}
        lengths.append(inner.get(_DIMENSION_LENGTH))
    return lengths


def _entry(content: mmap.mmap, pair: Field) -> dict[int, bytes]:
    """Returns a pair of texts: key under 1, value under 2."""
    return {field.tag: content[field.start : field.end] for field in _fields(content, pair.start, pair.end)}


def _locations(content: mmap.mmap, start: int, end: int, message: str, depth: int = 0) -> Iterator[str]:
    """Yields the `location` of all external data in the message at [start, end)."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    for field in _fields(content, start, end):
        if field.number is not None:
            continue
        inner = _FIELDS[message].get(field.tag)
        if inner is None:
            raise ValueError(f"a {message} in it has a field {field.tag}, which is unknown here and could be anything")
        if inner == "entry":
            entry = _entry(content, field)
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif inner != _PLAIN:
            yield from _locations(content, field.start, field.end, inner, depth + 1)


def _fields(content: mmap.mmap, position: int, end: int) -> Iterator[Field]:
    """Yields the fields of a message that are numbers of variable length or bytes; passes over the others.

    Libraries differ in keys beyond 32 bits: some cut them down to another field's.
    """
    while position < end:
        key, position = _varint(content, position, _MAX_KEY)
        if not 8 <= key < 1 << 32:
            raise ValueError(f"a field's key is {key}")
        kind = key & 7
        if kind == _VARINT:
            number, position = _varint(content, position)
            yield Field(key >> 3, position, position, number)
        elif kind == _BYTES:
            length, position = _varint(content, position)
            if position + length > end:
                raise ValueError("a part is longer than what holds it")
            yield Field(key >> 3, position, position + length, None)
            position += length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown kind of field {kind}")


def _varint(content: mmap.mmap, position: int, longest: int = _MAX_VARINT) -> tuple[int, int]:
    """Reads a number of variable length, of at most `longest` bytes; returns it and the place behind it."""
    value = 0
    for count in range(longest):
        byte = content[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    raise ValueError("a number without end")


_NET = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?<net[\s>]")
_NET_WITHIN_BYTES = 1024


def check_openvino(path: Path) -> None:
    """Makes sure that a file is an OpenVINO graph, and that its weights are in its folder.

    Raises:
        UserError: another kind of file, or the weights are a link out of the folder.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_NET_WITHIN_BYTES)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    if not _NET.match(head):
        raise UserError(f"--weights {path}: is not an OpenVINO graph (<net> in XML).")
    _refuse_links(path.parent, [path.with_suffix(".bin")])


_NCNN_MAGIC = "7767517"  # first line of a graph in text


def check_ncnn(path: Path) -> None:
    """Makes sure that an NCNN graph has as many layers and blobs as it says.

    Each line after the first two is: type, name, numbers of inputs and outputs, their names, parameters.

    Raises:
        UserError: it has not, or it is no graph.
    """
    try:
        magic, counts, *lines = path.read_text(encoding="ascii").split("\n")
        layers, blobs = map(int, counts.split())
        rows = [line.split() for line in lines if line.strip()]
        ends = [(int(row[2]), int(row[3])) for row in rows]
        fits = all(0 <= min(pair) and 4 + sum(pair) <= len(row) for pair, row in zip(ends, rows, strict=True))
        whole = layers == len(rows) and 0 < blobs <= sum(outputs for _, outputs in ends)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"--weights {path}: is not an NCNN graph, or is damaged ({error}).") from error
    if magic != _NCNN_MAGIC or not (fits and whole):
        raise UserError(f"--weights {path}: is not an NCNN graph, or is damaged (its counts are wrong).")


_FILE_OPERATORS = re.compile(r"\b(?:from_file|load|save|save_to_file|open|fork|import_ir_module|print|classes)\b")
_EXTENSIONS = re.compile(r"\bops\b(?!\.(?:aten|prim|quantized)\.|\.torchvision\.nms\b)[\w.]*")
_TEXTS = re.compile(r""""(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
_CODED_TEXT = re.compile(r"""\\(?!["'\\nrt])""")  # character codes, and lines that go on


def check_torchscript(path: Path) -> Any:
    """Reads the code in a TorchScript file, as torch will, and refuses what is suspicious; returns its records.

    Raises:
        UserError: something is, or the file is no archive of torch's.
    """
    from utils.checkpoint import open_records

    try:
        records = open_records(path)
        for name in records.get_all_records():
            if name.lower().endswith(".py"):
                found = suspicious(records.get_record(name).decode("utf-8", "replace"))
                if found:
                    raise UserError(f"--weights {path}: its code has {found}: refused.")
        return records
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--weights {path}: is not a TorchScript file, or is damaged ({error}).") from error


def suspicious(code: str) -> str:
    """Returns what in TorchScript code no detector needs, in words; empty where there is nothing.

    Names count wherever they stand, for a function may be given another name, or be fetched by its name's text.
    """
    found = _FILE_OPERATORS.search(code) or _EXTENSIONS.search(code)
    if found:
        return f"the name '{found[0]}'"
    if _CODED_TEXT.search(code):
        return "a text in character codes"
    ends = [(match.start(), match.end()) for match in _TEXTS.finditer(code)]
    if any(not code[end:start].strip() for (_, end), (start, _) in pairwise(ends)):
        return "a text in pieces"
    return ""


# Arithmetic, shapes and calls: what exported detectors consist of, NMS inside among it.
_TF_OPERATORS = frozenset(
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
_SAVER = re.compile(r"__inference__traced_(save|restore)_\d+")
_SAVER_WORD = re.compile(r"traced_(save|restore)")
_SAVER_OPERATORS = frozenset(
    """AssignVariableOp Cast Const DisableCopyOnRead Identity IdentityN MergeV2Checkpoints NoOp Pack Placeholder
    ReadVariableOp RestoreV2 SaveV2 Select SelectV2 ShardedFilename StaticRegexFullMatch StringJoin""".split()
)
_REPLACEABLE = "api_implements"  # functions with this attribute may be run in place of one another
_CONSTANT = "tf.TrackableConstant"  # TensorFlow's own class for a constant that functions share
_OBJECTS = frozenset("user_object function bare_concrete_function variable constant captured_tensor".split())


def check_frozen_graph(graph: Any, path: Path) -> None:
    """Makes sure that a `GraphDef` does nothing but arithmetic.

    Raises:
        UserError: another operator.
    """
    for nodes in (graph.node, *(called.node_def for called in graph.library.function)):
        _check_operators(nodes, path)


def check_saved_model(content: Any, path: Path) -> None:
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
        saver = _SAVER.fullmatch(called.signature.name)
        _check_operators(called.node_def, path, _SAVER_OPERATORS if saver else _TF_OPERATORS)
        if _REPLACEABLE in called.attr:
            raise UserError(f"--weights {path}: {called.signature.name} may be replaced by another function: refused.")
    # Savers may be named where they are defined, and in the graph for other languages. TensorFlow runs that graph
    # itself where there are no objects, as in SavedModels of TensorFlow 1.
    harmless = ["graph_def.library.function.signature.name"]
    harmless += ["graph_def.node.attr.func.name"] if part.object_graph_def.nodes else []
    for place, text in _texts_in(part):
        if place not in harmless and _SAVER_WORD.search(text if isinstance(text, str) else text.decode("latin-1")):
            raise UserError(f"--weights {path}: its {place} leads to a function that reads or writes files: refused.")
    for node in part.object_graph_def.nodes:
        kind = node.WhichOneof("kind")
        if kind not in _OBJECTS:
            raise UserError(f"--weights {path}: holds objects of kind {kind}: refused.")
        registered = node.registered_name not in ("", _CONSTANT) or (node.registered_name and kind != "constant")
        if registered or node.saveable_objects or node.registered_saver:
            raise UserError(f"--weights {path}: holds objects with a way of their own to be loaded: refused.")


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


def _check_operators(nodes: Iterable[Any], path: Path, allowed: Container[str] = _TF_OPERATORS) -> None:
    unknown = sorted({node.op for node in nodes if node.op not in allowed})
    if unknown:
        raise UserError(f"--weights {path}: its graph does more than arithmetic ({', '.join(unknown)}): refused.")
