"""Converters to YOLO labels from Pascal VOC, COCO and VisDrone annotations.

Each looks for its format anywhere below a data set's folder and writes `labels` beside `images`. Images are linked
(copied where links are not possible), never moved or changed. What is finished is left alone, so a converter may be
called again; a set's folders appear only when they are whole. A set without images is passed over with a warning.
Lines have six decimals, boxes are clipped to the image. Errors of the disk are for the caller.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from utils.dataloaders.paths import is_hidden, is_image
from utils.errors import UserError
from utils.images import ImageError, image_size
from utils.log import LOGGER, progress

_OTHER_COCO_FILES = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")  # no detection boxes
Box = tuple[int, float, float, float, float]  # class, left, top, right, bottom in pixels


class Converted(NamedTuple):
    """An image of a set with its boxes."""

    name: str  # relative path below the set's folder, with forward slashes
    image: Path  # where it is now
    size_wh: tuple[float, float]
    boxes: list[Box]


def label_text(boxes: Iterable[Box], size_wh: tuple[float, float]) -> str:
    """Writes boxes as YOLO label lines; those that lie outside the image are dropped."""
    width, height = size_wh
    lines = []
    for label, *box_xyxy_px in boxes:
        left, right = (min(max(value, 0.0), width) / width for value in box_xyxy_px[::2])
        top, bottom = (min(max(value, 0.0), height) / height for value in box_xyxy_px[1::2])
        if right > left and bottom > top:
            box_xywh_norm = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in box_xywh_norm)]))
    return "".join(f"{line}\n" for line in lines)


def convert_voc(root: Path, names: Mapping[int, str]) -> int:
    """Converts Pascal VOC trees (Annotations, ImageSets/Main, JPEGImages) below `root`.

    A set `train` of a folder `VOC2007` becomes `images/train2007`, of any other folder `images/train`. Objects marked
    difficult are left out, and so are those of classes that are not in `names`. The corners count from 1 in the
    original sets (folders `VOC2007` and so on, shifted by one pixel as in YOLOv5) and from 0 in everybody else's.

    Returns:
        The number of images converted.

    Raises:
        UserError: an annotation or a listed image that is missing or damaged.
    """
    classes = {name: index for index, name in names.items()}
    done = 0
    for base in [folder.parent for folder in _below(root, "Annotations") if (folder.parent / "JPEGImages").is_dir()]:
        year = re.fullmatch(r"VOC(\d{4})", base.name)
        files = {path.stem: path for path in sorted((base / "JPEGImages").iterdir()) if is_image(path.name)}
        for split in ("train", "val", "test"):
            members = base / "ImageSets" / "Main" / f"{split}.txt"
            listed = members.read_text(encoding="utf-8").splitlines() if members.is_file() else []
            stems = [line.split()[0] for line in listed if line.strip()]
            if stems and stems[0] not in files:
                LOGGER.warning(f"WARNING: {members}: passed over, its images are not in {base / 'JPEGImages'}")
            elif stems:
                images = (_voc_image(base, stem, files, classes, first=1 if year else 0) for stem in stems)
                done += _write_set(root, f"{split}{year[1] if year else ''}", images, len(stems))
    return done


def _below(root: Path, pattern: str) -> list[Path]:
    """Lists what fits a pattern anywhere below a folder, sorted; what is hidden, or in hidden folders, does not."""
    return [path for path in sorted(root.rglob(pattern)) if not any(map(is_hidden, path.relative_to(root).parts))]


def _voc_image(base: Path, stem: str, files: Mapping[str, Path], classes: Mapping[str, int], first: int) -> Converted:
    """Reads one VOC annotation whose pixels count from `first`."""
    path = base / "Annotations" / f"{stem}.xml"
    if stem not in files:
        raise UserError(f"{base}: '{stem}' is listed in ImageSets but has no image in JPEGImages.")

    def corners(node: ElementTree.Element) -> list[float]:
        return [_finite(node.findtext(f"bndbox/{tag}", "")) - first for tag in ("xmin", "ymin", "xmax", "ymax")]

    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content or b"\0" in content:  # or in UTF-16, where it would be hidden
            raise UserError(f"{path}: XML with entities is not accepted.")
        tree = ElementTree.fromstring(content)
        size_wh = (float(tree.findtext("size/width", "")), float(tree.findtext("size/height", "")))
        boxes = [
            (classes[kind], *corners(node))
            for node in tree.iter("object")
            if (kind := node.findtext("name", "").strip()) in classes and int(node.findtext("difficult", "0")) != 1
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not a usable VOC annotation ({error}).") from error
    return Converted(files[stem].name, files[stem], _usable_size(size_wh, files[stem]), boxes)


def convert_coco(root: Path, names: Mapping[int, str]) -> int:
    """Converts COCO detection files (`annotations/instances_train2017.json`, `instance_train.json`, `train.json`).

    The set's name is the file's without `instances_`; its images are looked for in folders of that name. Categories
    are matched to `names` by name; crowds and categories that are not in `names` are left out.

    Returns:
        The number of images converted.

    Raises:
        UserError: a file that is no COCO file, an image that is missing, or no category in common.
    """
    done = 0
    for path in _below(root, "annotations/*.json"):
        match = re.fullmatch(r"(?:instances?_)?(\w[\w.-]*)", path.stem)
        if not match or path.stem.startswith(_OTHER_COCO_FILES) or _is_written(root, match[1]):
            continue
        try:
            content = json.loads(path.read_bytes())
            if not all(isinstance(content[key], list) for key in ("images", "annotations", "categories")):
                raise ValueError("'images', 'annotations' and 'categories' must be lists")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a COCO detection file ({error}).") from error
        folder = _coco_folder(path, match[1], root, content["images"])
        if folder is not None:
            images = _coco_images(path, folder, content, names)
            done += _write_set(root, match[1], images, len(content["images"]))
    return done


def _coco_images(
    path: Path, folder: Path, content: Mapping[str, list[dict[str, Any]]], names: Mapping[int, str]
) -> Iterator[Converted]:
    by_name = {name.lower(): index for index, name in names.items()}
    try:
        classes = {one["id"]: by_name.get(str(one["name"]).lower()) for one in content["categories"]}
        if all(label is None for label in classes.values()):
            raise UserError(f"{path}: none of its categories is among the data set's names.")
        boxes: dict[Any, list[Box]] = {}
        for one in content["annotations"]:
            label = classes.get(one["category_id"])
            if label is not None and not one.get("iscrowd", 0):
                left, top, width, height = map(_finite, one["bbox"])
                boxes.setdefault(one["image_id"], []).append((label, left, top, left + width, top + height))
        for one in content["images"]:
            name = _safe_name(path, one["file_name"])
            size_wh = (float(one["width"]), float(one["height"]))
            yield Converted(name, folder / name, _usable_size(size_wh, folder / name), boxes.get(one["id"], []))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a usable COCO file ({type(error).__name__}: {error}).") from error


def _safe_name(path: Path, name: Any) -> str:
    """Returns an image's name if it stays within its folder."""
    parts = PurePosixPath(str(name)).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in str(name) or ":" in str(name):
        raise UserError(f"{path}: image '{name}' lies outside the data set.")
    return str(name)


def _coco_folder(path: Path, split: str, root: Path, images: list[dict[str, Any]]) -> Path | None:
    """Returns the folder that holds a set's images, judged by the first of them; None when they are not there."""
    try:
        name = _safe_name(path, images[0]["file_name"])
    except (LookupError, TypeError) as error:
        raise UserError(f"{path}: has no images with a 'file_name'.") from error
    base = path.parent.parent
    for folder in (base / split, base / "images" / split, base / "images", base, root / "images" / split, root / split):
        if (folder / name).is_file():
            return folder
    LOGGER.warning(f"WARNING: {path}: passed over, its image {name} is not in {base / split} or {base / 'images'}")
    return None


def convert_visdrone(root: Path, names: Mapping[int, str]) -> int:
    """Converts VisDrone-DET folders (`annotations/*.txt` beside `images`) below `root`.

    Rows are left, top, width, height, score, category, ...; those with score 0 (ignored regions) are left out, and the
    class is the category less one.

    Returns:
        The number of images converted.

    Raises:
        UserError: an annotation or image that is missing or damaged.
    """
    done = 0
    for texts_folder in _below(root, "annotations"):
        base = texts_folder.parent
        if not (base / "images").is_dir() or (base / "labels").exists():
            continue
        images = [path for path in sorted((base / "images").iterdir()) if is_image(path.name)]
        texts = {}
        for image in progress(images, desc=f"Converting {base.name}", unit="img"):
            boxes = _visdrone_boxes(texts_folder / f"{image.stem}.txt", names)
            texts[f"{image.stem}.txt"] = label_text(boxes, _size_of(image))
        _write_labels(base / "labels", texts)
        done += len(images)
    return done


def _visdrone_boxes(path: Path, names: Mapping[int, str]) -> list[Box]:
    boxes = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                left, top, width, height, score, category = (int(value) for value in line.split(",")[:6])
                if score and category - 1 in names:
                    boxes.append((category - 1, left, top, left + width, top + height))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a usable VisDrone annotation ({error}).") from error
    return boxes


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a coordinate is {value}")
    return number


def _usable_size(size_wh: tuple[float, float], image: Path) -> tuple[float, float]:
    """Returns the size that an annotation states, or where that is none, as in some sets, the image's own."""
    return size_wh if all(1 <= side < math.inf for side in size_wh) else _size_of(image)


def _size_of(image: Path) -> tuple[float, float]:
    try:
        info = image_size(image)
    except ImageError as error:
        raise UserError(f"{image}: the image {error}.") from error
    return float(info.width), float(info.height)


def _is_written(root: Path, split: str) -> bool:
    """Says whether a set was converted before."""
    return (root / "images" / split).is_dir() and (root / "labels" / split).is_dir()


def _write_set(root: Path, split: str, images: Iterable[Converted], total: int) -> int:
    """Writes `images/split` and `labels/split`, each at once; the labels come last and mark the set as finished."""
    if _is_written(root, split):
        return 0
    folder = root / "images" / split
    temporary = folder.with_name(f".{split}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    texts = {}
    for one in progress(images, total=total, desc=f"Converting {split}", unit="img"):
        _place(one.image, temporary / one.name)
        texts[str(PurePosixPath(one.name).with_suffix(".txt"))] = label_text(one.boxes, one.size_wh)
    if folder.exists():  # the images stand where they belong already
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, folder)
    _write_labels(root / "labels" / split, texts)
    LOGGER.info(f"Converted {len(texts)} images to {folder}")
    return len(texts)


def _place(source: Path, target: Path) -> None:
    """Makes an image available at `target`: as a second link to the same file, or else as a copy."""
    if not source.is_file():
        raise UserError(f"{source}: the annotations name this image, but it is not there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _write_labels(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes label files into a new folder, which appears when all of them are there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, text in texts.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # what stands there is of a set that was never finished
    os.replace(temporary, folder)
