"""Annotations of other programs -> YOLO labels, and back to COCO and Pascal VOC.

`python -m utils.tools.convert SOURCE --out FOLDER` recognises COCO, Pascal VOC, LabelMe, CVAT, Label Studio, OpenImages
and YOLO from the content of files. A reader yields `Labelled` images of `Shape`s, a writer takes `Sample`s: readers and
writers are rows in tables, and any reader goes with any writer. Polygons stay polygons. What a format cannot hold, and
what is left out, is counted and named. Annotations only name images: what is opened are images found below the
source's folder. XML with a DTD is refused, and with it every entity.

`convert_voc`, `convert_coco` and `convert_visdrone` serve `convert:` of a data set YAML, on its first use. Each looks
for its format anywhere below the data set's folder and writes boxes to `labels` beside `images`. What is finished is
left alone, so one may be called again; a set's folders appear only when they are whole. A set without images is
passed over with a warning.

Images are linked (copied where links are not possible), never moved or changed. Label lines have six decimals, boxes
and polygons are clipped to the image.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote
from xml.parsers import expat

import numpy as np

from utils.cli import CommandParser, number, run_command, with_hint
from utils.dataloaders.config import SPLITS, YAML_SUFFIXES, load_spec, parse_names
from utils.dataloaders.labels import describe_problems, read_label_file
from utils.dataloaders.paths import image_to_label_path, is_hidden, is_image, list_images
from utils.errors import UserError, did_you_mean, explain_resource_errors, shown
from utils.files import read_yaml, temporary_beside, write_yaml
from utils.images import ImageError, image_size
from utils.log import LOGGER, progress
from utils.media.writers import OutputStems

FLAGS = ("crowd", "difficult", "truncated", "occluded")  # what formats say of an object, beside its class
JOINED = "objects in several parts, joined to one: polygons along seams of no width"
FRACTIONS = (1.0, 1.0)  # the "size" of an image whose coordinates are fractions of it
MAX_BYTES = 2 << 30  # of a file that is read as a whole; LVIS's largest has 1.1 GB
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test"}
_OTHER_COCO_FILES = (
    "captions_",
    "person_keypoints_",
    "image_info_",
    "panoptic_",
    "stuff_",
)  # no boxes, or again those of the instances
CLASS_LISTS = ("classes.txt", "obj.names")  # labelImg's and Label Studio's, CVAT's
Row = Sequence[float]  # class, then left, top, right, bottom, or a polygon's x1, y1, x2, y2, x3, y3, ...


class Lost(dict[str, tuple[int, str]]):
    """What was lost or left out: how often, and where first."""

    def add(self, what: str, where: str, times: int = 1) -> None:
        """Counts it."""
        count, first = self.get(what, (0, where))
        if times:
            self[what] = count + times, first

    def lines(self) -> list[str]:
        """Words it, the most frequent first."""
        ordered = sorted(self.items(), key=lambda item: -item[1][0])
        return [f"{count} {what}, such as {first}" for what, (count, first) in ordered]


class Shape(NamedTuple):
    """A labelled object."""

    name: str  # of its class
    xy: list[float]  # a box: left, top, right, bottom; or a polygon of at least three points: x1, y1, x2, y2, ...
    flags: tuple[str, ...] = ()  # of FLAGS
    losses: tuple[str, ...] = ()  # what of it could not be read


class Labelled(NamedTuple):
    """An image as annotations tell of it."""

    image: str | Path  # the name that they give it, or where it is
    size_wh: tuple[float, float] | None  # what the coordinates refer to: pixels or FRACTIONS; None: the image file's
    shapes: list[Shape]
    split: str = ""  # empty where they do not say


class Sample(NamedTuple):
    """An image that is to be written."""

    split: str
    image: Path  # where it is
    size_wh: tuple[int, int]
    rows: list[Row]  # in fractions of the image
    flags: list[tuple[str, ...]]  # of every row


def split_in(text: str) -> str:
    """Returns the split that a name speaks of (instances_train2017), or an empty text."""
    return next((SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in SPLIT_WORDS), "")


class Images:
    """The images below a folder, by name."""

    def __init__(self, root: Path) -> None:
        """Lists them.

        Raises:
            UserError: there are none.
        """
        self.root = root.absolute()
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in map(Path, list_images([root])):
            for name in {path.name.casefold(), path.stem.casefold()}:
                self._by_name[name].append(path)

    def __contains__(self, name: str) -> bool:
        return name.casefold() in self._by_name

    def find(self, name: str, beside: Path, split: str) -> list[Path]:
        """Returns the images that a name means: at best one.

        Args:
            name: a path, of which the end counts, with or without the suffix; it is never opened.
            beside: the annotation; of images alike in name, those nearer to it come first,
            split: and before that those in folders called like its split.
        """
        wanted = [part for part in re.split(r"[/\\]", name.casefold()) if part]
        found = self._by_name.get(wanted[-1], []) if wanted else []
        if len(found) < 2:
            return found

        def score(path: Path) -> tuple[int, bool, int]:
            folders = [part.casefold() for part in path.parts[:-1]]
            tail = os.path.commonprefix([folders[::-1], wanted[-2::-1]])
            of_split = split in map(split_in, path.relative_to(self.root).parts[:-1])
            return len(tail), of_split, len(os.path.commonprefix([path.parts, beside.parts]))

        best = max(map(score, found))
        return [path for path in found if score(path) == best]


class Reading:
    """What readers share.

    Attributes:
        images: the images below the source's folder.
        names: class names in the order in which their format lists them (a set that keeps it).
        ids: class names by number, for label files without a data set YAML.
        sets: of VOC's folders, the split of every stem that their lists name.
        lost: what was lost or left out.
    """

    def __init__(self, lost: Lost) -> None:
        """Starts with nothing; `images` are set for each source."""
        self.images: Images | None = None
        self.names: dict[str, None] = {}
        self.ids: dict[int, str] = {}
        self.sets: dict[Path, dict[str, str]] = {}
        self.lost = lost


# --- geometry


def box_of(xy: Sequence[float]) -> list[float]:
    """Returns left, top, right and bottom of points x1, y1, x2, y2, ..."""
    return [min(xy[::2]), min(xy[1::2]), max(xy[::2]), max(xy[1::2])]


def join_parts(parts: Sequence[list[float]]) -> list[float]:
    """Joins polygons to one: from the first one's first point there and back along seams of no width, so no area."""
    first = list(parts[0])
    for part in parts[1:]:
        first += [*parts[0][:2], *part, *part[:2]]
    return first


def _turn(xy: Sequence[float], centre: tuple[float, float], degrees: float) -> list[float]:
    """Turns points clockwise (the y axis points down) around a centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    offsets = [(x - centre[0], y - centre[1]) for x, y in zip(xy[::2], xy[1::2], strict=True)]
    return [v for x, y in offsets for v in (centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos)]


def _corners(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def _ellipse_box(x: float, y: float, rx: float, ry: float, degrees: float) -> list[float]:
    """Returns the box of an ellipse that is turned: sqrt(rx^2 cos^2 + ry^2 sin^2) is half its width."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return [x - width, y - height, x + width, y + height]


def clip(xy: Sequence[float]) -> list[float]:
    """Clips a box or polygon in fractions to the image (Sutherland and Hodgman 1974); empty where no area is left."""
    if len(xy) == 4:
        result = [min(max(value, 0.0), 1.0) for value in xy]
        left, top, right, bottom = result
    elif min(xy) >= 0 and max(xy) <= 1:
        result = list(xy)
        left, top, right, bottom = box_of(xy)
    else:
        points = list(zip(xy[::2], xy[1::2], strict=True))
        for axis, bound, inwards in ((0, 0.0, 1), (0, 1.0, -1), (1, 0.0, 1), (1, 1.0, -1)):
            kept = []
            for before, point in zip([*points[-1:], *points[:-1]], points, strict=True):
                a, b = inwards * (before[axis] - bound), inwards * (point[axis] - bound)
                if (a < 0) != (b < 0):
                    share = a / (a - b)
                    crossing = [start + share * (end - start) for start, end in zip(before, point, strict=True)]
                    crossing[axis] = bound
                    kept.append(tuple(crossing))
                if b >= 0:
                    kept.append(point)
            points = kept
        result = [value for point in points for value in point]
        left, top, right, bottom = box_of(result) if result else [0.0] * 4
    return result if right > left and bottom > top else []


def label_text(rows: Iterable[Row], size_wh: tuple[float, float]) -> str:
    """Writes boxes and polygons as YOLO label lines, clipped to the image; those outside are dropped.

    Args:
        rows: class, left, top, right, bottom; or class, x1, y1, x2, y2, x3, y3, ...
        size_wh: the image's size, in the unit of the rows.
    """
    lines = []
    for label, *xy in rows:
        xy = clip([value / size_wh[index % 2] for index, value in enumerate(xy)])
        if len(xy) == 4:
            left, top, right, bottom = xy
            xy = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        if xy:
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in xy)]))
    return "".join(f"{line}\n" for line in lines)


# --- readers: content of a file -> labelled images. What they raise on nonsense is explained by `_explain`.


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < 1e12:  # far beyond any image, far below what products of numbers can be
        raise ValueError(f"a coordinate is {value!s:.40}")
    return number


def _polygon(values: Iterable[Any]) -> list[float]:
    xy = [_finite(value) for value in values]
    if len(xy) < 6 or len(xy) % 2:
        raise ValueError(f"a polygon has {len(xy)} coordinates")
    return xy


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r:.60}, not text")
    return value.strip()


def _explain(path: Path, title: str, error: Exception) -> UserError:
    why = str(error) if isinstance(error, (ValueError, csv.Error)) else f"{type(error).__name__}: {error}"
    return UserError(f"{path}: not a usable {title} annotation ({why}).")


_NONSENSE = (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 30} GiB. Split the file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file of bounded size.

    Raises:
        UserError: it cannot be read.
    """
    content = _read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}).") from error


def _read_xml(path: Path) -> ElementTree.Element:
    """Reads XML without a DTD: entities can be declared in one alone."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: Any) -> None:
        raise UserError(f"{path}: XML with a DTD (<!DOCTYPE ...>), which may declare entities, is not accepted.")

    parser.StartDoctypeDeclHandler = refuse
    content = _read_bytes(path)
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:  # an unknown encoding among them
        raise UserError(f"{path}: not XML ({error}).") from error


def _read_header(path: Path) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error}).") from error


def read_coco(path: Path, content: Mapping[str, Any], reading: Reading) -> Iterator[Labelled]:
    """Reads an instances file: boxes, polygons, crowds; see https://cocodataset.org/#format-data."""
    if not all(isinstance(content[key], list) for key in ("images", "annotations", "categories")):
        raise ValueError("'images', 'annotations' and 'categories' must be lists")
    used = {one["category_id"] for one in content["annotations"]}
    categories = sorted(content["categories"], key=lambda one: one["id"])
    groups = {one.get("supercategory") for one in categories if one.get("supercategory") != one["name"]}
    names = {
        one["id"]: _text(one["name"], "a category's name")
        for one in categories
        if one["id"] in used or one["name"] not in groups  # Roboflow lists the set's name as a category, the first
    }
    reading.names |= dict.fromkeys(names.values())
    shapes: dict[Any, list[Shape]] = defaultdict(list)
    for one in content["annotations"]:
        if one["category_id"] in names:
            shapes[one["image_id"]].append(_coco_shape(names[one["category_id"]], one))
        else:
            reading.lost.add("objects of a category that the file does not list", f"{path}: {one['category_id']}")
    for one in content["images"]:
        size_wh = _size(one.get("width"), one.get("height"))
        yield Labelled(_text(one["file_name"], "a file_name"), size_wh, shapes.pop(one["id"], []))
    for image, some in shapes.items():
        reading.lost.add("objects of an image that the file does not list", f"{path}: {image}", len(some))


def _coco_shape(name: str, one: Mapping[str, Any]) -> Shape:
    outline = one.get("segmentation") or []
    losses = ["masks (RLE), of which the boxes are kept"] * isinstance(outline, dict)
    losses += ["keypoints of objects"] * bool(one.get("keypoints"))
    parts = outline if isinstance(outline, list) else []
    parts = [parts] if parts and not isinstance(parts[0], list) else parts  # some write a single part flat
    polygons = [_polygon(part) for part in parts if len(part) >= 6]
    losses += ["parts of outlines with less than three points"] * (len(polygons) < len(parts))
    if len(polygons) > 1:
        losses.append(JOINED)
    if polygons:
        xy = join_parts(polygons)
    else:
        left, top, width, height = map(_finite, one["bbox"])
        xy = [left, top, left + width, top + height]
    return Shape(name, xy, ("crowd",) * bool(one.get("iscrowd", 0)), tuple(losses))


def read_voc(path: Path, content: ElementTree.Element, reading: Reading) -> Iterator[Labelled]:
    """Reads a Pascal VOC annotation, whose image has the file's name; Roboflow's and supervision's polygons too."""
    base = path.parent.parent
    if base not in reading.sets:
        reading.sets[base] = {stem: split for split in SPLITS for stem in _voc_stems(base, split)}
    if reading.sets[base] and path.stem not in reading.sets[base]:
        reading.lost.add("images in none of the lists in ImageSets/Main (train, val, test)", str(path))
        return
    one = voc_image(str(path.with_suffix("")), content, first_pixel(base), reading.lost)
    yield one._replace(split=reading.sets[base].get(path.stem, ""))


def first_pixel(base: Path) -> int:
    """Returns what pixels count from: 1 in the original sets (folders `VOC2007` and so on), 0 in everybody else's."""
    return 1 if re.fullmatch(r"VOC\d{4}", base.name) else 0


def _voc_stems(base: Path, split: str) -> list[str]:
    """Returns the images of a list in ImageSets."""
    members = base / "ImageSets" / "Main" / f"{split}.txt"
    lines = members.read_text(encoding="utf-8").splitlines() if members.is_file() else []
    return [line.split()[0] for line in lines if line.strip()]


def voc_image(image: str, content: ElementTree.Element, first: int, lost: Lost) -> Labelled:
    """Reads a VOC annotation whose pixels count from `first`."""
    shapes = []
    for node in content.iter("object"):
        name = _text(node.findtext("name"), "an object's name")
        flags = tuple(flag for flag in FLAGS if node.findtext(flag, "0").strip().lower() in ("1", "true"))
        outline = node.find("polygon")
        points = {child.tag: _finite(child.text) - first for child in (outline if outline is not None else ())}
        if node.find("bndbox") is None:
            lost.add("objects without a box (bndbox)", f"{image}: {name}")
            continue
        if len(points) >= 6:
            xy = [points[f"{axis}{index}"] for index in range(1, len(points) // 2 + 1) for axis in "xy"]
        else:
            tags = ("xmin", "ymin", "xmax", "ymax")
            xy = [_finite(node.findtext(f"bndbox/{tag}", "")) - first for tag in tags]
        shapes.append(Shape(name, xy, flags, ("parts of objects",) * (node.find("part") is not None)))
    return Labelled(image, _size(content.findtext("size/width"), content.findtext("size/height")), shapes)


def _size(width: Any, height: Any) -> tuple[float, float] | None:
    """Returns a size as stated, or None where there is none, as in some sets."""
    size_wh = (float(width or 0), float(height or 0))
    return size_wh if all(1 <= side < math.inf for side in size_wh) else None


def read_labelme(path: Path, content: Mapping[str, Any], reading: Reading) -> Iterator[Labelled]:
    """Reads LabelMe's or X-AnyLabeling's file of an image; shapes of one label and group are parts of one object."""
    groups: dict[Any, list[Shape]] = {}
    for index, one in enumerate(content["shapes"]):
        name, kind = _text(one["label"], "a label"), one.get("shape_type") or "polygon"
        xy = [_finite(value) for point in one["points"] for value in point]
        losses = []
        if {len(point) for point in one["points"]} != {2}:
            raise ValueError("the points must have two coordinates each")
        if kind == "circle":
            (x, y), radius = xy[:2], math.dist(xy[:2], xy[2:4])
            xy, losses = [x - radius, y - radius, x + radius, y + radius], ["ellipses, of which the boxes are kept"]
        elif kind in ("rectangle", "mask"):
            xy, losses = box_of(xy), ["masks, of which the boxes are kept"] * (kind == "mask")
        elif kind not in ("polygon", "rotation") or len(xy) < 6:
            reading.lost.add(f"shapes of the kind '{kind}'", f"{path}: {name}")
            continue
        said = {**(one.get("flags") or {}), **one}
        shape = Shape(name, xy, tuple(flag for flag in FLAGS if said.get(flag) is True), tuple(losses))
        group = one.get("group_id")
        groups.setdefault((name, index if group is None else str(group)), []).append(shape)
    shapes = []
    for some in groups.values():
        polygons = [shape.xy for shape in some if len(shape.xy) >= 6]
        whole = some[0]
        if len(some) > 1:
            xy = join_parts(polygons) if len(polygons) == len(some) else box_of(sum((one.xy for one in some), []))
            whole = whole._replace(xy=xy, losses=(*whole.losses, JOINED))
        shapes.append(whole)
    name = _text(content["imagePath"], "imagePath")
    moved = re.split(r"[/\\]", name)[-1] not in reading.images  # or renamed, with the annotation
    image = str(path.with_suffix("")) if moved else name
    yield Labelled(image, _size(content.get("imageWidth"), content.get("imageHeight")), shapes)


def read_cvat(path: Path, content: ElementTree.Element, reading: Reading) -> Iterator[Labelled]:
    """Reads "CVAT for images 1.1"; see https://docs.cvat.ai/docs/other/xml_format."""
    if content.find("track") is not None:
        raise UserError(f"{path}: this is 'CVAT for video'. Export the task as 'CVAT for images 1.1'.")
    reading.names |= dict.fromkeys(
        node.text.strip() for node in content.findall("meta//labels/label/name") if (node.text or "").strip()
    )
    for image in content.iter("image"):
        shapes = []
        for node in image:
            get, losses = node.attrib, ()
            name, degrees = _text(get.get("label"), "a label"), _finite(get.get("rotation", 0))
            if node.tag == "box":
                left, top, right, bottom = xy = [_finite(get[key]) for key in ("xtl", "ytl", "xbr", "ybr")]
                if degrees:
                    xy = _turn(_corners(xy), ((left + right) / 2, (top + bottom) / 2), degrees)
            elif node.tag == "polygon":
                xy = _polygon(value for point in get["points"].split(";") for value in point.split(","))
            elif node.tag == "ellipse":
                losses = ("ellipses, of which the boxes are kept",)
                xy = _ellipse_box(*(_finite(get[key]) for key in ("cx", "cy", "rx", "ry")), degrees)
            elif node.tag == "mask":
                left, top, width, height = (_finite(get[key]) for key in ("left", "top", "width", "height"))
                xy, losses = [left, top, left + width, top + height], ("masks (RLE), of which the boxes are kept",)
            else:
                reading.lost.add(f"shapes of the kind '{node.tag}'", f"{path}: {get.get('label')}")
                continue
            said = {one.get("name"): (one.text or "").strip().lower() for one in node.findall("attribute")} | get
            flags = tuple(flag for flag in FLAGS if said.get(flag) in ("1", "true", "yes"))
            shapes.append(Shape(name, xy, flags, losses))
        split = SPLIT_WORDS.get(image.get("subset", "").lower(), "")
        yield Labelled(image.attrib["name"], _size(image.get("width"), image.get("height")), shapes, split)


def read_labelstudio(path: Path, content: list[Mapping[str, Any]], reading: Reading) -> Iterator[Labelled]:
    """Reads Label Studio's JSON (not JSON-MIN); coordinates are percent; see https://labelstud.io/guide/task_format."""
    for task in content:
        done = [one for one in task["annotations"] if not one.get("was_cancelled")]
        texts = [unquote(text).rpartition("?d=")[2] for text in task["data"].values() if isinstance(text, str)]
        image = next((text for text in (text.partition("?")[0] for text in texts) if is_image(text)), None)
        if image is None or not done:
            what = "tasks without an image" if image is None else "tasks without annotations"
            reading.lost.add(what, f"{path}: task {task.get('id')}")
            continue
        if len(done) > 1:
            what = "tasks annotated more than once, of which the ground truth or else the first is taken"
            reading.lost.add(what, f"{path}: task {task.get('id')}")
        name = PurePosixPath(image).name
        if name not in reading.images:
            image = re.sub(r"^[0-9a-f]{8}-", "", name)  # what an upload puts before the image's own name
        regions = next((one for one in done if one.get("ground_truth")), done[0])["result"]
        sized = next((one for one in regions if "original_width" in one), None)
        size_wh = _size(sized["original_width"], sized["original_height"]) if sized else None
        shapes = []
        for region in regions:
            kind, value = region["type"], region.get("value")
            names = value.get(kind) if isinstance(value, dict) else None
            xy, losses = _labelstudio_xy(value, size_wh) if names else ([], ())
            if not xy or region.get("image_rotation"):
                reading.lost.add(f"regions of the kind '{kind}'", f"{path}: task {task.get('id')}")
                continue
            shapes += [Shape(_text(one, "a label"), xy, (), losses) for one in names]
        yield Labelled(image, size_wh or FRACTIONS, shapes)


def _labelstudio_xy(value: Mapping[str, Any], size_wh: tuple[float, float] | None) -> tuple[list[float], tuple]:
    """Returns a region in pixels (fractions where no size is stated), and what is lost; empty for other regions."""
    sx, sy = (side / 100 for side in size_wh or FRACTIONS)
    degrees = _finite(value.get("rotation") or 0)
    if degrees and size_wh is None:
        raise ValueError("a region is rotated, and its original_width is missing")
    if "points" in value:
        xy = [
            _finite(number) * scale for point in value["points"] for number, scale in zip(point, (sx, sy), strict=True)
        ]
        return (xy if len(xy) >= 6 else []), ()
    if "radiusX" in value:
        x, y, rx, ry = (_finite(value[key]) for key in ("x", "y", "radiusX", "radiusY"))
        return _ellipse_box(x * sx, y * sy, rx * sx, ry * sy, degrees), ("ellipses, of which the boxes are kept",)
    if not {"x", "y", "width", "height"} <= value.keys():
        return [], ()
    x, y, width, height = (_finite(value[key]) for key in ("x", "y", "width", "height"))
    box = [x * sx, y * sy, (x + width) * sx, (y + height) * sy]
    return (_turn(_corners(box), (box[0], box[1]), degrees) if degrees else box), ()


BOX_COLUMNS = {"ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"}
FLAG_COLUMNS = {"IsGroupOf": "crowd", "IsTruncated": "truncated", "IsOccluded": "occluded"}


def read_openimages(path: Path, header: list[str], reading: Reading) -> Iterator[Labelled]:
    """Reads `*-annotations-bbox.csv` of Open Images, of the images that are there, with the class names beside it.

    See https://storage.googleapis.com/openimages/web/download_v7.html.
    """
    if not set(header) >= BOX_COLUMNS:
        return  # the class names themselves
    names: dict[str, str] = {}
    for other in sorted(path.parent.glob("*.csv")):
        if _is_openimages(head := _read_header(other)) and not set(head) >= BOX_COLUMNS:
            with open(other, encoding="utf-8-sig", newline="") as file:
                names |= {row[0]: row[1] for row in csv.reader(file) if len(row) == 2}
    shapes: dict[str, list[Shape]] = defaultdict(list)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if row["ImageID"] not in reading.images:
                reading.lost.add("objects of an image that is not there", row["ImageID"])
                continue
            flags = tuple(flag for column, flag in FLAG_COLUMNS.items() if row.get(column) == "1")
            xy = [_finite(row[column]) for column in ("XMin", "YMin", "XMax", "YMax")]
            shapes[row["ImageID"]].append(Shape(names.get(row["LabelName"], row["LabelName"]), xy, flags))
    for image, some in shapes.items():
        yield Labelled(image, FRACTIONS, some)


def _is_openimages(header: Any) -> bool:
    """Recognises the boxes, and the class names: two columns, the first a code such as /m/01g317."""
    names = len(header) == 2 and (header == ["LabelName", "DisplayName"] or re.match(r"/[mgt]/", header[0]))
    return bool(names) or set(header) >= BOX_COLUMNS


def read_yolo(path: Path, content: bytes, reading: Reading) -> Iterator[Labelled]:
    """Reads a label file without a data set YAML: its image has its name, its classes are in `classes.txt`."""
    if not reading.ids:
        raise UserError(f"{path}: there is no {' or '.join(CLASS_LISTS)} with the names of its classes. Give --names.")
    yield Labelled(str(path.with_suffix("")), FRACTIONS, _yolo_shapes(path, reading, reading.ids, None))


def _yolo_shapes(path: Path, reading: Reading, names: Mapping[int, str], kpt_shape: Any) -> list[Shape]:
    parsed = read_label_file(path, kpt_shape)
    if parsed is None:
        reading.lost.add("images without a label file, which are backgrounds", str(path))
        return []
    if parsed.problems:
        raise UserError(describe_problems(parsed.problems))
    reading.lost.add("label lines that repeat another", str(path), parsed.duplicates)
    unknown = [int(label) for label in parsed.rows[:, 0] if label not in names]
    if unknown:
        raise UserError(f"{path}: class {unknown[0]} has no name; there are {len(names)}, 0 to {len(names) - 1}.")
    losses = ("keypoints of objects",) * bool(kpt_shape and kpt_shape[0])
    shapes = []
    for (label, x, y, w, h), polygon in zip(parsed.rows.tolist(), parsed.polygons, strict=True):
        xy = polygon.ravel().tolist() or [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        shapes.append(Shape(names[int(label)], xy, (), losses))
    return shapes


def read_yolo_yaml(path: Path, reading: Reading) -> Iterator[Labelled]:
    """Reads the splits of a data set YAML."""
    spec = load_spec(path, need=(), download=False)
    need = [split for split in SPLITS if getattr(spec, split)]
    spec = load_spec(path, need=need, download=False)
    reading.names |= dict.fromkeys(spec.names.values())
    for split in need:
        for image in progress(list_images(getattr(spec, split)), desc=f"Reading {split}", unit="img"):
            label = Path(image_to_label_path(image))
            yield Labelled(Path(image), FRACTIONS, _yolo_shapes(label, reading, spec.names, spec.kpt_shape), split)


def _is_label_text(content: bytes) -> bool:
    """Says whether the first line that is not blank is of numbers, as many as labels have; or there is none."""
    tokens = next((line.split() for line in content[: 1 << 20].splitlines() if line.strip()), [])
    try:
        return not [float(token) for token in tokens] or len(tokens) >= 5 and len(tokens) % 2 == 1
    except ValueError:
        return False


class Format(NamedTuple):
    """How a format is recognised and read."""

    title: str
    suffix: str
    fits: Callable[[Any], bool]  # whether content is of this format
    read: Callable[[Path, Any, Reading], Iterator[Labelled]]


FORMATS = {
    "coco": Format(
        "COCO",
        ".json",
        lambda c: isinstance(c, dict) and {"images", "annotations", "categories"} <= c.keys(),
        read_coco,
    ),
    "labelme": Format(
        "LabelMe", ".json", lambda c: isinstance(c, dict) and {"shapes", "imagePath"} <= c.keys(), read_labelme
    ),
    "labelstudio": Format(
        "Label Studio",
        ".json",
        lambda c: isinstance(c, list) and bool(c) and isinstance(c[0], dict) and {"data", "annotations"} <= c[0].keys(),
        read_labelstudio,
    ),
    "voc": Format("Pascal VOC", ".xml", lambda c: c.tag == "annotation", read_voc),
    "cvat": Format("CVAT", ".xml", lambda c: c.tag == "annotations", read_cvat),
    "openimages": Format("Open Images", ".csv", _is_openimages, read_openimages),
    "yolo": Format("YOLO", ".txt", _is_label_text, read_yolo),
}
ONE_IMAGE_EACH = ("voc", "labelme", "yolo")  # a file of them is about one image
PARSERS = {".json": read_json, ".xml": _read_xml, ".csv": _read_header, ".txt": _read_bytes}


def read_source(
    source: Path, wanted: str | None, reading: Reading, image_dir: Path | None
) -> tuple[str, list[tuple[Path, Labelled]]]:
    """Reads the annotations of a file or folder; returns their format and, with the file of each, the images.

    Raises:
        UserError: nothing there is of a known format (or of `wanted`), or of several; a file makes no sense.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder.")
    yaml = _data_yaml(source) if wanted in (None, "yolo") else None
    if yaml:
        return "yolo", [(yaml, one) for one in read_yolo_yaml(yaml, reading)]
    with with_hint(lambda: "--image-dir names another folder."):
        reading.images = Images(image_dir or folder_of_images(source))
    reading.ids = reading.ids or _class_list(source if source.is_dir() else source.parent)
    found: dict[str, list[tuple[Path, Labelled]]] = {}
    suffixes = {form.suffix for kind, form in FORMATS.items() if wanted in (None, kind)}
    files = _below(source, "*") if source.is_dir() else [source]
    files = [path for path in files if path.suffix.lower() in suffixes and path.name not in CLASS_LISTS]
    for path in progress(files, desc=f"Reading {source}", unit="file"):
        suffix = path.suffix.lower()
        if suffix == ".txt" and path.stem not in reading.images:
            continue  # a list of images, a text to be read
        if suffix == ".json" and path != source and path.name.startswith(_OTHER_COCO_FILES):
            reading.lost.add("COCO files beside the instances", str(path))
            continue
        content = PARSERS[suffix](path)
        kinds = [kind for kind, one in FORMATS.items() if one.suffix == suffix and wanted in (None, kind)]
        kind = next((kind for kind in kinds if FORMATS[kind].fits(content)), None)
        if kind is None:
            reading.lost.add("files that are no annotations of a known format", str(path))
            continue
        try:
            found.setdefault(kind, []).extend((path, one) for one in FORMATS[kind].read(path, content, reading))
        except _NONSENSE as error:
            raise _explain(path, FORMATS[kind].title, error) from error
    if len(found) > 1:
        there = ", ".join(f"{kind} (such as {some[0][0]})" for kind, some in found.items() if some)
        raise UserError(f"{source}: has annotations of several formats, {there}. Choose one with --from.")
    if not found:
        what = f"annotations of {wanted or ', '.join(FORMATS)} are expected"
        raise UserError(f"{source}: {what}, none of its {len(files)} {', '.join(sorted(suffixes))} files is.")
    return next(iter(found.items()))


def folder_of_images(source: Path) -> Path:
    """Returns where the images of annotations are looked for: with them, or one up from folders for annotations."""
    folder = source if source.is_dir() else source.parent
    return folder.absolute().parent if folder.name.lower() in ("annotations", "labels") else folder


def _data_yaml(source: Path) -> Path | None:
    """Returns the data set YAML that a source is, or the only one that lies in it."""
    if source.is_file():
        return source if source.suffix.lower() in YAML_SUFFIXES else None
    files = [path for path in sorted(source.iterdir()) if path.suffix.lower() in YAML_SUFFIXES and path.is_file()]
    content = {path: read_yaml(path) for path in files}
    fitting = [path for path, one in content.items() if isinstance(one, dict) and "names" in one and {*SPLITS} & {*one}]
    if len(fitting) > 1:
        raise UserError(f"{source}: has several data set YAMLs, {', '.join(map(str, fitting))}. Give one of them.")
    return fitting[0] if fitting else None


def _class_list(folder: Path) -> dict[int, str]:
    """Returns the names that a folder's list of classes gives."""
    lists = {}
    for path in (path for name in CLASS_LISTS for path in _below(folder, name)):
        text = _read_bytes(path).decode("utf-8-sig", errors="replace")
        lists[path] = [line.strip() for line in text.splitlines() if line.strip()]
    if any(names != next(iter(lists.values())) for names in lists.values()):
        raise UserError(f"{', '.join(map(str, lists))}: differ in their class names. Give --names.")
    return parse_names(names, None, str(path)) if (names := next(iter(lists.values()), None)) else {}


# --- from what was read to what is written


def gather(options: argparse.Namespace, lost: Lost) -> tuple[list[Sample], dict[int, str], str]:
    """Reads all sources; returns the images to write, the class names by number, and the formats that were read."""
    asked = _names_asked(options.names)
    reading = Reading(lost)
    found: dict[Path, tuple[str, list[Labelled]]] = {}
    kinds = set()
    for text in options.source:
        given, _, rest = text.partition("=")
        given, source = (given, Path(rest)) if given in SPLITS and rest else ("", Path(text))
        reading.ids = dict(enumerate(asked))
        kind, labelled = read_source(source, options.source_format, reading, options.image_dir)
        kinds.add(kind)
        for path, one in labelled:
            split = given or one.split or _split_of(path, source, kind in ONE_IMAGE_EACH)
            images = [one.image] if isinstance(one.image, Path) else reading.images.find(one.image, path, split)
            if len(images) != 1:
                why = "of whose name there are several" if images else f"that are not below {reading.images.root}"
                lost.add(f"images {why}", f"{path}: {shown(str(one.image))}")
                continue
            first_split, parts = found.setdefault(images[0], (split, []))
            if split == first_split:
                parts.append(one._replace(shapes=_kept(images[0], one.shapes, options.leave_out, lost)))
            else:
                lost.add("images that are in another split already", f"{images[0]}: {split}")
    if not found:
        raise UserError(f"no image is left to convert: {'; '.join(lost.lines())}. --image-dir names their folder.")
    used = {shape.name for _, parts in found.values() for one in parts for shape in one.shapes}
    ids, names = _class_ids([*reading.names, *sorted(used - {*reading.names})], asked, options)
    if not names:
        told = "; ".join(["the annotations have no objects of any class that is wanted", *lost.lines()])
        raise UserError(f"{told}.")
    samples = [
        sample
        for image in progress(sorted(found), desc="Checking images", unit="img")
        if (sample := _sample(image, *found[image], ids, lost))
    ]
    return samples, names, " and ".join(sorted(kinds))


def _split_of(path: Path, source: Path, of_one_image: bool) -> str:
    """Returns the split that an annotation, or else a folder that it lies in, is called after; without one, train.

    The name of an annotation of one image says nothing: test_1.xml.
    """
    folders = path.relative_to(source).parts[:-1] if source.is_dir() else ()
    parts = [
        *([] if of_one_image else [path.stem]),
        *reversed(folders),
        (source if source.is_dir() else path.parent).name,
    ]
    return next(filter(None, map(split_in, parts)), "train")


def _kept(image: Path, shapes: Iterable[Shape], leave_out: Iterable[str], lost: Lost) -> list[Shape]:
    """Returns the shapes without the flags that are not wanted."""
    kept = []
    for shape in shapes:
        unwanted = [flag for flag in shape.flags if flag in leave_out]
        if unwanted:
            lost.add(f"objects marked '{unwanted[0]}'", f"{image}: {shape.name}")
        else:
            kept.append(shape)
    return kept


def _names_asked(text: str | None) -> list[str]:
    """Reads `--names`: a data set YAML, or names with commas between them."""
    if not text:
        return []
    if text.lower().endswith(YAML_SUFFIXES):
        return [*load_spec(text, need=(), download=False).names.values()]
    return [*parse_names([name.strip() for name in text.split(",")], None, "--names").values()]


def _class_ids(
    there: list[str], asked: list[str], options: argparse.Namespace
) -> tuple[dict[str, int], dict[int, str]]:
    """Applies `--classes`, `--drop` and `--names`.

    Args:
        there: the annotations' class names, in their order.
        asked: the names wanted, in their order; empty: all.
        options: of the command.

    Returns:
        The number of each of the annotations' classes that is wanted, and the name of each number.
    """
    pairs = [pair.partition("=") for pair in options.classes.split(",") if pair.strip()]
    renamed = {old.strip(): new.strip() for old, _, new in pairs}
    dropped = [name.strip() for name in options.drop.split(",") if name.strip()]
    for option, names in (("--classes", renamed), ("--drop", dropped)):
        for name in names:
            if name not in there:
                raise UserError(
                    f"{option}: the annotations have no class '{name}'.{did_you_mean(name, there)} "
                    f"There are {', '.join(there)[:500]}."
                )
    if not all(renamed.values()):
        raise UserError(f"--classes '{options.classes}': old=new,old=new,... is expected.")
    new_names = {name: renamed.get(name, name) for name in there if name not in dropped}
    final = list(dict.fromkeys(asked or new_names.values()))
    unasked = [name for name in new_names.values() if name not in final]
    if unasked:
        raise UserError(f"--names: has no '{unasked[0]}', which the annotations have. Name it, or use --drop.")
    names = parse_names(final, None, "the annotations") if final else {}
    return {name: final.index(new) for name, new in new_names.items()}, names


def _sample(image: Path, split: str, parts: Sequence[Labelled], ids: Mapping[str, int], lost: Lost) -> Sample | None:
    """Brings an image's shapes into it, in fractions; None for an image that cannot be read."""
    try:
        info = image_size(image)
    except ImageError as error:
        lost.add("images that cannot be read", f"{image}: it {error}")
        return None
    rows, flags = [], []
    for one in parts:
        width, height = one.size_wh or info[:2]
        if one.size_wh not in (None, FRACTIONS) and abs(math.log(width * info.height / height / info.width)) > 0.02:
            what = "images of other proportions than their annotations say (turned?), whose labels may be wrong"
            lost.add(what, f"{image}: {width:g} x {height:g}, not {info.width} x {info.height}")
        for shape in one.shapes:
            if shape.name not in ids:
                lost.add("objects of dropped classes", f"{image}: {shape.name}")
                continue
            xy = [value / (height if index % 2 else width) for index, value in enumerate(shape.xy)]
            inside = clip(xy)
            if not inside:
                lost.add("objects without area in the image", f"{image}: {shape.name}")
                continue
            if min(xy) < -1e-6 or max(xy) > 1 + 1e-6:
                lost.add("objects that reach beyond the image, cut off at its border", f"{image}: {shape.name}")
            for loss in shape.losses:
                lost.add(loss, f"{image}: {shape.name}")
            rows.append((ids[shape.name], *inside))
            flags.append(shape.flags)
    return Sample(split, image, info[:2], rows, flags)


# --- writers: each writes the annotations of named samples into a folder


Named = dict[str, list[tuple[str, Sample]]]  # split -> file names with their samples


def _named(samples: Sequence[Sample], in_one_folder: bool) -> Named:
    """Gives the samples of each split, or of all, file names that differ, also without their suffixes."""
    groups = {split: [one for one in samples if one.split == split] for split in SPLITS}
    stems = {
        split: OutputStems(str(one.image) for one in (samples if in_one_folder else groups[split])) for split in SPLITS
    }
    return {
        split: [(f"{stems[split][str(one.image)]}{one.image.suffix}", one) for one in some]
        for split, some in groups.items()
        if some
    }


def write_yolo(folder: Path, samples: Named, names: Mapping[int, str], listed: bool) -> None:
    """Writes labels and `data.yaml`; labels of images that stay where they are go where training looks for them."""
    splits = {split: f"{split}.txt" if listed else f"images/{split}" for split in samples}
    texts: dict[Path, str] = {}
    for split, named in samples.items():
        for name, one in named:
            path = folder / "labels" / split / f"{Path(name).stem}.txt"
            path = Path(image_to_label_path(one.image.absolute())) if listed else path
            text = label_text(one.rows, FRACTIONS)
            if path in texts or path.exists() and path.read_bytes() != text.encode():
                why = "is the label file of two images" if path in texts else "exists, and would be overwritten"
                raise UserError(f"--images list: {path} {why}. Use --images link.")
            texts[path] = text
        if listed:
            lines = "".join(f"{one.image.absolute()}\n" for _, one in named)
            (folder / splits[split]).write_text(lines, encoding="utf-8", errors="surrogateescape")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    write_yaml(folder / "data.yaml", {"path": ".", **splits, "names": dict(names)})


def write_coco(folder: Path, samples: Named, names: Mapping[int, str], listed: bool) -> None:
    """Writes `annotations/instances_*.json`: categories have the classes' numbers, images those in their names."""
    (folder / "annotations").mkdir()
    for split, named in samples.items():
        stems = [Path(name).stem for name, _ in named]
        numbers = [int(stem) if stem.isdecimal() and len(stem) < 19 else -1 for stem in stems]
        if min(numbers) < 0 or len({*numbers}) < len(numbers):
            numbers = range(1, len(named) + 1)
        images, annotations = [], []
        for image, (name, one) in zip(numbers, named, strict=True):
            width, height = one.size_wh
            file_name = one.image.absolute().as_posix() if listed else name
            images.append({"id": image, "file_name": file_name, "width": width, "height": height})
            for (label, *fractions), flags in zip(one.rows, one.flags, strict=True):
                xy = [round(value * one.size_wh[index % 2], 6) for index, value in enumerate(fractions)]
                left, top, right, bottom = box_of(xy)
                area = (right - left) * (bottom - top)
                if len(xy) > 4:
                    area = abs(sum(a * d - b * c for a, b, c, d in zip(*_edges(xy), strict=True))) / 2
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": [left, top, round(right - left, 6), round(bottom - top, 6)],
                        "area": round(area, 6),
                        "segmentation": [xy] if len(xy) > 4 else [],
                        "iscrowd": int("crowd" in flags),
                    }
                )
        categories = [{"id": label, "name": name} for label, name in names.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        with open(folder / "annotations" / f"instances_{split}.json", "w", encoding="utf-8") as file:
            json.dump(content, file)


def _edges(xy: Sequence[float]) -> tuple[Sequence[float], ...]:
    """Returns x1, y1, x2 and y2 of a polygon's edges."""
    return xy[::2], xy[1::2], [*xy[2::2], xy[0]], [*xy[3::2], xy[1]]


def write_voc(folder: Path, samples: Named, names: Mapping[int, str], listed: bool) -> None:
    """Writes `Annotations` and `ImageSets/Main`; boxes in whole pixels, at least one wide, polygons as Roboflow's."""
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split, named in samples.items():
        for name, one in named:
            root = ElementTree.Element("annotation")
            _add(root, {"folder": "JPEGImages", "filename": name, **({"path": str(one.image)} if listed else {})})
            _add(ElementTree.SubElement(root, "size"), dict(zip(("width", "height"), one.size_wh, strict=True)))
            _add(root, {"segmented": 0})
            for (label, *fractions), flags in zip(one.rows, one.flags, strict=True):
                node = ElementTree.SubElement(root, "object")
                marks = {flag: int(flag in flags) for flag in ("truncated", "difficult", "occluded")}
                _add(node, {"name": names[label], "pose": "Unspecified", **marks})
                xy = [value * one.size_wh[index % 2] for index, value in enumerate(fractions)]
                corners = [math.floor(value + 0.5) for value in box_of(xy)]
                for low, high in ((0, 2), (1, 3)):
                    if corners[low] == corners[high]:
                        corners[low] = math.floor(box_of(xy)[low])
                        corners[high] = corners[low] + 1
                tags = ("xmin", "ymin", "xmax", "ymax")
                _add(ElementTree.SubElement(node, "bndbox"), dict(zip(tags, corners, strict=True)))
                if len(xy) > 4:
                    points = {f"{'xy'[index % 2]}{index // 2 + 1}": round(v, 6) for index, v in enumerate(xy)}
                    _add(ElementTree.SubElement(node, "polygon"), points)
            ElementTree.indent(root)
            text = ElementTree.tostring(root, encoding="unicode")
            target = folder / "Annotations" / f"{Path(name).stem}.xml"
            target.write_text(f"{text}\n", encoding="utf-8", errors="surrogateescape")
        members = "".join(f"{Path(name).stem}\n" for name, _ in named)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(members, encoding="utf-8", errors="surrogateescape")


def _add(node: ElementTree.Element, texts: Mapping[str, Any]) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(node, tag).text = str(text)


class Target(NamedTuple):
    """How a format is written."""

    write: Callable[[Path, Named, Mapping[int, str], bool], None]
    images: str  # where a split's images go
    holds: tuple[str, ...]  # of FLAGS


TARGETS = {
    "yolo": Target(write_yolo, "images/{}", ()),
    "coco": Target(write_coco, "images/{}", ("crowd",)),
    "voc": Target(write_voc, "JPEGImages", ("difficult", "truncated", "occluded")),
}


# --- `convert:` of a data set YAML

Box = tuple[int, float, float, float, float]  # class, left, top, right, bottom in pixels


class Converted(NamedTuple):
    """An image of a set with its boxes."""

    name: str  # relative path below the set's folder, with forward slashes
    image: Path  # where it is now
    size_wh: tuple[float, float]
    boxes: list[Box]


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
        year = base.name[3:] if first_pixel(base) else ""
        files = {path.stem: path for path in sorted((base / "JPEGImages").iterdir()) if is_image(path.name)}
        for split in ("train", "val", "test"):
            stems = _voc_stems(base, split)
            if stems and stems[0] not in files:
                LOGGER.warning(
                    f"WARNING: {base}: {split}.txt is passed over, its images are not in {base / 'JPEGImages'}"
                )
            elif stems:
                images = (_voc_image(base, stem, files, classes) for stem in stems)
                done += _write_set(root, f"{split}{year}", images, len(stems))
    return done


def _below(root: Path, pattern: str) -> list[Path]:
    """Lists what fits a pattern anywhere below a folder, sorted; what is hidden, or in hidden folders, does not."""
    return [path for path in sorted(root.rglob(pattern)) if not any(map(is_hidden, path.relative_to(root).parts))]


def _voc_image(base: Path, stem: str, files: Mapping[str, Path], classes: Mapping[str, int]) -> Converted:
    """Reads one VOC annotation."""
    path = base / "Annotations" / f"{stem}.xml"
    if stem not in files:
        raise UserError(f"{base}: '{stem}' is listed in ImageSets but has no image in JPEGImages.")
    content = _read_xml(path)
    try:
        one = voc_image(stem, content, first_pixel(base), Lost())
    except _NONSENSE as error:
        raise _explain(path, "VOC", error) from error
    shapes = [shape for shape in one.shapes if shape.name in classes and "difficult" not in shape.flags]
    boxes = [(classes[shape.name], *box_of(shape.xy)) for shape in shapes]
    return Converted(files[stem].name, files[stem], one.size_wh or _size_of(files[stem]), boxes)


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
            images = list(read_coco(path, read_json(path), Reading(Lost())))
        except _NONSENSE as error:
            raise _explain(path, "COCO", error) from error
        folder = _coco_folder(path, match[1], root, [one.image for one in images])
        if folder is not None:
            done += _write_set(root, match[1], _coco_images(path, folder, images, names), len(images))
    return done


def _coco_images(path: Path, folder: Path, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[Converted]:
    classes = {name.lower(): index for index, name in names.items()}
    found = {shape.name.lower() for one in images for shape in one.shapes}
    if found and found.isdisjoint(classes):
        raise UserError(f"{path}: none of its categories is among the data set's names.")
    for one in images:
        name = _safe_name(path, one.image)
        shapes = [shape for shape in one.shapes if shape.name.lower() in classes and "crowd" not in shape.flags]
        boxes = [(classes[shape.name.lower()], *box_of(shape.xy)) for shape in shapes]
        yield Converted(name, folder / name, one.size_wh or _size_of(folder / name), boxes)


def _safe_name(path: Path, name: Any) -> str:
    """Returns an image's name if it stays within its folder."""
    parts = PurePosixPath(str(name)).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in str(name) or ":" in str(name):
        raise UserError(f"{path}: image '{name}' lies outside the data set.")
    return str(name)


def _coco_folder(path: Path, split: str, root: Path, images: Sequence[str]) -> Path | None:
    """Returns the folder that holds a set's images, judged by the first of them; None when they are not there."""
    if not images:
        raise UserError(f"{path}: has no images.")
    name = _safe_name(path, images[0])
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


def _place(source: Path, target: Path, copy: bool = False) -> None:
    """Makes an image available at `target`: as a second link to the same file, or else as a copy."""
    if not source.is_file():
        raise UserError(f"{source}: the annotations name this image, but it is not there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if copy:
            raise OSError
        os.link(os.path.realpath(source), target)
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


# --- the command


def main(options: argparse.Namespace) -> None:
    """Converts as the parsed `options` say; `--out` appears when it is whole.

    Raises:
        UserError: a source, an option or the folder to write to cannot be used.
    """
    out, target, lost = options.out, TARGETS[options.to], Lost()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists already. Choose another folder.")
    if options.to == "voc" and first_pixel(out):
        raise UserError(f"--out {out}: in folders of such a name pixels count from 1. Choose another name.")
    temporary = temporary_beside(out.absolute())
    try:
        with explain_resource_errors({}):
            samples, names, kinds = gather(options, lost)
            if options.val:
                samples = _set_aside(samples, options.val)
            named = _named(samples, "{}" not in target.images)
            temporary.mkdir(parents=True)
            placed = [(split, name, one) for split, some in named.items() for name, one in some]
            for split, name, one in progress(placed, desc=f"Writing {out}", unit="img"):
                if options.images != "list":
                    _place(one.image, temporary / target.images.format(split) / name, options.images == "copy")
            target.write(temporary, named, names, options.images == "list")
            if out.exists():
                out.rmdir()
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for flag in {*FLAGS} - {*target.holds}:
        for one in samples:
            lost.add(f"marks '{flag}' of objects", str(one.image), sum(flag in flags for flags in one.flags))
    _report(options, named, names, kinds, lost)


def _set_aside(samples: list[Sample], share: float) -> list[Sample]:
    """Makes a share of the training images, chosen at random but always the same, the validation images."""
    if {one.split for one in samples} != {"train"} or len(samples) < 2:
        raise UserError("--val: sets training images aside where there are no others; here there are.")
    count = min(max(round(share * len(samples)), 1), len(samples) - 1)
    chosen = {*np.random.Generator(np.random.Philox(0)).permutation(len(samples))[:count].tolist()}
    return [one._replace(split="val") if index in chosen else one for index, one in enumerate(samples)]


def _report(options: argparse.Namespace, named: Named, names: Mapping[int, str], kinds: str, lost: Lost) -> None:
    objects = Counter(row[0] for some in named.values() for _, one in some for row in one.rows)
    splits = ", ".join(f"{len(some)} {split}" for split, some in named.items())
    LOGGER.info(f"Converted {kinds} to {options.to}: {splits} images with {objects.total()} objects in {options.out}")
    for label, name in names.items():
        if objects[label]:
            LOGGER.info(f"{label:>6} {name:<24}{objects[label]:>8}")
    if missing := [name for label, name in names.items() if not objects[label]]:
        LOGGER.info(f"Classes without objects: {', '.join(missing)}")
    for line in lost.lines():
        LOGGER.warning(f"WARNING: {line}")
    if options.to == "yolo":
        if "val" not in named:
            LOGGER.warning("WARNING: there are no validation images; --val 0.2 sets a fifth of the others aside")
        LOGGER.info(f"Next: python train.py --data {options.out / 'data.yaml'}")


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser("utils.tools.convert", description="Convert annotations to YOLO labels, to COCO or to VOC.")
    add = parser.add_argument
    add("source", nargs="+", help="annotation file, folder or data set YAML; train=PATH, val=PATH, test=PATH: a split")
    add("--out", type=Path, required=True, help="folder to make")
    add("--to", choices=TARGETS, default="yolo", help="format to write")
    add("--from", dest="source_format", choices=FORMATS, help="format to read; default: recognised from the content")
    add("--images", choices=["link", "copy", "list"], default="link", help="hard links, copies, or paths alone")
    add("--image-dir", type=Path, help="folder of the images, with those in it; default: the source's")
    add("--names", help="class names in the order wanted: a,b,c or a data set YAML; default: the annotations' order")
    add("--classes", default="", help="rename classes: old=new,old=new; classes of one new name become one")
    add("--drop", default="", help="classes to leave out: a,b")
    add("--leave-out", nargs="*", choices=FLAGS, default=["crowd", "difficult"], help="objects to leave out, by mark")
    add("--val", type=number(float, 0, 1), default=0.0, help="share of the training images that becomes val")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
