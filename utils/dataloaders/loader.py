"""Batches: worker processes, how items are joined (`--quad` included), and full-size images for tiled evaluation.

A loader's batches depend on (seed, epoch) alone, whatever the number of workers; resuming at an epoch's beginning takes
no more than `set_epoch`.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils.dataloaders.dataset import DetectionDataset, Item, ShapeInfo
from utils.dataloaders.images_cache import ImageFiles
from utils.dataloaders.labels import LabelTable
from utils.dataloaders.sampling import SampleKey, Shard, Stream, keyed_generator
from utils.errors import UserError
from utils.process import defer_signals, leave_signals_to_parent

QUAD = 4
QUAD_ENLARGE_PROBABILITY = 0.5


class Batch(NamedTuple):
    """B images with all their targets."""

    images: torch.Tensor  # uint8 (B, 3, H, W) RGB
    targets: torch.Tensor  # float32 (M, 6): image's number in the batch, class, x, y, w, h in 0 to 1
    paths: list[str]
    shapes: list[ShapeInfo | None]


@dataclass(frozen=True)
class Failure:
    """A user's mistake found in a worker process; sent in place of a batch, since an exception would lose its form."""

    message: str


class EpochSampler(Sampler[SampleKey]):
    """Yields the keys of one epoch, shuffled or in the data set's order."""

    def __init__(self, dataset: DetectionDataset, shuffle: bool) -> None:
        """Starts at epoch 0."""
        self.dataset = dataset
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        """Returns the number of keys in an epoch."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[SampleKey]:
        """Yields the keys of `epoch` as it is now."""
        order = self.dataset.order(self.epoch) if self.shuffle else np.arange(len(self.dataset))
        for position, index in enumerate(order.tolist()):
            yield SampleKey(self.epoch, position, index)


class ShareSampler(Sampler[list[SampleKey]]):
    """Cuts the keys of an epoch into batches and yields one process's part of each."""

    def __init__(self, keys: EpochSampler, batch_size: int, share: Shard, unit: int) -> None:
        """Takes the keys of all processes, the size of their common batches, and groups that stay together."""
        self.keys = keys
        self.batch_size = batch_size
        self.share = share
        self.unit = unit

    def __len__(self) -> int:
        """Returns the number of batches; the last may be short."""
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields the keys of each batch."""
        keys = iter(self.keys)
        while batch := list(itertools.islice(keys, self.batch_size)):
            part = self.share.of(len(batch), self.unit)
            yield batch[part.start : part.stop]


class GuardedDataset(Dataset):
    """Turns a user's mistakes into values that can leave a worker process."""

    def __init__(self, dataset: DetectionDataset) -> None:
        """Wraps `dataset`."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Item:
        """Returns the item of a key."""
        return self.dataset[key]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Item] | Failure:
        """Returns the items of a batch."""
        try:
            return [self.dataset[key] for key in keys]
        except UserError as error:
            return Failure(str(error))


@dataclass(frozen=True)
class Collate:
    """Joins items to a batch.

    Attributes:
        seed: the run's seed.
        quad: make one image, twice as large, of each four; see `quad_items`.
    """

    seed: int
    quad: bool = False

    def __call__(self, items: list[Item] | Failure) -> Batch | Failure:
        """Returns the batch; a failure passes."""
        if isinstance(items, Failure):
            return items
        return join_items(quad_items(items, self.seed) if self.quad else items)


def join_items(items: Sequence[Item]) -> Batch:
    """Stacks images, and joins targets with the image's number in column 0."""
    targets = torch.cat([item.targets for item in items])
    counts = torch.tensor([len(item.targets) for item in items])
    targets[:, 0] = torch.repeat_interleave(torch.arange(len(items)), counts)
    images = default_collate([item.image for item in items])  # into shared memory when in a worker
    return Batch(images, targets, [item.path for item in items], [item.shape for item in items])


def quad_items(items: Sequence[Item], seed: int) -> list[Item]:
    """Makes one item, twice as high and wide, of each four.

    One time in two it is the first of the four enlarged, else all four: the first two on the left, one above the
    other, the other two on the right. A last group of fewer than four is filled up with its own items, in turn.
    """
    joined = []
    for start in range(0, len(items), QUAD):
        group = items[start : start + QUAD]
        generator = keyed_generator(Stream.QUAD, seed, group[0].key.epoch, group[0].key.position)
        if generator.random() < QUAD_ENLARGE_PROBABILITY:
            joined.append(enlarge_item(group[0]))
        else:
            joined.append(tile_items([group[slot % len(group)] for slot in range(QUAD)]))
    return joined


def enlarge_item(item: Item) -> Item:
    """Doubles an item's sides, bilinear."""
    enlarged = interpolate(item.image[None].float(), scale_factor=2.0, mode="bilinear", align_corners=False)[0]
    return item._replace(image=enlarged.round().to(torch.uint8), shape=None)


def tile_items(items: Sequence[Item]) -> Item:
    """Tiles four items: 0 above 1 on the left, 2 above 3 on the right."""
    left, right = (torch.cat([items[slot].image, items[slot + 1].image], dim=1) for slot in (0, 2))
    targets = []
    for item, (column, row) in zip(items, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        moved = item.targets.clone()
        moved[:, 2:4] += torch.tensor([column, row])
        moved[:, 2:] *= 0.5
        targets.append(moved)
    return items[0]._replace(image=torch.cat([left, right], dim=2), targets=torch.cat(targets), shape=None)


def _start_worker(worker_id: int) -> None:
    """Prepares a worker process: one thread, and Ctrl-C and SIGTERM are the main process's to answer."""
    gc.freeze()  # a collection would write to, and so copy, every page of objects that it shares with its parent
    leave_signals_to_parent()
    sys.excepthook = _tell_error
    cv2.setNumThreads(0)


def _tell_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Shows what fails in a worker's threads, but not that the main process ended while it was handed a batch."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _received(batches: Iterator[Batch | Failure]) -> Iterator[Batch | Failure]:
    """Yields what workers hand over; one that is killed meanwhile shows as a lost connection."""
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        raise RuntimeError("DataLoader worker exited unexpectedly while it handed over a batch") from error


class DetectionLoader:
    """Batches of a data set, epoch by epoch; its workers live on from one epoch to the next."""

    def __init__(
        self, dataset: DetectionDataset, *, workers: int, shuffle: bool, quad: bool, share: Shard | None = None
    ) -> None:
        """See `create_loader`."""
        self.dataset = dataset
        self.workers = workers
        self.sampler = EpochSampler(dataset, shuffle)
        self.batches = ShareSampler(self.sampler, dataset.batch_size, share or Shard(), QUAD if quad else 1)
        self.collate = Collate(dataset.seed, quad)
        self._loader: DataLoader | None = None
        self._ahead: Iterator[Batch | Failure] | None = None  # of an iteration that was started but not entered yet

    @property
    def batch_size(self) -> int:
        """Items in a batch of all processes; with `quad` a batch's images are a quarter of them."""
        return self.dataset.batch_size

    def __len__(self) -> int:
        """Returns the number of batches; the last may be short."""
        return len(self.batches)

    def owns(self, index: int) -> bool:
        """Tells whether this process answers for the images of batch `index`, or stands in on another's."""
        count = min(self.batch_size, len(self.dataset) - index * self.batch_size)
        return self.batches.share.of(count, self.batches.unit).own

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of the epoch that was set.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
            RuntimeError: a worker was killed; see `utils.errors`.
        """
        self.start()
        batches, self._ahead = self._ahead, None
        for batch in _received(batches):
            if isinstance(batch, Failure):
                raise UserError(batch.message)
            yield batch

    def start(self) -> DetectionLoader:
        """Lets the workers begin with the epoch that was set, ahead of its iteration; returns the loader."""
        if self._loader is None:
            self._loader = self._make_loader()
        if self._ahead is None:
            with defer_signals():  # it may start processes
                self._ahead = iter(self._loader)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is of."""
        if epoch != self.sampler.epoch:
            self._ahead = None
        self.sampler.epoch = epoch

    def set_image_weights(self, weights: np.ndarray) -> None:
        """Draws the coming epochs' images with replacement, by `weights` (N,); starts the workers anew."""
        self.drop_workers()
        self.dataset.set_image_weights(weights)

    def drop_workers(self) -> None:
        """Ends the worker processes; another iteration starts new ones."""
        with defer_signals():
            self._loader = self._ahead = None

    close = drop_workers

    def _make_loader(self) -> DataLoader:
        """Makes torch's loader. Its own generator serves worker seeds that nothing here reads."""
        return DataLoader(
            GuardedDataset(self.dataset),
            batch_sampler=self.batches,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_initialized(),  # as where this process computes on a GPU, not where there is one
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(self.dataset.seed),
            persistent_workers=self.workers > 0,
        )


def create_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    workers: int,
    shuffle: bool,
    seed: int | None = None,
    quad: bool = False,
    share: Shard | None = None,
    neighbours: int = 1,
) -> DetectionLoader:
    """Makes the loader of a data set.

    Args:
        dataset: of N images.
        batch_size: the data set's own, over all processes; more than N counts as N.
        workers: processes wanted; at most the machine's cores and the batch size are started, none for batches of 1.
        shuffle: draw a new order each epoch; a data set with `rect` keeps its order.
        seed: the data set's own, which is the default.
        quad: join each four images to one of twice the size (`--quad`); batches have a quarter of the images.
        share: which part of every batch to load; all of it if None.
        neighbours: how many processes with loaders of their own share the machine's cores.

    Raises:
        ValueError: the batch size or the seed is not the data set's.
    """
    batch_size = max(min(batch_size, len(dataset)), 1)
    if batch_size != dataset.batch_size:
        raise ValueError(f"batch size {batch_size}, but the data set was made for batches of {dataset.batch_size}")
    if seed is not None and seed != dataset.seed:
        raise ValueError(f"seed {seed}, but the data set was made with seed {dataset.seed}")
    share = share or Shard()
    images = -(-batch_size // share.size)
    workers = min(max((os.cpu_count() or 1) // neighbours, 1), images if images > 1 else 0, workers)
    return DetectionLoader(dataset, workers=workers, shuffle=shuffle and not dataset.rect, quad=quad, share=share)


class FullSizeFiles(ImageFiles):
    """The image files themselves, decoded at each call, never resized."""

    def __init__(self, table: LabelTable) -> None:
        """Reads the images of `table`."""
        super().__init__(table, int(table.sizes_wh.max(initial=1)), augment=False)

    def size_wh(self, index: int) -> tuple[int, int]:
        """Returns the (width, height) of image `index`."""
        width, height = self.table.sizes_wh[index].tolist()
        return width, height


class FullSizeDataset(Dataset):
    """Whole pictures with their boxes, in the table's order.

    Attributes:
        table: images and labels.
        batch_size: 1, since pictures differ in size.
        seed: of no effect, as nothing is random.
    """

    batch_size = 1
    seed = 0

    def __init__(self, table: LabelTable) -> None:
        """Makes a data set of N images."""
        self.table = table
        self._files = FullSizeFiles(table)

    def __len__(self) -> int:
        """Returns N."""
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> Item:
        """Returns the item of a key.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
        """
        image = self._files.read(key.index)
        labels = self.table.labels(key.index)
        targets = np.concatenate((np.zeros((len(labels), 1), np.float32), labels), 1)
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        shape = ShapeInfo(image.shape[:2], (1.0, 1.0), (0.0, 0.0))
        return Item(torch.from_numpy(planes), torch.from_numpy(targets), self.table.image_paths[key.index], shape, key)


def full_size_loader(table: LabelTable, workers: int) -> DetectionLoader:
    """Makes a loader whose batches are single pictures (1, 3, h, w), each in its own size.

    Args:
        table: images and labels.
        workers: processes wanted; at most the machine's cores are started.
    """
    workers = min(os.cpu_count() or 1, workers)
    return DetectionLoader(FullSizeDataset(table), workers=workers, shuffle=False, quad=False)
