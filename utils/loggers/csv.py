"""results.csv."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write
from utils.loggers.base import Logger


class ResultsCsv(Logger):
    """results.csv: a header and one row an epoch, in YOLOv5's columns and widths.

    The first row drops those of epochs still to come, rows cut short, and repetitions, so that the file of a resumed
    run holds every epoch once whatever moment it was killed at. Until then the file stays as it was found.
    """

    def __init__(self, save_dir: Path, start_epoch: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        """Takes the run's folder, and the first epoch that will be logged."""
        self.path = Path(save_dir) / "results.csv"
        self._start_epoch: int | None = start_epoch  # None once it is written to

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Adds an epoch's row.

        Raises:
            UserError: the file cannot be read or written.
        """
        row = ",".join(f"{value:20.5g}" for value in (epoch, *figures.values()))
        if self._start_epoch is not None:
            header = ",".join(f"{name:>20}" for name in ("epoch", *figures))
            rows = (header, *self._rows_before(self._start_epoch, 1 + len(figures)), row)
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

    def _rows_before(self, start_epoch: int, columns: int) -> list[str]:
        """Returns the file's whole rows of epochs below `start_epoch`, the latest of each epoch, in order."""
        if start_epoch <= 0 or not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}).") from error
        rows = {}
        for line in text.split("\n")[:-1]:  # what follows the last newline is a row cut short
            epoch = _epoch_of(line, columns)
            if epoch is not None and epoch < start_epoch:
                rows[epoch] = line
        return [rows[epoch] for epoch in sorted(rows)]


def _epoch_of(line: str, columns: int) -> int | None:
    """Returns the epoch of a whole row, None for the header and for anything else."""
    try:
        numbers: Sequence[float] = [float(cell) for cell in line.split(",")]
    except ValueError:
        return None
    return int(numbers[0]) if len(numbers) == columns else None
