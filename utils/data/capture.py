"""One live input opened: a local camera, or an address that OpenCV reads (RTSP, RTMP, MJPEG, HLS, a served video).

A capture hands out nothing but frames that came whole: a JPEG that was cut on its way would otherwise be filled up with
grey. Not here: reading without end and reconnecting (`utils.data.streams`), the screen (`utils.data.screen`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from utils.checks import UserError
from utils.data.sources import DEFAULT_FPS
from utils.files import native_path
from utils.images import ImageError, decode_image

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
