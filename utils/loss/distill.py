"""Distillation while training: the maps that the head reads become like those of a trained teacher's.

PKD (Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
arXiv:2207.02039): what is compared of a channel is its pattern over the images and places of a batch, not its mean and
scale. The term is of training alone: it is no part of a head's loss (`utils.loss.base`), and validation has none.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.loss.base import BatchReduction, LossResult

TERM = "distill"  # as the columns bear it
EPS = 1e-6  # added to a channel's variance: a constant channel has no pattern


class Teacher:
    """A trained model, frozen, that gives the maps its head would read.

    Attributes:
        digest: of its weights, by which a resumed run knows it again.
    """

    def __init__(self, model: nn.Module, student: nn.Module, digest: str, source: str) -> None:
        """Takes the teacher and loses its head.

        Args:
            model: `models.yolo.Model` for inference, on the student's device; changed in place.
            student: the model that will be trained; as it is.
            digest: of the teacher's weights.
            source: the teacher's file, for messages.

        Raises:
            UserError: the heads read maps of other strides or widths.
        """
        self.digest = digest
        bodies = [_without_head(one) for one in (model, copy.deepcopy(student).eval())]
        side = math.lcm(*(int(stride) for one in bodies for stride in one.stride))
        image = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
        with torch.no_grad():
            found, wanted = (
                ", ".join(f"{maps.shape[1]} at stride {side // maps.shape[2]}" for maps in body(image))
                for body in bodies
            )
        if found != wanted:
            raise UserError(
                f"--teacher {source}: its head reads maps of other channels than this model's: {found}, not {wanted}. "
                "Choose a teacher of this model's size and levels."
            )
        self.body = model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns nl maps (b, c, ny, nx) of images (b, 3, h, w) of values 0 to 1."""
        return self.body(images)


def _without_head(model: nn.Module) -> nn.Module:
    """Lets a model, in place, return the maps that its head would read."""
    bare = nn.Identity()
    bare.i, bare.f = model.head.i, model.head.f
    model.model[-1] = bare
    return model


@contextlib.contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that takes the nl maps (b, c, ny, nx) that the head reads in a forward pass."""
    maps: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, arguments: maps.extend(arguments[0]))
    try:
        yield maps
    finally:
        hook.remove()


def with_distillation(
    loss: LossResult, maps: Sequence[Tensor], wanted: Sequence[Tensor], gain: float, reduction: BatchReduction | None
) -> LossResult:
    """Adds the term of `pearson_loss` to a batch's loss; `reduction` is what that was computed with."""
    term = gain * pearson_loss(maps, wanted, reduction)
    total = loss.total + term * loss.images * (1 if reduction is None else reduction.processes)
    return loss._replace(total=total, items=torch.cat((loss.items, term.detach()[None].to(loss.items.device))))


def pearson_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], reduction: BatchReduction | None = None
) -> Tensor:
    """Returns 1 - Pearson's r of each channel's values over a batch: mean over channels, sum over levels, () float32.

    Computed as half the mean squared difference of maps that are normalised to mean 0 and variance 1: the same but for
    `EPS`. The gradient goes to the student alone.

    Args:
        student: nl maps (b, c, ny, nx), any float type.
        teacher: as many of the same shapes.
        reduction: how to come to the whole batch's means and variances where this is a part of it; the gradient is then
            that of this part.
    """
    with torch.autocast(student[0].device.type, enabled=False):
        pairs = [
            [maps.float().permute(0, 2, 3, 1).flatten(0, 2) for maps in pair]
            for pair in zip(student, teacher, strict=True)
        ]
        channels = [s.shape[1] for s, _ in pairs]
        own = [torch.stack((s.sum(0), t.sum(0), s.new_full((s.shape[1],), len(s)))) for s, t in pairs]
        *sums, count = _summed(torch.cat(own, dim=1), reduction).detach()  # squares about a mean do not change with it
        means = (torch.stack(sums) / count).split(channels, dim=1)
        pairs = [(s - mean_s, t - mean_t) for (s, t), (mean_s, mean_t) in zip(pairs, means, strict=True)]
        own = [torch.stack(((s * s).sum(0), (t * t).sum(0), (s * t).sum(0))) for s, t in pairs]
        variance_s, variance_t, covariance = _summed(torch.cat(own, dim=1), reduction) / count
        scale_s, scale_t = (variance_s + EPS).rsqrt(), (variance_t + EPS).rsqrt()
        losses = (variance_s * scale_s**2 + variance_t * scale_t**2) / 2 - covariance * scale_s * scale_t
        return torch.stack([level.mean() for level in losses.split(channels)]).sum()


def _summed(own: Tensor, reduction: BatchReduction | None) -> Tensor:
    """Returns sums of any shape over all processes; their gradient goes to this process's own."""
    if reduction is None:
        return own
    own = own * reduction.weight
    whole = reduction.all_reduce_sum(own.detach().double().cpu().flatten()).view(own.shape).to(own)
    return own + (whole - own.detach())
