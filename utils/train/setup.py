"""What a training run is made of, before it starts: labels, anchors, loaders.

Building the model itself is train.py's: nothing here knows `models`.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from utils.checks import UserError, check_image_size, grid_stride
from utils.data.augment import AugmentParams
from utils.data.dataset import DetectionDataset
from utils.data.labels import load_labels
from utils.data.loader import create_loader
from utils.data.spec import DataSpec
from utils.data.table import LabelTable
from utils.eval.coco import COCO80_TO_91, category_ids
from utils.log import LOGGER
from utils.train.anchors import check_anchors
from utils.train.hyp import Hyp

COCO_IOU_THRES = 0.65
VAL_PAD = 0.5  # of a stride, around validation's rectangles


class Tables(NamedTuple):
    """The labels of both splits."""

    train: LabelTable
    val: LabelTable


class Loaders(NamedTuple):
    """Training and validation batches, and what they were made for."""

    train: Any
    val: Any
    imgsz: int  # image side in pixels
    grid_stride: int  # sides are multiples of it
    final: dict[str, Any]  # what the last validation is told beside the usual; something on COCO only


def load_tables(spec: DataSpec, single_cls: bool, workers: int) -> Tables:
    """Reads (or finds cached) the labels of both splits and checks their classes.

    Raises:
        UserError: no images, no labels, or labels that are wrong.
    """
    splits = {"train": spec.train, "val": spec.val}
    return Tables(
        **{
            name: load_labels(sources, spec, single_cls, workers, prefix=f"{name}: ")
            for name, sources in splits.items()
        }
    )


def image_side(model: nn.Module, options: Namespace) -> int:
    """Returns the image side that `--imgsz` comes to for this model, in pixels."""
    stride = grid_stride(model.stride)
    return check_image_size(options.imgsz, stride, floor=2 * stride)


def build_loaders(tables: Tables, spec: DataSpec, model: nn.Module, hyp: Hyp, options: Namespace) -> Loaders:
    """Makes the loaders: augmented squares (or rectangles with `--rect`), and rectangles for validation.

    Args:
        tables: the labels.
        spec: the data set they are of.
        model: for its strides.
        hyp: for its augmentation.
        options: train.py's.
    """
    stride, side = grid_stride(model.stride), image_side(model, options)
    train = DetectionDataset(
        tables.train,
        side,
        augment=AugmentParams.from_hyp(hyp),
        rect=options.rect,
        batch_size=options.batch_size,
        stride=stride,
        seed=options.seed,
        cache=options.cache if options.cache != "val" else None,
    )
    val_batch = options.batch_size * 2
    val = DetectionDataset(
        tables.val,
        side,
        augment=None,
        rect=True,
        batch_size=val_batch,
        stride=stride,
        pad=VAL_PAD,
        seed=options.seed,
        cache=("ram" if options.cache == "val" else options.cache) if not options.noval else None,
    )
    if options.rect:
        LOGGER.warning("WARNING: --rect keeps the images in the order of their shapes: no shuffling, no mosaic")
    return Loaders(
        create_loader(train, options.batch_size, workers=options.workers, shuffle=True, quad=options.quad),
        create_loader(val, val_batch, workers=options.workers, shuffle=False),
        side,
        stride,
        final_keywords(spec),
    )


def final_keywords(spec: DataSpec) -> dict[str, Any]:
    """Returns keywords of `evaluate` for the last validation: on COCO its NMS threshold and a results file."""
    categories = category_ids(spec.val, spec.nc)
    if categories != COCO80_TO_91:
        return {}
    annotations = spec.root / "annotations" / "instances_val2017.json"
    json = {"save_json": True, "json_name": "best_predictions.json", "categories": categories}
    return {"iou_thres": COCO_IOU_THRES, "annotations": annotations, **json}


def settle_weights(model: nn.Module, table: LabelTable, hyp: Hyp, options: Namespace) -> None:
    """Fits the anchors to the labels unless told not to, and rounds the fresh weights to float16 as YOLOv5 does.

    The rounding lets what is trained and what is saved (float16) agree on the anchors.

    Raises:
        UserError: `--noautoanchor` with a model whose YAML leaves the anchors to be found.
    """
    if not options.noautoanchor:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([options.seed, 2])))
        check_anchors(table, model.detect, hyp.anchor_t, image_side(model, options), generator)
    elif isinstance(model.yaml["anchors"], int):
        raise UserError("--noautoanchor: this model's YAML has no anchors of its own (`anchors: 3`). Leave it out.")
    model.half().float()


def freeze_layers(model: nn.Module, freeze: Sequence[int]) -> None:
    """Excludes layers from training: those below a single number, or exactly those of several.

    Their batch-norm statistics still move, as in YOLOv5.

    Raises:
        UserError: nothing would be left to train.
    """
    layers = range(freeze[0]) if len(freeze) == 1 else freeze
    pattern = re.compile(rf"model\.({'|'.join(map(str, layers))})\.") if layers else None
    for name, parameter in model.named_parameters():
        if pattern and pattern.match(name):
            LOGGER.info(f"freezing {name}")
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(map(str, freeze))} leaves nothing to train.")


@contextlib.contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Makes equal runs equal to the bit: on the CPU strictly, on others as far as PyTorch can (it warns where not)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,  # a debugging aid that costs time
    )
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def checkpoint_header(model: nn.Module, hyp: Hyp, options: Namespace) -> dict[str, Any]:
    """Returns what a checkpoint says about its run beside the weights; see `utils.checkpoint` for the format."""
    return {
        "yaml": model.yaml,
        "names": dict(model.names),
        "nc": model.nc,
        "stride": [int(stride) for stride in model.stride],
        "hyp": hyp.to_dict(),
        "opt": dict(vars(options)),
        "data": str(options.data),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
