"""Optimizer, and the schedule of a run: learning rates, warm-up, steps, where its mosaics end.

The learning rate, momentum and accumulation of an iteration are a function of the epoch and the batch alone
(`Schedule.at`), so a resumed run needs no scheduler state. The optimizer's own state is stored by parameter name.
The numbers are YOLOv5 6.1's, with the 100 iterations' warm-up floor of 7.0; clipping and stepping are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from utils.errors import UserError
from utils.log import LOGGER, colorstr
from utils.train.ema import EMA_TAU
from utils.train.hyp import Hyp

WARMUP_FLOOR = 100  # iterations of warm-up at least
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # the first: batch and instance norms


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], ...]:
    """Sorts a model's parameters, frozen ones too, by name into an optimizer's three groups.

    Returns:
        Weights of normalisation, vectors and scalars; the other weights, which alone are decayed; biases, which have a
        learning rate of their own during the warm-up.
    """
    undecayed, weights, biases = {}, {}, {}
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    of_norms = {id(parameter) for module in norms for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        vector = sum(side > 1 for side in parameter.shape) < 2  # (1, channels, 1, 1) is one number a channel
        named_weight = name.endswith("weight") and parameter.ndim > 1
        if name.endswith("bias"):
            biases[name] = parameter
        elif id(parameter) in of_norms or (vector and not named_weight):
            undecayed[name] = parameter
        else:
            weights[name] = parameter
    return undecayed, weights, biases


def accumulation(hyp: Hyp, batch_size: int) -> int:
    """Returns how many batches make an optimizer step of about `nominal_batch` images, at least 1."""
    return max(round(hyp.nominal_batch / batch_size), 1)


def scaled_weight_decay(hyp: Hyp, batch_size: int) -> float:
    """Returns the decay for the images that a step really holds; `weight_decay` is meant for the nominal batch."""
    return hyp.weight_decay * batch_size * accumulation(hyp, batch_size) / hyp.nominal_batch


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Makes the optimizer of a training run and logs its groups.

    Args:
        model: whose parameters are trained.
        name: "SGD" (with Nesterov momentum), "Adam" or "AdamW".
        lr: initial learning rate.
        momentum: SGD's momentum, Adam's first beta.
        weight_decay: for the weights group alone, already scaled (`scaled_weight_decay`).
    """
    undecayed, weights, biases = groups = parameter_groups(model)
    settings = [
        {"params": list(group.values()), "weight_decay": decay}
        for group, decay in zip(groups, (0.0, weight_decay, 0.0), strict=True)
    ]
    own = {"momentum": momentum, "nesterov": momentum > 0} if name == "SGD" else {"betas": (momentum, 0.999)}
    LOGGER.info(
        f"{colorstr('optimizer:')} {name} with parameter groups {len(undecayed)} weight (no decay), "
        f"{len(weights)} weight, {len(biases)} bias"
    )
    return getattr(torch.optim, name)(settings, lr=lr, **own)


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Returns what an optimizer of `build_optimizer` remembers, as plain data.

    Returns:
        {"name": the optimizer's, "state": {parameter name: {"momentum_buffer": tensor, ...}}}.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(parameter)]: dict(memory) for parameter, memory in optimizer.state.items()}
    return {"name": type(optimizer).__name__, "state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Gives an optimizer of `build_optimizer` the memory that `optimizer_state_by_name` returned.

    Learning rates, momentum and decay stay as they are: they follow from the options.

    Raises:
        UserError: the state is another optimizer's, or of parameters or shapes that the model does not have.
    """
    kind = type(optimizer).__name__
    if saved["name"] != kind:
        raise UserError(
            f"the checkpoint holds the state of {saved['name']}, the run uses {kind}: pass --optimizer {saved['name']}."
        )
    parameters = dict(model.named_parameters())
    for name, memory in saved["state"].items():
        if name not in parameters:
            raise UserError(f"the checkpoint's optimizer state is of another model: this one has no '{name}'.")
        shape = parameters[name].shape
        for key, value in memory.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != shape:
                raise UserError(
                    f"the checkpoint's optimizer state is of another model: {key} of '{name}' has the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(shape)}."
                )
    names = [name for group in parameter_groups(model) for name in group]
    state = {index: saved["state"][name] for index, name in enumerate(names) if name in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class StepSettings(NamedTuple):
    """What an iteration is trained with."""

    lrs: tuple[float, float, float]  # of the undecayed, weights and biases groups
    momentum: float
    accumulate: int  # iterations an optimizer step


def fitting_epochs(hours: float, epoch_s: float, finish_s: float, most: int) -> int:
    """Returns how many epochs of `epoch_s` seconds, and a finish, fit into `hours`: at least 1, at most `most`."""
    return max(int(min((hours * 3600 - finish_s) / epoch_s, most)), 1)


def lr_factor(epoch: float, epochs: int, lrf: float, cosine: bool = False) -> float:
    """Returns the learning rate of an epoch as a fraction of the initial one: from 1 down to `lrf` after `epochs`."""
    if cosine:
        return (1 - math.cos(math.pi * epoch / epochs)) / 2 * (lrf - 1) + 1
    return (1 - epoch / epochs) * (1 - lrf) + lrf


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum and accumulation over a run, and what else is a share of it."""

    hyp: Hyp
    epochs: int
    batches: int  # an epoch
    batch_size: int  # images an iteration, over all processes
    cosine: bool = False

    @property
    def warmup_iterations(self) -> int:
        """The last iteration of the warm-up, counted from the start of the run."""
        if self.hyp.warmup_ratio:
            return round(self.hyp.warmup_ratio * self.epochs * self.batches)
        return max(round(self.hyp.warmup_epochs * self.batches), WARMUP_FLOOR)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; the last batch of an epoch always steps."""
        warming = min(self.warmup_iterations // self.batches + 1, self.epochs)
        steps = (self.epochs - warming) * math.ceil(self.batches / accumulation(self.hyp, self.batch_size))
        for epoch in range(warming):
            gathered = 0
            for batch in range(self.batches):
                gathered += 1
                if gathered >= self.at(epoch, batch).accumulate or batch + 1 == self.batches:
                    steps, gathered = steps + 1, 0
        return steps

    @property
    def ema_tau(self) -> float:
        """Time constant of the moving average, in updates."""
        return self.hyp.ema_tau * self.steps if self.hyp.ema_tau else EMA_TAU

    def has_mosaic(self, epoch: int) -> bool:
        """Tells whether an epoch may have mosaics: all but the last `close_mosaic` of them."""
        return epoch < self.epochs - round(self.hyp.close_mosaic * self.epochs)

    def at(self, epoch: int, batch: int) -> StepSettings:
        """Returns the settings of a batch, both counted from 0.

        The warm-up runs in straight lines to the epoch's learning rate. What it ends at holds until the epoch is
        over; every later epoch has the rate of the one before it, as YOLOv5's scheduler is one step behind.
        """
        hyp, iteration, warmup = self.hyp, epoch * self.batches + batch, self.warmup_iterations
        warmed_before = epoch * self.batches > warmup
        factor = lr_factor(max(epoch - 1, 0) if warmed_before else epoch, self.epochs, hyp.lrf, self.cosine)
        lr = hyp.lr0 * factor
        if iteration > warmup:
            return StepSettings((lr, lr, lr), hyp.momentum, accumulation(hyp, self.batch_size))

        def between(start: float, end: float) -> float:
            return end if iteration == warmup else start + (end - start) * (iteration / warmup)

        rising = between(0.0, lr)
        accumulate = max(round(between(1.0, hyp.nominal_batch / self.batch_size)), 1)
        momentum = between(hyp.warmup_momentum, hyp.momentum)
        return StepSettings((rising, rising, between(hyp.warmup_bias_lr, lr)), momentum, accumulate)


def apply_settings(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Gives an optimizer of `build_optimizer` the settings of an iteration; Adam's betas stay as they are."""
    for group, lr in zip(optimizer.param_groups, settings.lrs, strict=True):
        group["lr"] = lr
        if "momentum" in group:
            group["momentum"] = settings.momentum
