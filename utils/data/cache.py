"""The label cache: a scanned `LabelTable` on disk as `.npz`, opened without pickle.

It holds for exactly the files it was made from: their paths, sizes, times of change and the format's version make up
its key. A stale or damaged cache is said to be so and made anew; caches of other programs (`.cache`) are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.checks import UserError
from utils.data.paths import image_to_label_path
from utils.data.table import Counts, LabelTable, PathList
from utils.files import atomic_write
from utils.log import LOGGER

FORMAT_VERSION = 1
SUFFIX = ".cache.npz"
_LAYOUT = {  # array name -> kind of number, dimensions
    "path_bytes": ("u1", 1),
    "path_offsets": ("i8", 1),
    "sizes_wh": ("i4", 2),
    "rows": ("f4", 2),
    "offsets": ("i8", 1),
    "seg_points": ("f4", 2),
    "seg_offsets": ("i8", 1),
    "counts": ("i8", 1),
    "messages": ("u1", 1),
}
# What numpy's and the zip reader raise on damaged content; headers of arrays are parsed as Python literals.
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, SyntaxError),
    *(OverflowError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def cache_location(sources: Sequence[Path]) -> Path:
    """Returns where the cache of these sources belongs.

    A list file's cache stands beside it, a folder's beside the folder of its labels (`labels/train.cache.npz`);
    several sources share one whose name carries a hash of all of them.
    """
    paths = [Path(source).absolute() for source in sources]
    first = paths[0]
    if first.is_file():
        base = first.with_suffix("")
    else:
        base = Path(image_to_label_path(first / "image.jpg")).parent
    tag = ""
    if len(paths) > 1:
        tag = "-" + hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()[:8]
    return base.with_name(f"{base.name}{tag}{SUFFIX}")


def cache_key(image_paths: Sequence[str], label_paths: Sequence[str]) -> str:
    """Returns a hash over the path, size and times of every image and label file and the format's version."""
    digest = hashlib.sha256(f"labels {FORMAT_VERSION}".encode())
    for image, label in zip(image_paths, label_paths, strict=True):
        digest.update(os.fsencode(f"\0{image}\0{_stamp(image)}\0{_stamp(label)}"))
    return digest.hexdigest()


def _stamp(path: str) -> str:
    """Returns a file's size and times, or a dash where there is none.

    The time of its content alone would not do: copying and unpacking programs set it. That of its inode (on Windows, of
    its creation) is the system's own.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return "-"
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def write_cache(path: Path, key: str, table: LabelTable) -> bool:
    """Writes the cache, all or nothing; a folder that cannot be written to is worth a warning, not a stop.

    Returns:
        Whether it was written.
    """
    arrays = {
        "path_bytes": table.image_paths.buffer,
        "path_offsets": table.image_paths.offsets,
        "sizes_wh": table.sizes_wh,
        "rows": table.rows,
        "offsets": table.offsets,
        "seg_points": table.seg_points,
        "seg_offsets": table.seg_offsets,
        "counts": np.asarray(table.counts, np.int64),
        "messages": np.frombuffer(json.dumps(table.messages).encode(), np.uint8),
    }
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.asarray(key), **arrays)
    except UserError as error:
        LOGGER.warning(f"WARNING: no label cache, so the next start scans again: {error}")
        return False
    return True


def read_cache(path: Path, key: str) -> LabelTable | None:
    """Returns the table kept at `path` if it was made from exactly these files, else None, saying why."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if archive["key"].shape or str(archive["key"]) != key:
                LOGGER.info(f"Label cache {path} is stale (files or format changed): scanning again")
                return None
            return _table_from({name: archive[name] for name in _LAYOUT})
    except _DAMAGE as error:
        LOGGER.warning(f"WARNING: label cache {path} is damaged ({type(error).__name__}: {error}): scanning again")
        return None


def _table_from(arrays: dict[str, np.ndarray]) -> LabelTable:
    """Builds a table after checking that the arrays fit together.

    Raises:
        ValueError: they do not.
    """
    for name, (kind, dimensions) in _LAYOUT.items():
        if arrays[name].dtype != np.dtype(kind) or arrays[name].ndim != dimensions:
            raise ValueError(f"array '{name}' is {arrays[name].dtype} with {arrays[name].ndim} dimensions")
    images, labels = len(arrays["offsets"]) - 1, len(arrays["rows"])
    _check_offsets("path_offsets", arrays["path_offsets"], images, len(arrays["path_bytes"]))
    _check_offsets("offsets", arrays["offsets"], images, labels)
    _check_offsets("seg_offsets", arrays["seg_offsets"], labels, len(arrays["seg_points"]))
    shapes = {"sizes_wh": (images, 2), "rows": (labels, 5), "seg_points": (len(arrays["seg_points"]), 2)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"array '{name}' is of shape {arrays[name].shape}, not {shape}")
    classes, boxes_xywh_norm = arrays["rows"][:, 0], arrays["rows"][:, 1:]
    if (arrays["sizes_wh"] < 1).any() or not (_within(boxes_xywh_norm) and _within(arrays["seg_points"])):
        raise ValueError("sizes, boxes or polygons out of range")
    if not (np.isfinite(classes) & (classes >= 0) & (np.floor(classes) == classes)).all():
        raise ValueError("classes are not whole numbers from 0")
    if (arrays["counts"] < 0).any():
        raise ValueError("counts are negative")
    messages = json.loads(arrays["messages"].tobytes())
    if not isinstance(messages, list) or not all(isinstance(message, str) for message in messages):
        raise ValueError("messages are not a list of strings")
    return LabelTable(
        image_paths=PathList(arrays["path_bytes"], arrays["path_offsets"]),
        counts=Counts(*arrays["counts"].tolist()),
        messages=tuple(messages),
        **{name: arrays[name] for name in ("sizes_wh", "rows", "offsets", "seg_points", "seg_offsets")},
    )


def _within(fractions: np.ndarray) -> bool:
    """Says whether all coordinates, float32 of any shape, are numbers from 0 to 1."""
    return bool(((fractions >= 0) & (fractions <= 1)).all())


def _check_offsets(name: str, offsets: np.ndarray, runs: int, end: int) -> None:
    """Refuses offsets, int64, that do not cut 0 to `end` into `runs` runs."""
    if len(offsets) != runs + 1 or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"'{name}' does not fit its array")
