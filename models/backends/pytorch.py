"""Checkpoints (`.pt`) on PyTorch, one or several at once, rewritten for inference (`models.deploy`), channels last."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.base import Backend, LayerHook
from models.backends.metadata import Metadata
from models.deploy import rewrite
from models.load import Weights, model_from, read_weights
from models.yolo import augmented_rows
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.errors import UserError, grid_stride
from utils.log import LOGGER

DEFAULT_PX = 640  # image size of checkpoints that do not say what they were trained at
PRECISIONS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class PyTorchBackend(Backend):
    """A trained model."""

    dynamic = True

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        metadata: Metadata | None = None,
    ) -> None:
        """Rewrites a model for inference and takes it to `device`.

        Args:
            model: `models.yolo.Model`, batch norm folded or not; it stays as it is.
            device: where to run.
            dtype: what the convolutions compute in; boxes are decoded in float32.
            metadata: what the checkpoint says of itself; None for what the model knows.
        """
        self.metadata = metadata or describe_model(model, dtype=dtype)
        self.device = device_line(device)
        self._trained, self._device, self._dtype = model, device, dtype
        self._model = rewrite(copy.deepcopy(model).cpu().float()).to(device, memory_format=torch.channels_last)
        self._model.trunk.to(dtype)

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        inputs = torch.from_numpy(images).to(self._device)
        return inputs.to(self._dtype, memory_format=torch.channels_last).div_(255)

    def infer(self, inputs: Tensor, visualize: LayerHook | None = None, augment: bool = False) -> Tensor:
        """Returns decoded rows (b, n, 5 + nc), float32.

        With `visualize` the trained model runs, whose layers have their channels in their own order; with `augment` as
        well, it sees the images as they are.
        """
        with torch.inference_mode():
            if visualize is not None:
                rows = self._show(inputs, visualize)
                if not augment:
                    return rows
            return augmented_rows(self._model, inputs, self._model.stride) if augment else self._model(inputs)

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._device.type == "cuda":
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _show(self, inputs: Tensor, visualize: LayerHook) -> Tensor:
        """Hands the maps of the trained model's layers to `visualize` and returns its rows (b, n, 5 + nc)."""

        def show(layer: nn.Module, output: Tensor) -> None:
            visualize(layer.i, layer.type.rpartition(".")[2], output.detach().float().cpu().numpy())

        return self._shown_model(inputs, visualize=show)[0]

    @cached_property
    def _shown_model(self) -> nn.Module:
        """The trained model where and as the other one runs, made when it is first asked for."""
        model = copy.deepcopy(self._trained).to(self._device, self._dtype, memory_format=torch.channels_last)
        return model.fuse().eval()


class EnsembleBackend(Backend):
    """Several trained models as one: their rows are put side by side, for NMS to merge.

    All see the same images, whose sides must suit the largest stride.
    """

    dynamic = True

    def __init__(self, members: Sequence[PyTorchBackend]) -> None:
        """Takes models of the same classes, on one device and in one precision."""
        self.members = list(members)
        first = self.members[0]
        self.metadata = replace(first.metadata, stride=max(member.stride for member in self.members))
        self.device = first.device

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        return self.members[0].preprocess(images)

    def infer(self, inputs: Tensor, visualize: LayerHook | None = None, augment: bool = False) -> Tensor:
        """Returns the members' decoded rows (b, n, 5 + nc), float32, one after the other.

        Raises:
            UserError: `visualize`: which member's layers would be meant?
        """
        if visualize is not None:
            raise UserError("--visualize shows the layers of one model: give one checkpoint as --weights.")
        return torch.cat([member.infer(inputs, augment=augment) for member in self.members], dim=1)

    def warm_up(self, height: int, width: int) -> None:
        """Runs every member once on CUDA."""
        for member in self.members:
            member.warm_up(height, width)

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        self.members[0].synchronize()


def load(weights: str | Path, device: str = "", half: bool = False) -> PyTorchBackend:
    """Loads a checkpoint of ours or an original YOLOv5 one.

    Raises:
        UserError: no checkpoint, or an unknown device.
    """
    return _open(weights, *_place(device, half))


def load_ensemble(files: Sequence[str | Path], device: str = "", half: bool = False) -> EnsembleBackend:
    """Loads several checkpoints as one model.

    Raises:
        UserError: one is no checkpoint, their classes differ, or an unknown device.
    """
    place = _place(device, half)
    return ensemble_of(files, [_open(file, *place) for file in files])


def ensemble_of(files: Sequence[str | Path], members: Sequence[PyTorchBackend]) -> EnsembleBackend:
    """Returns the models of `files` as one, and says so; see `check_members`."""
    check_members(files, [member.names for member in members])
    LOGGER.info(f"Ensemble created with {[str(file) for file in files]}")
    return EnsembleBackend(members)


def check_members(files: Sequence[str | Path], names: Sequence[Mapping[int, str]]) -> None:
    """Makes sure that the models of an ensemble mean the same by a class number.

    Args:
        files: where they come from.
        names: each one's class names {number: name}.

    Raises:
        UserError: they do not.
    """
    for file, own in zip(files, names, strict=True):
        if dict(own) != dict(names[0]):
            counts = "" if len(own) == len(names[0]) else f" ({len(names[0])} and {len(own)})"
            raise UserError(
                f"--weights: {files[0]} and {file} have different classes{counts}; an ensemble's models must have the "
                "same ones in the same order."
            )


def _place(device: str, half: bool) -> tuple[torch.device, torch.dtype]:
    """Returns the device that is asked for and what to compute in there; logs both where they need a word."""
    chosen = select_device(device)
    prepare_cpu_memory(chosen)
    LOGGER.info(device_line(chosen))
    if half and chosen.type != "cuda":
        LOGGER.warning(f"WARNING: --half needs a CUDA device; computing in float32 on {chosen.type}.")
    return chosen, torch.float16 if half and chosen.type == "cuda" else torch.float32


def _open(weights: str | Path, device: torch.device, dtype: torch.dtype) -> PyTorchBackend:
    """Loads one checkpoint; logs what it is."""
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
        content = read_weights(weights)
        model = model_from(content).requires_grad_(False)
    LOGGER.info("Fusing layers... ")
    model.fuse()
    LOGGER.info(model.info(gflops=False))
    return PyTorchBackend(model, device, dtype, describe_model(model, content, dtype))


def describe_model(model: nn.Module, weights: Weights | None = None, dtype: torch.dtype = torch.float32) -> Metadata:
    """Returns what a model, and the weights file that it was read from, say of it."""
    meta = weights.meta if weights else {}
    options = meta.get("opt") if isinstance(meta.get("opt"), dict) else {}
    return Metadata(
        names=dict(model.names),
        stride=grid_stride(model.stride),
        shape_hw=_sides(options.get("imgsz", options.get("img_size"))),
        dynamic=True,
        precision=PRECISIONS[dtype],
        date=str(meta.get("date") or ""),
        data=str(meta.get("data") or ""),
    )


def _sides(imgsz: Any) -> tuple[int, int]:
    """Returns height and width that a model was trained at, as its options say: a side, or a list of them."""
    side = imgsz[0] if isinstance(imgsz, (list, tuple)) and imgsz else imgsz
    return (side, side) if isinstance(side, int) and side > 0 else (DEFAULT_PX, DEFAULT_PX)
