"""Augmentations; here by YOLOv5's names and signatures, for single images: `letterbox`, `random_perspective`, ...

Images are uint8 (h, w, 3) BGR, labels (n, 5) [class, x1, y1, x2, y2 in px]. What is random comes from the generator
handed in, or from a new one that nothing seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from utils import images
from utils.augmentations import pixels as augment
from utils.augmentations.mosaic import Sample
from utils.augmentations.warp import Objects, draw_warp, draw_warped, warp_objects

__all__ = [
    "augment_hsv",
    "hist_equalize",
    "letterbox",
    "mixup",
    "random_perspective",
]

CLAHE_CLIP, CLAHE_TILES = 2.0, (8, 8)


class ImageAndLabels(NamedTuple):
    """An image with its labels."""

    image: np.ndarray  # uint8 (h, w, 3)
    labels: np.ndarray  # (n, 5) [class, xyxy px]


def letterbox(
    im: np.ndarray,
    new_shape: int | Sequence[int] = (640, 640),
    color: tuple[int, int, int] = images.PAD_COLOUR,
    auto: bool = True,
    scaleFill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> images.Letterboxed:
    """Resizes an image (h, w, 3) to fit `new_shape` and pads it.

    Args:
        im: the image.
        new_shape: side, or (height, width), px.
        color: of the padding.
        auto: pad to the smallest rectangle of stride multiples, not to `new_shape`.
        scaleFill: stretch to `new_shape` without padding (when not `auto`).
        scaleup: whether small images may be enlarged.
        stride: the model's.

    Returns:
        The image, (ratio_w, ratio_h), and (pad_w, pad_h) of each side.
    """
    return images.letterbox(im, new_shape, color, auto, scaleFill, scaleup, int(stride))


def augment_hsv(
    im: np.ndarray,
    hgain: float = 0.5,
    sgain: float = 0.5,
    vgain: float = 0.5,
    generator: np.random.Generator | None = None,
) -> None:
    """Changes hue, saturation and value of an image by up to these shares, in place."""
    params = augment.AugmentParams(hsv_h=hgain, hsv_s=sgain, hsv_v=vgain)
    draws = augment.draw_pixels(params, generator or np.random.default_rng(), albumentations=False)
    if draws.hsv_gains is not None:
        im[:] = augment.change_hsv(im[..., ::-1], augment.hsv_tables(draws.hsv_gains))[..., ::-1]


def hist_equalize(im: np.ndarray, clahe: bool = True, bgr: bool = False) -> np.ndarray:
    """Returns an image (RGB, or BGR with `bgr`) with its brightness spread out, by CLAHE or over the whole image."""
    forth, back = (cv2.COLOR_BGR2YUV, cv2.COLOR_YUV2BGR) if bgr else (cv2.COLOR_RGB2YUV, cv2.COLOR_YUV2RGB)
    luma, *chroma = cv2.split(cv2.cvtColor(im, forth))
    spread = cv2.createCLAHE(CLAHE_CLIP, CLAHE_TILES).apply(luma) if clahe else cv2.equalizeHist(luma)
    return cv2.cvtColor(cv2.merge([spread, *chroma]), back)


def random_perspective(
    im: np.ndarray,
    targets: np.ndarray | Sequence = (),
    segments: Sequence[np.ndarray] = (),
    degrees: float = 10,
    translate: float = 0.1,
    scale: float = 0.1,
    shear: float = 10,
    perspective: float = 0.0,
    border: tuple[int, int] = (0, 0),
    generator: np.random.Generator | None = None,
) -> ImageAndLabels:
    """Warps an image about its centre, with its labels; those of which too little is left are dropped.

    Args:
        im: the image; left as it is.
        targets: (n, 5) labels.
        segments: n polygons (k, 2) px, k = 0 where only the box is known; or none at all.
        degrees: largest rotation.
        translate: largest shift, as a fraction of the sides.
        scale: largest change of size, as a fraction.
        shear: largest shear, in degrees.
        perspective: largest tilt, per pixel.
        border: (top and bottom, left and right) px by which the output is larger, or with a minus smaller.
        generator: draws the warp.
    """
    ranges = augment.AugmentParams(
        degrees=degrees, translate=translate, scale=scale, shear=shear, perspective=perspective
    )
    height, width = im.shape[:2]
    out_wh = (width + 2 * border[1], height + 2 * border[0])
    warp = draw_warp(ranges, (width, height), out_wh, generator or np.random.default_rng())
    output = np.full((out_wh[1], out_wh[0], 3), images.PAD_COLOUR, dtype=np.uint8)
    draw_warped(im, warp.matrix, output)
    kept = warp_objects(_objects(targets, segments), warp, out_wh)
    return ImageAndLabels(output, _rows(kept))


def mixup(
    im: np.ndarray,
    labels: np.ndarray,
    im2: np.ndarray,
    labels2: np.ndarray,
    generator: np.random.Generator | None = None,
) -> ImageAndLabels:
    """Blends two images of one size and joins their labels."""
    first, second = Sample(im, _objects(labels)), Sample(im2, _objects(labels2))
    blended = augment.mixup(first, second, generator or np.random.default_rng())
    return ImageAndLabels(blended.image, _rows(blended.objects))


def _objects(labels: np.ndarray | Sequence, segments: Sequence[np.ndarray] = ()) -> Objects:
    """Returns labels (n, 5) and n polygons, or none, as objects."""
    rows = np.asarray(labels, dtype=np.float32).reshape(-1, 5)
    return Objects(rows[:, 0], rows[:, 1:5], list(segments))


def _rows(objects: Objects) -> np.ndarray:
    """Returns objects as labels (n, 5)."""
    return np.concatenate((objects.classes[:, None], objects.boxes_xyxy_px), axis=1)
