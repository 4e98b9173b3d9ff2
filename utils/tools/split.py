"""Divides a data set into train, val and test, or into folds, with the classes in proportion; moves no file.

`python -m utils.tools.split mine.yaml --val 0.2` writes list files and a data set YAML that names them. The same images
and the same seed give the same lists.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import CommandParser, echo_options, number, run_command
from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import load_labels
from utils.errors import UserError
from utils.files import ROOT, atomic_write, increment_path, run_folder, write_yaml
from utils.log import LOGGER, colorstr

SHOWN_CLASSES = 30
EQUAL = 1e-9  # images; shares such as 0.2 are no exact numbers


def stratify(
    per_class: np.ndarray, sizes: np.ndarray, shares: Sequence[float], generator: np.random.Generator
) -> np.ndarray:
    """Assigns items to subsets so that every class is spread in proportion: iterative stratification.

    Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data" (2011), algorithm 1: the class with the
    fewest images left is dealt out first, each item to the subset that lacks most images of that class, then most
    images at all. An item here may be a group of several images: it counts as many times, large ones come first.

    Args:
        per_class: int (n, c), of each item the number of its images with each class.
        sizes: int (n,), of each item the number of its images.
        shares: (k,), of the images that each subset is to get; they add up to 1.
        generator: of the order of equal items, and of the choice between equal subsets.

    Returns:
        int64 (n,), the subset of each item, 0 to k - 1.
    """
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    left = per_class.sum(axis=0)
    lacking, room = np.outer(left, shares), sizes.sum() * np.asarray(shares, float)
    subsets = np.full(len(sizes), -1)

    def assign(item: int, wanted: np.ndarray) -> None:
        best = np.flatnonzero(wanted > wanted.max() - EQUAL)
        best = best[room[best] > room[best].max() - EQUAL]
        subsets[item] = chosen = best[0] if len(best) == 1 else generator.choice(best)
        lacking[:, chosen] -= per_class[item]
        room[chosen] -= sizes[item]
        left[:] -= per_class[item]

    while left.any():
        rarest = int(np.argmin(np.where(left > 0, left, left.max() + 1)))
        for item in order[(per_class[order, rarest] > 0) & (subsets[order] < 0)]:
            assign(item, lacking[rarest])
    for item in order[subsets[order] < 0]:  # of background images
        assign(item, room)
    return subsets


def group_names(paths: Sequence[str], pattern: str = "") -> list[str]:
    """Returns each image's group: what the pattern finds in its path below the folder that all images share.

    Of a pattern with parentheses it is what these enclose; an image without a match, or all without a pattern, is a
    group of its own, called by its path.
    """
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [Path(os.path.relpath(path, common)).as_posix() for path in paths]
    found = [re.search(pattern, name) if pattern else None for name in names]
    alone = sum(match is None for match in found)
    if pattern and alone == len(names):
        raise UserError(f"--group-by '{pattern}': found in none of the {alone} images, such as {names[0]}.")
    if pattern and alone:
        example = names[found.index(None)]
        LOGGER.warning(f"WARNING: --group-by is not found in {alone} images, which stay single, such as {example}")
    groups = ("\0".join(map(str, match.groups())) or match[0] if match else None for match in found)
    return [name if group is None else f"group {group}" for name, group in zip(names, groups, strict=True)]


def split(
    source: str | Path,
    shares: Mapping[str, float],
    folder: Path,
    group_by: str = "",
    names: Sequence[str] = (),
    seed: int = 0,
    exist_ok: bool = False,
) -> Path:
    """Divides the images of a folder or a data set and writes list files and data set YAMLs.

    Args:
        source: a folder of images with labels, or a data set YAML. Its train and val are divided, its test images too
            if `shares` has a "test", which else stay what they are.
        shares: subset ("train", "val", "test", or "fold1", "fold2", ...) to its share of the images.
        folder: where to write, made as late as possible; if it exists, the next free `folder2`, ... A list for each
            subset, such as `train.txt`, and `data.yaml`, or of folds `data-fold1.yaml`, ....
        group_by: see `group_names`; images of one group get into one subset.
        names: of the classes, where the source is a folder; without them they are called by their numbers.
        seed: of the order in which images are dealt out.
        exist_ok: write into `folder` even if it exists.

    Returns:
        The folder written.

    Raises:
        UserError: no images or labels that cannot be used, names that do not fit, or a subset that gets no image.
    """
    spec = None if os.path.isdir(source) else load_spec(source)
    if spec is not None and names:
        raise UserError(f"--names: {source} has names of its own. Change them there.")
    sources = [Path(source)] if spec is None else [*spec.train, *spec.val, *(spec.test if "test" in shares else ())]
    table = load_labels(sources, spec, need_labels=False)
    table = table.subset(np.unique(np.array(table.image_paths, object), return_index=True)[1])  # some are listed twice
    paths = list(table.image_paths)
    nc = len(names) or (spec.nc if spec else int(table.rows[:, 0].max(initial=0)) + 1)
    if len(table.rows) and table.rows[:, 0].max() >= nc:
        raise UserError(f"--names: {nc} names for labels with classes up to {int(table.rows[:, 0].max())}.")
    groups, group_of = np.unique(group_names(paths, group_by), return_inverse=True)
    pairs = np.unique(np.stack([table.owners, table.rows[:, 0].astype(int)], axis=1), axis=0)  # image, class
    per_class = np.zeros((len(groups), nc), int)
    np.add.at(per_class, (group_of[pairs[:, 0]], pairs[:, 1]), 1)
    generator = np.random.Generator(np.random.Philox(seed))
    subsets = stratify(per_class, np.bincount(group_of), list(shares.values()), generator)
    members = {name: np.flatnonzero(subsets[group_of] == number) for number, name in enumerate(shares)}
    empty = [name for name, indices in members.items() if not len(indices)]
    if empty:
        raise UserError(
            f"{source}: its {len(paths)} images in {len(groups)} groups leave none for '{empty[0]}'. Ask for fewer or "
            "larger parts, or group less."
        )
    class_names = dict(enumerate(names or (spec.names.values() if spec else (f"class{one}" for one in range(nc)))))
    _report(class_names, {name: per_class[subsets == number] for number, name in enumerate(shares)}, members)
    folder = increment_path(folder, exist_ok=exist_ok, mkdir=True).absolute()
    for name, indices in members.items():
        with atomic_write(folder / f"{name}.txt") as temporary:
            text = "".join(f"{_as_listed(paths[index], folder)}\n" for index in indices)
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    common: dict[str, Any] = {"names": class_names}
    if spec is not None and spec.kpt_shape:
        common["kpt_shape"] = [*spec.kpt_shape]
    if "test" in shares:
        common["test"] = "test.txt"
    elif spec is not None and spec.test:
        common["test"] = [str(path) for path in spec.test]
    folds = [name for name in shares if name.startswith("fold")]
    for fold in folds:
        others = [f"{name}.txt" for name in folds if name != fold]
        write_yaml(folder / f"data-{fold}.yaml", {"path": ".", "train": others, "val": f"{fold}.txt", **common})
    if not folds:
        write_yaml(folder / "data.yaml", {"path": ".", "train": "train.txt", "val": "val.txt", **common})
    return folder


def _as_listed(image: str, folder: Path) -> str:
    """Returns how a list file in `folder` names an image: relative to itself if the image lies below it."""
    path = Path(image)
    return f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else image


def _report(names: Mapping[int, str], per_class: Mapping[str, np.ndarray], members: Mapping[str, np.ndarray]) -> None:
    """Logs how many images each subset has, in all and of each class."""
    counts = {name: table.sum(axis=0) for name, table in per_class.items()}
    rows = [("", *counts), ("images", *map(len, members.values())), ("groups", *map(len, per_class.values()))]
    rows += [(name, *(int(one[label]) for one in counts.values())) for label, name in names.items()]
    wide = max(len(str(row[0])[:20]) for row in rows[: 3 + SHOWN_CLASSES])
    for row in rows[: 3 + SHOWN_CLASSES]:
        LOGGER.info(f"{str(row[0])[:20]:<{wide}}" + "".join(f"{cell:>10}" for cell in row[1:]))
    if len(names) > SHOWN_CLASSES:
        LOGGER.info(f"... and {len(names) - SHOWN_CLASSES} more classes")
    for name, count in counts.items():
        absent = [names[label] for label in np.flatnonzero((count == 0) & (sum(counts.values()) > 0))]
        if absent:
            LOGGER.warning(f"WARNING: '{name}' has no image of {len(absent)} classes, such as {absent[0]}")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a regular expression ({error})") from error
    return text


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser(
        "utils.tools.split",
        description="Divide a data set into train, val and test, or into folds, with every class in proportion. "
        "Writes list files and a data set YAML; moves nothing.",
    )
    add = parser.add_argument
    add("source", help="folder of images with labels, or a data set YAML, whose train and val are divided anew")
    add("--val", type=number(float, 0, 1), help="share of the images for validation (default 0.2)")
    add("--test", type=number(float, 0, 1), default=0.0, help="share for the test; at 0 the YAML's own stays as it is")
    add("--folds", type=number(int, 2, 1000), help="instead of --val: this many parts, each of which validates once")
    add(
        "--group-by",
        type=_pattern,
        default="",
        help="regular expression: images in whose path it finds the same text (or, with parentheses, the same text in "
        r"these) stay together, such as 'video\d+' for the frames of a video",
    )
    add("--names", nargs="+", default=[], help="class names, where the source is a folder")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed")
    add("--project", default=str(ROOT / "runs" / "split"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    return parser


def main(options: argparse.Namespace) -> Path:
    """Divides the data set, and returns the folder of the lists.

    Raises:
        UserError: shares that make no sense, or what `split` says.
    """
    echo_options("split", options)
    folder = run_folder(options.project, options.name)
    if options.folds and options.val is not None:
        raise UserError("--val and --folds: give one of them; of --folds K each part validates once.")
    val = 0.2 if options.val is None else options.val
    rest = 1 - options.test
    if options.folds:
        shares = {f"fold{fold}": rest / options.folds for fold in range(1, options.folds + 1)}
    else:
        shares = {"train": rest - val, "val": val}
    if min(shares.values()) < EQUAL:
        raise UserError(
            f"--val {val} --test {options.test}: a part of the images must remain for training and for val."
        )
    shares |= {"test": options.test} if options.test else {}
    written = split(options.source, shares, folder, options.group_by, options.names, options.seed, options.exist_ok)
    LOGGER.info(f"Lists and YAML saved to {colorstr('bold', written)}")
    return written


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
