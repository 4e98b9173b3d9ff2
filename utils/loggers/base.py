"""What every destination of a run's figures and images is, and the figures of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

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

    def close(self) -> None:
        """Writes what is still in memory, however the run ends."""


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
