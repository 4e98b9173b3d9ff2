"""The evaluation loop: a model over a loader's batches, to metrics, losses, timings, tables, files and images.

Used by val.py, and by training after every epoch. Loads nothing and chooses nothing: model, loader and names are
handed in. Predictions and labels are compared in each image's own pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.boxes import Detections, scale_boxes, xywhn2xyxy
from utils.errors import UserError
from utils.eval.coco import (
    CocoFigures,
    ImageRecord,
    coco_figures,
    detection_rows,
    figure_lines,
    result_numbers,
)
from utils.eval.report import HEADER, speed_line, table_rows
from utils.files import atomic_write
from utils.log import LOGGER, progress
from utils.media.writers import LabelWriter, OutputStems
from utils.metrics import IOU_THRESHOLDS, APResult, ConfusionMatrix, ap_per_class, fitness, match_detections
from utils.nms import NMSConfig
from utils.plots import output_to_target
from utils.plots.evaluation import load_libraries, plot_evaluation
from utils.process import Background

DRAWN_BATCHES = 3
NMS = NMSConfig(conf_thres=0.001, iou_thres=0.6, multi_label=True)  # of validation; mAP needs weak detections too
MANY_CLASSES = 50  # from here on the table lists single classes only with `verbose`


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate, and what to write; the defaults are those of validation.

    Attributes:
        single_cls: treat all classes as one.
        save_dir: where files go; needed for plots and the save options.
        plots: draw curves, the confusion matrix and the first batches.
        save_txt, save_conf: write detections as label files, with confidences.
        save_hybrid: labels join the candidates of NMS, sure of themselves; the figures then mean nothing.
        save_json: write detections as COCO results to `json_name`.
        json_name: that file's name.
        categories: category of every class for the JSON, where `annotations` does not tell; None takes class numbers.
        annotations: COCO annotation file. Where it exists and has the data set's class names, the JSON carries its
            numbers of categories; where it lists all images as well, theirs, and mAP is what COCO's computation says.
        coco_metrics: compute and log COCO's twelve metrics.
        keep_records: return what each image has, for `utils.eval.figures` and the report.
        verbose: list single classes even when they are many.
        training: log the overall row alone.
        quiet: log no figures at all.
    """

    single_cls: bool = False
    save_dir: Path | None = None
    plots: bool = False
    save_txt: bool = False
    save_conf: bool = False
    save_hybrid: bool = False
    save_json: bool = False
    json_name: str = "predictions.json"
    categories: Sequence[int] | None = None
    annotations: Path | None = None
    coco_metrics: bool = False
    keep_records: bool = False
    verbose: bool = False
    training: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """Refuses files without a folder."""
        if self.save_dir is None and (self.plots or self.save_txt or self.save_json):
            raise ValueError("plots, save_txt and save_json need a save_dir")


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        precision, recall: class means at the confidence of the best mean F1, at IoU 0.5; NaN where there are no labels,
            as of map50, map and maps.
        map50, map: mean average precision at IoU 0.5 and over 0.5 to 0.95.
        losses: the terms of `compute_loss`; three zeros without it.
        maps: (nc,) average precision of each class; a class without labels has the overall one.
        speed_ms: milliseconds per image of pre-processing, inference and NMS.
        seen: images evaluated.
        alarmed: of those without labels, how many have detections that the confusion matrix counts.
        details: figures and curves of each class.
        confusion: the confusion matrix.
        coco: COCO's figures, when asked for.
        records: each image's detections and labels, when they, COCO's figures or a JSON were asked for.
        categories: the category of every class in the JSON, when one was asked for.
        names: name of every class.
    """

    precision: float
    recall: float
    map50: float
    map: float
    losses: tuple[float, ...]
    maps: np.ndarray
    speed_ms: tuple[float, float, float]
    seen: int
    alarmed: int
    details: APResult
    confusion: ConfusionMatrix
    coco: CocoFigures | None = None
    records: list[ImageRecord] = field(default_factory=list)
    categories: Sequence[int] | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def fitness(self) -> float:
        """The single figure by which checkpoints are compared."""
        return float(fitness(np.array([self.as_tuple()]))[0])

    def as_tuple(self) -> tuple[float, ...]:
        """(P, R, mAP50, mAP50-95, terms of the loss: box, objectness and class of YOLOv5's)."""
        return (self.precision, self.recall, self.map50, self.map, *self.losses)


def evaluate(
    predictor: Any,
    loader: Any,
    *,
    names: Mapping[int, str],
    compute_loss: Callable[[Sequence[torch.Tensor], torch.Tensor], Any] | None = None,
    callbacks: Any = None,
    **options: Any,
) -> EvalResult:
    """Evaluates a model on a data set, logs the table of results and writes what is asked for.

    Args:
        predictor: `models.inference.predictor.Predictor` of the model, which says how detections are chosen; not
            imported, since it stands above this room.
        loader: sized iterable of `Batch`es: uint8 images (b, 3, h, w), targets (m, 6), paths, shapes.
        names: name of every class.
        compute_loss: for backends that keep raw outputs (`ModuleBackend`): called with the outputs in float32 and the
            targets; the second item of what it returns holds the terms (three, unless it has `terms`).
        callbacks: object whose `run(hook, ...)` is called at the `on_val_*` hooks.
        **options: the fields of `EvalOptions`.

    Raises:
        UserError: a file cannot be written, a threshold is out of range, or COCO's library is missing.
    """
    settings = EvalOptions(**options)
    if settings.single_cls and len(names) != 1:
        names = {0: "item"}
    keep_records = settings.keep_records or settings.save_json or settings.coco_metrics
    metrics = _MetricAccumulator(len(names), keep_records)
    losses = torch.zeros(len(getattr(compute_loss, "terms", ("box", "obj", "cls"))))
    largest_shape: tuple[int, ...] = (0, 3, 0, 0)
    seconds_before = list(predictor.seconds.values())
    writer = LabelWriter(settings.save_dir / "labels", settings.save_conf) if settings.save_txt else None
    stems = OutputStems(_paths_of(loader) if writer else ())
    notify = callbacks.run if callbacks else lambda *_: None
    notify("on_val_start")
    leave = not (settings.training or settings.quiet)
    with Background(_draw_batch) as plots:  # while the next batches are computed
        if settings.plots:
            plots.put(None, (), names, {})
        for number, batch in enumerate(progress(loader, total=len(loader), desc=HEADER, leave=leave)):
            notify("on_val_batch_start")
            largest_shape = max(largest_shape, tuple(batch.images.shape))
            found = predictor.predict(batch.images.numpy(), _known_boxes(batch) if settings.save_hybrid else ())
            if settings.single_cls:
                for detections in found:
                    detections[:, 5] = 0
            if compute_loss is not None:
                raw = [layer.float() for layer in predictor.backend.raw]
                loss = compute_loss(raw, batch.targets.to(raw[0].device))[1].detach()
                losses = losses.to(loss.device) + loss
            for record, detections in zip(_native_records(batch, found), found, strict=True):
                metrics.add(record)
                if writer:
                    writer.write(stems[record.path], Detections.from_rows(record.detections), record.shape_hw)
                notify("on_val_image_end", detections, record.detections, record.path, names, batch.images)
            if settings.plots and number < DRAWN_BATCHES:
                labels, pred = (settings.save_dir / f"val_batch{number}_{kind}.jpg" for kind in ("labels", "pred"))
                plots.put(batch.images, batch.paths, names, {labels: batch.targets, pred: output_to_target(found)})
            notify("on_val_batch_end")
        seconds = [after - before for after, before in zip(predictor.seconds.values(), seconds_before, strict=True)]
        speed_ms = tuple(1e3 * taken / max(metrics.seen, 1) for taken in seconds)
        result = metrics.result(tuple((losses / max(len(loader), 1)).tolist()), speed_ms, settings.coco_metrics)
        result = replace(result, names=names)
        result = _finish(result, names, settings, largest_shape, writer, stems)
    notify("on_val_end")
    return result


def _paths_of(loader: Any) -> Sequence[str]:
    """Returns the paths of all images, as far as they are known at the beginning: a script may bring mere batches."""
    table = getattr(getattr(loader, "dataset", None), "table", None)
    return () if table is None else table.image_paths


def _known_boxes(batch: Any) -> list[torch.Tensor]:
    """Returns for each image of a batch its labels (m, 5) [class, x, y, w, h in pixels of the padded image]."""
    height, width = batch.images.shape[2:]
    scale = torch.tensor([1, width, height, width, height])
    return [batch.targets[batch.targets[:, 0] == image, 1:] * scale for image in range(len(batch.images))]


def _native_records(batch: Any, found: Sequence[np.ndarray]) -> Iterator[ImageRecord]:
    """Takes detections and labels of a batch to each image's own pixels.

    Labels go through the padded image's pixels as the detections do, so that rounding and clipping treat both alike.

    Args:
        batch: b images with targets (m, 6) [image, class, x, y, w, h normalised] and shapes.
        found: b arrays (k, 6) in pixels of the padded image.
    """
    targets = batch.targets.numpy()
    padded_hw = tuple(batch.images.shape[2:])
    for index, (path, shape, detections) in enumerate(zip(batch.paths, batch.shapes, found, strict=True)):
        image_hw, ratio_pad = shape
        mine = targets[targets[:, 0] == index]
        labels_xyxy = xywhn2xyxy(mine[:, 2:6], w=padded_hw[1], h=padded_hw[0])
        labels = np.concatenate((mine[:, 1:2], scale_boxes(padded_hw, labels_xyxy, image_hw, ratio_pad)), 1)
        boxes_xyxy = scale_boxes(padded_hw, detections[:, :4], image_hw, ratio_pad)
        yield ImageRecord(path, tuple(image_hw), np.concatenate((boxes_xyxy, detections[:, 4:]), 1), labels)


class _MetricAccumulator:
    """Adds up images: right and wrong detections, label classes, the confusion matrix, records if wanted."""

    def __init__(self, nc: int, keep_records: bool):
        self.nc = nc
        self.seen = self.alarmed = 0
        self.confusion = ConfusionMatrix(nc)
        self.records: list[ImageRecord] = []
        self._keep_records = keep_records
        self._correct = [np.zeros((0, len(IOU_THRESHOLDS)), dtype=bool)]
        self._scores = [np.zeros((0, 2), dtype=np.float32)]  # confidence, class
        self._label_classes = [np.zeros(0, dtype=np.float32)]

    def add(self, record: ImageRecord) -> None:
        self.seen += 1
        self._correct.append(match_detections(record.detections, record.labels))
        self._scores.append(record.detections[:, 4:6])
        self._label_classes.append(record.labels[:, 0])
        self.confusion.process_batch(record.detections, record.labels)
        self.alarmed += not len(record.labels) and bool((record.detections[:, 4] > self.confusion.conf).any())
        if self._keep_records:
            self.records.append(record)

    def result(self, losses: tuple[float, ...], speed_ms: tuple[float, ...], coco: bool) -> EvalResult:
        scores = np.concatenate(self._scores)
        labels = np.concatenate(self._label_classes)
        details = ap_per_class(np.concatenate(self._correct), scores[:, 0], scores[:, 1], labels)
        measured = 1.0 if details.label_counts.sum() else np.nan
        return EvalResult(
            precision=measured * details.mean_precision,
            recall=measured * details.mean_recall,
            map50=measured * details.map50,
            map=measured * details.map,
            losses=losses,
            maps=measured * details.maps(self.nc),
            speed_ms=speed_ms,
            seen=self.seen,
            alarmed=self.alarmed,
            details=details,
            confusion=self.confusion,
            coco=coco_figures(self.records, self.nc) if coco else None,
            records=self.records,
        )


def _draw_batch(images: Any, paths: Sequence[str], names: Mapping[int, str], boxes: Mapping[Path, Any]) -> None:
    """Draws a batch once for each file, with the boxes that belong there; without images it loads what that takes."""
    if images is None:
        load_libraries()
        return
    from utils.plots import plot_images

    for file, some in boxes.items():
        plot_images(images, some, paths, file, names)


def _finish(
    result: EvalResult,
    names: Mapping[int, str],
    settings: EvalOptions,
    shape: Sequence[int],
    writer: LabelWriter | None,
    stems: Mapping[str, str],
) -> EvalResult:
    """Logs what was found, and writes plots and the JSON; returns the result, with COCO's mAP where that applies."""
    if not settings.quiet:
        _report(result, names, settings, shape)
    if writer:
        _tell_labels(writer, stems)
    if settings.plots:
        plot_evaluation(result.details, result.confusion, names, settings.save_dir)
    return _save_json(result, names, settings) if settings.save_json else result


def _report(result: EvalResult, names: Mapping[int, str], settings: EvalOptions, shape: Sequence[int]) -> None:
    """Logs the table, the speed and COCO's figures."""
    per_class = len(names) > 1 and (settings.verbose or (len(names) < MANY_CLASSES and not settings.training))
    for row in table_rows(result.details, names, result.seen, per_class):
        LOGGER.info(row)
    if not result.details.label_counts.sum():
        found, conf = result.confusion.matrix[:-1, -1].sum(), result.confusion.conf
        LOGGER.warning(
            f"WARNING: without labels there is no P, R or mAP. Detections above confidence {conf:g}: {found}, in "
            f"{result.alarmed} of {result.seen} images; they are false alarms where the images are backgrounds"
        )
    if result.coco:
        LOGGER.info("\n".join(figure_lines(result.coco)))
    if not settings.training:
        LOGGER.info(speed_line(result.speed_ms, shape))


def _tell_labels(writer: LabelWriter, stems: Mapping[str, str]) -> None:
    """Logs how many label files were written, and that names are not the images' where several have one."""
    LOGGER.info(f"{writer.written} labels saved to {writer.folder}")
    renamed = [(path, stem) for path, stem in stems.items() if stem != Path(path).stem]
    if renamed:
        path, stem = renamed[0]
        LOGGER.warning(
            f"WARNING: {len(renamed)} of the images have the name of another: their label files are numbered, "
            f"{stem}.txt is of {path}"
        )


def _save_json(result: EvalResult, names: Mapping[int, str], settings: EvalOptions) -> EvalResult:
    """Writes the JSON; returns the result with COCO's mAP where there are annotations that fit."""
    paths = [record.path for record in result.records]
    default = settings.categories or range(len(names))
    ids, categories, truth = result_numbers(paths, names, default, settings.annotations)
    file = settings.save_dir / settings.json_name
    records = zip(result.records, ids, strict=True)
    rows = [row for record, image in records for row in detection_rows(image, record.detections, categories)]
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(rows), encoding="utf-8")
    LOGGER.info(f"Detections saved to {file}")
    result = replace(result, categories=list(categories))
    if truth is None:
        return result
    try:
        figures = truth.figures(rows, ids, categories)
    except UserError as error:
        LOGGER.warning(f"WARNING: COCO's annotations were not used for mAP: {error}")
        return result
    LOGGER.info("\n".join([f"COCO's figures by {settings.annotations}:", *figure_lines(figures)]))
    return replace(result, map=figures.ap, map50=figures.ap50, coco=figures)
