"""What `--source` means: files, or live inputs such as cameras and network streams.

`open_source` is the only entry: it tells the kinds apart and opens what was named, so that every mistake is told
before a model is loaded. Not here: how files are read (`utils.data.sources`) and live inputs (`utils.data.streams`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.checks import UserError
from utils.data.capture import Capture, Timeouts, open_address, open_camera
from utils.data.remote import (
    SCHEMES,
    fetch_file,
    is_address,
    is_file_address,
    is_youtube,
    name_of,
    resolve_youtube,
    without_secrets,
)
from utils.data.screen import ScreenCapture, is_screen, parse_screen
from utils.data.sources import LIST_FORMATS, FileSource, Source, files_of_list, find_sources, read_list, suffix_of
from utils.data.streams import DEFAULT_PATIENCE, GIVE_UP_S, LiveInput, LiveSource, Patience
from utils.download import file_name_of

MAX_CAMERA_DIGITS = 9


def open_source(source: str | Path, vid_stride: int = 1, stream_timeout_s: float = GIVE_UP_S) -> Source:
    """Opens what `--source` names.

    Args:
        source: an image or video, a folder, or a glob; the http(s) address of an image or video, which is fetched into
            the working folder; a camera's number; the address of a stream or of a YouTube page; the screen (see
            `utils.data.screen`); or a list file (.txt, .streams) with one of these a line, all files or all live.
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
