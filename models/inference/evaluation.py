"""Models of any format made ready for evaluation, tiled validation, and val.py's tasks (val, speed, study).

A tiled image goes through the model window by window, each brought to the model's size as plain validation brings an
image, so that an image no larger than a tile gives the same detections either way. The evaluation loop itself is
`utils.eval.evaluate`.
"""

from __future__ import annotations

import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from models.backends import Backend, open_model, runtime_of
from models.backends.base import AUGMENT_NEEDS_CHECKPOINT
from utils.boxes import scale_boxes
from utils.cli import find_weights
from utils.dataloaders.config import SPLITS, DataSpec, load_spec
from utils.dataloaders.dataset import ShapeInfo, rectangular_batches
from utils.dataloaders.labels import load_labels
from utils.dataloaders.loader import DetectionLoader, create_dataloader, full_size_loader
from utils.devices import select_device
from utils.errors import MIN_GRID_STRIDE, UserError, check_image_size, grid_stride
from utils.eval.coco import category_ids, require_coco_tools
from utils.eval.evaluate import AugmentedPredictor, EvalResult, ModulePredictor, Predictor, evaluate
from utils.files import atomic_write, increment_path, run_folder
from utils.images import letterbox, resized_wh
from utils.log import LOGGER, colorstr
from utils.nms import NMSConfig
from utils.plots import plot_val_study
from utils.tiles import Tiling, merge, windows

DEFAULT_PX = 640
PAD_STRIDES = 0.5  # border that rectangular batches get, in strides
REDUCED = {torch.float16: "--half", torch.bfloat16: "--bf16"}

Shape = int | tuple[int, int]  # the long side of rectangles, or height and width of every image, px


@dataclass(frozen=True)
class EvalModel:
    """A model to be evaluated, as far as its data depend on it.

    Attributes:
        path: the file or folder.
        names: class names {number: name}.
        named: whether the file itself says these names; else they only count the classes.
        stride: what the sides of images must be multiples of, px.
        shape_hw: the only height and width that it takes; None for any.
        data: the data set YAML that it was trained on; empty when the file does not say.
        trained_px: the image size that it was trained at; None when the file does not say.
        nms: how detections are chosen inside; None for raw rows.
        build: makes it ready to run: a runtime of `models.backends`, or the model that was held.
    """

    path: Path
    names: dict[int, str]
    named: bool
    stride: int
    shape_hw: tuple[int, int] | None
    data: str
    trained_px: int | None
    nms: NMSConfig | None
    build: Callable[[], Any]


def open_eval_model(
    weights: str | Path | Sequence[str | Path],
    device: str = "",
    dtype: torch.dtype = torch.float32,
    dnn: bool = False,
) -> EvalModel:
    """Opens a checkpoint or an export; or several checkpoints, as one model.

    Args:
        weights: a file of any format, or a released checkpoint's name; several make an ensemble, which is known by the
            first one's path, data set and size.
        device: as `--device`; empty chooses.
        dtype: bfloat16 or float16 where the format leaves the choice: checkpoints, and OpenVINO by what it can.
        dnn: run an ONNX file in OpenCV.

    Raises:
        UserError: it cannot be loaded, the device or the precision is not for it, or the models of an ensemble do not
            have the same classes.
    """
    path = find_weights(weights)[0]
    if dtype in REDUCED and (dnn or runtime_of(path) not in ("pytorch", "openvino")):
        raise UserError(
            f"{REDUCED[dtype]}: {path} is computed in the precision that it was exported in. The option is for "
            "checkpoints (.pt) and OpenVINO; export.py --half makes smaller files."
        )
    if runtime_of(path) == "pytorch":
        check_half(dtype, select_device(device))
    opened = open_model(weights, device, dtype == torch.float16, dnn, dtype == torch.bfloat16)
    said = opened.metadata
    return EvalModel(
        opened.path,
        said.names,
        named=said.has_names,
        stride=said.stride,
        shape_hw=None if said.dynamic else said.shape_hw,
        data=said.data,
        trained_px=opened.trained_px,
        nms=said.nms,
        build=opened.build,
    )


def given_eval_model(model: Any) -> EvalModel:
    """Describes a model that is in memory already.

    Args:
        model: a PyTorch module or a predictor; what it says of `names` and `stride` is taken.
    """
    names = getattr(model, "names", {})
    stride = getattr(model, "stride", MIN_GRID_STRIDE)
    said = getattr(model, "metadata", None)  # of a runtime
    return EvalModel(
        Path("model"),
        dict(names) if isinstance(names, Mapping) else dict(enumerate(names)),
        named=True,
        stride=grid_stride([stride] if isinstance(stride, int) else stride),
        shape_hw=said.shape_hw if said and not model.dynamic else None,
        data="",
        trained_px=None,
        nms=said.nms if said else None,
        build=lambda: model,
    )


def check_half(dtype: torch.dtype, device: torch.device) -> None:
    """Makes sure that a device computes in float16 where that is wanted.

    Raises:
        UserError: it does not.
    """
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError(f"--half (float16) needs a CUDA GPU, this is {device.type}: use --bf16, or neither.")


def image_shape(subject: EvalModel, imgsz: int | Sequence[int] | None) -> Shape:
    """Returns how images are to be brought to size: rectangles of a long side, or all padded to one height and width.

    Args:
        subject: the model.
        imgsz: the long side; or height and width; None for the model's only one, else 640.

    Raises:
        UserError: more than two sides, or not the ones that the model takes.
    """
    sides = [] if imgsz is None else [imgsz] if isinstance(imgsz, int) else list(imgsz)
    if len(sides) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: one side, or height and width, are expected.")
    if subject.shape_hw:
        fixed = tuple(subject.shape_hw)
        if sides and (sides[0], sides[-1]) != fixed:
            wanted, only = "x".join(map(str, sides)), "x".join(map(str, fixed))
            raise UserError(
                f"--imgsz {wanted}: {subject.path} takes images of {only} px (height x width) only: leave --imgsz out, "
                "or export with --dynamic."
            )
        return fixed
    sides = sides or [DEFAULT_PX]
    if subject.trained_px and subject.trained_px != max(sides):
        LOGGER.info(f"Image size {max(sides)}; the checkpoint was trained at {subject.trained_px}")
    checked = check_image_size(sides if len(sides) == 2 else sides[0], subject.stride)
    return checked if isinstance(checked, int) else tuple(checked)


def check_classes(subject: EvalModel, spec: DataSpec, single_cls: bool = False) -> None:
    """Makes sure that model and data set speak of the same classes.

    Raises:
        UserError: their numbers differ.
    """
    if single_cls:
        return
    known = len(subject.names)
    if known != spec.nc:
        hint = " It tells one class only: add --single-cls if that is meant." if known == 1 else ""
        raise UserError(
            f"{subject.path} knows {known} classes, the data set {spec.source or spec.root} has {spec.nc}: "
            f"choose the data set that it was trained on.{hint}"
        )
    if not subject.named:
        LOGGER.warning(f"WARNING: {subject.path} does not name its classes: the data set's names are used")
        return
    differing = [class_id for class_id in spec.names if subject.names.get(class_id) != spec.names[class_id]]
    if differing:
        old, new = subject.names.get(differing[0]), spec.names[differing[0]]
        LOGGER.warning(f"WARNING: {len(differing)} class names are not the checkpoint's: '{new}' was '{old}', ...")


def make_loader(
    subject: EvalModel,
    spec: DataSpec,
    shape: Shape,
    *,
    task: str = "val",
    batch_size: int = 32,
    workers: int = 8,
    single_cls: bool = False,
    pad: float = PAD_STRIDES,
    need_labels: bool = True,
) -> DetectionLoader:
    """Makes the loader of a split: rectangular batches for a long side, else every image padded to height and width.

    `pad` is the border that rectangular batches get, in strides; `need_labels` is `load_labels`'.
    """
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    rect = isinstance(shape, int)
    return create_dataloader(table, shape, batch_size, subject.stride, pad=pad, rect=rect, workers=workers)[0]


class View(NamedTuple):
    """A window of a picture, letterboxed."""

    image: np.ndarray  # uint8 (3, h, w) RGB
    window_xyxy: np.ndarray  # (4,) int, where in the picture, px
    shape: ShapeInfo  # what leads back to the window

    def in_picture(self, detections: np.ndarray) -> np.ndarray:
        """Takes detections (k, 6) from the letterboxed window's px to the picture's."""
        original_hw, ratio_pad = self.shape
        boxes_xyxy = scale_boxes(self.image.shape[1:], detections[:, :4], original_hw, ratio_pad)
        return np.concatenate((boxes_xyxy + np.tile(self.window_xyxy[:2], 2), detections[:, 4:]), 1, dtype=np.float32)


class TiledPredictor:
    """Detects in one whole picture at a time, tile by tile.

    Its `infer` does all the work, suppression included; so the times of an evaluation show it under inference.
    """

    has_nms = True

    def __init__(
        self,
        predictor: Predictor,
        tiling: Tiling,
        shape: Shape,
        stride: int,
        *,
        pad: float = PAD_STRIDES,
        batch_size: int = 32,
        nms: NMSConfig,
    ) -> None:
        """Takes a model and how it is to be used.

        Args:
            predictor: the model.
            tiling: how pictures are cut.
            shape: long side of the windows as the model sees them, or height and width that all are padded to, px.
            stride: what those sides must be multiples of.
            pad: border that windows get where `shape` is a long side, in strides.
            batch_size: most windows in one run of the model.
            nms: how detections are chosen, in a window and in the image.
        """
        self._predictor, self._tiling = predictor, tiling
        self._shape, self._stride, self._pad = shape, stride, pad
        self._batch_size, self._nms = batch_size, nms

    def preprocess(self, images: np.ndarray) -> list[View]:
        """Cuts one picture, uint8 (1, 3, h, w) RGB, into letterboxed windows."""
        (picture,) = images
        return [
            letterboxed_window(picture, window_xyxy, self._shape, self._stride, self._pad)
            for window_xyxy in windows(*picture.shape[1:], self._tiling)
        ]

    def infer(self, inputs: Sequence[View]) -> np.ndarray:
        """Returns a picture's detections (1, k, 6) [x1, y1, x2, y2 in its px, confidence, class] from its windows."""
        found, windows_xyxy = [], []
        for batch in self._batches(inputs):
            for view, detections in zip(batch, self._detect(batch), strict=True):
                found.append(view.in_picture(detections))
                windows_xyxy.append(view.window_xyxy)
        if len(found) == 1:
            return found[0][None]
        return merge(found, np.stack(windows_xyxy), self._nms)[None]

    def synchronize(self) -> None:
        """Waits for the device."""
        self._predictor.synchronize()

    def _batches(self, views: Sequence[View]) -> Iterator[Sequence[View]]:
        """Yields views of one shape together, at most `batch_size` at a time."""
        by_shape: dict[tuple[int, ...], list[View]] = {}
        for view in views:
            by_shape.setdefault(view.image.shape, []).append(view)
        for alike in by_shape.values():
            for start in range(0, len(alike), self._batch_size):
                yield alike[start : start + self._batch_size]

    def _detect(self, batch: Sequence[View]) -> list[np.ndarray]:
        """Returns for each view its detections (k, 6) in px of the letterboxed window."""
        images = np.stack([view.image for view in batch])
        output: Any = self._predictor.infer(self._predictor.preprocess(images))
        if self._predictor.has_nms:
            return [self._nms.narrow(rows) for rows in np.asarray(output)]
        if isinstance(output, np.ndarray):  # suppressing many candidates is faster by far in torch
            output = torch.from_numpy(np.require(output, requirements="W"))
        return [detections.cpu().numpy() for detections in self._nms.suppress(output)]


def letterboxed_window(
    picture: np.ndarray, window_xyxy: np.ndarray, shape: Shape, stride: int, pad: float = PAD_STRIDES
) -> View:
    """Cuts a window out of a picture and brings it to the model's size, as plain validation does a picture of its own.

    Args:
        picture: uint8 (3, h, w) RGB.
        window_xyxy: (4,) int, px.
        shape: long side of the result before padding, or its height and width, px.
        stride: what the result's sides are multiples of.
        pad: border where `shape` is a long side, in strides.
    """
    left, top, right, bottom = window_xyxy.tolist()
    cut = np.ascontiguousarray(picture[:, top:bottom, left:right].transpose(1, 2, 0))
    width, height = right - left, bottom - top
    fitting_wh = resized_wh((width, height), shape)
    if fitting_wh != (width, height):
        shrinks = max(fitting_wh) < max(width, height)
        cut = cv2.resize(cut, fitting_wh, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    padded_hw = shape
    if isinstance(shape, int):
        padded_hw = rectangular_batches(np.array([[width, height]]), 1, shape, stride, pad)[1][0].tolist()
    boxed = letterbox(cut, padded_hw, auto=False, scaleup=False)
    ratio_w, ratio_h = boxed.ratio
    ratio_hw = (cut.shape[0] * ratio_h / height, cut.shape[1] * ratio_w / width)
    image = np.ascontiguousarray(boxed.image.transpose(2, 0, 1))
    return View(image, window_xyxy, ShapeInfo((height, width), (ratio_hw, boxed.pad)))


def make_tiled_loader(
    spec: DataSpec, *, task: str = "val", workers: int = 8, single_cls: bool = False, need_labels: bool = True
) -> DetectionLoader:
    """Makes the loader of a split's whole pictures, which a `TiledPredictor` takes."""
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    return full_size_loader(table, workers)


SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
SPEED = {"conf_thres": 0.25, "iou_thres": 0.45, "save_json": False, "plots": False}  # as in use, not as in scoring
STUDY_SIZES_PX = tuple(range(256, 1537, 128))
STUDY_COLUMN = "%10.4g"
PASSED_ON = "conf_thres iou_thres max_det single_cls verbose plots save_txt save_conf save_hybrid coco_metrics".split()


@dataclass(frozen=True)
class Overrides:
    """What a script made itself, in place of what the options name; None for what it leaves to them.

    Attributes:
        model: a PyTorch module as `ModulePredictor` takes it, or any predictor.
        loader: sized iterable of `Batch`es.
        save_dir: the run's folder.
        callbacks, compute_loss: as `evaluate` takes them.
    """

    model: nn.Module | Predictor | None = None
    loader: Any = None
    save_dir: str | Path | None = None
    callbacks: Any = None
    compute_loss: Callable[..., Any] | None = None


NOTHING = Overrides()


def run_validation(options: Namespace, given: Overrides = NOTHING) -> EvalResult:
    """Does the task that val.py's options name; returns the last evaluation's result.

    Raises:
        UserError: options that do not go together, or what they name cannot be used.
    """
    if options.coco_metrics:
        require_coco_tools()  # missed before the work, not after it
    if options.save_hybrid:
        options = changed(options, save_txt=True)
        LOGGER.warning("WARNING: --save-hybrid: labels count as detections, so that P, R and mAP mean nothing")
    if options.task not in (*SPLITS, *SERIES):
        raise UserError(f"--task '{options.task}': one of {', '.join((*SPLITS, *SERIES))} is expected.")
    if options.task in SERIES:
        if given != NOTHING:
            raise UserError(f"--task {options.task} opens models and data by itself: give weights and data alone.")
        return SERIES[options.task](options)
    if options.conf_thres > SOUND_CONFIDENCE:
        LOGGER.warning(f"WARNING: --conf-thres {options.conf_thres} is above {SOUND_CONFIDENCE}: mAP comes out too low")
    if given.model is None:
        return validate(options, _open(options, options.weights, precision(options)), given)
    if options.weights:
        raise UserError("val.run: give weights or a model, not both.")
    return validate(options, given_eval_model(given.model), given)


def validate(options: Namespace, subject: EvalModel, given: Overrides = NOTHING) -> EvalResult:
    """Evaluates a model on a split of a data set, and writes what is asked for."""
    _check_combination(options, subject, given)
    _warn_of_inner_nms(subject, options)
    split = options.task if options.task in SPLITS else "val"
    spec = _data(options, subject, given, split)
    shape = image_shape(subject, options.imgsz) if given.loader is None else None
    with ExitStack() as stack:
        loader = given.loader
        if loader is None:
            loader = _start_loader(options, subject, spec, shape, split)
            stack.callback(loader.close)
        model = subject.build()  # while the loader decodes
        if isinstance(model, Backend) and shape is not None:
            model.warm_up(*((shape, shape) if isinstance(shape, int) else shape))
        device = _device_of(model)
        predictor = stack.enter_context(_predictor(model, device, options, subject, shape))
        save_json = options.save_json or (options.task != "speed" and _is_coco(options.data))
        folder = _run_folder(options, given, save_json)
        result = evaluate(
            predictor,
            loader,
            names=spec.names if spec else subject.names,
            device=device,
            compute_loss=given.compute_loss,
            callbacks=given.callbacks,
            save_dir=folder,
            save_json=save_json,
            json_name=f"{subject.path.stem}_predictions.json",
            categories=category_ids(spec.val, spec.names) if spec and not options.single_cls else None,
            annotations=spec.root / "annotations" / "instances_val2017.json" if spec else None,
            **{name: getattr(options, name) for name in PASSED_ON},
        )
    if folder is not None:
        LOGGER.info(f"Results saved to {colorstr('bold', folder)}")
    return result


def speed(options: Namespace) -> EvalResult:
    """Measures each model as it is in use: thresholds of detection, no border, nothing written but label files."""
    options = changed(options, **SPEED)
    limits = f"confidence {options.conf_thres}, IoU {options.iou_thres}, no border, no pictures, no JSON"
    for file, subject in _open_each(options):
        LOGGER.info(f"speed: {file} at {limits}")
        result = validate(options, subject)
    return result


def study(options: Namespace) -> EvalResult:
    """Evaluates each model at many image sizes; writes tables, a zip of them and a picture to the current folder."""
    sizes_px = [options.imgsz] if isinstance(options.imgsz, int) else options.imgsz or STUDY_SIZES_PX
    opened = _open_each(options)
    for file, subject in opened:
        if subject.shape_hw:
            raise UserError(f"--task study goes through image sizes, and {file} takes one: export it with --dynamic.")
    data = [options.data or training_data(subject) for _, subject in opened]
    tables = []
    for (file, subject), source in zip(opened, data, strict=True):
        results = _results_by_size(changed(options, data=source, plots=False), file, subject, sizes_px)
        rows = np.array([(*result.as_tuple(), *result.speed_ms) for result in results])
        name = Path(source).stem if isinstance(source, (str, Path)) else "data"
        tables.append(_write_table(_unused(f"study_{name}_{Path(file).stem}", tables), rows))
    with atomic_write("study.zip") as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for table in tables:
            archive.write(table)
    written = [*map(str, tables), "study.zip"]
    if options.plots:
        plot_val_study(tables, x=sizes_px)
        written.append("study.png")
    LOGGER.info(f"Study saved to {', '.join(written)}")
    return results[-1]


def _results_by_size(
    options: Namespace, file: str | Path, subject: EvalModel, sizes_px: Sequence[int]
) -> list[EvalResult]:
    """Evaluates a model, built once, at each size."""
    built = replace(subject, build=partial(_same, subject.build()))
    results = []
    for size_px in sizes_px:
        LOGGER.info(f"study: {file} at {size_px} px")
        results.append(validate(changed(options, imgsz=[size_px]), built))
    return results


SERIES = {"speed": speed, "study": study}


def changed(options: Namespace, **changes: Any) -> Namespace:
    """Returns the options with some of them changed."""
    return Namespace(**{**vars(options), **changes})


def precision(options: Namespace) -> torch.dtype:
    """Returns the number format that was asked for.

    Raises:
        UserError: two were.
    """
    if options.half and options.bf16:
        raise UserError("--half and --bf16: choose one of them.")
    return torch.float16 if options.half else torch.bfloat16 if options.bf16 else torch.float32


def training_data(subject: EvalModel) -> str:
    """Returns the data set YAML that a model was trained on.

    Raises:
        UserError: its file does not say, or it is gone.
    """
    if not subject.data:
        raise UserError(f"{subject.path} does not say which data set it was trained on: give --data.")
    if os.path.isabs(subject.data) and not os.path.isfile(subject.data):
        raise UserError(f"{subject.path} was trained on {subject.data}, which is not there: give --data.")
    LOGGER.info(f"No --data given: validating on {subject.data}, which {subject.path.name} was trained on")
    return subject.data


def _open(options: Namespace, weights: str | Path | Sequence[str | Path], dtype: torch.dtype) -> EvalModel:
    """Opens one model, or the ensemble of several."""
    if options.augment and (options.dnn or any(runtime_of(file) != "pytorch" for file in find_weights(weights))):
        raise UserError(AUGMENT_NEEDS_CHECKPOINT)
    return open_eval_model(weights, options.device, dtype, options.dnn)


def _open_each(options: Namespace) -> list[tuple[str | Path, EvalModel]]:
    """Opens each model on its own, before the first is evaluated: checkpoints in float16 where the device has it."""
    opened = []
    for file in find_weights(options.weights):
        dtype = precision(options)
        if dtype == torch.float32 and not options.dnn and runtime_of(file) == "pytorch":
            able = select_device(options.device).type == "cuda"
            dtype = torch.float16 if able else dtype
            LOGGER.info(f"{options.task}: {file} in {'float16' if able else 'float32 (float16 needs a CUDA GPU)'}")
        opened.append((file, _open(options, [file], dtype)))
    return opened


def _same(model: Any) -> Any:
    """Returns what it is given: the `build` of a model that is built."""
    return model


def _check_combination(options: Namespace, subject: EvalModel, given: Overrides) -> None:
    """Makes sure that options and what a script brings go together.

    Raises:
        UserError: they do not.
    """
    module = isinstance(given.model, nn.Module)
    if options.save_hybrid and (options.tile or subject.nms or getattr(given.model, "has_nms", False)):
        where = "--tile" if options.tile else f"NMS inside {subject.path}"
        raise UserError(f"--save-hybrid puts labels among the rows of whole pictures, which {where} does not leave.")
    if options.tile and given.loader is not None:
        raise UserError("--tile cuts pictures of full size: give no dataloader.")
    if given.compute_loss and (not module or options.augment or options.tile):
        raise UserError("compute_loss needs a PyTorch model's raw outputs: give model, and neither augment nor tile.")
    if given.model is not None and not module and precision(options) != torch.float32:
        raise UserError("--half and --bf16 are for files and PyTorch modules: this model computes as it was made.")


def _warn_of_inner_nms(subject: EvalModel, options: Namespace) -> None:
    """Says what NMS inside the model does to the figures."""
    inside = subject.nms
    if inside is None:
        return
    if inside.iou_thres == 1:  # chosen by the network, not by NMS
        LOGGER.info(
            f"{subject.path} chooses its boxes itself: --iou-thres and --max-det above {inside.max_det} change nothing"
        )
        return
    LOGGER.warning(
        f"WARNING: NMS is inside {subject.path} (confidence above {inside.conf_thres}, IoU {inside.iou_thres}, at most "
        f"{inside.max_det} detections): mAP comes out lower than without it, and --iou-thres {options.iou_thres} and "
        f"--max-det above {inside.max_det} change nothing"
    )


def _data(options: Namespace, subject: EvalModel, given: Overrides, split: str) -> DataSpec | None:
    """Reads the data set's description; None where neither batches nor names are wanted of it."""
    if given.loader is not None and not options.data:
        if not subject.names:
            raise UserError("val.run: the model does not name its classes: give data.")
        return None
    need = () if given.loader is not None else (split,)
    spec = load_spec(options.data or training_data(subject), need=need)
    if subject.names:
        check_classes(subject, spec, options.single_cls)
    return spec


def _start_loader(options: Namespace, subject: EvalModel, spec: DataSpec, shape: Shape, split: str) -> DetectionLoader:
    """Makes the loader of a split, or with `--tile` of its whole pictures, and lets it begin."""
    wanted = {"task": split, "workers": options.workers, "single_cls": options.single_cls, "need_labels": False}
    if options.tile:
        return make_tiled_loader(spec, **wanted).start()
    return make_loader(subject, spec, shape, batch_size=options.batch_size, pad=_pad_of(options), **wanted).start()


def _pad_of(options: Namespace) -> float:
    """Returns the border that rectangles get, in strides."""
    return 0.0 if options.task == "speed" else PAD_STRIDES


def _device_of(model: nn.Module | Predictor) -> torch.device:
    """Returns where a module's weights are; other models know it themselves."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _predictor(
    model: nn.Module | Predictor, device: torch.device, options: Namespace, subject: EvalModel, shape: Shape | None
) -> Iterator[Predictor]:
    """Makes a model a predictor that looks at images as the options say."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            dtype = precision(options)
            check_half(dtype, device)
            model = stack.enter_context(ModulePredictor(model, device, dtype))
        if options.augment:
            model = AugmentedPredictor(model)
        if options.tile:
            nms = NMSConfig(
                options.conf_thres, options.iou_thres, options.max_det, agnostic=options.single_cls, multi_label=True
            )
            chosen = {"pad": _pad_of(options), "batch_size": options.batch_size, "nms": nms}
            model = TiledPredictor(model, Tiling(options.tile, options.tile_overlap), shape, subject.stride, **chosen)
        yield model


def _is_coco(data: Any) -> bool:
    """Tells whether a data set is COCO itself, whose results are wanted as JSON."""
    return isinstance(data, (str, Path)) and Path(data).name == "coco.yaml"


def _run_folder(options: Namespace, given: Overrides, save_json: bool) -> Path | None:
    """Makes the folder of the run; in a series only where something is to be written to it."""
    if given.save_dir is not None:
        folder = Path(given.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if options.task in SPLITS or options.save_txt or save_json:
        return increment_path(run_folder(options.project, options.name), options.exist_ok, mkdir=True)
    return None


def _unused(stem: str, tables: Sequence[Path]) -> Path:
    """Returns the file of a table; models of one name get `_2`, `_3`, ..."""
    numbered = (Path(f"{stem}_{number}.txt" if number > 1 else f"{stem}.txt") for number in count(1))
    return next(file for file in numbered if file not in tables)


def _write_table(file: Path, rows: np.ndarray) -> Path:
    """Writes rows (n, 10) [P, R, mAP50, mAP50-95, box, obj, cls loss, ms pre-process, inference, NMS] as text."""
    lines = [" ".join(STUDY_COLUMN % value for value in row) for row in rows]
    with atomic_write(file) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
