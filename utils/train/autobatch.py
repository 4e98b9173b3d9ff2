"""`--batch-size -1`: how many images a CUDA GPU can train on at once, measured.

A copy of the model is run forward and backward on a few small batches; the memory that they take lies on a straight
line, which says how many images fit. Not here: several GPUs, other devices (they have no memory of their own to fill).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from utils.errors import UserError
from utils.log import LOGGER

SIZES = (1, 2, 4, 8, 16)  # images per batch that are measured
FRACTION = 0.9  # of the free memory is used; the rest is for fragments and for labels
RESIDENT_COPIES = 3  # of the weights that training holds besides them: their average and, for Adam, two moments
LARGEST_BATCH = 1024
REPEATS = 3  # the allocator and the convolutions settle after the first run
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "valid cuDNN algorithm")  # as CUDA, cuBLAS and cuDNN put it


class Reading(NamedTuple):
    """What one batch took."""

    images: int
    used_bytes: int


class Measured(NamedTuple):
    """The readings in rising order, and the first size that ran out of memory, if one did."""

    readings: list[Reading]
    too_large: int | None


class MemoryMeter(Protocol):
    """A device's memory."""

    def free_bytes(self) -> int:
        """Returns what is free for this process."""

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs `work` and returns what it took at the most beyond what was taken before."""

    def release(self) -> None:
        """Hands back what the process no longer uses."""


class CudaMeter:
    """The memory of a CUDA GPU, as PyTorch's allocator reserves it."""

    def __init__(self, device: torch.device) -> None:
        """Measures `device`."""
        self.device = device

    def free_bytes(self) -> int:
        """Returns what neither this process nor another one holds."""
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs `work` and returns what the allocator reserved for it."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - before

    def release(self) -> None:
        """Empties the allocator's cache."""
        torch.cuda.empty_cache()


def choose_batch_size(
    model: nn.Module, imgsz: int, device: torch.device, amp_dtype: torch.dtype | None, fraction: float = FRACTION
) -> int:
    """Returns the largest batch that is expected to train within `fraction` of the GPU's free memory, at least 1.

    The model is left as it is, and so are the random generators; what was measured with is freed.

    Args:
        model: the detector, on any device.
        imgsz: image side in pixels, a multiple of the model's stride.
        device: a CUDA device.
        amp_dtype: of automatic mixed precision; None for float32.
        fraction: of the free memory, 0 to 1.

    Raises:
        UserError: another device than CUDA, or a GPU too small for one image.
    """
    if device.type != "cuda":
        raise UserError(
            f"--batch-size -1 fills the memory of a CUDA GPU; this run computes on {device.type}. "
            "Name a number, for example --batch-size 16."
        )
    with torch.random.fork_rng(devices=[device]):
        return fit_to_memory(model, imgsz, device, amp_dtype, CudaMeter(device), fraction)


def fit_to_memory(
    model: nn.Module,
    imgsz: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    meter: MemoryMeter,
    fraction: float = FRACTION,
) -> int:
    """Measures a copy of `model` with `meter` and returns the batch size; arguments as of `choose_batch_size`.

    Raises:
        UserError: not even one image fits.
    """
    network = copy.deepcopy(model).to(device=device, memory_format=torch.channels_last).train()
    try:
        meter.release()
        free = meter.free_bytes()
        image_shape = (network.yaml["ch"], imgsz, imgsz)
        measured = measure(functools.partial(train_step, network, image_shape, device, amp_dtype), meter)
        weights = sum(parameter.nbytes for parameter in network.parameters())
    finally:
        del network
        meter.release()
    if not measured.readings:
        raise UserError(
            f"--batch-size -1: not even one image of {imgsz} px fits into the {free / 1e9:.2f} GB that are free on "
            f"{device}. Choose a smaller --img-size or model."
        )
    budget = free * fraction - weights * RESIDENT_COPIES
    batch_size = choose(measured, budget)
    LOGGER.info(f"AutoBatch: {batch_size} images of {imgsz} px per batch for {free / 1e9:.2f} GB free on {device}")
    return batch_size


def train_step(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    images: int,
) -> None:
    """Runs `network` forward and backward on `images` blank images of `image_shape` (channels, h, w)."""
    batch = torch.zeros(images, *image_shape, device=device).contiguous(memory_format=torch.channels_last)
    try:
        for _ in range(REPEATS):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = network(batch)
            sum(output.float().square().mean() for output in outputs).backward()
            network.zero_grad(set_to_none=True)
    finally:
        network.zero_grad(set_to_none=True)


def measure(run_batch: Callable[[int], None], meter: MemoryMeter, sizes: Sequence[int] = SIZES) -> Measured:
    """Runs batches of rising sizes and returns what they took, up to the first that runs out of memory."""
    readings: list[Reading] = []
    for size in sizes:
        try:
            used = meter.peak_bytes(functools.partial(run_batch, size))
        except RuntimeError as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            LOGGER.info(f"AutoBatch: {size} images run out of memory")
            return Measured(readings, size)
        LOGGER.info(f"AutoBatch: {size} images take {used / 1e9:.3f} GB")
        readings.append(Reading(size, used))
    return Measured(readings, None)


def choose(measured: Measured, budget_bytes: float) -> int:
    """Returns the batch size at which a straight line through the readings meets the budget.

    It is at least 1, below what ran out of memory, and at most `LARGEST_BATCH`. One reading, or several that do not
    rise, make no line: then it is the largest size that was measured.
    """
    sizes, used_bytes = zip(*measured.readings, strict=True)
    limit = LARGEST_BATCH if measured.too_large is None else measured.too_large - 1
    slope, intercept = np.polyfit(sizes, used_bytes, 1) if len(sizes) > 1 else (0.0, 0.0)
    fitting = int((budget_bytes - intercept) / slope) if slope > 0 else sizes[-1]
    return max(1, min(fitting, limit))
