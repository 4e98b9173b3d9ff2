"""What `--source` means, and YOLOv5's loaders of it: `LoadImages`, `LoadStreams`, `LoadScreenshots`, `LoadWebcam`.

Each loader yields frames as they come (`read()`: what the commands use), or, iterated, YOLOv5's tuples (path, image
for the model, original, capture, message); images for the model are letterboxed uint8 (3, h, w) RGB, originals uint8
(h, w, 3) BGR. `open_source` chooses one and opens what was named, so that every mistake is reported before a model is
loaded. Nothing is fetched unless the user named an address. Not here: training's images (`utils.dataloaders.dataset`).
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import math
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from utils.dataloaders.paths import UNREAD_FORMATS, is_hidden, suffix_of
from utils.downloads import download_file, file_name_of
from utils.errors import UserError, did_you_mean
from utils.files import native_path
from utils.images import IMG_FORMATS, VID_FORMATS, letterbox
from utils.log import LOGGER
from utils.media.capture import (
    Capture,
    Frame,
    ScreenCapture,
    is_screen,
    open_address,
    open_camera,
    parse_screen,
    read_frames,
)
from utils.media.streams import LiveInput, LiveSource, Patience

READ_FORMATS = IMG_FORMATS | VID_FORMATS
LIST_FORMATS = frozenset({"streams", "txt"})
SCHEMES = ("rtsp", "rtmp", "http", "https")
_ENDLESS_FORMATS = frozenset({"flv", "m2ts", "mts", "ts", "webm"})  # also of what cameras and programmes are sent in
_MAX_CAMERA_DIGITS = 9
_MAX_NAME = 100  # characters of a live input's name, which becomes a file name
_YOUTUBE_HOSTS = ("youtube.com", "youtu.be")
_YOUTUBE_FORMAT = (
    "bestvideo[vcodec^=avc1]/best[ext=mp4]/bestvideo/best"  # without sound; H.264, which all decoders read
)
_YOUTUBE_TIMEOUT_S = 10

ImageTuple = tuple[str, np.ndarray, np.ndarray, cv2.VideoCapture | None, str]
StreamsTuple = tuple[list[str], np.ndarray, list[np.ndarray], None, str]


class Source(Protocol):
    """What detection reads from, whatever stands behind it."""

    inputs: list[str]  # what results are filed under: absolute paths, or distinct names of live inputs
    live: bool  # frames are worth most when they are new: whoever reads must not read ahead

    def read(self) -> Iterator[list[Frame]]:
        """Yields what has come: one frame of a file, or one of every live input that has a new one."""

    def close(self) -> None:
        """Ends the reading and gives devices back; may be called again."""

    def report(self) -> list[str]:
        """Returns what there is to say about inputs that lost frames, a line each."""


def open_source(source: str | Path, vid_stride: int = 1, stream_timeout_s: float = Patience.give_up_s) -> Source:
    """Opens what `--source` names.

    Args:
        source: an image or video, a folder, or a glob; the http(s) address of an image or video, which is fetched into
            the working folder; a camera's number; the address of a stream or of a YouTube page; the screen (see
            `utils.media.capture`); or a list file (.txt, .streams) with one of these a line, all files or all live.
        vid_stride: of a video or live input every so many frames are used.
        stream_timeout_s: a live input that sends nothing for so long is given up; 0: never.

    Returns:
        A `LoadImages`, or a `LoadStreams` whose inputs all have given a frame: `close` it.

    Raises:
        UserError: nothing of that name, it cannot be opened or fetched, or a library is missing.
    """
    text = str(source).strip()
    entries = _entries_of(text)
    live = [entry for entry in entries if is_live(entry)]
    if live and len(live) < len(entries):
        other = next(entry for entry in entries if entry not in live)
        raise UserError(
            f"--source '{text}': lists both live inputs ('{without_secrets(live[0])}') and files ('{other}'). "
            "Make a list of each."
        )
    if live:
        patience = Patience(give_up_s=stream_timeout_s or math.inf)
        return LoadStreams(entries, vid_stride=vid_stride, patience=patience)
    if entries != [text]:
        return LoadImages(files_of_list(text, _fetch_all(text, entries)), vid_stride=vid_stride)
    if is_file_address(text):
        return LoadImages([fetch_file(text)], vid_stride=vid_stride)
    if "://" in text:
        kinds = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"--source '{text}' is not a URL that can be read: it must begin with {kinds} and a host name.")
    return LoadImages(source, vid_stride=vid_stride)


class LoadImages:
    """Images and videos of a file, a folder, a glob or a list file, images first: a `Source`.

    Iterated, it yields (path, image, original, the video's `cv2.VideoCapture` or None, message prefix). The capture is
    there to be asked (`cap.get(cv2.CAP_PROP_FPS)`), frames come from the iteration.

    Attributes:
        files: absolute paths, `nf` of them (also as `inputs`); `video_flag` says which are videos.
        mode: "image" or "video", of what was yielded last.
        count: number of the file, from 1.
        frame, frames: number of the frame, from 1, and how many the video declares; 0 for images.
        cap: the capture.
    """

    live = False

    def __init__(
        self,
        path: str | Path | Sequence[str],
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        vid_stride: int = 1,
    ) -> None:
        """Finds the files.

        Args:
            path: see `find_sources`; or a list of files, which are taken as they are.
            img_size: side, or (height, width), that images are scaled to.
            stride: the model's.
            auto: pad to the smallest rectangle of stride multiples, not to `img_size`.
            vid_stride: of a video every so many frames are read.

        Raises:
            UserError: there are none.
        """
        self.files = find_sources(path) if isinstance(path, (str, Path)) else list(path)
        self.inputs, self.nf = self.files, len(self.files)
        self.video_flag = [suffix_of(file) in VID_FORMATS for file in self.files]
        self.img_size, self.stride, self.auto, self.vid_stride = img_size, stride, auto, vid_stride
        self.mode, self.count, self.frame, self.frames = "image", 0, 0, 0
        self.cap: cv2.VideoCapture | None = None

    def __len__(self) -> int:
        return self.nf

    def read(self) -> Iterator[list[Frame]]:
        """Yields lists of one frame, damaged ones included; from the first file again each time."""
        with contextlib.closing(read_frames(self.files, self.vid_stride)) as frames:
            for frame in frames:
                yield [frame]

    def __iter__(self) -> Iterator[ImageTuple]:
        """Yields all frames of all files.

        Raises:
            UserError: a file or a part of it cannot be read.
        """
        with contextlib.closing(self.read()) as frames:
            for (frame,) in frames:
                if frame.image is None:
                    raise UserError(f"{frame.label}: {frame.error}")
                if self.count != frame.file_number:
                    self.cap = cv2.VideoCapture(native_path(frame.path)) if frame.is_video else None
                self.mode = "video" if frame.is_video else "image"
                self.count, self.frame, self.frames = frame.file_number, frame.number, frame.count
                image = _for_model(frame.image, self.img_size, self.stride, self.auto)
                yield frame.path, image, frame.image, self.cap, f"{frame.label}: "

    def close(self) -> None:
        """Does nothing: a file is open only while its frames are read."""

    def report(self) -> list[str]:
        """Returns nothing: what is wrong with a file stands in its frames."""
        return []


class LoadStreams(LiveSource):
    """Cameras, network streams and the screen, read side by side: a `Source`.

    Iterated, it yields (names, images (b, 3, h, w), originals, None, ""), one of every input in the order of `sources`.

    Attributes:
        sources: the inputs' names (also as `inputs`).
        count: how often all of them were looked at.
        mode: "stream".
    """

    mode = "stream"

    def __init__(
        self,
        sources: str | Path | Sequence[str] = "streams.txt",
        img_size: int | Sequence[int] = 640,
        stride: int = 32,
        auto: bool = True,
        vid_stride: int = 1,
        patience: Patience | None = None,
    ) -> None:
        """Opens what `is_live`: one, all that a text file lists, or a list of them; see `LiveSource`.

        Raises:
            UserError: one of them cannot be opened, or these are files.
        """
        entries = _entries_of(str(sources)) if isinstance(sources, (str, Path)) else list(sources)
        if not all(map(is_live, entries)):
            raise UserError(f"'{sources}' names files, not live inputs: read them with LoadImages.")
        super().__init__(live_inputs(entries), vid_stride, patience)
        self.sources, self.count = self.inputs, 0
        self.img_size, self.stride, self.auto = img_size, stride, auto

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[StreamsTuple | ImageTuple]:
        """Yields batches; images of different shapes are padded to squares."""
        for originals in self._rounds():
            alike = len({image.shape for image in originals}) == 1
            images = [_for_model(image, self.img_size, self.stride, self.auto and alike) for image in originals]
            yield self.sources, np.stack(images), originals, None, ""

    def _rounds(self) -> Iterator[list[np.ndarray]]:
        """Yields the newest image (h, w, 3) of every input, once all have a new one; tells at the end what was lost.

        It ends when the inputs end; one that is silent keeps the others waiting, so that positions stay the same.
        """
        newest: dict[int, np.ndarray] = {}
        with contextlib.closing(self):
            for frames in self.read():
                newest.update({frame.file_number - 1: frame.image for frame in frames if frame.image is not None})
                if len(newest) == len(self.sources):
                    self.count += 1
                    yield [newest.pop(number) for number in range(len(self.sources))]
        for line in self.report():
            LOGGER.info(line)


class LoadScreenshots(LoadStreams):
    """The screen, `screen [number] [left top width height]`: yields (name, image, original, None, message prefix)."""

    def __init__(
        self, source: str = "screen", img_size: int | Sequence[int] = 640, stride: int = 32, auto: bool = True
    ) -> None:
        super().__init__([source], img_size, stride, auto)

    def __iter__(self) -> Iterator[ImageTuple]:
        for (original,) in self._rounds():
            image = _for_model(original, self.img_size, self.stride, self.auto)
            yield self.sources[0], image, original, None, f"{self.sources[0]} {self.count}: "


class LoadWebcam(LoadStreams):
    """A camera seen as in a mirror: yields ("webcam.jpg", image (3, h, w), original (h, w, 3), None, prefix)."""

    def __init__(self, pipe: str = "0", img_size: int | Sequence[int] = 640, stride: int = 32) -> None:
        super().__init__([str(pipe)], img_size, stride)

    def __iter__(self) -> Iterator[ImageTuple]:
        for (original,) in self._rounds():
            mirrored = cv2.flip(original, 1)
            image = _for_model(mirrored, self.img_size, self.stride, self.auto)
            yield "webcam.jpg", image, mirrored, None, f"webcam {self.count}: "


def _for_model(image: np.ndarray, img_size: int | Sequence[int], stride: int, auto: bool) -> np.ndarray:
    """Letterboxes an image (h, w, 3) BGR and returns it as (3, h, w) RGB, contiguous."""
    boxed = letterbox(image, img_size, auto=auto, stride=int(stride)).image
    return np.ascontiguousarray(boxed.transpose(2, 0, 1)[::-1])


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
        paths = sorted(entry.path for entry in os.scandir(text))
        paths = [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # and dead links
        candidates = [path for path in paths if not is_hidden(os.path.basename(path))]
        hidden = [path for path in paths if is_hidden(os.path.basename(path)) and suffix_of(path) in READ_FORMATS]
        if hidden:
            LOGGER.info(f"{text}: {len(hidden)} hidden files are skipped, such as {hidden[0]}")
    elif os.path.isfile(text) and suffix_of(text) in LIST_FORMATS:
        return files_of_list(text, read_list(text))
    elif os.path.isfile(text):
        if suffix_of(text) not in READ_FORMATS:
            image = suffix_of(text) in UNREAD_FORMATS
            reason = "images of this kind are not read" if image else "not an image or a video by its suffix"
            advice = " Convert it to JPEG or PNG." if image else ""
            raise UserError(f"--source '{text}': {reason}. {_formats()}{advice}")
        return [os.path.abspath(text)]
    elif glob.has_magic(text):
        candidates = sorted(path for path in glob.glob(text, recursive=True) if os.path.isfile(path))
    else:
        parent, where = os.path.dirname(text) or ".", os.path.abspath(text)
        hint = did_you_mean(os.path.basename(text), os.listdir(parent) if os.path.isdir(parent) else [])
        raise UserError(f"--source '{source}': no file, folder, glob or list file (.txt) at {where}.{hint}")
    unread = [path for path in candidates if suffix_of(path) in UNREAD_FORMATS - READ_FORMATS]
    if unread:
        kinds = ", ".join(sorted({suffix_of(path) for path in unread}))
        LOGGER.warning(
            f"WARNING: --source '{source}': {len(unread)} images are left out, such as {unread[0]}: files of these "
            f"kinds ({kinds}) are not read. Convert them to JPEG or PNG."
        )
    return _images_first([path for path in candidates if suffix_of(path) in READ_FORMATS], text)


def _images_first(paths: Sequence[str], source: str) -> list[str]:
    """Makes paths absolute, drops repeated ones, puts videos last; refuses an empty list."""
    unique = list(dict.fromkeys(os.path.abspath(path) for path in paths))
    if not unique:
        nested = os.path.isdir(source) and any(entry.is_dir() for entry in os.scandir(source))
        hint = (
            f" Subfolders are not searched: give '{os.path.join(source, '**', '*')}' for all of them." if nested else ""
        )
        raise UserError(f"--source '{source}': no images or videos found there.{hint} {_formats()}")
    return sorted(unique, key=lambda path: suffix_of(path) in VID_FORMATS)


def _formats() -> str:
    return f"Images: {', '.join(sorted(IMG_FORMATS))}; videos: {', '.join(sorted(VID_FORMATS))}."


def _entries_of(source: str) -> list[str]:
    """Returns what a list file names; of anything else, itself."""
    path = os.path.expanduser(source)
    return read_list(path) if suffix_of(source) in LIST_FORMATS and os.path.isfile(path) else [source]


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

    Those that begin with ./ are always relative to the list.

    Raises:
        UserError: there are none.
    """
    folder, files = os.path.dirname(os.path.abspath(os.path.expanduser(path))), []
    for entry in entries:
        expanded = os.path.expanduser(entry)
        beside = os.path.join(folder, expanded)
        from_list = entry.startswith(("./", ".\\")) or (not os.path.exists(expanded) and os.path.exists(beside))
        files.append(beside if from_list else expanded)
    return _images_first(files, path)


def _fetch_all(path: str, entries: Sequence[str]) -> list[str]:
    """Fetches the addresses among a list's entries and returns the entries with the files in their places."""
    addresses: dict[str, str] = {}
    for address in filter(is_file_address, entries):
        name = file_name_of(address)
        first = addresses.setdefault(name.casefold(), address)
        if first != address:
            raise UserError(f"--source '{path}': {first} and {address} would both be saved as {name}.")
    return [fetch_file(entry) if is_file_address(entry) else entry for entry in entries]


def fetch_file(address: str) -> str:
    """Fetches an image or video into the working folder, under the name that the address ends in.

    A file of that name that is there already is taken instead, which is said.

    Returns:
        The file's absolute path.

    Raises:
        UserError: offline, not found, cut short, or the folder cannot be written to.
    """
    target = Path(file_name_of(address)).absolute()
    if target.is_file():
        LOGGER.info(f"Using {target}, which is there already, for {without_secrets(address)}; delete it to fetch anew")
    else:
        download_file(address, target)
    return str(target)


def is_live(source: str) -> bool:
    """Whether `source` names a camera, a stream or the screen, by its form alone."""
    return _is_camera(source) or is_screen(source) or (is_address(source) and not is_file_address(source))


def _is_camera(source: str) -> bool:
    return source.isascii() and source.isdigit() and len(source) <= _MAX_CAMERA_DIGITS


def live_inputs(sources: Sequence[str]) -> list[LiveInput]:
    """Makes inputs of what `is_live`, under distinct names: a repeated one becomes `name-2`, `name-3`, ..."""
    inputs: dict[str, LiveInput] = {}
    for source in sources:
        name, number = name_of(source), 1
        while name in inputs:
            number += 1
            name = f"{name_of(source)}-{number}"
        if _is_camera(source):
            inputs[name] = LiveInput(name, partial(open_camera, int(source)))
        elif is_screen(source):
            inputs[name] = LiveInput(name, partial(ScreenCapture, *parse_screen(source)), reconnects=False)
        elif is_youtube(source):
            inputs[name] = LiveInput(name, partial(_open_youtube, source))
        else:
            scheme, _, rest = source.partition("://")
            address = f"{scheme.lower()}://{rest}"  # FFmpeg knows no others
            inputs[name] = LiveInput(name, partial(open_address, address, without_secrets(address)))
    return list(inputs.values())


def is_address(source: str) -> bool:
    """Whether `source` is an address of a kind that can be read."""
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError:  # brackets in the wrong place
        return False
    return "://" in source and parts.scheme in SCHEMES and bool(parts.hostname)


def is_file_address(source: str) -> bool:
    """Whether an address is that of an image or video file, by its suffix: such are fetched, then read.

    Those of kinds that may have no end are read as streams, which loses no frame of a file either.
    """
    if not is_address(source) or is_youtube(source):
        return False
    parts = urllib.parse.urlsplit(source)
    suffix = Path(parts.path).suffix.lower().lstrip(".")
    return parts.scheme in ("http", "https") and suffix in READ_FORMATS - _ENDLESS_FORMATS


def is_youtube(source: str) -> bool:
    """Whether an address is that of a video's page on YouTube."""
    host = (urllib.parse.urlsplit(source).hostname or "") if is_address(source) else ""
    return any(host == known or host.endswith(f".{known}") for known in _YOUTUBE_HOSTS)


def without_secrets(address: str) -> str:
    """Returns an address fit for messages: user, password and query are left out (a YouTube page's query stays)."""
    parts = urllib.parse.urlsplit(address)
    place = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, place, parts.path, parts.query if is_youtube(address) else "", ""))


def name_of(source: str) -> str:
    """Returns the name that a live input's results are filed under: letters, digits, `-` and `_` alone."""
    shown = without_secrets(source) if is_address(source) else source
    return re.sub(r"[^\w-]+", "_", shown).strip("_")[:_MAX_NAME] or "stream"


def _open_youtube(page: str) -> Capture:
    """Opens the video of a YouTube page; its address is asked for anew each time, since it expires."""
    return open_address(resolve_youtube(page), page)


def resolve_youtube(page: str) -> str:
    """Returns the address of the video on a YouTube page.

    Raises:
        UserError: yt-dlp is not installed, offline, or there is no such video.
    """
    try:
        yt_dlp = importlib.import_module("yt_dlp")
    except ImportError as error:
        raise UserError(f"{page} needs yt-dlp, which finds a page's video: pip install yt-dlp ({error})") from error
    options = {
        **{"format": _YOUTUBE_FORMAT, "noplaylist": True, "quiet": True, "no_warnings": True, "noprogress": True},
        **{"socket_timeout": _YOUTUBE_TIMEOUT_S, "retries": 0, "extractor_retries": 0, "logger": _DebugLog()},
    }
    try:
        with yt_dlp.YoutubeDL(options) as reader:
            found = reader.extract_info(page, download=False)
    except yt_dlp.utils.YoutubeDLError as error:
        reason = str(error).partition("\n")[0].partition(" (caused by")[0].removeprefix("ERROR: ")
        raise UserError(f"Failed to open {page}: {reason} (offline, no such video, or yt-dlp is too old).") from error
    address = (found or {}).get("url")
    if not address:
        raise UserError(f"Failed to open {page}: it is not the page of one video.")
    return address


class _DebugLog:
    """Where yt-dlp writes to; what ends its work also arrives as an exception."""

    def debug(self, message: str) -> None:
        """Takes a message of any weight."""
        LOGGER.debug(message)

    info = warning = error = debug
