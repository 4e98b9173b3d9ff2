"""The screen as an input: `--source "screen [number] [left top width height]"`, grabbed by the library mss.

Covers what that text means and a `utils.data.capture.Capture` of it. Numbers are mss's: 0 is all monitors together,
1 the first. The region is in pixels from the monitor's upper left corner.
"""

from __future__ import annotations

import importlib
import re
import time
from types import ModuleType
from typing import NamedTuple

import numpy as np

from utils.checks import UserError
from utils.data.sources import DEFAULT_FPS

_USAGE = 'the screen is given as "screen [NUMBER] [LEFT TOP WIDTH HEIGHT]"'


class ScreenArea(NamedTuple):
    """Which part of which monitor."""

    monitor: int = 0
    region_px: tuple[int, int, int, int] | None = None  # left, top, width, height; None for the whole monitor


def is_screen(source: str) -> bool:
    """Whether `--source` means the screen: the word alone, or with numbers."""
    word, *numbers = source.split() or [""]
    return word.lower() == "screen" and all(re.fullmatch("-?[0-9]{1,9}", number) for number in numbers)


def parse_screen(source: str) -> ScreenArea:
    """Reads `screen [number] [left top width height]`.

    Raises:
        UserError: another count of numbers, or a region without area.
    """
    numbers = [int(number) for number in source.split()[1:]]
    if len(numbers) not in (0, 1, 4, 5):
        raise UserError(f"--source '{source}': {_USAGE}.")
    monitor = numbers.pop(0) if len(numbers) % 4 else 0
    region_px = tuple(numbers) or None
    if monitor < 0 or (region_px and min(region_px[2:]) < 1):
        raise UserError(f"--source '{source}': the number must be at least 0, width and height at least 1; {_USAGE}.")
    return ScreenArea(monitor, region_px)


class ScreenCapture:
    """The pictures of a monitor, at a usual video's rate."""

    fps = DEFAULT_FPS
    frame_count = 0
    is_recording = False

    def __init__(self, area: ScreenArea) -> None:
        """Opens the display; to be called in the thread that reads.

        Raises:
            UserError: mss is not installed, there is no display, no such monitor, or the region lies outside it.
        """
        mss = _require_mss()
        self._failure = mss.exception.ScreenShotError
        try:
            self._screen = mss.MSS()
        except self._failure as error:
            raise UserError(f"--source screen: it cannot be read here ({error}). Is there a display?") from error
        try:
            self._place_px = _place(area, self._screen.monitors)
        except BaseException:
            self._screen.close()
            raise
        self._due = time.monotonic()
        self._image: np.ndarray | None = None

    def grab(self) -> bool:
        """Takes a picture when it is time for the next; False when the display refuses."""
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + 1 / self.fps
        try:
            picture = self._screen.grab(self._place_px)
        except self._failure:
            return False
        self._image = np.ascontiguousarray(np.asarray(picture)[:, :, :3])  # (h, w, 4) BGRA
        return True

    def retrieve(self) -> np.ndarray | None:
        """Returns the picture grabbed last, uint8 (h, w, 3) BGR."""
        return self._image

    def release(self) -> None:
        """Gives the display back."""
        self._screen.close()


def _place(area: ScreenArea, monitors: list[dict[str, int]]) -> dict[str, int]:
    """Returns where the area lies on the desktop, in pixels."""
    if area.monitor >= len(monitors):
        raise UserError(
            f"--source screen {area.monitor}: there are {len(monitors) - 1} monitors, numbered from 1; 0 is all."
        )
    monitor = monitors[area.monitor]
    left, top, width, height = area.region_px or (0, 0, monitor["width"], monitor["height"])
    if left < 0 or top < 0 or left + width > monitor["width"] or top + height > monitor["height"]:
        raise UserError(
            f"--source screen: the region {left} {top} {width} {height} does not lie within monitor {area.monitor}, "
            f"which is {monitor['width']}x{monitor['height']} px."
        )
    return {"left": monitor["left"] + left, "top": monitor["top"] + top, "width": width, "height": height}


def _require_mss() -> ModuleType:
    """Imports mss with its exceptions."""
    try:
        importlib.import_module("mss.exception")
        return importlib.import_module("mss")
    except ImportError as error:
        raise UserError(f"--source screen needs the library mss: pip install mss ({error})") from error
