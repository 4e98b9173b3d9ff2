"""The embedded data set: pictures of geometric shapes, rendered once instead of downloaded.

`render(root)` writes 300 training and 60 validation images of 320 px with YOLO labels, in the layout that
data/shapes.yaml names. Each picture (see `utils.data.scenes`) is a pure function of its split and number, so every
rendering with the same libraries gives the same bytes. `python -m utils.data.shapes` renders by hand, the images of
data/images too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.checks import UserError
from utils.cli import run_command
from utils.data.scenes import Scene, render_scene
from utils.log import LOGGER, progress

IMAGE_SIZE = 320
JPEG_QUALITY = 92
STALE_SECONDS = 3600  # a temporary folder older than this was left by a killed process


class Split(NamedTuple):
    """A part of the data set; `key` separates its random numbers from the other parts'."""

    name: str
    count: int
    key: int


SPLITS = (Split("train", 300, 1), Split("val", 60, 2))


class Sample(NamedTuple):
    """A picture for trying out a detector; `seed` was chosen by eye."""

    name: str
    width: int
    height: int
    seed: int


SAMPLES = (
    Sample("shapes-wide.jpg", 640, 480, 5),
    Sample("shapes-tall.jpg", 480, 640, 8),
    Sample("shapes-square.jpg", 512, 512, 1),
)


def scene_of(split: Split, index: int) -> Scene:
    """The picture number `index` of a split, IMAGE_SIZE pixels square."""
    return render_scene(_generator(split.key, index), IMAGE_SIZE, IMAGE_SIZE)


def _generator(key: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array((key, index), np.uint64)))


def label_text(scene: Scene) -> str:
    """The scene's label file: one line `class x_centre y_centre width height` per shape, as fractions of the image."""
    height, width = scene.owner.shape
    boxes_xyxy_norm = scene.boxes_xyxy_px / (width, height, width, height)
    centres = (boxes_xyxy_norm[:, :2] + boxes_xyxy_norm[:, 2:]) / 2
    sides = boxes_xyxy_norm[:, 2:] - boxes_xyxy_norm[:, :2]
    rows = zip(scene.classes, centres, sides, strict=True)
    return "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, (x, y), (w, h) in rows)


def _write_image(path: Path, image: np.ndarray) -> None:
    _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
    path.write_bytes(data.tobytes())


def _write_split(folder: Path, split: Split) -> None:
    """Writes images/<split> and labels/<split> below `folder`."""
    images, labels = folder / "images" / split.name, folder / "labels" / split.name
    for directory in (images, labels):
        directory.mkdir(parents=True)
    for index in progress(range(split.count), desc=f"Rendering {split.name} shapes", leave=False):
        scene = scene_of(split, index)
        _write_image(images / f"{index:04d}.jpg", scene.image)
        (labels / f"{index:04d}.txt").write_text(label_text(scene), encoding="utf-8")


def _move_into_place(source: Path, target: Path) -> None:
    """Renames a finished folder; whoever comes second keeps the first one's, which holds the same files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _remove_stale(parent: Path, prefix: str) -> None:
    """Deletes temporary folders of this data set that killed processes left behind."""
    for folder in parent.glob(f"{prefix}*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def render(root: Path) -> None:
    """Renders the data set into `root`: images/train, images/val, labels/train, labels/val.

    The pictures are made in a temporary folder beside `root` and renamed at the end, labels before images, so that a
    kill at any moment leaves each of the four folders whole or absent; a later call adds what is absent. Folders that
    exist are kept as they are. Two processes may render at the same time.

    Args:
        root: Folder of the data set; made when it does not exist.

    Raises:
        UserError: The folder cannot be written.
    """
    root = Path(root).absolute()
    prefix = f".{root.name}-rendering-"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(root.parent, prefix)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent) as temporary:
            for split in SPLITS:
                _write_split(Path(temporary), split)
            for kind in ("labels", "images"):
                for split in SPLITS:
                    _move_into_place(Path(temporary, kind, split.name), root / kind / split.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"Cannot write the embedded data set to {root}: {reason}. Make the folder writable, or copy "
            "data/shapes.yaml, set its 'path:' to a folder that is, and pass the copy with --data."
        ) from error
    LOGGER.info(f"Rendered the embedded data set ({', '.join(f'{s.count} {s.name}' for s in SPLITS)}) into {root}")


def render_samples(folder: Path) -> None:
    """Writes the pictures of SAMPLES, made by the same code, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        scene = render_scene(_generator(0, sample.seed), sample.width, sample.height)
        _write_image(folder / sample.name, scene.image)


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m utils.data.shapes`."""
    parser = argparse.ArgumentParser(description="Render the embedded data set, or the sample images of data/images.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--samples", action="store_true", help="write the sample images instead of the data set")
    return parser


def main(opt: argparse.Namespace) -> None:
    """Runs the command line."""
    (render_samples if opt.samples else render)(opt.folder)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
