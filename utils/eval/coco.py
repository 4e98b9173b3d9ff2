"""COCO's twelve metrics, for any data set with YOLO labels, and its prediction files.

The ground truth is built in memory from the labels that were evaluated, or read from an annotation file, which also
says what numbers COCO results give to images and categories. The computation is faster-coco-eval's or pycocotools',
whichever is installed: an extra, imported only here and only when asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.boxes import xyxy2xywh
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.files import ROOT
from utils.log import LOGGER

COCO80_TO_91 = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


class ImageRecord(NamedTuple):
    """What was found in one image and what is there, in its own pixels."""

    path: str
    shape_hw: tuple[int, int]
    detections: np.ndarray  # (n, 6) [x1, y1, x2, y2, confidence, class], most confident first
    labels: np.ndarray  # (m, 5) [class, x1, y1, x2, y2]


def image_id(path: str | Path) -> int | str:
    """Returns COCO's identifier of an image: the file name's stem, as a number where it is one."""
    stem = Path(path).stem
    return int(stem) if stem.isdecimal() else stem


def image_ids(paths: Sequence[str]) -> list[int | str]:
    """Returns an identifier for each image: `image_id`'s; where two would share one, all paths below their folder."""
    ids = [image_id(path) for path in paths]
    if len(set(ids)) == len(ids):
        return ids
    first = {one: index for index, one in reversed(list(enumerate(ids)))}
    later = next(index for index, one in enumerate(ids) if first[one] != index)
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    LOGGER.warning(
        f"WARNING: {paths[first[ids[later]]]} and {paths[later]} would share the image_id {ids[later]!r}: in the JSON "
        f"image_id is each image's path in {folder} instead"
    )
    return [Path(os.path.relpath(path, folder)).as_posix() for path in paths]


FIGURES = {
    "ap": "AP   IoU 0.50:0.95, all areas, 100 detections",
    "ap50": "AP   IoU 0.50,      all areas, 100 detections",
    "ap75": "AP   IoU 0.75,      all areas, 100 detections",
    "ap_small": "AP   IoU 0.50:0.95, small,     100 detections",
    "ap_medium": "AP   IoU 0.50:0.95, medium,    100 detections",
    "ap_large": "AP   IoU 0.50:0.95, large,     100 detections",
    "ar_1": "AR   IoU 0.50:0.95, all areas,   1 detection",
    "ar_10": "AR   IoU 0.50:0.95, all areas,  10 detections",
    "ar_100": "AR   IoU 0.50:0.95, all areas, 100 detections",
    "ar_small": "AR   IoU 0.50:0.95, small,     100 detections",
    "ar_medium": "AR   IoU 0.50:0.95, medium,    100 detections",
    "ar_large": "AR   IoU 0.50:0.95, large,     100 detections",
}
# Areas in native pixels: small below 32 x 32, large above 96 x 96. -1 where no label applies.
CocoFigures = NamedTuple("CocoFigures", [(name, float) for name in FIGURES])


def coco_figures(records: Sequence[ImageRecord], nc: int) -> CocoFigures:
    """Computes COCO's figures from what was evaluated.

    Args:
        records: every image, those without labels or detections included.
        nc: number of classes.

    Raises:
        UserError: neither faster-coco-eval nor pycocotools is installed.
    """
    known = {
        "images": [{"id": index, "height": r.shape_hw[0], "width": r.shape_hw[1]} for index, r in enumerate(records)],
        "categories": [{"id": class_id, "name": str(class_id)} for class_id in range(nc)],
    }
    truth = [_annotation(index, row[0], row[1:5]) for index, r in enumerate(records) for row in r.labels]
    found = [
        {**_annotation(index, row[5], row[:4]), "score": float(row[4])}
        for index, r in enumerate(records)
        for row in r.detections
    ]
    return _evaluate(known, truth, found)


def _annotation(image: int, class_id: float, box_xyxy_px: np.ndarray) -> dict[str, Any]:
    """Returns one box as COCO writes it, without an `id`."""
    x1, y1, x2, y2 = map(float, box_xyxy_px)
    bbox, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
    return {"image_id": image, "category_id": int(class_id), "bbox": bbox, "area": area, "iscrowd": 0}


def _evaluate(
    known: Mapping[str, Any],
    truth: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
    images: Sequence[int | str] | None = None,
    categories: Sequence[int] | None = None,
) -> CocoFigures:
    """Runs the library's evaluation of boxes, silently, on all images and categories of `known` or some."""
    coco_class, eval_class = require_coco_tools()
    indices = []
    with contextlib.redirect_stdout(io.StringIO()):
        for boxes in (truth, found):
            index = coco_class()
            numbered = [{**box, "id": number} for number, box in enumerate(boxes, start=1)]  # 0 reads as "not matched"
            index.dataset = {"info": {}, **known, "annotations": numbered}
            index.createIndex()
            indices.append(index)
        evaluation = eval_class(*indices, iouType="bbox")
        if images is not None:
            evaluation.params.imgIds = list(images)
        if categories is not None:
            evaluation.params.catIds = list(categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoFigures(*(float(value) for value in evaluation.stats[: len(FIGURES)]))


def require_coco_tools() -> tuple[type, type]:
    """Returns the index and the evaluation class of the COCO library that is installed.

    Raises:
        UserError: none is.
    """
    if find_spec("faster_coco_eval"):
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    if find_spec("pycocotools"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    raise UserError("COCO's figures need a package: pip install faster-coco-eval (or pycocotools).")


def figure_lines(figures: CocoFigures) -> list[str]:
    """Returns the figures as a table of lines."""
    return [f"{title:<48}{value:8.3f}" for title, value in zip(FIGURES.values(), figures, strict=True)]


def category_ids(sources: Sequence[Path], names: Mapping[int, str]) -> Sequence[int]:
    """Returns the category of every class where no annotation file tells it: its number, but COCO's own 91 for COCO.

    Args:
        sources: the validation split; COCO's is the list coco/val2017.txt.
        names: class names {number: name}; COCO's are those of data/coco.yaml.
    """
    listed = any(Path(source).parts[-2:] == ("coco", "val2017.txt") for source in sources)
    is_coco = listed and names == load_spec(ROOT / "data" / "coco.yaml", need=()).names
    return COCO80_TO_91 if is_coco else range(len(names))


def detection_rows(image: int | str, detections: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format: `bbox` [left, top, width, height] to 0.001 px, score to 0.00001.

    Args:
        image: the image's identifier.
        detections: (n, 6) [x1, y1, x2, y2, confidence, class].
        categories: the category of every class.
    """
    boxes_xywh = xyxy2xywh(detections[:, :4])
    boxes_xywh[:, :2] -= boxes_xywh[:, 2:] / 2  # the corner instead of the centre
    return [
        {
            "image_id": image,
            "category_id": categories[int(class_id)],
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 5),
        }
        for box, (confidence, class_id) in zip(boxes_xywh.tolist(), detections[:, 4:6].tolist(), strict=True)
    ]


class Annotations:
    """A COCO annotation file (`instances_*.json`): its own numbers of categories and images, and its boxes."""

    def __init__(self, path: Path) -> None:
        """Reads a file.

        Raises:
            UserError: it is no COCO annotation file.
        """
        self.path = path
        try:
            with open(path, encoding="utf-8") as stream:
                content = json.load(stream)
            self._images = [{"id": one["id"], "file_name": str(one["file_name"])} for one in content["images"]]
            self._categories = [{"id": one["id"], "name": str(one["name"])} for one in content["categories"]]
            self._boxes = [
                {"area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, **one} for one in content["annotations"]
            ]
            numbers = [one["id"] for one in (*self._images, *self._categories)]
            numbers += [one[key] for one in self._boxes for key in ("image_id", "category_id")]
            wrong = next((number for number in numbers if type(number) is not int), None)
            if wrong is not None:  # the libraries turn some of them into others
                raise ValueError(f"the number of an image or a category is {wrong!r:.40}")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: not a COCO annotation file ({type(error).__name__}: {error}).") from error

    def category_ids(self, names: Mapping[int, str]) -> list[int]:
        """Returns the category of every class, by its name; capitals do not matter where they distinguish nothing.

        Raises:
            UserError: a class is no category of the file, or more than one.
        """
        for form in (str, str.lower):
            ids: dict[str, list[int]] = {}
            for one in self._categories:
                ids.setdefault(form(one["name"]), []).append(one["id"])
            found = [ids.get(form(str(name)), []) for name in names.values()]
            wrong = [name for name, fitting in zip(names.values(), found, strict=True) if len(fitting) != 1]
            if not wrong and len({one for (one,) in found}) == len(found):
                return [one for (one,) in found]
        name = wrong[0] if wrong else next(iter(names.values()))
        have = ", ".join([f"'{one['name']}'" for one in self._categories[:5]] + ["..."] * (len(self._categories) > 5))
        raise UserError(f"{self.path}: no one of its categories ({have}) has the name of class '{name}'.")

    def image_ids(self, paths: Sequence[str]) -> list[int | str]:
        """Returns the identifier of every image, by its file name, and as much of the path as the file gives.

        Raises:
            UserError: an image is not in the file, or not told apart from another by it.
        """
        by_name: dict[tuple[str, ...], set[int | str]] = {}
        for one in self._images:
            by_name.setdefault(Path(one["file_name"].replace("\\", "/")).parts, set()).add(one["id"])
        depths = sorted({len(parts) for parts in by_name}, reverse=True)
        ids, unknown = [], []
        for path in paths:
            tails = (Path(path).parts[-depth:] for depth in depths)
            found = next((by_name[tail] for tail in tails if tail in by_name), set())
            ids.extend(found if len(found) == 1 else ())
            unknown.extend([] if len(found) == 1 else [path])
        if unknown:
            raise UserError(f"{self.path}: lists no single image {unknown[0]} ({len(unknown)} of {len(paths)} images).")
        if len(set(ids)) < len(ids):
            raise UserError(f"{self.path}: some of the images have one name, and it does not tell their folders.")
        return ids

    def figures(
        self, rows: Sequence[dict[str, Any]], images: Sequence[int | str], categories: Sequence[int]
    ) -> CocoFigures:
        """Computes COCO's figures of results against the file's boxes.

        Args:
            rows: `detection_rows` of all images, with the file's own numbers.
            images: the images that were evaluated, by the file's numbers.
            categories: the categories of the model's classes; what the file has beside them does not count.

        Raises:
            UserError: no COCO library, or it cannot use the file.
        """
        require_coco_tools()
        found = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in rows]
        known = {"images": self._images, "categories": self._categories}
        try:
            return _evaluate(known, self._boxes, found, images, categories)
        except (LookupError, ValueError, TypeError, RuntimeError) as error:  # of a box that lacks what COCO's have
            raise UserError(f"{self.path}: cannot be used ({type(error).__name__}: {error}).") from error


def result_numbers(
    paths: Sequence[str], names: Mapping[int, str], categories: Sequence[int], file: Path | None
) -> tuple[list[int | str], Sequence[int], Annotations | None]:
    """Returns what COCO results call images and classes: as an annotation file does where there is one that fits.

    Args:
        paths: the images.
        names: class names.
        categories: the category of every class where the file does not tell.
        file: the annotation file; None, or one that is not there, is none.

    Returns:
        The identifier of every image, the category of every class, and the file where it knows both.
    """
    ids, truth = None, None
    if file is not None and file.is_file():
        try:
            truth = Annotations(file)
            categories = truth.category_ids(names)
            ids = truth.image_ids(paths)
        except UserError as error:  # an extra: the evaluation itself stands
            truth = None
            LOGGER.warning(f"WARNING: COCO's annotations were not used for mAP: {error}")
    return ids or image_ids(paths), categories, truth
