"""Figures of a run, epoch by epoch: results.csv, and TensorBoard where it is installed.

Pictures are drawn elsewhere (`utils.plots.training`, `utils.plots.evaluation`). `tensorboard` is imported only when a
`TensorBoard` is made.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import shlex
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_write, native_path
from utils.log import LOGGER, colorstr

COLUMNS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
)
HEADER = ",".join(f"{name:>20}" for name in ("epoch", *COLUMNS))


def epoch_values(train_items: Sequence[float], validation: Sequence[float], lrs: Sequence[float]) -> list[float]:
    """Puts an epoch's 13 values in the order of `COLUMNS`.

    Args:
        train_items: mean box, objectness and class loss.
        validation: precision, recall, mAP50, mAP50-95, and the three losses.
        lrs: learning rates of the three parameter groups.
    """
    values = [float(value) for value in (*train_items, *validation, *lrs)]
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(COLUMNS)} values are expected, got {len(values)}")
    return values


class ResultsCsv:
    """results.csv: a header and one row an epoch, in YOLOv5's columns and widths.

    The first row drops those of epochs still to come, rows cut short, and repetitions, so that the file of a resumed
    run holds every epoch once whatever moment it was killed at. Until then the file stays as it was found.
    """

    def __init__(self, path: str | Path, start_epoch: int = 0) -> None:
        """Takes the file, which need not be there, and the first epoch that will be appended."""
        self.path = Path(path)
        self._start_epoch: int | None = start_epoch  # None once it is written to

    def append(self, epoch: int, values: Sequence[float]) -> None:
        """Adds an epoch's row: `values` in the order of `COLUMNS`.

        Raises:
            UserError: the file cannot be read or written.
        """
        row = ",".join(f"{value:20.5g}" for value in (epoch, *values))
        if self._start_epoch is not None:
            rows = (HEADER, *self._rows_before(self._start_epoch), row)
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8", newline="\n")
            self._start_epoch = None
            return
        try:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(f"{row}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}).") from error

    def _rows_before(self, start_epoch: int) -> list[str]:
        """Returns the file's whole rows of epochs below `start_epoch`, the latest of each epoch, in order."""
        if start_epoch <= 0 or not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        rows = {}
        for line in text.split("\n")[:-1]:  # what follows the last newline is a row cut short
            epoch = _epoch_of(line)
            if epoch is not None and epoch < start_epoch:
                rows[epoch] = line
        return [rows[epoch] for epoch in sorted(rows)]


def _epoch_of(line: str) -> int | None:
    """Returns the epoch of a whole row, None for the header and for anything else."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS) + 1:
        return None
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return None
    return int(numbers[0])


class TensorBoard:
    """Event files in a run's folder: the values of each epoch, the model's graph, pictures.

    The first that is logged opens a file and hides what other files of the folder hold from the start epoch on. A run
    does not depend on them: where they cannot be written a warning says so, once.
    """

    def __init__(self, save_dir: str | Path, start_epoch: int = 0) -> None:
        """Takes the run's folder and the first epoch that will be logged."""
        from torch.utils.tensorboard import SummaryWriter

        self._warned = False
        self._former_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._open = functools.partial(SummaryWriter, str(save_dir), purge_step=start_epoch)

    @functools.cached_property
    def _writer(self) -> Any:
        """The event file, opened when it is first needed."""
        return self._open()

    def log_epoch(self, epoch: int, values: Sequence[float]) -> None:
        """Logs an epoch's values, in the order of `COLUMNS`."""
        with self._told():
            for name, value in zip(COLUMNS, values, strict=True):
                self._writer.add_scalar(name, value, epoch)

    def log_graph(self, model: nn.Module, images: Tensor) -> None:
        """Logs the graph of a copy of the model, traced on the first of (b, 3, h, w) float images."""
        traced = copy.deepcopy(model).eval()
        try:
            with self._told(), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing warns of every shape that it bakes in
                self._writer.add_graph(torch.jit.trace(traced, images[:1], strict=False, check_trace=False), [])
        except RuntimeError as error:
            LOGGER.warning(f"WARNING: TensorBoard: no graph of the model ({str(error).strip().splitlines()[0]})")

    def log_images(self, images: Mapping[str, np.ndarray], epoch: int) -> None:
        """Logs pictures: {title: (h, w, 3) uint8 RGB}."""
        with self._told():
            for title, image in images.items():
                self._writer.add_image(title, image, epoch, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still in memory."""
        with self._told():
            if "_writer" in vars(self):
                self._writer.close()
        threading.excepthook = self._former_hook

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Warns of an event file that cannot be written."""
        try:
            yield
        except Exception as error:
            if not _is_of_writing(error):
                raise
            self._warn(error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Warns instead of showing a traceback when it is the writer's thread that fails, for the same reason."""
        if type(failure.thread).__module__.startswith("tensorboard.") and _is_of_writing(failure.exc_value):
            self._warn(failure.exc_value)
        else:
            self._former_hook(failure)

    def _warn(self, error: BaseException) -> None:
        """Says once that the event file cannot be written."""
        warned, self._warned = self._warned, True  # at once: the writer's thread and this one may both come here
        if not warned:
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
            LOGGER.warning(f"WARNING: TensorBoard: the event file cannot be written ({reason})")


def _is_of_writing(error: BaseException | None) -> bool:
    """Tells whether an error is one of the writer's files; TensorFlow, where it is installed, has errors of its own."""
    return isinstance(error, OSError) or type(error).__module__.startswith("tensorflow.")


def open_tensorboard(save_dir: str | Path, start_epoch: int = 0) -> TensorBoard | None:
    """Returns a TensorBoard of a run's folder, or None where `tensorboard` is not installed; says how to look at it."""
    prefix = colorstr("TensorBoard:")
    if importlib.util.find_spec("tensorboard") is None:
        LOGGER.info(f"{prefix} not installed ('pip install tensorboard' shows curves in a browser)")
        return None
    if isinstance(native_path(save_dir), bytes):
        LOGGER.warning(f"{prefix} WARNING: takes no folder whose name is not UTF-8; going on without it")
        return None
    # TensorBoard would import TensorFlow where there is one, which takes seconds and 400 MB; its own stub suffices.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        board = TensorBoard(save_dir, start_epoch)
    except ImportError as error:
        LOGGER.warning(f"{prefix} WARNING: installed but unusable ({error}); going on without it")
        return None
    command = f"tensorboard --logdir {shlex.quote(str(Path(save_dir).parent))}"
    LOGGER.info(f"{prefix} start with {command}, and view at http://localhost:6006/")
    return board
