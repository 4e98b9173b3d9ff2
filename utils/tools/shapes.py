"""The embedded data set: images of geometric shapes with exact boxes, rendered once instead of downloaded.

Each image is a pure function of its split and number, so every rendering with the same libraries gives the same bytes.
Every shape is labelled: a placement that would leave less than VISIBLE of any shape in sight is not used.
`python -m utils.tools.shapes` renders by hand, the images of data/images too.
"""

from __future__ import annotations

import argparse
import colorsys
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.cli import run_command
from utils.errors import UserError
from utils.log import LOGGER, progress
from utils.tools import convert

IMAGE_SIZE = 320
JPEG_QUALITY = 92
STALE_SECONDS = 3600  # a temporary folder older than this was left by a killed process
NAMES = ("circle", "square", "triangle", "star")
SCALE = (0.06, 0.60)  # longer side of a shape's box / shorter side of the image
VISIBLE = 0.6  # least part of a shape's area that others may leave in sight
INSIDE = 0.7  # least part of a shape's area that lies within the image
USUAL_HUE = 0.95  # share of the shapes whose hue is in their class's range
HUE_RANGE = 0.22  # width of that range on the colour circle; the classes' ranges do not touch
SUPERSAMPLE = 4  # mask pixels per image pixel and axis, for smooth edges


class Split(NamedTuple):
    """A part of the data set; `key` separates its random numbers from the other parts'."""

    name: str
    count: int
    key: int


SPLITS = (Split("train", 300, 1), Split("val", 60, 2))
# for trying out a detector: name, width, height, and a seed that was chosen by eye
SAMPLES = (
    ("shapes-wide.jpg", 640, 480, 5),
    ("shapes-tall.jpg", 480, 640, 8),
    ("shapes-square.jpg", 512, 512, 1),
)


class Scene(NamedTuple):
    """An image with its labels; `owner` tells which shape is on top where (-1: background)."""

    image: np.ndarray  # (h, w, 3) uint8 BGR
    classes: np.ndarray  # (n,) int64
    boxes_xyxy_px: np.ndarray  # (n, 4) float64, within the image
    owner: np.ndarray  # (h, w) int16


class Shape(NamedTuple):
    """One shape to be painted."""

    class_id: int
    corners_px: np.ndarray  # (k, 2) float64, may lie outside the image
    hole: float  # 0 = solid, else inner outline / outer outline


class Patch(NamedTuple):
    """What of a shape lies within the image: its opacity on the pixels that it touches, and its box."""

    rows: slice
    columns: slice
    alpha: np.ndarray  # (h, w) float32, 0 to 1
    box_xyxy_px: np.ndarray  # (4,) float64, exact to a quarter of a pixel


def scene_of(split: Split, index: int) -> Scene:
    """The image number `index` of a split, IMAGE_SIZE pixels square."""
    return render_scene(generator_of(split.key, index), IMAGE_SIZE, IMAGE_SIZE)


def generator_of(key: int, index: int) -> np.random.Generator:
    """The generator of an image's random choices."""
    return np.random.Generator(np.random.Philox(key=np.array((key, index), np.uint64)))


def label_text(scene: Scene) -> str:
    """The scene's label file."""
    boxes = ((label, *box) for label, box in zip(scene.classes, scene.boxes_xyxy_px, strict=True))
    return convert.label_text(boxes, scene.owner.shape[::-1])


def _ring(angles: np.ndarray, radii: np.ndarray | float = 1.0) -> np.ndarray:
    """Points (k, 2) at the given angles (k,) in radians and radii around the origin."""
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * np.reshape(radii, (-1, 1))


def _circle(rng: np.random.Generator) -> np.ndarray:
    return _ring(np.linspace(0, 2 * np.pi, 72, endpoint=False)) * (1.0, rng.uniform(0.85, 1.0))


def _square(rng: np.random.Generator) -> np.ndarray:
    return _ring(np.pi / 4 + np.arange(4) * np.pi / 2) * (1.0, rng.uniform(0.8, 1.0))


def _triangle(rng: np.random.Generator) -> np.ndarray:
    return _ring(np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.2, 0.2, 3))


def _star(rng: np.random.Generator) -> np.ndarray:
    return _ring(np.arange(10) * np.pi / 5, np.tile((1.0, rng.uniform(0.4, 0.52)), 5))


OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}


def _random_shape(rng: np.random.Generator, width: int, height: int) -> Shape:
    """A shape of any class, size (log-uniform within SCALE), rotation and place in an image of the given size."""
    class_id = int(rng.integers(len(NAMES)))
    outline = OUTLINES[NAMES[class_id]](rng)
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    outline = outline @ rotation.T
    low, high = outline.min(axis=0), outline.max(axis=0)
    longer_side = np.exp(rng.uniform(*np.log(SCALE))) * min(width, height)
    outline = (outline - (low + high) / 2) * (longer_side / (high - low).max())
    hole = float(rng.uniform(0.45, 0.65)) if rng.random() < 0.1 else 0.0
    return Shape(class_id, outline + rng.uniform((0, 0), (width, height)), hole)


def _area(shape: Shape) -> float:
    """Painted area in square pixels, the border of the image disregarded."""
    return cv2.contourArea(shape.corners_px.astype(np.float32)) * (1 - shape.hole**2)


def _patch(shape: Shape, width: int, height: int) -> Patch | None:
    """The part of the shape that lies within an image of the given size, or None."""
    low, high = shape.corners_px.min(axis=0), shape.corners_px.max(axis=0)
    left, top = np.clip(np.floor(low), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(high), 0, (width, height)).astype(int)
    if right == left or bottom == top:
        return None
    fine = np.zeros(((bottom - top) * SUPERSAMPLE, (right - left) * SUPERSAMPLE), np.uint8)
    outline = (shape.corners_px - (left, top)) * SUPERSAMPLE - 0.5
    cv2.fillPoly(fine, [np.rint(outline).astype(np.int32)], 255)
    columns, rows = np.flatnonzero(fine.any(axis=0)), np.flatnonzero(fine.any(axis=1))
    if columns.size == 0:
        return None
    box_xyxy_px = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)) / SUPERSAMPLE + (left, top, left, top)
    if shape.hole:
        centre = outline.min(axis=0) / 2 + outline.max(axis=0) / 2
        cv2.fillPoly(fine, [np.rint((outline - centre) * shape.hole + centre).astype(np.int32)], 0)
    alpha = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return Patch(slice(top, bottom), slice(left, right), alpha, box_xyxy_px)


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float], hue: float | None = None
) -> np.ndarray:
    """A BGR colour (3,) float32; of any hue unless one is given (0 to 1 around the circle)."""
    hue = rng.random() if hue is None else hue
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(*value))
    return np.array(rgb[::-1], np.float32) * 255


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Soft noise of several grain sizes, (h, w) float32 from 0 to 1."""
    total = np.zeros((height, width), np.float32)
    for cells in (3, 6, 12, 24, 48):
        grid = rng.random((cells, cells), dtype=np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / cells**0.6
    return cv2.normalize(total, None, 0, 1, cv2.NORM_MINMAX)


def _stripes(rng: np.random.Generator, width: int, height: int, period_px: tuple[float, float]) -> np.ndarray:
    """Parallel waves in any direction, (h, w) float32 from -1 to 1."""
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(*period_px), rng.uniform(0, 2 * np.pi)
    along = np.arange(width) * np.cos(angle)
    down = np.arange(height)[:, None] * np.sin(angle)
    return np.sin((along + down) * (2 * np.pi / period) + phase).astype(np.float32)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A muted, textured ground with a few thin lines that belong to no class, (h, w, 3) float32."""
    first, second = (_colour(rng, (0.05, 0.35), (0.2, 0.9)) for _ in range(2))
    clouds = _clouds(rng, width, height)[..., None]
    canvas = first * clouds + second * (1 - clouds)
    if rng.random() < 0.5:
        canvas += _stripes(rng, width, height, (6, 40))[..., None] * rng.uniform(3, 12)
    canvas = np.clip(canvas, 0, 255).astype(np.uint8)  # OpenCV smooths lines on 8-bit images only
    for _ in range(rng.integers(0, 4)):
        start, end = (rng.uniform((0, 0), (width, height)).astype(int).tolist() for _ in range(2))
        cv2.line(canvas, start, end, _colour(rng, (0, 0.8), (0.1, 1.0)).tolist(), int(rng.integers(1, 4)), cv2.LINE_AA)
    return canvas.astype(np.float32)


def _fill(rng: np.random.Generator, class_id: int, patch: Patch, beneath: np.ndarray) -> np.ndarray:
    """Pixels (h, w, 3) float32 for a shape: a colour that stands out from what lies beneath, plain or patterned."""
    height, width = patch.alpha.shape
    ground = beneath.mean(axis=(0, 1))
    if rng.random() < USUAL_HUE:
        hue = class_id / len(NAMES) + rng.uniform(-0.5, 0.5) * HUE_RANGE
    else:
        hue = rng.random()
    candidates = [_colour(rng, (0.5, 1.0), (0.4, 1.0), hue) for _ in range(4)]
    distances = [float(np.linalg.norm(candidate - ground)) for candidate in candidates]
    enough = [distance > 110 for distance in distances]
    base = candidates[enough.index(True) if any(enough) else int(np.argmax(distances))]
    pattern = rng.random()
    if pattern < 0.25:
        return base + _stripes(rng, width, height, (5, 25))[..., None] * rng.uniform(15, 45)
    if pattern < 0.5:
        return base + (_clouds(rng, width, height)[..., None] - 0.5) * rng.uniform(40, 110)
    return np.broadcast_to(base, (height, width, 3))


def _camera(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a camera adds: uneven light, sometimes blur, always noise. (h, w, 3) float32 -> uint8."""
    height, width = canvas.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    across = np.linspace(-1, 1, width) * np.cos(angle)
    down = np.linspace(-1, 1, height)[:, None] * np.sin(angle)
    canvas = canvas * (1 + strength * (across + down))[..., None].astype(np.float32)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 1.3))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(2, 10)
    return np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, owner: np.ndarray, placed: list[Shape]) -> tuple[Shape, Patch] | None:
    """A shape that leaves itself and all earlier ones enough in sight, or None when twenty tries found no room."""
    height, width = owner.shape
    areas = np.array([_area(shape) for shape in placed])
    for _ in range(20):
        shape = _random_shape(rng, width, height)
        patch = _patch(shape, width, height)
        if patch is None:
            continue
        covered = patch.alpha > 0.5
        if covered.sum() < INSIDE * _area(shape):
            continue
        hidden = owner[patch.rows, patch.columns][covered]
        in_sight = np.bincount(owner[owner >= 0], minlength=len(placed))
        in_sight = in_sight - np.bincount(hidden[hidden >= 0], minlength=len(placed))
        if (in_sight >= VISIBLE * areas).all():
            return shape, patch
    return None


def render_scene(rng: np.random.Generator, width: int, height: int) -> Scene:
    """Paints one image of 1 to 7 shapes (3 % of the images have none).

    Args:
        rng: Source of every random choice.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        The image, its labels and the map of what is on top where.
    """
    canvas = _background(rng, width, height)
    owner = np.full((height, width), -1, np.int16)
    shapes: list[Shape] = []
    boxes: list[np.ndarray] = []
    for _ in range(0 if rng.random() < 0.03 else rng.integers(1, 8)):
        placement = _place(rng, owner, shapes)
        if placement is None:
            break
        shape, patch = placement
        beneath = canvas[patch.rows, patch.columns]
        opacity = patch.alpha[..., None] * rng.uniform(0.85, 1.0)
        beneath += (_fill(rng, shape.class_id, patch, beneath) - beneath) * opacity
        owner[patch.rows, patch.columns][patch.alpha > 0.5] = len(shapes)
        shapes.append(shape)
        boxes.append(patch.box_xyxy_px)
    classes = np.array([shape.class_id for shape in shapes], np.int64)
    return Scene(_camera(rng, canvas), classes, np.reshape(boxes, (-1, 4)), owner)


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


def render(root: Path) -> None:
    """Renders the data set into `root`: images/train, images/val, labels/train, labels/val.

    The images are made in a temporary folder beside `root` and renamed at the end, labels before images, so that a
    kill at any moment leaves each of the four folders whole or absent; a later call adds what is absent. Folders that
    exist are kept as they are. Two processes may render at the same time.

    Raises:
        UserError: the folder cannot be written.
    """
    root = Path(root).absolute()
    prefix = f".{root.name}-rendering-"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for left in root.parent.glob(f"{prefix}*"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent) as temporary:
            for split in SPLITS:
                _write_split(Path(temporary), split)
            for kind in ("labels", "images"):
                for split in SPLITS:
                    _move_into_place(Path(temporary, kind, split.name), root / kind / split.name)
    except OSError as error:
        raise UserError(
            f"Cannot write the embedded data set to {root}: {error.strerror or error}. Make the folder writable, or "
            "copy data/shapes.yaml, set its 'path:' to a folder that is, and pass the copy with --data."
        ) from error
    LOGGER.info(f"Rendered the embedded data set ({', '.join(f'{s.count} {s.name}' for s in SPLITS)}) into {root}")


def main(opt: argparse.Namespace) -> None:
    """Runs the command line."""
    if not opt.samples:
        render(opt.folder)
        return
    opt.folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, seed in SAMPLES:
        _write_image(opt.folder / name, render_scene(generator_of(0, seed), width, height).image)


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m utils.tools.shapes`."""
    parser = argparse.ArgumentParser(description="Render the embedded data set, or the sample images of data/images.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--samples", action="store_true", help="write the sample images instead of the data set")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
