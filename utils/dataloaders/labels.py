"""Labels: the rules of label files, the scan of a data set, its table in memory and its cache on disk.

A label that breaks the rules stops the run with its file and line; an image that cannot be used is left out, counted
and named. The table is a few flat arrays: lists of small arrays would be copied page by page into every worker process.
The cache is an `.npz` opened without pickle; a stale or damaged one is said to be so and made anew.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
import tokenize
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from utils.dataloaders.paths import image_to_label_path, list_images
from utils.errors import UserError
from utils.files import atomic_write, remove_temporaries
from utils.images import ImageError, check_image
from utils.log import LOGGER, progress
from utils.process import process_map

if TYPE_CHECKING:
    from utils.dataloaders.config import DataSpec

TOLERANCE = 1e-4  # coordinates this far outside 0 to 1 are rounding (0.06 px in 640) and are clipped
SHOWN_MESSAGES = 30  # warnings printed one by one; the rest is counted
POOL_FROM = 5000  # images; fewer are scanned sooner than processes start
CHUNK = 256  # images handed to a process at a time
INVISIBLE = "\u200b\u2060\ufeff"  # of no width; Python does not count them as spaces
MANY_NULS = 0.4  # of a file's bytes; numbers in UTF-16 have half, in UTF-32 three quarters
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


class PathList(Sequence[str]):
    """A read-only list of path strings kept in one byte buffer."""

    def __init__(self, buffer: np.ndarray, offsets: np.ndarray):
        """Wraps `buffer`, uint8 (B,), in which string i is the bytes `offsets[i]` to `offsets[i + 1]`, int64 (N+1,)."""
        self.buffer = buffer
        self.offsets = offsets

    @classmethod
    def from_strings(cls, paths: Iterable[str]) -> PathList:
        """Packs strings, keeping also those that the file system's encoding cannot express."""
        encoded = [os.fsencode(path) for path in paths]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets_of([len(item) for item in encoded]))

    def __len__(self) -> int:
        """Returns N."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> str | PathList:
        """Returns a string, or for a slice a list of the same kind."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        position = range(len(self))[index]  # negative ones count from the end; IndexError beyond
        return os.fsdecode(self.buffer[self.offsets[position] : self.offsets[position + 1]].tobytes())

    def take(self, indices: np.ndarray) -> PathList:
        """Returns the strings at `indices`, int (K,), in that order."""
        flat, offsets = gather_runs(self.offsets, indices)
        return PathList(self.buffer[flat], offsets)


class Counts(NamedTuple):
    """What a scan found; `found` counts label files, empty ones included, and `corrupt` the images left out."""

    found: int = 0
    missing: int = 0
    empty: int = 0
    corrupt: int = 0
    total: int = 0

    def __str__(self) -> str:
        """Returns the counts as progress lines show them."""
        return f"{self.found} found, {self.missing} missing, {self.empty} empty, {self.corrupt} corrupt"


@dataclass(frozen=True, eq=False)
class LabelTable:
    """N images with M labels in flat arrays.

    Attributes:
        image_paths: the N images' absolute paths.
        sizes_wh: int32 (N, 2), width and height in pixels after EXIF orientation.
        rows: float32 (M, 5), [class, x, y, w, h] per label, the box's centre and size in 0 to 1 of the image.
        offsets: int64 (N+1,); image i has the rows `offsets[i]` to `offsets[i + 1]`.
        seg_points: float32 (P, 2), polygon points in 0 to 1 of the image.
        seg_offsets: int64 (M+1,); row j has the points `seg_offsets[j]` to `seg_offsets[j + 1]`, none for a plain box.
        counts: what the scan found.
        messages: one line per image left out and per file with something to say.
    """

    image_paths: PathList
    sizes_wh: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    seg_points: np.ndarray
    seg_offsets: np.ndarray
    counts: Counts = Counts()
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.image_paths)

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """Of each label its image, int64 (M,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def labels(self, index: int) -> np.ndarray:
        """Returns image `index`'s labels, a float32 (n, 5) view of `rows`."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def segments(self, index: int) -> list[np.ndarray]:
        """Returns image `index`'s polygons, one float32 (k, 2) view per label; k is 0 for a plain box."""
        bounds = self.seg_offsets[self.offsets[index] : self.offsets[index + 1] + 1]
        return [self.seg_points[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]

    def subset(self, indices: Sequence[int] | np.ndarray) -> LabelTable:
        """Returns the images at `indices`, in that order, with their labels; counts and messages stay the scan's."""
        indices = np.asarray(indices, np.int64)
        row_index, offsets = gather_runs(self.offsets, indices)
        point_index, seg_offsets = gather_runs(self.seg_offsets, row_index)
        return replace(
            self,
            image_paths=self.image_paths.take(indices),
            sizes_wh=self.sizes_wh[indices],
            rows=self.rows[row_index],
            offsets=offsets,
            seg_points=self.seg_points[point_index],
            seg_offsets=seg_offsets,
        )


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where runs of `lengths`, int (N,), begin and end: int64 (N+1,), the first 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


def gather_runs(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picks runs of a flat array.

    Args:
        offsets: int64 (N+1,), where the runs begin and end.
        indices: int (K,), the runs wanted.

    Returns:
        The flat positions of all their elements, int64, and the new offsets, int64 (K+1,).
    """
    starts = offsets[:-1][indices]
    new_offsets = offsets_of(offsets[1:][indices] - starts)
    flat = np.repeat(starts - new_offsets[:-1], np.diff(new_offsets)) + np.arange(new_offsets[-1])
    return flat, new_offsets


class LabelProblem(NamedTuple):
    """A line that breaks the rules; `line` counts from 1, 0 is the file as a whole."""

    path: str
    line: int
    reason: str


class ParsedLabels(NamedTuple):
    """One label file."""

    rows: np.ndarray  # float32 (n, 5), [class, x, y, w, h] in 0 to 1
    polygons: list[np.ndarray]  # n of float32 (k, 2); k is 0 for a box
    duplicates: int  # rows left out because they repeat an earlier one
    problems: list[LabelProblem]


NO_POINTS = np.zeros((0, 2), np.float32)
NO_LABELS = ParsedLabels(np.zeros((0, 5), np.float32), [], 0, [])


def load_labels(
    sources: Sequence[Path],
    spec: DataSpec | None = None,
    single_cls: bool = False,
    workers: int | None = None,
    prefix: str = "",
    need_labels: bool = True,
    kpt_shape: tuple[int, int] | None = None,
) -> LabelTable:
    """Finds, checks and reads the images and labels of folders and list files, through the label cache.

    Args:
        sources: folders and list files, as in `DataSpec.train`.
        spec: whose number of classes the labels must keep to, and whose `kpt_shape` says whether there are keypoints;
            None leaves class ids unchecked.
        single_cls: make all labels class 0; their class ids are then not checked.
        workers: processes to scan with; 0 or 1 scan in this one; None chooses.
        prefix: what log lines begin with ("train: ").
        need_labels: whether images without a single label are an error, not just a warning.
        kpt_shape: as in `DataSpec`; None takes the spec's.

    Raises:
        UserError: no images; no usable image; no labels at all; a label that breaks the rules; a class id beyond nc;
            keypoints that the spec does not tell of.
    """
    kpt_shape = kpt_shape or (spec.kpt_shape if spec else None)
    images = list_images(sources)
    location = cache_location(sources)
    remove_temporaries(location.parent, location.name, abandoned=True)  # of a start that was killed while writing
    key = cache_key(images, [image_to_label_path(image) for image in images])
    key += " with {} keypoints of {} numbers".format(*kpt_shape) if kpt_shape else ""
    table = read_cache(location, key)
    shown = str(location if table is not None else sources[0] if len(sources) == 1 else location.parent)
    if table is None:
        table = scan_images(images, workers, f"{prefix}Scanning '{shown}' images and labels...", kpt_shape)
        if not len(table):
            raise UserError(f"None of the {len(images)} images can be used; the first: {table.messages[0]}.")
        if write_cache(location, key, table):
            LOGGER.info(f"{prefix}New cache created: {location}")
    else:
        LOGGER.info(f"{prefix}Scanning '{shown}' images and labels... {table.counts}")
    more = len(table.messages) - SHOWN_MESSAGES
    for message in [*table.messages[:SHOWN_MESSAGES], *([f"... and {more} more like these"] if more > 0 else [])]:
        LOGGER.warning(f"{prefix}WARNING: {message}")
    if not len(table.rows):
        if need_labels:
            raise UserError(_why_no_labels(table))
        LOGGER.warning(f"{prefix}WARNING: {_why_no_labels(table)}")
    if kpt_shape is None:
        refuse_keypoints(table, spec)
    if single_cls:
        return replace(table, rows=table.rows * np.float32([0, 1, 1, 1, 1]))
    if spec is not None:
        check_classes(table, spec)
    return table


def scan_images(
    images: Sequence[str],
    workers: int | None = None,
    desc: str = "",
    kpt_shape: tuple[int, int] | None = None,
) -> LabelTable:
    """Checks images and reads their labels, showing progress.

    Args:
        images: absolute paths.
        workers: see `load_labels`.
        desc: what the progress bar says before the counts.
        kpt_shape: see `read_label_file`.

    Raises:
        UserError: label lines that break the rules.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    tables, problems, counts = [], [], Counts()
    with progress(total=len(images), desc=desc, unit="img") as bar:
        scan = functools.partial(scan_chunk, kpt_shape=kpt_shape)
        for table, found in process_map(scan, chunks, workers if len(images) >= POOL_FROM else 0):
            tables.append(table)
            problems += found
            counts = Counts(*map(sum, zip(counts, table.counts, strict=True)))
            bar.set_description_str(f"{desc} {counts}", refresh=False)
            bar.update(table.counts.total)
    if problems:
        raise UserError(describe_problems(problems))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name) for table in tables])

    def joined_offsets(offsets: Iterable[np.ndarray]) -> np.ndarray:
        return offsets_of(np.concatenate([np.diff(one) for one in offsets]))

    tables = tables or [scan_chunk([])[0]]
    paths = [table.image_paths for table in tables]
    return LabelTable(
        PathList(np.concatenate([one.buffer for one in paths]), joined_offsets(one.offsets for one in paths)),
        sizes_wh=joined("sizes_wh"),
        rows=joined("rows"),
        offsets=joined_offsets(table.offsets for table in tables),
        seg_points=joined("seg_points"),
        seg_offsets=joined_offsets(table.seg_offsets for table in tables),
        counts=counts,
        messages=tuple(message for table in tables for message in table.messages),
    )


def scan_chunk(
    images: Iterable[str], kpt_shape: tuple[int, int] | None = None
) -> tuple[LabelTable, list[LabelProblem]]:
    """Checks some images and reads their labels; returns also the label lines that break the rules."""
    paths, sizes_wh, labels, messages, problems = [], [], [], [], []
    missing = empty = corrupt = 0
    for image in images:
        try:
            info = check_image(image)
        except ImageError as error:
            corrupt += 1
            messages.append(f"{image}: image left out: it {error}")
            continue
        label_path = image_to_label_path(image)
        parsed = read_label_file(label_path, kpt_shape)
        if parsed is None:
            missing += 1
            parsed = NO_LABELS
        else:
            empty += len(parsed.rows) == 0
        if parsed.duplicates:
            messages.append(f"{label_path}: {parsed.duplicates} duplicate label(s) left out")
        problems += parsed.problems
        paths.append(image)
        sizes_wh.append((info.width, info.height))
        labels.append(parsed)
    counts = Counts(len(paths) - missing, missing, empty, corrupt, len(paths) + corrupt)
    return replace(table_of(paths, sizes_wh, labels), counts=counts, messages=tuple(messages)), problems


def table_of(paths: Iterable[str], sizes_wh: Iterable[tuple[int, int]], labels: Sequence[ParsedLabels]) -> LabelTable:
    """Makes a table of images, their sizes in px and their labels."""
    polygons = [polygon for parsed in labels for polygon in parsed.polygons]
    return LabelTable(
        image_paths=PathList.from_strings(paths),
        sizes_wh=np.array(list(sizes_wh), np.int32).reshape(-1, 2),
        rows=np.concatenate([NO_LABELS.rows, *(parsed.rows for parsed in labels)]),
        offsets=offsets_of([len(parsed.rows) for parsed in labels]),
        seg_points=np.concatenate([NO_POINTS, *polygons]),
        seg_offsets=offsets_of([len(polygon) for polygon in polygons]),
    )


def read_label_file(path: str | Path, kpt_shape: tuple[int, int] | None = None) -> ParsedLabels | None:
    """Reads a label file; None when there is none.

    A line of 5 numbers is a box, `class x y w h`; one of 7 or more, odd in number, is a polygon,
    `class x1 y1 x2 y2 ...`, whose box is that of its points. All coordinates are fractions of the image, 0 to 1.
    With `kpt_shape`, (keypoints, numbers each), there are no polygons: keypoints may follow a box, and are not used.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        if gone and not os.path.islink(path):
            return None
        problem = LabelProblem(str(path), 0, f"cannot be read ({'is a link to nothing' if gone else error.strerror})")
        return NO_LABELS._replace(problems=[problem])
    rows, polygons, problems = [], [], []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        tokens = line.split()
        if not tokens:
            continue
        try:
            row, polygon = _parse_line(tokens, kpt_shape)
        except ValueError as error:
            reason = _notation_problem(line) or _keypoints_problem(tokens) or str(error)
            problems.append(LabelProblem(str(path), number, reason))
            continue
        rows.append(row)
        polygons.append(polygon)
    if problems and (reason := _encoding_problem(content)):
        problems = [LabelProblem(str(path), 0, reason)]
    rows = np.array(rows, np.float32).reshape(-1, 5)
    first_seen: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        first_seen.setdefault(row.tobytes(), index)
    kept = list(first_seen.values())
    return ParsedLabels(rows[kept], [polygons[index] for index in kept], len(rows) - len(kept), problems)


def _parse_line(tokens: list[bytes], kpt_shape: tuple[int, int] | None) -> tuple[list[float], np.ndarray]:
    """Reads a label line: [class, x, y, w, h] and the polygon's points, float32 (k, 2); or ValueError says why not."""
    count = len(tokens)
    if kpt_shape and kpt_shape[0]:
        keypoints, each = kpt_shape
        if count not in (5, 5 + keypoints * each):
            raise ValueError(f"{count} numbers; a box has 5, and {keypoints * each} more with kpt_shape {[*kpt_shape]}")
        if not all(map(_is_number, tokens[5:])):
            raise ValueError(f"{_text(next(one for one in tokens[5:] if not _is_number(one)))} is not a number")
        tokens, count = tokens[:5], 5
    if count < 5 or count % 2 == 0:
        confidence = "; a sixth is a confidence (--save-conf), which labels do not have" if count == 6 else ""
        raise ValueError(f"{count} numbers; a box has 5 and a polygon 7, 9, 11, ...{confidence}")
    try:
        values = [float(token) for token in tokens]
    except ValueError:
        wrong = [token for token in tokens if not _is_number(token)]
        by_name = " (a class is written as its number, 0 for the first name)" if wrong == tokens[:1] else ""
        raise ValueError(f"{_text(wrong[0])} is not a number{by_name}") from None
    label, coordinates = values[0], values[1:]
    if not (0 <= label < 1e7 and label == int(label)):
        raise ValueError(f"class {_text(tokens[0])} is not a whole number from 0")
    low, high, total = min(coordinates), max(coordinates), sum(coordinates)
    if total != total or low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(_out_of_range(tokens[1:], coordinates))
    if low < 0 or high > 1:
        coordinates = [min(max(value, 0.0), 1.0) for value in coordinates]
    if count == 5:
        return [label, *coordinates], NO_POINTS
    xs, ys = coordinates[::2], coordinates[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    box_xywh_norm = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return [label, *box_xywh_norm], np.array(coordinates, np.float32).reshape(-1, 2)


def _text(token: bytes) -> str:
    return repr(token[:40].decode(errors="replace"))


def _is_number(token: bytes) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _out_of_range(tokens: Sequence[bytes], coordinates: Sequence[float]) -> str:
    for token, value in zip(tokens, coordinates, strict=True):
        if value != value:
            return f"coordinate {_text(token)} is not a number"
        if value < -TOLERANCE:
            return f"coordinate {_text(token)} is negative"
        if value > 1 + TOLERANCE:
            return f"coordinate {_text(token)} is beyond 1 (coordinates are fractions of the image, not pixels)"
    return "coordinates are not within 0 to 1"


def _notation_problem(line: bytes) -> str:
    """Says what to change in a line that breaks the rules because it is written in another notation; else empty."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode("latin-1")
    blank = next((char for char in text if not char.isascii() and (char.isspace() or char in INVISIBLE)), None)
    if blank:
        name = unicodedata.name(blank, "another blank").lower()
        return f"has a {name} (U+{ord(blank):04X}): put plain spaces between the numbers"
    if line.strip() == b"\x1a":
        return "is the end-of-file mark of DOS (Ctrl-Z, byte 1A): delete it"
    numbers, hash_sign, _ = line.partition(b"#")
    if hash_sign and all(map(_is_number, numbers.split())):
        return "has a comment (#), which label files do not have: delete it"
    by_semicolons, by_commas = line.replace(b";", b" ").split(), re.sub(b"[;,]", b" ", line).split()
    if b";" in line and all(_is_number(token.replace(b",", b".")) for token in by_semicolons):
        return "numbers are separated by semicolons: put spaces between them, and points into them (0 0.5 0.5 0.2 0.2)"
    if b"," in line and all(_is_number(token.replace(b",", b".")) for token in line.split()):
        decimal = next(token for token in line.split() if b"," in token)
        return f"{_text(decimal)} is not a number: it has a decimal comma; write {_text(decimal.replace(b',', b'.'))}"
    if b"," in line and all(map(_is_number, by_commas)):
        return "numbers are separated by commas: put spaces between them (0 0.5 0.5 0.2 0.2)"
    return ""


def _keypoints_problem(tokens: Sequence[bytes]) -> str:
    """Says of a line that breaks the rules that it has keypoints: x, y and 0, 1 or 2 for each behind its box."""
    marks = tokens[7::3]
    if not marks or (len(tokens) - 5) % 3 or not all(_is_number(mark) and float(mark) in (0, 1, 2) for mark in marks):
        return ""
    return (
        f"{len(tokens)} numbers, a box with {len(marks)} keypoints, it seems: if so, write 'kpt_shape: "
        f"[{len(marks)}, 3]' into the data set's YAML, which takes the boxes alone"
    )


def _encoding_problem(content: bytes) -> str:
    """Says that a label file is no text in UTF-8; empty where it seems to be."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return "is text in UTF-16 or UTF-32: save it in UTF-8"
    if content.count(0) >= MANY_NULS * len(content):
        return f"{content.count(0)} of its {len(content)} bytes are NUL: it is damaged, or in UTF-16 (save it in UTF-8)"
    return ""


def describe_problems(problems: Sequence[LabelProblem]) -> str:
    """Words the first of some problems, and how many more there are."""
    first = problems[0]
    where = f"{first.path}, line {first.line}" if first.line else first.path
    more = ""
    if len(problems) > 1:
        files = len({problem.path for problem in problems})
        more = f" {len(problems)} such lines in {files} file(s); the next: " + "; ".join(
            f"{problem.path}, line {problem.line}: {problem.reason}" for problem in problems[1:4]
        )
    return f"Label file {where}: {first.reason}.{more} Fix the label(s) and rerun."


def _why_no_labels(table: LabelTable) -> str:
    """Returns why there is nothing to learn or to score: empty label files, or none where they were looked for."""
    image, label = table.image_paths[0], image_to_label_path(table.image_paths[0])
    if table.counts.found:
        return f"All {table.counts.found} label files are empty, for example {label}: no labels at all."
    why = (
        f"No label file found for any of {len(table)} images. For {image} the labels were looked for in {label}: "
        "the last '/images/' of the path becomes '/labels/' (without one they stand beside the image), and the "
        "suffix '.txt'."
    )
    beside = [(f"{os.path.splitext(image)[0]}.txt", image_to_label_path(image)) for image in table.image_paths]
    misplaced = [(path, label) for path, label in beside if os.path.isfile(path)]
    if misplaced:
        path, label = misplaced[0]
        why += (
            f" {len(misplaced)} label files stand beside their images, such as {path}: move them to "
            f"{os.path.dirname(label)}."
        )
    return why


def check_classes(table: LabelTable, spec: DataSpec) -> None:
    """Refuses a class id that is not below the data set's number of classes, with its file and line."""
    beyond = np.flatnonzero(table.rows[:, 0] >= spec.nc)
    if not len(beyond):
        return
    label = int(table.rows[beyond[0], 0])
    path = image_to_label_path(table.image_paths[table.owners[beyond[0]]])
    lines = enumerate(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1)
    number = next((number for number, line in lines if line.split() and float(line.split()[0]) == label), None)
    owner = f" of {spec.source}" if spec.source else ""
    more = f" ({len(beyond)} such labels in all)" if len(beyond) > 1 else ""
    raise UserError(
        f"Label class {label} exceeds nc={spec.nc}: allowed are 0 to {spec.nc - 1}. Found in {path}, line {number}"
        f"{more}. Fix the label or the names{owner}."
    )


def refuse_keypoints(table: LabelTable, spec: DataSpec | None) -> None:
    """Refuses polygons that are boxes with keypoints, `class x y w h` and x, y or x, y, visibility of each.

    Raises:
        UserError: they are, all with the same number of keypoints.
    """
    counts = np.diff(table.seg_offsets)
    rows = np.flatnonzero(counts)
    if not len(rows) or counts[rows].max() != counts[rows].min():
        return  # every object has the same keypoints
    each = _numbers_of_keypoints(table.seg_points.reshape(len(rows), -1))
    if each:
        keypoints = (2 * int(counts[rows[0]]) - 4) // each
        path = image_to_label_path(table.image_paths[table.owners[rows[0]]])
        raise UserError(
            f"Label file {path}: its lines of {5 + keypoints * each} numbers, like all {len(rows)} such lines, seem to "
            f"be boxes with {keypoints} keypoints, not polygons. Write "
            f"'kpt_shape: [{keypoints}, {each}]' into {spec.source if spec and spec.source else 'the data set YAML'}, "
            "which takes the boxes alone (or 'kpt_shape: [0, 2]' if they are polygons)."
        )


def _numbers_of_keypoints(values: np.ndarray) -> int:
    """Says how many numbers a keypoint has in rows that look like boxes with keypoints: 3 or 2; 0 if they do not.

    Args:
        values: float32 (n, m), m even, all that stands behind the classes of n lines.

    The keypoints lie within the first four numbers' box, which lies within the image, in nearly all lines; and in half
    of them on all sides of its centre and over much of it. A polygon's first point is a corner, not the others' centre.
    """
    boxes, others = values[:, :4], values[:, 4:]
    centres, sizes = boxes[:, None, :2], boxes[:, None, 2:]
    within_image = ((sizes > 0) & (abs(centres - 0.5) + sizes / 2 < 0.51)).all((1, 2))
    for each in (3, 2):
        if not others.shape[1] or others.shape[1] % each:
            continue
        keypoints = others.reshape(len(values), -1, each)
        points, labelled = keypoints[:, :, :2], keypoints.any(2)
        if each == 3:
            labelled = keypoints[:, :, 2] > 0
            if not np.isin(keypoints[:, :, 2], (0, 1, 2)).all():
                continue
        inside = (abs(points - centres) < 0.55 * sizes).all(2)
        fits, seen = within_image & (inside | ~labelled).all(1), labelled.any(1)
        low = np.where(labelled[:, :, None], points, 1).min(1)
        high = np.where(labelled[:, :, None], points, 0).max(1)
        around = (low < boxes[:, :2]) & (boxes[:, :2] < high) & (high - low > 0.3 * boxes[:, 2:])
        if fits.mean() >= 0.9 and seen.any() and around[seen].all(1).mean() >= 0.5:
            return each
    return 0


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

    Copying and unpacking programs set the time of its content; that of its inode (on Windows, of its creation) is the
    system's own.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        return "-"
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def write_cache(path: Path, key: str, table: LabelTable) -> bool:
    """Writes the cache, all or nothing, and tells whether it could; if not, that is worth a warning, not a stop."""
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
    """Builds a table; ValueError where the arrays do not fit together."""
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
    classes, fractions = arrays["rows"][:, 0], (arrays["rows"][:, 1:], arrays["seg_points"])
    if (arrays["sizes_wh"] < 1).any() or not all(((part >= 0) & (part <= 1)).all() for part in fractions):  # or NaN
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


def _check_offsets(name: str, offsets: np.ndarray, runs: int, end: int) -> None:
    if len(offsets) != runs + 1 or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"'{name}' does not fit its array")
