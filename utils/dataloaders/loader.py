"""Batches: `create_dataloader`, worker processes, and how items are joined (`--quad` included).

A loader's batches depend on its seed, the epoch and whether that has mosaics, not on the number of workers; resuming at
an epoch's beginning takes no more than `set_epoch`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from torch import distributed
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.dataloaders.dataset import Batch, Item, LoadImagesAndLabels
from utils.dataloaders.images_cache import ImageSource, Machine
from utils.dataloaders.labels import LabelTable
from utils.dataloaders.sampling import SampleKey, Shard, Stream, keyed_generator
from utils.errors import UserError
from utils.process import defer_signals, leave_signals_to_parent

QUAD = 4
QUAD_ENLARGE_PROBABILITY = 0.5


class BatchKeys(Sampler[list[SampleKey]]):
    """Yields the keys of each batch of an epoch, shuffled or in the data set's order; of several processes, its part.

    Attributes:
        epoch: of the next iteration.
        mosaic: whether that has mosaics, where the data set makes them.
    """

    def __init__(self, dataset: LoadImagesAndLabels, shuffle: bool, shard: Shard, unit: int) -> None:
        """Takes the data set, this process's place among those that share batches, and groups that stay together."""
        self.dataset, self.shuffle, self.shard, self.unit = dataset, shuffle, shard, unit
        self.epoch, self.mosaic = 0, True

    def __len__(self) -> int:
        """Returns the number of batches; the last may be short."""
        return -(-len(self.dataset) // self.dataset.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yields the keys of `epoch` as it is now, not as it is when the first of them is asked for."""
        return self._of(self.epoch, self.mosaic)

    def _of(self, epoch: int, mosaic: bool) -> Iterator[list[SampleKey]]:
        order = self.dataset.order(epoch) if self.shuffle else np.arange(len(self.dataset))
        for start in range(0, len(order), self.dataset.batch_size):
            indices = order[start : start + self.dataset.batch_size].tolist()
            part = self.shard.of(len(indices), self.unit)
            places = range(part.start, part.stop)
            yield [SampleKey(epoch, start + place, indices[place], mosaic) for place in places]


class BatchMaker(Dataset):
    """Makes whole batches; a user's mistake comes as its message, since an exception would lose its form on the way."""

    def __init__(self, dataset: LoadImagesAndLabels, quad: bool) -> None:
        """Takes the data set; `quad` makes one image, twice as large, of each four (`quad_items`)."""
        self.dataset, self.quad = dataset, quad

    def __getitem__(self, keys: Sequence[SampleKey]) -> Batch | str:
        """Returns the batch of some keys."""
        try:
            items = [self.dataset[key] for key in keys]
        except UserError as error:
            return str(error)
        return self.dataset.collate_fn(quad_items(items, keys, self.dataset.seed) if self.quad else items)


def quad_items(items: Sequence[Item], keys: Sequence[SampleKey], seed: int) -> list[Item]:
    """Makes one item, twice as high and wide, of each four.

    One time in two it is the first of the four enlarged, else all four: the first two on the left, one above the
    other, the other two on the right. A last group of fewer than four is filled up with its own items, in turn.
    """
    joined = []
    for start in range(0, len(items), QUAD):
        group = items[start : start + QUAD]
        generator = keyed_generator(Stream.QUAD, seed, keys[start].epoch, keys[start].position)
        if generator.random() < QUAD_ENLARGE_PROBABILITY:
            joined.append(enlarge_item(group[0]))
        else:
            joined.append(tile_items([group[slot % len(group)] for slot in range(QUAD)]))
    return joined


def enlarge_item(item: Item) -> Item:
    """Doubles an item's sides, bilinear."""
    enlarged = interpolate(item.image[None].float(), scale_factor=2.0, mode="bilinear", align_corners=False)[0]
    return item._replace(image=enlarged.round().to(torch.uint8), shapes=None)


def tile_items(items: Sequence[Item]) -> Item:
    """Tiles four items: 0 above 1 on the left, 2 above 3 on the right."""
    left, right = (torch.cat([items[slot].image, items[slot + 1].image], dim=1) for slot in (0, 2))
    targets = []
    for item, (column, row) in zip(items, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        moved = item.targets.clone()
        moved[:, 2:4] += torch.tensor([column, row])
        moved[:, 2:] *= 0.5
        targets.append(moved)
    return items[0]._replace(image=torch.cat([left, right], dim=2), targets=torch.cat(targets), shapes=None)


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch


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


class DetectionLoader:
    """Batches of a data set, epoch by epoch; its workers live on from one epoch to the next.

    Attributes:
        dataset: what they are made of.
        workers: its processes.
        keys: of each batch; `keys.epoch` is that of the next iteration, and each iteration counts on.
    """

    def __init__(
        self,
        dataset: LoadImagesAndLabels,
        *,
        workers: int,
        shuffle: bool = False,
        quad: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """See `create_dataloader`."""
        self.dataset = dataset
        self.workers = workers
        self.keys = BatchKeys(dataset, shuffle, shard or Shard(), QUAD if quad else 1)
        self._quad = quad
        self._loader: DataLoader | None = None
        self._ahead: Iterator[Batch | str] | None = None  # of `keys.epoch`, started but not entered yet

    def __len__(self) -> int:
        """Returns the number of batches; the last may be short."""
        return len(self.keys)

    @property
    def sampler(self) -> DetectionLoader:
        """What has `set_epoch`, as torch's distributed sampler: the loader itself."""
        return self

    def owns(self, index: int) -> bool:
        """Tells whether this process answers for the images of batch `index`, or stands in on another's."""
        size = self.dataset.batch_size
        return self.keys.shard.of(min(size, len(self.dataset) - index * size), self.keys.unit).own

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of an epoch; the next iteration is of the next one.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
            RuntimeError: a worker was killed; see `utils.errors`.
        """
        self.start()
        batches, self._ahead = self._ahead, None
        self.keys.epoch += 1
        return self._received(batches)

    def start(self) -> DetectionLoader:
        """Lets the workers begin with the epoch, ahead of its iteration; returns the loader."""
        with defer_signals():  # it may start processes
            if self._loader is None:
                self._loader = self._make_loader()
            if self._ahead is None:
                self._ahead = iter(self._loader)
        return self

    def set_epoch(self, epoch: int, mosaic: bool = True) -> None:
        """Says which epoch the next iteration is of, and whether it has mosaics; drops what was begun otherwise."""
        if (epoch, mosaic) != (self.keys.epoch, self.keys.mosaic):
            self._ahead = None
        self.keys.epoch, self.keys.mosaic = epoch, mosaic

    def set_image_weights(self, weights: np.ndarray) -> None:
        """Draws the coming epochs' images with replacement, by `weights` (N,); starts the workers anew."""
        self.close()
        self.dataset.set_image_weights(weights)

    def close(self) -> None:
        """Ends the worker processes; another iteration starts new ones."""
        with defer_signals():
            self._loader = self._ahead = None

    def _make_loader(self) -> DataLoader:
        """Makes torch's loader. Its own generator serves worker seeds that nothing here reads."""
        return DataLoader(
            BatchMaker(self.dataset, self._quad),
            batch_size=None,  # an item is a batch
            sampler=self.keys,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_initialized(),  # as where this process computes on a GPU, not where there is one
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(self.dataset.seed),
            persistent_workers=self.workers > 0,
        )

    @staticmethod
    def _received(batches: Iterator[Batch | str]) -> Iterator[Batch]:
        try:
            for batch in batches:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # a worker was killed handing over a batch
            raise RuntimeError("DataLoader worker exited unexpectedly while it handed over a batch") from error


@contextlib.contextmanager
def torch_distributed_zero_first(local_rank: int) -> Iterator[None]:
    """Lets the first process of a machine through the block before the others; alone (-1) it changes nothing."""
    if local_rank not in (-1, 0):
        distributed.barrier()
    yield
    if local_rank == 0:
        distributed.barrier()


def create_dataloader(
    path: LabelTable | str | Path | Sequence[str | Path],
    imgsz: int | tuple[int, int],
    batch_size: int,
    stride: int,
    single_cls: bool = False,
    hyp: Mapping[str, float] | Any = None,
    augment: bool = False,
    cache: bool | str | ImageSource | None = False,
    pad: float = 0.0,
    rect: bool = False,
    rank: int = -1,
    workers: int = 8,
    image_weights: bool = False,
    quad: bool = False,
    prefix: str = "",
    shuffle: bool = False,
    seed: int = 0,
    *,
    shard: Shard | None = None,
    machine: Machine | None = None,
    neighbours: int = 1,
) -> tuple[DetectionLoader, LoadImagesAndLabels]:
    """Makes a data set and its loader.

    Args:
        path, imgsz, batch_size, stride, single_cls, hyp, augment, cache, pad, rect, image_weights, prefix, seed,
            machine: see `LoadImagesAndLabels`.
        rank: this process among several that torch.distributed knows, -1 alone; `batch_size` is then each one's.
        workers: processes wanted; at most the machine's cores and the batch size are started, none for batches of 1.
        quad: join each four images to one of twice the size (`--quad`); batches have a quarter of the images.
        shuffle: draw a new order each epoch; with `rect` the order stays.
        shard: in place of `rank`, which part of every batch of `batch_size` images is this process's.
        neighbours: how many processes with loaders of their own share the machine's cores.

    Raises:
        UserError: see `LoadImagesAndLabels`; or a rank before torch.distributed was started.
    """
    if rank != -1:
        if not distributed.is_initialized():
            raise UserError(f"create_dataloader: rank={rank}, but torch.distributed.init_process_group was not called.")
        shard = Shard(distributed.get_rank(), distributed.get_world_size())
        batch_size *= shard.size
    shard = shard or Shard()
    with torch_distributed_zero_first(rank):  # the first writes the label cache, the others read it
        dataset = LoadImagesAndLabels(
            path,
            imgsz,
            batch_size,
            augment,
            hyp,
            rect,
            image_weights,
            cache,
            single_cls,
            stride,
            pad,
            prefix,
            seed,
            machine,
        )
    images = -(-dataset.batch_size // shard.size)
    workers = min(max((os.cpu_count() or 1) // neighbours, 1), images if images > 1 else 0, workers)
    shuffle = (shuffle or image_weights) and not dataset.rect
    return DetectionLoader(dataset, workers=workers, shuffle=shuffle, quad=quad, shard=shard), dataset


def full_size_loader(table: LabelTable, workers: int) -> DetectionLoader:
    """Makes a loader whose batches are single images (1, 3, h, w), each in its own size, for tiled evaluation.

    Args:
        table: images and labels.
        workers: processes wanted; at most the machine's cores are started.
    """
    return DetectionLoader(LoadImagesAndLabels(table, None, batch_size=1), workers=min(os.cpu_count() or 1, workers))


class InfiniteDataLoader(DataLoader):
    """torch's loader, whose workers live on from one epoch to the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of `torch.utils.data.DataLoader`."""
        super().__init__(*args, **{"persistent_workers": kwargs.get("num_workers", 0) > 0, **kwargs})
