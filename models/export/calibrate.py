"""Images to calibrate int8 on, and a report of the ranges that came of them; the same for every runtime.

Which tensors are quantised and how is each format's own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.dataloaders.config import load_spec
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.images import ImageError, letterbox, read_image
from utils.log import LOGGER, progress

NAMED_FAILURES = 5  # damaged images that the warning names


class ActivationRange(NamedTuple):
    """What values a quantised tensor may take; those beyond are cut off."""

    name: str
    low: float
    high: float

    @property
    def width(self) -> float:
        """How far they are apart."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g} at {self.name}"


def calibration_images(data: str | Path, shape_hw: Sequence[int], count: int) -> list[np.ndarray]:
    """Reads training images of a data set, spread evenly over all of them in the order of their paths.

    Args:
        data: the data set YAML.
        shape_hw: height and width to letterbox to, px.
        count: how many at most; the same ones every time.

    Returns:
        Images uint8 (1, 3, h, w) RGB.

    Raises:
        UserError: no such data set, it has no training images, or none of those chosen can be read.
    """
    paths = list_images(load_spec(data, need=("train",), download=False).train)
    chosen = [paths[place] for place in spread(len(paths), count)]
    images, damaged = [], []
    for path in progress(chosen, desc=f"Calibration images of {data}", leave=False):
        try:
            image = letterbox(read_image(path), tuple(shape_hw), auto=False).image
        except ImageError as error:
            damaged.append(f"{path} {error}")
            continue
        images.append(np.ascontiguousarray(image[None, :, :, ::-1].transpose(0, 3, 1, 2)))
    if damaged:
        more = f" and {len(damaged) - NAMED_FAILURES} more" * (len(damaged) > NAMED_FAILURES)
        LOGGER.warning(
            f"WARNING: {len(damaged)} of {len(chosen)} calibration images were left out: "
            f"{'; '.join(damaged[:NAMED_FAILURES])}{more}."
        )
    if not images:
        raise UserError(f"--data {data}: none of its training images can be read, so int8 cannot be calibrated.")
    return images


def spread(length: int, count: int) -> list[int]:
    """Returns at most `count` different places of a list, each the middle of one of `count` equal stretches."""
    count = min(count, length)
    return [(2 * number + 1) * length // (2 * count) for number in range(count)]


def calibration_batches(images: Sequence[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Makes a float32 model's inputs of calibration images.

    Args:
        images: uint8 (1, 3, h, w) RGB.
        batch: images that the model takes at a time; the last ones are filled up with the first.

    Yields:
        float32 (batch, 3, h, w) of values 0 to 1.
    """
    for start in range(0, len(images), batch):
        group = [images[place % len(images)] for place in range(start, start + batch)]
        yield np.concatenate(group).astype(np.float32) / 255


def log_ranges(ranges: Sequence[ActivationRange], layers: int, images: int) -> None:
    """Logs how a model was quantised: a summary, and tensor by tensor at the level DEBUG.

    A tensor that is much wider than the others holds few values that matter: the first place to look when int8 loses
    accuracy.

    Args:
        ranges: of all quantised activations.
        layers: convolutions that compute in int8.
        images: how many the ranges were measured on.
    """
    by_width = sorted(ranges, key=lambda entry: entry.width)
    narrow, wide, median = by_width[0], by_width[-1], by_width[len(by_width) // 2]
    LOGGER.info(
        f"{layers} convolutions and {len(ranges)} activations in int8, calibrated on {images} images; narrowest range "
        f"{narrow}, median width {median.width:.3g}, widest {wide}"
    )
    for entry in ranges:
        LOGGER.debug(str(entry))
