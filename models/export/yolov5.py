"""A checkpoint of the original kind: the pickled model that YOLOv5 6.x and 7.0, and programs around them, open.

A pickle names classes and holds their attributes; `models.yolo` and `models.common` are the names that YOLOv5's own
classes go by. So the model is written as it is, with the attributes that YOLOv5's classes read and ours lack. Blocks
of slim-neck are not in YOLOv5; slim-neck's own program, a fork of it, has them under the same names.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from models.common import C3GS, GSBottleneck, GSConv, GSConvns, TransformerBlock, VoVGSCSP
from models.export.job import ExportJob
from models.yolo import Detect, Model
from utils.checkpoint import plain_data
from utils.errors import UserError
from utils.files import atomic_write
from utils.log import LOGGER

SLIM_NECK = (C3GS, GSBottleneck, GSConv, GSConvns, VoVGSCSP)
OWN_ATTRIBUTES = ("arguments", "default_act", "repeats")  # of layers and blocks; YOLOv5's have none of them


def export(job: ExportJob) -> Path:
    """Writes `<stem>_yolov5.pt`, float32 or with --half float16; returns its path."""
    head = job.source.head
    if type(head) is not Detect:
        raise UserError(f"YOLOv5 has no head {type(head).__name__}: --include yolov5 takes models that end in Detect.")
    model = original_model(job.source, half=job.config.half)
    foreign = sorted({type(block).__name__ for block in model.modules() if isinstance(block, SLIM_NECK)})
    if foreign:
        LOGGER.warning(
            f"WARNING: YOLOv5 itself has no {', '.join(foreign)}: only a fork with slim-neck's blocks opens this file."
        )
    checkpoint = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "opt": {"data": job.metadata.data, "imgsz": max(job.metadata.shape_hw)},
        "date": job.metadata.date,
    }
    path = job.path(job.format.suffix)
    with atomic_write(path) as temporary:
        torch.save(checkpoint, temporary)
    return path


def original_model(source: nn.Module, half: bool) -> Model:
    """Returns a copy of a trained model with the attributes that YOLOv5's classes read, and without those of ours.

    Args:
        source: `models.yolo.Model`, batch norm not folded.
        half: weights in float16.
    """
    model = copy.deepcopy(source).float().eval().requires_grad_(False)
    for block in model.modules():
        for name in OWN_ATTRIBUTES:
            vars(block).pop(name, None)
        if isinstance(block, TransformerBlock):
            block.c2 = block.linear.out_features
    if half:
        model.half()
    model.names = [source.names[number] for number in sorted(source.names)]
    model.yaml, model.hyp = plain_data(source.yaml), plain_data(source.hyp)
    model.stride = source.stride.detach().float().cpu().clone()
    head = model.head  # YOLOv5 keeps its stride (nl,) as an attribute, and the grids that it makes on the first run
    del head.stride
    head.stride = model.stride.clone()
    head.grid = [torch.zeros(1)] * head.nl
    head.anchor_grid = [torch.zeros(1)] * head.nl
    return model
