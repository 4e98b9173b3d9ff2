"""What an evaluation prints: the table of classes and the speed line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils.metrics import APResult

HEADER = ("%20s" + "%11s" * 6) % ("Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95")
ROW = "%20s" + "%11i" * 2 + "%11.3g" * 4
UNMEASURED_ROW = "%20s" + "%11i" * 2 + "%11s" * 4


def table_rows(result: APResult, names: Mapping[int, str], seen: int, per_class: bool) -> list[str]:
    """The rows below `HEADER`: all classes together, then each class that has labels; without any labels no figures.

    Args:
        result: the figures.
        names: name of every class.
        seen: number of images evaluated.
        per_class: whether the single classes are wanted.
    """
    if not result.label_counts.sum():
        return [UNMEASURED_ROW % ("all", seen, 0, *"----")]
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
