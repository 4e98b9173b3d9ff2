"""What can be told of an ONNX file without any library: what it says of itself, and which files its tensors are in.

An ONNX tensor may name a file that holds its values. Older runtimes read whatever file that is; here it must lie beside
the model. The walk follows the messages of the format (onnx.proto) that lead to tensors, and refuses what it cannot be
sure of: parts that the format did not have when this was written, and bytes that libraries read in different ways.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, shown

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
