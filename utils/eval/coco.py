"""COCO's twelve figures, for any data set with YOLO labels, and its prediction files.

The ground truth is built in memory from the labels that were evaluated; no annotation JSON is needed. The computation
is faster-coco-eval's or pycocotools', whichever is installed: an extra, imported only here and only when asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.boxes import xyxy2xywh
from utils.checks import UserError
from utils.files import atomic_write

COCO80_TO_91 = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


class ImageRecord(NamedTuple):
    """What was found in one image and what is there, in its own pixels."""

    path: str
    shape_hw: tuple[int, int]
    detections: np.ndarray  # (n, 6) [x1, y1, x2, y2, confidence, class], most confident first
    labels: np.ndarray  # (m, 5) [class, x1, y1, x2, y2]

    @property
    def image_id(self) -> int | str:
        """COCO's identifier."""
        return image_id(self.path)


def image_id(path: str | Path) -> int | str:
    """Returns COCO's identifier of an image: the file name's stem, as a number where it is one."""
    stem = Path(path).stem
    return int(stem) if stem.isdecimal() else stem


class CocoFigures(NamedTuple):
    """COCO's figures; areas in native pixels: small below 32 x 32, large above 96 x 96. -1 where no label applies."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float


_TITLES = CocoFigures(
    "AP   IoU 0.50:0.95, all areas, 100 detections",
    "AP   IoU 0.50,      all areas, 100 detections",
    "AP   IoU 0.75,      all areas, 100 detections",
    "AP   IoU 0.50:0.95, small,     100 detections",
    "AP   IoU 0.50:0.95, medium,    100 detections",
    "AP   IoU 0.50:0.95, large,     100 detections",
    "AR   IoU 0.50:0.95, all areas,   1 detection",
    "AR   IoU 0.50:0.95, all areas,  10 detections",
    "AR   IoU 0.50:0.95, all areas, 100 detections",
    "AR   IoU 0.50:0.95, small,     100 detections",
    "AR   IoU 0.50:0.95, medium,    100 detections",
    "AR   IoU 0.50:0.95, large,     100 detections",
)


def coco_figures(records: Sequence[ImageRecord], nc: int) -> CocoFigures:
    """Computes COCO's figures from what was evaluated.

    Args:
        records: every image, those without labels or detections included.
        nc: number of classes.

    Raises:
        UserError: neither faster-coco-eval nor pycocotools is installed.
    """
    coco_class, _ = require_coco_tools()
    images = [{"id": index, "height": r.shape_hw[0], "width": r.shape_hw[1]} for index, r in enumerate(records)]
    categories = [{"id": class_id, "name": str(class_id)} for class_id in range(nc)]
    truth = [_annotation(index, row[0], row[1:5]) for index, r in enumerate(records) for row in r.labels]
    found = [
        {**_annotation(index, row[5], row[:4]), "score": float(row[4])}
        for index, r in enumerate(records)
        for row in r.detections
    ]
    truth_index, found_index = (
        _index(coco_class, {"images": images, "categories": categories, "annotations": annotations})
        for annotations in (truth, found)
    )
    return _run(truth_index, found_index)


def _annotation(image_id: int, class_id: float, box_xyxy_px: np.ndarray) -> dict[str, Any]:
    """One box as COCO writes it; its `id` is set by `_index`."""
    x1, y1, x2, y2 = map(float, box_xyxy_px)
    bbox = [x1, y1, x2 - x1, y2 - y1]
    area = bbox[2] * bbox[3]
    return {"image_id": image_id, "category_id": int(class_id), "bbox": bbox, "area": area, "iscrowd": 0}


def _index(coco_class: type, dataset: dict[str, Any]) -> Any:
    """Makes the library's index of a data set held in memory."""
    for number, annotation in enumerate(dataset["annotations"], start=1):  # an id of 0 reads as "not matched"
        annotation["id"] = number
    index = coco_class()
    index.dataset = {"info": {}, **dataset}
    with contextlib.redirect_stdout(io.StringIO()):
        index.createIndex()
    return index


def _run(truth: Any, found: Any, image_ids: Sequence[int | str] | None = None) -> CocoFigures:
    """Runs the library's evaluation of boxes, silently, on all images or some."""
    _, eval_class = require_coco_tools()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = eval_class(truth, found, iouType="bbox")
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return CocoFigures(*(float(value) for value in evaluation.stats[:12]))


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
    """The figures as a table of lines."""
    return [f"{title:<48}{value:8.3f}" for title, value in zip(_TITLES, figures, strict=True)]


def category_ids(sources: Sequence[Path], nc: int) -> Sequence[int]:
    """COCO's category of every class: its 91 numbers for the real COCO, whose list is coco/val2017.txt, else as is."""
    is_coco = any(Path(source).parts[-2:] == ("coco", "val2017.txt") for source in sources)
    return COCO80_TO_91 if is_coco else range(nc)


def predictions(records: Sequence[ImageRecord], categories: Sequence[int]) -> list[dict[str, Any]]:
    """Detections as COCO's results format.

    Args:
        records: the images' detections.
        categories: the category of every class.
    """
    return [row for record in records for row in detection_rows(record.path, record.detections, categories)]


def detection_rows(path: str | Path, detections: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format: `bbox` [left, top, width, height] to 0.001 px, score to 0.00001.

    Args:
        path: the image's; its stem is the identifier, as a number where it is one.
        detections: (n, 6) [x1, y1, x2, y2, confidence, class].
        categories: the category of every class.
    """
    boxes_xywh = xyxy2xywh(detections[:, :4])
    boxes_xywh[:, :2] -= boxes_xywh[:, 2:] / 2  # the corner instead of the centre
    return [
        {
            "image_id": image_id(path),
            "category_id": categories[int(class_id)],
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 5),
        }
        for box, (confidence, class_id) in zip(boxes_xywh.tolist(), detections[:, 4:6].tolist(), strict=True)
    ]


def write_predictions(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes results as JSON, all or nothing.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(file) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        json.dump(rows, stream)


def annotated_figures(rows: Sequence[dict[str, Any]], image_ids: Sequence[int | str], annotations: Path) -> CocoFigures:
    """Computes COCO's figures of results against an annotation file.

    Args:
        rows: what `predictions` returned.
        image_ids: the images that were evaluated.
        annotations: COCO's `instances_*.json`.

    Raises:
        UserError: no COCO library, not an annotation file, or it does not list the images evaluated.
    """
    coco_class, _ = require_coco_tools()
    try:
        with open(annotations, encoding="utf-8") as stream:
            dataset = json.load(stream)
        truth = _index(coco_class, dataset)
        known = {image["id"] for image in dataset["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations}: not a COCO annotation file ({type(error).__name__}: {error}).") from error
    unknown = [image_id for image_id in image_ids if image_id not in known]
    if unknown:
        raise UserError(f"{annotations}: lists no image {unknown[0]} ({len(unknown)} of {len(image_ids)} are missing).")
    found = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in rows]
    kept = {key: dataset[key] for key in ("images", "categories")}
    return _run(truth, _index(coco_class, {**kept, "annotations": found}), image_ids)
