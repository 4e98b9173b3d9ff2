"""What `--source` means: files, or live inputs such as cameras, network streams, YouTube pages and the screen.

`open_source` tells the kinds apart and opens what was named, so that every mistake is told before a model is loaded.
Nothing is fetched unless the user named an address.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

from utils.download import download_file, file_name_of
from utils.errors import UserError
from utils.images import IMG_FORMATS, VID_FORMATS
from utils.log import LOGGER
from utils.media.capture import Capture, ScreenCapture, Timeouts, is_screen, open_address, open_camera, parse_screen
from utils.media.sources import LIST_FORMATS, FileSource, Source, files_of_list, find_sources, read_list, suffix_of
from utils.media.streams import DEFAULT_PATIENCE, GIVE_UP_S, LiveInput, LiveSource, Patience

MAX_CAMERA_DIGITS = 9


def open_source(source: str | Path, vid_stride: int = 1, stream_timeout_s: float = GIVE_UP_S) -> Source:
    """Opens what `--source` names.

    Args:
        source: an image or video, a folder, or a glob; the http(s) address of an image or video, which is fetched into
            the working folder; a camera's number; the address of a stream or of a YouTube page; the screen (see
            `utils.media.capture`); or a list file (.txt, .streams) with one of these a line, all files or all live.
        vid_stride: of a video or live input every so many frames are used.
        stream_timeout_s: a live input that sends nothing for so long is given up; 0: never.

    Returns:
        A `FileSource`, or a `LiveSource` whose inputs all have given a frame: `close` it.

    Raises:
        UserError: nothing of that name, it cannot be opened or fetched, or a library is missing.
    """
    text = str(source).strip()
    patience = replace(DEFAULT_PATIENCE, give_up_s=stream_timeout_s or math.inf)
    if suffix_of(text) in LIST_FORMATS and os.path.isfile(os.path.expanduser(text)):
        return _open_list(os.path.expanduser(text), vid_stride, patience)
    if is_live(text):
        return LiveSource(live_inputs([text]), vid_stride, patience)
    if is_file_address(text):
        return FileSource([fetch_file(text)], vid_stride)
    if "://" in text:
        kinds = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"--source '{text}': no address that can be read; such begin with {kinds} and a server's name.")
    return FileSource(find_sources(source), vid_stride)


def is_live(source: str) -> bool:
    """Whether `source` names a camera, a stream or the screen, by its form alone."""
    return _is_camera(source) or is_screen(source) or (is_address(source) and not is_file_address(source))


def live_inputs(sources: Sequence[str]) -> list[LiveInput]:
    """Makes inputs of what `is_live`, under distinct names: a repeated one becomes `name-2`, `name-3`, ..."""
    names: list[str] = []
    for source in sources:
        name, number = name_of(source), 1
        while name in names:
            number += 1
            name = f"{name_of(source)}-{number}"
        names.append(name)
    return [_live_input(name, source) for name, source in zip(names, sources, strict=True)]


def _live_input(name: str, source: str) -> LiveInput:
    """Makes one input of what `is_live`; mistakes in its form are told here."""
    if _is_camera(source):
        return LiveInput(name, partial(open_camera, int(source)))
    if is_screen(source):
        return LiveInput(name, partial(ScreenCapture, parse_screen(source)), reconnects=False)
    if is_youtube(source):
        return LiveInput(name, partial(_open_youtube, source))
    scheme, _, rest = source.partition("://")
    address = f"{scheme.lower()}://{rest}"  # FFmpeg knows no others
    return LiveInput(name, partial(open_address, address, without_secrets(address), Timeouts()))


def _is_camera(source: str) -> bool:
    """Whether `source` is a camera's number; longer ones are no camera's."""
    return source.isascii() and source.isdigit() and len(source) <= MAX_CAMERA_DIGITS


def _open_youtube(page: str) -> Capture:
    """Opens the video of a YouTube page; its address is asked for anew each time, since it expires."""
    return open_address(resolve_youtube(page), page, Timeouts())


def _open_list(path: str, vid_stride: int, patience: Patience) -> Source:
    """Opens what a list file names: live inputs side by side, or files one after the other."""
    entries = read_list(path)
    live = [entry for entry in entries if is_live(entry)]
    if live and len(live) < len(entries):
        other = next(entry for entry in entries if entry not in live)
        raise UserError(
            f"--source '{path}': lists both live inputs ('{without_secrets(live[0])}') and files ('{other}'). "
            "Make a list of each."
        )
    if live:
        return LiveSource(live_inputs(entries), vid_stride, patience)
    return FileSource(files_of_list(path, _fetch_all(path, entries)), vid_stride)


def _fetch_all(path: str, entries: Sequence[str]) -> list[str]:
    """Fetches the addresses among a list's entries and returns the entries with the files in their places."""
    addresses: dict[str, str] = {}
    for address in filter(is_file_address, entries):
        name = file_name_of(address)
        first = addresses.setdefault(name.casefold(), address)
        if first != address:
            raise UserError(f"--source '{path}': {first} and {address} would both be saved as {name}.")
    return [fetch_file(entry) if is_file_address(entry) else entry for entry in entries]


SCHEMES = ("rtsp", "rtmp", "http", "https")
_FILE_SCHEMES = ("http", "https")
_ENDLESS_FORMATS = frozenset({"flv", "m2ts", "mts", "ts", "webm"})  # also of what cameras and programmes are sent in
_YOUTUBE_HOSTS = ("youtube.com", "youtu.be")
# Without sound; H.264 first, which every decoder reads.
_YOUTUBE_FORMAT = "bestvideo[vcodec^=avc1]/best[ext=mp4]/bestvideo/best"
_YOUTUBE_TIMEOUT_S = 10
_MAX_NAME = 100  # characters; names become file names


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
    return parts.scheme in _FILE_SCHEMES and suffix in (IMG_FORMATS | VID_FORMATS) - _ENDLESS_FORMATS


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


def resolve_youtube(page: str) -> str:
    """Returns the address of the video on a YouTube page.

    Raises:
        UserError: yt-dlp is not installed, offline, or there is no such video.
    """
    yt_dlp = _require_yt_dlp(page)
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


def _require_yt_dlp(page: str) -> ModuleType:
    """Imports yt-dlp."""
    try:
        return importlib.import_module("yt_dlp")
    except ImportError as error:
        raise UserError(f"{page} needs yt-dlp, which finds a page's video: pip install yt-dlp ({error})") from error
