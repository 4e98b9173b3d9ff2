"""What detection reads: files, folders, globs and list files, images and videos, as one stream of frames.

A damaged image or video frame does not end the stream: it arrives as a frame with `error` set and no picture. Every
picture is upright uint8 BGR. `Source` is what every kind of input offers; `utils.media.inputs.open_source` chooses one.
Not here: cameras and network streams (`utils.media.streams`); training's images (`utils.dataloaders.dataset`).
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.dataloaders.paths import UNREAD_FORMATS, is_hidden, suffix_of
from utils.errors import UserError, did_you_mean
from utils.files import native_path
from utils.images import IMG_FORMATS, MAX_ASPECT, VID_FORMATS, ImageError, read_image
from utils.log import LOGGER
from utils.media.mp4 import frames_shown

LIST_FORMATS = frozenset({"streams", "txt"})
DEFAULT_FPS = 30.0  # for videos that do not say
_COUNTING_FORMATS = frozenset({"3gp", "avi", "m4v", "mov", "mp4"})  # their headers count the frames; others estimate
_ESTIMATE_TOLERANCE = 0.05  # of the frames declared


@dataclass
class Frame:
    """One picture of the stream, or the place where one is missing."""

    path: str  # of the file; a live input's name
    file_number: int  # from 1
    file_count: int  # files, or live inputs
    image: np.ndarray | None = None  # uint8 (h, w, 3) BGR; None when it could not be read
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
        """Returns what stands before a message about this frame.

        `image 1/2 PATH`, `video 1/1 (12/300) PATH`, or a live input's number from 0.
        """
        if self.live:
            return str(self.file_number - 1)
        if self.is_video:
            return f"video {self.file_number}/{self.file_count} ({self.number}/{self.count or '?'}) {self.path}"
        return f"image {self.file_number}/{self.file_count} {self.path}"


class Source(Protocol):
    """What detection reads from, whatever stands behind it."""

    inputs: list[str]  # what results are filed under: absolute paths, or distinct names of live inputs
    live: bool  # frames are worth most when they are new: whoever reads must not read ahead

    def __iter__(self) -> Iterator[list[Frame]]:
        """Yields what has come: one frame of a file, or one of every live input that has a new one."""

    def close(self) -> None:
        """Ends the reading and gives devices back; may be called again."""

    def report(self) -> list[str]:
        """Returns what there is to say about inputs that lost frames, a line each."""


class FileSource:
    """Images and videos as a `Source`, one after the other."""

    live = False

    def __init__(self, paths: Sequence[str], vid_stride: int = 1) -> None:
        """Takes absolute paths (`find_sources`); of a video every `vid_stride`-th frame is read."""
        self.inputs = list(paths)
        self._vid_stride = vid_stride

    def __iter__(self) -> Iterator[list[Frame]]:
        """Yields lists of one frame, as `read_frames` orders them; from the first file again each time."""
        with contextlib.closing(read_frames(self.inputs, self._vid_stride)) as frames:
            for frame in frames:
                yield [frame]

    def close(self) -> None:
        """Does nothing: a file is open only while its frames are read."""

    def report(self) -> list[str]:
        """Returns nothing: what is wrong with a file stands in its frames."""
        return []


def find_sources(source: str | Path) -> list[str]:
    """Finds the files that `--source` means: first the images, then the videos.

    Args:
        source: an image or video; a folder (its own files, not its subfolders' nor hidden ones); a glob (`**` goes into
            subfolders); or a list file with one image or video path a line, relative to the working folder or to the
            list.

    Returns:
        Absolute paths; those of a folder or glob are sorted, those of a list keep its order.

    Raises:
        UserError: nothing of that name, or nothing in it that can be read.
    """
    text = os.path.expanduser(str(source))
    if os.path.isdir(text):
        candidates = sorted(entry.path for entry in os.scandir(text) if _is_file_or_dead_link(entry.path))
        hidden = [path for path in candidates if is_hidden(os.path.basename(path))]
        candidates = [path for path in candidates if not is_hidden(os.path.basename(path))]
        pictures = [path for path in hidden if suffix_of(path) in IMG_FORMATS | VID_FORMATS]
        if pictures:
            LOGGER.info(f"{text}: {len(pictures)} hidden files are passed over, such as {pictures[0]}")
    elif os.path.isfile(text):
        return files_of_list(text, read_list(text)) if suffix_of(text) in LIST_FORMATS else _single_file(text)
    elif glob.has_magic(text):
        candidates = sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))
    else:
        raise UserError(f"--source '{source}': {_not_found(text)}")
    unread = [path for path in candidates if suffix_of(path) in UNREAD_FORMATS - IMG_FORMATS - VID_FORMATS]
    if unread:
        kinds = ", ".join(sorted({suffix_of(path) for path in unread}))
        LOGGER.warning(
            f"WARNING: --source '{source}': {len(unread)} images are left out, such as {unread[0]}: files of these "
            f"kinds ({kinds}) are not read. Convert them to JPEG or PNG."
        )
    return _order([path for path in candidates if suffix_of(path) in IMG_FORMATS | VID_FORMATS], text)


def _is_file_or_dead_link(path: str) -> bool:
    """Says whether a path is a file, or a link to nothing or to itself, which the frame will report."""
    return os.path.isfile(path) or os.path.islink(path) and not os.path.exists(path)


def _single_file(path: str) -> list[str]:
    """Returns the file alone, if its suffix is one that can be read."""
    if suffix_of(path) not in IMG_FORMATS | VID_FORMATS:
        image = suffix_of(path) in UNREAD_FORMATS
        reason = "images of this kind are not read" if image else "not an image or a video by its suffix"
        advice = " Convert it to JPEG or PNG." if image else ""
        raise UserError(f"--source '{path}': {reason}. {_formats()}{advice}")
    return [os.path.abspath(path)]


def _order(paths: Sequence[str], source: str) -> list[str]:
    """Makes paths absolute, drops repeated ones, puts videos last; refuses an empty list."""
    unique = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    if not unique:
        nested = os.path.isdir(source) and any(entry.is_dir() for entry in os.scandir(source))
        hint = (
            f" Subfolders are not searched: give '{os.path.join(source, '**', '*')}' for all of them." if nested else ""
        )
        raise UserError(f"--source '{source}': no images or videos found there.{hint} {_formats()}")
    return sorted(unique, key=lambda path: suffix_of(path) in VID_FORMATS)


def read_list(path: str | Path) -> list[str]:
    """Reads a list file: one entry a line, blank lines and lines that begin with # left out.

    Raises:
        UserError: not a text in UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--source '{path}': cannot be read as a list of paths ({error}).") from error
    if "\0" in text:
        raise UserError(f"--source '{path}': cannot be read as a list of paths (it has NUL bytes: is it a text file?).")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def files_of_list(path: str, entries: Sequence[str]) -> list[str]:
    """Returns the files that a list file at `path` names, relative to the working folder or to the list.

    Raises:
        UserError: there are none.
    """
    folder = os.path.dirname(os.path.abspath(path))
    return _order([_resolve(entry, folder) for entry in entries], path)


def _resolve(entry: str, folder: str) -> str:
    """Returns a list file's entry as it is, or below the list's folder; those that begin with ./ always are."""
    expanded = os.path.expanduser(entry)
    beside = os.path.join(folder, expanded)
    from_list = entry.startswith(("./", ".\\")) or (not os.path.exists(expanded) and os.path.exists(beside))
    return beside if from_list else expanded


def _not_found(source: str) -> str:
    """Says what was looked for and what is there instead."""
    parent = os.path.dirname(source) or "."
    names = os.listdir(parent) if os.path.isdir(parent) else []
    where = os.path.abspath(source)
    return f"no file, folder, glob or list file (.txt) at {where}.{did_you_mean(os.path.basename(source), names)}"


def _formats() -> str:
    """Names the suffixes that can be read."""
    return f"Images: {', '.join(sorted(IMG_FORMATS))}; videos: {', '.join(sorted(VID_FORMATS))}."


def read_frames(paths: Sequence[str], vid_stride: int = 1) -> Iterator[Frame]:
    """Yields the frames of all files, damaged ones included, with `vid_stride` every so many frames of a video."""
    for number, path in enumerate(paths, start=1):
        if suffix_of(path) in VID_FORMATS:
            yield from _read_video(path, number, len(paths), vid_stride)
        else:
            yield _read_picture(Frame(path, number, len(paths)))


def _read_picture(frame: Frame) -> Frame:
    """Reads an image file into its frame."""
    try:
        image = read_image(frame.path)
        height, width = image.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ImageError(f"is {width}x{height} px; sides beyond {MAX_ASPECT}:1 cannot be used")
        frame.image = image
    except ImageError as error:
        frame.error = str(error)
    return frame


def _read_video(path: str, file_number: int, file_count: int, vid_stride: int) -> Iterator[Frame]:
    """Yields every `vid_stride`-th frame of a video, the first among them, then what it lacks, if anything.

    Where the decoder gives up early, what can be read behind the damage follows.
    """
    video = cv2.VideoCapture(native_path(path))
    count, fps = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0), _frame_rate(video)
    position, lost, last = 0, 0, None  # frames passed, frames missing before the end, the last picture
    time = -math.inf
    try:
        while video is not None:
            while video.grab():
                position += 1
                time = _time_of(video, time, fps)
                decoded, image = video.retrieve()
                last = image if decoded else last
                if (position - 1) % vid_stride == 0:
                    error = "" if decoded else "cannot be decoded"
                    image = image if decoded else None
                    yield Frame(path, file_number, file_count, image, error, position, count, fps, time=time)
            video.release()
            if position < count and suffix_of(path) in _COUNTING_FORMATS:
                count = min(frames_shown(path) or count, count)
            video, resumed = _resume(path, position, count, last)
            lost, position = lost + resumed - position, resumed
    finally:
        if video is not None:
            video.release()
    error = _shortage(path, position, count, lost)
    if error:
        yield Frame(path, file_number, file_count, None, error, max(position, 1), count, fps, time=max(time, 0.0))


def _frame_rate(video: cv2.VideoCapture) -> float:
    """Returns a video's frames per second; a usual one where it declares none that can be."""
    fps = video.get(cv2.CAP_PROP_FPS)
    return fps if math.isfinite(fps) and 0 < fps <= 1000 else DEFAULT_FPS


def _time_of(video: cv2.VideoCapture, former: float, fps: float) -> float:
    """Returns when the frame grabbed last is shown, in s: a frame later than the former where the file does not say."""
    declared = video.get(cv2.CAP_PROP_POS_MSEC) / 1000  # 0 where it does not
    return declared if declared > former else former + 1 / fps


def _shortage(path: str, position: int, count: int, lost: int) -> str:
    """Says what a video lacks after `position` of `count` declared frames, `lost` ones between; empty if whole."""
    if position == 0:
        return "cannot be opened as a video, or has no frames"
    missing = lost + max(count - position, 0)
    tolerated = 0 if lost or suffix_of(path) in _COUNTING_FORMATS else max(1, _ESTIMATE_TOLERANCE * count)
    return f"{missing} of {count} declared frames are missing or cannot be decoded" if missing > tolerated else ""


def _resume(path: str, position: int, count: int, last: np.ndarray | None) -> tuple[cv2.VideoCapture | None, int]:
    """Looks for readable frames behind a damaged stretch.

    Args:
        path: the video.
        position: how many frames were passed.
        count: how many the video declares.
        last: the last picture read, (h, w, 3), if any was.

    Returns:
        The video opened where reading can go on and the number of frames before that place; (None, `position`) where
        there is nothing more: the decoder reached the end, having skipped frames on the way, or the rest is damaged.
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
