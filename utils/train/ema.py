"""Exponential moving average of a model's weights, the copy that is validated and saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model; call it after every optimizer step."""
        self.updates += 1
        share = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        current = model.state_dict()
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for name, average in self.ema.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[name].to(average.dtype))
            else:
                average.copy_(current[name])
        torch._foreach_lerp_(averages, values, share)

    def load(self, state_dict: Mapping[str, Tensor], updates: int) -> None:
        """Takes over the average of an interrupted run: its state dict, exactly this model's, and its update count."""
        self.ema.load_state_dict(state_dict)
        self.updates = updates
