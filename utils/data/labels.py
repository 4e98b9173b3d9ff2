"""Labels: the rules of label files, the scan of a data set's images and labels, and the checks on what it found.

Covers YOLO text labels, boxes and polygons, row by row. A label that breaks the rules stops the run with its file and
line; an image that cannot be used is left out, counted and named. Nothing on disk is changed but the cache.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from utils.checks import UserError
from utils.data.cache import cache_key, cache_location, read_cache, write_cache
from utils.data.paths import image_to_label_path, list_images
from utils.data.pool import over_processes
from utils.data.table import Counts, LabelTable, PathList, offsets_of
from utils.files import remove_temporaries
from utils.images import ImageError, check_image
from utils.log import LOGGER, progress

TOLERANCE = 1e-4  # coordinates this far outside 0 to 1 are rounding (0.06 px in 640) and are clipped
SHOWN_MESSAGES = 30  # warnings printed one by one; the rest is counted
POOL_FROM = 5000  # images; fewer are scanned sooner than processes start
INVISIBLE = "\u200b\u2060\ufeff"  # of no width; Python does not count them as spaces
MANY_NULS = 0.4  # of a file's bytes; numbers in UTF-16 have half, in UTF-32 three quarters
CHUNK = 256  # images handed to a process at a time


class _Classes(Protocol):
    """What `check_classes` needs of a `DataSpec`."""

    source: Path | None

    @property
    def nc(self) -> int: ...


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


class ScanPart(NamedTuple):
    """What one process found in its share of the images."""

    paths: list[str]
    sizes_wh: list[tuple[int, int]]
    labels: list[ParsedLabels]
    counts: Counts
    messages: list[str]
    problems: list[LabelProblem]


def load_labels(
    sources: Sequence[Path],
    spec: _Classes | None = None,
    single_cls: bool = False,
    workers: int | None = None,
    prefix: str = "",
    need_labels: bool = True,
) -> LabelTable:
    """Finds, checks and reads the images and labels of folders and list files, through the label cache.

    Args:
        sources: folders and list files, as in `DataSpec.train`.
        spec: whose number of classes the labels must keep to; None leaves class ids unchecked.
        single_cls: make all labels class 0; their class ids are then not checked.
        workers: processes to scan with; 0 or 1 scan in this one; None chooses.
        prefix: what log lines begin with ("train: ").
        need_labels: whether images without a single label are an error, not just a warning.

    Raises:
        UserError: no images; no usable image; no labels at all; a label that breaks the rules; a class id beyond nc.
    """
    images = list_images(sources)
    location = cache_location(sources)
    remove_temporaries(location.parent, location.name, abandoned=True)  # of a start that was killed while writing
    key = cache_key(images, [image_to_label_path(image) for image in images])
    table = read_cache(location, key)
    shown = str(location if table is not None else sources[0] if len(sources) == 1 else location.parent)
    if table is None:
        table = scan_images(images, workers, f"{prefix}Scanning '{shown}' images and labels...")
        if not len(table):
            raise UserError(f"None of the {len(images)} images can be used; the first: {table.messages[0]}.")
        if write_cache(location, key, table):
            LOGGER.info(f"{prefix}New cache created: {location}")
    else:
        LOGGER.info(f"{prefix}Scanning '{shown}' images and labels... {table.counts}")
    _show_messages(table.messages, prefix)
    if not len(table.rows):
        if need_labels:
            raise UserError(_why_no_labels(table))
        LOGGER.warning(f"{prefix}WARNING: {_why_no_labels(table)}")
    if single_cls:
        return table.with_single_class()
    if spec is not None:
        check_classes(table, spec)
    return table


def scan_images(images: Sequence[str], workers: int | None = None, desc: str = "") -> LabelTable:
    """Checks images and reads their labels, showing progress.

    Args:
        images: absolute paths.
        workers: see `load_labels`.
        desc: what the progress bar says before the counts.

    Raises:
        UserError: label lines that break the rules.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    tables, problems, counts = [], [], Counts()
    with progress(total=len(images), desc=desc, unit="img") as bar:
        for part in over_processes(scan_chunk, chunks, workers if len(images) >= POOL_FROM else 0):
            tables.append(_table_of(part))
            problems += part.problems
            counts = counts.plus(part.counts)
            bar.set_description_str(f"{desc} {counts}", refresh=False)
            bar.update(part.counts.total)
    if problems:
        raise UserError(_describe_problems(problems))
    return _join(tables or [_table_of(ScanPart([], [], [], counts, [], []))], counts)


def scan_chunk(images: Iterable[str]) -> ScanPart:
    """Checks some images and reads their labels."""
    part = ScanPart([], [], [], Counts(), [], [])
    found = missing = empty = corrupt = 0
    for image in images:
        try:
            info = check_image(image)
        except ImageError as error:
            corrupt += 1
            part.messages.append(f"{image}: image left out: it {error}")
            continue
        label_path = image_to_label_path(image)
        labels = read_label_file(label_path)
        if labels is None:
            missing += 1
            labels = ParsedLabels(np.zeros((0, 5), np.float32), [], 0, [])
        else:
            found += 1
            empty += len(labels.rows) == 0
        if labels.duplicates:
            part.messages.append(f"{label_path}: {labels.duplicates} duplicate label(s) left out")
        part.problems.extend(labels.problems)
        part.paths.append(image)
        part.sizes_wh.append((info.width, info.height))
        part.labels.append(labels)
    return part._replace(counts=Counts(found, missing, empty, corrupt, found + missing + corrupt))


def _table_of(part: ScanPart) -> LabelTable:
    """Puts what one process found into flat arrays, which take a tenth of the memory."""
    labels = part.labels
    polygons = [polygon for one in labels for polygon in one.polygons]
    return LabelTable(
        image_paths=PathList.from_strings(part.paths),
        sizes_wh=np.array(part.sizes_wh, np.int32).reshape(-1, 2),
        rows=np.concatenate([np.zeros((0, 5), np.float32), *(one.rows for one in labels)]),
        offsets=offsets_of([len(one.rows) for one in labels]),
        seg_points=np.concatenate([_NO_POINTS, *polygons]),
        seg_offsets=offsets_of([len(polygon) for polygon in polygons]),
        messages=tuple(part.messages),
    )


def _join(tables: Sequence[LabelTable], counts: Counts) -> LabelTable:
    """Puts tables, at least one, behind one another."""

    def joined_offsets(offsets: Iterable[np.ndarray]) -> np.ndarray:
        return offsets_of(np.concatenate([np.diff(one) for one in offsets]))

    return LabelTable(
        image_paths=PathList(
            np.concatenate([table.image_paths.buffer for table in tables]),
            joined_offsets(table.image_paths.offsets for table in tables),
        ),
        sizes_wh=np.concatenate([table.sizes_wh for table in tables]),
        rows=np.concatenate([table.rows for table in tables]),
        offsets=joined_offsets(table.offsets for table in tables),
        seg_points=np.concatenate([table.seg_points for table in tables]),
        seg_offsets=joined_offsets(table.seg_offsets for table in tables),
        counts=counts,
        messages=tuple(message for table in tables for message in table.messages),
    )


def read_label_file(path: str | Path) -> ParsedLabels | None:
    """Reads a label file; None when there is none.

    A line of 5 numbers is a box, `class x y w h`; one of 7 or more, odd in number, is a polygon,
    `class x1 y1 x2 y2 ...`, whose box is that of its points. All coordinates are fractions of the image, 0 to 1.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        if gone and not os.path.islink(path):
            return None
        problem = LabelProblem(str(path), 0, f"cannot be read ({'is a link to nothing' if gone else error.strerror})")
        return ParsedLabels(np.zeros((0, 5), np.float32), [], 0, [problem])
    rows, polygons, problems = [], [], []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        tokens = line.split()
        if not tokens:
            continue
        try:
            row, polygon = _parse_line(tokens)
        except ValueError as error:
            problems.append(LabelProblem(str(path), number, _notation_problem(line) or str(error)))
            continue
        rows.append(row)
        polygons.append(polygon)
    if problems and (reason := _encoding_problem(content)):
        problems = [LabelProblem(str(path), 0, reason)]
    return _without_duplicates(np.array(rows, np.float32).reshape(-1, 5), polygons, problems)


_NO_POINTS = np.zeros((0, 2), np.float32)


def _parse_line(tokens: list[bytes]) -> tuple[list[float], np.ndarray]:
    """Reads a label line: [class, x, y, w, h] and the polygon's points, float32 (k, 2).

    Raises:
        ValueError: why the line breaks the rules.
    """
    count = len(tokens)
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
        return [label, *coordinates], _NO_POINTS
    xs, ys = coordinates[::2], coordinates[1::2]
    left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
    box_xywh_norm = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return [label, *box_xywh_norm], np.array(coordinates, np.float32).reshape(-1, 2)


def _text(token: bytes) -> str:
    """Shows a token in a message."""
    return repr(token[:40].decode(errors="replace"))


def _is_number(token: bytes) -> bool:
    """Says whether Python reads a token as a number."""
    try:
        float(token)
    except ValueError:
        return False
    return True


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


def _encoding_problem(content: bytes) -> str:
    """Says that a label file is no text in UTF-8; empty where it seems to be."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return "is text in UTF-16 or UTF-32: save it in UTF-8"
    if content.count(0) >= MANY_NULS * len(content):
        return f"{content.count(0)} of its {len(content)} bytes are NUL: it is damaged, or in UTF-16 (save it in UTF-8)"
    return ""


def _out_of_range(tokens: Sequence[bytes], coordinates: Sequence[float]) -> str:
    """Words what is wrong with the first coordinate that is not within 0 to 1."""
    for token, value in zip(tokens, coordinates, strict=True):
        if value != value:
            return f"coordinate {_text(token)} is not a number"
        if value < -TOLERANCE:
            return f"coordinate {_text(token)} is negative"
        if value > 1 + TOLERANCE:
            return f"coordinate {_text(token)} is beyond 1 (coordinates are fractions of the image, not pixels)"
    return "coordinates are not within 0 to 1"


def _without_duplicates(rows: np.ndarray, polygons: list[np.ndarray], problems: list[LabelProblem]) -> ParsedLabels:
    """Drops rows, float32 (n, 5), that repeat an earlier one, with their polygons; the order stays."""
    first_seen: dict[bytes, int] = {}
    for index, key in enumerate(map(bytes, rows)):
        first_seen.setdefault(key, index)
    duplicates = len(rows) - len(first_seen)
    if duplicates:
        kept = list(first_seen.values())
        rows, polygons = rows[kept], [polygons[index] for index in kept]
    return ParsedLabels(rows, polygons, duplicates, problems)


def _describe_problems(problems: Sequence[LabelProblem]) -> str:
    """Words the first problem with its file and line, and how many more there are."""
    first = problems[0]
    where = f"{first.path}, line {first.line}" if first.line else first.path
    more = ""
    if len(problems) > 1:
        files = len({problem.path for problem in problems})
        more = f" {len(problems)} such lines in {files} file(s); the next: " + "; ".join(
            f"{problem.path}, line {problem.line}: {problem.reason}" for problem in problems[1:4]
        )
    return f"Label file {where}: {first.reason}.{more} Fix the label(s) and rerun."


def _show_messages(messages: Sequence[str], prefix: str) -> None:
    """Logs what the scan had to say, the first SHOWN_MESSAGES lines one by one."""
    for message in messages[:SHOWN_MESSAGES]:
        LOGGER.warning(f"{prefix}WARNING: {message}")
    if len(messages) > SHOWN_MESSAGES:
        LOGGER.warning(f"{prefix}WARNING: ... and {len(messages) - SHOWN_MESSAGES} more like these")


def _why_no_labels(table: LabelTable) -> str:
    """Returns why there is nothing to learn or to score: empty label files, or none where they were looked for."""
    image, label = table.image_paths[0], image_to_label_path(table.image_paths[0])
    if table.counts.found:
        return f"All {table.counts.found} label files are empty, for example {label}: no labels at all."
    return (
        f"No label file found for any of {len(table)} images. For {image} the labels were looked for in {label}: "
        "the last '/images/' of the path becomes '/labels/' (without one they stand beside the image), and the "
        "suffix '.txt'."
    )


def check_classes(table: LabelTable, spec: _Classes) -> None:
    """Checks that every class id is below the data set's number of classes.

    Raises:
        UserError: naming the class, the allowed range, the file and its line.
    """
    beyond = np.flatnonzero(table.rows[:, 0] >= spec.nc)
    if not len(beyond):
        return
    row = beyond[0]
    label = int(table.rows[row, 0])
    path = image_to_label_path(table.image_paths[int(np.searchsorted(table.offsets, row, side="right")) - 1])
    owner = f" of {spec.source}" if spec.source else ""
    more = f" ({len(beyond)} such labels in all)" if len(beyond) > 1 else ""
    raise UserError(
        f"Label class {label} exceeds nc={spec.nc}: allowed are 0 to {spec.nc - 1}. Found in {path}"
        f"{_line_of_class(path, label)}{more}. Fix the label or the names{owner}."
    )


def _line_of_class(path: str, label: int) -> str:
    """Says which line of a label file first has this class."""
    for number, line in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        tokens = line.split()
        if tokens and float(tokens[0]) == label:
            return f", line {number}"
    return ""
