"""What every runtime offers: names, strides, and images in, predictions out. Free of torch."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from models.backends.metadata import Metadata
from utils.errors import UserError
from utils.files import native_path, read_yaml
from utils.log import LOGGER
from utils.nms import NMSConfig

Array = Any  # np.ndarray or torch.Tensor
LayerHook = Callable[[int, str, np.ndarray], None]  # (row of the model, block's name, output float32 (b, c, h, w))

AUGMENT_NEEDS_CHECKPOINT = "--augment is for checkpoints (.pt), not for exported models: give one, or leave it out."


class Backend(ABC):
    """A loaded model.

    Attributes:
        metadata: what the file says of itself.
        dynamic: whether images may be of any size that is a multiple of the stride; else all must be of
            `metadata.shape_hw`. Any number may come at a time: `infer` cuts and fills where the file takes a fixed one.
        device: where it runs, in words.
    """

    metadata: Metadata
    dynamic: bool
    device: str

    @property
    def names(self) -> dict[int, str]:
        """Class number to name."""
        return self.metadata.names

    @property
    def stride(self) -> int:
        """The largest stride; sides of the images must be multiples of it."""
        return self.metadata.stride

    @property
    def has_nms(self) -> bool:
        """Whether `infer` returns detections that were chosen inside the model, not raw rows."""
        return self.metadata.nms is not None

    @abstractmethod
    def preprocess(self, images: np.ndarray) -> Array:
        """Turns letterboxed images, uint8 (b, 3, h, w) RGB, into the runtime's input on its device."""

    @abstractmethod
    def infer(self, inputs: Array, visualize: LayerHook | None = None, augment: bool = False) -> Array:
        """Runs the model on preprocessed images.

        Args:
            inputs: what `preprocess` returned.
            visualize: called with every layer's output where the runtime shows them.
            augment: look at every image in several sizes, mirrored too, and return the rows of all (`models.yolo`).

        Returns:
            Rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities]; where `has_nms`, detections
            (b, max_det, 6) [x1, y1, x2, y2 in px, confidence, class], most confident first, filled up with zeros.
            Float32; the next call may write over them.

        Raises:
            UserError: `visualize` or `augment` on a runtime other than PyTorch, or images of a size that it does not
                take.
        """

    @abstractmethod
    def warm_up(self, height: int, width: int) -> None:
        """Runs once on an empty image where a device's first run is slow, so that it does not count."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device, so that a clock shows what a step took."""

    def predict(self, images: np.ndarray) -> Array:
        """Returns what `infer` returns for letterboxed images, uint8 (b, 3, h, w) RGB, as the caller's own."""
        found = self.infer(self.preprocess(images))
        return np.array(found) if isinstance(found, np.ndarray) else found


class ArrayBackend(Backend):
    """A runtime that takes and gives NumPy arrays; a subclass says how it is loaded and adds `run`.

    Attributes:
        batch: how many images the graph takes at a time; None for any number.
        most: how many at most, where any number up to it will do.
        channels_last: whether it reads (b, h, w, 3).
        input_dtype: what it reads.
    """

    batch: int | None
    most: int | None = None
    channels_last = False
    input_dtype: type[np.floating] = np.float32

    @abstractmethod
    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Runs the model once, with `batch` images where that is not None; returns float32 in the file's own units."""

    def preprocess(self, images: np.ndarray) -> np.ndarray:
        """Turns images, uint8 (b, 3, h, w) RGB, into values 0 to 1 in the model's layout."""
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        scaled = np.empty(images.shape, self.input_dtype)
        return np.divide(images, 255, out=scaled, dtype=self.input_dtype)

    def infer(self, inputs: np.ndarray, visualize: LayerHook | None = None, augment: bool = False) -> np.ndarray:
        """Runs the model, a fixed number of images at a time where it knows no other; see `Backend.infer`."""
        if visualize is not None:
            raise UserError("--visualize shows the layers of a checkpoint (.pt); an exported model hides its own.")
        if augment:
            raise UserError(AUGMENT_NEEDS_CHECKPOINT)
        height, width = inputs.shape[1:3] if self.channels_last else inputs.shape[2:4]
        self._check_shape(height, width)
        size = self.batch or min(self.most or len(inputs), len(inputs))
        found = self.run(inputs) if len(inputs) == size else self._run_in_parts(inputs, size)
        if self.metadata.boxes_normalised:
            found = np.array(found)  # what the runtime gave may be its own memory
            found[..., :4] *= np.array((width, height, width, height), np.float32)
        return found

    def warm_up(self, height: int, width: int) -> None:
        """Does nothing: on a CPU a first run costs hardly more than the next, and each size of image has its own."""

    def synchronize(self) -> None:
        """Returns at once: `run` waits for its result."""

    def joined(self, parts: Sequence[Array]) -> Array:
        """Returns the outputs of several runs as one."""
        return np.concatenate(parts)

    def filled(self, part: Array, missing: int) -> Array:
        """Returns inputs with `missing` empty images behind them."""
        return np.concatenate((part, np.zeros_like(part, shape=(missing, *part.shape[1:]))))

    def _run_in_parts(self, inputs: Array, size: int) -> Array:
        """Runs `size` images at a time, the last ones filled up with empty images."""
        parts = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            missing = size - len(part) if self.batch else 0
            found = self.run(self.filled(part, missing) if missing else part)[: len(part)]
            parts.append(np.array(found) if isinstance(found, np.ndarray) else found)
        return self.joined(parts)

    def _check_shape(self, height: int, width: int) -> None:
        """Refuses images that a fixed model cannot take."""
        if not self.dynamic and (height, width) != self.metadata.shape_hw:
            fixed = "x".join(map(str, self.metadata.shape_hw))
            raise UserError(
                f"this model was exported for images of {fixed} px (height x width), not {height}x{width}: "
                f"use --imgsz {' '.join(map(str, self.metadata.shape_hw))}, or export it with --dynamic."
            )


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
    """Returns the path of an exported model.

    Raises:
        UserError: it cannot be handed to native code, or a file in the folder is a link out of it.
    """
    path = Path(weights)
    if isinstance(native_path(path), bytes):
        raise UserError(f"--weights {path}: runtimes take no path that is not UTF-8: rename the file or its folder.")
    if path.is_dir():
        refuse_links(path, path.rglob("*"))
    return path


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
        found = replace(found, nms=NMSConfig(0.0, 1.0, graph.rows or UNKNOWN_MAX_DET, agnostic=False))
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


COMPILER = "triton"


def before_tensorflow() -> None:
    """Loads triton's compiler, where PyTorch has brought it along, so that TensorFlow finds it in place.

    Both carry LLVM. With TensorFlow loaded first, triton ends the process with a segmentation fault; and PyTorch loads
    triton by itself, late, for its exporter or torchvision. Where PyTorch is not in use, nothing is loaded.
    """
    if "torch" in sys.modules and "tensorflow" not in sys.modules and find_spec(COMPILER) is not None:
        importlib.import_module(COMPILER)
