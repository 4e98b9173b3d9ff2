"""What every runtime offers: names, strides, and images in, predictions out. Free of torch."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from models.backends.metadata import Graph, Metadata, describe
from models.raw import RawHead
from utils.errors import UserError
from utils.log import LOGGER

Array = Any  # np.ndarray or torch.Tensor
LayerHook = Callable[[int, str, np.ndarray], None]  # (row of the model, block's name, output float32 (b, c, h, w))

AUGMENT_NEEDS_CHECKPOINT = "--augment is for checkpoints (.pt), not for exported models: give one, or leave it out."
PROBE_PX = 64  # side of the blank image that shows the output's columns where the graph leaves them open


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
            augment: test-time augmentation (3 scales, flip): the rows of all views are returned (`models.yolo`).

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
    """A runtime that takes and gives NumPy arrays; a subclass loads a file, calls `take_description` and adds `run`.

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
    _raw: RawHead | None = None

    @abstractmethod
    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Runs the model once, with `batch` images where that is not None; returns float32 in the file's own units."""

    def rows(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Returns what `run` does, of a graph's outputs: the first one, or where it leaves decoding to the host, all.

        Raises:
            UserError: the outputs are not those that the file's metadata tells of.
        """
        if self._raw is None:
            return outputs[0].astype(np.float32, copy=False)
        try:
            return self._raw.decode(outputs, self.channels_last)
        except ValueError as error:
            raise UserError(f"the model's outputs do not fit its metadata ({error}): export it again.") from error

    def take_description(self, texts: Mapping[str, str], graph: Graph, path: Path, normalised: bool = False) -> None:
        """Sets what follows from a file's texts and its graph, whose columns are found by a run where they are open.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        said = Metadata.from_texts(texts, path)
        if said is not None and said.raw is not None:
            self._raw = said.raw
            graph = graph._replace(rows=None, columns=5 + said.raw.nc)
        if graph.columns is None:
            shape = (graph.batch or 1, 3, graph.height or PROBE_PX, graph.width or PROBE_PX)
            output = self.run(self.preprocess(np.zeros(shape, np.uint8)))
            graph = graph._replace(columns=output.shape[2] if output.ndim == 3 else None)
        self.metadata = describe(texts, graph, path, normalised)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch

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
        if not self.dynamic and (height, width) != self.metadata.shape_hw:
            fixed = "x".join(map(str, self.metadata.shape_hw))
            raise UserError(
                f"this model was exported for images of {fixed} px (height x width), not {height}x{width}: "
                f"use --imgsz {' '.join(map(str, self.metadata.shape_hw))}, or export it with --dynamic."
            )
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


def cannot_load(path: Path, runtime: str, reason: object) -> UserError:
    """Returns the error for a file that a runtime refuses, with the first line of the runtime's reason."""
    lines = str(reason).strip().splitlines()
    return UserError(f"--weights {path}: {runtime} cannot load it ({lines[0] if lines else 'no reason given'}).")


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


COMPILER = "triton"


def before_tensorflow() -> None:
    """Loads triton's compiler, where PyTorch has brought it along, so that TensorFlow finds it in place.

    Both carry LLVM. With TensorFlow loaded first, triton ends the process with a segmentation fault; and PyTorch loads
    triton by itself, late, for its exporter or torchvision. Where PyTorch is not in use, nothing is loaded.
    """
    if "torch" in sys.modules and "tensorflow" not in sys.modules and find_spec(COMPILER) is not None:
        importlib.import_module(COMPILER)
