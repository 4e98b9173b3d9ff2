"""Where a run's figures and images go: results.csv, and TensorBoard where it is installed.

Another destination is a subclass of `Logger` and a row of `LOGGERS`. Images are drawn elsewhere (`utils.plots`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.loggers.base import Logger
from utils.loggers.csv import ResultsCsv
from utils.loggers.tensorboard import open_tensorboard

LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Logger | None]] = {  # None: not to be had here
    "csv": ResultsCsv,
    "tensorboard": open_tensorboard,
}


def open_loggers(save_dir: Path, start_epoch: int, settings: Mapping[str, Any]) -> list[Logger]:
    """Opens all destinations that are to be had; arguments as of `Logger`."""
    opened = [open_logger(save_dir, start_epoch, settings) for open_logger in LOGGERS.values()]
    return [logger for logger in opened if logger is not None]
