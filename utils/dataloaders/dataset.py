"""`LoadImagesAndLabels`, the training and evaluation data set: a key in, an image with its targets out.

Covers: choosing mosaic or single image, letterbox, rectangular batch shapes, joining the augmentations, normalised
targets. An item is a function of the seed and its `SampleKey`, not of the process that makes it or of caches.
Reading label files is `utils.dataloaders.labels`' work, batching is `utils.dataloaders.loader`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from utils.augmentations import mixup, random_perspective
from utils.augmentations.mosaic import Tile, compose, place_four, place_nine
from utils.augmentations.pixels import AugmentParams, albumentations_available, augment_pixels, to_planes
from utils.augmentations.warp import random_matrix
from utils.boxes import xywh2xyxy, xyxy2xywhn
from utils.dataloaders.images_cache import ImageSource, Machine, RamImages, RecentImages, make_source
from utils.dataloaders.labels import LabelTable, PathList, load_labels
from utils.dataloaders.paths import img2label_paths
from utils.dataloaders.sampling import MosaicSampler, SampleKey, Stream, epoch_order, keyed_generator
from utils.errors import UserError
from utils.images import letterbox

CLIP_EPS = 1e-3  # px by which boxes stay inside the right and lower edges


class ShapeInfo(NamedTuple):
    """What leads from a letterboxed image back to the original, as `scale_boxes` takes it."""

    original_hw: tuple[int, int]
    ratio_pad: tuple[tuple[float, float], tuple[float, float]]  # (height, width) resized / original; (left, top) px


class Item(NamedTuple):
    """One image for the model."""

    image: torch.Tensor  # uint8 (3, h, w) RGB
    targets: torch.Tensor  # float32 (n, 6): 0 or the image's number in its batch, class, x, y, w, h in 0 to 1
    path: str
    shapes: ShapeInfo | None  # None for mosaics


class Batch(NamedTuple):
    """B images with all their targets."""

    images: torch.Tensor  # uint8 (B, 3, H, W) RGB
    targets: torch.Tensor  # float32 (M, 6): image's number in the batch, class, x, y, w, h in 0 to 1
    paths: tuple[str, ...]
    shapes: tuple[ShapeInfo | None, ...]


class LoadImagesAndLabels(Dataset):
    """Images with boxes; `dataset[index]`, or for a loader `dataset[key]`, is an `Item`.

    Attributes:
        table: images and labels; with `rect` in the order of the images' aspect ratios.
        n: number of images.
        indices: of the images.
        mosaic: whether items are made into mosaics; set it before a loader starts its workers.
        epoch: of items asked for by index; loaders count by themselves.
        batch_shapes_hw: int (batches, 2) with `rect`, else None.
        image_weights: (N,) or None; see `epoch_order`. Set through the loader.
    """

    def __init__(
        self,
        path: LabelTable | str | Path | Sequence[str | Path],
        img_size: int | tuple[int, int] | None = 640,
        batch_size: int = 16,
        augment: bool = False,
        hyp: Mapping[str, float] | Any = None,
        rect: bool = False,
        image_weights: bool = False,
        cache_images: bool | str | ImageSource | None = False,
        single_cls: bool = False,
        stride: int = 32,
        pad: float = 0.0,
        prefix: str = "",
        seed: int = 0,
        machine: Machine | None = None,
        plan: MosaicSampler | None = None,
    ) -> None:
        """Finds images and reads their labels, through the label cache.

        Args:
            path: a folder or list file, or several; or what `load_labels` read of them.
            img_size: long side of the images, px; for evaluation without `rect` also the (height, width) of all of
                them, or None to leave each in its own size.
            batch_size: images in a batch, over all processes; more than there are images counts as all.
            augment: for training, as `hyp` says.
            hyp: hyperparameters as in data/hyps: a mapping, or an object with such attributes.
            rect: give each batch the smallest shape that its images' aspect ratios allow; no mosaics then.
            image_weights: images will be drawn by weight, which goes without `rect`.
            cache_images: keep resized images in "ram" (or True) or on "disk"; they are read at once. Or the `images` of
                a data set of the same images in the same order, size and use.
            single_cls: make all labels class 0.
            stride: the model's; rectangular shapes are multiples of it.
            pad: added to rectangular shapes, in strides.
            prefix: goes before progress texts.
            seed: not negative; with epoch and position it settles all that is random.
            machine: of several processes with this data set on a machine the first one fills the cache, then the others
                come and use it; None for this one alone.
            plan: where mosaics find their partners; chosen by memory if None.

        Raises:
            UserError: no images, no labels, labels that are wrong, `augment` without `hyp`, an image that is gone, or
                no room for the cache.
        """
        if augment and hyp is None:
            raise UserError("augment=True needs hyp, the hyperparameters as in data/hyps.")
        rect = rect and not image_weights
        if not isinstance(img_size, int) and (rect or augment):
            raise ValueError(f"{img_size}: images of a given height and width are for evaluation without rect")
        table = path
        if not isinstance(path, LabelTable):
            sources = [path] if isinstance(path, (str, Path)) else path
            table = load_labels([Path(source) for source in sources], single_cls=single_cls, prefix=prefix)
        self.batch_size = max(min(batch_size, len(table)), 1)
        self.batch_shapes_hw = None
        if rect:
            order, self.batch_shapes_hw = rectangular_batches(
                table.sizes_wh, self.batch_size, img_size, int(stride), pad
            )
            table = table.subset(order)
        self.table = table
        self.img_size = img_size
        self.augment = augment
        self.hyp = AugmentParams.from_hyp(hyp) if augment else None
        self.rect = rect
        self.seed = seed
        self.n = len(table)
        self.indices = range(self.n)
        self.mosaic = augment and not rect and self.hyp.mosaic > 0
        self.epoch = 0
        self.image_weights: np.ndarray | None = None
        self.plan = plan or MosaicSampler.for_images(self.n, self.batch_size, img_size) if augment else None
        cache = "ram" if cache_images is True else cache_images or None
        self.images = make_source(table, img_size, augment, cache, prefix, machine)
        self.albumentations = augment and albumentations_available(prefix)
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order)
        self._recent: RecentImages | None = None

    def __len__(self) -> int:
        """Returns the number of images."""
        return self.n

    def __getstate__(self) -> dict:
        """Leaves out what a worker process makes for itself."""
        return {**self.__dict__, "_order": None, "_recent": None}

    def __getitem__(self, key: int | SampleKey) -> Item:
        """Returns an item by its index, or for a loader by its key.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
        """
        if not isinstance(key, SampleKey):
            key = SampleKey(self.epoch, int(key), int(key))
        generator = keyed_generator(Stream.SAMPLE, self.seed, key.epoch, key.position)
        shapes = None
        if self.mosaic and key.mosaic and generator.random() < self.hyp.mosaic:
            image, labels = self._mosaic(key, key.index, generator)
            if generator.random() < self.hyp.mixup:
                (other,) = self._partners(key, 1, generator)
                image, labels = mixup(image, labels, *self._mosaic(key, other, generator), generator)
        else:
            image, labels, segments, shapes = self._letterboxed(key.index)
            if self.augment:
                image, labels = random_perspective(image, labels, segments, *self.hyp.warp, generator=generator)
        height, width = image.shape[:2]
        boxes = xyxy2xywhn(labels[:, 1:], width, height, clip=True, eps=CLIP_EPS)
        if self.augment:
            planes, boxes = augment_pixels(image, boxes, self.hyp, generator, self.albumentations)
        else:
            planes = to_planes(image)
        targets = np.zeros((len(labels), 6), dtype=np.float32)
        targets[:, 1], targets[:, 2:] = labels[:, 0], boxes
        return Item(torch.from_numpy(planes), torch.from_numpy(targets), self.table.image_paths[key.index], shapes)

    @property
    def im_files(self) -> PathList:
        """The images' paths."""
        return self.table.image_paths

    img_files = im_files

    @property
    def label_files(self) -> list[str]:
        """The label files' paths, whether there is a file or not."""
        return img2label_paths(self.im_files)

    @cached_property
    def labels(self) -> list[np.ndarray]:
        """Each image's labels, float32 (n, 5) [class, x, y, w, h in 0 to 1]."""
        return [self.table.labels(index) for index in self.indices]

    @cached_property
    def segments(self) -> list[list[np.ndarray]]:
        """Each image's polygons, one float32 (k, 2) per label, in 0 to 1; k is 0 for a plain box."""
        return [self.table.segments(index) for index in self.indices]

    @property
    def shapes(self) -> np.ndarray:
        """Widths and heights of the images (N, 2), px."""
        return self.table.sizes_wh

    @staticmethod
    def collate_fn(batch: Sequence[Item]) -> Batch:
        """Stacks images, and joins targets with the image's number in column 0."""
        images, targets, paths, shapes = zip(*batch, strict=True)
        joined = torch.cat(targets)
        counts = torch.tensor([len(rows) for rows in targets])
        joined[:, 0] = torch.repeat_interleave(torch.arange(len(batch)), counts)
        return Batch(default_collate(list(images)), joined, paths, shapes)  # into shared memory when in a worker

    def set_image_weights(self, weights: np.ndarray) -> None:
        """Sets how often each image is wanted, weights (N,); worker processes must be started anew to learn of it."""
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (self.n,) or not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"image weights must be {self.n} finite numbers, none below 0; got {weights.shape}")
        self.image_weights = weights
        self._order = None

    def order(self, epoch: int) -> np.ndarray:
        """Returns the shuffled image indices (N,) of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self.n, self.seed, epoch, self.image_weights)
        return self._order[1]

    def recent_images(self) -> RecentImages:
        """Returns this process's memory of the images that it read last."""
        if self._recent is None:
            info = get_worker_info()
            max_bytes = self.plan.recent_bytes(info.num_workers if info else 0, self.img_size)
            self._recent = RecentImages(self.images, max_bytes)
        return self._recent

    def _labels_px(
        self, index: int, width: float, height: float, pad_wh: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns image `index`'s labels [class, xyxy] and polygons, px, where it is width x height at `pad_wh`."""
        rows = self.table.labels(index)
        labels = np.empty_like(rows)
        labels[:, 0] = rows[:, 0]
        labels[:, 1:] = xywh2xyxy(rows[:, 1:] * np.float32([width, height] * 2)) + np.float32(pad_wh * 2)
        if not len(self.table.seg_points):
            return labels, []
        polygons = (points * np.float32([width, height]) for points in self.table.segments(index))
        return labels, [points + np.float32(pad_wh) for points in polygons]

    def _partners(self, key: SampleKey, number: int, generator: np.random.Generator) -> list[int]:
        """Draws the indices of images to join the one of `key`."""
        positions = self.plan.draw(key.position, number, generator)
        return self.order(key.epoch)[positions].tolist()

    def _mosaic(self, key: SampleKey, index: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Makes a mosaic of four, or at times of nine, with image `index` somewhere in it: pixels and labels."""
        nine = generator.random() < self.hyp.mosaic9
        indices = generator.permutation([index, *self._partners(key, 8 if nine else 3, generator)]).tolist()
        # from memory where --cache ram holds all, else through the recent ones
        read = self.images.read if isinstance(self.images, RamImages) else self.recent_images().read
        images = [read(index) for index in indices]
        size, side = self.img_size, 2 * self.img_size
        corners = (place_nine if nine else place_four)([image.shape[:2] for image in images], size, generator)
        tiles = [
            Tile(image, *self._labels_px(index, image.shape[1], image.shape[0]), x, y)
            for index, image, (x, y) in zip(indices, images, corners, strict=True)
        ]
        matrix, gain = random_matrix((side, side), (size, size), *self.hyp.warp, generator)
        return compose(tiles, matrix, gain, size, 0.0 if nine else self.hyp.copy_paste, generator)

    def _letterboxed(self, index: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], ShapeInfo]:
        """Reads one image and letterboxes it: pixels, labels, polygons, and what leads back."""
        image = self.images.read(index)
        shape = image.shape[:2] if self.img_size is None else self.img_size
        if self.batch_shapes_hw is not None:
            shape = self.batch_shapes_hw[index // self.batch_size].tolist()
        boxed = letterbox(image, shape, auto=False, scaleup=self.augment)
        ratio_w, ratio_h = boxed.ratio
        width, height = image.shape[1] * ratio_w, image.shape[0] * ratio_h
        full_w, full_h = self.table.sizes_wh[index].tolist()
        shapes = ShapeInfo((full_h, full_w), ((height / full_h, width / full_w), boxed.pad))
        return boxed.image, *self._labels_px(index, width, height, boxed.pad), shapes


def rectangular_batches(
    sizes_wh: np.ndarray, batch_size: int, imgsz: int, stride: int, pad: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts images by aspect ratio and finds the smallest shape for each batch.

    Args:
        sizes_wh: int (N, 2).
        batch_size: images in a batch.
        imgsz: long side of the images, px.
        stride: shapes are multiples of it.
        pad: added to shapes, in strides.

    Returns:
        The order (N,) of the images and the batches' shapes (batches, 2), height and width in px. Images of equal
        ratio come in the order of NumPy's default sort, as in YOLOv5: with another one they would share batches, and
        so paddings, with other images, which moves mAP50-95 on coco128 by 0.001.
    """
    ratios = sizes_wh[:, 1] / sizes_wh[:, 0]
    order = np.argsort(ratios)
    sorted_ratios = ratios[order]
    shares_hw = np.ones((-(-len(order) // batch_size), 2))
    for batch, start in enumerate(range(0, len(order), batch_size)):
        members = sorted_ratios[start : start + batch_size]
        if members[-1] < 1:
            shares_hw[batch] = members[-1], 1
        elif members[0] > 1:
            shares_hw[batch] = 1, 1 / members[0]
    return order, (np.ceil(shares_hw * imgsz / stride + pad) * stride).astype(np.int64)
