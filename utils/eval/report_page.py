"""report.html: an evaluation, and the training before it, on one page that asks nothing of the network.

What it says comes from the figures that `metrics.json` holds (`utils.eval.figures`), from the records of the
evaluation, from results.csv and from the labels. Image files are read for the pictures alone, a few of them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from utils.autoanchor import label_sizes_px
from utils.dataloaders.labels import LabelTable
from utils.errors import printable
from utils.eval.coco import ImageRecord
from utils.eval.figures import ERROR_KINDS, Verdict, confident, judge
from utils.files import atomic_write
from utils.images import DEFAULT_IMGSZ, ImageError, read_image
from utils.page import Line, columns_chart, density_chart, fill_page, html_table, image_tag, line_chart
from utils.plots.boxes import Annotation, Annotator

if TYPE_CHECKING:
    from utils.eval.evaluate import EvalResult

RIGHT, WRONG, MISSED = (70, 150, 30), (50, 50, 210), (200, 100, 20)  # colours in BGR
LEGEND = " ".join(
    f'<b style="color:#fff;background:rgb{colour[::-1]};padding:0 .4rem">{name}</b>'
    for name, colour in (("right", RIGHT), ("wrong", WRONG), ("missed", MISSED))
)
COLOURS = "#3b82f6 #f97316 #16a34a #e11d48 #8b5cf6 #a16207 #db2777 #0891b2 #65a30d #64748b".split()
PICTURE_PX = 300  # height, at most
CROP_PX = 112  # side
WORST_IMAGES, CROPS = 12, 8  # images shown, and crops of each
SURE_ERRORS = 16  # false positives shown, the most confident ones
NAMED_CLASSES = len(COLOURS)  # with more, single curves are grey
MATRIX_CLASSES = 20  # with more, the confusion matrix is a list of what is confused most
CONFUSIONS = 20  # lines of it
MILESTONES = {"precision": "P", "recall": "R", "mAP_0.5": "mAP50", "mAP_0.5:0.95": "mAP50-95"}  # of results.csv


def write_report(
    file: Path,
    content: Mapping[str, Any],
    result: EvalResult,
    tables: Mapping[str, LabelTable],
    results_csv: Path | None = None,
) -> None:
    """Writes the page, all or nothing.

    Args:
        file: `report.html`.
        content: of `metrics.json`.
        result: the evaluation's, with records.
        tables: the labels of each split that is known.
        results_csv: of the training.

    Raises:
        UserError: it cannot be written.
    """
    title = " · ".join(printable(Path(str(content[key])).name) for key in ("model", "data") if content.get(key))
    sections = {
        "Training": _training(results_csv) if results_csv and results_csv.is_file() else "",
        "Classes": html_table(_class_rows(content)),
        "Curves at IoU 0.5": _curves(content) if content["labels"] else "",
        "Confusion matrix": _confusion(content["confusion_matrix"]),
        "Sizes of objects": html_table(_size_rows(content))
        + _quiet("By area in the image's own pixels: small below 32 x 32, medium to 96 x 96, large above."),
        **_errors(result),
        "Data": _data(tables, result.names, content.get("imgsz")),
        "Run": _run(content),
    }
    shown = {title: f"<section><h2>{title}</h2>{html}</section>" for title, html in sections.items() if html}
    shown["Errors"] = f'<div class="pair">{shown.pop("Sizes of objects")}{shown["Errors"]}</div>'
    tiles = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in _headline(content))
    body = f"""<header><h1>{escape(title)}</h1>{_quiet(_subtitle(content))}
<div class="tiles">{tiles}</div></header>
<main>{"".join(shown.values())}</main>"""
    with atomic_write(file) as temporary:
        temporary.write_text(fill_page(title, body), encoding="utf-8")


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(printable(text))}</p>' if text else ""


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _headline(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = [("mAP50-95", "map"), ("mAP50", "map50"), ("precision", "precision"), ("recall", "recall")]
    rows = [(name, _figure(content[key])) for name, key in tiles]
    rows.append(("best confidence", _figure(content["confidence"])))
    rows.append(("images", str(content["images"])))
    rows.append(("labels", str(content["labels"])))
    rows.append(("ms per image", f"{sum(content['speed_ms'].values()):.1f}"))
    return rows


def _subtitle(content: Mapping[str, Any]) -> str:
    parts = [str(content[key]) for key in ("model", "data") if content.get(key)]
    return ", ".join([*parts, f"split {content['split']}"])


def _training(results_csv: Path) -> str:
    """Returns the curves of results.csv: each term of the loss, precision and recall, mAP, the learning rates."""
    with open(results_csv, encoding="utf-8", newline="") as stream:
        rows = [{name.strip(): float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    columns = {name: [row[name] for row in rows] for name in rows[0]} if rows else {}
    if not columns:
        return ""
    epochs = columns["epoch"]
    panels: dict[str, list[Line]] = {}
    for name, values in columns.items():
        kind, _, what = name.partition("/")
        if kind in ("train", "val"):
            panel = panels.setdefault(what.replace("_", " "), [])
            panel.append(Line(kind, epochs, values, f"var(--{kind})"))
        elif kind == "metrics":
            panel = panels.setdefault("mAP" if what.startswith("mAP") else "Precision and recall", [])
            panel.append(Line(MILESTONES.get(what, what), epochs, values, COLOURS[len(panel)]))
        elif kind == "x":
            panel = panels.setdefault("Learning rate", [])
            panel.append(Line(what, epochs, values, COLOURS[len(panel) % NAMED_CLASSES]))
    best = int(np.nanargmax(columns["metrics/mAP_0.5:0.95"]))
    charts = "".join(line_chart(title, lines, "epoch") for title, lines in panels.items())
    told = (
        f"{len(epochs)} epochs; highest mAP50-95 {columns['metrics/mAP_0.5:0.95'][best]:.3f} in epoch {epochs[best]:g}."
    )
    return f'{_quiet(told)}<div class="charts">{charts}</div>'


def _class_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the table of classes, its head first: the best confidence and F1 are each class's own."""
    head = ("class", "labels", "P", "R", "mAP50", "mAP50-95", "best confidence", "F1 there")
    keys = ("precision", "recall", "map50", "map")
    rows = [head, ("all", str(content["labels"]), *(_figure(content[key]) for key in (*keys, "confidence")), "")]
    for one in content["classes"]:
        figures = (_figure(one.get(key)) for key in (*keys, "best_confidence", "best_f1"))
        rows.append((one["name"], str(one["labels"]), *figures))
    return rows


def _size_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [("size", "labels", "mAP50", "mAP50-95")]
    for name, one in content["sizes"].items():
        rows.append((name, str(one["labels"]), _figure(one["map50"]), _figure(one["map"])))
    return rows


def _curves(content: Mapping[str, Any]) -> str:
    axis, measured = content["curve_axis"], [one for one in content["classes"] if "curves" in one]
    named = len(measured) <= NAMED_CLASSES
    titles = {
        "precision_over_recall": ("Precision over recall", "recall"),
        "f1": ("F1 over confidence", "confidence"),
        "precision": ("Precision over confidence", "confidence"),
        "recall": ("Recall over confidence", "confidence"),
    }
    charts = []
    for key, (title, x_name) in titles.items():
        lines = [
            Line(one["name"], axis, one["curves"][key], COLOURS[row] if named else "var(--line)", 1.2, named)
            for row, one in enumerate(measured)
        ]
        mean = np.mean([one["curves"][key] for one in measured], axis=0)
        charts.append(line_chart(title, [*lines, Line("mean", axis, mean, "var(--text)", 2.4)], x_name, unit=True))
    return f'<div class="charts">{"".join(charts)}</div>'


def _confusion(matrix: Mapping[str, Any]) -> str:
    """Returns the matrix as a table whose cells are coloured by their share of the true class, or the worst of it."""
    counts, names = np.array(matrix["counts"]), [printable(name) for name in matrix["names"]]
    told = (
        f"Rows are what was predicted (confidence above {matrix['confidence']:g}), columns what is there (IoU above "
        f"{matrix['iou']:g}). The last row counts what nothing found, the last column false positives where nothing is."
    )
    if len(names) > MATRIX_CLASSES + 1:
        wrong = counts.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
        rows = [("there", "predicted", "count")]
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
            if wrong[row, column]:
                rows.append((names[column], names[row], str(wrong[row, column])))
        return html_table(rows) + _quiet("What is confused most, background included.")
    shares = counts / np.maximum(counts.sum(0), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("predicted \\ there", *names))
    lines = [f"<tr>{head}</tr>"]
    for name, some, portions in zip(names, counts, shares, strict=True):
        cells = "".join(
            f'<td style="--share:{share:.3f}">{count or ""}</td>' for count, share in zip(some, portions, strict=True)
        )
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table class="matrix">{"".join(lines)}</table></div>{_quiet(told)}'


# --------------------------------------------------------------------------------------------------- what went wrong


def _errors(result: EvalResult) -> dict[str, str]:
    """Returns sections on the kinds of errors, the images with most of them, and the surest false positives."""
    names, measured = result.names, result.details.label_counts.sum() > 0
    confidence = result.details.confidence if measured else result.confusion.conf
    found = [confident(record, confidence) for record in result.records]
    verdicts = [judge(some, record.labels) for some, record in zip(found, result.records, strict=True)]
    counts = np.array([verdict.counts for verdict in verdicts]).reshape(-1, 3)
    right, wrong, missed = counts.sum(0).tolist()
    kinds = np.concatenate([verdict.kinds for verdict in verdicts])
    rows = [("kind", "count"), ("right", str(right)), ("missed", str(missed)), ("wrong", str(wrong))]
    rows += [(f"  {kind}", str(int((kinds == number).sum()))) for number, kind in enumerate(ERROR_KINDS)]
    told = (
        f"Detections of at least confidence {confidence:.3f} at IoU 0.5. Wrong ones are duplicates of a right one, "
        "have the place of an object of another class, lie badly on one of their own class (IoU 0.1 to 0.5), or are of "
        "the background."
    )
    errors = counts[:, 1:].sum(1)
    f1 = 2 * counts[:, 0] / np.maximum(counts @ (2, 1, 1), 1)
    order = np.argsort(-errors * (1 - f1), kind="stable")
    worst = [index for index in order[:WORST_IMAGES].tolist() if errors[index]]
    figures = "".join(_worst(result.records[one], found[one], verdicts[one], names) for one in worst)
    sure = sorted(
        (
            (some[row, 4], index, row)
            for index, some in enumerate(found)
            for row in np.flatnonzero(~verdicts[index].right)
        ),
        reverse=True,
    )[:SURE_ERRORS]
    crops = "".join(_surest(result.records[index], found[index], verdicts[index], row, names) for _, index, row in sure)
    return {
        "Errors": html_table(rows) + _quiet(told),
        "Worst images": figures
        and f'<p>Most errors for what is right: {LEGEND}</p><div class="errors">{figures}</div>',
        "Surest false positives": crops
        and _quiet("Often these are objects without a label, or with a wrong one.")
        + f'<div class="crops">{crops}</div>',
    }


def _read(path: str, side: int | None = None) -> np.ndarray | str:
    """Returns an image, or why there is none."""
    try:
        return read_image(path, side)
    except ImageError as error:
        return f"<span>{escape(printable(error))}</span>"


def _worst(record: ImageRecord, found: np.ndarray, verdict: Verdict, names: Mapping[int, str]) -> str:
    """Returns an image with what is wrong in it, and crops of that: false positives by confidence, misses by size."""
    picture = error_picture(record.path, record.shape_hw[::-1], found, record.labels, names)
    pixels = _read(record.path)
    crops = []
    if not isinstance(pixels, str):
        for row in np.flatnonzero(~verdict.right).tolist():
            crops.append(_crop(pixels, record, found[row, :4], WRONG, _told(found[row], verdict.kinds[row], names)))
        sizes = np.prod(record.labels[:, 3:5] - record.labels[:, 1:3], axis=1)
        for row in sorted(verdict.missed.tolist(), key=lambda row: -sizes[row]):
            label = record.labels[row]
            crops.append(_crop(pixels, record, label[1:5], MISSED, f"missed {_name(names, label[0])}"))
    if len(crops) > CROPS:
        wrong = min(int((~verdict.right).sum()), max(CROPS - len(verdict.missed), CROPS // 2))
        crops = [*crops[:wrong], *crops[int((~verdict.right).sum()) :]][:CROPS]
    told = f"{record.path}: {verdict.counts[0]} right, {verdict.counts[1]} wrong, {verdict.counts[2]} missed"
    shown = f'<div>{picture}<div class="crops">{"".join(crops)}</div></div>'
    return f"<figure>{shown}<figcaption>{escape(printable(told))}</figcaption></figure>"


def _surest(record: ImageRecord, found: np.ndarray, verdict: Verdict, row: int, names: Mapping[int, str]) -> str:
    pixels = _read(record.path)
    if isinstance(pixels, str):
        return pixels
    told = f"{_told(found[row], verdict.kinds[row], names)}, {Path(record.path).name}"
    return _crop(pixels, record, found[row, :4], WRONG, told)


def _told(detection: np.ndarray, kind: int, names: Mapping[int, str]) -> str:
    return f"{_name(names, detection[5])} {detection[4]:.2f}: {ERROR_KINDS[kind]}"


def _name(names: Mapping[int, str], class_id: float) -> str:
    return names.get(int(class_id), str(int(class_id)))


def _crop(pixels: np.ndarray, record: ImageRecord, box_xyxy: np.ndarray, colour: tuple[int, ...], told: str) -> str:
    """Returns the surroundings of a box as a small square figure; `record` says how large the image is for the box."""
    box = box_xyxy * np.tile(np.array(pixels.shape[1::-1]) / record.shape_hw[::-1], 2)
    half = max(float((box[2:] - box[:2]).max()) * 0.8, 12.0)
    (left, top), side = (box[:2] + box[2:]) / 2 - half, 2 * half
    to_crop = np.array([[1, 0, -left], [0, 1, -top]]) * CROP_PX / side
    shrunk = pixels
    if side > 2 * CROP_PX:  # averages what the crop leaves out, as warpAffine would not
        scale = CROP_PX / side
        shrunk = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        to_crop = to_crop @ np.diag([pixels.shape[1] / shrunk.shape[1], pixels.shape[0] / shrunk.shape[0], 1])
    crop = cv2.warpAffine(shrunk, to_crop, (CROP_PX, CROP_PX), borderMode=cv2.BORDER_CONSTANT, borderValue=(114,) * 3)
    shown = (box - np.tile((left, top), 2)) * CROP_PX / side
    Annotator(crop, 2).annotate([Annotation(shown, "", colour)])
    return f"<figure>{image_tag(crop, told)}<figcaption>{escape(printable(told))}</figcaption></figure>"


def error_picture(
    path: str, size_wh: Sequence[int] | np.ndarray, found: np.ndarray, labels: np.ndarray, names: Mapping[int, str]
) -> str:
    """Returns an image with its right, wrong and missed objects as an <img> with its data; a text where it is gone.

    Args:
        path: the image.
        size_wh: of the pixels that the boxes are in.
        found: detections (n, 6), most confident first.
        labels: (m, 5).
        names: of the classes.
    """
    pixels = _read(path, 2 * PICTURE_PX)
    if isinstance(pixels, str):
        return pixels
    scale = PICTURE_PX / max(pixels.shape[0], pixels.shape[1] / 1.6)
    shown_wh = tuple(max(round(side * scale), 1) for side in pixels.shape[1::-1])
    pixels = cv2.resize(pixels, shown_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    to_shown = np.tile(np.array(shown_wh) / size_wh, 2)
    verdict = judge(found, labels)
    drawn = [(row[1:5], _name(names, row[0]), MISSED) for row in labels[verdict.missed]]
    drawn += [
        (row[:4], f"{_name(names, row[5])} {row[4]:.2f}", RIGHT if hit else WRONG)
        for row, hit in sorted(zip(found, verdict.right, strict=True), key=lambda pair: pair[1])
    ]
    Annotator(pixels, 2, 10).annotate(
        [Annotation(box * to_shown, text if colour != RIGHT else "", colour) for box, text, colour in drawn]
    )
    return image_tag(pixels, path)


# -------------------------------------------------------------------------------------------------- the data, the run


def _data(tables: Mapping[str, LabelTable], names: Mapping[int, str], imgsz: Any) -> str:
    """Returns the images and labels of each split, the labels of each class, and where and how large boxes are."""
    if not tables:
        return ""
    rows = [("split", "images", "background", "labels", "per image")]
    for split, table in tables.items():
        empty, labels = int((np.diff(table.offsets) == 0).sum()), len(table.rows)
        rows.append((split, str(len(table)), str(empty), str(labels), f"{labels / max(len(table), 1):.1f}"))
    counts = {
        split: np.bincount(table.rows[:, 0].astype(int), minlength=len(names))[: len(names)]
        for split, table in tables.items()
    }
    split, table = next(iter(tables.items()))
    sides = [imgsz] if isinstance(imgsz, int) else imgsz or [DEFAULT_IMGSZ]
    charts = label_charts(table, max(sides)) if len(table) else ""
    return (
        f"{html_table(rows)}<h3>Labels of each class</h3>{class_bars(names, counts)}"
        f'<h3>Boxes and images of {escape(split)}</h3><div class="charts">{charts}</div>'
    )


def class_bars(names: Mapping[int, str], counts: Mapping[str, np.ndarray]) -> str:
    """Returns a bar for each class, the most frequent first; `counts` has the labels of each class (nc,) by split."""
    top = max(int(sum(counts.values()).max()), 1)
    bars = []
    for label in np.argsort(-sum(counts.values()), kind="stable"):
        parts = "".join(
            f'<i class="{split}" style="width:{100 * count[label] / top:.2f}%"></i>' for split, count in counts.items()
        )
        name = escape(printable(names[int(label)]))
        numbers = " + ".join(str(count[label]) for count in counts.values())
        bars.append(f'<span title="{name}">{name}</span><span class="track">{parts}</span><span>{numbers}</span>')
    legend = "".join(f'<span><i class="{split}"></i>{split}</span>' for split in counts)
    return f'<div class="legend">{legend}</div><div class="bars">{"".join(bars)}</div>'


def label_charts(table: LabelTable, imgsz: int, anchors_px: np.ndarray | None = None) -> str:
    """Returns where boxes are and how large (at `imgsz` px), how many an image has, and the shapes of images."""
    cells = 32
    centres = np.clip((table.rows[:, 1:3] * cells).astype(int), 0, cells - 1)
    places = np.zeros((cells, cells), int)
    np.add.at(places, (centres[:, 1], centres[:, 0]), 1)
    octaves = np.log2(imgsz)  # from 1 px to the whole image

    def position(sizes_px: np.ndarray) -> np.ndarray:
        return np.log2(np.maximum(sizes_px, 1)) / octaves * cells

    sizes = np.clip(position(label_sizes_px(table, imgsz)).astype(int), 0, cells - 1)
    areas = np.zeros((cells, cells), int)
    np.add.at(areas, (cells - 1 - sizes[:, 1], sizes[:, 0]), 1)
    crosses = "".join(
        f'<path d="M{x - 0.6:.2f} {cells - y:.2f}h1.2M{x:.2f} {cells - y - 0.6:.2f}v1.2" stroke-width=".28"/>'
        for x, y in ([] if anchors_px is None else position(anchors_px))
    )
    in_images = np.diff(table.offsets)
    edges = np.array([0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 31, 51, 101, np.inf])
    numbers = np.histogram(in_images, edges)[0]
    aspects = np.log2(table.sizes_wh[:, 0] / table.sizes_wh[:, 1])
    shapes = np.histogram(np.clip(aspects, -2, 2), np.arange(-2.125, 2.2, 0.25))[0]
    return "".join(
        (
            density_chart("Centres of boxes", places, ("left", "right")),
            density_chart(
                f"Width and height of boxes at {imgsz} px" + (", anchors" if crosses else ""),
                areas,
                ("1 px", f"{imgsz**0.5:.0f} px", f"{imgsz} px"),
                crosses,
            ),
            columns_chart("Labels per image, from", numbers, [f"{edge:.0f}" for edge in edges[:-1]]),
            columns_chart("Width / height of images", shapes, "1:4    1:2    1:1    2:1    4:1".split(" ")),
        )
    )


def _run(content: Mapping[str, Any]) -> str:
    """Returns when, how long and with what the figures were made."""
    facts: dict[str, Any] = {"seconds": f"{content['seconds']:.1f}"} if "seconds" in content else {}
    facts |= {f"energy, {name}": f"{value:.3g} Wh" for name, value in content.get("energy_wh", {}).items()}
    speed = {f"{name}, ms per image": f"{value:.2f}" for name, value in content["speed_ms"].items()}
    parts = {"Time": facts | speed, "Versions": content.get("versions", {}), "Options": content.get("options", {})}
    parts["Hyperparameters"] = content.get("hyperparameters", {})
    return "".join(f"<h3>{title}</h3>{_pairs(values.items())}" for title, values in parts.items() if values)


def _pairs(values: Iterable[tuple[str, Any]]) -> str:
    lines = "".join(
        f"<div><dt>{escape(printable(name))}</dt><dd>{escape(printable(value))}</dd></div>" for name, value in values
    )
    return f'<dl class="options">{lines}</dl>'
