"""The index of mp4 and mov files: whether every frame is in the file, and which are shown when.

A `cv2.VideoWriter` knows a constant rate alone, and tells nothing where the disk is full. So what it has finished is
looked through, and gets an index with the frames' own times (`set_times`). A `cv2.VideoCapture` counts frames that are
never shown (`frames_shown`). Such a file is a row of boxes, each with its length, its kind and its content, which may
be boxes again (ISO 14496-12). Not here: encoding and decoding.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAX_INDEX_BYTES = 1 << 28
MAX_FRAMES = 10_000_000  # four days
_CONTAINERS = frozenset({b"edts", b"mdia", b"minf", b"stbl", b"trak"})
# Where a box has its duration: in its first version, with 4 bytes, and in its second, with 8
_DURATION_AT = {b"elst": (8, 8), b"mdhd": (16, 24), b"mvhd": (16, 24), b"tkhd": (20, 28)}
_SCALE_AT = (12, 20)  # of mdhd and mvhd: units a second


class Mp4Error(Exception):
    """A file that is not whole; the text says why, without its path."""


def set_times(path: Path, times_s: Sequence[float], end_s: float) -> None:
    """Checks that a file of one video track is whole and sets when its frames are shown; brings it to the disk.

    The new index is put behind the old one, which is then given up: a file that breaks off in between plays as before.

    Args:
        path: the file, of a constant rate.
        times_s: when each frame begins, rising; the first is the video's beginning.
        end_s: when the last one ends.

    Raises:
        Mp4Error: it breaks off, or frames are missing.
        OSError: it cannot be written; it plays as before.
    """
    with open(path, "rb+") as file:
        places = dict(_places(file))
        if b"moov" not in places or b"mdat" not in places:
            raise Mp4Error("it breaks off before its end")
        at, length = places[b"moov"]
        file.seek(at + 8)
        index = file.read(length - 8)
        frames, size = _frames_in(index)
        if frames != len(times_s) or size > places[b"mdat"][1]:
            raise Mp4Error(f"only {min(frames, len(times_s) - 1)} of its {len(times_s)} frames are there")
        file.seek(0, os.SEEK_END)
        file.write(_box(b"moov", _with_times(index, np.append(times_s, end_s) - times_s[0])))
        _sync(file)
        file.seek(at + 4)
        file.write(b"free")
        _sync(file)


def frames_shown(path: str | Path) -> int | None:
    """Returns how many frames of a video are shown by its edit list; None where it has none that can be read.

    One that was cut without encoding anew has frames that are only there for others to be decoded, and is told to hide
    them.
    """
    try:
        with open(path, "rb") as file:
            at, length = dict(_places(file))[b"moov"]
            file.seek(at + 8)
            index = file.read(min(length - 8, MAX_INDEX_BYTES))
        track = next(
            content
            for kind, content in _boxes(index)
            if kind == b"trak" and _found(content, b"mdia", b"hdlr")[8:12] == b"vide"
        )
        begins, edits = _begins(_found(track, b"mdia", b"minf", b"stbl")), _found(track, b"edts", b"elst")
        unit = _scale(_found(track, b"mdia", b"mdhd")) / _scale(_found(index, b"mvhd"))  # of the edits, in the frames'
        form = struct.Struct((">IiI", ">QqI")[edits[0]])
        shown = 0
        for place in range(struct.unpack_from(">I", edits, 4)[0]):
            duration, first, _rate = form.unpack_from(edits, 8 + form.size * place)
            end = first + (duration - 1) * unit if duration else np.inf  # it may have been rounded up
            shown += int(np.count_nonzero((begins >= first) & (begins < end))) if first >= 0 else 0
        return shown
    except (IndexError, KeyError, Mp4Error, OSError, StopIteration, ValueError, ZeroDivisionError, struct.error):
        return None


def _begins(table: bytes) -> np.ndarray:
    """Returns when each frame begins (n,), in the units of its track, in the order of decoding.

    Raises:
        ValueError: there are more than a file can be believed to have.
    """
    steps = _runs(_found(table, b"stts"), ">u4")
    offsets = [_runs(content, ">i4") for kind, content in _boxes(table) if kind == b"ctts"]
    begins = np.cumsum(steps) - steps
    return begins + offsets[0] if offsets else begins


def _runs(content: bytes, form: str) -> np.ndarray:
    """Returns the values (n,) of a box of rows: how often, and which.

    Raises:
        ValueError: there are more than MAX_FRAMES.
    """
    rows = np.frombuffer(content, form, 2 * struct.unpack_from(">I", content, 4)[0], 8).reshape(-1, 2).astype(np.int64)
    if not 0 <= rows[:, 0].sum() <= MAX_FRAMES or rows[:, 0].min(initial=0) < 0:
        raise ValueError
    return np.repeat(rows[:, 1], rows[:, 0])


def _sync(file: BinaryIO) -> None:
    """Brings what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _places(file: BinaryIO) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yields the kinds of a file's boxes, and where each begins and how long it is, in bytes.

    Raises:
        Mp4Error: the last one is cut.
    """
    at, end = 0, file.seek(0, os.SEEK_END)
    while at < end:
        file.seek(at)
        head = file.read(16).ljust(16, b"\0")
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if not 8 <= length <= end - at:
            raise Mp4Error("it breaks off before its end")
        yield kind, (at, length)
        at += length


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the kinds and the contents of the boxes in a box's content.

    Raises:
        Mp4Error: one is shorter than its own head.
    """
    at = 0
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if length < 8:
            raise Mp4Error("its index is damaged")
        yield kind, content[at + 8 : at + length]
        at += length


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _found(content: bytes, *kinds: bytes) -> bytes:
    """Returns the content of the first box of that kind, in one of the kind before it, and so on.

    Raises:
        Mp4Error: there is none.
    """
    for kind in kinds:
        inner = next((inner for found, inner in _boxes(content) if found == kind), None)
        if inner is None:
            raise Mp4Error(f"its index lacks '{kind.decode()}'")
        content = inner
    return content


def _frames_in(index: bytes) -> tuple[int, int]:
    """Returns how many frames an index has, and how many bytes they take."""
    sizes = _found(index, b"trak", b"mdia", b"minf", b"stbl", b"stsz")
    same, count = struct.unpack_from(">II", sizes, 4)
    return count, same * count or int(np.frombuffer(sizes, ">u4", count, 12).sum(dtype=np.int64))


def _with_times(index: bytes, times_s: np.ndarray) -> bytes:
    """Returns an index with other times (n + 1,): those of its n frames from 0 on, and the end."""
    scales = {kind: _scale(_found(index, *way, kind)) for *way, kind in ([b"mvhd"], [b"trak", b"mdia", b"mdhd"])}
    if not _found(index, b"trak", b"mdia", b"mdhd")[0]:  # times of a damaged video may lie beyond four bytes
        times_s = np.minimum(times_s, (2**32 - 1 - len(times_s)) / max(scales.values()))
    steps = np.maximum(np.diff(np.rint(times_s * scales[b"mdhd"]).astype(np.int64)), 1)  # of every frame
    firsts = np.flatnonzero(np.diff(steps, prepend=0))  # of frames that last equally long
    rows = np.stack([np.diff(firsts, append=len(steps)), steps[firsts]], axis=1).astype(">u4")

    def change(kind: bytes, content: bytes) -> bytes:
        if kind == b"stts":
            return struct.pack(">II", 0, len(rows)) + rows.tobytes()
        if kind not in _DURATION_AT:
            return content
        version = content[0]
        at, form = _DURATION_AT[kind][version], (">I", ">Q")[version]
        duration = steps.sum() * (1 if kind == b"mdhd" else scales[b"mvhd"] / scales[b"mdhd"])
        return content[:at] + struct.pack(form, round(duration)) + content[at + struct.calcsize(form) :]

    return _changed(index, change)


def _scale(content: bytes) -> int:
    """Returns the units a second of a box `mvhd` or `mdhd`."""
    return struct.unpack_from(">I", content, _SCALE_AT[content[0]])[0]


def _changed(content: bytes, change: Callable[[bytes, bytes], bytes]) -> bytes:
    """Returns a content in which `change` took the kind and the content of every box that holds no boxes itself."""
    inner = (
        (kind, _changed(old, change) if kind in _CONTAINERS else change(kind, old)) for kind, old in _boxes(content)
    )
    return b"".join(_box(kind, new) for kind, new in inner)
