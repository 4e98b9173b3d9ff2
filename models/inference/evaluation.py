"""Models of any format made ready for evaluation, tiled validation, and val.py's tasks (val, speed, study).

A tiled image goes through the model window by window, each brought to the model's size as plain validation brings an
image, so that an image no larger than a tile gives the same detections either way. The evaluation loop itself is
`utils.eval.evaluate`.
"""

from __future__ import annotations

import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.backends import Backend, open_model, runtime_of
from models.backends.base import AUGMENT_NEEDS_CHECKPOINT
from models.backends.pytorch import ModuleBackend
from models.inference.predictor import Predictor
from utils.cli import find_weights
from utils.dataloaders.config import SPLITS, DataSpec, load_spec
from utils.dataloaders.labels import load_labels
from utils.dataloaders.loader import DetectionLoader, create_dataloader, full_size_loader
from utils.devices import select_device
from utils.errors import UserError
from utils.eval.coco import category_ids, require_coco_tools
from utils.eval.evaluate import EvalResult, evaluate
from utils.files import atomic_write, increment_path, run_folder
from utils.images import DEFAULT_IMGSZ, inference_hw
from utils.log import LOGGER, colorstr
from utils.nms import NMSConfig
from utils.plots import plot_val_study
from utils.tiles import Tiling

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


def given_eval_model(model: nn.Module | Backend, dtype: torch.dtype | None = None) -> EvalModel:
    """Describes a model that is in memory already.

    Args:
        model: a PyTorch module, or a runtime of `models.backends`.
        dtype: what a module computes in, as `ModuleBackend` takes it.
    """
    backend = model if isinstance(model, Backend) else ModuleBackend(model, dtype)
    said = backend.metadata
    return EvalModel(
        Path("model"),
        said.names,
        named=True,
        stride=said.stride,
        shape_hw=None if backend.dynamic else said.shape_hw,
        data="",
        trained_px=None,
        nms=said.nms,
        build=lambda: backend,
    )


def module_predictor(module: nn.Module, nms: NMSConfig, dtype: torch.dtype | None = None) -> Predictor:
    """Returns a predictor of a PyTorch module as it is, for batches of a data loader; `dtype` as `ModuleBackend`'s."""
    return Predictor(ModuleBackend(module, dtype), nms)


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
    height, width = inference_hw(imgsz, subject.stride, subject.shape_hw)
    if subject.trained_px and subject.trained_px != max(height, width):
        LOGGER.info(f"Image size {max(height, width)}; the checkpoint was trained at {subject.trained_px}")
    both = subject.shape_hw or not (imgsz is None or isinstance(imgsz, int) or len(imgsz) < 2)
    return (height, width) if both else height


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


def make_tiled_loader(
    spec: DataSpec, *, task: str = "val", workers: int = 8, single_cls: bool = False, need_labels: bool = True
) -> DetectionLoader:
    """Makes the loader of a split's whole images, which a predictor with tiling takes."""
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    return full_size_loader(table, workers)


SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
SPEED = {"conf_thres": 0.25, "iou_thres": 0.45, "save_json": False, "plots": False}  # as in use, not as in scoring
STUDY_SIZES_PX = tuple(range(256, 1537, 128))
STUDY_COLUMN = "%10.4g"
PASSED_ON = "single_cls verbose plots save_txt save_conf save_hybrid coco_metrics".split()


@dataclass(frozen=True)
class Overrides:
    """What a script made itself, in place of what the options name; None for what it leaves to them.

    Attributes:
        model: a PyTorch module as `ModuleBackend` takes it, or a runtime of `models.backends`.
        loader: sized iterable of `Batch`es.
        save_dir: the run's folder.
        callbacks, compute_loss: as `evaluate` takes them.
    """

    model: nn.Module | Backend | None = None
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
    if isinstance(given.model, nn.Module):
        check_half(precision(options), next(given.model.parameters(), torch.empty(0)).device)
    return validate(options, given_eval_model(given.model, precision(options)), given)


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
        predictor = _predictor(options, subject, shape)  # while the loader decodes
        save_json = options.save_json or (options.task != "speed" and _is_coco(options.data))
        folder = _run_folder(options, given, save_json)
        result = evaluate(
            predictor,
            loader,
            names=spec.names if spec else subject.names,
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


def _predictor(options: Namespace, subject: EvalModel, shape: Shape | None) -> Predictor:
    """Builds the model, and makes it a predictor that looks at images as the options say."""
    backend = subject.build()
    if shape is not None:
        backend.warm_up(*((shape, shape) if isinstance(shape, int) else shape))
    nms = NMSConfig(options.conf_thres, options.iou_thres, options.max_det, options.single_cls, multi_label=True)
    tiling = Tiling(options.tile, options.tile_overlap) if options.tile else None
    how = {"tiling": tiling, "augment": options.augment, "val_pad": _pad_of(options), "max_batch": options.batch_size}
    return Predictor(backend, nms, DEFAULT_IMGSZ if shape is None else shape, **how)


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
