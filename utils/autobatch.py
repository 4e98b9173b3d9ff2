"""AutoBatch (`--batch-size -1`): how many images a CUDA GPU can train on at once, measured.

A copy of the model is run forward and backward on a few small batches; the memory that they take lies on a straight
line, which says how many images fit. Not here: several GPUs, other devices (they have no memory of their own to fill).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.devices import resolve_amp
from utils.errors import UserError
from utils.log import LOGGER

SIZES = (1, 2, 4, 8, 16)  # images per batch that are measured
RESIDENT_COPIES = 3  # of the weights that training holds besides them: their average and, for Adam, two moments
LARGEST_BATCH = 1024
REPEATS = 3  # the allocator and the convolutions settle after the first run
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "valid cuDNN algorithm")  # as CUDA, cuBLAS and cuDNN put it


def check_train_batch_size(model: nn.Module, imgsz: int = 640, amp: str = "auto") -> int:
    """Returns the largest batch that trains on the model's GPU; arguments, result and errors of `autobatch`."""
    return autobatch(model, imgsz, amp=amp)


def autobatch(
    model: nn.Module, imgsz: int = 640, fraction: float = 0.9, batch_size: int = 16, amp: str = "auto"
) -> int:
    """Returns the largest batch that is expected to train within `fraction` of the free memory of the model's GPU.

    It is at least 1. The model is left as it is, and so are the random generators; what was measured with is freed.

    Args:
        model: the detector, on its device.
        imgsz: image side in px, a multiple of the model's stride.
        fraction: 0 to 1; the rest is for fragments and for labels.
        batch_size: the answer on other devices than CUDA GPUs.
        amp: mixed precision, as of `--amp`.

    Raises:
        UserError: a GPU too small for one image.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        LOGGER.info(f"AutoBatch: needs a CUDA GPU; using {batch_size} images a batch on {device.type}")
        return batch_size
    with torch.random.fork_rng(devices=[device]):
        return fit_to_memory(model, imgsz, resolve_amp(amp, device), CudaMemory(device), fraction)


class CudaMemory:
    """The memory of a CUDA GPU, as PyTorch's allocator reserves it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        """Returns what neither this process nor another one uses."""
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs `work` and returns what the allocator reserved for it at the most."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - before


def fit_to_memory(
    model: nn.Module, imgsz: int, amp_dtype: torch.dtype | None, memory: Any, fraction: float = 0.9
) -> int:
    """Measures a copy of `model` in a `CudaMemory` and returns the batch size; see `autobatch`."""
    device = next(model.parameters()).device
    torch.cuda.empty_cache()
    free = memory.free_bytes()
    network = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    used, too_large = measure(functools.partial(train_step, network, imgsz, amp_dtype), memory)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    del network
    torch.cuda.empty_cache()
    if not used:
        raise UserError(
            f"--batch-size -1: not even one image of {imgsz} px fits into the {free / 1e9:.2f} GB that are free on "
            f"{device}. Choose a smaller --img-size or model."
        )
    batch_size = choose(used, too_large, free * fraction - weights * RESIDENT_COPIES)
    LOGGER.info(f"AutoBatch: {batch_size} images of {imgsz} px per batch for {free / 1e9:.2f} GB free on {device}")
    return batch_size


def train_step(network: nn.Module, imgsz: int, amp_dtype: torch.dtype | None, images: int) -> None:
    """Runs `network` forward and backward, as training does, on so many blank images."""
    device = next(network.parameters()).device
    batch = torch.zeros(images, network.yaml["ch"], imgsz, imgsz, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    try:
        for _ in range(REPEATS):
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                outputs = network(batch)
            sum(output.float().square().mean() for output in outputs).backward()
            network.zero_grad(set_to_none=True)
    finally:
        network.zero_grad(set_to_none=True)


def measure(run_batch: Callable[[int], None], memory: Any) -> tuple[dict[int, int], int | None]:
    """Runs batches of rising sizes, up to the first that runs out of memory.

    Returns:
        The bytes that each took, by images; the size that ran out of memory, if one did.
    """
    used: dict[int, int] = {}
    for size in SIZES:
        try:
            used[size] = memory.peak_bytes(functools.partial(run_batch, size))
        except RuntimeError as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            LOGGER.info(f"AutoBatch: {size} images run out of memory")
            return used, size
        LOGGER.info(f"AutoBatch: {size} images take {used[size] / 1e9:.3f} GB")
    return used, None


def choose(used: Mapping[int, int], too_large: int | None, budget_bytes: float) -> int:
    """Returns the batch size at which a straight line through what `measure` found meets the budget.

    It is at least 1, below what ran out of memory, and at most `LARGEST_BATCH`. One reading, or several that do not
    rise, make no line: then it is the largest size that was measured.
    """
    limit = LARGEST_BATCH if too_large is None else too_large - 1
    slope, intercept = np.polyfit(list(used), list(used.values()), 1) if len(used) > 1 else (0.0, 0.0)
    fitting = int((budget_bytes - intercept) / slope) if slope > 0 else max(used)
    return max(1, min(fitting, limit))
