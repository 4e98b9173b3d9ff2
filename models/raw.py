"""What `export.py --raw` leaves to the host: maps of scores become rows, in NumPy.

Compilers for NPUs want a graph of convolutions and activations, one scale for each tensor: boxes in pixels and scores
in one int8 tensor leave nothing of the scores. So such a file gives the maps of each level, scores after the sigmoid,
and its metadata holds a `RawHead` to decode them. The rows are those of `models.heads.Decoder`. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RawHead:
    """How the maps of a head are decoded.

    With anchors (`Detect`) a level has one map (b, na * (5 + nc), ny, nx) of values 0 to 1: by box of a cell x, y, w,
    h, objectness and class probabilities. Without (`DetectAF`) it has two, since their ranges differ: (b, 4 * bins, ny,
    nx) logits of the distances of the left, upper, right and lower side, and (b, nc, ny, nx) class probabilities.

    Attributes:
        nc: number of classes.
        strides: pixels per cell of each level.
        anchors: width and height in px of each level's anchors, (nl, na, 2); empty without anchors.
        bins: numbers that a distance is made of; 0 with anchors.
    """

    nc: int
    strides: tuple[float, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ()
    bins: int = 0

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> RawHead:
        """Reads the dictionary that `dataclasses.asdict` makes of one, possibly by way of JSON.

        Raises:
            LookupError, TypeError, ValueError: it is damaged.
        """
        strides, anchors = tuple(map(float, said["strides"])), np.asarray(said["anchors"], np.float64)
        if not strides or not min(strides) > 0 or (anchors.size and anchors.shape[::2] != (len(strides), 2)):
            raise ValueError(f"anchors of the shape {anchors.shape} with the strides {strides}")
        levels = tuple(tuple(map(tuple, level)) for level in anchors.tolist())
        return cls(int(said["nc"]), strides, levels, int(said["bins"]))

    @property
    def widths(self) -> list[int]:
        """Channels of each of a level's maps."""
        return [len(self.anchors[0]) * (5 + self.nc)] if self.anchors else [4 * self.bins, self.nc]

    def decode(self, maps: Sequence[np.ndarray], channels_last: bool = False) -> np.ndarray:
        """Returns rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities], float32.

        Rows come level by level, then by box of a cell, y, x. Where there is no objectness, that column holds ones.

        Args:
            maps: of all levels (b, channels, ny, nx), real numbers. They are told apart by their shapes, whatever their
                order; where two have the same (4 * bins = nc), boxes come first.
            channels_last: whether they are (b, ny, nx, channels).

        Raises:
            ValueError: a map is missing, or of another shape.
        """
        left = [np.moveaxis(part, -1, 1) if channels_last else part for part in maps]
        finest = max((part.shape[2:] for part in left), key=math.prod)
        height, width = (side * min(self.strides) for side in finest)
        decode = self._decode_anchors if self.anchors else self._decode_bins
        rows = []
        for level, stride in enumerate(self.strides):
            parts = []
            for channels in self.widths:
                wanted = (channels, round(height / stride), round(width / stride))
                place = next((place for place, part in enumerate(left) if part.shape[1:] == wanted), None)
                if place is None:
                    shapes = ", ".join("x".join(map(str, part.shape[1:])) for part in left)
                    raise ValueError(f"no map is {'x'.join(map(str, wanted))} (channels first); there are {shapes}")
                parts.append(left.pop(place))
            rows.append(decode(level, *parts))
        return np.concatenate(rows, axis=1)

    def _decode_anchors(self, level: int, scores: np.ndarray) -> np.ndarray:
        """Returns the rows of a level with anchors."""
        stride, anchors = self.strides[level], np.asarray(self.anchors[level], np.float32)
        batch, _, ny, nx = scores.shape
        split = scores.reshape(batch, len(anchors), 5 + self.nc, ny * nx)
        rows = np.empty((batch, len(anchors), ny * nx, 5 + self.nc), np.float32)
        columns = rows.swapaxes(2, 3)
        columns[:] = split
        columns[:, :, :2] = columns[:, :, :2] * np.float32(2 * stride) + _grid(ny, nx, stride, -0.5)
        columns[:, :, 2:4] = columns[:, :, 2:4] ** 2 * (4 * anchors[:, :, None])
        return rows.reshape(batch, -1, 5 + self.nc)

    def _decode_bins(self, level: int, logits: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Returns the rows of a level without anchors."""
        stride = self.strides[level]
        batch, _, ny, nx = scores.shape
        logits = logits.reshape(batch, 4, self.bins, ny * nx).astype(np.float32)
        weights = np.exp(logits - logits.max(2, keepdims=True))
        bins = np.arange(self.bins, dtype=np.float32)[:, None]
        distances = (weights * bins).sum(2) / weights.sum(2) * np.float32(stride)
        before, after = distances[:, :2], distances[:, 2:]
        rows = np.ones((batch, ny * nx, 5 + self.nc), np.float32)
        columns = rows.swapaxes(1, 2)
        columns[:, :2] = _grid(ny, nx, stride, 0.5) + (after - before) / 2
        columns[:, 2:4] = before + after
        columns[:, 5:] = scores.reshape(batch, self.nc, ny * nx)
        return rows


def _grid(ny: int, nx: int, stride: float, offset: float) -> np.ndarray:
    """Returns x and y in px of each cell's grid point, (2, ny * nx): `offset` cells from its upper left corner."""
    y, x = np.meshgrid(np.arange(ny, dtype=np.float32), np.arange(nx, dtype=np.float32), indexing="ij")
    return (np.stack((x, y)).reshape(2, -1) + np.float32(offset)) * np.float32(stride)
