"""Does an export agree with its checkpoint, and what does it cost in accuracy?

Both run on the same real images: a few of the data set's (or of data/images), and from them one turned upright, one
darkened and one tiny. Raw predictions and the detections after NMS are compared. For int8 what counts is the mAP.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from models.backends import ModelFile, open_model
from models.export.formats import Tolerance
from models.export.job import ExportJob
from models.inference.evaluation import check_classes, make_loader
from models.inference.predictor import Predictor
from utils.boxes import box_iou, xywh2xyxy
from utils.dataloaders.config import load_spec
from utils.errors import UserError
from utils.eval.evaluate import NMS, evaluate
from utils.images import ImageError, letterbox, read_image
from utils.log import LOGGER
from utils.nms import NMSConfig

SAMPLES = 4  # taken from the data set as they are
DARKNESS, TINY_PX = 0.15, 40
BATCH = 3
SAME_IOU = 0.95
BEST_ROWS = 100  # of each image, compared box by box however unsure they are: images may show none of the classes
MAX_MARGIN = 0.1  # above the confidence threshold; less confident detections than that may be on one side only
DEFAULT_NMS = NMSConfig(conf_thres=0.25, iou_thres=0.45, max_det=300, agnostic=False)


@dataclass
class Parity:
    """How far an export is from its checkpoint; starts at "not at all" and grows with each comparison.

    Attributes:
        box_px: largest difference of a box coordinate in rows above the confidence threshold.
        boxes: boxes of raw rows compared, BEST_ROWS of each image.
        moved: those of them that lie elsewhere: beyond the limit of box_px, and with an IoU below 0.95.
        score: largest difference of objectness or a class probability.
        confidence: largest difference of the confidences of matched detections.
        detections: detections compared, of both sides.
        missed: those of them without a counterpart of IoU 0.95 and equal class.
        raw: "rows" or "maps" where the model's raw output was compared, else empty.
        images: number of images.
        broken: in words, what makes the outputs incomparable.
    """

    box_px: float = 0.0
    boxes: int = 0
    moved: int = 0
    score: float = 0.0
    confidence: float = 0.0
    detections: int = 0
    missed: int = 0
    raw: str = ""
    images: int = 0
    broken: list[str] = field(default_factory=list)

    def problems(self, tolerance: Tolerance) -> list[str]:
        """Returns in words what is beyond the limits."""
        unmatched = self.missed / max(self.detections, 1)
        measured = (
            ("boxes differ by {:.3g} px", self.box_px, tolerance.box_px),
            ("a share of {:.2g} of the raw boxes lies elsewhere", self.moved / max(self.boxes, 1), tolerance.unmatched),
            ("scores differ by {:.3g}", self.score, tolerance.score),
            ("confidences of detections differ by {:.3g}", self.confidence, tolerance.score),
            ("a share of {:.2g} of the detections has no counterpart", unmatched, tolerance.unmatched),
        )
        beyond = [f"{text.format(value)} (limit {limit:g})" for text, value, limit in measured if not value <= limit]
        if not (self.raw or self.detections or self.broken) and tolerance.unmatched < 1:
            beyond.append(
                "nothing was compared, as nothing was detected in the images. Give --data, whose images show the "
                "classes, or a lower --conf-thres"
            )
        return self.broken + beyond

    def summary(self) -> str:
        """Returns a line about what was compared."""
        if self.raw == "maps":
            return f"{self.images} images: probabilities in the maps within {self.score:.2g}"
        same = f"{self.boxes - self.moved} of {self.boxes} raw boxes in place"
        rows = f"scores within {self.score:.2g}, {same}; " if self.raw else ""
        found = "nothing detected in them"
        if self.detections:
            same = f"{self.detections - self.missed} of {self.detections} detections"
            found = f"{same} have one of IoU {SAME_IOU} and equal class, confidences within {self.confidence:.2g}"
            found += f", boxes within {self.box_px:.2g} px" if self.raw else ""
        return f"{self.images} images: {rows}{found}"


def opened(exported: str | Path | ModelFile, device: str) -> ModelFile:
    """Returns an exported file or folder, opened on a device unless its exporter has done so."""
    return exported if isinstance(exported, ModelFile) else open_model(exported, device)


def check_parity(
    job: ExportJob, exported: Path | ModelFile, images: Sequence[np.ndarray], tolerance: Tolerance
) -> Parity:
    """Runs the checkpoint and an exported file on images and compares them.

    Args:
        job: what was exported.
        exported: the exported file or folder.
        images: uint8 (h, w, 3) BGR of any size.
        tolerance: its `score` also says which detections are too near the threshold to be expected on both sides.

    Raises:
        UserError: the file cannot be loaded or run.
    """
    parity = Parity()
    if job.config.train:
        for inputs in model_inputs(images, job):
            _compare_maps(parity, job, exported, inputs)
        return parity
    backend = opened(exported, job.run_device).build()
    for inputs in model_inputs(images, job):
        rows = run_checkpoint(job, inputs)
        output = np.asarray(torch.as_tensor(backend.predict(inputs)).float().cpu())
        parity.images += len(inputs)
        if not backend.has_nms:
            _compare_rows(parity, rows, output, tolerance)
        if not parity.broken:
            found = output if backend.has_nms else DEFAULT_NMS.suppress(output)
            _compare_detections(parity, job, rows, found, min(tolerance.score, MAX_MARGIN))
    return parity


def sample_images(paths: Sequence[str | Path]) -> list[np.ndarray]:
    """Reads a few images, evenly spread over `paths`, and adds a turned, a dark and a tiny one made of them.

    Returns:
        uint8 (h, w, 3) BGR each.

    Raises:
        UserError: none of those tried can be read.
    """
    places = np.unique(np.linspace(0, len(paths) - 1, min(SAMPLES, len(paths))).round().astype(int))
    images, reason = [], "there is none"
    for place in places:
        try:
            images.append(read_image(paths[place]))
        except ImageError as error:
            reason = f"{paths[place]}: {error}"
            LOGGER.warning(f"WARNING: left out of the comparison: {reason}")
    if not images:
        raise UserError(f"no image to compare with: {reason}")
    turned = np.ascontiguousarray(np.rot90(images[0]))
    dark = (images[1 % len(images)] * DARKNESS).astype(np.uint8)
    large = images[2 % len(images)]
    scale = TINY_PX / max(large.shape[:2])
    tiny = cv2.resize(large, [max(round(side * scale), 1) for side in large.shape[1::-1]], interpolation=cv2.INTER_AREA)
    return [*images, turned, dark, tiny]


def model_inputs(images: Sequence[np.ndarray], job: ExportJob) -> Iterator[np.ndarray]:
    """Yields batches uint8 (b, 3, h, w) RGB: padded to the shape and, where sizes are free, each as a rectangle too."""
    shape_hw, stride = job.metadata.shape_hw, job.metadata.stride
    free = job.metadata.dynamic or job.format.argument == "yolov5"
    if free:
        for image in images:
            yield _channels_first([letterbox(image, shape_hw, auto=True, stride=stride).image])
    padded = [letterbox(image, shape_hw, auto=False).image for image in images]
    yield _channels_first(padded[-BATCH:] if free else padded)


def _channels_first(images: Sequence[np.ndarray]) -> np.ndarray:
    """Turns images (h, w, 3) BGR of one size into (b, 3, h, w) RGB."""
    return np.ascontiguousarray(np.stack(images)[..., ::-1].transpose(0, 3, 1, 2))


def run_checkpoint(job: ExportJob, images: np.ndarray) -> np.ndarray:
    """Returns the checkpoint's rows (b, n, 5 + nc) for images, uint8 (b, 3, h, w) RGB."""
    with torch.inference_mode():
        return job.source(torch.from_numpy(images).float() / 255)[0].numpy()


def _compare_rows(parity: Parity, rows: np.ndarray, output: np.ndarray, tolerance: Tolerance) -> None:
    """Takes in the differences of raw rows (b, n, 5 + nc)."""
    parity.raw = "rows"
    if rows.shape != output.shape:
        parity.broken.append(f"the output is {output.shape} instead of {rows.shape}")
        return
    if not np.isfinite(output).all():
        parity.broken.append("the output holds values that are no numbers")
        return
    difference = np.abs(rows - output)
    confidence = rows[..., 4] * rows[..., 5:].max(axis=2)
    sure = confidence > DEFAULT_NMS.conf_thres
    for image, best in enumerate(np.argsort(-confidence, axis=1, kind="stable")[:, :BEST_ROWS]):
        far = difference[image, best, :4].max(axis=1) > tolerance.box_px
        own, other = (xywh2xyxy(side[image, best[far], :4]) for side in (rows, output))
        parity.boxes += len(best)
        parity.moved += int((np.diag(box_iou(own, other)) < SAME_IOU).sum())
    parity.box_px = max(parity.box_px, float(difference[sure][:, :4].max(initial=0)))
    parity.score = max(parity.score, float(difference[..., 4:].max(initial=0)))


def _compare_detections(
    parity: Parity, job: ExportJob, rows: np.ndarray, output: Sequence[np.ndarray], margin: float
) -> None:
    """Takes in how many detections of each side the other lacks.

    Args:
        parity: is added to.
        job: says how detections were chosen.
        rows: the checkpoint's, (b, n, 5 + nc).
        output: the export's detections of each image, (k, 6), possibly filled up with zeros.
        margin: detections whose confidence exceeds the threshold by less are not missed.
    """
    nms = job.metadata.nms or DEFAULT_NMS
    expected = replace(nms, max_det=rows.shape[1]).suppress(rows)
    for all_own, padded in zip(expected, output, strict=True):
        own = all_own[_rank_in_class(all_own[:, 5]) < job.config.topk_per_class] if job.metadata.nms else all_own
        own, found = own[: nms.max_det], padded[padded[:, 4] > 0]
        for first, second in ((own, found), (found, own)):
            full = len(second) >= nms.max_det
            floor = margin + max(nms.conf_thres, float(second[-1, 4]) if full else 0.0)
            _match(parity, first[first[:, 4] > floor], second)


def _match(parity: Parity, first: np.ndarray, second: np.ndarray) -> None:
    """Takes in which of the detections `first` (k, 6) have a counterpart in `second` (m, 6)."""
    same = box_iou(first[:, :4], second[:, :4]) >= SAME_IOU
    same &= first[:, None, 5] == second[None, :, 5]
    parity.detections += len(first)
    parity.missed += int((~same.any(axis=1)).sum())
    gaps = np.where(same, np.abs(first[:, None, 4] - second[None, :, 4]), np.inf).min(axis=1, initial=np.inf)
    parity.confidence = max(parity.confidence, float(gaps[np.isfinite(gaps)].max(initial=0)))


def _rank_in_class(classes: np.ndarray) -> np.ndarray:
    """Returns for each detection (k,), most confident first, how many of its class come before it."""
    return np.array([int((classes[:place] == number).sum()) for place, number in enumerate(classes)], dtype=int)


def _compare_maps(parity: Parity, job: ExportJob, path: Path, images: np.ndarray) -> None:
    """Takes in the differences of the undecoded maps that a file of --train gives, as probabilities."""
    parity.raw, parity.images = "maps", parity.images + len(images)
    size = len(images) if job.metadata.dynamic else job.metadata.batch
    filled = images[np.arange(math.ceil(len(images) / size) * size) % len(images)]  # the last ones are repeats
    for start in range(0, len(filled), size):
        part = filled[start : start + size]
        with torch.inference_mode():
            expected = job.source(torch.from_numpy(part).float() / 255)[1]
        for own, other in zip(expected, _run_maps(job, path, part), strict=True):
            difference = own.sigmoid() - torch.as_tensor(other).float().cpu().sigmoid()
            parity.score = max(parity.score, float(difference.abs().max()))


def _run_maps(job: ExportJob, path: Path, images: np.ndarray) -> Sequence[np.ndarray | torch.Tensor]:
    """Runs a file of --train, which no backend takes for a detector, on images uint8 (b, 3, h, w) RGB."""
    dtype = torch.float16 if job.config.half else torch.float32
    inputs = (torch.from_numpy(images).float() / 255).to(dtype)
    if job.format.argument == "torchscript":
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore", FutureWarning)  # torch has deprecated TorchScript
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path, map_location=job.device)(inputs.to(job.device))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})


BATCH_SIZE = 16
WORKERS = 0  # exporters leave threads behind that forked loader processes might hang on


def compare_map(
    weights: str | Path,
    exported: str | Path | ModelFile,
    data: str | Path,
    shape_hw: tuple[int, int],
    device: str = "",
) -> tuple[float, float]:
    """Returns the mAP50-95 of a checkpoint and of its export on a data set's validation split.

    Both get the same batches: images padded to the export's shape, or rectangles where it takes any. Where detections
    are chosen inside the export, the checkpoint's are chosen in the same way.

    Args:
        weights: the checkpoint.
        exported: the file or folder made of it.
        data: data set YAML.
        shape_hw: height and width that it was exported for, px; a dynamic one gets rectangles of the longer side.
        device: where both run; empty chooses.

    Raises:
        UserError: a file, the data set or the device is not there, or the classes are not the data set's.
    """
    spec = load_spec(data, need=("val",), download=False)
    models = [open_model(weights, device), opened(exported, device)]
    for model in models:
        check_classes(model, spec)
    said = models[1].metadata
    shape = max(shape_hw) if said.dynamic else said.shape_hw
    loader = make_loader(spec, shape, said.stride, batch_size=BATCH_SIZE, workers=WORKERS)
    try:
        judged = [Predictor(model.build(), nms) for model, nms in zip(models, (said.nms or NMS, NMS), strict=True)]
        found = [evaluate(predictor, loader, names=spec.names, quiet=True).map for predictor in judged]
    finally:
        loader.close()
    return found[0], found[1]
