"""What the runtimes of exported models share: finding the file, importing the library, filling in what it leaves out.

Free of torch.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from models.backends.metadata import Metadata, Suppression
from utils.checks import UserError, did_you_mean
from utils.files import native_path, read_yaml
from utils.log import LOGGER

UNKNOWN_STRIDE = 64  # of files that do not say: no YOLOv5 needs more, and multiples of it are multiples of 32
UNKNOWN_SHAPE_HW = (640, 640)  # px, likewise
CHOSEN_COLUMNS = 6  # x1, y1, x2, y2, confidence, class; as many as the raw rows of a detector of one class have
UNKNOWN_MAX_DET = 300  # of such a list
STRIDES = (4, 8, 16, 32, 64, 128)
MAX_ANCHORS = 9  # per cell


class Graph(NamedTuple):
    """What a model's graph says of its input and output; None where it leaves a length open."""

    batch: int | None
    height: int | None
    width: int | None
    rows: int | None
    columns: int | None


def find_export(weights: str | Path) -> Path:
    """Returns the file or folder of an exported model.

    Raises:
        UserError: there is none; the nearest names beside it are shown. Or a file in the folder is a link out of it.
    """
    path = Path(weights)
    if isinstance(native_path(path), bytes):
        raise UserError(f"--weights {path}: runtimes take no path that is not UTF-8: rename the file or its folder.")
    if os.path.isfile(path):  # a pipe would be waited for; Path's own raise for names too long
        return path
    if os.path.isdir(path):
        refuse_links(path, path.rglob("*"))
        return path
    nearby = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    raise UserError(f"--weights {path}: no such file or folder.{did_you_mean(path.name, nearby)}")


def refuse_links(folder: Path, files: Iterable[Path]) -> None:
    """Makes sure that none of a model's files is a link out of its folder: a runtime would read what lies there.

    Raises:
        UserError: one is.
    """
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--weights {folder}: '{file.name}' is a link to {file.resolve()}, outside it: refused.")


def find_part(folder: Path, pattern: str, what: str) -> Path:
    """Returns the one file of a model's folder that fits a glob pattern.

    Raises:
        UserError: there is none, or several.
    """
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if len(found) != 1:
        have = f"{len(found)} of them" if found else "none"
        raise UserError(f"--weights {folder}: one {what} ({pattern}) is expected in this folder, there is {have}.")
    return found[0]


def require(module: str, packages: str, weights: str | Path) -> ModuleType:
    """Imports a runtime's library.

    Args:
        module: what to import.
        packages: what pip calls it.
        weights: the file that needs it, for the message.

    Raises:
        UserError: it is not installed, or does not work here.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == module.split(".")[0]:
            raise UserError(f"{weights} needs {packages}: pip install {packages}") from error
        raise UserError(f"{packages}, which {weights} needs, lacks {error.name}: pip install {error.name}") from error
    except ImportError as error:
        raise UserError(f"{packages}, which {weights} needs, cannot be loaded here ({error}): reinstall it.") from error


def cpu_only(device: str, runtime: str) -> None:
    """Refuses any other device than the CPU.

    Raises:
        UserError: another was named.
    """
    if device.strip().lower() not in ("", "cpu"):
        raise UserError(f"--device {device}: {runtime} runs on the CPU here. Leave --device out, or give cpu.")


def without_half(half: bool, runtime: str) -> None:
    """Says that --half changes nothing here, if it was given."""
    if half:
        LOGGER.warning(f"WARNING: --half: {runtime} computes in the precision of the file (export.py --half sets it).")


def thread_count() -> int:
    """Returns how many threads a runtime is to use: $OMP_NUM_THREADS, else all cores that this process may use."""
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Returns what the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def texts_of_yaml(path: Path) -> dict[str, str]:
    """Returns the texts of a YAML file beside a model, as `Metadata.from_texts` takes them."""
    content = read_yaml(path, as_text=("names",))
    return plain_texts(content) if isinstance(content, dict) else {}


def plain_texts(content: Mapping[Any, Any]) -> dict[str, str]:
    """Turns parsed values into the texts that they were written from: JSON for `metadata`, else Python's."""
    return {
        str(key): value if isinstance(value, str) else json.dumps(value) if key == "metadata" else str(value)
        for key, value in content.items()
    }


def describe(texts: Mapping[str, str], graph: Graph, where: str | Path, boxes_normalised: bool = False) -> Metadata:
    """Returns what a file says of itself, completed and checked by what its graph says.

    Files of other people's may say nothing: their classes are then called class0, class1, ...

    Args:
        texts: the texts found in the file.
        graph: lengths of its input (batch, height, width) and first output (rows, columns).
        where: the file, for messages.
        boxes_normalised: whether files of this format that are not ours have boxes as fractions of the image.

    Raises:
        UserError: the texts are damaged, or the output is not a YOLOv5 detector's.
    """
    found = Metadata.from_texts(texts, str(where))
    if found is not None and found.nms is None and texts.get("end2end", "").lower() == "true":
        if graph.columns != CHOSEN_COLUMNS:
            raise UserError(
                f"{where}: chooses boxes itself (metadata end2end), but its first output has {graph.columns} columns, "
                f"not the {CHOSEN_COLUMNS} of a detector: export it without that."
            )
        # Whatever it finds is in its list, which no overlap has shortened
        found = replace(found, nms=Suppression(0.0, 1.0, graph.rows or UNKNOWN_MAX_DET, agnostic=False))
    if found is None or found.nms is None:
        _check_rows(graph, where)
        if "metadata" not in texts:
            _check_not_chosen(graph, found, where)
        names = {number: f"class{number}" for number in range(graph.columns - 5)}
        found = found or Metadata({}, UNKNOWN_STRIDE, UNKNOWN_SHAPE_HW, licence="", preprocessing="")
        found = found if found.names else replace(found, names=names)
        if len(found.names) != len(names):
            raise UserError(
                f"{where}: names {len(found.names)} classes, but its rows tell {len(names)}: export it again."
            )
    if "metadata" not in texts:
        found = replace(found, boxes_normalised=boxes_normalised, shape_hw=UNKNOWN_SHAPE_HW)
    fixed = graph.height is not None and graph.width is not None
    shape_hw = (graph.height, graph.width) if fixed else found.shape_hw
    return replace(found, dynamic=not fixed, shape_hw=shape_hw, batch=graph.batch or 1)


def _check_rows(graph: Graph, where: str | Path) -> None:
    """Refuses outputs that are not rows [x, y, w, h, objectness, class probabilities].

    Raises:
        UserError: too few columns, or rows and columns have changed places, as in later YOLO versions.
    """
    if graph.columns is None or graph.columns < 6 or (graph.rows is not None and graph.rows < graph.columns):
        shape = f"{graph.rows or '?'} x {graph.columns or '?'}"
        raise UserError(
            f"{where}: its first output is {shape} per image, not rows of x, y, w, h, objectness and classes: "
            "this is no YOLOv5 detector, or one exported with --train."
        )


def _check_not_chosen(graph: Graph, said: Metadata | None, where: str | Path) -> None:
    """Refuses outputs that are boxes chosen inside, by rules that the file does not state.

    They may look like the raw rows of one class. Those are some for each cell of grids whose strides double.

    Raises:
        UserError: there are six columns, and more classes named than one, or rows that no grids have.
    """
    if graph.columns != CHOSEN_COLUMNS:
        return
    one_class = said is None or len(said.names) in (0, 1)
    if one_class and (graph.rows is None or graph.rows in _grid_rows(graph.height, graph.width)):
        return
    raise UserError(
        f"{where}: its first output is {graph.rows or '?'} x {graph.columns} per image, boxes that are chosen inside, "
        "but it does not say how (metadata end2end): export it without NMS, as rows of x, y, w, h, objectness and "
        "classes."
    )


def _grid_rows(height: int | None, width: int | None) -> set[int]:
    """Returns how many raw rows there can be for images of that size; none where it is open, as then they are too."""
    if height is None or width is None:
        return set()
    cells = [(height // stride) * (width // stride) for stride in STRIDES]
    levels = (sum(cells[first:last]) for last in range(2, len(cells) + 1) for first in range(last - 1))
    return {anchors * count for count in levels for anchors in range(1, MAX_ANCHORS + 1)}


def graph_of(input_shape: Sequence[Any], output_shape: Sequence[Any], channels_last: bool = False) -> Graph:
    """Reads the lengths of an input (b, 3, h, w) or (b, h, w, 3) and an output (b, n, columns); texts are open ones."""
    batch, height, width = (input_shape[axis] for axis in ((0, 1, 2) if channels_last else (0, 2, 3)))
    rows, columns = output_shape[1:] if len(output_shape) == 3 else (None, None)
    lengths = (batch, height, width, rows, columns)
    return Graph(*(length if isinstance(length, int) and length > 0 else None for length in lengths))
