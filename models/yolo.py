"""The detector: `Detect`, `Model`, and how the rows of a model YAML become layers.

`BLOCKS` says for each name that a row may use which class it means and how the row's arguments become the class's;
`register_block` adds to it. As a script it builds a model and shows its layers (`models.show`).
Not here: the layers (`models.common`), weights (`models.load`), test-time augmentation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models import common, config, experimental
from models.deploy import fold_model
from models.outline import Totals, check_map, outlining, run_hollow, strides_of
from models.summary import log_layers, summary_line
from models.tta import augmented_rows
from utils.checks import UserError, did_you_mean
from utils.log import LOGGER

BN_EPS, BN_MOMENTUM = 1e-3, 0.03  # part of the trained weights' meaning, though no state dict holds them
STRIDE_IMAGE_PX = 128  # side of the image on which strides are measured: the largest stride there is (P7)
# What building or running layers with arguments that do not suit them raises.
ROW_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
INPLACE_ACTIVATIONS = (nn.Hardswish, nn.LeakyReLU, nn.ReLU, nn.ReLU6, nn.SiLU)
INPUT_READERS = (nn.Hardswish, nn.SiLU)  # those whose gradient needs the input: in place they would keep a copy of it


class Detect(nn.Module):
    """Detection head: one 1x1 convolution per level, decoded to boxes in evaluation mode.

    Args:
        nc: number of classes.
        anchors: per level a flat list [w, h, w, h, ...] in pixels.
        ch: channels of each level.
        inplace: write decoded boxes over the scores' tensor where no gradient is wanted (the values are the same).

    Attributes:
        anchors: buffer (nl, na, 2), width and height in units of the level's stride once `Model` has set it.
        stride: buffer (nl,), pixels per cell; not in the state dict.
    """

    def __init__(self, nc: int = 80, anchors: Sequence[Sequence[float]] = (), ch: Sequence[int] = (), inplace=True):
        """Makes the convolutions; arguments as said at the class."""
        super().__init__()
        self.nc = nc
        self.no = nc + 5
        self.nl = len(anchors)
        self.na = len(anchors[0]) // 2
        self.inplace = inplace
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32).view(self.nl, self.na, 2))
        self.register_buffer("stride", torch.zeros(self.nl, device="cpu"), persistent=False)
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Predicts from nl maps (b, ch_i, ny_i, nx_i).

        Returns:
            In training the logits, a list of nl (b, na, ny, nx, no). In evaluation (decoded, logits): decoded is
            float32 (b, rows, no) with centre x, y, width, height in pixels, objectness and class probabilities; rows
            go level by level, then by anchor, y, x. Under autocast the logits have the weights' own type.
        """
        device_type = features[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            # bfloat16 has steps of 1/32 at the -5 to -8 of the objectness' biases
            with torch.autocast(device_type, enabled=False):
                return self.forward([map_.to(conv.weight.dtype) for conv, map_ in zip(self.m, features, strict=True)])
        logits = []
        for conv, feature in zip(self.m, features, strict=True):
            batch, _, height, width = feature.shape
            maps = conv(feature).view(batch, self.na, self.no, height, width)
            logits.append(maps.permute(0, 1, 3, 4, 2).contiguous())
        if self.training:
            return logits
        return torch.cat([self.decode(maps, level) for level, maps in enumerate(logits)], dim=1), logits

    def decode(self, logits: Tensor, level: int) -> Tensor:
        """Turns the logits (b, na, ny, nx, no) of a level into float32 rows (b, na * ny * nx, no)."""
        batch, _, height, width, _ = logits.shape
        scores = logits.float().sigmoid()
        rows = torch.arange(height, device=logits.device, dtype=torch.float32)
        columns = torch.arange(width, device=logits.device, dtype=torch.float32)
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (ny, nx, 2): x, y
        stride = self.stride[level].float()
        anchors_px = (self.anchors[level].float() * stride).view(self.na, 1, 1, 2)
        xy = (scores[..., 0:2] * 2 - 0.5 + cells) * stride
        wh = (scores[..., 2:4] * 2) ** 2 * anchors_px
        boxes_xywh = torch.cat((xy, wh), dim=-1)
        if self.inplace and not torch.is_grad_enabled():
            scores[..., :4] = boxes_xywh
        else:
            scores = torch.cat((boxes_xywh, scores[..., 4:]), dim=-1)
        return scores.view(batch, self.na * height * width, self.no)


@dataclass(frozen=True)
class Block:
    """One entry of BLOCKS: the class, how a row becomes its arguments, and whether it repeats inside itself.

    With `repeats_inside` the number of repeats is passed as the third argument, else the layer is built so many times.
    """

    cls: type[nn.Module]
    plan: Callable[[config.RowInputs, list[Any]], config.LayerPlan] = config.same_channels
    repeats_inside: bool = False


_SCALED = [common.Conv, common.DWConv, common.Focus, common.Bottleneck, common.SPP, common.SPPF, common.C3SPP]
_SCALED += [common.GhostConv, common.GhostBottleneck, experimental.CrossConv, experimental.MixConv2d]
_SCALED += [common.GSConv, common.GSConvns, common.GSBottleneck, common.GSBottleneckC]
_REPEATING = [common.BottleneckCSP, common.C3, common.C3TR, common.C3Ghost, common.VoVGSCSP, common.VoVGSCSPC]
_SAME = [experimental.Sum, common.Classify, common.TransformerBlock]

BLOCKS: dict[str, Block] = {
    **{cls.__name__: Block(cls, config.scaled_channels) for cls in _SCALED},
    **{cls.__name__: Block(cls, config.scaled_channels, repeats_inside=True) for cls in _REPEATING},
    **{cls.__name__: Block(cls) for cls in _SAME},
    "Concat": Block(common.Concat, config.joined_channels),
    "Contract": Block(common.Contract, config.contracted_channels),
    "Expand": Block(common.Expand, config.expanded_channels),
    "Detect": Block(Detect, config.detect_channels),
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
    """Tells whether a row names a block of this program or of torch, which works without values (see `outlining`)."""
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
    names = {"nc": model_yaml["nc"], "anchors": model_yaml["anchors"]}
    layers, saved, channels, totals = [], [], [], Totals()
    for index, row in enumerate([*model_yaml["backbone"], *model_yaml["head"]]):
        try:
            sources, repeats, name, args = config.check_row(row)
            listed = [sources] if isinstance(sources, int) else sources
            positions = [config.absolute_row(position, index) for position in listed]
            inputs = [channels[position] if position >= 0 else ch[-1] for position in positions]
            row_inputs = config.RowInputs(inputs, config.channel_scale(model_yaml), model_yaml.get("inplace", True))
            layer, width = _build_layer(name, repeats, config.resolve_argument(args, names), row_inputs, model_yaml)
            totals.add(layer, layer.repeats)
        except ROW_ERRORS as error:
            raise UserError(f"{source}: row {index} {str(row):.300}: {config.reason_of(error)}") from error
        layer.i, layer.f = index, sources
        layers.append(layer)
        channels.append(width)
        saved.extend(position for position, written in zip(positions, listed, strict=True) if written != -1)
    return nn.Sequential(*layers), sorted(saved)


def _build_layer(name, repeats, args, inputs: config.RowInputs, model_yaml: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Builds one row's layer; returns it with its output channels."""
    block = find_block(name)
    if repeats > 1:
        repeats = max(round(repeats * model_yaml["depth_multiple"]), 1)
    own_args = args
    args, width = block.plan(inputs, own_args)
    config.check_size(repeats, inputs, width, own_args)
    if block.repeats_inside:
        args = [*args[:2], repeats, *args[2:]]
    copies = 1 if block.repeats_inside else repeats
    layer = block.cls(*args) if copies == 1 else nn.Sequential(*(block.cls(*args) for _ in range(copies)))
    if model_yaml.get("activation") is not None:
        common.set_activation(layer, model_yaml["activation"])
    layer.type = f"{block.cls.__module__}.{block.cls.__qualname__}"
    layer.np = sum(parameter.numel() for parameter in layer.parameters())
    layer.repeats, layer.arguments = repeats, args
    return layer, width


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
        if anchors:
            LOGGER.info(f"Overriding {self.yaml_file} anchors with anchors={round(anchors)}")
            self.yaml["anchors"] = round(anchors)
        self.nc = self.yaml["nc"]
        if all(map(is_ours, (*self.yaml["backbone"], *self.yaml["head"]))):
            with outlining():
                self._build(ch)
            self.model, self.save = parse_model(self.yaml, [ch], self.yaml_file)
        else:  # blocks that a program has registered may need values, and are no stranger's
            self._build(ch)
        self.names = {number: str(number) for number in range(self.nc)}
        self.inplace = self.yaml.get("inplace", True)
        self.hyp: dict[str, float] | None = None
        self._set_anchors()
        self._initialise()
        if verbose:
            log_layers(self)
            LOGGER.info(self.info())

    @property
    def detect(self) -> Detect:
        """The last layer."""
        return self.model[-1]

    def forward(self, x: Tensor, augment: bool = False, visualize: Callable[[nn.Module, Tensor], None] | None = None):
        """Predicts from images.

        Args:
            x: (b, ch, h, w), values 0 to 1, h and w multiples of the largest stride.
            augment: look at the images in several sizes, mirrored too (in evaluation, `visualize` is not called).
            visualize: called with every layer but Detect and its output.

        Returns:
            What `Detect.forward` returns: logits in training, (decoded, logits) in evaluation; with `augment` the rows
            of all views and None.
        """
        if augment:
            return augmented_rows(lambda images: self(images)[0], x, self.stride), None
        outputs: list[Tensor | None] = []
        for layer in self.model:
            if layer.f != -1:
                x = config.gather(layer.f, x, outputs)
            x = layer(x)
            outputs.append(x if layer.i in self.save else None)
            if visualize is not None and layer is not self.detect:
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
        return summary_line(self, imgsz, gflops)

    def _build(self, ch: int) -> None:
        """Makes the layers and measures the strides.

        Raises:
            UserError: a row that cannot be built or run, or the last one is no Detect of the model's classes.
        """
        self.model, self.save = parse_model(self.yaml, [ch], self.yaml_file)
        if not isinstance(self.detect, Detect):
            raise UserError(f"{self.yaml_file}: the last row must be Detect, not {self.detect.type}.")
        if self.detect.nc != self.nc:
            raise UserError(
                f"{self.yaml_file}: Detect has {self.detect.nc} classes, but nc is {self.nc}: write nc there."
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
        self.detect.train()  # logits, not boxes: boxes need the strides
        try:
            with torch.no_grad():
                size = (ch, STRIDE_IMAGE_PX, STRIDE_IMAGE_PX)
                if device.type == "meta":
                    logits = run_hollow(self, torch.zeros(0, *size, device="cpu"), visualize=passed)
                else:
                    logits = self(torch.zeros(1, *size, device=device), visualize=passed)
            strides = torch.tensor(strides_of(logits, STRIDE_IMAGE_PX), device="cpu")
        except ROW_ERRORS as error:
            layer = self.model[min(len(finished), len(self.model) - 1)]
            where = f"{self.yaml_file}: row {layer.i} ({layer.type}, from {layer.f})"
            raise UserError(f"{where}: {config.reason_of(error)}") from error
        self.train()
        return strides

    def _set_anchors(self) -> None:
        """Puts the strides and the anchors, in units of them, into Detect; small anchors go with small strides."""
        detect, strides = self.detect, self.stride.tolist()
        anchors = detect.arguments[1]
        growth_px = math.prod(anchors[-1][-2:]) - math.prod(anchors[0][:2])
        if growth_px * (strides[-1] - strides[0]) < 0:
            LOGGER.info(f"{self.yaml_file}: reversing the order of the anchors' levels")
            anchors = anchors[::-1]
        detect.stride.copy_(self.stride)
        anchors_px = torch.tensor(anchors, dtype=torch.float32, device="cpu").view(detect.nl, detect.na, 2)
        detect.anchors.copy_(anchors_px / self.stride.view(-1, 1, 1))

    def _initialise(self) -> None:
        """Sets batch norm's constants, activations' in-place flag, and Detect's biases.

        The biases expect 8 objects in an image of 640 px and, of the classes, 0.6 spread over all.
        """
        for module in self.modules():
            if type(module) is nn.BatchNorm2d:
                module.eps, module.momentum = BN_EPS, BN_MOMENTUM
            elif isinstance(module, INPLACE_ACTIVATIONS):
                module.inplace = not isinstance(module, INPUT_READERS)
        detect = self.detect
        for conv, stride in zip(detect.m, self.stride.tolist(), strict=True):
            bias = conv.bias.detach().view(detect.na, detect.no)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (detect.nc - 0.999999))


DetectionModel = Model  # YOLOv5's name for it since 6.2


if __name__ == "__main__":
    from models import show  # imports this file again, under the name that the classes and their checkpoints carry

    sys.exit(show.run())
