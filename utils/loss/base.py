"""What every loss of a detection head is: named terms, weighed and added up.

A new loss is a class like `utils.loss.anchor_based.ComputeLoss`: it says the names of its `terms`, its `means` of a
batch and how to `weigh` them, and is a row of `utils.loss.LOSSES`. Float32, the parts of several processes and YOLOv5's
way of calling are here, for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.train.hyp import Hyp


class Mean(NamedTuple):
    """A mean before its division, so that it can be taken over several processes that share a batch."""

    total: Tensor  # () float32
    count: float | Tensor  # or a sum of weights, () without gradient

    def value(self) -> Tensor:
        """Returns the mean () float32; counts below 1 are taken for 1."""
        return self.total / (self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(self.count, 1))


class BatchReduction(NamedTuple):
    """How several processes that each compute a part of a batch come to the figures of the whole.

    Each divides the sums of its own part by the counts of all, and takes its total times the number of processes: the
    average of their gradients, which is what DistributedDataParallel makes, is then the gradient of the whole batch.
    """

    all_reduce_sum: Callable[[Tensor], Tensor]  # adds (n,) float64 on the CPU up over the processes
    processes: int
    weight: float = 1.0  # 0 for a part that another process answers for


class LossResult(NamedTuple):
    """What one batch costs and holds, over all processes that share it."""

    total: Tensor  # () float32 with gradient: the items' sum times the batch size, or see `BatchReduction`
    items: Tensor  # (n,) float32, detached: the terms in the order of `Loss.terms`, each with its gain
    labels: int
    images: int


class Loss:
    """A loss of raw outputs of a head and labels.

    Attributes:
        terms: the names of its n terms, as in "box": `train/box_loss` is a column of results.csv.
        gains: hyperparameters that `model.hyp` must hold.
        unread: hyperparameters that change YOLOv5's loss and have no effect here, with the value that leaves them off.
        hyp: the model's hyperparameters, already scaled (`scaled`).
        head: the model's detection head.
    """

    terms: tuple[str, ...] = ()
    gains: tuple[str, ...] = ()
    unread: Mapping[str, float | str] = {}

    def __init__(self, model: nn.Module) -> None:
        """Takes a `models.yolo.Model` with `hyp`, bare or wrapped for several GPUs.

        Raises:
            UserError: `model.hyp` is missing or lacks a gain.
        """
        model = getattr(model, "module", model)  # of DataParallel and its kind
        self.head = model.model[-1]
        self.hyp: dict[str, Any] = getattr(model, "hyp", None) or {}
        missing = [key for key in self.gains if key not in self.hyp]
        if missing:
            raise UserError(
                f"{type(self).__name__}: model.hyp lacks {', '.join(missing)}: set it before, as in data/hyps."
            )

    @staticmethod
    def scaled(hyp: Hyp, head: nn.Module, imgsz: int) -> Hyp:
        """Returns a file's hyperparameters fitted to a head and to images of `imgsz` px; here unchanged."""
        return hyp

    def means(self, outputs: Sequence[Tensor], targets: Tensor) -> list[Mean]:
        """Returns all means that the terms are made of, of this process's part of the batch.

        Args:
            outputs: the head's raw outputs, one (b, boxes per cell, ny, nx, channels) per level, any float type.
            targets: (N, 6) float32 [image index, class, x, y, w, h], boxes as fractions of the image; best on the CPU.
        """
        raise NotImplementedError

    def weigh(self, means: Sequence[Mean]) -> Tensor:
        """Returns the terms (n,) float32 with their gains; `means` are those of `means`, over all processes."""
        raise NotImplementedError

    def after_training_batch(self, means: Sequence[Mean]) -> None:
        """Called with the whole batch's means after each batch that is trained on; for losses that adapt."""

    def compute(
        self, outputs: Sequence[Tensor], targets: Tensor, reduction: BatchReduction | None = None
    ) -> LossResult:
        """Returns the loss of a batch; in float32, also under autocast.

        Args:
            outputs, targets: as of `means`.
            reduction: how to combine it with other processes, where this batch is a part of a common one.
        """
        with torch.autocast(outputs[0].device.type, enabled=False):
            whole = means = self.means(outputs, targets)
            images, labels = len(outputs[0]), len(targets)
            if reduction is None:
                terms = self.weigh(means)
                total, items = terms.sum() * images, terms.detach()
            else:
                means, whole, images, labels = _reduced(means, images, labels, reduction)
                total = self.weigh(means).sum() * images * reduction.processes
                items = self.weigh(whole)
        if total.requires_grad:  # training, not validation
            self.after_training_batch(whole)
        return LossResult(total, items, labels, images)

    def __call__(self, p: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns as YOLOv5 does the loss (1,), times the batch size, and its terms (n,) without gradient."""
        result = self.compute(p, targets)
        return result.total.reshape(1), result.items

    def state_dict(self) -> dict[str, Any]:
        """Returns what must outlive an interruption, as plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of an interrupted run."""


def _reduced(
    means: Sequence[Mean], images: int, labels: int, reduction: BatchReduction
) -> tuple[list[Mean], list[Mean], int, int]:
    """Adds sums, counts, images and labels up over the processes, in one exchange.

    Returns:
        This process's sums, with gradient, over all processes' counts; all processes' sums and counts; images; labels.
    """
    totals = torch.stack([mean.total for mean in means]) * reduction.weight
    numbers = (*(mean.count for mean in means), images, labels)
    counts = torch.stack([torch.as_tensor(number, dtype=torch.float64, device="cpu") for number in numbers])
    summed = reduction.all_reduce_sum(torch.cat((totals.detach().double().cpu(), counts * reduction.weight)))
    summed_totals = summed[: len(means)].to(totals.dtype)  # stay on the CPU
    *summed_counts, images, labels = summed[len(means) :].tolist()
    own, whole = (
        [Mean(total, count) for total, count in zip(sums, summed_counts, strict=True)]
        for sums in (totals.unbind(), summed_totals.unbind())
    )
    return own, whole, int(images), int(labels)
