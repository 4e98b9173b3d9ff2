"""What training does to an image's pixels once its geometry is settled, and the hyperparameters of all augmentation.

Covers: HSV, flips, mixup and the few transforms of Albumentations that run when it is installed. Geometry is in
`utils.augmentations.warp`, mosaics are in `utils.augmentations.mosaic`. Images are uint8 (h, w, 3) RGB. Everything
random comes from the generator that is handed in.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import cv2
import numpy as np

from utils.augmentations.mosaic import Sample
from utils.augmentations.warp import Objects
from utils.log import LOGGER

MIXUP_BETA = 32.0  # both parameters of the Beta distribution that the blend is drawn from
# of Albumentations, with their probabilities; those that YOLOv5 lists with probability 0 are left out
ALBUMENTATIONS = (("Blur", 0.01), ("MedianBlur", 0.01), ("ToGray", 0.01), ("CLAHE", 0.01))
STRIP_PIXELS = 2**16  # some 200 kB a strip and step
_FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}  # OpenCV's, by (upside down, left to right)


@dataclass(frozen=True)
class AugmentParams:
    """The augmentation hyperparameters; the defaults change nothing.

    Attributes:
        hsv_h, hsv_s, hsv_v: largest relative change of hue, saturation and value.
        degrees: largest rotation; shear: largest shear; both in degrees to either side.
        translate: largest shift, as a fraction of the image's sides.
        scale: largest change of size, as a fraction.
        perspective: largest tilt, per pixel (0 to 0.001).
        flipud, fliplr: probabilities of turning the image upside down, and left to right.
        mosaic: probability of a mosaic; mosaic9: that a mosaic is one of nine images instead of four.
        mixup: probability that a mosaic is blended with another one.
        copy_paste: share of a mosaic's objects with polygons that are pasted to its other half.
    """

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    mosaic9: float = 0.0

    @classmethod
    def from_hyp(cls, hyp: Mapping[str, float] | Any) -> AugmentParams:
        """Picks the augmentation keys out of a mapping, or the attributes of an object, of hyperparameters."""
        values = hyp if isinstance(hyp, Mapping) else vars(hyp)
        return cls(**{field.name: float(values[field.name]) for field in fields(cls) if field.name in values})


class PixelDraws(NamedTuple):
    """What was drawn for one image's pixels."""

    hsv_gains: np.ndarray | None  # (3,), factors of hue, saturation and value
    flip_ud: bool
    flip_lr: bool
    transforms: tuple[tuple[str, int], ...]  # Albumentations' transforms to apply, each with its seed


NO_DRAWS = PixelDraws(None, False, False, ())


def draw_pixels(params: AugmentParams, generator: np.random.Generator, albumentations: bool) -> PixelDraws:
    """Draws what is to happen to an image's pixels; Albumentations comes last, so that it alters no other draw."""
    ranges = np.array([params.hsv_h, params.hsv_s, params.hsv_v])
    gains = generator.uniform(-1, 1, 3) * ranges + 1 if ranges.any() else None
    flip_ud, flip_lr = generator.random() < params.flipud, generator.random() < params.fliplr
    transforms = ()
    if albumentations:
        chances = generator.random(len(ALBUMENTATIONS))
        names = [name for (name, probability), u in zip(ALBUMENTATIONS, chances, strict=True) if u < probability]
        transforms = tuple((name, int(generator.integers(2**31))) for name in names)
    return PixelDraws(gains, flip_ud, flip_lr, transforms)


def finish_pixels(image: np.ndarray, draws: PixelDraws) -> np.ndarray:
    """Applies what was drawn to an image and takes its channels apart: Albumentations, then HSV, then flips.

    Works strip by strip where it can: what is between two steps then stays in the processor's cache, which saves a
    third of the time.

    Args:
        image: uint8 (h, w, 3) RGB; left as it is.
        draws: from `draw_pixels`, or NO_DRAWS.

    Returns:
        uint8 (3, h, w) RGB.
    """
    for name, seed in draws.transforms:
        image = albumentations_transform(image, name, seed)
    height, width = image.shape[:2]
    tables = None if draws.hsv_gains is None else hsv_tables(draws.hsv_gains)
    planes = np.empty((3, height, width), dtype=np.uint8)
    rows = max(STRIP_PIXELS // width, 1)
    for top in range(0, height, rows):
        strip = image[top : top + rows]
        bottom = top + len(strip)
        if tables is not None:
            strip = change_hsv(strip, tables)
        if draws.flip_ud or draws.flip_lr:
            strip = cv2.flip(strip, _FLIP_CODES[draws.flip_ud, draws.flip_lr])
        target = planes[:, height - bottom : height - top] if draws.flip_ud else planes[:, top:bottom]
        cv2.split(strip, list(target))  # writes into it
    return planes


def flip_boxes(boxes_xywh_norm: np.ndarray, flip_ud: bool, flip_lr: bool) -> np.ndarray:
    """Mirrors normalised boxes (n, 4) as `finish_pixels` mirrors the image."""
    flipped = boxes_xywh_norm.copy()
    if flip_ud:
        flipped[:, 1] = 1 - flipped[:, 1]
    if flip_lr:
        flipped[:, 0] = 1 - flipped[:, 0]
    return flipped


def hsv_tables(gains: np.ndarray) -> np.ndarray:
    """Returns what becomes of each level (3, 256) uint8 of hue (a circle of 180), saturation, value (at most 255)."""
    levels = np.arange(256) * gains[:, None]
    return np.stack([levels[0] % 180, *levels[1:].clip(0, 255)]).astype(np.uint8)


def change_hsv(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Returns an image (h, w, 3) with hue, saturation and value taken through `tables` (3, 256)."""
    channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(channel, table) for channel, table in zip(channels, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB)


def mixup(first: Sample, second: Sample, generator: np.random.Generator) -> Sample:
    """Blends two samples of one size and joins their objects (Zhang et al. 2018, arXiv:1710.09412).

    The share is drawn from Beta(32, 32); levels are rounded to the nearest.
    """
    share = generator.beta(MIXUP_BETA, MIXUP_BETA)
    blended = cv2.addWeighted(first.image, share, second.image, 1 - share, 0)
    mine, other = first.objects, second.objects
    classes = np.concatenate([mine.classes, other.classes])
    return Sample(blended, Objects(classes, np.concatenate([mine.boxes_xyxy_px, other.boxes_xyxy_px]), []))


def albumentations_available(prefix: str = "") -> bool:
    """Says whether Albumentations will take part, and logs a line with its transforms, or why it does not."""
    try:
        version = importlib.metadata.version("albumentations")
    except importlib.metadata.PackageNotFoundError:
        return False
    if int(version.split(".")[0]) < 2:
        LOGGER.warning(
            f"{prefix}WARNING: Albumentations {version} is installed but not used: its transforms cannot be seeded "
            "one by one before version 2. Upgrade it, or uninstall it to silence this."
        )
        return False
    listed = ", ".join(f"{name} (p={probability})" for name, probability in ALBUMENTATIONS)
    LOGGER.info(f"{prefix}Albumentations {version} is installed, so training adds {listed}; uninstall it to leave out")
    return True


def albumentations_transform(image: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Applies one of Albumentations' transforms (pixels only, boxes stay) to an image (h, w, 3)."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for newer versions when imported
    import albumentations

    return albumentations.Compose([getattr(albumentations, name)(p=1.0)], seed=seed)(image=image)["image"]
