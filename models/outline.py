"""Models without weights: what building one would take, and what it does to shapes, before anything is paid for.

Inside `outlining` layers are made on torch's "meta" device, whose tensors have shapes and no values, and `run_hollow`
passes a batch of no images through them on the CPU, so that files made to fill the memory or to keep the processor busy
are refused at no cost. (To run layers on the meta device torch imports its compiler: a second of every start.) Limits
on a row's own numbers, which can be told without building it, are `models.config`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

# Far beyond any detector; in brackets what the largest of our models comes to.
MAX_LAYERS = 500  # rows, each times its repeats (80)
MAX_NUMBERS = 500_000_000  # parameters and statistics of all layers (144e6)
MAX_CALLS = 20_000  # of torch's functions for tensors, to build a model and to run it once (6e3)
MAX_MAP_NUMBERS = 1 << 24  # in what a layer makes of one image (0.3e6 at 128 px)


class _CallLimit(TorchFunctionMode):
    """Counts calls of torch's functions in this thread: layers that are small and very many cost time alone."""

    def __init__(self) -> None:
        """Starts at 0."""
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Passes a call on; those that return no tensor are free, for they may restore torch's state.

        Raises:
            ValueError: it is one too many.
        """
        result = func(*args, **(kwargs or {}))
        self._calls += isinstance(result, Tensor)
        if self._calls > MAX_CALLS and isinstance(result, Tensor):
            raise ValueError(f"up to here the model takes more than {MAX_CALLS} operations, far more than any detector")
        return result


@contextmanager
def outlining() -> Iterator[None]:
    """Lets layers be made and run without memory and work; torch's generators stay as they are."""
    with torch.device("meta"), _CallLimit():
        yield


def run_hollow(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a model that was made in `outlining`, on the CPU: each of its tensors stands for one number, repeated."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    with torch.device("cpu"):
        zero = torch.zeros(())
        hollow = {name: zero.expand(tensor.shape) for name, tensor in tensors}
        return functional_call(model, hollow, args, kwargs)


def numbers_of(layer: nn.Module) -> int:
    """Returns how many numbers a layer holds."""
    return sum(tensor.numel() for tensor in chain(layer.parameters(), layer.buffers()))


class Totals:
    """What the layers of a model come to."""

    def __init__(self) -> None:
        """Starts at 0."""
        self._layers = self._numbers = 0

    def add(self, layer: nn.Module, repeats: int) -> None:
        """Adds a row's layer, made of `repeats` equal ones.

        Raises:
            ValueError: with it the model is larger than any detector, or it is none for pictures.
        """
        if any(isinstance(part, nn.Conv2d) and part.weight.dim() != 4 for part in layer.modules()):
            raise ValueError("a kernel has one side or two")
        self._layers += repeats
        self._numbers += numbers_of(layer)
        for what, found, limit in (
            ("layers, repeats counted,", self._layers, MAX_LAYERS),
            ("parameters and statistics,", self._numbers, MAX_NUMBERS),
        ):
            if found > limit:
                raise ValueError(f"up to here it has {found:,} {what} more than any detector (at most {limit:,})")


def check_map(output: Any) -> None:
    """Refuses layers whose output, a map (b, c, h, w) or several, is empty or no memory would hold.

    Raises:
        ValueError: it has no numbers, or more than any detector's.
    """
    maps = output if isinstance(output, (list, tuple)) else [output]
    numbers = sum(math.prod(one.shape[1:]) for one in maps if isinstance(one, Tensor))
    if numbers == 0:
        raise ValueError("makes a map without cells")
    if numbers > MAX_MAP_NUMBERS:
        raise ValueError(
            f"makes {numbers:,} numbers of one small image, more than any detector (at most {MAX_MAP_NUMBERS:,})"
        )


def strides_of(maps: Sequence[Tensor], side_px: int) -> list[float]:
    """Returns the pixels per cell of maps (b, na, h, w, no) made of a square image of `side_px`.

    Raises:
        ValueError: they are not whole, or not the same both ways.
    """
    strides = []
    for one in maps:
        height, width = one.shape[2:4]
        if height != width or side_px % height:
            raise ValueError(
                f"gets {height} x {width} cells of {side_px} x {side_px} px, and strides must be whole: use odd "
                "kernels, and strides that halve"
            )
        strides.append(side_px / height)
    return strides
