"""What training does to an image's pixels once its geometry is settled, and the hyperparameters of all augmentation.

Covers: HSV, flips, mixup, histograms, and the few transforms of Albumentations that run when it is installed. Geometry
is in `utils.augmentations.warp`, mosaics are in `utils.augmentations.mosaic`. Everything random comes from the
generator that is handed in; where none is, from a new one that nothing seeds.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np

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

    @property
    def warp(self) -> tuple[float, float, float, float, float]:
        """The ranges of a warp, in the order in which `random_perspective` takes them."""
        return self.degrees, self.translate, self.scale, self.shear, self.perspective


def augment_pixels(
    image: np.ndarray,
    boxes_xywh_norm: np.ndarray,
    params: AugmentParams,
    generator: np.random.Generator,
    albumentations: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Changes an image's pixels: Albumentations, then HSV, then flips; and takes its channels apart.

    Args:
        image: uint8 (h, w, 3) RGB; left as it is.
        boxes_xywh_norm: (n, 4), of the image's sides.
        params: hyperparameters.
        generator: draws Albumentations' transforms last, so that they alter no other draw.
        albumentations: whether they take part.

    Returns:
        The image uint8 (3, h, w) RGB, and the boxes, mirrored with it.
    """
    gains = draw_gains(params.hsv_h, params.hsv_s, params.hsv_v, generator)
    flip_ud, flip_lr = generator.random() < params.flipud, generator.random() < params.fliplr
    if albumentations:
        chances = generator.random(len(ALBUMENTATIONS))
        for (name, probability), chance in zip(ALBUMENTATIONS, chances, strict=True):
            if chance < probability:
                image = albumentations_transform(image, name, int(generator.integers(2**31)))
    boxes = boxes_xywh_norm.copy()
    if flip_ud:
        boxes[:, 1] = 1 - boxes[:, 1]
    if flip_lr:
        boxes[:, 0] = 1 - boxes[:, 0]
    return to_planes(image, gains, flip_ud, flip_lr), boxes


def to_planes(
    image: np.ndarray, hsv_gains: np.ndarray | None = None, flip_ud: bool = False, flip_lr: bool = False
) -> np.ndarray:
    """Returns an image (h, w, 3) RGB as (3, h, w), with its colours changed and mirrored if wanted.

    Works strip by strip: what is between two steps then stays in the processor's cache, which saves a third of the
    time.
    """
    height, width = image.shape[:2]
    tables = None if hsv_gains is None else hsv_tables(hsv_gains)
    planes = np.empty((3, height, width), dtype=np.uint8)
    rows = max(STRIP_PIXELS // width, 1)
    for top in range(0, height, rows):
        strip = image[top : top + rows]
        bottom = top + len(strip)
        if tables is not None:
            strip = change_hsv(strip, tables)
        if flip_ud or flip_lr:
            strip = cv2.flip(strip, _FLIP_CODES[flip_ud, flip_lr])
        target = planes[:, height - bottom : height - top] if flip_ud else planes[:, top:bottom]
        cv2.split(strip, list(target))  # writes into it
    return planes


def augment_hsv(
    im: np.ndarray,
    hgain: float = 0.5,
    sgain: float = 0.5,
    vgain: float = 0.5,
    generator: np.random.Generator | None = None,
) -> None:
    """Changes hue, saturation and value of an image, uint8 (h, w, 3) BGR, by up to these shares, in place."""
    gains = draw_gains(hgain, sgain, vgain, generator or np.random.default_rng())
    if gains is not None:
        im[:] = change_hsv(im[..., ::-1], hsv_tables(gains))[..., ::-1]


def draw_gains(hgain: float, sgain: float, vgain: float, generator: np.random.Generator) -> np.ndarray | None:
    """Draws the factors (3,) of hue, saturation and value; None where none may change."""
    ranges = np.array([hgain, sgain, vgain])
    return generator.uniform(-1, 1, 3) * ranges + 1 if ranges.any() else None


def hsv_tables(gains: np.ndarray) -> np.ndarray:
    """Returns what becomes of each level (3, 256) uint8 of hue (a circle of 180), saturation, value (at most 255)."""
    levels = np.arange(256) * gains[:, None]
    return np.stack([levels[0] % 180, *levels[1:].clip(0, 255)]).astype(np.uint8)


def change_hsv(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Returns an image (h, w, 3) with hue, saturation and value taken through `tables` (3, 256)."""
    channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(channel, table) for channel, table in zip(channels, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB)


def mixup(
    im: np.ndarray,
    labels: np.ndarray,
    im2: np.ndarray,
    labels2: np.ndarray,
    generator: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Blends two images of one size and joins their labels (Zhang et al. 2018, arXiv:1710.09412).

    The share is drawn from Beta(32, 32); levels are rounded to the nearest.
    """
    share = (generator or np.random.default_rng()).beta(MIXUP_BETA, MIXUP_BETA)
    return cv2.addWeighted(im, share, im2, 1 - share, 0), np.concatenate([labels, labels2])


def hist_equalize(im: np.ndarray, clahe: bool = True, bgr: bool = False) -> np.ndarray:
    """Returns an image (RGB, or BGR with `bgr`) with its brightness spread out, by CLAHE or over the whole image."""
    forth, back = (cv2.COLOR_BGR2YUV, cv2.COLOR_YUV2BGR) if bgr else (cv2.COLOR_RGB2YUV, cv2.COLOR_YUV2RGB)
    luma, *chroma = cv2.split(cv2.cvtColor(im, forth))
    spread = cv2.createCLAHE(2.0, (8, 8)).apply(luma) if clahe else cv2.equalizeHist(luma)
    return cv2.cvtColor(cv2.merge([spread, *chroma]), back)


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
