"""The order of an epoch, the images of a mosaic, and class and image weights, from generators made of keys.

Everything here is a function of (seed, epoch, position), so that an item does not depend on how many processes load
it, on what was loaded before, or on whether a run was interrupted. No global generator is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

MAX_LANES = 8  # the usual largest number of worker processes; its divisors 1, 2, 4 and 8 share the lanes out evenly
WINDOW_BYTES = 192 * 2**20  # decoded images that one lane's window may need
RECENT_BYTES = 1536 * 2**20  # decoded images that all workers together may keep
MIN_WINDOW = 32


class Stream(IntEnum):
    """What a generator is for; part of its key, so that no two uses share their numbers."""

    ORDER = 1
    SAMPLE = 2
    QUAD = 3


class SampleKey(NamedTuple):
    """What a worker is asked for: the image `index`, which stands at `position` in the order of `epoch`."""

    epoch: int
    position: int
    index: int
    mosaic: bool = True  # whether its epoch has mosaics


class BatchSlice(NamedTuple):
    """The places in a batch, `start` to `stop`, that one process computes."""

    start: int
    stop: int
    own: bool  # False for a stand-in: another process answers for these images


class Shard(NamedTuple):
    """Which of the processes that share every batch a process is; alone by default."""

    rank: int = 0
    size: int = 1

    def of(self, count: int, unit: int = 1) -> BatchSlice:
        """Returns this process's part of a batch of `count` images, of which groups of `unit` stay together.

        Parts are as even as can be, the first ones the larger, and in the order of the processes. A process that is
        left without images stands in on one group of another's, so that all take the same steps.
        """
        units = -(-count // unit)
        base, larger = divmod(units, self.size)
        start = self.rank * base + min(self.rank, larger)
        stop = start + base + (self.rank < larger)
        own = stop > start
        if not own:
            start = self.rank % units
            stop = start + 1
        return BatchSlice(start * unit, min(stop * unit, count), own)


def keyed_generator(stream: Stream, seed: int, *numbers: int) -> np.random.Generator:
    """Returns a generator that depends on its arguments alone (Philox: Salmon et al., SC 2011)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((int(stream), seed, *numbers))))


def epoch_order(count: int, seed: int, epoch: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the image indices (count,) int64 of one epoch.

    Args:
        count: number of images.
        seed: the run's seed.
        epoch: number of the epoch.
        weights: (count,) not negative. With them the indices are drawn with replacement, each image in proportion to
            its weight (all alike where every weight is zero); without them the order is a permutation.
    """
    generator = keyed_generator(Stream.ORDER, seed, epoch)
    if weights is None:
        return generator.permutation(count)
    total = float(weights.sum())
    return generator.choice(count, size=count, p=weights / total if total > 0 else None)


@dataclass(frozen=True)
class MosaicSampler:
    """Where the partners of a mosaic (and of mixup) come from.

    Drawn from the whole data set, three partners cost three decoded images. So they are drawn, uniformly and with
    replacement, from a window of the epoch's order around the item, and workers remember what they decoded lately:
    each image is then decoded about once an epoch instead of four times. Batch b goes to worker b mod W, therefore
    the order is dealt out, batch by batch, to `lanes` (a power of two) and a window stays within its lane: for 1, 2, 4
    or 8 workers a lane always meets the same worker. With other numbers of workers the items are the same, but more
    images are decoded.

    What diversity is left: a data set of less than two windows (325 images at 640 px, 1309 at 320 px) keeps the
    classical choice, any image of the epoch. Beyond, each item has `window` images for its partners, 163 at 640 px: 4
    million ordered choices of three, each with its own centre, scale and shift, and every epoch shuffles anew who is
    near whom, so over a training each image meets all others. A batch of 16 shows about 53 different images in its 64
    quarters.

    Attributes:
        count: number of images, which is the number of positions in an epoch.
        batch_size: images in a batch.
        lanes: how many lanes the batches are dealt to.
        window: how many consecutive positions of a lane partners are drawn from.
    """

    count: int
    batch_size: int
    lanes: int
    window: int

    @classmethod
    def for_images(cls, count: int, batch_size: int, imgsz: int) -> MosaicSampler:
        """Chooses window and lanes for `count` images of long side `imgsz`; a matter of memory, not of the machine."""
        window = max(WINDOW_BYTES // (3 * imgsz * imgsz), MIN_WINDOW)
        share = count // max(window, batch_size)
        if share < 2:
            return cls(count, batch_size, lanes=1, window=count)
        return cls(count, batch_size, lanes=min(2 ** int(math.log2(share)), MAX_LANES), window=window)

    def draw(self, position: int, number: int, generator: np.random.Generator) -> np.ndarray:
        """Draws the positions (number,) int64 of the partners of the item at `position`, with replacement."""
        batch, within = divmod(position, self.batch_size)
        row, lane = divmod(batch, self.lanes)
        length = self._lane_length(lane)
        window = min(self.window, length)
        start = min(max(row * self.batch_size + within - window // 2, 0), length - window)
        rows, withins = np.divmod(generator.integers(start, start + window, size=number), self.batch_size)
        return (rows * self.lanes + lane) * self.batch_size + withins

    def recent_bytes(self, workers: int, imgsz: int) -> int:
        """Returns how many bytes of decoded images one of `workers` processes should keep (0: the main process)."""
        workers = max(workers, 1)
        lanes_met = self.lanes // math.gcd(self.lanes, workers)
        return min(lanes_met * self.window * 3 * imgsz * imgsz, RECENT_BYTES // workers)

    def _lane_length(self, lane: int) -> int:
        """Positions in a lane; the epoch's last batch may be short."""
        batches = math.ceil(self.count / self.batch_size)
        length = len(range(lane, batches, self.lanes)) * self.batch_size
        missing = batches * self.batch_size - self.count
        return length - missing if (batches - 1) % self.lanes == lane else length


def class_weights(classes: np.ndarray, nc: int) -> np.ndarray:
    """Returns weights (nc,) float64 inverse to how often each class occurs among (M,) labels, summing to nc.

    A class without labels counts as one with a single label.
    """
    counts = np.bincount(classes.astype(np.int64), minlength=nc).astype(np.float64)
    inverse = 1 / np.maximum(counts, 1)
    return inverse / inverse.sum() * nc


def image_weights(
    classes: np.ndarray, offsets: np.ndarray, weights_of_classes: np.ndarray, maps: np.ndarray
) -> np.ndarray:
    """Returns how likely each image is to be drawn, relative to the others.

    Args:
        classes: (M,) class of every label, image by image.
        offsets: (N + 1,) int64, image i has the labels offsets[i] to offsets[i + 1].
        weights_of_classes: (nc,) from `class_weights`.
        maps: (nc,) mAP50-95 of each class at the last validation; zeros before the first.

    Returns:
        (N,) float64, 0 for an image without labels; all ones where no image has any weight.
    """
    nc = len(weights_of_classes)
    wanted = weights_of_classes * (1 - np.asarray(maps, dtype=np.float64)) ** 2 / nc
    image_of_label = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    weights = np.bincount(image_of_label, weights=wanted[classes.astype(np.int64)], minlength=len(offsets) - 1)
    return weights if weights.any() else np.ones_like(weights)
