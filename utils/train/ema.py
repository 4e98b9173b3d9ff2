"""Exponential moving average of a model's weights, the copy that is validated and saved; early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from utils.log import LOGGER

Place = tuple[dict[str, Tensor | None], str]  # where a module keeps a tensor, which it may exchange for another


def places_of(model: nn.Module) -> list[Place]:
    """Returns the places of all tensors of a model's state dict, module by module."""
    places: list[Place] = []
    for module in model.modules():
        kept = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        places += [(module._parameters, name) for name in module._parameters] + [(module._buffers, n) for n in kept]
    return [(tensors, name) for tensors, name in places if tensors[name] is not None]


class ModelEMA:
    """Keeps a float32 average of a model's parameters and floating buffers (Tarvainen and Valpola 2017, 1703.01780).

    The decay rises from 0 to `decay`, so that the average follows a young model closely. Integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0) -> None:
        """Copies the model as it is.

        Args:
            model: bare (not wrapped for several processes), with its anchors and attributes as they are to stay.
            decay: what the decay rises to.
            tau: after this many updates it has reached 63 % of that.
            updates: updates that the copy has already had.
        """
        self.ema = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.tau = tau
        self.updates = updates
        self._followed: nn.Module | None = None  # whose tensors' places are in `_places`, beside the average's
        self._places: list[tuple[Place, Place]] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model; call it after every optimizer step."""
        self.updates += 1
        share = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        if model is not self._followed:
            self._followed = model
            self._places = list(zip(places_of(self.ema), places_of(model), strict=True))
        pairs = [(mine[name], its[key]) for (mine, name), (its, key) in self._places]
        floating = [(average, value.to(average.dtype)) for average, value in pairs if average.is_floating_point()]
        whole = [(average, value) for average, value in pairs if not average.is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*floating, strict=True)), share)
        if whole:
            torch._foreach_copy_(*map(list, zip(*whole, strict=True)))

    def load(self, state_dict: Mapping[str, Tensor], updates: int) -> None:
        """Takes over the average of an interrupted run: its state dict, exactly this model's, and its update count."""
        self.ema.load_state_dict(state_dict)
        self.updates = updates


class EarlyStopping:
    """Ends a run whose fitness has not improved for `patience` epochs; 0 never ends it."""

    def __init__(self, patience: int = 30) -> None:
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
