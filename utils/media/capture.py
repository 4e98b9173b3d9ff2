"""One live input opened: a local camera, an address that OpenCV reads (RTSP, MJPEG, HLS ...), or the screen (mss).

A capture hands out nothing but frames that came whole: a JPEG that was cut on its way would otherwise be filled up with
grey. Reading without end and reconnecting are `utils.media.streams`.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import native_path
from utils.images import ImageError, decode_image
from utils.media.sources import DEFAULT_FPS

_PULLED = ("http://", "https://")
_MJPEG = "MJPG"
_RAW_PACKETS = -1  # as CAP_PROP_FORMAT: frames are handed out as they were sent
_MAX_FPS = 100  # the rate is taken modulo this: some cameras declare their clock instead
_MAX_FRAME_COUNT = 1 << 31  # endless streams declare negative or huge numbers


class Capture(Protocol):
    """An open input, read frame by frame in one thread."""

    fps: float
    frame_count: int  # 0 for what has no end
    is_recording: bool  # it has an end, begins anew each time, and can wait: nobody sends it frames in a rhythm

    def grab(self) -> bool:
        """Waits for the next frame; False when none came."""

    def retrieve(self) -> np.ndarray | None:
        """Returns the frame grabbed last, uint8 (h, w, 3) BGR; None when it cannot be decoded."""

    def release(self) -> None:
        """Gives the device or the connection back."""


@dataclass(frozen=True)
class Timeouts:
    """How long an address may keep silent; cameras have limits of their drivers' own."""

    open_s: float = 5.0
    read_s: float = 5.0

    def parameters(self) -> list[int]:
        """Returns what OpenCV's FFmpeg reader takes when it opens an address."""
        timeouts_ms = {cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: self.open_s, cv2.CAP_PROP_READ_TIMEOUT_MSEC: self.read_s}
        return [number for key, value_s in timeouts_ms.items() for number in (key, int(value_s * 1000))]


class VideoCapture:
    """A camera or an address, read by OpenCV."""

    def __init__(self, video: cv2.VideoCapture, pulled: bool = False) -> None:
        """Takes an open capture, and whether it sends only as fast as it is read."""
        self.fps = stream_fps(video.get(cv2.CAP_PROP_FPS))
        count = video.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_count = int(count) if 0 < count < _MAX_FRAME_COUNT else 0
        self.is_recording = pulled and self.frame_count > 0
        self._video = video
        self._as_sent = _codec(video) == _MJPEG and video.set(cv2.CAP_PROP_FORMAT, _RAW_PACKETS)

    def grab(self) -> bool:
        """Waits for the next frame; False when none came in time, or what came is none."""
        return self._video.grab()

    def retrieve(self) -> np.ndarray | None:
        """Returns the frame grabbed last, uint8 (h, w, 3) BGR; None when it is damaged or was cut."""
        decoded, image = self._video.retrieve()
        if decoded and self._as_sent:
            try:
                return decode_image(image.tobytes())
            except ImageError:
                return None
        return image if decoded else None

    def release(self) -> None:
        """Closes the camera or the connection."""
        self._video.release()


def stream_fps(declared: float) -> float:
    """Returns a stream's frames per second; a usual rate where what it declares is none."""
    rate = declared % _MAX_FPS if math.isfinite(declared) and declared > 0 else 0.0
    return rate or DEFAULT_FPS


def _codec(video: cv2.VideoCapture) -> str:
    """Returns the four letters that name the encoding, if FFmpeg reads it: only there can it be had undecoded."""
    if video.getBackendName() != "FFMPEG":
        return ""
    return int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace")


def open_camera(index: int) -> VideoCapture:
    """Opens a local camera by its number.

    Raises:
        UserError: there is none, or it is in use.
    """
    try:
        video = cv2.VideoCapture(index)
    except cv2.error as error:
        raise UserError(f"Failed to open camera {index}: {error.err}.") from error
    if not video.isOpened():
        video.release()
        raise UserError(
            f"Failed to open camera {index}: there is none of that number, another program uses it, or it may not be "
            "used by this user."
        )
    return VideoCapture(video)


def open_address(address: str, shown: str, timeouts: Timeouts) -> VideoCapture:
    """Opens a stream by its address.

    Args:
        address: rtsp, rtmp, http or https.
        shown: the same as it may stand in messages, without a password.
        timeouts: how long to wait for an answer and, from then on, for every frame.

    Raises:
        UserError: nobody answers in time, or what answers is no video.
    """
    video = cv2.VideoCapture(native_path(address), cv2.CAP_FFMPEG, timeouts.parameters())
    if not video.isOpened():
        video.release()
        raise UserError(
            f"Failed to open {shown}: no video came from there within {timeouts.open_s:g} s. Check the address, the "
            "network and the camera."
        )
    return VideoCapture(video, pulled=address.startswith(_PULLED))


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
