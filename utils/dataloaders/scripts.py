"""`create_dataloader`, `LoadImagesAndLabels` and their kind, with the arguments and tuples that scripts know.

Batches are (images uint8 (b, 3, h, w) RGB, targets (m, 6), paths, shapes), `shapes` being ((h0, w0), ((ratio_h,
ratio_w), (pad_w, pad_h))) for each image, or None for a mosaic, as `scale_coords` wants them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from utils.augmentations.pixels import AugmentParams
from utils.dataloaders.dataset import DetectionDataset, Item, ShapeInfo
from utils.dataloaders.labels import PathList, load_labels
from utils.dataloaders.loader import DetectionLoader, create_loader
from utils.dataloaders.paths import image_to_label_path
from utils.dataloaders.sampling import SampleKey, Shard
from utils.errors import UserError

Shapes = tuple[tuple[int, int], tuple[tuple[float, float], tuple[float, float]]]
ItemTuple = tuple[Tensor, Tensor, str, Shapes | None]
BatchTuple = tuple[Tensor, Tensor, tuple[str, ...], tuple[Shapes | None, ...]]


def img2label_paths(img_paths: Sequence[str]) -> list[str]:
    """Returns the label file of each image."""
    return [image_to_label_path(path) for path in img_paths]


def exif_size(img: Image.Image) -> tuple[int, int]:
    """Returns an image's width and height as it is seen, its EXIF orientation considered."""
    return ImageOps.exif_transpose(img).size


def exif_transpose(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image)


def _nested(shape: ShapeInfo | None) -> Shapes | None:
    """Returns an image's shapes as 6.1 nests them."""
    return None if shape is None else (shape.original_hw, (shape.ratio_hw, shape.pad_wh))


class PerImage(Sequence):
    """Something of every image, looked up in the table of labels when it is asked for."""

    def __init__(self, look_up: Callable[[int], Any], count: int) -> None:
        """Takes what returns an image's entry, and the number of images."""
        self._look_up, self._count = look_up, count

    def __len__(self) -> int:
        """Returns the number of images."""
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        """Returns an image's entry, or a list of several; IndexError beyond the last."""
        found = range(self._count)[index]
        return [self._look_up(one) for one in found] if isinstance(index, slice) else self._look_up(found)


class LoadImagesAndLabels(DetectionDataset):
    """Images with boxes; `dataset[index]` gives (image uint8 (3, h, w), targets (n, 6), path, shapes).

    What is random in an item depends on `seed`, `epoch` and the index alone.

    Attributes:
        epoch: of items asked for by index; a loader of `create_dataloader` counts by itself.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        img_size: int = 640,
        batch_size: int = 16,
        augment: bool = False,
        hyp: Mapping[str, float] | None = None,
        rect: bool = False,
        image_weights: bool = False,
        cache_images: bool | str = False,
        single_cls: bool = False,
        stride: int = 32,
        pad: float = 0.0,
        prefix: str = "",
        seed: int = 0,
    ) -> None:
        """Finds images and reads their labels, through the label cache.

        Args:
            path: a folder or list file, or several.
            img_size: long side of the images, px.
            batch_size: of the loader; rectangular shapes are chosen by batch.
            augment: for training, as `hyp` says.
            hyp: hyperparameters, as in data/hyps.
            rect: give each batch the smallest shape that its images allow.
            image_weights: images will be drawn by weight, which goes without `rect`.
            cache_images: keep resized images in "ram" (or True) or on "disk".
            single_cls: make all labels class 0.
            stride: the model's.
            pad: added to rectangular shapes, in strides.
            prefix: goes before progress texts.
            seed: settles all that is random.

        Raises:
            UserError: no images, no labels, labels that are wrong, or `augment` without `hyp`.
        """
        if augment and hyp is None:
            raise UserError("augment=True needs hyp, the hyperparameters as in data/hyps.")
        sources = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
        super().__init__(
            load_labels(sources, single_cls=single_cls, prefix=prefix),
            img_size,
            augment=AugmentParams.from_hyp(hyp) if augment else None,
            rect=rect and not image_weights,
            batch_size=batch_size,
            stride=int(stride),
            pad=pad,
            seed=seed,
            cache="ram" if cache_images is True else cache_images or None,
            prefix=prefix,
        )
        self.epoch = 0

    def __getitem__(self, key: int | SampleKey) -> ItemTuple | Item:
        """Returns an item by its index, or for a loader of ours by its key."""
        if isinstance(key, SampleKey):
            return super().__getitem__(key)
        item = super().__getitem__(SampleKey(self.epoch, int(key), int(key)))
        return item.image, item.targets, item.path, _nested(item.shape)

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self)

    @property
    def indices(self) -> range:
        """Indices of the images."""
        return range(len(self))

    @property
    def img_size(self) -> int:
        """Long side of the images, px."""
        return self.imgsz

    @property
    def mosaic(self) -> bool:
        """Whether items are made into mosaics; set it before a loader starts its workers."""
        return self._mosaic

    @mosaic.setter
    def mosaic(self, value: bool) -> None:
        self._mosaic = value

    @property
    def im_files(self) -> PathList:
        """The images' paths."""
        return self.table.image_paths

    img_files = im_files

    @property
    def label_files(self) -> list[str]:
        """The label files' paths, whether there is a file or not."""
        return img2label_paths(self.im_files)

    @property
    def labels(self) -> PerImage:
        """Each image's labels, float32 (n, 5) [class, x, y, w, h in 0 to 1]."""
        return PerImage(self.table.labels, len(self))

    @property
    def segments(self) -> PerImage:
        """Each image's polygons, one float32 (k, 2) per label, in 0 to 1; k is 0 for a plain box."""
        return PerImage(self.table.segments, len(self))

    @property
    def shapes(self) -> np.ndarray:
        """Widths and heights of the images (N, 2), px."""
        return self.table.sizes_wh

    @staticmethod
    def collate_fn(batch: Sequence[ItemTuple]) -> BatchTuple:
        """Joins items to a batch, for a loader of torch's; targets get the image's number in column 0."""
        images, targets, paths, shapes = zip(*batch, strict=True)
        numbered = [rows.clone() for rows in targets]
        for number, rows in enumerate(numbered):
            rows[:, 0] = number
        return torch.stack(images), torch.cat(numbered), paths, shapes


class InfiniteDataLoader(DataLoader):
    """torch's loader, whose workers live on from one epoch to the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of `torch.utils.data.DataLoader`."""
        super().__init__(*args, **{"persistent_workers": kwargs.get("num_workers", 0) > 0, **kwargs})


class TupleLoader:
    """A `utils.dataloaders.loader.DetectionLoader` that yields tuples and counts its epochs by itself.

    Attributes:
        loader: the loader inside.
        epoch: of the next iteration.
    """

    def __init__(self, loader: DetectionLoader) -> None:
        """Starts at epoch 0."""
        self.loader, self.epoch = loader, 0

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[BatchTuple]:
        """Yields the batches of one epoch; the next iteration is of the next.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
        """
        self.loader.set_epoch(self.epoch)
        self.epoch += 1
        for images, targets, paths, shapes in self.loader:
            yield images, targets, tuple(paths), tuple(_nested(shape) for shape in shapes)

    @property
    def sampler(self) -> TupleLoader:
        """What has `set_epoch`, as torch's distributed sampler: the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is of."""
        self.epoch = epoch

    def set_image_weights(self, weights: np.ndarray) -> None:
        """Draws the coming epochs' images with replacement, by `weights` (N,)."""
        self.loader.set_image_weights(weights)


class DataAndLoader(NamedTuple):
    """What `create_dataloader` returns."""

    loader: TupleLoader
    dataset: LoadImagesAndLabels


@contextlib.contextmanager
def torch_distributed_zero_first(local_rank: int) -> Iterator[None]:
    """Lets the first process of a machine through the block before the others; alone (-1) it changes nothing."""
    if local_rank not in (-1, 0):
        distributed.barrier()
    yield
    if local_rank == 0:
        distributed.barrier()


def create_dataloader(
    path: str | Path | Sequence[str | Path],
    imgsz: int,
    batch_size: int,
    stride: int,
    single_cls: bool = False,
    hyp: Mapping[str, float] | None = None,
    augment: bool = False,
    cache: bool | str = False,
    pad: float = 0.0,
    rect: bool = False,
    rank: int = -1,
    workers: int = 8,
    image_weights: bool = False,
    quad: bool = False,
    prefix: str = "",
    shuffle: bool = False,
    seed: int = 0,
) -> DataAndLoader:
    """Makes the loader of a data set; arguments as of `LoadImagesAndLabels`, and:

    Args:
        path, imgsz, batch_size, stride, single_cls, hyp, augment, cache, pad, rect, image_weights, prefix, seed: see
            there.
        rank: this process among several, -1 alone; `batch_size` is then each one's, and torch.distributed tells the
            others.
        workers: processes that read, at most.
        quad: join each four images to one of twice the size.
        shuffle: draw a new order each epoch; with `rect` the order stays.

    Raises:
        UserError: see `LoadImagesAndLabels`; or a rank before torch.distributed was started.
    """
    share = _share(rank)
    common_batch = batch_size * share.size
    with torch_distributed_zero_first(rank):  # the first writes the label cache, the others read it
        dataset = LoadImagesAndLabels(
            path, imgsz, common_batch, augment, hyp, rect, image_weights, cache, single_cls, stride, pad, prefix, seed
        )
    loader = create_loader(
        dataset, common_batch, workers=workers, shuffle=shuffle or image_weights, quad=quad, share=share
    )
    return DataAndLoader(TupleLoader(loader), dataset)


def _share(rank: int) -> Shard:
    """Returns which part of every batch is this process's."""
    if rank == -1:
        return Shard()
    if not distributed.is_initialized():
        raise UserError(f"create_dataloader: rank={rank}, but torch.distributed.init_process_group was not called.")
    return Shard(distributed.get_rank(), distributed.get_world_size())
