"""Text on pictures, in any script, without a download.

OpenCV's built-in font draws Latin, Greek, Cyrillic, Arabic, Chinese, Japanese and Korean. For other scripts (Thai,
Devanagari, ...) the system's font folders are searched once, and Pillow draws with what is found there: it opens any
font file safely, while OpenCV crashes on some. What no font has is drawn as `?` and named in a warning.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.checks import printable

LOGGER = logging.getLogger("yolov5")
WEIGHT = 500  # between regular and semibold: legible at small sizes on coloured ground
ASCENT, LINE_HEIGHT = 0.95, 1.35  # of the font size; Arabic descends deepest, by the difference

_NO_WRAP = (0, 1 << 20)
_FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.fonts",
    "~/.local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
_FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
_PROBE_PX, _PROBE_SIDE = 20, 64


def text_width(text: str, size_px: int) -> int:
    """Returns the width in pixels of one line of text."""
    text = printable(text)
    path = _font_for(text)
    if path:
        return math.ceil(_pillow_font(path, size_px).getlength(text))
    return cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace(), size_px, WEIGHT, 0, _NO_WRAP)[2] if text else 0


def draw_text(image: np.ndarray, text: str, left: int, baseline: int, size_px: int, color: tuple[int, ...]) -> None:
    """Draws one line of text into `image` uint8 (h, w, 3), in place; it never wraps."""
    text = printable(text)
    path = _font_for(text)
    if path:
        _draw_with_pillow(image, text, left, baseline, size_px, color, path)
    else:
        cv2.putText(image, text, (left, baseline), color, cv2.FontFace(), size_px, WEIGHT, 0, _NO_WRAP)


def fit_text(text: str, width_px: int, size_px: int, smallest_px: int) -> tuple[str, int]:
    """Returns the text and font size that fit into `width_px`: first set smaller, then shortened with an ellipsis."""
    text, size = printable(text), size_px
    while size > smallest_px and text_width(text, size) > width_px:
        size -= 1
    if text_width(text, size) <= width_px:
        return text, size
    low, high = 0, len(text)  # the longest beginning that fits lies in between
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(f"{text[:middle]}…", size) <= width_px else (low, middle - 1)
    return f"{text[:low]}…", size


def _font_for(text: str) -> str | None:
    """Returns the font file that a text needs; None where the built-in font will do, or nothing better exists."""
    return None if text.isascii() else _font_with(frozenset(character for character in text if character > "\x7f"))


@functools.lru_cache(maxsize=1024)
def _font_with(characters: frozenset[str]) -> str | None:
    """Returns an installed font that has all of `characters`; None where the built-in one has them, or none does."""
    blank = _built_in_glyph("?")
    lacking = {character for character in characters if np.array_equal(_built_in_glyph(character), blank)}
    if not lacking:
        return None
    path = next((path for path in _installed_fonts() if _has_all(path, characters | {"a", "0"})), None)
    if path is None:
        LOGGER.warning(f"WARNING: no installed font has '{''.join(sorted(lacking))}': drawn as '?' in pictures.")
    return path


def _built_in_glyph(character: str) -> np.ndarray:
    """Renders one character with the built-in font on a black square (side, side); `?` where it is lacking."""
    square = np.zeros((_PROBE_SIDE, _PROBE_SIDE), np.uint8)
    cv2.putText(square, character, (16, 40), (255,), cv2.FontFace(), _PROBE_PX, WEIGHT, 0, _NO_WRAP)
    return square


def _installed_fonts() -> Iterator[str]:
    """Yields the font files of the system's font folders, sorted within each."""
    for folder in _FONT_FOLDERS:
        yield from (
            str(path)
            for path in sorted(Path(os.path.expanduser(folder)).rglob("*"))
            if path.suffix.lower() in _FONT_SUFFIXES
        )


def _has_all(path: str, characters: frozenset[str]) -> bool:
    """Says whether a font file opens and draws each of `characters` otherwise than a code point that cannot exist."""
    try:
        font = _pillow_font(path, _PROBE_PX)
        blank = bytes(font.getmask("\uffff"))
        return all(bytes(font.getmask(character)) != blank for character in characters)
    except (OSError, ValueError):
        return False


@functools.lru_cache(maxsize=64)
def _pillow_font(path: str, size_px: int) -> object:
    """Opens a font file at a size."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size_px)


def _draw_with_pillow(
    image: np.ndarray, text: str, left: int, baseline: int, size_px: int, color: tuple[int, ...], path: str
) -> None:
    """Blends text drawn by Pillow into `image` uint8 (h, w, 3), in place, cut at its borders."""
    from PIL import Image, ImageDraw

    height, width = image.shape[:2]
    mask = Image.new("L", (width, min(height, 3 * size_px)))
    top = min(max(baseline - 2 * size_px, 0), height - mask.height)
    ImageDraw.Draw(mask).text((left, baseline - top), text, fill=255, font=_pillow_font(path, size_px), anchor="ls")
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    region = image[top : top + mask.height]
    region[:] = np.rint(region * (1 - alpha) + np.asarray(color, np.float32) * alpha)
