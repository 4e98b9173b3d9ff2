"""The labels of a data set in memory: a few flat arrays with offsets.

Lists of small arrays would be copied page by page into every worker process as their reference counts change; flat
arrays are shared. Reading the files is `utils.data.labels`' work, keeping the result on disk `utils.data.cache`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import numpy as np


class PathList(Sequence[str]):
    """A read-only list of path strings kept in one byte buffer."""

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray):
        """Wraps `buffer`, uint8 (B,), in which string i is the bytes `offsets[i]` to `offsets[i + 1]`, int64 (N+1,)."""
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def from_strings(cls, paths: Iterable[str]) -> PathList:
        """Packs strings, keeping also those that the file system's encoding cannot express."""
        encoded = [os.fsencode(path) for path in paths]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets_of([len(item) for item in encoded]))

    def __len__(self) -> int:
        """Returns N."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> PathList: ...

    def __getitem__(self, index):
        """Returns a string, or for a slice a list of the same kind."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        position = range(len(self))[index]  # negative ones count from the end; IndexError beyond
        return os.fsdecode(self.buffer[self.offsets[position] : self.offsets[position + 1]].tobytes())

    def take(self, indices: np.ndarray) -> PathList:
        """Returns the strings at `indices`, int (K,), in that order."""
        flat, offsets = gather_runs(self.offsets, indices)
        return PathList(self.buffer[flat], offsets)


class Counts(NamedTuple):
    """What a scan found; `found` counts label files, empty ones included, and `corrupt` the images left out."""

    found: int = 0
    missing: int = 0
    empty: int = 0
    corrupt: int = 0
    total: int = 0

    def __str__(self) -> str:
        """Returns the counts as progress lines show them."""
        return f"{self.found} found, {self.missing} missing, {self.empty} empty, {self.corrupt} corrupt"

    def plus(self, other: Counts) -> Counts:
        """Returns the sums."""
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, eq=False)
class LabelTable:
    """N images with M labels in flat arrays.

    Attributes:
        image_paths: the N images' absolute paths.
        sizes_wh: int32 (N, 2), width and height in pixels after EXIF orientation.
        rows: float32 (M, 5), [class, x, y, w, h] per label, the box's centre and size in 0 to 1 of the image.
        offsets: int64 (N+1,); image i has the rows `offsets[i]` to `offsets[i + 1]`.
        seg_points: float32 (P, 2), polygon points in 0 to 1 of the image.
        seg_offsets: int64 (M+1,); row j has the points `seg_offsets[j]` to `seg_offsets[j + 1]`, none for a plain box.
        counts: what the scan found.
        messages: one line per image left out and per file with something to say.
    """

    image_paths: PathList
    sizes_wh: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    seg_points: np.ndarray
    seg_offsets: np.ndarray
    counts: Counts = Counts()
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.image_paths)

    def labels(self, index: int) -> np.ndarray:
        """Returns image `index`'s labels, a float32 (n, 5) view of `rows`."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def segments(self, index: int) -> list[np.ndarray]:
        """Returns image `index`'s polygons, one float32 (k, 2) view per label; k is 0 for a plain box."""
        bounds = self.seg_offsets[self.offsets[index] : self.offsets[index + 1] + 1]
        return [self.seg_points[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

    def with_single_class(self) -> LabelTable:
        """Returns a table whose labels are all of class 0 (`--single-cls`)."""
        rows = self.rows.copy()
        rows[:, 0] = 0
        return replace(self, rows=rows)

    def subset(self, indices: Sequence[int] | np.ndarray) -> LabelTable:
        """Returns the images at `indices`, in that order, with their labels; counts and messages stay the scan's."""
        indices = np.asarray(indices, np.int64)
        row_index, offsets = gather_runs(self.offsets, indices)
        point_index, seg_offsets = gather_runs(self.seg_offsets, row_index)
        return replace(
            self,
            image_paths=self.image_paths.take(indices),
            sizes_wh=self.sizes_wh[indices],
            rows=self.rows[row_index],
            offsets=offsets,
            seg_points=self.seg_points[point_index],
            seg_offsets=seg_offsets,
        )


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where runs of `lengths`, int (N,), begin and end: int64 (N+1,), the first 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


def gather_runs(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picks runs of a flat array.

    Args:
        offsets: int64 (N+1,), where the runs begin and end.
        indices: int (K,), the runs wanted.

    Returns:
        The flat positions of all their elements, int64, and the new offsets, int64 (K+1,).
    """
    starts = offsets[:-1][indices]
    new_offsets = offsets_of(offsets[1:][indices] - starts)
    flat = np.repeat(starts - new_offsets[:-1], np.diff(new_offsets)) + np.arange(new_offsets[-1])
    return flat, new_offsets
