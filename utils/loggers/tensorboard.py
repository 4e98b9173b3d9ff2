"""TensorBoard's event files. `tensorboard` is imported only when a `TensorBoard` is made."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import shlex
import sys
import threading
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.files import native_path
from utils.images import read_image
from utils.log import LOGGER, colorstr
from utils.loggers.base import Logger


class TensorBoard(Logger):
    """Event files in a run's folder: the figures of each epoch, the model's graph, images.

    The first that is logged opens a file and hides what other files of the folder hold from the start epoch on. A run
    does not depend on them: where they cannot be written a warning says so, once.
    """

    def __init__(self, save_dir: Path, start_epoch: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        """Takes the run's folder and the first epoch that will be logged."""
        from torch.utils.tensorboard import SummaryWriter

        self._warned = False
        self._former_hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._open = functools.partial(SummaryWriter, str(save_dir), purge_step=start_epoch)

    @functools.cached_property
    def _writer(self) -> Any:
        """The event file, opened when it is first needed."""
        return self._open()

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Logs an epoch's figures."""
        with self._warning_where_unwritable():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, epoch)

    def log_graph(self, model: nn.Module, images: Tensor) -> None:
        """Logs the graph of a copy of the model, traced on the first of (b, 3, h, w) float images."""
        traced = copy.deepcopy(model).eval()
        try:
            with self._warning_where_unwritable(), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # tracing warns of every shape that it bakes in
                self._writer.add_graph(torch.jit.trace(traced, images[:1], strict=False, check_trace=False), [])
        except RuntimeError as error:
            LOGGER.warning(f"WARNING: TensorBoard: no graph of the model ({str(error).strip().splitlines()[0]})")

    def log_images(self, files: Sequence[Path], epoch: int) -> None:
        """Logs images under their files' names."""
        with self._warning_where_unwritable():
            for file in files:
                self._writer.add_image(file.name, read_image(file)[..., ::-1], epoch, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still in memory."""
        with self._warning_where_unwritable():
            if "_writer" in vars(self):
                self._writer.close()
        threading.excepthook = self._former_hook

    @contextlib.contextmanager
    def _warning_where_unwritable(self) -> Iterator[None]:
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


def open_tensorboard(
    save_dir: Path, start_epoch: int = 0, settings: Mapping[str, Any] | None = None
) -> TensorBoard | None:
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
