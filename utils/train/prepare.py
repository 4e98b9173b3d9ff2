"""What a training run is made of, before it starts: sound options, labels, anchors, loaders.

Building the model itself is train.py's: nothing here knows `models`.

`--multi-scale`: another image size for every batch.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.augmentations.pixels import AugmentParams
from utils.autoanchor import check_anchors
from utils.autobatch import autobatch
from utils.dataloaders.config import SPLITS, DataSpec
from utils.dataloaders.dataset import DetectionDataset
from utils.dataloaders.labels import LabelTable, load_labels
from utils.dataloaders.loader import QUAD, DetectionLoader, create_loader
from utils.download import file_name_of
from utils.errors import UserError, check_image_size, grid_stride, round_up
from utils.eval.coco import COCO80_TO_91, category_ids
from utils.log import LOGGER
from utils.train.distributed import ALONE, World
from utils.train.fingerprint import dataset_record, versions_here
from utils.train.hyp import Hyp

COCO_IOU_THRES = 0.65
VAL_PAD = 0.5  # of a stride, around validation's rectangles
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS gives the same result every time


class Tables(NamedTuple):
    """The labels of both splits."""

    train: LabelTable
    val: LabelTable | None  # of the first process alone, which validates


class Loaders(NamedTuple):
    """Training and validation batches, and what they were made for."""

    train: Any
    val: Any  # None on other processes than the first
    imgsz: int  # image side in pixels
    grid_stride: int  # sides are multiples of it
    final: dict[str, Any]  # what the last validation is told beside the usual; something on COCO only
    dataset: dict[str, torch.Tensor]  # by which a checkpoint knows its data again; see `dataset_record`


def check_options(options: Namespace, world: World = ALONE) -> None:
    """Refuses combinations that no run can satisfy.

    Raises:
        UserError: no model is named, or options do not go with each other or with the number of processes.
    """
    batch_size, processes = options.batch_size, world.size
    several = processes > 1
    for refused, message in (
        (
            not (options.cfg or options.weights or options.resume),
            "neither --cfg nor --weights is given: name a model, for example --cfg yolov5s-slimneck.yaml.",
        ),
        (
            options.weights and not options.weights.endswith(".pt"),
            f"--weights {options.weights}: a checkpoint ending in .pt is expected here.",
        ),
        (
            batch_size == 0 or batch_size < -1,
            f"--batch-size {batch_size}: at least 1, or -1 for what the GPU's memory holds.",
        ),
        (
            options.quad and batch_size > 0 and batch_size % QUAD,
            f"--quad collates images by fours: --batch-size {batch_size} is not a multiple of 4.",
        ),
        (
            options.rect and options.image_weights,
            "--image-weights draws some images more often, and --rect keeps their order: leave one out.",
        ),
        (
            options.cache == "val" and options.noval,
            "--cache val keeps the validation images, and --noval reads them only once: leave one out.",
        ),
        (
            several and batch_size == -1,
            f"--batch-size -1 measures one GPU alone; for {processes} processes name a multiple of it.",
        ),
        (
            several and batch_size % processes,
            f"--batch-size {batch_size} is of all {processes} processes together: make it a multiple.",
        ),
        (
            several and options.image_weights,
            "--image-weights works in a single process only: leave it out, or start without a launcher.",
        ),
    ):
        if refused:
            raise UserError(message)


def settled_data(data: str | Mapping[str, Any], spec: DataSpec) -> str | dict[str, Any]:
    """Returns what `--data` means from any working folder: an absolute path, or a dict of absolute paths.

    Args:
        data: as given.
        spec: what it was read to.
    """
    if isinstance(data, Mapping):
        splits = {split: [str(path) for path in getattr(spec, split)] for split in SPLITS if data.get(split)}
        return {**data, "path": str(spec.root), **splits}
    if data.lower().endswith(".zip"):  # what the YAML in it says of its folder does not hold
        return str(Path(file_name_of(data) if data.startswith(("http://", "https://")) else data).absolute())
    return str(spec.source)


def load_tables(spec: DataSpec, single_cls: bool, workers: int, world: World = ALONE) -> Tables:
    """Reads (or finds cached) the labels of both splits and checks their classes.

    Of several processes the first scans, and the others find what it kept.

    Raises:
        UserError: no images, no labels, or labels that are wrong.
    """
    with world.rank_zero_first():
        train = load_labels(spec.train, spec, single_cls, workers, prefix="train: ")
        val = load_labels(spec.val, spec, single_cls, workers, prefix="val: ") if world.is_main else None
    return Tables(train, val)


def image_side(model: nn.Module, options: Namespace) -> int:
    """Returns the image side that `--imgsz` comes to for this model, in pixels; says so where it is another one."""
    stride = grid_stride(model.stride)
    return check_image_size(options.imgsz, stride, floor=2 * stride)


def fitting_batch_size(model: nn.Module, options: Namespace, device: torch.device) -> int:
    """Returns what `--batch-size -1` comes to: as many images as the GPU's memory holds, by fours with `--quad`.

    With `--multi-scale` they are of the largest size; not with `--quad`, whose four images it makes one of that size.

    Raises:
        UserError: no CUDA device, or not even one image fits.
    """
    if device.type != "cuda":
        raise UserError(
            f"--batch-size -1 fills the memory of a CUDA GPU; this run computes on {device.type}. "
            "Name a number, for example --batch-size 16."
        )
    side = options.imgsz
    if options.multi_scale and not options.quad:
        side = largest_side(side, grid_stride(model.stride))
    fitting = autobatch(model, side, amp=options.amp)
    return max(fitting // QUAD * QUAD, QUAD) if options.quad else fitting


def build_loaders(
    tables: Tables, spec: DataSpec, model: nn.Module, hyp: Hyp, options: Namespace, world: World = ALONE
) -> Loaders:
    """Makes the loaders: augmented squares (or rectangles with `--rect`), and rectangles for validation.

    Args:
        tables: the labels.
        spec: the data set they are of.
        model: for its strides.
        hyp: for its augmentation.
        options: train.py's.
        world: the processes that share the batches; images are cached by the first of each machine, for all.
    """
    stride, side = grid_stride(model.stride), options.imgsz
    with world.rank_zero_first():
        train = DetectionDataset(
            tables.train,
            side,
            augment=AugmentParams.from_hyp(hyp),
            rect=options.rect,
            batch_size=options.batch_size,
            stride=stride,
            seed=options.seed,
            cache=options.cache if options.cache != "val" else None,
            machine=world,
        )
    if options.rect:
        LOGGER.warning("WARNING: --rect keeps the images in the order of their shapes: no shuffling, no mosaic")
    sharing = {"workers": options.workers, "neighbours": world.local_size}
    return Loaders(
        create_loader(train, options.batch_size, shuffle=True, quad=options.quad, share=world.share, **sharing),
        _validation_loader(tables.val, side, stride, options, sharing) if world.is_main else None,
        side,
        stride,
        final_keywords(spec),
        dataset_record(spec, {"train": tables.train, "val": tables.val}) if world.is_main else {},
    )


def _validation_loader(
    table: LabelTable, side: int, stride: int, options: Namespace, sharing: dict[str, int]
) -> DetectionLoader:
    """Makes the validation's loader: rectangles, in batches twice as large."""
    batch_size = options.batch_size * 2
    cache = "ram" if options.cache == "val" else options.cache
    dataset = DetectionDataset(
        table,
        side,
        augment=None,
        rect=True,
        batch_size=batch_size,
        stride=stride,
        pad=VAL_PAD,
        seed=options.seed,
        cache=None if options.noval else cache,
    )
    return create_loader(dataset, batch_size, shuffle=False, **sharing)


def final_keywords(spec: DataSpec) -> dict[str, Any]:
    """Returns keywords of `evaluate` for the last validation: on COCO its NMS threshold and a results file."""
    categories = category_ids(spec.val, spec.names)
    if categories != COCO80_TO_91:
        return {}
    annotations = spec.root / "annotations" / "instances_val2017.json"
    json = {"save_json": True, "json_name": "best_predictions.json", "categories": categories}
    return {"iou_thres": COCO_IOU_THRES, "annotations": annotations, **json}


def init_anchors_and_weights(model: nn.Module, dataset: DetectionDataset, hyp: Hyp, options: Namespace) -> None:
    """Fits the anchors to the labels unless told not to, and rounds the fresh weights to float16 as YOLOv5 does.

    The rounding lets what is trained and what is saved (float16) agree on the anchors.

    Raises:
        UserError: `--noautoanchor` with a model whose YAML leaves the anchors to be found.
    """
    if not options.noautoanchor:
        check_anchors(dataset, model, hyp.anchor_t, options.imgsz, options.seed)
    elif isinstance(model.yaml["anchors"], int):
        raise UserError("--noautoanchor: this model's YAML has no anchors of its own (`anchors: 3`). Leave it out.")
    model.half().float()


def freeze_layers(model: nn.Module, freeze: Sequence[int]) -> None:
    """Excludes layers from training: those below a single number, or exactly those of several.

    Their batch-norm statistics still move, as in YOLOv5.

    Raises:
        UserError: there is no such layer, or nothing would be left to train.
    """
    layers = range(freeze[0]) if len(freeze) == 1 else freeze
    numbers = {name: int(name.split(".")[1]) for name, _ in model.named_parameters()}  # of `model.3.conv.weight`: 3
    if len(freeze) > 1 and max(freeze) > max(numbers.values()):
        raise UserError(f"--freeze {max(freeze)}: the model's layers are 0 to {max(numbers.values())}.")
    for name, parameter in model.named_parameters():
        if numbers[name] in layers:
            LOGGER.info(f"freezing {name}")
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(map(str, freeze))} leaves nothing to train.")


def prepare_determinism(device: torch.device) -> None:
    """Answers `--deterministic`: a CPU needs it not, and cuBLAS must be told before it is first used.

    Raises:
        UserError: PyTorch cannot promise it on this device, or the environment tells cuBLAS otherwise.
    """
    if device.type == "cpu":
        LOGGER.info("--deterministic: on the CPU training is so without it")
        return
    if device.type != "cuda":
        raise UserError(f"--deterministic: PyTorch has it for CUDA GPUs and CPUs, not for {device.type}. Leave it out.")
    setting = os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES[0])
    if setting not in CUBLAS_WORKSPACES:
        raise UserError(
            f"--deterministic: the environment sets {CUBLAS_VARIABLE}={setting}, with which cuBLAS is not. Unset it, "
            f"or set {' or '.join(CUBLAS_WORKSPACES)}."
        )


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device, asked: bool = False) -> Iterator[None]:
    """Makes equal runs equal to the bit: on the CPU always, where it costs nothing, elsewhere if `asked`.

    A layer of somebody's that has no such algorithm then raises RuntimeError.
    """
    if device.type != "cpu" and not asked:
        yield
        return
    cudnn, debugging = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    chosen, filled = (cudnn.deterministic, cudnn.benchmark), debugging.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    debugging.fill_uninitialized_memory = False  # a debugging aid that costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = chosen
        debugging.fill_uninitialized_memory = filled


def checkpoint_header(model: nn.Module, hyp: Hyp, options: Namespace) -> dict[str, Any]:
    """Returns what a checkpoint says about its run beside the weights; see `utils.checkpoint` for the format."""
    return {
        "yaml": model.yaml,
        "names": dict(model.names),
        "nc": model.nc,
        "stride": [int(stride) for stride in model.stride],
        "hyp": hyp.to_dict(),
        "opt": dict(vars(options)),
        "data": options.data if isinstance(options.data, str) else None,
        "versions": versions_here(next(model.parameters()).device),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def largest_side(imgsz: int, stride: int) -> int:
    """Returns the largest side that `rescaled` makes of a batch, in pixels."""
    return (imgsz + imgsz // 2 + stride - 1) // stride * stride


def rescaled(images: Tensor, imgsz: int, stride: int, seed: int, iteration: int) -> Tensor:
    """Resizes a batch (B, 3, H, W) to a random size between half and one and a half times the image side.

    The longer side is two strides at least: of a single cell of a single image batch norm can reckon no variance.

    Args:
        images: float, any memory format.
        imgsz: the run's image side in pixels.
        stride: sides become multiples of it.
        seed: the run's.
        iteration: number of the batch since the run's start; with the seed it settles the size.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, iteration])))
    side = int(generator.integers(imgsz // 2, imgsz + imgsz // 2 + stride)) // stride * stride
    side = max(side, 2 * stride)
    factor = side / max(images.shape[2:])
    if factor == 1:
        return images
    shape = [round_up(length * factor, stride) for length in images.shape[2:]]
    return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)
