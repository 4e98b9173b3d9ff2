"""What every destination of a run's figures and images is, what experiment trackers share, an epoch's figures."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.errors import UserError
from utils.files import ROOT, read_yaml, write_yaml
from utils.log import LOGGER, colorstr

METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")


class Logger:
    """A destination; what it does not take it leaves as it is here. What it raises ends the run."""

    def __init__(self, save_dir: Path, start_epoch: int, settings: Mapping[str, Any]) -> None:
        """Opens it.

        Args:
            save_dir: the run's folder.
            start_epoch: the first epoch that will be logged; what is there of it or of later ones is another run's, or
                an interrupted one's.
            settings: the run's options and hyperparameters by name, as checkpoints hold them: "opt" and "hyp".
        """

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of `epoch_figures`; their names are the same in every epoch."""

    def log_graph(self, model: nn.Module, images: Tensor) -> None:
        """Takes the model and the first batch, (b, 3, h, w) float32 in 0 to 1; both stay as they are."""

    def log_images(self, files: Sequence[Path], epoch: int) -> None:
        """Takes the images that the run has drawn, at its end."""

    def log_weights(self, file: Path) -> None:
        """Takes the checkpoint that the run ends with."""

    def close(self) -> None:
        """Writes what is still in memory, however the run ends."""


class Service(Logger, ABC):
    """An experiment tracker, asked for with `--logger`; a resumed run goes on in the entry that it had begun there.

    A subclass imports its client in `open`, and there keeps it off the network unless the client's own settings, as the
    user made them, say otherwise. A client that cannot start is a mistake of the user's; what it raises later is one
    warning, since no run depends on it.
    """

    name: str  # as of `--logger`
    package: str  # that is imported

    def __init__(self, save_dir: Path, start_epoch: int, settings: Mapping[str, Any]) -> None:
        """Opens it; arguments as of `Logger`.

        Raises:
            UserError: the client cannot start.
        """
        self.save_dir = save_dir
        project = Path(settings["opt"]["project"])
        self.project = "YOLOv5" if project == ROOT / "runs" / "train" else project.name  # as YOLOv5 names it
        self.settings = {f"{part}/{key}": value for part, values in settings.items() for key, value in values.items()}
        self._warned = False
        record = save_dir / "loggers.yaml"
        entries = read_yaml(record) if start_epoch and record.exists() else {}
        try:
            entry, told = self.open(entries.get(self.name))
        except Exception as error:
            reason = _first_line(error)
            raise UserError(f"--logger {self.name}: {reason}. Leave it out, or mend its settings.") from error
        write_yaml(record, {**entries, self.name: entry})
        LOGGER.info(f"{colorstr(f'{self.name}:')} {told}")

    @abstractmethod
    def open(self, entry: str | None) -> tuple[str, str]:
        """Starts the client, with the entry of a run that is resumed; returns the entry, and what to tell the user."""

    @abstractmethod
    def send_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Takes an epoch's figures."""

    @abstractmethod
    def send_image(self, file: Path, epoch: int) -> None:
        """Takes an image."""

    @abstractmethod
    def send_weights(self, file: Path) -> None:
        """Takes a checkpoint."""

    @abstractmethod
    def end(self) -> None:
        """Ends the entry; nothing is lost that was taken."""

    def log_epoch(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Logs an epoch's figures."""
        with self._warning():
            self.send_figures(epoch, figures)

    def log_images(self, files: Sequence[Path], epoch: int) -> None:
        """Logs images under their files' names."""
        for file in files:
            with self._warning():
                self.send_image(file, epoch)

    def log_weights(self, file: Path) -> None:
        """Logs the checkpoint that the run ends with."""
        with self._warning():
            self.send_weights(file)

    def close(self) -> None:
        """Ends the entry."""
        with self._warning():
            self.end()

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Makes a warning of what the client raises, once."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                LOGGER.warning(f"WARNING: {self.name}: {_first_line(error)}; what it lacks is in {self.save_dir}")
            self._warned = True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def epoch_figures(
    terms: Sequence[str], train_items: Sequence[float], validation: Sequence[float], rates: Sequence[float]
) -> dict[str, float]:
    """Returns an epoch's figures under YOLOv5's names, in its order.

    Args:
        terms: names of the loss's terms.
        train_items: their means over the epoch.
        validation: precision, recall, mAP50, mAP50-95, and the terms that are not of training alone: the first ones.
        rates: learning rates of the parameter groups.
    """
    validated = terms[: len(validation) - len(METRICS)]
    names = [f"train/{term}_loss" for term in terms]
    names += [*METRICS, *(f"val/{term}_loss" for term in validated), *(f"x/lr{group}" for group in range(len(rates)))]
    return dict(zip(names, map(float, (*train_items, *validation, *rates)), strict=True))
