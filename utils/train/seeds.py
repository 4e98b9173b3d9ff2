"""Several runs that differ in their seed alone (`train.py --seeds`), and one table of them, `seeds.csv`.

Each run has a folder of its own, `seed0` and so on, in that of the series.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.callbacks import Callbacks
from utils.errors import UserError
from utils.eval.evaluate import EvalResult
from utils.files import atomic_write, increment_path, read_yaml, run_folder, write_yaml
from utils.log import LOGGER, colorstr
from utils.loggers.base import METRICS
from utils.train.fingerprint import NOT_COUNTED
from utils.train.prepare import TrainConfig

FIGURES = ("seed", *METRICS, "fitness")
SPREAD = {"mean": np.mean, "std": lambda values, axis: np.std(values, axis, ddof=1), "min": np.min, "max": np.max}


def run_seeds(
    config: TrainConfig, callbacks: Callbacks, train: Callable[[TrainConfig], Any]
) -> dict[int, list[float]] | None:
    """Trains with the seeds from `config.seed` on, `config.seeds` of them, and shows the table.

    With `config.resume` the series of that folder goes on: finished runs stay, an interrupted one is resumed.

    Returns:
        The figures of each seed, as in the table; None where a callback stopped a run.

    Raises:
        UserError: there is no series to go on with, or it was begun with other options; what a run raises.
    """
    folder = _open_series(run_folder(config.project, config.name), config)
    config.save_dir = str(folder)
    for seed in range(config.seed, config.seed + config.seeds):
        if seed in read_table(folder):
            continue
        LOGGER.info(f"\n{colorstr('seeds:')} {seed}, one of {config.seeds} from {config.seed} on")
        last = folder / f"seed{seed}" / "weights" / "last.pt"
        resumed = bool(config.resume) and last.exists()
        own = {"seed": seed, "project": str(folder), "name": f"seed{seed}", "exist_ok": True, "save_dir": None}
        train(replace(config, **own, resume=str(last) if resumed else False))
        if callbacks.stop_training:
            return None
    table = read_table(folder)
    LOGGER.info(f"\n{_text(table)}\nTable saved to {colorstr('bold', folder / 'seeds.csv')}")
    return table


def _open_series(folder: Path, config: TrainConfig) -> Path:
    """Makes the series' folder, or checks that it can go on in it; returns it."""
    options = folder / "opt.yaml"
    if not config.resume:
        folder = increment_path(folder, exist_ok=config.exist_ok, mkdir=True)
        (folder / "seeds.csv").unlink(missing_ok=True)
        write_yaml(folder / "opt.yaml", vars(config))
        return folder
    if not options.is_file():
        raise UserError(f"--seeds --resume: no runs in {folder}. Name their folder with --project and --name.")
    before = read_yaml(options)
    for name, value in vars(config).items():
        if name not in {*NOT_COUNTED, "seeds"} and before.get(name, value) != value:
            raise UserError(
                f"--seeds --resume: --{name.replace('_', '-')} {value} differs from the {before[name]} of the runs in "
                f"{folder}. Repeat their options, or begin others with another --name."
            )
    return folder


def record_seed(folder: Path, seed: int, result: EvalResult) -> None:
    """Enters a run's final figures into the table of its series.

    Raises:
        UserError: the table cannot be read or written.
    """
    table = {**read_table(folder), seed: [*result.as_tuple()[:4], result.fitness]}
    with atomic_write(folder / "seeds.csv") as temporary:
        lines = [FIGURES, *((name, *(f"{value:.5f}" for value in row)) for name, row in _rows(table))]
        temporary.write_text("".join(",".join(map(str, line)) + "\n" for line in lines), encoding="utf-8")


def read_table(folder: Path) -> dict[int, list[float]]:
    """Returns the figures of each seed in the table of a series, as far as it is.

    Raises:
        UserError: it is none.
    """
    file = folder / "seeds.csv"
    if not file.exists():
        return {}
    try:
        rows = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        return {int(name): [float(cell) for cell in cells] for name, *cells in rows if name not in SPREAD}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a table of runs ({error}). Remove it to train them anew.") from error


def _rows(table: dict[int, list[float]]) -> list[tuple[str, list[float]]]:
    """Returns the rows of the table: the seeds in order, and of several their mean and spread."""
    rows = [(str(seed), table[seed]) for seed in sorted(table)]
    if len(rows) > 1:
        values = np.array([row for _, row in rows])
        rows += [(name, spread(values, axis=0).tolist()) for name, spread in SPREAD.items()]
    return rows


def _text(table: dict[int, list[float]]) -> str:
    """Returns the table for people."""
    heads = [name.removeprefix("metrics/") for name in FIGURES]
    lines = [heads, *([name, *(f"{value:.4f}" for value in row)] for name, row in _rows(table))]
    return "\n".join("".join(f"{cell:>14}" for cell in line) for line in lines)
