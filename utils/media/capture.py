"""Frames of one input, opened: image and video files, a camera, an address that OpenCV reads, the screen (mss).

A damaged image or video frame does not end a file: it arrives as a frame with `error` set and no image. A live capture
hands out nothing but frames that came whole: a JPEG that was cut on its way would otherwise be filled up with grey.
Reading live inputs without end and reconnecting are `utils.media.streams`; what `--source` means is
`utils.media.sources`.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from utils.dataloaders.paths import suffix_of
from utils.errors import UserError
from utils.files import native_path
from utils.images import MAX_ASPECT, VID_FORMATS, ImageError, check_jpeg_end, decode_image, read_image
from utils.media.mp4 import frames_shown

DEFAULT_FPS = 30.0  # for videos and streams that do not say
OPEN_TIMEOUT_S = READ_TIMEOUT_S = 5.0  # how long an address may keep silent; cameras have limits of their drivers' own
_COUNTING_FORMATS = frozenset({"3gp", "avi", "m4v", "mov", "mp4"})  # their headers count the frames; others estimate
_ESTIMATE_TOLERANCE = 0.05  # of the frames declared
_RAW_PACKETS = -1  # as CAP_PROP_FORMAT: frames are handed out as they were sent
_MAX_FPS = 100  # a stream's rate is taken modulo this: some cameras declare their clock instead
_MAX_FRAME_COUNT = 1 << 31  # endless streams declare negative or huge numbers
_SCREEN_USAGE = 'the screen is given as "screen [NUMBER] [LEFT TOP WIDTH HEIGHT]"'


@dataclass
class Frame:
    """One image of a source, or the place where one is missing."""

    path: str  # of the file; a live input's name
    file_number: int  # from 1
    file_count: int  # files, or live inputs
    image: np.ndarray | None = None  # uint8 (h, w, 3) BGR, upright; None when it could not be read
    error: str = ""  # why not
    number: int = 0  # in a video or a live input, from 1; 0 for an image
    count: int = 0  # frames that the video declares; 0 if unknown
    fps: float = 0.0
    live: bool = False  # from a camera, a network stream or the screen
    time: float = 0.0  # s: when its video shows it, or it arrived (live; by a monotonic clock); 0 for an image

    @property
    def is_video(self) -> bool:
        """Whether this frame is one of a sequence: a video's or a live input's."""
        return self.number > 0

    @property
    def label(self) -> str:
        """What stands before a message: `image 1/2 PATH`, `video 1/1 (12/300) PATH`, a live input's number from 0."""
        if self.live:
            return str(self.file_number - 1)
        if self.is_video:
            return f"video {self.file_number}/{self.file_count} ({self.number}/{self.count or '?'}) {self.path}"
        return f"image {self.file_number}/{self.file_count} {self.path}"


def read_frames(paths: Sequence[str], vid_stride: int = 1) -> Iterator[Frame]:
    """Yields the frames of all files, damaged ones included, with `vid_stride` every so many frames of a video."""
    for number, path in enumerate(paths, start=1):
        if suffix_of(path) in VID_FORMATS:
            yield from _read_video(path, number, len(paths), vid_stride)
            continue
        frame = Frame(path, number, len(paths))
        try:
            image = read_image(path)
            height, width = image.shape[:2]
            if max(height, width) > MAX_ASPECT * min(height, width):
                raise ImageError(f"is {width}x{height} px; sides beyond {MAX_ASPECT}:1 cannot be used")
            frame.image = image
        except ImageError as error:
            frame.error = str(error)
        yield frame


def _read_video(path: str, file_number: int, file_count: int, vid_stride: int) -> Iterator[Frame]:
    """Yields every `vid_stride`-th frame of a video, the first among them, then what it lacks, if anything.

    Where the decoder gives up early, what can be read behind the damage follows.
    """
    video = cv2.VideoCapture(native_path(path))
    count, fps = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0), video.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps <= 1000 else DEFAULT_FPS
    position, lost, last = 0, 0, None  # frames passed, frames missing before the end, the last image
    time_s = -math.inf
    try:
        while video is not None:
            while video.grab():
                position += 1
                declared_s = video.get(cv2.CAP_PROP_POS_MSEC) / 1000  # 0 where the file does not say
                time_s = declared_s if declared_s > time_s else time_s + 1 / fps
                decoded, image = video.retrieve()
                last = image if decoded else last
                if (position - 1) % vid_stride == 0:
                    error = "" if decoded else "cannot be decoded"
                    image = image if decoded else None
                    yield Frame(path, file_number, file_count, image, error, position, count, fps, time=time_s)
            video.release()
            if position < count and suffix_of(path) in _COUNTING_FORMATS:
                count = min(frames_shown(path) or count, count)
            video, resumed = _resume(path, position, count, last)
            lost, position = lost + resumed - position, resumed
    finally:
        if video is not None:
            video.release()
    missing = lost + max(count - position, 0)
    tolerated = 0 if lost or suffix_of(path) in _COUNTING_FORMATS else max(1, _ESTIMATE_TOLERANCE * count)
    if position == 0:
        error = "cannot be opened as a video, or has no frames"
    elif missing > tolerated:
        error = f"{missing} of {count} declared frames are missing or cannot be decoded"
    else:
        return
    yield Frame(path, file_number, file_count, None, error, max(position, 1), count, fps, time=max(time_s, 0.0))


def _resume(path: str, position: int, count: int, last: np.ndarray | None) -> tuple[cv2.VideoCapture | None, int]:
    """Looks for readable frames behind a damaged stretch, behind `position` of `count` frames.

    Returns the video opened where reading can go on and the number of frames before that place; (None, `position`)
    where there is nothing more: the decoder reached the end, having skipped frames on the way, or the rest is damaged.
    """
    final = _open_at(path, count - 1) if last is not None and count - position > 1 else None
    if final is None:
        return None, position
    reached_end = np.array_equal(final.read()[1], last)
    final.release()
    if reached_end:
        return None, position
    bad, good = position, count - 1
    while good - bad > 1:  # halve the stretch between the last place known to fail and the first known to work
        middle = (bad + good) // 2
        video = _open_at(path, middle)
        good, bad = (middle, bad) if video is not None else (good, middle)
        if video is not None:
            video.release()
    return _open_at(path, good), good


def _open_at(path: str, index: int) -> cv2.VideoCapture | None:
    """Opens a video with the frame of that index (from 0) to be read next; None where it cannot be decoded."""
    video = cv2.VideoCapture(native_path(path))
    if video.set(cv2.CAP_PROP_POS_FRAMES, index) and video.read()[0]:
        video.set(cv2.CAP_PROP_POS_FRAMES, index)
        return video
    video.release()
    return None


class Capture(Protocol):
    """An open live input, read frame by frame in one thread."""

    fps: float
    frame_count: int  # 0 for what has no end
    is_recording: bool  # it has an end, begins anew each time, and can wait: nobody sends it frames in a rhythm

    def grab(self) -> bool:
        """Waits for the next frame; False when none came."""

    def retrieve(self) -> np.ndarray | bytes | None:
        """Returns the frame grabbed last, uint8 (h, w, 3) BGR; None when it cannot be decoded.

        It may come as it was sent, as a JPEG that is whole: who uses it decodes it (`utils.images.decode_image`).
        """

    def release(self) -> None:
        """Gives the device or the connection back."""


class VideoCapture:
    """A camera or an address, read by OpenCV: a `Capture`."""

    def __init__(self, video: cv2.VideoCapture, pulled: bool = False) -> None:
        """Takes an open capture, and whether it sends only as fast as it is read."""
        self.fps = stream_fps(video.get(cv2.CAP_PROP_FPS))
        count = video.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_count = int(count) if 0 < count < _MAX_FRAME_COUNT else 0
        self.is_recording = pulled and self.frame_count > 0
        self._video, self.grab, self.release = video, video.grab, video.release
        codec = int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
        is_mjpeg = video.getBackendName() == "FFMPEG" and codec == b"MJPG"  # only there can it be had undecoded
        self._as_sent = is_mjpeg and video.set(cv2.CAP_PROP_FORMAT, _RAW_PACKETS)

    def retrieve(self) -> np.ndarray | bytes | None:
        """Returns the frame grabbed last, uint8 (h, w, 3) BGR, or a camera's JPEG; None when it was cut or is damaged.

        Most of a camera's frames give way to newer ones before anybody has time for them: they are not decoded.
        """
        decoded, image = self._video.retrieve()
        if decoded and self._as_sent:
            try:
                if self.is_recording:  # all of its frames are used
                    return decode_image(image.tobytes())
                check_jpeg_end(data := image.tobytes())
                return data
            except ImageError:
                return None
        return image if decoded else None


def stream_fps(declared: float) -> float:
    """Returns a stream's frames per second; a usual rate where what it declares is none."""
    rate = declared % _MAX_FPS if math.isfinite(declared) and declared > 0 else 0.0
    return rate or DEFAULT_FPS


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


def open_address(
    address: str, shown: str, open_s: float = OPEN_TIMEOUT_S, read_s: float = READ_TIMEOUT_S
) -> VideoCapture:
    """Opens a stream by its address.

    Args:
        address: rtsp, rtmp, http or https.
        shown: the same as it may stand in messages, without a password.
        open_s: how long to wait for an answer, and ...
        read_s: ... from then on for every frame.

    Raises:
        UserError: nobody answers in time, or what answers is no video.
    """
    timeouts_ms = {cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: open_s, cv2.CAP_PROP_READ_TIMEOUT_MSEC: read_s}
    options = [number for key, value_s in timeouts_ms.items() for number in (key, int(value_s * 1000))]
    video = cv2.VideoCapture(native_path(address), cv2.CAP_FFMPEG, options)
    if not video.isOpened():
        video.release()
        raise UserError(
            f"Failed to open {shown}: no video came from there within {open_s:g} s. Check the address, the network and "
            "the camera."
        )
    return VideoCapture(video, pulled=address.startswith(("http://", "https://")))


def is_screen(source: str) -> bool:
    """Whether `--source` means the screen: the word alone, or with numbers."""
    word, *numbers = source.split() or [""]
    return word.lower() == "screen" and all(re.fullmatch("-?[0-9]{1,9}", number) for number in numbers)


def parse_screen(source: str) -> tuple[int, tuple[int, ...]]:
    """Reads `screen [number] [left top width height]`: the monitor, and the region in px, () for all of it.

    Raises:
        UserError: another count of numbers, or a region without area.
    """
    numbers = [int(number) for number in source.split()[1:]]
    if len(numbers) not in (0, 1, 4, 5):
        raise UserError(f"--source '{source}': {_SCREEN_USAGE}.")
    monitor = numbers.pop(0) if len(numbers) % 4 else 0
    if monitor < 0 or (numbers and min(numbers[2:]) < 1):
        raise UserError(
            f"--source '{source}': the number must be at least 0, width and height at least 1; {_SCREEN_USAGE}."
        )
    return monitor, tuple(numbers)


class ScreenCapture:
    """The images of a monitor, at a usual video's rate: a `Capture`."""

    fps, frame_count, is_recording = DEFAULT_FPS, 0, False

    def __init__(self, monitor: int = 0, region_px: Sequence[int] = ()) -> None:
        """Opens the display; to be called in the thread that reads.

        Args:
            monitor: its number from 1; 0 is all of them.
            region_px: left, top, width, height within it; empty for all of it.

        Raises:
            UserError: mss is not installed, there is no display, no such monitor, or the region lies outside it.
        """
        try:
            importlib.import_module("mss.exception")
            mss = importlib.import_module("mss")
        except ImportError as error:
            raise UserError(f"--source screen needs the library mss: pip install mss ({error})") from error
        self._failure = mss.exception.ScreenShotError
        try:
            self._screen = mss.MSS()
        except self._failure as error:
            raise UserError(f"--source screen: it cannot be read here ({error}). Is there a display?") from error
        try:
            self._place_px = _place(monitor, region_px, self._screen.monitors)
        except BaseException:
            self._screen.close()
            raise
        self.release = self._screen.close
        self._due_s = time.monotonic()
        self._image: np.ndarray | None = None

    def grab(self) -> bool:
        """Takes an image when it is time for the next; False when the display refuses."""
        time.sleep(max(0.0, self._due_s - time.monotonic()))
        self._due_s = time.monotonic() + 1 / self.fps
        try:
            shot = self._screen.grab(self._place_px)
        except self._failure:
            return False
        self._image = np.ascontiguousarray(np.asarray(shot)[:, :, :3])  # (h, w, 4) BGRA
        return True

    def retrieve(self) -> np.ndarray | None:
        """Returns the image grabbed last, uint8 (h, w, 3) BGR."""
        return self._image


def _place(number: int, region_px: Sequence[int], monitors: list[dict[str, int]]) -> dict[str, int]:
    """Returns where a monitor's region lies on the desktop, in pixels."""
    if number >= len(monitors):
        raise UserError(f"--source screen {number}: there are {len(monitors) - 1} monitors, numbered from 1; 0 is all.")
    monitor = monitors[number]
    left, top, width, height = region_px or (0, 0, monitor["width"], monitor["height"])
    if left < 0 or top < 0 or left + width > monitor["width"] or top + height > monitor["height"]:
        raise UserError(
            f"--source screen: the region {left} {top} {width} {height} does not lie within monitor {number}, "
            f"which is {monitor['width']}x{monitor['height']} px."
        )
    return {"left": monitor["left"] + left, "top": monitor["top"] + top, "width": width, "height": height}
