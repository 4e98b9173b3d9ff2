"""val.py's tasks: evaluation of models of any format on a split (train, val, test), and series (speed, study).

What a model's file says of itself is read first; then the data loader starts, so that its processes are there before a
runtime is, and decodes while the model is built. The evaluation loop itself is `utils.eval.evaluate`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.backends import Backend, ModelFile, open_model, runtime_of
from models.backends.base import AUGMENT_NEEDS_CHECKPOINT
from models.backends.pytorch import ModuleBackend
from models.inference.predictor import Predictor
from utils.cli import find_weights
from utils.dataloaders.config import SPLITS, DataSpec, load_spec
from utils.dataloaders.labels import load_labels
from utils.dataloaders.loader import DetectionLoader, create_dataloader, full_size_loader
from utils.devices import gpus_in_use, select_device, versions_here
from utils.energy import EnergyMeter
from utils.errors import UserError
from utils.eval.coco import Annotations, category_ids, require_coco_tools
from utils.eval.evaluate import EvalResult, evaluate
from utils.eval.figures import metrics_content, write_metrics
from utils.eval.report_page import write_report
from utils.files import atomic_write, find_file, increment_path, run_folder
from utils.images import inference_hw
from utils.log import LOGGER, colorstr
from utils.nms import NMSConfig
from utils.plots import plot_val_study
from utils.tiles import Tiling

SERIES = ("speed", "study")
PAD_STRIDES = 0.5  # border that rectangular batches get, in strides
SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
SPEED = {"conf_thres": 0.25, "iou_thres": 0.45, "save_json": False, "plots": False}  # as in use, not as in scoring
STUDY_SIZES_PX = tuple(range(256, 1537, 128))
STUDY_COLUMN = "%10.4g"
ANNOTATIONS = Path("annotations", "instances_val2017.json")  # looked for in the data set's folder
BROUGHT = "model dataloader save_dir callbacks compute_loss".split()  # fields of ValConfig that are no options
FOR_EVALUATE = "single_cls verbose plots save_txt save_conf save_hybrid coco_metrics".split()

Shape = int | tuple[int, int]  # the long side of rectangles, or height and width of every image, px


@dataclass
class ValConfig:
    """val.py's options, under their names and with their meanings; then what scripts bring instead.

    Attributes:
        model: a PyTorch module as `ModuleBackend` takes it, or a runtime of `models.backends`; None for `weights`.
        dataloader: sized iterable of `Batch`es; None for the split of `data`.
        save_dir: the run's folder; None for a new one in `project`.
        callbacks, compute_loss: as `evaluate` takes them.
    """

    data: Any
    weights: str | Path | Sequence[str | Path]
    batch_size: int
    imgsz: int | Sequence[int] | None
    conf_thres: float
    iou_thres: float
    max_det: int
    tile: int | None
    tile_overlap: float
    task: str
    device: str
    workers: int
    single_cls: bool
    augment: bool
    verbose: bool
    save_txt: bool
    save_hybrid: bool
    save_conf: bool
    save_json: bool
    annotations: str
    coco_metrics: bool
    project: str
    name: str
    exist_ok: bool
    half: bool
    bf16: bool
    dnn: bool
    plots: bool
    model: nn.Module | Backend | None = None
    dataloader: Any = None
    save_dir: str | Path | None = None
    callbacks: Any = None
    compute_loss: Callable[..., Any] | None = None

    @property
    def nms(self) -> NMSConfig:
        """How detections are chosen: every class of a box that is likely enough counts."""
        return NMSConfig(self.conf_thres, self.iou_thres, self.max_det, agnostic=self.single_cls, multi_label=True)

    @property
    def pad(self) -> float:
        """The border that rectangles get, in strides."""
        return 0.0 if self.task == "speed" else PAD_STRIDES


def run_validation(config: ValConfig) -> EvalResult:
    """Does the task that `config` names; returns the last evaluation's result.

    Raises:
        UserError: options that do not go together, or what they name cannot be used.
    """
    if config.coco_metrics or config.annotations:
        require_coco_tools()  # missed before the work, not after it
    if config.half and config.bf16:
        raise UserError("--half and --bf16: choose one of them.")
    if config.save_hybrid:
        config = replace(config, save_txt=True)
        LOGGER.warning("WARNING: --save-hybrid: labels count as detections, so that P, R and mAP mean nothing")
    if config.task in SERIES:
        brought = (config.model, config.dataloader, config.save_dir, config.callbacks, config.compute_loss)
        if any(one is not None for one in brought):
            raise UserError(f"--task {config.task} opens models and data by itself: give weights and data alone.")
        return speed(config) if config.task == "speed" else study(config)
    if config.task not in SPLITS:
        raise UserError(f"--task '{config.task}': one of {', '.join((*SPLITS, *SERIES))} is expected.")
    if config.conf_thres > SOUND_CONFIDENCE:
        LOGGER.warning(f"WARNING: --conf-thres {config.conf_thres} is above {SOUND_CONFIDENCE}: mAP comes out too low")
    if config.model is None:
        return validate(config, _open(config, config.weights))
    if config.weights:
        raise UserError("val.run: give weights or a model, not both.")
    return validate(config, _given_model(config))


def validate(config: ValConfig, model: ModelFile) -> EvalResult:
    """Evaluates a model on a split of a data set, and writes what is asked for."""
    _check_combination(config, model)
    annotations = _annotations(config.annotations) if config.annotations else None
    _warn_of_inner_nms(model)
    split = config.task if config.task in SPLITS else "val"
    spec = _data(config, model, split)
    with ExitStack() as stack:
        loader, shape = config.dataloader, 0
        if loader is None:
            shape = val_shape(model, config.imgsz)
            common = {"task": split, "workers": config.workers, "single_cls": config.single_cls, "need_labels": False}
            batches = {"batch_size": config.batch_size, "pad": config.pad}
            seen = None if config.tile else shape
            loader = make_loader(spec, seen, model.metadata.stride, **batches, **common).start()
            stack.callback(loader.close)
        table = getattr(getattr(loader, "dataset", None), "table", None)  # a script may bring mere batches
        if annotations:  # refused before the work, not after it
            annotations.category_ids({0: "item"} if config.single_cls else spec.names)
            annotations.image_ids(list(table.image_paths))
        predictor = _predictor(config, model, shape)  # while the loader decodes
        is_coco = isinstance(config.data, (str, Path)) and Path(config.data).name == "coco.yaml"
        save_json = config.save_json or annotations is not None or (config.task != "speed" and is_coco)
        folder = _run_folder(config, save_json)
        meter = stack.enter_context(EnergyMeter(gpus_in_use()))
        result = evaluate(
            predictor,
            loader,
            names=spec.names if spec else model.metadata.names,
            compute_loss=config.compute_loss,
            callbacks=config.callbacks,
            save_dir=folder,
            save_json=save_json,
            json_name=f"{model.path.stem}_predictions.json",
            categories=category_ids(spec.val, spec.names) if spec and not config.single_cls else None,
            annotations=annotations.path if annotations else spec.root / ANNOTATIONS if spec else None,
            keep_records=folder is not None,
            **{name: getattr(config, name) for name in FOR_EVALUATE},
        )
        about = {
            "model": str(model.path),
            "data": str(spec.source or spec.root) if spec else None,
            "split": split,
            "imgsz": shape or None,
            "seconds": round(meter.seconds, 3),
            "energy_wh": meter.watt_hours(),
            "versions": versions_here(torch.device("cpu")) | {"device": predictor.backend.device},
            "options": {name: value for name, value in vars(config).items() if name not in BROUGHT},
        }
    if folder is not None:
        content = metrics_content(result, about)
        write_metrics(folder / "metrics.json", content)
        if config.plots:
            write_report(folder / "report.html", content, result, {} if table is None else {split: table})
        LOGGER.info(f"Results saved to {colorstr('bold', folder)}")
    return result


def speed(config: ValConfig) -> EvalResult:
    """Measures each model as it is in use: thresholds of detection, no border, nothing written but label files."""
    config = replace(config, **SPEED)
    limits = f"confidence {config.conf_thres}, IoU {config.iou_thres}, no border, no plots, no JSON"
    for model in _open_each(config):
        LOGGER.info(f"speed: {model.path} at {limits}")
        result = validate(config, model)
    return result


def study(config: ValConfig) -> EvalResult:
    """Evaluates each model at many image sizes; writes tables, a zip of them and a plot to the current folder.

    A table has a row for each size: P, R, mAP50, mAP50-95, box, obj, cls loss, ms pre-process, inference, NMS.
    """
    sizes_px = [config.imgsz] if isinstance(config.imgsz, int) else config.imgsz or STUDY_SIZES_PX
    models = _open_each(config)
    for model in models:
        if not model.metadata.dynamic:
            raise UserError(
                f"--task study goes through image sizes, and {model.path} takes one: export it with --dynamic."
            )
    data = [config.data or training_data(model) for model in models]
    tables: list[str] = []
    for model, source in zip(models, data, strict=True):
        backend, results = model.build(), []
        for size_px in sizes_px:
            LOGGER.info(f"study: {model.path} at {size_px} px")
            of_size = replace(config, data=source, imgsz=[size_px], plots=False)
            results.append(validate(of_size, replace(model, build=lambda built=backend: built)))
        name = Path(source).stem if isinstance(source, (str, Path)) else "data"
        tables.append(unused_name(f"study_{name}_{model.path.stem}", tables))
        rows = [(*result.as_tuple(), *result.speed_ms) for result in results]
        lines = [" ".join(STUDY_COLUMN % value for value in row) for row in rows]
        with atomic_write(f"{tables[-1]}.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [f"{table}.txt" for table in tables]
    with atomic_write("study.zip") as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file)
    if config.plots:
        plot_val_study(files, x=sizes_px)
    written = [*files, "study.zip", *(["study.png"] if config.plots else [])]
    LOGGER.info(f"Study saved to {', '.join(written)}")
    return results[-1]


def unused_name(name: str, taken: Sequence[str]) -> str:
    """Returns a name, or `name_2`, `name_3`, ... where it is taken."""
    return next(one for one in (name, *(f"{name}_{number}" for number in range(2, len(taken) + 2))) if one not in taken)


def module_predictor(module: nn.Module, nms: NMSConfig, dtype: torch.dtype | None = None) -> Predictor:
    """Returns a predictor of a PyTorch module as it is, for batches of a data loader; `dtype` as `ModuleBackend`'s."""
    return Predictor(ModuleBackend(module, dtype), nms)


def val_shape(model: ModelFile, imgsz: int | Sequence[int] | None) -> Shape:
    """Returns how images are to be brought to size: rectangles of a long side, or all padded to one height and width.

    Args:
        model: the model.
        imgsz: the long side; or height and width; None for the model's only one, else 640.

    Raises:
        UserError: more than two sides, or not the ones that the model takes.
    """
    said = model.metadata
    height, width = inference_hw(imgsz, said.stride, None if said.dynamic else said.shape_hw)
    if model.trained_px and model.trained_px != max(height, width):
        LOGGER.info(f"Image size {max(height, width)}; the checkpoint was trained at {model.trained_px}")
    one_side = imgsz is None or isinstance(imgsz, int) or len(imgsz) < 2
    return height if one_side and said.dynamic else (height, width)


def check_classes(model: ModelFile, spec: DataSpec, single_cls: bool = False) -> None:
    """Makes sure that model and data set speak of the same classes.

    Raises:
        UserError: their numbers differ.
    """
    if single_cls:
        return
    names = model.metadata.names
    if len(names) != spec.nc:
        hint = " It tells one class only: add --single-cls if that is meant." if len(names) == 1 else ""
        raise UserError(
            f"{model.path} knows {len(names)} classes, the data set {spec.source or spec.root} has {spec.nc}: "
            f"choose the data set that it was trained on.{hint}"
        )
    if not model.metadata.has_names:
        LOGGER.warning(f"WARNING: {model.path} does not name its classes: the data set's names are used")
        return
    differing = [class_id for class_id in spec.names if names.get(class_id) != spec.names[class_id]]
    if differing:
        old, new = names.get(differing[0]), spec.names[differing[0]]
        LOGGER.warning(f"WARNING: {len(differing)} class names are not the checkpoint's: '{new}' was '{old}', ...")


def make_loader(
    spec: DataSpec,
    shape: Shape | None,
    stride: int,
    *,
    task: str = "val",
    batch_size: int = 32,
    workers: int = 8,
    single_cls: bool = False,
    pad: float = PAD_STRIDES,
    need_labels: bool = True,
) -> DetectionLoader:
    """Makes the loader of a split.

    Args:
        spec: the data set.
        shape: rectangular batches for a long side, every image padded to a height and width; None: single images as
            they are, which a predictor with tiling takes.
        stride: the model's.
        task: the split.
        batch_size, workers, single_cls: as the options.
        pad: border that rectangular batches get, in strides.
        need_labels: as `load_labels`'.
    """
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    if shape is None:
        return full_size_loader(table, workers)
    return create_dataloader(table, shape, batch_size, stride, pad=pad, rect=isinstance(shape, int), workers=workers)[0]


def training_data(model: ModelFile) -> str:
    """Returns the data set YAML that a model was trained on.

    Raises:
        UserError: its file does not say, or it is gone.
    """
    data = model.metadata.data
    if not data:
        raise UserError(f"{model.path} does not say which data set it was trained on: give --data.")
    if os.path.isabs(data) and not os.path.isfile(data):
        raise UserError(f"{model.path} was trained on {data}, which is not there: give --data.")
    LOGGER.info(f"No --data given: validating on {data}, which {model.path.name} was trained on")
    return data


def _open(config: ValConfig, weights: str | Path | Sequence[str | Path]) -> ModelFile:
    """Opens one model, or the ensemble of several, in the precision that is asked for."""
    path = find_weights(weights)[0]
    runtime = "opencv" if config.dnn else runtime_of(path)
    if config.augment and runtime != "pytorch":
        raise UserError(AUGMENT_NEEDS_CHECKPOINT)
    if (config.half or config.bf16) and runtime not in ("pytorch", "openvino"):
        raise UserError(
            f"{'--half' if config.half else '--bf16'}: {path} is computed in the precision that it was exported in. "
            "The option is for checkpoints (.pt) and OpenVINO; export.py --half makes smaller files."
        )
    if runtime == "pytorch":
        _check_half(config, select_device(config.device))
    return open_model(weights, config.device, config.half, config.dnn, config.bf16)


def _open_each(config: ValConfig) -> list[ModelFile]:
    """Opens each model on its own, before the first is evaluated: checkpoints in float16 where the device has it."""
    opened = []
    for file in find_weights(config.weights):
        half = config.half
        if not (config.half or config.bf16 or config.dnn) and runtime_of(file) == "pytorch":
            half = select_device(config.device).type == "cuda"
            LOGGER.info(f"{config.task}: {file} in {'float16' if half else 'float32 (float16 needs a CUDA GPU)'}")
        opened.append(_open(replace(config, half=half), file))
    return opened


def _given_model(config: ValConfig) -> ModelFile:
    """Describes the model that a script has brought."""
    backend = config.model
    if isinstance(backend, nn.Module):
        _check_half(config, next(backend.parameters(), torch.empty(0)).device)
        backend = ModuleBackend(backend, torch.float16 if config.half else torch.bfloat16 if config.bf16 else None)
    return ModelFile(Path("model"), backend.metadata, None, lambda: backend)


def _check_half(config: ValConfig, device: torch.device) -> None:
    if config.half and device.type != "cuda":
        raise UserError(f"--half (float16) needs a CUDA GPU, this is {device.type}: use --bf16, or neither.")


def _check_combination(config: ValConfig, model: ModelFile) -> None:
    """Refuses options, and what a script brings, that do not go together."""
    module = isinstance(config.model, nn.Module)
    if config.save_hybrid and (config.tile or model.metadata.nms):
        where = "--tile" if config.tile else f"NMS inside {model.path}"
        raise UserError(f"--save-hybrid puts labels among the rows of whole images, which {where} does not leave.")
    if config.tile and config.dataloader is not None:
        raise UserError("--tile cuts images of full size: give no dataloader.")
    if config.compute_loss and (not module or config.augment or config.tile):
        raise UserError("compute_loss needs a PyTorch model's raw outputs: give model, and neither augment nor tile.")
    if config.annotations and (config.task not in SPLITS or config.dataloader is not None):
        raise UserError("--annotations is for the images of a split: give --data, and --task train, val or test.")
    if config.model is not None and not module and (config.half or config.bf16):
        raise UserError("--half and --bf16 are for files and PyTorch modules: this model computes as it was made.")


def _annotations(file: str) -> Annotations:
    """Reads the file of `--annotations`."""
    path = find_file(file, (".json",), "--annotations")
    try:
        return Annotations(path)
    except UserError as error:
        raise UserError(f"--annotations {error}") from error


def _warn_of_inner_nms(model: ModelFile) -> None:
    """Says what NMS inside the model does to the figures."""
    inside = model.metadata.nms
    if inside is None:
        return
    fixed = f"--iou-thres and --max-det above {inside.max_det} change nothing"
    if inside.iou_thres == 1:  # chosen by the network, not by NMS
        LOGGER.info(f"{model.path} chooses its boxes itself: {fixed}")
        return
    LOGGER.warning(
        f"WARNING: NMS is inside {model.path} (confidence above {inside.conf_thres}, IoU {inside.iou_thres}, at most "
        f"{inside.max_det} detections): mAP comes out lower than without it, and {fixed}"
    )


def _data(config: ValConfig, model: ModelFile, split: str) -> DataSpec | None:
    """Reads the data set's description; None where neither batches nor names are wanted of it."""
    names = model.metadata.names
    if config.dataloader is not None and not config.data:
        if not names:
            raise UserError("val.run: the model does not name its classes: give data.")
        return None
    need = () if config.dataloader is not None else (split,)
    spec = load_spec(config.data or training_data(model), need=need)
    if names:
        check_classes(model, spec, config.single_cls)
    return spec


def _predictor(config: ValConfig, model: ModelFile, shape: Shape) -> Predictor:
    """Builds the model, and makes it a predictor that looks at images as the options say; `shape` 0 for a loader's."""
    backend = model.build()
    if shape:
        backend.warm_up(*((shape, shape) if isinstance(shape, int) else shape))
    tiling = Tiling(config.tile, config.tile_overlap) if config.tile else None
    how = {"tiling": tiling, "augment": config.augment, "val_pad": config.pad, "max_batch": config.batch_size}
    return Predictor(backend, config.nms, shape, **how)


def _run_folder(config: ValConfig, save_json: bool) -> Path | None:
    """Makes the folder of the run; in a series only where something is to be written to it."""
    if config.save_dir is not None:
        folder = Path(config.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if config.task in SPLITS or config.save_txt or save_json:
        return increment_path(run_folder(config.project, config.name), config.exist_ok, mkdir=True)
    return None
