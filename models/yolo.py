"""The detector: `Model`, and how the rows of a model YAML become layers.

`BLOCKS` says for each name that a row may use which class it is and how the row's arguments become the class's;
`register_block` adds to it. Also what a model costs (layers, GFLOPs, time) and test-time augmentation. As a script:

    python models/yolo.py --cfg yolov5s-slimneck.yaml --profile
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import common, config, heads  # noqa: E402
from models.config import Totals, check_map, gather, on_meta_device, run_hollow, strides_of  # noqa: E402
from models.deploy import fold_model  # noqa: E402
from models.heads import Detect, Head  # noqa: E402
from utils.cli import ReportedError, run_command  # noqa: E402
from utils.devices import select_device  # noqa: E402
from utils.errors import UserError, did_you_mean, make_divisible  # noqa: E402
from utils.files import ROOT  # noqa: E402
from utils.log import LOGGER, progress  # noqa: E402

BN_EPS, BN_MOMENTUM = 1e-3, 0.03  # part of the trained weights' meaning, though no state dict holds them
STRIDE_IMAGE_PX = 128  # side of the image on which strides are measured: the largest stride there is (P7)
# What building or running layers with arguments that do not suit them raises.
ROW_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
INPLACE_ACTIVATIONS = (nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.SiLU)
INPUT_READERS = (nn.Hardswish, nn.SiLU)  # those whose gradient needs the input: in place they would keep a copy of it


@dataclass(frozen=True)
class Block:
    """One entry of BLOCKS: the class, how a row becomes its arguments, and whether it repeats inside itself.

    With `repeats_inside` the number of repeats is passed as the third argument, else the layer is built so many times.
    """

    cls: type[nn.Module]
    plan: Callable[[config.RowInputs, list[Any]], config.LayerPlan] = config.same_channels
    repeats_inside: bool = False


_SCALED = [common.Conv, common.DWConv, common.Focus, common.Bottleneck, common.SPP, common.SPPF, common.C3SPP]
_SCALED += [common.GhostConv, common.GhostBottleneck, common.CrossConv, common.MixConv2d]
_SCALED += [common.GSConv, common.GSConvns, common.GSBottleneck, common.GSBottleneckC]
_SCALED += [common.ShuffleV2Block, common.MSCA]
_REPEATING = [common.BottleneckCSP, common.C3, common.C3TR, common.C3Ghost]
_REPEATING += [common.C3GS, common.VoVGSCSP, common.VoVGSCSPC]
_SAME = [common.Sum, common.Classify, common.TransformerBlock]

BLOCKS: dict[str, Block] = {
    **{cls.__name__: Block(cls, config.scaled_channels) for cls in _SCALED},
    **{cls.__name__: Block(cls, config.scaled_channels, repeats_inside=True) for cls in _REPEATING},
    **{cls.__name__: Block(cls) for cls in _SAME},
    "Concat": Block(common.Concat, config.joined_channels),
    "Contract": Block(common.Contract, config.contracted_channels),
    "Expand": Block(common.Expand, config.expanded_channels),
    "DySample": Block(common.DySample, config.norm_channels),
    "ASFF": Block(common.ASFF, config.fused_channels),
    "Detect": Block(Detect, config.detect_channels),
    "DetectAF": Block(heads.DetectAF, config.head_channels),
    "nn.BatchNorm2d": Block(nn.BatchNorm2d, config.norm_channels),
}


def register_block(plan=config.scaled_channels, repeats_inside: bool = False) -> Callable[[type], type]:
    """Returns a class decorator that makes a new block usable in model YAMLs under its class's name."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        BLOCKS[cls.__name__] = Block(cls, plan, repeats_inside)
        return cls

    return register


def find_block(name: str) -> Block:
    """Looks a row's block up in BLOCKS; `nn.X` means any layer of torch.nn.

    Raises:
        ValueError: no such block; the nearest names are in the message.
    """
    if name in BLOCKS:
        return BLOCKS[name]
    cls = getattr(nn, name[3:], None) if str(name).startswith("nn.") else None
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return Block(cls)
    torch_layers = [f"nn.{layer}" for layer in dir(nn) if isinstance(getattr(nn, layer), type)]
    raise ValueError(f"unknown block {name!r:.80}.{did_you_mean(name, [*BLOCKS, *torch_layers])}")


def is_ours(row: Any) -> bool:
    """Tells whether a row names a block of this program or of torch, which works on the meta device."""
    block = BLOCKS.get(row[2]) if isinstance(row, list) and len(row) > 2 and isinstance(row[2], str) else None
    return block is None or block.cls.__module__.split(".")[0] in ("models", "torch")


def parse_model(
    model_yaml: Mapping[str, Any], ch: Sequence[int], source: str = "model"
) -> tuple[nn.Sequential, list[int]]:
    """Builds the layers of a model YAML.

    Args:
        model_yaml: the YAML as a mapping; it is not changed.
        ch: one item, the input channels.
        source: the file's name, for messages.

    Returns:
        The layers, each with attributes i (row), f (from), type (dotted class path) and np (parameters), and the rows
        whose output a later row reads, sorted.

    Raises:
        UserError: a row that cannot be built; says which and why.
    """
    names = {"nc": model_yaml["nc"], "anchors": model_yaml.get("anchors")}
    layers, saved, channels, totals = [], [], [], Totals()
    for index, row in enumerate([*model_yaml["backbone"], *model_yaml["head"]]):
        try:
            sources, repeats, name, args = config.check_row(row)
            listed = [sources] if isinstance(sources, int) else sources
            positions = [config.absolute_row(position, index) for position in listed]
            inputs = [channels[position] if position >= 0 else ch[-1] for position in positions]
            block = find_block(name)
            if repeats > 1:
                repeats = max(round(repeats * model_yaml["depth_multiple"]), 1)
            row_inputs = config.RowInputs(inputs, config.channel_scale(model_yaml), model_yaml.get("inplace", True))
            own_args = config.resolve_argument(args, names)
            args, width = block.plan(row_inputs, own_args)
            config.check_size(repeats, row_inputs, width, own_args)
            if block.repeats_inside:
                args = [*args[:2], repeats, *args[2:]]
            copies = 1 if block.repeats_inside else repeats
            layer = block.cls(*args) if copies == 1 else nn.Sequential(*(block.cls(*args) for _ in range(copies)))
            if model_yaml.get("activation") is not None:
                common.set_activation(layer, model_yaml["activation"])
            totals.add(layer, repeats)
        except ROW_ERRORS as error:
            raise UserError(f"{source}: row {index} {str(row):.300}: {config.reason_of(error)}") from error
        layer.i, layer.f, layer.type = index, sources, f"{block.cls.__module__}.{block.cls.__qualname__}"
        layer.np = sum(parameter.numel() for parameter in layer.parameters())
        layer.repeats, layer.arguments = repeats, args
        layers.append(layer)
        channels.append(width)
        saved.extend(position for position, written in zip(positions, listed, strict=True) if written != -1)
    return nn.Sequential(*layers), sorted(saved)


class Model(nn.Module):
    """A detector built from a model YAML.

    Weights are drawn from torch's generator, as its layers do; nothing else is drawn. Batch-norm statistics are those
    of new layers: strides are measured in evaluation mode, which leaves them alone.

    Args:
        cfg: model YAML by path or bare name, or its content.
        ch: input channels, unless the YAML says.
        nc: number of classes, instead of the YAML's.
        anchors: number of anchors per level, to be found later, instead of the YAML's anchors.
        verbose: log the table of layers and the summary.

    Attributes:
        model: the layers; model[i] has the attributes of `parse_model`.
        save: rows whose output is read later.
        yaml, yaml_file: the YAML's content and file name.
        names: class names {number: name}.
        stride: float32 (nl,), pixels per cell of each level.
        hyp: hyperparameters, attached by training.

    Raises:
        UserError: a YAML that cannot be built; says the row and why.
    """

    def __init__(
        self,
        cfg: str | Path | Mapping[str, Any] = "yolov5s.yaml",
        ch: int = 3,
        nc: int | None = None,
        anchors: float | None = None,
        verbose: bool = False,
    ):
        """Builds the layers; arguments as said at the class."""
        super().__init__()
        self.yaml, self.yaml_file = config.read_config(cfg)
        ch = self.yaml["ch"] = self.yaml.get("ch", ch)
        if nc and nc != self.yaml["nc"]:
            LOGGER.info(f"Overriding {self.yaml_file} nc={self.yaml['nc']} with nc={nc}")
            self.yaml["nc"] = nc
        if anchors and "anchors" not in self.yaml:
            raise UserError(f"{self.yaml_file}: has no anchors that the hyperparameter 'anchors' could replace.")
        if anchors:
            LOGGER.info(f"Overriding {self.yaml_file} anchors with anchors={round(anchors)}")
            self.yaml["anchors"] = round(anchors)
        self.nc = self.yaml["nc"]
        if all(map(is_ours, (*self.yaml["backbone"], *self.yaml["head"]))):
            with on_meta_device():
                self._build(ch)
            self.model, self.save = parse_model(self.yaml, [ch], self.yaml_file)
        else:  # blocks that a program has registered may need values, and are no stranger's
            self._build(ch)
        self.names = {number: str(number) for number in range(self.nc)}
        self.inplace = self.yaml.get("inplace", True)
        self.hyp: dict[str, float] | None = None
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.eps, module.momentum = BN_EPS, BN_MOMENTUM
            elif isinstance(module, INPLACE_ACTIVATIONS):
                module.inplace = not isinstance(module, INPUT_READERS)
        self.head.set_strides(self.stride, self.yaml_file)
        if verbose:
            LOGGER.info(f"\n{'':>3}{'from':>18}{'n':>3}{'params':>10}  {'module':<40}{'arguments':<30}")
            for layer in self.model:
                numbers = f"{layer.i:>3}{str(layer.f):>18}{layer.repeats:>3}{layer.np:>10}"
                LOGGER.info(f"{numbers}  {layer.type:<40}{str(layer.arguments):<30}")
            LOGGER.info(self.info())

    @property
    def head(self) -> Head:
        """The last layer."""
        return self.model[-1]

    def forward(self, x: Tensor, augment: bool = False, visualize: Callable[[nn.Module, Tensor], None] | None = None):
        """Predicts from images.

        Args:
            x: (b, ch, h, w), values 0 to 1, h and w multiples of the largest stride.
            augment: test-time augmentation (in evaluation; `visualize` is not called).
            visualize: called with every layer but the head and its output.

        Returns:
            What `Head.forward` returns: raw outputs in training, (rows, raw outputs) in evaluation; with `augment` the
            rows of all views and None.
        """
        if augment:
            return augmented_rows(lambda images: self(images)[0], x, self.stride), None
        outputs: list[Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = config.gather(layer.f, x, outputs)
            x = layer(x)
            outputs.append(x if layer.i in self.save else None)
            if visualize is not None and layer is not self.head:
                visualize(layer, x)
        return x

    def fuse(self) -> Model:
        """Folds batch norm into the convolutions, in place, and returns the model, which then only evaluates."""
        return fold_model(self).for_inference()

    def for_inference(self) -> Model:
        """Leaves out what only gradients need, and returns the model: activations overwrite their inputs."""
        for module in self.modules():
            if isinstance(module, INPLACE_ACTIVATIONS):
                module.inplace = True
        return self.requires_grad_(False)

    def info(self, imgsz: int = 640, gflops: bool = True) -> str:
        """Returns the summary line: modules, parameters, trained ones and GFLOPs (thop's, half a second) at `imgsz`."""
        parameters = list(self.parameters())
        total = sum(parameter.numel() for parameter in parameters)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        counted = count_gflops(self, imgsz) if gflops else None
        cost = "" if counted is None else f", {counted:.1f} GFLOPs"
        layers = sum(1 for _ in self.modules())
        return f"Model Summary: {layers} layers, {total} parameters, {trained} gradients{cost}"

    def _build(self, ch: int) -> None:
        """Makes the layers and measures the strides.

        Raises:
            UserError: a row that cannot be built or run, or the last one is no head of the model's classes.
        """
        self.model, self.save = parse_model(self.yaml, [ch], self.yaml_file)
        head = self.head
        if not isinstance(head, Head):
            raise UserError(f"{self.yaml_file}: the last row must be Detect or another head, not {head.type}.")
        if head.nc != self.nc:
            raise UserError(
                f"{self.yaml_file}: {type(head).__name__} has {head.nc} classes, but nc is {self.nc}: write nc there."
            )
        self.stride = self._measure_strides(ch)

    def _measure_strides(self, ch: int) -> Tensor:
        """Returns pixels per cell of each level, float32 (nl,), from a blank image (or none, without weights).

        Raises:
            UserError: maps of different sizes meet in a row, a layer's are too large, or a stride is not whole.
        """
        device = next(self.parameters()).device
        finished: list[int] = []

        def passed(layer: nn.Module, output: Any) -> None:
            check_map(output)
            finished.append(layer.i)

        self.eval()
        self.head.train()  # raw outputs: rows need the strides
        try:
            with torch.no_grad():
                size = (ch, STRIDE_IMAGE_PX, STRIDE_IMAGE_PX)
                if device.type == "meta":
                    raw = run_hollow(self, torch.zeros(0, *size, device="cpu"), visualize=passed)
                else:
                    raw = self(torch.zeros(1, *size, device=device), visualize=passed)
            strides = torch.tensor(strides_of(raw, STRIDE_IMAGE_PX), device="cpu")
        except ROW_ERRORS as error:
            layer = self.model[min(len(finished), len(self.model) - 1)]
            where = f"{self.yaml_file}: row {layer.i} ({layer.type}, from {layer.f})"
            raise UserError(f"{where}: {config.reason_of(error)}") from error
        self.train()
        return strides


DetectionModel = Model  # YOLOv5's name for it since 6.2


VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # an image's scale, and whether it is flipped left to right
PAD_VALUE = 0.447  # about the mean of photographs


def augmented_rows(predict: Callable[[Tensor], Tensor], images: Tensor, strides: Sequence[float] | Tensor) -> Tensor:
    """Test-time augmentation: predicts from every view of images, padded on the right and below to whole strides.

    Args:
        predict: maps images (b, ch, h, w) to rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities],
            level by level in the order of `strides`.
        images: (b, ch, h, w), values 0 to 1, h and w multiples of the largest stride.
        strides: (nl,) pixels per cell of each level.

    Returns:
        The rows of all views (b, m, 5 + nc), boxes in px of `images`; of the largest view without the level of the
        largest stride, of the smallest without that of the smallest.
    """
    strides_px = [round(stride) for stride in torch.as_tensor(strides).tolist()]
    found = []
    for number, (scale, flipped) in enumerate(VIEWS):
        view = images.flip(3) if flipped else images
        if scale != 1:
            sides = [side * scale for side in images.shape[2:]]
            height, width = map(int, sides)
            padded_h, padded_w = (make_divisible(side, max(strides_px)) for side in sides)
            view = F.interpolate(view, size=(height, width), mode="bilinear", align_corners=False)
            view = F.pad(view, (0, padded_w - width, 0, padded_h - height), value=PAD_VALUE)
        rows = predict(view)
        cells = [math.prod(side // stride for side in view.shape[2:]) for stride in strides_px]
        levels = list(rows.split([rows.shape[1] // sum(cells) * count for count in cells], dim=1))
        if len(levels) > 1 and number == 0:
            del levels[strides_px.index(max(strides_px))]
        if len(levels) > 1 and number == len(VIEWS) - 1:
            del levels[strides_px.index(min(strides_px))]
        for level in levels:
            x = level[..., :1] / scale
            x = images.shape[3] - x if flipped else x
            found.append(torch.cat((x, level[..., 1:4] / scale, level[..., 4:]), dim=-1))
    return torch.cat(found, dim=1)


def count_gflops(model: nn.Module, imgsz: int = 640) -> float | None:
    """Returns 2e-9 times the multiply-adds for one image of side `imgsz`, None where thop does not import.

    Counted on a small image and scaled by area. Its side is the largest stride, but at least 32: a model without a
    level for large objects still divides by 32 on the way.
    """
    try:
        from thop import profile
    except ImportError:  # thop is optional, and needs distutils, which Python 3.12 leaves to setuptools
        return None
    side = max(int(model.stride.max()), 32)
    weight = next(model.parameters())
    image = torch.zeros(1, model.yaml["ch"], side, side, device=weight.device, dtype=weight.dtype)
    operations, _ = profile(copy.deepcopy(model).eval(), inputs=(image,), verbose=False)
    return operations * 2e-9 * (imgsz / side) ** 2


def profile_layers(model: nn.Module, image: Tensor, repeats: int = 10) -> None:
    """Logs each layer's mean time on `image` (b, ch, h, w) and its parameters, and the sum."""
    milliseconds = [0.0] * len(model.model)
    outputs: list[Any] = []

    def synchronised_time() -> float:
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        return time.perf_counter()

    x = image
    for layer in model.model:
        x = x if layer.f == -1 else gather(layer.f, x, outputs)
        layer(x)  # warm-up
        start = synchronised_time()
        for _ in range(repeats):
            y = layer(x)
        milliseconds[layer.i] = (synchronised_time() - start) / repeats * 1e3
        x = y
        outputs.append(x)
    LOGGER.info(f"{'time (ms)':>10}{'params':>10}  module")
    for layer, spent in zip(model.model, milliseconds, strict=True):
        LOGGER.info(f"{spent:10.2f}{layer.np:10.0f}  {layer.type}")
    LOGGER.info(f"{sum(milliseconds):10.2f}{'':>10}  total")


PROFILE_PX = 640
PROFILE_BATCH = {"cuda": 8}  # images; one on other devices


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the script's options."""
    parser = argparse.ArgumentParser(prog="yolo.py", description="Build a model and show its layers.")
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model YAML")
    parser.add_argument("--device", default="", help="cuda device (0), mps or cpu; empty chooses")
    parser.add_argument("--profile", action="store_true", help=f"time every layer on random images of {PROFILE_PX} px")
    parser.add_argument("--test", action="store_true", help="build every models/**/yolo*.yaml")
    return parser


def main(options: argparse.Namespace) -> None:
    """Builds the model that the options name; times its layers, builds all others, as they say."""
    device = select_device(options.device)
    model = Model(options.cfg, verbose=True).to(device)
    if options.profile:
        shape = PROFILE_BATCH.get(device.type, 1), model.yaml["ch"], PROFILE_PX, PROFILE_PX
        image = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
        with torch.no_grad():
            profile_layers(model.eval(), image)
    failures = 0
    for path in progress(sorted((ROOT / "models").rglob("yolo*.yaml")), desc="building") if options.test else ():
        try:
            with torch.device("meta"):
                Model(path)
        except UserError as error:
            failures += 1
            LOGGER.error(f"{path}: {error}")
    if failures:
        raise ReportedError(f"{failures} model YAMLs do not build")


if __name__ == "__main__":
    from models import yolo  # again, under the name that the classes and their checkpoints carry

    sys.exit(run_command(yolo.main, yolo.build_parser()))
