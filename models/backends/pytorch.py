"""Checkpoints (`.pt`) on PyTorch, one or several at once, rewritten for inference (`models.deploy`), channels last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.base import Backend, LayerHook
from models.backends.metadata import Metadata
from models.deploy import rewrite
from models.load import Weights, model_from, read_weights
from models.yolo import augmented_rows
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.errors import MIN_GRID_STRIDE, UserError, grid_stride
from utils.files import ROOT
from utils.images import DEFAULT_IMGSZ, letterbox, read_image
from utils.log import LOGGER

COMPARED_PX, COMPARED_ROWS = 320, 100  # side of the image that devices are compared on, and whose boxes
AGREED_PX, AGREED_SCORE = 1.0, 0.01
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
        self.metadata = metadata or describe_model(model, dtype)
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

                def show(layer: nn.Module, output: Tensor) -> None:
                    visualize(layer.i, layer.type.rpartition(".")[2], output.detach().float().cpu().numpy())

                rows = self._shown_model(inputs, visualize=show)[0]
                if not augment:
                    return rows
            return augmented_rows(self._model, inputs, self._model.stride) if augment else self._model(inputs)

    def warm_up(self, height: int, width: int) -> None:
        """Runs once on CUDA, whose first run loads kernels."""
        if self._device.type == "cuda":
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for the device's queue, where it has one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()

    @cached_property
    def _shown_model(self) -> nn.Module:
        """The trained model where and as the other one runs, made when it is first asked for."""
        model = copy.deepcopy(self._trained).to(self._device, self._dtype, memory_format=torch.channels_last)
        return model.fuse().eval()


class ModuleBackend(Backend):
    """A PyTorch module as it is, where it is: in training, and in programs that hold one.

    While it runs it is in evaluation mode and computes no gradients. Not torch.inference_mode: what modules keep from
    call to call (grids of anchors) would be unusable in training.

    Attributes:
        raw: the head's raw outputs for the last images, which losses are computed from; empty where the module returns
            decoded rows alone.
        module: the module.
        dtype: what autocast computes in; None without it.
    """

    dynamic = True

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Takes a module.

        Args:
            module: maps images (b, 3, h, w) in 0 to 1 to decoded rows (b, n, 5 + nc), or to (rows, raw outputs);
                what it says of `names` and `stride` is taken.
            dtype: compute in bfloat16 or float16 under autocast; None or float32 for the weights' own type.
        """
        self.raw: Sequence[Tensor] = ()
        self.module, self.dtype = module, None if dtype == torch.float32 else dtype
        names, stride = getattr(module, "names", {}), getattr(module, "stride", MIN_GRID_STRIDE)
        names = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        stride = grid_stride([stride] if isinstance(stride, int) else stride)
        self.metadata = Metadata(names, stride, (DEFAULT_IMGSZ, DEFAULT_IMGSZ), dynamic=True)

    @property
    def device(self) -> str:
        """Where it runs, in words."""
        return device_line(self.weight.device)

    @property
    def weight(self) -> Tensor:
        """One of its weights, which tells device and type."""
        return next(self.module.parameters(), torch.empty(0))

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w), into fractions on the device, channels last."""
        # One byte per value while it is moved and laid out, more only afterwards.
        moved = torch.from_numpy(images).to(self.weight.device, non_blocking=True)
        return moved.contiguous(memory_format=torch.channels_last).to(self.weight.dtype).div_(255)

    def infer(self, inputs: Tensor, visualize: LayerHook | None = None, augment: bool = False) -> Tensor:
        """Returns decoded rows (b, n, 5 + nc), with `augment` of several views of each image; keeps the raw outputs."""
        if visualize is not None:
            raise UserError("--visualize shows the layers of a checkpoint (.pt): give its file.")
        was_training = self.module.training
        if was_training:
            self.module.eval()
        try:
            with torch.no_grad(), torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype is not None):
                output = self.module(inputs, augment=True) if augment else self.module(inputs)
        finally:
            if was_training:
                self.module.train()
        rows, raw = output if isinstance(output, tuple) else (output, None)
        self.raw = raw or ()
        return rows

    def warm_up(self, height: int, width: int) -> None:
        """Does nothing: it runs as its owner left it."""

    def synchronize(self) -> None:
        """Waits for the device's queue, where it has one."""
        device = self.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


class EnsembleBackend(Backend):
    """Several trained models as one: their rows are put side by side, for NMS to merge.

    All see the same images, whose sides must suit the largest stride.
    """

    dynamic = True

    def __init__(self, members: Sequence[PyTorchBackend], metadata: Metadata) -> None:
        """Takes models of the same classes, on one device and in one precision, and what is said of them together."""
        self.members, self.metadata, self.device = list(members), metadata, members[0].device

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


def open_checkpoints(
    files: Sequence[Path], device: str = "", half: bool = False, bf16: bool = False
) -> tuple[Metadata, int | None, Callable[[], Backend]]:
    """Reads a checkpoint, ours or an original YOLOv5 one, or the several of an ensemble.

    Returns:
        What they say of themselves (an ensemble has its largest stride, the rest is the first one's), the image size
        that they were trained at if they say it, and what builds the backend.

    Raises:
        UserError: no checkpoint, different classes, or an unknown device.
    """
    chosen = select_device(device)
    if half and chosen.type != "cuda":
        LOGGER.warning(f"WARNING: --half needs a CUDA device; computing in float32 on {chosen.type}.")
    dtype = torch.bfloat16 if bf16 else torch.float16 if half and chosen.type == "cuda" else torch.float32
    contents = [read_weights(file) for file in files]
    check_members(files, [content.names for content in contents])
    first = contents[0]
    options = first.meta.get("opt")
    imgsz = (options.get("imgsz") or options.get("img_size")) if isinstance(options, dict) else None
    imgsz = imgsz[0] if isinstance(imgsz, (list, tuple)) and imgsz else imgsz
    trained_px = imgsz if isinstance(imgsz, int) and imgsz > 0 else None
    metadata = Metadata(
        first.names,
        max(grid_stride(content.stride) for content in contents),
        (trained_px or DEFAULT_IMGSZ,) * 2,
        dynamic=True,
        precision=PRECISIONS[dtype],
        date=str(first.meta.get("date") or ""),
        data=str(first.meta.get("data") or "") if first.source == "ours" else "",
    )
    return metadata, trained_px, partial(_build, contents, metadata, chosen, dtype)


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


def _build(contents: Sequence[Weights], metadata: Metadata, device: torch.device, dtype: torch.dtype) -> Backend:
    """Builds the models of checkpoints, rewritten for inference; logs what they are and where they run."""
    prepare_cpu_memory(device)
    LOGGER.info(device_line(device))
    members = []
    for content in contents:
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
            model = model_from(content).requires_grad_(False)
        LOGGER.info("Fusing layers... ")
        LOGGER.info(model.fuse().info(gflops=False))
        if device.type == "mps":
            compare_with_cpu(model, device)
        members.append(PyTorchBackend(model, device, dtype, metadata if len(contents) == 1 else None))
    if len(members) == 1:
        return members[0]
    LOGGER.info(f"Ensemble created with {[str(content.path) for content in contents]}")
    return EnsembleBackend(members, metadata)


def compare_with_cpu(model: nn.Module, device: torch.device) -> None:
    """Runs a model on one image on a device and on the CPU, and tells how far apart they are: a warning if too far.

    Kernels of young devices have been wrong without an error, in some versions for some layers alone.

    Args:
        model: `models.yolo.Model`; it stays as it is.
        device: the other device.
    """
    image = letterbox(read_image(ROOT / "data" / "images" / "shapes-wide.jpg"), COMPARED_PX, auto=False).image
    inputs = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1)[None].copy()).float() / 255
    own, other = (rows_on(model, place, inputs) for place in (torch.device("cpu"), device))
    apart = (own - other).abs().nan_to_num(nan=torch.inf)
    best = (own[..., 4] * own[..., 5:].amax(-1)).flatten().argsort(descending=True)[:COMPARED_ROWS]
    box_px, score = apart.flatten(0, 1)[best, :4].max().item(), apart[..., 4:].max().item()
    found = f"boxes within {box_px:.2g} px, scores within {score:.2g}"
    if box_px <= AGREED_PX and score <= AGREED_SCORE:
        LOGGER.info(f"{device.type.upper()} agrees with the CPU on one image: {found}")
        return
    LOGGER.warning(
        f"WARNING: --device {device.type} does not agree with the CPU on one image: {found} (agreed: {AGREED_PX:g} px, "
        f"{AGREED_SCORE:g}). Do not trust its results: use --device cpu, or another version of PyTorch "
        f"(this is {torch.__version__})."
    )


def rows_on(model: nn.Module, device: torch.device, inputs: Tensor) -> Tensor:
    """Returns a model's rows (b, n, 5 + nc) for images (b, 3, h, w) of values 0 to 1, computed on a device."""
    with torch.inference_mode():
        return copy.deepcopy(model).to(device).eval()(inputs.to(device))[0].float().cpu()


def describe_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> Metadata:
    """Returns what a model knows of itself."""
    shape_hw = (DEFAULT_IMGSZ, DEFAULT_IMGSZ)
    return Metadata(dict(model.names), grid_stride(model.stride), shape_hw, dynamic=True, precision=PRECISIONS[dtype])
