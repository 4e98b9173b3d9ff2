"""Early stopping."""

from __future__ import annotations

import math

from utils.log import LOGGER


class EarlyStopping:
    """Ends a run whose fitness has not improved for `patience` epochs; 0 never ends it."""

    def __init__(self, patience: int = 100) -> None:
        """Starts with no epoch seen."""
        self.patience = patience if patience > 0 else math.inf
        self.best_fitness = 0.0
        self.best_epoch = 0
        self.possible_stop = False  # the next epoch may be the last: validate and save it

    def __call__(self, epoch: int, fitness: float) -> bool:
        """Takes in an epoch's fitness and tells whether the run should end after it."""
        if fitness >= self.best_fitness:
            self.best_fitness, self.best_epoch = float(fitness), epoch
        waited = epoch - self.best_epoch
        self.possible_stop = waited >= self.patience - 1
        stop = waited >= self.patience
        if stop:
            LOGGER.info(
                f"Stopping early: no improvement in the last {self.patience} epochs, the best is epoch "
                f"{self.best_epoch} (best.pt). Another --patience changes this, 0 switches it off."
            )
        return stop

    def state_dict(self) -> dict[str, float | int | bool]:
        """Returns what must outlive an interruption; `patience` is an option of the run."""
        return {
            "best_fitness": self.best_fitness,
            "best_epoch": self.best_epoch,
            "possible_stop": self.possible_stop,
        }

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
        """Takes over the state of an interrupted run."""
        self.best_fitness = float(state["best_fitness"])
        self.best_epoch = int(state["best_epoch"])
        self.possible_stop = bool(state["possible_stop"])
