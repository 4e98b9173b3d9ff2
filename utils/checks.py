"""Errors meant for people, and the small checks that raise them.

Covers: the one exception that scripts turn into a message without a traceback, suggestions for misspelt names, and
image sizes. Knows nothing of files, tensors or detection.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

LOGGER = logging.getLogger("yolov5")
MIN_GRID_STRIDE = 32
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no console or file takes them as text
MAX_IMAGE_SIDE_PX = 16384  # a mosaic of this side takes 3 GiB; --tile is for larger pictures


class UserError(Exception):
    """A mistake that the user can mend: its text says what is wrong, where, and what to do.

    Scripts print the text alone and exit with status 1 (see `utils.cli.run_command`).
    """


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with up to three of `options` that resemble `name`, else an empty string."""
    by_lower = {str(option).lower(): str(option) for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{by_lower[key]}'" for key in close) + "?"


def shown(value: Any, longest: int = 80) -> str:
    """Returns a value of a file for messages: in one line of at most `longest` characters."""
    return (value if isinstance(value, str) and not UNPRINTABLE.search(value) else repr(value))[:longest]


def printable(text: Any) -> str:
    """Returns a text in which U+FFFD stands for every character that no console, file, font or native code takes.

    Such are the halves of characters by which Python holds bytes of file names that are not UTF-8.
    """
    return UNPRINTABLE.sub("\ufffd", str(text))


def round_up(value: float, divisor: int) -> int:
    """Returns the smallest multiple of `divisor` that is not below `value`."""
    return math.ceil(value / divisor) * divisor


def grid_stride(strides: Iterable[float]) -> int:
    """Returns what image sides must be multiples of: the largest of a model's strides, at least 32.

    A model may detect on fine levels alone while its backbone halves the image five times.
    """
    return max([MIN_GRID_STRIDE, *(int(stride) for stride in strides)])


def check_image_size(imgsz: int | Sequence[int], stride: int, floor: int = 0) -> int | list[int]:
    """Rounds image sides up to multiples of the model's stride and says so when that changes them.

    Args:
        imgsz: one side for squares, or (height, width), in pixels.
        stride: the model's largest stride.
        floor: the smallest side allowed, in pixels.

    Returns:
        An int for an int, a list for a sequence.

    Raises:
        UserError: a side is not positive, or beyond MAX_IMAGE_SIDE_PX.
    """
    sides = [imgsz] if isinstance(imgsz, int) else list(imgsz)
    if any(side < 1 for side in sides):
        raise UserError(f"--img-size {imgsz}: image sides must be at least 1 pixel.")
    if any(side > MAX_IMAGE_SIDE_PX for side in sides):
        raise UserError(
            f"--img-size {imgsz}: image sides must be at most {MAX_IMAGE_SIDE_PX} pixels; larger pictures are scaled "
            "down, or cut into tiles with --tile."
        )
    rounded = [max(round_up(side, stride), floor) for side in sides]
    if rounded != sides:
        shown = rounded[0] if isinstance(imgsz, int) else rounded
        LOGGER.warning(
            f"WARNING: --img-size {imgsz} must be a multiple of the model's stride {stride}"
            f"{f' and at least {floor}' if floor else ''}: using {shown}"
        )
    return rounded[0] if isinstance(imgsz, int) else rounded
