"""The training and evaluation data set: a key in, an image with its targets out.

Covers: choosing mosaic or single image, letterbox, rectangular batch shapes, joining the augmentations, normalised
targets. An item is a function of (seed, epoch, position, index), not of the process that makes it or of caches.
Reading label files is `utils.dataloaders.labels`' work, batching is `utils.dataloaders.loader`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from utils.augmentations.mosaic import Sample, Tile, compose, place_four, place_nine
from utils.augmentations.pixels import (
    NO_DRAWS,
    AugmentParams,
    albumentations_available,
    draw_pixels,
    finish_pixels,
    flip_boxes,
    mixup,
)
from utils.augmentations.warp import Objects, draw_warp, draw_warped, warp_objects
from utils.boxes import clip_boxes, xywh2xyxy, xyxy2xywh
from utils.dataloaders.images_cache import DiskImages, ImageFiles, ImageSource, Machine, RamImages, RecentImages
from utils.dataloaders.labels import LabelTable
from utils.dataloaders.sampling import MosaicSampler, SampleKey, Stream, epoch_order, keyed_generator
from utils.errors import UserError
from utils.images import PAD_COLOUR, letterbox

CLIP_EPS = 1e-3  # px by which boxes stay inside the right and lower edges


class ShapeInfo(NamedTuple):
    """What leads from a letterboxed image back to the original."""

    original_hw: tuple[int, int]
    ratio_hw: tuple[float, float]  # resized over original
    pad_wh: tuple[float, float]  # px at the left and at the top


class Item(NamedTuple):
    """One image for the model."""

    image: torch.Tensor  # uint8 (3, h, w) RGB
    targets: torch.Tensor  # float32 (n, 6): 0, class, x, y, w, h in 0 to 1
    path: str
    shape: ShapeInfo | None  # None for mosaics
    key: SampleKey


class DetectionDataset(Dataset):
    """Images with boxes, ready for batches.

    Attributes:
        table: images and labels; with `rect` in the order of the images' aspect ratios.
        batch_shapes_hw: int (batches, 2) with `rect`, else None.
        image_weights: (N,) or None; see `epoch_order`. Set through the loader.
    """

    def __init__(
        self,
        table: LabelTable,
        imgsz: int | tuple[int, int],
        *,
        augment: AugmentParams | None,
        rect: bool = False,
        batch_size: int = 16,
        stride: int = 32,
        pad: float = 0.0,
        seed: int = 0,
        cache: str | None = None,
        machine: Machine | None = None,
        plan: MosaicSampler | None = None,
        prefix: str = "",
    ) -> None:
        """Makes a data set of N images.

        Args:
            table: images and labels.
            imgsz: long side of the images, px; for evaluation without `rect` also the (height, width) of all of them.
            augment: hyperparameters for training; None for evaluation.
            rect: give each batch the smallest shape that its images' aspect ratios allow; no mosaics then.
            batch_size: images in a batch; more than N counts as N.
            stride: rectangular shapes are multiples of it.
            pad: added to rectangular shapes, in strides.
            seed: not negative; with epoch and position it settles all that is random.
            cache: keep resized images in 'ram' or on 'disk'; they are read at once. None reads files when needed.
            machine: of several processes with this data set on a machine the first one fills the cache, then the others
                come and use it; None for this one alone.
            plan: where mosaics find their partners; chosen by memory if None.
            prefix: goes before progress texts.

        Raises:
            UserError: an image is gone, or there is no room for the cache.
        """
        if not isinstance(imgsz, int) and (rect or augment is not None):
            raise ValueError(f"{imgsz}: images of a given height and width are for evaluation without rect")
        batch_size = max(min(batch_size, len(table)), 1)
        self.batch_shapes_hw = None
        if rect:
            order, self.batch_shapes_hw = rectangular_batches(table.sizes_wh, batch_size, imgsz, stride, pad)
            table = table.subset(order)
        self.table = table
        self.imgsz = imgsz
        self.augment = augment
        self.rect = rect
        self.batch_size = batch_size
        self.seed = seed
        self.image_weights: np.ndarray | None = None
        long_side = imgsz if isinstance(imgsz, int) else max(imgsz)
        self.plan = plan or MosaicSampler.for_images(len(table), batch_size, long_side)
        self.images = make_source(table, imgsz, augment is not None, cache, prefix, machine)
        self.albumentations = augment is not None and albumentations_available(prefix)
        self._mosaic = augment is not None and not rect and augment.mosaic > 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order)
        self._recent: RecentImages | None = None

    def __len__(self) -> int:
        """Returns N."""
        return len(self.table)

    def __getstate__(self) -> dict:
        """Leaves out what a worker process makes for itself."""
        return {**self.__dict__, "_order": None, "_recent": None}

    def __getitem__(self, key: SampleKey) -> Item:
        """Returns the item of a key.

        Raises:
            UserError: an image is gone or was damaged since the labels were read.
        """
        generator = keyed_generator(Stream.SAMPLE, self.seed, key.epoch, key.position)
        shape = None
        if self._mosaic and generator.random() < self.augment.mosaic:
            sample = self._mosaic_sample(key, key.index, generator)
            if generator.random() < self.augment.mixup:
                (other,) = self._partners(key, 1, generator)
                sample = mixup(sample, self._mosaic_sample(key, other, generator), generator)
        else:
            sample, shape = self._single_sample(key.index, generator)
        return self._item(sample, shape, key, generator)

    def set_image_weights(self, weights: np.ndarray) -> None:
        """Sets how often each image is wanted, weights (N,); worker processes must be started anew to learn of it."""
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != (len(self),) or not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"image weights must be {len(self)} finite numbers, none below 0; got {weights.shape}")
        self.image_weights = weights
        self._order = None

    def order(self, epoch: int) -> np.ndarray:
        """Returns the shuffled image indices (N,) of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self), self.seed, epoch, self.image_weights)
        return self._order[1]

    def recent_images(self) -> RecentImages:
        """Returns this process's memory of the images that it read last."""
        if self._recent is None:
            info = get_worker_info()
            max_bytes = self.plan.recent_bytes(info.num_workers if info else 0, self.imgsz)
            self._recent = RecentImages(self.images, max_bytes)
        return self._recent

    def objects(self, index: int, width: int, height: int) -> Objects:
        """Returns image `index`'s labels in pixels of a width x height image."""
        rows = self.table.labels(index)
        polygons = []
        if len(self.table.seg_points):
            polygons = [points * np.float32([width, height]) for points in self.table.segments(index)]
        boxes_xywh_px = rows[:, 1:] * np.float32([width, height, width, height])
        return Objects(rows[:, 0], xywh2xyxy(boxes_xywh_px), polygons)

    def _partners(self, key: SampleKey, number: int, generator: np.random.Generator) -> list[int]:
        """Draws the indices of images to join the one of `key`."""
        positions = self.plan.draw(key.position, number, generator)
        return self.order(key.epoch)[positions].tolist()

    def _mosaic_sample(self, key: SampleKey, index: int, generator: np.random.Generator) -> Sample:
        """Makes a mosaic of four, or at times of nine, with image `index` somewhere in it."""
        nine = generator.random() < self.augment.mosaic9
        indices = generator.permutation([index, *self._partners(key, 8 if nine else 3, generator)]).tolist()
        read = self._recent_or_ram().read
        images = [read(index) for index in indices]
        sizes_hw = [image.shape[:2] for image in images]
        corners = (place_nine if nine else place_four)(sizes_hw, self.imgsz, generator)
        tiles = [
            Tile(image, self.objects(index, image.shape[1], image.shape[0]), x, y)
            for index, image, (x, y) in zip(indices, images, corners, strict=True)
        ]
        side = 2 * self.imgsz
        warp = draw_warp(self.augment, (side, side), (self.imgsz, self.imgsz), generator)
        return compose(tiles, warp, self.imgsz, 0.0 if nine else self.augment.copy_paste, generator)

    def _recent_or_ram(self) -> ImageSource:
        """Images that a mosaic is made of: from memory where `--cache ram` holds all, else through the recent ones."""
        return self.images if isinstance(self.images, RamImages) else self.recent_images()

    def _single_sample(self, index: int, generator: np.random.Generator) -> tuple[Sample, ShapeInfo]:
        """Letterboxes one image and, for training, warps it."""
        image = self.images.read(index)
        batch_shape = self.imgsz
        if self.batch_shapes_hw is not None:
            batch_shape = self.batch_shapes_hw[index // self.batch_size].tolist()
        boxed = letterbox(image, batch_shape, auto=False, scaleup=self.augment is not None)
        ratio_w, ratio_h = boxed.ratio
        width, height = image.shape[1] * ratio_w, image.shape[0] * ratio_h
        full_w, full_h = self.table.sizes_wh[index].tolist()
        shape = ShapeInfo((full_h, full_w), (height / full_h, width / full_w), boxed.pad)
        objects = _shifted(self.objects(index, width, height), boxed.pad)
        sample = Sample(boxed.image, objects)
        return (sample if self.augment is None else self._warped(sample, generator)), shape

    def _warped(self, sample: Sample, generator: np.random.Generator) -> Sample:
        """Warps a letterboxed sample within its own shape."""
        height, width = sample.image.shape[:2]
        warp = draw_warp(self.augment, (width, height), (width, height), generator)
        image = sample.image
        if not np.array_equal(warp.matrix, np.eye(3)):
            image = np.full_like(sample.image, PAD_COLOUR[0])
            draw_warped(sample.image, warp.matrix, image)
        return Sample(image, warp_objects(sample.objects, warp, (width, height)))

    def _item(self, sample: Sample, shape: ShapeInfo | None, key: SampleKey, generator: np.random.Generator) -> Item:
        """Changes pixels, for training, and turns the sample into tensors."""
        image, objects = sample
        height, width = image.shape[:2]
        clipped_xyxy = clip_boxes(objects.boxes_xyxy_px, (height - CLIP_EPS, width - CLIP_EPS))
        boxes_norm = xyxy2xywh(clipped_xyxy) / np.float32([width, height, width, height])
        draws = NO_DRAWS
        if self.augment is not None:
            draws = draw_pixels(self.augment, generator, self.albumentations)
            boxes_norm = flip_boxes(boxes_norm, draws.flip_ud, draws.flip_lr)
        planes = finish_pixels(image, draws)
        targets = np.zeros((len(boxes_norm), 6), dtype=np.float32)
        targets[:, 1], targets[:, 2:] = objects.classes, boxes_norm
        path = self.table.image_paths[key.index]
        return Item(torch.from_numpy(planes), torch.from_numpy(targets), path, shape, key)


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


def make_source(
    table: LabelTable,
    imgsz: int | tuple[int, int],
    augment: bool,
    cache: str | None,
    prefix: str,
    machine: Machine | None = None,
) -> ImageSource:
    """Returns where images are read from; a cache is filled before, of several processes by the machine's first.

    Raises:
        UserError: the cache cannot be filled, or not be shared.
    """
    files = ImageFiles(table, imgsz, augment)
    if cache is None:
        return files
    if machine and machine.local_rank > 0:
        return DiskImages(files) if cache == "disk" else RamImages(files, machine.broadcast_str_local())
    cached = {"ram": RamImages, "disk": DiskImages}[cache](files)
    if isinstance(cached, RamImages) and machine and machine.local_size > 1:
        if not cached.address:
            raise UserError("--cache ram: only on Linux do several processes share one. Use --cache disk, or none.")
        machine.broadcast_str_local(cached.address)
    cached.fill(prefix)
    return cached


def _shifted(objects: Objects, pad_wh: tuple[float, float]) -> Objects:
    """Moves objects by the padding at the left and at the top."""
    shift = np.float32(pad_wh)
    boxes = objects.boxes_xyxy_px + np.tile(shift, 2)
    return Objects(objects.classes, boxes, [points + shift if len(points) else points for points in objects.polygons])
