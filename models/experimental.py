"""Rarely used blocks, and the ensemble of several models.

They live under this name because saved YOLOv5 models refer to it. Arguments as in `models.common`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.common import Conv


def __getattr__(name: str) -> Any:
    """Finds `attempt_load`, which other people's programs import from here, where it is defined: above this file."""
    if name == "attempt_load":
        from models.inference.multibackend import attempt_load

        return attempt_load
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class CrossConv(nn.Module):
    """A k x k convolution split into 1 x k and k x 1, residual where `shortcut` is set and c1 = c2."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False):
        """Takes channels c1 in, c2 * e hidden and c2 out, kernel k, stride s, groups g of the second convolution."""
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, (1, k), (1, s))
        self.cv2 = Conv(c_, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class Sum(nn.Module):
    """Adds n maps of one shape; with `weight` all but the first are scaled by a learned factor between 0 and 2.

    Source: Tan et al., "EfficientDet", https://arxiv.org/abs/1911.09070.
    """

    def __init__(self, n: int, weight: bool = False):
        """Takes the number n of maps, and whether to weigh them."""
        super().__init__()
        self.weight = weight
        if weight:
            self.w = nn.Parameter(-torch.arange(1.0, n) / 2)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Maps n tensors (b, c, h, w) to one of the same shape."""
        factors = 2 * torch.sigmoid(self.w) if self.weight else [1.0] * (len(x) - 1)
        total = x[0]
        for factor, other in zip(factors, x[1:], strict=True):
            total = total + other * factor
        return total


class MixConv2d(nn.Module):
    """Convolutions of several sides beside each other, on all input channels.

    With `equal_ch` they share the output channels evenly, else such that they have about equally many weights.

    Source: Tan and Le, "MixConv", https://arxiv.org/abs/1907.09595.
    """

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (1, 3), s: int = 1, equal_ch: bool = True):
        """Takes channels c1 in and c2 out, the kernel sides k, the stride s."""
        super().__init__()
        channels = _even_shares(c2, len(k)) if equal_ch else _shares_of_equal_weight(c2, k)
        self.m = nn.ModuleList(
            nn.Conv2d(c1, share, side, s, side // 2, groups=math.gcd(c1, share), bias=False)
            for side, share in zip(k, channels, strict=True)
        )
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()
        self.default_act = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], dim=1)))


def _even_shares(total: int, parts: int) -> list[int]:
    """Splits `total` channels into `parts` as evenly as whole numbers allow."""
    owner = np.floor(np.linspace(0, parts - 1e-6, total)).astype(int)
    return np.bincount(owner, minlength=parts).tolist()


def _shares_of_equal_weight(total: int, sides: Sequence[int]) -> list[int]:
    """Splits `total` channels so that share * side^2 is about the same for every kernel side."""
    inverse_areas = 1 / np.square(np.asarray(sides, dtype=float))
    shares = (total * inverse_areas / inverse_areas.sum()).round().astype(int)
    shares[shares.argmax()] += total - shares.sum()  # what rounding gained or lost
    return shares.tolist()


class Ensemble(nn.ModuleList):
    """Several detectors as one: their detections are put beside each other, for NMS to merge.

    `names` are the last member's; `stride` is that of the member with the largest one.
    """

    @property
    def names(self) -> dict[int, str]:
        """Class names of the last member."""
        return self[-1].names

    @property
    def stride(self) -> Tensor:
        """Strides (nl,) of the member whose largest stride is the largest."""
        return max((member.stride for member in self), key=lambda stride: float(stride.max()))

    def forward(self, x: Tensor, augment: bool = False) -> tuple[Tensor, None]:
        """Maps images (b, 3, h, w) to (detections of all members (b, rows, 5 + nc), None); `augment` as in `Model`."""
        return torch.cat([member(x, augment)[0] for member in self], dim=1), None
