"""What a training run is made of, before it starts: sound options, loaders, anchors, the device made ready.

Building the model itself is train.py's: nothing here knows `models`.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.autoanchor import label_sizes_px
from utils.autobatch import autobatch
from utils.dataloaders.config import SPLITS, DataSpec
from utils.dataloaders.images_cache import RAM_SHARE, ImageFiles
from utils.dataloaders.labels import LabelTable, load_labels
from utils.dataloaders.loader import QUAD, create_dataloader
from utils.devices import resolve_amp, versions_here
from utils.downloads import file_name_of
from utils.errors import UserError, make_divisible, memory_left
from utils.eval.coco import COCO80_TO_91, category_ids
from utils.files import ROOT
from utils.log import LOGGER
from utils.loggers import check_services
from utils.loss import LOSSES
from utils.loss.iou import BOX_LOSSES
from utils.train.distributed import ALONE, World
from utils.train.fingerprint import dataset_record
from utils.train.hyp import Hyp
from utils.train.optim import Schedule

COCO_IOU_THRES = 0.65
VAL_PAD = 0.5  # of a stride, around validation's rectangles
SMALL_HYP = ROOT / "data" / "hyps" / "hyp.small.yaml"
SMALL_STEPS = 10_000  # optimizer steps below which `--recipe auto` takes it: five time constants of YOLOv5's EMA
OF_OPTIMIZER = ("lr0", "lrf", "momentum", "weight_decay", "warmup_momentum", "warmup_bias_lr")
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS gives the same result every time


@dataclass
class TrainConfig:
    """The options of one run, by train.py's names, where each is described.

    A resumed run takes over the interrupted one's (`utils.train.resume`). What depends on the model and its data is
    settled once, in train.py: `data` and `teacher` become absolute, `imgsz` a multiple of the stride, `batch_size` of
    -1 what fits, `save_dir` the run's folder, a `recipe` of auto one of the others, with its file in `hyp`, `optimizer`
    what that says. After the first epoch `epochs` becomes what fits into `hours`.
    """

    weights: str
    teacher: str
    cfg: str
    act: str | None
    no_inherit: bool
    data: str | Mapping[str, Any]
    hyp: str
    recipe: str
    epochs: int
    hours: float | None  # None: no limit
    batch_size: int  # over all processes
    imgsz: int
    rect: bool
    resume: str | Path | bool
    nosave: bool
    noval: bool
    noautoanchor: bool
    noplots: bool
    cache: str | None
    image_weights: bool
    device: str
    multi_scale: bool
    single_cls: bool
    optimizer: str | None
    amp: str
    sync_bn: bool
    workers: int
    project: str
    name: str
    exist_ok: bool
    quad: bool
    cos_lr: bool
    label_smoothing: float | None
    box_loss: str | None
    patience: int
    freeze: Sequence[int]
    save_period: int
    logger: Sequence[str]
    seeds: int
    evolve: int | None
    storage: str
    seed: int
    deterministic: bool
    local_rank: int
    save_dir: str | None = None


@dataclass
class Shared:
    """What the trainings of a search have in common: the first one reads it."""

    spec: DataSpec | None = None
    tables: dict[str, LabelTable] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)  # where each split's images are read from, resized
    weights: Any = None  # of `--weights`, fitted to `--cfg`


class Loaders(NamedTuple):
    """Training and validation batches, and what they were made for."""

    train: Any
    val: Any  # None on other processes than the first
    imgsz: int  # image side in pixels
    grid_stride: int  # sides are multiples of it
    final: dict[str, Any]  # more keywords of `evaluate` for the last validation; on COCO only
    dataset: dict[str, torch.Tensor]  # by which a checkpoint knows its data again; see `dataset_record`


def check_options(config: TrainConfig, processes: int = 1) -> None:
    """Refuses options that no run can satisfy, or that do not go with each other or with the number of processes."""
    batch_size, several = config.batch_size, processes > 1
    for refused, message in (
        (
            isinstance(config.resume, str) and not config.resume.strip(),  # as of a shell's variable that is not set
            "--resume '': the name is empty. Give a run's weights/last.pt, or nothing for the newest run.",
        ),
        (
            not (config.cfg or config.weights or config.resume),
            "neither --cfg nor --weights is given: name a model, for example --cfg yolov5s-slimneck.yaml.",
        ),
        (
            config.weights and not config.weights.endswith(".pt"),
            f"--weights {config.weights}: a checkpoint ending in .pt is expected here.",
        ),
        (
            config.teacher and not config.teacher.endswith(".pt"),
            f"--teacher {config.teacher}: a checkpoint ending in .pt is expected here.",
        ),
        (
            batch_size == 0 or batch_size < -1,
            f"--batch-size {batch_size}: at least 1, or -1 for what the GPU's memory holds.",
        ),
        (
            config.quad and batch_size > 0 and batch_size % QUAD,
            f"--quad collates images by fours: --batch-size {batch_size} is not a multiple of 4.",
        ),
        (
            config.rect and config.image_weights,
            "--image-weights samples some images more often, and --rect keeps their order: leave one out.",
        ),
        (
            config.cache == "val" and config.noval,
            "--cache val keeps the validation images, and --noval reads them only once: leave one out.",
        ),
        (
            config.label_smoothing == 1,
            "--label-smoothing 1 leaves nothing of a class: choose a number below 1.",
        ),
        (
            config.box_loss is not None and config.box_loss not in BOX_LOSSES,
            f"--box-loss '{config.box_loss}': one of {', '.join(BOX_LOSSES)} is expected.",
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
            several and config.seeds > 1,
            "--seeds trains in a single process: start without a launcher, for example one process a GPU (--device).",
        ),
        (
            several and config.evolve,
            "--evolve trains in a single process: start several with one --storage and --name, without a launcher.",
        ),
        (
            config.evolve and isinstance(config.resume, str),
            "--evolve goes on with --resume alone, in the folder that --project and --name mean.",
        ),
        (
            config.storage and not config.evolve,
            "--storage is where --evolve keeps its trials: add --evolve, or leave it out.",
        ),
        (
            several and config.image_weights,
            "--image-weights works in a single process only: leave it out, or start without a launcher.",
        ),
    ):
        if refused:
            raise UserError(message)
    check_services(config.logger)


def prepare_device(config: TrainConfig, device: torch.device, processes: int = 1) -> None:
    """Refuses options that PyTorch does not have on `device`; tells cuBLAS to be deterministic before its first use.

    Raises:
        UserError: `--amp`, `--batch-size -1`, `--sync-bn` or `--deterministic` is not available.
    """
    resolve_amp(config.amp, device)
    if config.batch_size == -1 and device.type != "cuda":
        raise UserError(
            f"--batch-size -1 fills the memory of a CUDA GPU; this run computes on {device.type}. "
            "Name a number, for example --batch-size 16."
        )
    if config.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn: PyTorch synchronises batch norm on CUDA GPUs, not on {device.type}. Leave it out.")
    if config.sync_bn and processes == 1:
        LOGGER.warning("WARNING: --sync-bn has no effect: a single process has nobody to synchronise with")
    if not config.deterministic:
        return
    if device.type == "cpu":
        LOGGER.info("--deterministic: on the CPU training is so without it")
    elif device.type != "cuda":
        raise UserError(f"--deterministic: PyTorch has it for CUDA GPUs and CPUs, not for {device.type}. Leave it out.")
    elif (setting := os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACES[0])) not in CUBLAS_WORKSPACES:
        raise UserError(
            f"--deterministic: the environment sets {CUBLAS_VARIABLE}={setting}, with which cuBLAS is not. Unset it, "
            f"or set {' or '.join(CUBLAS_WORKSPACES)}."
        )


def absolute_data(data: str | Mapping[str, Any], spec: DataSpec) -> str | dict[str, Any]:
    """Returns what `--data`, read as `spec`, means from any working folder: an absolute path, or a dict of such."""
    if isinstance(data, Mapping):
        splits = {split: [str(path) for path in getattr(spec, split)] for split in SPLITS if data.get(split)}
        return {**data, "path": str(spec.root), **splits}
    if data.lower().endswith(".zip"):  # what the YAML in it says of its folder does not hold
        return str(Path(file_name_of(data) if data.startswith(("http://", "https://")) else data).absolute())
    return str(spec.source)


def fitting_batch_size(model: nn.Module, config: TrainConfig, stride: int) -> int:
    """Returns what `--batch-size -1` comes to: as many images as the GPU's memory holds, by fours with `--quad`.

    With `--multi-scale` they are of the largest size; not with `--quad`, whose four images it makes one of that size.
    """
    side = config.imgsz
    if config.multi_scale and not config.quad:  # the largest of `rescaled`
        side = (side + side // 2 + stride - 1) // stride * stride
    fitting = autobatch(model, side, amp=config.amp)
    return max(fitting // QUAD * QUAD, QUAD) if config.quad else fitting


def load_tables(spec: DataSpec, config: TrainConfig, world: World = ALONE) -> dict[str, LabelTable]:
    """Reads the labels of "train", and for the first process of "val"; the others find what it kept.

    Raises:
        UserError: no images, no labels, or labels that are wrong.
    """
    with world.rank_zero_first():
        return {
            split: load_labels(getattr(spec, split), spec, config.single_cls, config.workers, prefix=f"{split}: ")
            for split in (("train", "val") if world.is_main else ("train",))
        }


def with_options(hyp: Hyp, config: TrainConfig) -> Hyp:
    """Returns hyperparameters in which the options stand that name some of them."""
    stated = {name: getattr(config, name) for name in ("label_smoothing", "optimizer", "box_loss")}
    return replace(hyp, **{name: value for name, value in stated.items() if value is not None})


def choose_recipe(hyp: Hyp, config: TrainConfig, images: int) -> Hyp:
    """Returns the hyperparameters of `--recipe`, and settles it in `config`; options that name some of them stay.

    Auto takes the recipe for small data where YOLOv5's would make too few optimizer steps of the images to train on.
    What `--hours` leaves of the epochs is not known yet.

    Args:
        hyp: YOLOv5's.
        config: its batch size settled.
        images: to train on.
    """
    if config.recipe == "auto":
        batches = math.ceil(images / config.batch_size)
        steps = Schedule(hyp, config.epochs, batches, config.batch_size).steps
        few = steps < SMALL_STEPS
        config.recipe = "small" if few else "yolov5"
        LOGGER.info(
            f"--recipe auto: {config.recipe}, as YOLOv5's makes {steps} optimizer steps of this run, "
            f"{'fewer than' if few else 'at least'} {SMALL_STEPS}"
        )
    if config.recipe == "yolov5":
        return hyp
    config.hyp = str(SMALL_HYP)
    small = Hyp.from_yaml(SMALL_HYP)
    if config.optimizer not in (None, small.optimizer):
        LOGGER.info(
            f"--optimizer {config.optimizer}: with YOLOv5's learning rates, as the recipe's are {small.optimizer}'s"
        )
        small = replace(small, **{name: getattr(hyp, name) for name in OF_OPTIMIZER})
    return with_options(small, config)


def _cache_for_search(tables: Mapping[str, LabelTable], imgsz: int) -> str | None:
    """Returns what `--cache` is by default, where the same images are read for many trainings."""
    files = (ImageFiles(table, imgsz, augment=split == "train") for split, table in tables.items())
    needed, left = sum(3 * int(file.sizes_wh().prod(axis=1).sum()) for file in files), memory_left()
    if left is None or needed < RAM_SHARE * left:
        return "ram"
    LOGGER.warning(
        f"WARNING: the images take {needed / 1e9:.1f} GB at {imgsz} px, and {left / 1e9:.1f} GB of memory are left: "
        "each trial reads them anew. --cache disk keeps them resized"
    )
    return None


def build_loaders(
    spec: DataSpec,
    tables: Mapping[str, LabelTable],
    stride: int,
    hyp: Hyp,
    config: TrainConfig,
    world: World = ALONE,
    images: dict[str, Any] | None = None,
) -> Loaders:
    """Makes the loaders: augmented squares (or rectangles with `--rect`), and rectangles for validation.

    Args:
        spec: the data set.
        tables: its labels, of `load_tables`.
        stride: the model's grid.
        hyp: hyperparameters.
        config: the options, sound.
        world: of its processes the first of each machine caches the images, for all.
        images: where they are read from, as an earlier call left it in this dict; taken in place of `--cache`.
    """
    images = {} if images is None else images
    if config.evolve and config.cache is None:
        config.cache = _cache_for_search(tables, config.imgsz)
    batch_size = config.batch_size
    loading = {"workers": config.workers, "neighbours": world.local_size, "seed": config.seed}
    with world.rank_zero_first():
        train, _ = create_dataloader(
            tables["train"],
            config.imgsz,
            batch_size,
            stride,
            hyp=hyp,
            augment=True,
            cache=images.get("train", config.cache if config.cache != "val" else None),
            rect=config.rect,
            quad=config.quad,
            shuffle=True,
            shard=world.share,
            machine=world,
            **loading,
        )
    if config.rect:
        LOGGER.warning("WARNING: --rect keeps the images in the order of their shapes: no shuffling, no mosaic")
    if not world.is_main:
        return Loaders(train, None, config.imgsz, stride, {}, {})
    cache = None if config.noval else "ram" if config.cache == "val" else config.cache
    val, _ = create_dataloader(
        tables["val"],
        config.imgsz,
        2 * batch_size,
        stride,
        cache=images.get("val", cache),
        pad=VAL_PAD,
        rect=True,
        **loading,
    )
    images.update(train=train.dataset.images, val=val.dataset.images)
    record = dataset_record(spec, tables)
    return Loaders(train, val, config.imgsz, stride, final_keywords(spec), record)


def final_keywords(spec: DataSpec) -> dict[str, Any]:
    """Returns keywords of `evaluate` for the last validation: on COCO its NMS threshold and a results file."""
    categories = category_ids(spec.val, spec.names)
    if categories != COCO80_TO_91:
        return {}
    annotations = spec.root / "annotations" / "instances_val2017.json"
    json = {"save_json": True, "json_name": "best_predictions.json", "categories": categories}
    return {"iou_thres": COCO_IOU_THRES, "annotations": annotations, **json}


def warn_of_unread(hyp: Hyp, head: nn.Module) -> None:
    """Warns of hyperparameters that are set and have no effect on the head's loss."""
    unread = [key for key, off in LOSSES[head.loss].unread.items() if getattr(hyp, key) != off]
    if unread:
        LOGGER.warning(f"WARNING: {', '.join(unread)}: without effect on the loss of {type(head).__name__}")
    elif head.nc == 1 and hyp.label_smoothing:
        LOGGER.warning("WARNING: --label-smoothing has no effect: one class (as of --single-cls) has no class loss")


def warn_of_large(table: LabelTable, head: nn.Module, imgsz: int) -> None:
    """Warns of labels that are larger than any box of the head."""
    reach = head.largest_box_px
    count = (label_sizes_px(table, imgsz) > reach).any(1).sum()
    if count:
        LOGGER.warning(
            f"WARNING: {count} of {len(table.rows)} labels have a side of over {reach:.0f} px at --imgsz {imgsz}, and "
            f"{type(head).__name__} finds none so large: give it more bins in the model YAML"
        )


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


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device, asked: bool = False) -> Iterator[None]:
    """Makes equal runs equal to the bit: on the CPU always, where it costs nothing, elsewhere if `asked`.

    A foreign layer that has no such algorithm then raises RuntimeError.
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


def checkpoint_header(model: nn.Module, hyp: Hyp, config: TrainConfig) -> dict[str, Any]:
    """Returns what a checkpoint says about its run beside the weights; see `utils.checkpoint` for the format."""
    return {
        "yaml": model.yaml,
        "names": dict(model.names),
        "nc": model.nc,
        "stride": [int(stride) for stride in model.stride],
        "hyp": hyp.to_dict(),
        "opt": dict(vars(config)),
        "data": config.data if isinstance(config.data, str) else None,
        "versions": versions_here(next(model.parameters()).device),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def rescaled(images: Tensor, imgsz: int, stride: int, seed: int, iteration: int) -> Tensor:
    """Resizes a batch (B, 3, H, W) to a random size between half and one and a half times the image side.

    The longer side is two strides at least: batch norm has no variance of a single cell of a single image.

    Args:
        images: float, any memory format.
        imgsz: the run's image side in pixels.
        stride: sides become multiples of it.
        seed: the run's.
        iteration: number of the batch since the run's start; with the seed it settles the size.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 1, iteration])))
    side = int(generator.integers(imgsz // 2, imgsz + imgsz // 2 + stride)) // stride * stride
    factor = max(side, 2 * stride) / max(images.shape[2:])
    if factor == 1:
        return images
    shape = [make_divisible(length * factor, stride) for length in images.shape[2:]]
    return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)
