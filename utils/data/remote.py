"""Addresses as inputs: which are files, which are streams; fetching the former, finding the videos of YouTube pages.

Nothing here is called unless the user named an address. Not here: reading streams (`utils.data.capture`).
"""

from __future__ import annotations

import importlib
import re
import urllib.parse
from pathlib import Path
from types import ModuleType

from utils.checks import UserError
from utils.download import download_file, file_name_of
from utils.images import IMG_FORMATS, VID_FORMATS
from utils.log import LOGGER

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
