"""The index of mp4 and mov files: whether every frame is in the file, and which are shown when.

A `cv2.VideoWriter` knows a constant rate alone, and tells nothing where the disk is full. So what it has finished is
looked through, and gets an index with the frames' own times (`set_times`). A `cv2.VideoCapture` counts frames that are
never shown (`frames_shown`). Such a file is a row of boxes, each with its length, its kind and its content, which may
be boxes again (ISO 14496-12). Not here: encoding and decoding.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

MAX_INDEX_BYTES = 1 << 28
MAX_FRAMES = 10_000_000  # four days
_CONTAINERS = frozenset({b"edts", b"mdia", b"minf", b"stbl", b"trak"})
# Where a box has its duration: in its first version, with 4 bytes, and in its second, with 8
_DURATION_AT = {b"elst": (8, 8), b"mdhd": (16, 24), b"mvhd": (16, 24), b"tkhd": (20, 28)}


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
    at, index, data_bytes = _read_index(path)
    if index is None or data_bytes is None:
        raise Mp4Error("it breaks off before its end")
    sizes = _found(index, b"trak", b"mdia", b"minf", b"stbl", b"stsz")
    same, frames = struct.unpack_from(">II", sizes, 4)
    frame_bytes = same * frames or int(np.frombuffer(sizes, ">u4", frames, 12).sum(dtype=np.int64))
    if frames != len(times_s) or frame_bytes > data_bytes:
        raise Mp4Error(f"only {min(frames, len(times_s) - 1)} of its {len(times_s)} frames are there")
    with open(path, "rb+") as file:
        new_index = _box(b"moov", _with_times(index, np.append(times_s, end_s) - times_s[0]))
        for place, whence, content in ((0, os.SEEK_END, new_index), (at + 4, os.SEEK_SET, b"free")):
            file.seek(place, whence)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def frames_shown(path: str | Path) -> int | None:
    """Returns how many frames of a video are shown by its edit list; None where it has none that can be read.

    One that was cut without encoding anew has frames that are only there for others to be decoded, and is told to hide
    them.
    """
    try:
        _, index, _ = _read_index(path)
        tracks = [content for kind, _, content in _boxes(index) if kind == b"trak"]
        track = next(content for content in tracks if _found(content, b"mdia", b"hdlr")[8:12] == b"vide")
        table, edits = _found(track, b"mdia", b"minf", b"stbl"), _found(track, b"edts", b"elst")
        steps = _runs(_found(table, b"stts"), ">u4")
        begins = np.cumsum(steps) - steps  # in the units of the track, in the order of decoding ...
        for kind, _, content in _boxes(table):
            if kind == b"ctts":
                begins += _runs(content, ">i4")  # ... which may be another than that of showing
        unit = _scale(_found(track, b"mdia", b"mdhd")) / _scale(_found(index, b"mvhd"))  # of the edits, in the frames'
        form = struct.Struct((">IiI", ">QqI")[edits[0]])
        shown = 0
        for place in range(struct.unpack_from(">I", edits, 4)[0]):
            duration, first, _rate = form.unpack_from(edits, 8 + form.size * place)
            end = first + (duration - 1) * unit if duration else np.inf  # it may have been rounded up
            shown += int(np.count_nonzero((begins >= first) & (begins < end))) if first >= 0 else 0
        return shown
    except (IndexError, Mp4Error, OSError, StopIteration, TypeError, ValueError, ZeroDivisionError, struct.error):
        return None


def _read_index(path: str | Path) -> tuple[int, bytes | None, int | None]:
    """Returns where a file's index begins, its content, and the bytes of the frames; None for what is not there."""
    at, index, data_bytes = 0, None, None
    if not os.path.getsize(path):
        return at, index, data_bytes
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        with memoryview(whole) as view:
            for kind, place, content in _boxes(view):
                if kind == b"moov" and len(content) > MAX_INDEX_BYTES:
                    raise Mp4Error("its index is too large")
                if kind == b"moov":
                    at, index = place, bytes(content)
                elif kind == b"mdat":
                    data_bytes = len(content)
                content.release()
    return at, index, data_bytes


def _boxes(content: bytes | memoryview) -> Iterator[tuple[bytes, int, bytes | memoryview]]:
    """Yields the kinds of the boxes in a content, where each begins, and what is in it."""
    at = 0
    while at < len(content):
        head = bytes(content[at : at + 16]).ljust(16, b"\0")
        length, kind = struct.unpack_from(">I4s", head)
        begin = 8
        if length == 1:
            length, begin = int.from_bytes(head[8:], "big"), 16
        if not begin <= length <= len(content) - at:
            raise Mp4Error("it breaks off before its end")
        yield kind, at, content[at + begin : at + length]
        at += length


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _found(content: bytes, *kinds: bytes) -> bytes:
    """Returns the content of the first box of that kind, in one of the kind before it, and so on."""
    for kind in kinds:
        inner = next((inner for found, _, inner in _boxes(content) if found == kind), None)
        if inner is None:
            raise Mp4Error(f"its index lacks '{kind.decode()}'")
        content = inner
    return content


def _runs(content: bytes, form: str) -> np.ndarray:
    """Returns the values (n,) of a box of rows: how often, and which."""
    rows = np.frombuffer(content, form, 2 * struct.unpack_from(">I", content, 4)[0], 8).reshape(-1, 2).astype(np.int64)
    if not 0 <= rows[:, 0].sum() <= MAX_FRAMES or rows[:, 0].min(initial=0) < 0:
        raise ValueError
    return np.repeat(rows[:, 1], rows[:, 0])


def _scale(content: bytes) -> int:
    """Returns the units a second of a box `mvhd` or `mdhd`."""
    return struct.unpack_from(">I", content, (12, 20)[content[0]])[0]


def _with_times(index: bytes, times_s: np.ndarray) -> bytes:
    """Returns an index with other times (n + 1,): those of its n frames from 0 on, and the end."""
    track = _found(index, b"trak", b"mdia", b"mdhd")
    video_scale, track_scale = _scale(_found(index, b"mvhd")), _scale(track)
    if not track[0]:  # times of a damaged video may lie beyond four bytes
        times_s = np.minimum(times_s, (2**32 - 1 - len(times_s)) / max(video_scale, track_scale))
    steps = np.maximum(np.diff(np.rint(times_s * track_scale).astype(np.int64)), 1)  # of every frame
    firsts = np.flatnonzero(np.diff(steps, prepend=0))  # of frames that last equally long
    rows = np.stack([np.diff(firsts, append=len(steps)), steps[firsts]], axis=1).astype(">u4")

    def changed(kind: bytes, content: bytes) -> bytes:
        if kind in _CONTAINERS or kind == b"moov":
            return b"".join(_box(inner, changed(inner, old)) for inner, _, old in _boxes(content))
        if kind == b"stts":
            return struct.pack(">II", 0, len(rows)) + rows.tobytes()
        if kind not in _DURATION_AT:
            return content
        version = content[0]
        at, form = _DURATION_AT[kind][version], (">I", ">Q")[version]
        duration = steps.sum() * (1 if kind == b"mdhd" else video_scale / track_scale)
        return content[:at] + struct.pack(form, round(duration)) + content[at + struct.calcsize(form) :]

    return changed(b"moov", index)
