"""What val.py's options ask for: one evaluation, or the series that `--task speed` and `--task study` are.

A script may bring its own model, batches and callbacks (`Given`). Not here: the options themselves (`val.py`), models
and data made ready (`models.validation`), the evaluation (`utils.eval.evaluate`).
"""

from __future__ import annotations

import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from models.backends import Backend, runtime_of, weight_files
from models.backends.base import AUGMENT_NEEDS_CHECKPOINT
from models.tiling import TiledPredictor, make_tiled_loader
from models.validation import (
    PAD_STRIDES,
    Shape,
    Subject,
    check_classes,
    check_half,
    held_subject,
    image_shape,
    make_loader,
    open_subject,
)
from utils.checks import UserError
from utils.cli import newest_weights
from utils.data.loader import DetectionLoader
from utils.data.spec import SPLITS, DataSpec, load_spec
from utils.devices import select_device
from utils.eval.coco import category_ids, require_coco_tools
from utils.eval.evaluate import EvalResult, evaluate
from utils.eval.plots import plot_study
from utils.eval.predictor import AugmentedPredictor, ModulePredictor, Predictor
from utils.files import ROOT, atomic_write, increment_path, run_folder
from utils.log import LOGGER, colorstr
from utils.tiles import Tiling

SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
SPEED = {"conf_thres": 0.25, "iou_thres": 0.45, "save_json": False, "plots": False}  # as in use, not as in scoring
STUDY_SIZES_PX = tuple(range(256, 1537, 128))
STUDY_COLUMN = "%10.4g"
PASSED_ON = "conf_thres iou_thres max_det single_cls verbose plots save_txt save_conf save_hybrid coco_metrics".split()


@dataclass(frozen=True)
class Given:
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


NOTHING = Given()


def perform(options: Namespace, given: Given = NOTHING) -> EvalResult:
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
        return validate(options, _open(options, _files(options), precision(options)), given)
    if options.weights:
        raise UserError("val.run: give weights or a model, not both.")
    return validate(options, held_subject(given.model), given)


def validate(options: Namespace, subject: Subject, given: Given = NOTHING) -> EvalResult:
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
        LOGGER.info(f"Results saved to {colorstr(str(folder), 'bold')}")
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
    tables, studies = [], {}
    for (file, subject), source in zip(opened, data, strict=True):
        results = _results_by_size(changed(options, data=source, plots=False), file, subject, sizes_px)
        rows = np.array([(*result.as_tuple(), *result.speed_ms) for result in results])
        name = Path(source).stem if isinstance(source, (str, Path)) else "data"
        tables.append(_write_table(_unused(f"study_{name}_{Path(file).stem}", tables), rows))
        studies[tables[-1].stem.removeprefix(f"study_{name}_")] = rows
    with atomic_write("study.zip") as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for table in tables:
            archive.write(table)
    written = [*map(str, tables), "study.zip"]
    if options.plots:
        plot_study(studies, sizes_px, Path("study.png"))
        written.append("study.png")
    LOGGER.info(f"Study saved to {', '.join(written)}")
    return results[-1]


def _results_by_size(
    options: Namespace, file: str | Path, subject: Subject, sizes_px: Sequence[int]
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


def training_data(subject: Subject) -> str:
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


def _files(options: Namespace) -> list[str | Path]:
    """Returns the files that `--weights` names, or the newest checkpoint."""
    weights = options.weights
    return ([weights] if isinstance(weights, (str, Path)) else list(weights)) if weights else [newest_weights(ROOT)]


def _open(options: Namespace, files: Sequence[str | Path], dtype: torch.dtype) -> Subject:
    """Opens one model, or the ensemble of several."""
    files = weight_files(files)
    if options.augment and (options.dnn or runtime_of(files[0]) != "pytorch"):
        raise UserError(AUGMENT_NEEDS_CHECKPOINT)
    return open_subject(files, options.device, dtype, options.dnn)


def _open_each(options: Namespace) -> list[tuple[str | Path, Subject]]:
    """Opens each model on its own, before the first is evaluated: checkpoints in float16 where the device has it."""
    opened = []
    for file in _files(options):
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


def _check_combination(options: Namespace, subject: Subject, given: Given) -> None:
    """Makes sure that options and what a script brings go together.

    Raises:
        UserError: they do not.
    """
    module = isinstance(given.model, nn.Module)
    if options.save_hybrid and (options.tile or subject.nms or getattr(given.model, "chosen", False)):
        where = "--tile" if options.tile else f"NMS inside {subject.path}"
        raise UserError(f"--save-hybrid puts labels among the rows of whole pictures, which {where} does not leave.")
    if options.tile and given.loader is not None:
        raise UserError("--tile cuts pictures of full size: give no dataloader.")
    if given.compute_loss and (not module or options.augment or options.tile):
        raise UserError("compute_loss needs a PyTorch model's raw outputs: give model, and neither augment nor tile.")
    if given.model is not None and not module and precision(options) != torch.float32:
        raise UserError("--half and --bf16 are for files and PyTorch modules: this model computes as it was made.")


def _warn_of_inner_nms(subject: Subject, options: Namespace) -> None:
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
        f"--max-det {options.max_det} change nothing"
    )


def _data(options: Namespace, subject: Subject, given: Given, split: str) -> DataSpec | None:
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


def _start_loader(options: Namespace, subject: Subject, spec: DataSpec, shape: Shape, split: str) -> DetectionLoader:
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
    model: nn.Module | Predictor, device: torch.device, options: Namespace, subject: Subject, shape: Shape | None
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
            chosen = {name: getattr(options, name) for name in ("batch_size", "conf_thres", "iou_thres", "max_det")}
            tiling = Tiling(options.tile, options.tile_overlap)
            chosen.update(agnostic=options.single_cls, pad=_pad_of(options))
            model = TiledPredictor(model, tiling, shape, subject.stride, **chosen)
        yield model


def _is_coco(data: Any) -> bool:
    """Tells whether a data set is COCO itself, whose results are wanted as JSON."""
    return isinstance(data, (str, Path)) and Path(data).name == "coco.yaml"


def _run_folder(options: Namespace, given: Given, save_json: bool) -> Path | None:
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
