"""Where a run's figures and images go: results.csv, TensorBoard where it is installed, and what `--logger` asks for.

Another destination is a subclass of `Logger` and a row of `LOGGERS`, an experiment tracker a subclass of `Service` and
a row of `SERVICES`. Images are drawn elsewhere (`utils.plots`).
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError, did_you_mean
from utils.loggers.base import Logger, Service
from utils.loggers.clearml import ClearML
from utils.loggers.comet import Comet
from utils.loggers.csv import ResultsCsv
from utils.loggers.mlflow import MLflow
from utils.loggers.tensorboard import open_tensorboard
from utils.loggers.wandb import WandB

LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Logger | None]] = {  # None: not to be had here
    "csv": ResultsCsv,
    "tensorboard": open_tensorboard,
}
SERVICES: dict[str, type[Service]] = {service.name: service for service in (MLflow, WandB, ClearML, Comet)}


def check_services(names: Sequence[str]) -> None:
    """Refuses a `--logger` that there is none of, or whose client is not installed."""
    for name in names:
        if name not in SERVICES:
            hint = did_you_mean(name, SERVICES)
            raise UserError(f"--logger '{name}': one of {', '.join(SERVICES)} is expected.{hint}")
        if importlib.util.find_spec(SERVICES[name].package) is None:
            raise UserError(
                f"--logger {name} needs {SERVICES[name].package}, which is not installed: "
                f"pip install {SERVICES[name].package}"
            )


def open_loggers(save_dir: Path, start_epoch: int, settings: Mapping[str, Any]) -> list[Logger]:
    """Opens all destinations that are to be had, and those that `--logger` names; arguments as of `Logger`."""
    wanted = [*LOGGERS.values(), *(SERVICES[name] for name in dict.fromkeys(settings["opt"]["logger"]))]
    opened = []
    with contextlib.ExitStack() as stack:  # closes them where a later one cannot be opened
        for open_logger in wanted:
            logger = open_logger(save_dir, start_epoch, settings)
            if logger is not None:
                opened.append(logger)
                stack.callback(logger.close)
        stack.pop_all()
    return opened
