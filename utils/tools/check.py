"""Checks a data set before it is trained on: damage, leakage, doubtful labels, and what it is made of.

`python -m utils.tools.check mine.yaml` reads every image and label file, tells what it found and writes a page with
pictures, one HTML file that needs nothing beside it. With `--fix FOLDER` it writes a copy with what a program can mend
mended; the data set itself is never changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.autoanchor import GOOD_BPR, SMALL_PX, anchor_fit, label_sizes_px
from utils.boxes import box_iou, xywh2xyxy
from utils.cli import CommandParser, ReportedError, echo_options, number, run_command
from utils.dataloaders.config import SPLITS, DataSpec, load_spec
from utils.dataloaders.labels import (
    NO_LABELS,
    LabelTable,
    ParsedLabels,
    gather_runs,
    read_label_file,
    refuse_keypoints,
    table_of,
)
from utils.dataloaders.paths import image_to_label_path, is_image, list_images
from utils.errors import MAX_IMAGE_SIDE_PX, UserError, explain_resource_errors, printable
from utils.eval.report_page import class_bars, label_charts
from utils.files import ROOT, atomic_write, find_file, increment_path, read_yaml, run_folder, write_yaml
from utils.images import DEFAULT_IMGSZ, ImageError, check_image, decode_image, exif_orientation, read_image
from utils.log import LOGGER, colorstr, progress
from utils.page import fill_page, html_table, image_tag
from utils.plots.boxes import Annotation, Annotator, colors
from utils.process import process_map
from utils.tools.convert import FRACTIONS, label_text

MEND, LOOK, NOTE = "mend", "look", "note"
HEADINGS = {MEND: "To mend", LOOK: "To look at", NOTE: "For information"}
# Bits of 256 in which the hashes of near-duplicates differ at most. On 1,389 real images of four kinds, copies that are
# re-encoded, resized, noisy or brighter differ in 26 at most, 95 % of those cropped by 2 % or shifted by 4 px in 44 at
# most; different scenes in 56 (two cards on one carpet) and more, mostly in 126.
NEAR_BITS = 48
HASHED_PX = 64  # side of the grey image that is hashed
HASH_SIDE = 16  # frequencies of each direction
DECODED_PX = 256  # long side that a JPEG is decoded at, at least
SAME_PLACE_IOU = 0.9  # two boxes that overlap more are of one object
HUGE = 0.95  # of the image's area
BLANK = 8  # of 255, by which the values of an image differ at most that shows nothing
OUTSIDE_PX = 0.5  # beyond the image's edge; less is rounding
FEW_LABELS = 10  # of a class
RATIO = 4.0  # side ratio up to which a label and an anchor match (hyperparameter anchor_t)
POOL_FROM = 300  # images; fewer are read sooner than processes start
CHUNK = 32  # images handed to a process at a time
TEXT_EXAMPLES, PAGE_EXAMPLES, PAGE_LINES, SAMPLES, TEXT_CLASSES = 3, 12, 500, 12, 30
PICTURE_PX = 200  # height on the page
NAMED_BOXES = 8  # more boxes in a picture are drawn without their class
ZOOM_BELOW = 0.15  # boxes smaller than this part of the image are shown enlarged


class Scanned(NamedTuple):
    """What one image file and its label file hold."""

    path: str
    damage: str  # why it cannot be used, else empty
    size_wh: tuple[int, int] = (0, 0)  # px, upright
    orientation: int = 1  # EXIF
    digest: bytes = b""  # of the file
    look: bytes = b""  # see `perceptual_hash`
    contrast: int = 255  # the largest less the smallest value of a channel
    labels: ParsedLabels | None = None  # None: there is no label file


class Contents(NamedTuple):
    """A data set as it was read; images are called by their index in `images`, labels by their row in `table`."""

    spec: DataSpec
    images: list[Scanned]  # those that can be used, each once
    damaged: dict[str, list[Scanned]]  # of each split
    members: dict[str, np.ndarray]  # int64, of each split its images
    listed_twice: dict[str, int]  # of each split, how many of its images
    table: LabelTable  # of `images`

    def name(self, path: str) -> str:
        """Returns a file's path for people: relative to the data set's folder if it lies in it."""
        return os.path.relpath(path, self.spec.root) if Path(path).is_relative_to(self.spec.root) else path

    def image_name(self, image: int) -> str:
        """Returns an image's path for people."""
        return self.name(self.images[image].path)

    def rows(self, split: str) -> np.ndarray:
        """Returns the labels of a split, int64."""
        return gather_runs(self.table.offsets, self.members[split])[0]


class Example(NamedTuple):
    """A case of a finding: a line, images to show side by side, and the labels to mark in the first of them."""

    text: str
    images: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


class Finding(NamedTuple):
    """What was found, how bad it is, and what to do."""

    level: str
    title: str
    advice: str
    examples: list[Example]
    times: int | None = None  # where it is not told by examples

    @property
    def count(self) -> int:
        """How often."""
        return len(self.examples) if self.times is None else self.times


class Copies(NamedTuple):
    """Images that repeat others; pairs are (image, the one that it repeats)."""

    exact: dict[str, list[tuple[int, int]]]  # of each split, those whose file is also in an earlier split
    near: dict[str, list[tuple[int, int, int]]]  # the same for those that only look alike, with the bits that differ
    within: dict[str, list[tuple[int, int]]]  # exact, both in this split
    groups: dict[str, list[np.ndarray]]  # of each split, its images that look alike, exact ones once


def perceptual_hash(image: np.ndarray) -> bytes:
    """Returns 256 bits that stay alike when an image (h, w, 3) is re-encoded, resized or brightened.

    Whether each of the 16 x 16 lowest frequencies of the 64 x 64 grey image is above their median: Zauner,
    "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), the DCT based one with more bits.
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (HASHED_PX, HASHED_PX), interpolation=cv2.INTER_AREA)
    waves = cv2.dct(grey.astype(np.float32))[:HASH_SIDE, :HASH_SIDE]
    return np.packbits(waves > np.median(waves)).tobytes()


def similar_groups(hashes: np.ndarray, at_most: int = NEAR_BITS) -> list[np.ndarray]:
    """Groups what is alike, directly or through others: n comparisons of one hash with all that are left.

    Args:
        hashes: uint8 (n, bytes).
        at_most: bits that may differ.

    Returns:
        Of each group of two or more its indices, int64, ascending.
    """
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING)
    rest, groups = np.arange(len(hashes)), []
    left = np.ascontiguousarray(hashes)
    with progress(total=len(hashes), desc="Comparing images", unit="img", leave=False) as bar:
        while len(rest):
            group, rest, left = [rest[0]], rest[1:], left[1:]
            for member in group:  # which grows meanwhile
                bar.update(1)
                found = matcher.radiusMatch(hashes[member : member + 1], left, at_most)[0] if len(rest) else ()
                if found:
                    near = np.zeros(len(rest), bool)
                    near[[match.trainIdx for match in found]] = True
                    group += rest[near].tolist()
                    rest, left = rest[~near], left[~near]
            if len(group) > 1:
                groups.append(np.sort(group))
    return groups


def nearest(hashes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each of the hashes, uint8 (n, bytes), the nearest of the others: its index, and the bits between."""
    if not len(hashes) or not len(others):
        return np.zeros(0, int), np.zeros(0, int)
    bits, indices = cv2.batchDistance(hashes, others, cv2.CV_32S, normType=cv2.NORM_HAMMING, K=1)
    return indices[:, 0], bits[:, 0]


# -------------------------------------------------------------------------------------------------------- reading it


def scan(paths: Iterable[str], kpt_shape: tuple[int, int] | None = None) -> list[Scanned]:
    """Reads images, to the last pixel, and their label files."""
    found = []
    for path in paths:
        try:
            info = check_image(path)
            data = Path(path).read_bytes()
            image = decode_image(data, DECODED_PX)
        except ImageError as error:
            found.append(Scanned(path, str(error)))
            continue
        labels = read_label_file(image_to_label_path(path), kpt_shape)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        look, contrast = perceptual_hash(image), int(np.ptp(image, axis=(0, 1)).max())
        found.append(Scanned(path, "", info[:2], exif_orientation(data), digest, look, contrast, labels))
    return found


def read_contents(spec: DataSpec, workers: int | None = None) -> Contents:
    """Reads all images and labels of a data set.

    Args:
        spec: the data set; of its test images only what is there.
        workers: processes; None chooses.

    Raises:
        UserError: a split has no images, or none that can be used.
    """
    sources = {split: [path for path in getattr(spec, split) if os.path.exists(path)] for split in SPLITS}
    listed = {split: list_images(paths) for split, paths in sources.items() if paths}
    unique = {split: list(dict.fromkeys(paths)) for split, paths in listed.items()}
    paths = list(dict.fromkeys(path for paths in unique.values() for path in paths))
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    found: dict[str, Scanned] = {}
    with progress(total=len(paths), desc="Reading images and labels", unit="img") as bar:
        task = partial(scan, kpt_shape=spec.kpt_shape)
        for part in process_map(task, chunks, workers if len(paths) >= POOL_FROM else 0):
            found |= {one.path: one for one in part}
            bar.update(len(part))
    images = [one for one in found.values() if not one.damage]
    if not images:
        raise UserError(
            f"None of the {len(paths)} images can be used; the first: {paths[0]}: {found[paths[0]].damage}."
        )
    numbers = {one.path: index for index, one in enumerate(images)}
    return Contents(
        spec,
        images,
        damaged={split: [found[path] for path in paths if found[path].damage] for split, paths in unique.items()},
        members={
            split: np.array([numbers[path] for path in paths if path in numbers], np.int64)
            for split, paths in unique.items()
        },
        listed_twice={split: len(paths) - len(unique[split]) for split, paths in listed.items()},
        table=table_of(
            (one.path for one in images), (one.size_wh for one in images), [one.labels or NO_LABELS for one in images]
        ),
    )


def find_copies(contents: Contents) -> Copies:
    """Compares all images with each other: those of a split with the earlier splits (train, val, test) and itself."""
    images = contents.images
    hashes = np.array([np.frombuffer(one.look, np.uint8) for one in images])
    first = {one.digest: image for image, one in reversed(list(enumerate(images)))}
    originals = np.array(sorted(first.values()))
    alike = [originals[group] for group in similar_groups(hashes[originals])]
    copies = Copies({}, {}, {}, {})
    before = np.zeros(0, np.int64)
    for split, members in contents.members.items():
        known = {images[image].digest: image for image in before[::-1]}
        copies.exact[split] = [
            (image, known[images[image].digest]) for image in members if images[image].digest in known
        ]
        others = np.array([image for image in members if images[image].digest not in known], np.int64)
        matches = zip(others, *nearest(hashes[others], hashes[before]), strict=False)  # nothing where nothing is before
        copies.near[split] = sorted(
            ((image, before[match], int(bits)) for image, match, bits in matches if bits <= NEAR_BITS),
            key=lambda pair: pair[2],
        )
        seen: dict[bytes, int] = {}
        repeated = [(image, seen.setdefault(images[image].digest, image)) for image in members]
        copies.within[split] = [pair for pair in repeated if pair[0] != pair[1]]
        own = set(seen.values())
        inside = (np.array([image for image in group if image in own]) for group in alike)
        copies.groups[split] = [group for group in inside if len(group) > 1]
        before = np.union1d(before, members)
    return copies


def overlapping_labels(table: LabelTable) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns pairs of labels (earlier row, later row) in the same place: those of one class, and those of two."""
    doubled, mixed = [], []
    for image in np.flatnonzero(np.diff(table.offsets) > 1):
        labels, start = table.labels(image), int(table.offsets[image])
        corners = xywh2xyxy(labels[:, 1:])  # in fractions: stretching an axis changes no IoU
        for one, other in np.argwhere(np.triu(box_iou(corners, corners) > SAME_PLACE_IOU, 1)):
            same = labels[one, 0] == labels[other, 0]
            (doubled if same else mixed).append((start + int(one), start + int(other)))
    return doubled, mixed


def reaches_beyond(table: LabelTable) -> np.ndarray:
    """Returns how many pixels (M,) each box lies beyond the edge of its image, at most; below 0 where it does not."""
    corners = xywh2xyxy(table.rows[:, 1:].astype(np.float64))
    return (np.maximum(-corners[:, :2], corners[:, 2:] - 1) * table.sizes_wh[table.owners]).max(axis=1, initial=-np.inf)


def stray_labels(contents: Contents) -> list[str]:
    """Returns label files in the data set's label folders that have no image beside them or in its image folders."""
    folders: dict[str, set[str]] = {}
    for one in (*contents.images, *(one for found in contents.damaged.values() for one in found)):
        folders.setdefault(os.path.dirname(image_to_label_path(one.path)), set()).add(os.path.dirname(one.path))
    strays = []
    for folder, image_folders in folders.items():
        there = {place: os.listdir(place) for place in {folder, *image_folders} if os.path.isdir(place)}
        stems = {
            os.path.splitext(name)[0] for place in image_folders for name in there.get(place, ()) if is_image(name)
        }
        names = [name for name in there.get(folder, ()) if name.endswith(".txt") and name[:-4] not in stems]
        strays += [os.path.join(folder, name) for name in sorted(names)]
    # lists, notes and classes.txt stand among labels too
    return [path for path in strays if not read_label_file(path, contents.spec.kpt_shape).problems]


# ---------------------------------------------------------------------------------------------------- what it means


def find_damage(contents: Contents) -> Iterator[Finding]:
    """Images and label lines that stop a training or are left out of it."""
    table, nc = contents.table, contents.spec.nc
    for split, damaged in contents.damaged.items():
        lines = [Example(f"{contents.name(one.path)}: it {one.damage}") for one in damaged]
        yield Finding(MEND, f"images of {split} that cannot be used", "Replace or remove them.", lines)
    blank = [image for image, one in enumerate(contents.images) if one.contrast <= BLANK]
    yield Finding(
        LOOK,
        "images of one colour",
        "They show nothing: remove them, or their labels.",
        [Example(contents.image_name(image), (image,)) for image in blank],
    )
    problems = [
        (image, problem) for image, one in enumerate(contents.images) if one.labels for problem in one.labels.problems
    ]
    yield Finding(
        MEND,
        "label lines that break the rules",
        "Training refuses them. Correct or delete the lines.",
        [
            Example(
                f"{contents.name(problem.path)}{f', line {problem.line}' if problem.line else ''}: {problem.reason}",
                (image,),
            )
            for image, problem in problems
        ],
    )
    beyond = np.flatnonzero(table.rows[:, 0] >= nc)
    yield Finding(
        MEND,
        f"labels whose class is not among the {nc} names",
        f"Training refuses them. Correct the class (0 to {nc - 1}), or add its name to the YAML.",
        [_label_example(contents, row, f"class {int(table.rows[row, 0])}") for row in beyond],
    )
    if not contents.spec.kpt_shape:
        try:
            refuse_keypoints(table, contents.spec)
        except UserError as error:
            yield Finding(MEND, "polygons that are boxes with keypoints", str(error), [], 1)
    for split in contents.members:
        if not len(contents.members[split]):
            yield Finding(MEND, f"splits without an image that can be used: {split}", "There is nothing to see.", [], 1)
        elif not len(contents.rows(split)):
            folder = os.path.dirname(image_to_label_path(contents.images[contents.members[split][0]].path))
            advice = f"Labels are looked for in {folder}."
            yield Finding(MEND if split == "train" else LOOK, f"splits without a label: {split}", advice, [], 1)


def find_leaks(contents: Contents, copies: Copies) -> Iterator[Finding]:
    """Images that repeat others."""
    flatter = "Figures measured on them flatter, for they are not new to the model. "
    for place, split in enumerate(contents.members):
        earlier = " or ".join([*contents.members][:place])
        if earlier:
            yield Finding(
                MEND,
                f"images of {split} that are copies of {earlier} images",
                flatter + "Remove them from one of the two; --fix does.",
                [_pair_example(contents, one, other, "=") for one, other in copies.exact[split]],
            )
            yield Finding(
                MEND,
                f"images of {split} that look like {earlier} images",
                flatter + "Divide so that alike images stay together: python -m utils.tools.split --group-by.",
                [
                    _pair_example(contents, one, other, "~", f"{bits} of 256 bits differ")
                    for one, other, bits in copies.near[split]
                ],
            )
        yield Finding(
            LOOK,
            f"images of {split} that are copies of others in {split}",
            "They count twice. Remove all but one.",
            [_pair_example(contents, one, other, "=") for one, other in copies.within[split]],
        )
        alike = copies.groups[split]
        yield Finding(
            LOOK,
            f"images of {split} that look alike, in {len(alike)} groups",
            "Such as frames of a video: they teach less than their number says. Keep each group in one split.",
            [
                Example(
                    f"{len(group)} alike: {', '.join(contents.image_name(one) for one in group[:3])}"
                    + " ..." * (len(group) > 3),
                    tuple(group[:3]),
                )
                for group in sorted(alike, key=len, reverse=True)
            ],
            sum(map(len, alike)),
        )
        twice = contents.listed_twice[split]
        yield Finding(LOOK, f"images that {split} lists more than once", "Remove the repeated lines.", [], twice)


def find_files(contents: Contents, strays: Sequence[str]) -> Iterator[Finding]:
    """Label files that are missing, of no image, shared, or empty."""
    images = contents.images
    for split, members in contents.members.items():
        unlabelled = [image for image in members if images[image].labels is None]
        yield Finding(
            LOOK,
            f"images of {split} without a label file",
            "They are trained on as background. If they are, give them empty label files, which says so.",
            [Example(contents.image_name(image), (image,)) for image in unlabelled],
        )
    lines = [Example(contents.name(path)) for path in strays]
    yield Finding(LOOK, "label files without an image", "Add the images, or remove the labels.", lines)
    owners: dict[str, list[int]] = {}
    for image, one in enumerate(images):
        owners.setdefault(image_to_label_path(one.path), []).append(image)
    shared = {path: numbers for path, numbers in owners.items() if len(numbers) > 1}
    yield Finding(
        LOOK,
        "label files that several images share",
        "Images that differ in their suffix alone have one label file. Rename all but one.",
        [Example(contents.name(path), tuple(numbers[:3])) for path, numbers in shared.items()],
    )
    for split, members in contents.members.items():
        empty = [image for image in members if images[image].labels and not len(images[image].labels.rows)]
        empty = [image for image in empty if not images[image].labels.problems]
        yield Finding(
            NOTE,
            f"background images of {split} (empty label files)",
            f"{len(empty) / max(len(members), 1):.1%} of the split.",
            [Example(contents.image_name(image), (image,)) for image in empty],
        )


def find_boxes(
    contents: Contents, doubled: Sequence[tuple[int, int]], mixed: Sequence[tuple[int, int]], imgsz: int
) -> Iterator[Finding]:
    """Labels that are doubtful by their place or size."""
    table, names = contents.table, contents.spec.names
    repeats = [(image, one.labels.duplicates) for image, one in enumerate(contents.images) if one.labels]
    repeats = [(image, count) for image, count in repeats if count]
    yield Finding(
        LOOK,
        "label lines that repeat an earlier one",
        "They are left out in training. --fix removes them.",
        [
            Example(f"{contents.name(image_to_label_path(contents.images[image].path))}: {count}", (image,))
            for image, count in repeats
        ],
        sum(count for _, count in repeats),
    )
    yield Finding(
        LOOK,
        f"boxes of one class in the same place (IoU above {SAME_PLACE_IOU})",
        "One object labelled twice counts as two. --fix removes the later one.",
        [_label_example(contents, one, _class(names, table.rows[one, 0]), other) for one, other in doubled],
    )
    yield Finding(
        LOOK,
        f"boxes of two classes in the same place (IoU above {SAME_PLACE_IOU})",
        "Mostly a label that was corrected without removing the wrong one.",
        [
            _label_example(
                contents, one, " and ".join(_class(names, table.rows[row, 0]) for row in (one, other)), other
            )
            for one, other in mixed
        ],
    )
    sizes_px = label_sizes_px(table, imgsz)
    flat = (table.rows[:, 3:] <= 0).any(axis=1)
    beyond_px = reaches_beyond(table)
    area = table.rows[:, 3] * table.rows[:, 4]
    for title, marked, values, form, advice in (
        ("boxes without a width or height", flat, area, "", "Nothing can be learnt from them. --fix removes them."),
        (
            f"boxes under {SMALL_PX} px at {imgsz} px",
            (sizes_px < SMALL_PX).any(axis=1) & ~flat,
            sizes_px.min(axis=1, initial=np.inf),
            "{:.1f} px",
            "Hardly visible to the model: train at a larger --imgsz or cut the images into tiles, or remove the boxes.",
        ),
        (
            f"boxes over {HUGE:.0%} of the image",
            area > HUGE,
            -area,
            "{:.0%}",
            "Labels of whole images, or objects that fill them? Look whether the box is right.",
        ),
        (
            f"boxes that reach more than {OUTSIDE_PX} px beyond the image",
            beyond_px > OUTSIDE_PX,
            -beyond_px,
            "{:.1f} px",
            "--fix clips them.",
        ),
    ):
        rows = np.flatnonzero(marked)
        rows = rows[np.argsort(values[rows], kind="stable")]  # the worst first
        examples = [
            _label_example(
                contents, row, f"{_class(names, table.rows[row, 0])} {form.format(abs(values[row]))}".strip()
            )
            for row in rows
        ]
        yield Finding(LOOK, title, advice, examples)


def find_make_up(contents: Contents, imgsz: int, anchors_px: np.ndarray | None, cfg: Path) -> Iterator[Finding]:
    """Classes, sizes of images, and anchors."""
    names = contents.spec.names
    counts = {split: class_counts(contents, split) for split in contents.members}
    absent = np.flatnonzero(counts["train"] == 0)
    yield Finding(
        LOOK,
        "classes without a label in train",
        "They cannot be learnt.",
        [Example(f"{names[one]} ({', '.join(f'{split} {counts[split][one]}' for split in counts)})") for one in absent],
    )
    for split in [split for split in ("val", "test") if split in counts]:
        unseen = np.flatnonzero((counts["train"] > 0) & (counts[split] == 0))
        yield Finding(
            NOTE, f"classes of train without a label in {split}", "They are not measured.",
            [Example(names[one]) for one in unseen],
        )  # fmt: skip
    few = [one for one in np.argsort(counts["train"], kind="stable") if 0 < counts["train"][one] < FEW_LABELS]
    most = int(counts["train"].argmax())
    yield Finding(
        NOTE,
        f"classes with fewer than {FEW_LABELS} labels in train",
        f"The most frequent, {names[most]}, has {counts['train'][most]}.",
        [Example(f"{names[one]}: {counts['train'][one]}") for one in few],
    )
    scarce = np.flatnonzero((counts["train"] > 0) & (counts["train"] * 10 < counts["train"][most]))
    yield Finding(
        NOTE,
        "classes with less than a tenth of the labels of the most frequent",
        f"{names[most]} has {counts['train'][most]}. train.py --image-weights draws images of badly learnt ones "
        "more often.",
        [Example(f"{names[one]}: {counts['train'][one]}") for one in scarce],
    )
    turned = [image for image, one in enumerate(contents.images) if one.orientation > 1]
    yield Finding(
        NOTE,
        "images that their EXIF data turn",
        "They are read upright; labels must have been drawn on the upright image.",
        [Example(f"{contents.image_name(image)}: {contents.images[image].orientation}", (image,)) for image in turned],
    )
    sizes = Counter(one.size_wh for one in contents.images).most_common()
    yield Finding(
        NOTE,
        "different sizes of images",
        "Each is scaled until its longer side is --imgsz.",
        [Example(f"{width} x {height} px: {count} images") for (width, height), count in sizes],
    )
    own = contents.table.subset(contents.members["train"])
    if anchors_px is None:
        yield Finding(NOTE, f"models without anchors: {cfg.name}", "There is nothing to fit.", [], 1)
    elif len(own.rows):
        bpr, per_label = anchor_fit(label_sizes_px(own, imgsz), anchors_px, RATIO)
        good = "a good fit" if bpr > GOOD_BPR else f"below {GOOD_BPR}: AutoAnchor will look for better ones"
        yield Finding(
            NOTE,
            f"anchors of {cfg.name}",
            f"Best possible recall {bpr:.3f} on the training labels at {imgsz} px, {per_label:.2f} anchors per label: "
            f"{good}.",
            [],
            len(anchors_px),
        )


def class_counts(contents: Contents, split: str) -> np.ndarray:
    """Returns the number of labels of each class in a split, int64 (nc,)."""
    classes = contents.table.rows[contents.rows(split), 0].astype(int)
    return np.bincount(classes[classes < contents.spec.nc], minlength=contents.spec.nc)


def _class(names: dict[int, str], label: float) -> str:
    return names.get(int(label), f"class {int(label)}")


def _label_example(contents: Contents, row: int, text: str, other: int | None = None) -> Example:
    image = int(contents.table.owners[row])
    name = contents.name(image_to_label_path(contents.images[image].path))
    return Example(f"{name}: {text}", (image,), (int(row),) if other is None else (int(row), int(other)))


def _pair_example(contents: Contents, one: int, other: int, sign: str, more: str = "") -> Example:
    if one == other:
        return Example(f"{contents.image_name(one)} is in both", (int(one),))
    first, second = (contents.image_name(image) for image in (one, other))
    if sign == "=" and not np.array_equal(contents.table.labels(one), contents.table.labels(other)):
        more = "with other labels"
    return Example(f"{first} {sign} {second}" + (f" ({more})" if more else ""), (int(one), int(other)))


# ------------------------------------------------------------------------------------------------- a text and a page


def split_table(contents: Contents) -> list[tuple[str, ...]]:
    """Returns a table, its head first: what each split has."""
    rows = [("split", "images", "with labels", "background", "no label file", "damaged", "labels", "per image")]
    for split, members in contents.members.items():
        labels = [contents.images[image].labels for image in members]
        missing = sum(one is None for one in labels)
        filled = int((np.diff(contents.table.offsets)[members] > 0).sum())
        total = len(contents.rows(split))
        counts = (len(members), filled, len(members) - filled - missing, missing, len(contents.damaged[split]), total)
        rows.append((split, *map(str, counts), f"{total / max(len(members), 1):.1f}"))
    return rows


def class_table(contents: Contents) -> list[tuple[str, ...]]:
    """Returns a table, its head first: the labels of each class in each split."""
    counts = {split: class_counts(contents, split) for split in contents.members}
    rows = [(name, *(str(count[label]) for count in counts.values())) for label, name in contents.spec.names.items()]
    return [("class", *counts), *rows]


def tell(contents: Contents, findings: Sequence[Finding]) -> None:
    """Logs what was found, the worst first."""
    for table in (split_table(contents), class_table(contents)):
        shown = table[: TEXT_CLASSES + 1]
        widths = [max(len(row[column][:24]) for row in shown) for column in range(len(table[0]))]
        LOGGER.info("")
        for row in shown:
            cells = [
                f"{row[0][:24]:<{widths[0]}}",
                *(f"{cell:>{wide}}" for cell, wide in zip(row[1:], widths[1:], strict=True)),
            ]
            LOGGER.info("  ".join(cells))
        if len(table) > len(shown):
            LOGGER.info(f"... and {len(table) - len(shown)} more classes")
    for level, heading in HEADINGS.items():
        found = [one for one in findings if one.level == level]
        LOGGER.info(f"\n{colorstr('bold', heading)}{'' if found else ': nothing'}")
        for one in found:
            LOGGER.info(f"{one.count:>7}  {one.title}")
            for example in one.examples[:TEXT_EXAMPLES]:
                LOGGER.info(f"{'':>9}{example.text}")
            if len(one.examples) > TEXT_EXAMPLES:
                LOGGER.info(f"{'':>9}... and {len(one.examples) - TEXT_EXAMPLES} more")
            LOGGER.info(f"{'':>9}{one.advice}")


def picture(contents: Contents, number: int, rows: Sequence[int] = ()) -> str:
    """Returns an image with its boxes, those of `rows` marked and if small enlarged, as an <img> with its data."""
    scanned, start = contents.images[number], int(contents.table.offsets[number])
    labels = contents.table.labels(number)
    corners = xywh2xyxy(labels[:, 1:].astype(np.float64))
    marked = [row - start for row in rows if contents.table.owners[row] == number]
    window = np.array([0.0, 0.0, 1.0, 1.0])
    if marked:
        low, high = corners[marked, :2].min(axis=0).clip(0, 1), corners[marked, 2:].max(axis=0).clip(0, 1)
        if (high - low).max() < ZOOM_BELOW:
            half = np.maximum(2 * (high - low).max(), 24 / np.array(scanned.size_wh))
            window = np.concatenate([(low + high) / 2 - half, (low + high) / 2 + half]).clip(0, 1)
    image = read_image(scanned.path, 2 * PICTURE_PX if window[2] - window[0] == 1 else None)
    sides_wh = np.array(image.shape[1::-1])
    left, top, right, bottom = np.rint(window * np.tile(sides_wh, 2)).astype(int)
    image = image[top:bottom, left:right]
    scale = min(PICTURE_PX / image.shape[0], 1.8 * PICTURE_PX / image.shape[1])
    shown_wh = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    image = cv2.resize(image, shown_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    boxes_px = (corners * np.tile(sides_wh, 2) - (left, top, left, top)) * scale
    named = marked or len(labels) <= NAMED_BOXES
    annotations = [
        Annotation(
            boxes_px[index],
            _class(contents.spec.names, labels[index, 0]) if named else "",
            colors(labels[index, 0], bgr=True),
        )
        for index in marked or range(len(labels))
    ]
    Annotator(image, line_width=1, font_size=10).annotate(annotations)
    return image_tag(image, contents.name(scanned.path))


def _figure(contents: Contents, example: Example) -> str:
    images = "".join(
        picture(contents, image, example.rows if not place else ()) for place, image in enumerate(example.images)
    )
    return f"<figure><div>{images}</div><figcaption>{escape(printable(example.text))}</figcaption></figure>"


def _finding(contents: Contents, one: Finding) -> str:
    """Returns a finding as a line that opens: pictures of the first cases, the names of the others."""
    pictured = [example for example in one.examples if example.images][:PAGE_EXAMPLES]
    named = [example for example in one.examples if example not in pictured]
    figures = "".join(_figure(contents, example) for example in pictured)
    lines = [f"<li>{escape(printable(example.text))}</li>" for example in named[:PAGE_LINES]]
    lines += [f"<li>... and {len(named) - PAGE_LINES} more</li>"] * (len(named) > PAGE_LINES)
    body = (f'<div class="shown">{figures}</div>' if figures else "") + (f"<ul>{''.join(lines)}</ul>" if lines else "")
    opened = " open" if one.level == MEND else ""
    return (
        f'<details class="{one.level}"{opened}><summary><b>{one.count}</b><span>{escape(one.title)}</span></summary>'
        f'<p class="quiet">{escape(printable(one.advice))}</p>{body}</details>'
    )


def page(
    contents: Contents, findings: Sequence[Finding], imgsz: int, anchors_px: np.ndarray | None, source: str
) -> str:
    """Returns the report as one HTML file without outside resources."""
    counts = {split: class_counts(contents, split) for split in contents.members}
    sections = [
        f"<section><h2>{heading}</h2>{''.join(_finding(contents, one) for one in found) or '<p>Nothing.</p>'}</section>"
        for level, heading in HEADINGS.items()
        for found in [[one for one in findings if one.level == level]]
    ]
    generator = np.random.Generator(np.random.Philox(0))
    train = contents.members["train"]
    samples = generator.permutation(train)[:SAMPLES]
    figures = "".join(_figure(contents, Example(contents.image_name(image), (int(image),))) for image in samples)
    verdict = ", ".join(
        f'<b class="{level}">{count}</b> {HEADINGS[level].lower()}' if count else f"nothing {HEADINGS[level].lower()}"
        for level in (MEND, LOOK)
        for count in [sum(one.level == level for one in findings)]
    )
    totals = f"{len(contents.images)} images, {len(contents.table.rows)} labels, {contents.spec.nc} classes"
    body = f"""<header><h1>{escape(printable(Path(source).name))}</h1>
<p class="quiet">{escape(printable(source))}</p><p>{totals}: {verdict}</p></header>
<main>
<section><h2>Splits</h2>{html_table(split_table(contents))}</section>
{sections[0]}{sections[1]}
<section><h2>Labels of each class</h2>{class_bars(contents.spec.names, counts)}</section>
<section><h2>Boxes and images</h2><div class="charts">{label_charts(contents.table, imgsz, anchors_px)}</div></section>
<section><h2>Some training images</h2><div class="shown">{figures}</div></section>
{sections[2]}
</main>"""
    return fill_page(f"Check of {Path(source).name}", body)


# ------------------------------------------------------------------------------------------------------ a clean copy


def write_fixed(contents: Contents, copies: Copies, doubled: Sequence[tuple[int, int]], folder: Path) -> None:
    """Writes a copy of the data set without what a program can mend, and logs what that was.

    Left out: images that cannot be used, whose labels break the rules or name no class, and those of a later split that
    are copies of an earlier one's. Boxes are clipped to the image; doubled ones, and those without a side, removed.
    Label files that need no change are copied as they are. `folder` appears, in one that exists, when all is written.

    Raises:
        UserError: a split would be left without images.
    """
    table, spec = contents.table, contents.spec
    broken = {image for image, one in enumerate(contents.images) if one.labels and one.labels.problems}
    broken |= set(table.owners[table.rows[:, 0] >= spec.nc].tolist())
    kept = {}
    for split, members in contents.members.items():
        left_out = broken | {image for image, _ in copies.exact[split]}
        kept[split] = [int(image) for image in members if image not in left_out]
        if not kept[split]:
            raise UserError(
                f"--fix {folder}: would leave no image of {split}: all {len(members)} are copies of an earlier "
                "split's, or have labels that break the rules. Divide anew: python -m utils.tools.split."
            )
    removed = np.zeros(len(table.rows), bool)
    removed[[later for _, later in doubled]] = True
    removed |= (table.rows[:, 3:] <= 0).any(axis=1)
    clipped = (reaches_beyond(table) > OUTSIDE_PX) & ~removed
    counts = Counter({"damaged": sum(map(len, contents.damaged.values()))})
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary, folder.name)
        for split, numbers in kept.items():
            counts["broken"] += sum(int(image) in broken for image in contents.members[split])
            counts["copies"] += len({image for image, _ in copies.exact[split]} - broken)
            common = os.path.commonpath([os.path.dirname(contents.images[image].path) for image in numbers])
            for image in progress(numbers, desc=f"Copying {split}", unit="img"):
                one = contents.images[image]
                target = new / "images" / split / os.path.relpath(one.path, common)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one.path, target)
                if one.labels is None:
                    continue
                label_target = Path(image_to_label_path(target))
                label_target.parent.mkdir(parents=True, exist_ok=True)
                own = slice(*table.offsets[image : image + 2])
                changed = {"removed": removed[own].sum() + one.labels.duplicates, "clipped": clipped[own].sum()}
                if not any(changed.values()):
                    shutil.copyfile(image_to_label_path(one.path), label_target)
                    continue
                counts.update(changed)
                counts["keypoints"] += bool(spec.kpt_shape and spec.kpt_shape[0])
                label_target.write_text(_label_lines(one, removed[own]), encoding="utf-8")
        content = {"path": ".", **{split: f"images/{split}" for split in kept}, "names": dict(spec.names)}
        content |= {"kpt_shape": [*spec.kpt_shape]} if spec.kpt_shape else {}
        write_yaml(new / (spec.source.name if spec.source else "data.yaml"), content)
        os.replace(new, folder)
    images = ", ".join(f"{len(numbers)} {split}" for split, numbers in kept.items())
    LOGGER.info(
        f"Fixed copy in {colorstr('bold', folder)}: {images} images. Left out: {counts['damaged']} images that cannot "
        f"be used, {counts['broken']} whose labels break the rules, {counts['copies']} that are copies of an earlier "
        f"split's. Boxes: {counts['clipped']} clipped, {counts['removed']} removed (doubled, or without a side)."
    )
    if counts["keypoints"]:
        LOGGER.warning(f"WARNING: {counts['keypoints']} label files were changed and have lost their keypoints")


def _label_lines(one: Scanned, removed: np.ndarray) -> str:
    """Returns the label file of an image, with its boxes clipped and those that are `removed`, bool (n,), left out."""
    labels = zip(one.labels.rows.astype(np.float64), one.labels.polygons, removed, strict=True)
    kept = [
        (int(row[0]), *(polygon.ravel() if len(polygon) else xywh2xyxy(row[1:])))
        for row, polygon, gone in labels
        if not gone
    ]
    return label_text(kept, FRACTIONS)


# ------------------------------------------------------------------------------------------------------- the command


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser(
        "utils.tools.check",
        description="Check a data set: damaged, missing, leaking and repeated images, doubtful labels, classes, sizes, "
        "anchors. Changes nothing.",
        epilog="Exit status: 0 nothing to mend (there may be something to look at); 1 something to mend: images or "
        "labels that are damaged, or images of one split that are in another; 1 too, with a message, where the check "
        "could not be done; 2 an unknown option; 130 Ctrl-C. Near-duplicates are images whose perceptual hashes differ "
        f"in at most {NEAR_BITS} of 256 bits.",
    )
    add = parser.add_argument
    add("data", help="data set YAML")
    add("--html", type=Path, help="where the page goes; default: runs/check/exp/index.html, exp2 and so on")
    add("--fix", type=Path, metavar="FOLDER", help="write a mended copy into this new folder")
    add("--cfg", default="yolov5s.yaml", help="model YAML whose anchors are compared with the labels")
    add(
        *("--imgsz", "--img", "--img-size"),
        type=number(int, 32, MAX_IMAGE_SIDE_PX),
        default=DEFAULT_IMGSZ,
        help="image side in px that boxes and anchors are judged at",
    )
    add("--workers", type=number(int, 0), help="processes; default: one per core, 8 at most")
    return parser


def main(options: argparse.Namespace) -> list[Finding]:
    """Checks a data set, tells what was found, and writes the page and, if asked for, the clean copy.

    Raises:
        ReportedError: there is something to mend.
        UserError: the data set cannot be read, or the page or the copy cannot be written.
    """
    echo_options("check", options)
    spec = load_spec(options.data)
    fixed, run = options.fix and options.fix.absolute(), run_folder(ROOT / "runs" / "check", "exp")
    if fixed and os.path.lexists(fixed):
        raise UserError(f"--fix {options.fix}: exists. Give a new folder.")
    if fixed and any(fixed.is_relative_to(path) for path in (*spec.train, *spec.val, *spec.test)):
        raise UserError(f"--fix {options.fix}: lies among the images of the data set. Give a folder elsewhere.")
    if options.html and os.path.isdir(options.html):
        raise UserError(f"--html {options.html}: is a folder. Give a file, such as {options.html / 'index.html'}.")
    for option, path in (("--html", options.html), ("--fix", fixed)):  # refused, if at all, before anything is read
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {path}: cannot be written there ({error.strerror}).") from error
    cfg = find_file(options.cfg, (".yaml", ".yml"), "--cfg")
    anchors_px = _anchors_of(cfg)
    with explain_resource_errors({"--workers": options.workers}):
        contents = read_contents(spec, options.workers)
        copies = find_copies(contents)
        doubled, mixed = overlapping_labels(contents.table)
        found = [
            *find_damage(contents),
            *find_leaks(contents, copies),
            *find_files(contents, stray_labels(contents)),
            *find_boxes(contents, doubled, mixed, options.imgsz),
            *find_make_up(contents, options.imgsz, anchors_px, cfg),
        ]
        findings = [one for one in found if one.count]
        tell(contents, findings)
        html = options.html or increment_path(run, mkdir=True) / "index.html"
        with atomic_write(html) as temporary:
            content = page(contents, findings, options.imgsz, anchors_px, str(spec.source))
            temporary.write_text(content, encoding="utf-8")
        LOGGER.info(f"\nPage: {colorstr('bold', html)}")
        if fixed:
            write_fixed(contents, copies, doubled, fixed)
    if any(one.level == MEND for one in findings):
        raise ReportedError("There is something to mend.")
    return findings


def _anchors_of(cfg: Path) -> np.ndarray | None:
    """Returns a model YAML's anchors, (k, 2) px; None where it has none, or only their number."""
    content = read_yaml(cfg)
    anchors = content.get("anchors") if isinstance(content, dict) else None
    if not isinstance(anchors, list):
        return None
    try:
        return np.array([side for level in anchors for side in level], np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise UserError(f"--cfg {cfg}: 'anchors:' must be lists of widths and heights in px ({error}).") from error


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
