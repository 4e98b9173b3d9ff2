"""Digests of what a training run came from and came to, to compare runs and machines.

    python -m utils.train.fingerprint runs/train/exp

prints a line (SHA-256 and what went into it) for each checkpoint's weights, the labels, the images, the options and
the versions, and one for all. Where two runs' weights differ, the other lines say why. Of checkpoints the tensors
count, not the file, whose zip archive carries more than them; what else is left out stands at `NOT_COUNTED`. Labels
and images are read where they lie now: a data set that was changed after the training shows its present state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.cli import run_command
from utils.errors import UserError
from utils.log import logging_from

if TYPE_CHECKING:
    import torch

    from utils.dataloaders.config import DataSpec
    from utils.dataloaders.labels import LabelTable


CHECKPOINTS = ("best.pt", "last.pt")
SPLITS = ("train", "val")
# Options that name files and folders, whose content counts instead, or hyperparameters, which are counted as such; and
# those that do not touch the result.
NOT_COUNTED = frozenset(
    "weights teacher cfg act data hyp recipe box_loss hours project name save_dir exist_ok resume device "
    "local_rank workers cache noplots save_period logger seeds".split()
)
READING_THREADS = 8
SHORT_DIGITS = 12  # of a digest, in the line at the end of a training


class Part(NamedTuple):
    """One line of a fingerprint."""

    name: str
    digest: str | None  # SHA-256, hexadecimal; None where the content is not available
    detail: str  # what went into it, or why it is not available


def build_parser() -> argparse.ArgumentParser:
    """Declares the command line."""
    parser = argparse.ArgumentParser(
        "python -m utils.train.fingerprint",
        description="Print digests of a training run, to compare runs and machines.",
    )
    parser.add_argument("run", help="a run's folder, such as runs/train/exp, or one checkpoint")
    parser.add_argument("--data", default="", help="data set YAML; default: the one that the run was trained on")
    return parser


def main(options: argparse.Namespace) -> None:
    """Prints the fingerprint of the run that `options` name."""
    for part in fingerprint(options.run, options.data):
        print(f"{part.name:<9} {part.digest or '-':<64} {part.detail}")


def fingerprint(run: str | Path, data: str | Path = "", images: bool = True) -> list[Part]:
    """Returns a run's fingerprint: checkpoints, labels, images, options, versions, all.

    Args:
        run: the run's folder, or one checkpoint.
        data: data set YAML, where it is not the one that the run names.
        images: whether to read the images as well, which takes a while for many.

    Raises:
        UserError: no such run, or its checkpoints cannot be read.
    """
    from utils.checkpoint import load_checkpoint

    run = Path(run)
    files = [run] if run.is_file() else [file for name in CHECKPOINTS if (file := run / "weights" / name).is_file()]
    if not files:
        raise UserError(f"{run}: is no training run: neither weights/best.pt nor weights/last.pt is in it.")
    checkpoints = {file.name: load_checkpoint(file) for file in files}
    parts = [weights_part(name, checkpoint) for name, checkpoint in checkpoints.items()]
    newest = list(checkpoints.values())[-1]
    try:
        spec, tables = read_data(data or newest["data"] or "")
        parts += [labels_part(spec, tables), images_part(tables)][: 1 + images]
    except UserError as error:
        parts += [Part(name, None, f"not available: {error}") for name in ("labels", "images")[: 1 + images]]
    options = {name: value for name, value in newest["opt"].items() if name not in NOT_COUNTED}
    content = {"options": options, "hyperparameters": newest["hyp"], "model": newest["yaml"]}
    content |= {"teacher": newest["teacher"]} if "teacher" in newest else {}
    versions = newest["versions"]
    parts += [
        Part("options", json_digest(content), " ".join(f"{name}={value}" for name, value in sorted(options.items()))),
        Part("versions", json_digest(versions), ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
    missing = [part.name for part in parts if part.digest is None]
    if missing:
        return [*parts, Part("all", None, f"not available without {' and '.join(missing)}")]
    return [*parts, Part("all", json_digest([[part.name, part.digest] for part in parts]), "all lines above")]


def summary(run: str | Path) -> str:
    """Returns a finished run's fingerprint, less the images, on one line with shortened digests."""
    with logging_from(logging.ERROR):  # what is read again need not be logged again
        *parts, _ = fingerprint(run, images=False)
    digests = ", ".join(f"{part.name} {part.digest[:SHORT_DIGITS] if part.digest else '-'}" for part in parts)
    return (
        f"Fingerprint: {digests} (in full, with the images: python -m utils.train.fingerprint {shlex.quote(str(run))})"
    )


def weights_part(name: str, checkpoint: Mapping[str, Any]) -> Part:
    """Returns the digest of a checkpoint's tensors: the model's, and the EMA's where a run is not finished."""
    states = {key: checkpoint[key] for key in ("model", "ema") if checkpoint[key] is not None}
    tensors = {f"{key}.{item}": tensor for key, state in states.items() for item, tensor in state.items()}
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    finished = "" if checkpoint["epoch"] == -1 else f", epoch {checkpoint['epoch']} of an unfinished run"
    return Part(name, tensors_digest(tensors), f"{len(tensors)} tensors of {', '.join(kinds)}{finished}")


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a digest of names, types, shapes and values, whatever their order, memory format and device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_data(data: str | Path) -> tuple[DataSpec, dict[str, LabelTable]]:
    """Reads a data set that is on this machine, and its labels by split; nothing is downloaded.

    Raises:
        UserError: it is not here, or not in order.
    """
    from utils.dataloaders.config import load_spec
    from utils.dataloaders.labels import load_labels

    if not data:
        raise UserError("the checkpoint names no data set: give --data.")
    spec = load_spec(data, need=SPLITS, download=False)
    tables = {}
    for split in SPLITS:
        tables[split] = load_labels(getattr(spec, split), prefix=f"{split}: ", kpt_shape=spec.kpt_shape)
    return spec, tables


def labels_part(spec: DataSpec, tables: Mapping[str, LabelTable]) -> Part:
    """Returns the digest of a data set's labels as training sees them.

    That is: class names; each image's path below the data set's folder (its bare name where it lies elsewhere), in
    order, with its width and height; boxes and polygons, rounded to float32.
    """
    digest = hashlib.sha256(json.dumps(list(spec.names.items())).encode())
    for split, table in tables.items():
        digest.update(json.dumps([split, [_name_below(path, spec.root) for path in table.image_paths]]).encode())
        for array in (table.sizes_wh, table.offsets, table.rows, table.seg_offsets, table.seg_points):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    counts = (f"{split}: {len(table)} images, {len(table.rows)} labels" for split, table in tables.items())
    return Part("labels", digest.hexdigest(), "; ".join(counts))


def images_part(tables: Mapping[str, LabelTable]) -> Part:
    """Returns the digest of the bytes of all image files.

    Raises:
        UserError: one cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor

    digest = hashlib.sha256()
    paths = [path for table in tables.values() for path in table.image_paths]
    try:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            for file_digest in pool.map(lambda path: hashlib.sha256(Path(path).read_bytes()).digest(), paths):
                digest.update(file_digest)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    return Part("images", digest.hexdigest(), f"{len(paths)} files")


def json_digest(content: Any) -> str:
    """Returns the digest of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name_below(path: str, root: Path) -> str:
    """Returns a file's path below `root` with forward slashes, or its bare name where it is not below."""
    folder = os.path.join(root, "")
    name = path.removeprefix(folder) if path.startswith(folder) else os.path.basename(path)
    return name.replace(os.sep, "/")


def dataset_record(spec: DataSpec, tables: Mapping[str, LabelTable]) -> dict[str, torch.Tensor]:
    """Returns what a checkpoint keeps of its data, by which a resumed run notices that it has changed.

    By split, int64 (N, 2), a row for each image: a hash of its path below the data set's folder, and one of its width
    and height, boxes and polygons. So the data may move as a whole, and pixels are not looked at.
    """
    import numpy as np
    import torch

    def hashed(*parts: bytes) -> bytes:
        return hashlib.blake2b(b"".join(parts), digest_size=8).digest()

    record = {}
    for split, table in tables.items():
        sizes, labels, points = (array.tobytes() for array in (table.sizes_wh, table.rows, table.seg_points))
        first_row, first_point = table.offsets.tolist(), table.seg_offsets[table.offsets].tolist()
        hashes = bytearray()
        for index, path in enumerate(table.image_paths):
            own_labels = labels[20 * first_row[index] : 20 * first_row[index + 1]]
            own_points = points[8 * first_point[index] : 8 * first_point[index + 1]]
            hashes += hashed(os.fsencode(_name_below(path, spec.root)))
            hashes += hashed(sizes[8 * index : 8 * index + 8], own_labels, own_points)
        record[split] = torch.from_numpy(np.frombuffer(hashes, np.int64).reshape(-1, 2))
    return record


def dataset_changes(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> str:
    """Returns how the images of two `dataset_record`s differ: "train: 8 removed, 1 added; val: 3 relabelled", or ""."""
    changes = []
    for split in now:
        old, new = before[split].tolist(), now[split].tolist()
        old_images, new_images = (Counter(image for image, _ in rows) for rows in (old, new))
        old_labels, new_labels = dict(old), dict(new)
        counts = {
            "removed": (old_images - new_images).total(),
            "added": (new_images - old_images).total(),
            "relabelled": sum(new_labels.get(image, labels) != labels for image, labels in old_labels.items()),
        }
        if any(counts.values()):
            changes.append(f"{split}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    return "; ".join(changes)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
