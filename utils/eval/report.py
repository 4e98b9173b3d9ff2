"""What an evaluation prints and writes as text: the table of classes, the speed line, label files of detections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.boxes import xyxy2xywhn
from utils.checks import UserError
from utils.eval.metrics import APResult

HEADER = ("%20s" + "%11s" * 6) % ("Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95")
ROW = "%20s" + "%11i" * 2 + "%11.3g" * 4


def table_rows(result: APResult, names: Mapping[int, str], seen: int, per_class: bool) -> list[str]:
    """The rows below `HEADER`: all classes together, then each class that has labels.

    Args:
        result: the figures.
        names: name of every class.
        seen: number of images evaluated.
        per_class: whether the single classes are wanted.
    """
    overall = (result.mean_precision, result.mean_recall, result.map50, result.map)
    rows = [ROW % ("all", seen, result.label_counts.sum(), *overall)]
    if per_class:
        for row, class_id in enumerate(result.classes):
            figures = (result.precision[row], result.recall[row], result.ap[row, 0], result.ap[row].mean())
            rows.append(ROW % (names[int(class_id)], seen, result.label_counts[row], *figures))
    return rows


def speed_line(speed_ms: Sequence[float], shape: Sequence[int]) -> str:
    """The line on milliseconds per image.

    Args:
        speed_ms: pre-process, inference and NMS.
        shape: (batch, 3, height, width) that it holds for.
    """
    stages = "Speed: {:.1f}ms pre-process, {:.1f}ms inference, {:.1f}ms NMS per image at shape {}"
    return stages.format(*speed_ms, tuple(shape))


def label_lines(detections: np.ndarray, shape_hw: Sequence[int], save_conf: bool = False) -> list[str]:
    """Returns lines `class x y w h[ confidence]`, box normalised, of one image's detections, in their order.

    Args:
        detections: (n, 6) [x1, y1, x2, y2 in the image's pixels, confidence, class].
        shape_hw: the image's (height, width).
        save_conf: whether lines end with the confidence.
    """
    boxes_norm = xyxy2xywhn(detections[:, :4], w=shape_hw[1], h=shape_hw[0])
    columns = [detections[:, 5:6], boxes_norm] + ([detections[:, 4:5]] if save_conf else [])
    return [" ".join(f"{value:g}" for value in row) for row in np.concatenate(columns, 1).tolist()]


class LabelWriter:
    """Writes detections as YOLO label files, one for each image that has any.

    A file of a former run is replaced. Images of one name in different folders get `name_2.txt`, `name_3.txt`, ...
    """

    def __init__(self, folder: Path, save_conf: bool = False):
        """Makes `folder`; with `save_conf` every line ends with the confidence.

        Raises:
            UserError: the folder cannot be made.
        """
        self.folder = folder
        self.save_conf = save_conf
        self._used: Counter[str] = Counter()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}). Choose another --project.") from error

    def write(self, path: str, detections: np.ndarray, shape_hw: Sequence[int]) -> None:
        """Writes one image's file: lines `class x y w h[ confidence]`, box normalised, most confident first.

        Args:
            path: the image's.
            detections: (n, 6) [x1, y1, x2, y2 in the image's pixels, confidence, class], most confident first.
            shape_hw: the image's (height, width).

        Raises:
            UserError: the file cannot be written.
        """
        stem = Path(path).stem
        self._used[stem] += 1
        if not len(detections):
            return
        lines = label_lines(detections, shape_hw, self.save_conf)
        file = self.folder / (f"{stem}.txt" if self._used[stem] == 1 else f"{stem}_{self._used[stem]}.txt")
        try:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}).") from error
