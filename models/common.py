"""Layers that model YAMLs name: YOLOv5 6.1's blocks and the GSConv family of slim-neck.

`Detect`, `Model` and the table that YAML rows are looked up in are in `models.yolo`. Class names and the attributes
`cv1`, `cv2`, `m`, `bn`, `conv`, `act`, `gsb` ... stay as they are: YAML rows and the keys of saved weights depend on
them.

Shapes: x is (b, c1, h, w) and the result (b, c2, h / s, w / s) unless a block says otherwise. Arguments, in all blocks:
c1, c2 channels in and out; k kernel side; s stride; p padding (None: such that stride 1 keeps the size); g groups;
e hidden channels as a fraction of c2; n inner repeats; act True for the model's activation, a module for that one,
anything else for none.
"""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import did_you_mean

MAX_ACTIVATION_TEXT = 200  # characters; Python's parser itself fails on nesting that few of them cannot hold
MAX_ACTIVATION_PARAMETERS = 100_000

# Other people's programs import these names from here; they are defined where they belong, above this file.
DEFINED_ABOVE = {
    "AutoShape": "models.inference.autoshape",
    "Detections": "models.inference.autoshape",
    "DetectMultiBackend": "models.inference.multibackend",
}


def __getattr__(name: str) -> Any:
    """Finds the names of DEFINED_ABOVE when they are asked for."""
    if name in DEFINED_ABOVE:
        return getattr(importlib.import_module(DEFINED_ABOVE[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def autopad(k: int | Sequence[int], p: int | Sequence[int] | None = None) -> int | Sequence[int]:
    """Returns the padding that keeps the size of an input at stride 1: `p` when given, else half the kernel `k`."""
    if p is not None:
        return p
    return k // 2 if isinstance(k, int) else [side // 2 for side in k]


def make_activation(act: bool | nn.Module | None) -> nn.Module:
    """Returns SiLU for True (until the model's `activation` replaces it), the module itself, or no activation.

    Raises:
        TypeError: a name, which is not an activation yet (see `parse_activation`).
    """
    if isinstance(act, str):
        raise TypeError(f"act='{act}': give True, False or an activation such as nn.ReLU()")
    if act is True:
        return nn.SiLU()
    return act if isinstance(act, nn.Module) else nn.Identity()


def is_activation(name: str) -> bool:
    """Tells whether `name` ("SiLU", "nn.SiLU") is one of torch's activation classes, of one input."""
    return name.removeprefix("nn.") in set(nn.modules.activation.__all__) - {"MultiheadAttention"}


def parse_activation(text: str) -> nn.Module:
    """Makes an activation from its name, with literal arguments or without: `nn.LeakyReLU(0.1)`, `nn.Mish()`, `ReLU`.

    Nothing is evaluated: the name is looked up among torch's activations, the arguments are numbers and the like.

    Raises:
        ValueError: no such activation, or arguments that it does not take.
    """
    text = str(text)
    problem = f"{text[:80]!r} is not an activation; write it like nn.SiLU(), nn.LeakyReLU(0.1) or Mish"
    try:
        if len(text) > MAX_ACTIVATION_TEXT:
            raise ValueError(f"{len(text)} characters are too many.")
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func).removeprefix("torch.")
        args = [ast.literal_eval(arg) for arg in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if not is_activation(name):
            raise ValueError(did_you_mean(name.removeprefix("nn."), nn.modules.activation.__all__))
        if name.endswith("PReLU") and any(value > MAX_ACTIVATION_PARAMETERS for value in (*args, *keywords.values())):
            raise ValueError("It has too many parameters.")
        return getattr(nn.modules.activation, name.removeprefix("nn."))(*args, **keywords)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{problem}. {error}".rstrip()) from error


def activation_key(text: str) -> str:
    """Returns what a model YAML's `activation` says for an activation named in any case: `relu` gives `nn.ReLU()`.

    Raises:
        ValueError: no such activation, or arguments that it does not take.
    """
    name, bracket, arguments = text.strip().removeprefix("torch.").removeprefix("nn.").partition("(")
    name = {known.lower(): known for known in nn.modules.activation.__all__}.get(name.lower(), name)
    key = f"nn.{name}({arguments if bracket else ')'}"
    parse_activation(key)
    return key


def set_activation(module: nn.Module, activation: str | Mapping[str, str]) -> None:
    """Gives every block in `module` that was built with act=True an activation of its own, as the YAML key says.

    Args:
        module: a layer or a model.
        activation: for all blocks, as `parse_activation` takes it, or a mapping from a block's class name to it
            (`{Conv: nn.Hardswish(), BottleneckCSP: nn.LeakyReLU(0.1)}`); classes that are not named keep SiLU.

    Raises:
        ValueError: not an activation.
    """
    for block in module.modules():
        if getattr(block, "default_act", False):
            text = activation.get(type(block).__name__) if isinstance(activation, Mapping) else activation
            if text is not None:
                block.act = parse_activation(text)


class Conv(nn.Module):
    """Convolution without bias, batch norm, activation.

    `bn` is None once batch norm has been folded into the convolution (`models.deploy`). `default_act` tells that the
    activation is the model's to choose.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, p=None, g: int = 1, act: bool | nn.Module = True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, autopad(k, p), groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = make_activation(act)
        self.default_act = act is True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        x = self.conv(x)
        return self.act(x if self.bn is None else self.bn(x))


class DWConv(Conv):
    """Depthwise convolution: as many groups as c1 and c2 have in common."""

    def __init__(self, c1: int, c2: int, k=1, s=1, act: bool | nn.Module = True):
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), act=act)


class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron, both residual, without norms or activation (they did better without).

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
    """

    def __init__(self, c: int, num_heads: int):
        super().__init__()
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(embed_dim=c, num_heads=num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (length, b, c) to the same shape."""
        x = self.ma(self.q(x), self.k(x), self.v(x))[0] + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """A stack of transformer layers over the cells of a feature map, with a learned position term.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
    """

    def __init__(self, c1: int, c2: int, num_heads: int, num_layers: int):
        """Takes channels c1 in and c2 out; a 1x1 convolution comes first where they differ."""
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        if self.conv is not None:
            x = self.conv(x)
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).permute(2, 0, 1)  # (h * w, b, c2)
        tokens = self.tr(tokens + self.linear(tokens))
        return tokens.permute(1, 2, 0).reshape(batch, channels, height, width)


class Bottleneck(nn.Module):
    """1x1 then 3x3 convolution, residual where `shortcut` is set and c1 = c2."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5):
        """Takes channels c1 in, c2 * e hidden and c2 out, and the groups g of the 3x3 convolution."""
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_, c2, 3, 1, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class BottleneckCSP(nn.Module):
    """Cross-stage partial block with one batch norm over both branches.

    Source: Wang et al., "CSPNet", https://arxiv.org/abs/1911.11929.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = nn.Conv2d(c1, c_, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(c_, c_, 1, 1, bias=False)
        self.cv4 = Conv(2 * c_, c2, 1, 1)
        self.bn = nn.BatchNorm2d(2 * c_)
        self.act = nn.SiLU()
        self.default_act = True
        self.m = nn.Sequential(*(Bottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        y = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), dim=1)
        return self.cv4(self.act(self.bn(y)))


class CrossStage(nn.Module):
    """What C3 and its kin share: `inner` on one 1x1 branch, the other passed by, a 1x1 convolution over both.

    Source: Wang et al., "CSPNet", https://arxiv.org/abs/1911.11929, with one convolution less per block.
    """

    def __init__(self, c1: int, c2: int, c_: int, inner: nn.Module):
        """Takes channels c1 in and c2 out, and `inner`, a module with c_ channels in and out."""
        super().__init__()
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c1, c_, 1, 1)
        self.cv3 = Conv(2 * c_, c2, 1, 1)
        self.m = inner

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class C3(CrossStage):
    """Cross-stage partial block of three convolutions around n bottlenecks."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        c_ = int(c2 * e)
        super().__init__(c1, c2, c_, nn.Sequential(*(Bottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n))))


class C3TR(CrossStage):
    """C3 around a transformer of 4 heads. `shortcut` and `g` are there for C3's rows; nothing reads them."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        """Takes channels c1 in, c2 * e hidden (a multiple of 4) and c2 out, and n transformer layers."""
        c_ = int(c2 * e)
        super().__init__(c1, c2, c_, TransformerBlock(c_, c_, 4, n))


class C3SPP(CrossStage):
    """C3 around spatial pyramid pooling. `n`, `shortcut` and `g` are there for C3's rows; nothing reads them."""

    def __init__(self, c1: int, c2: int, k=(5, 9, 13), n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        """Takes channels c1 in, c2 * e hidden and c2 out, and the sides k of the pooling windows."""
        c_ = int(c2 * e)
        super().__init__(c1, c2, c_, SPP(c_, c_, k))


class C3Ghost(CrossStage):
    """C3 around n ghost bottlenecks. `shortcut` and `g` are there for C3's rows; nothing reads them."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        c_ = int(c2 * e)
        super().__init__(c1, c2, c_, nn.Sequential(*(GhostBottleneck(c_, c_) for _ in range(n))))


class C3GS(CrossStage):
    """C3 whose 3x3 convolutions are GSConvs of depthwise side 3; its 1x1 convolutions stay dense.

    In int8 a depthwise tap costs about four times a dense one, so that a GSConv pays only where it replaces many taps.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        """Takes what `C3` takes; c2 * e is even."""
        c_ = int(c2 * e)
        inner = nn.Sequential(*(Bottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))
        for bottleneck in inner:
            bottleneck.cv2 = GSConv(c_, c_, 3, 1, g, d=3)
        super().__init__(c1, c2, c_, inner)


class SPP(nn.Module):
    """Spatial pyramid pooling: the input beside its maxima over windows of several sides.

    Source: He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks", https://arxiv.org/abs/1406.4729.
    """

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13)):
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_ * (len(k) + 1), c2, 1, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(side, stride=1, padding=side // 2) for side in k)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], dim=1))


class SPPF(nn.Module):
    """SPP with windows k, 2k - 1, 3k - 2 (5, 9, 13) got by pooling three times in a row, at less cost."""

    def __init__(self, c1: int, c2: int, k: int = 5):
        """Takes channels c1 in and c2 out, and the side k of the window that is applied three times."""
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c_ * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        x = self.cv1(x)
        once = self.m(x)
        twice = self.m(once)
        return self.cv2(torch.cat((x, once, twice, self.m(twice)), dim=1))


class Focus(nn.Module):
    """Moves 2x2 squares of pixels into channels, then a convolution: the stem of YOLOv5 before 6.0."""

    def __init__(self, c1: int, c2: int, k=1, s=1, p=None, g: int = 1, act: bool | nn.Module = True):
        """Takes what `Conv` takes; c1 counts the channels before they are multiplied by four."""
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w), h and w even, to (b, c2, h / 2 / s, w / 2 / s)."""
        even_rows, odd_rows = x[:, :, ::2], x[:, :, 1::2]
        phases = (even_rows[..., ::2], odd_rows[..., ::2], even_rows[..., 1::2], odd_rows[..., 1::2])
        return self.conv(torch.cat(phases, dim=1))


class GhostConv(nn.Module):
    """Half the channels by a convolution, the other half by a cheap depthwise 5x5 on them.

    Source: Han et al., "GhostNet", https://arxiv.org/abs/1911.11907.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, g: int = 1, act: bool | nn.Module = True):
        """Takes channels c1 in and c2 out (even), and kernel k, stride s, groups g of the first convolution."""
        super().__init__()
        c_ = half_channels(c2)
        self.cv1 = Conv(c1, c_, k, s, None, g, act)
        self.cv2 = Conv(c_, c_, 5, 1, None, c_, act)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        x = self.cv1(x)
        return torch.cat((x, self.cv2(x)), dim=1)


class GhostBottleneck(nn.Module):
    """Two ghost convolutions, residual; with s = 2 a depthwise convolution between them halves the size.

    Source: Han et al., "GhostNet", https://arxiv.org/abs/1911.11907.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1):
        """Takes channels c1 in and c2 out, and kernel k of the depthwise convolutions when the stride s is 2."""
        super().__init__()
        c_ = c2 // 2
        shrinks = s == 2
        self.conv = nn.Sequential(
            GhostConv(c1, c_, 1, 1),
            DWConv(c_, c_, k, s, act=False) if shrinks else nn.Identity(),
            GhostConv(c_, c2, 1, 1, act=False),
        )
        self.shortcut = nn.Identity()
        if shrinks:
            self.shortcut = nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        return self.conv(x) + self.shortcut(x)


class Contract(nn.Module):
    """Moves squares of `gain` x `gain` cells into channels: (b, c, h, w) to (b, c * gain^2, h / gain, w / gain)."""

    def __init__(self, gain: int = 2):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, c * gain^2, h / gain, w / gain)."""
        batch, channels, height, width = x.shape
        gain = self.gain
        x = x.reshape(batch, channels, height // gain, gain, width // gain, gain).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(batch, channels * gain * gain, height // gain, width // gain)


class Expand(nn.Module):
    """Moves channels into squares of `gain` x `gain` cells: the inverse of `Contract`."""

    def __init__(self, gain: int = 2):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c, h, w) to (b, c / gain^2, h * gain, w * gain)."""
        batch, channels, height, width = x.shape
        gain = self.gain
        x = x.reshape(batch, gain, gain, channels // gain**2, height, width).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(batch, channels // gain**2, height * gain, width * gain)


class Concat(nn.Module):
    """Joins a list of tensors along `dimension`."""

    def __init__(self, dimension: int = 1):
        super().__init__()
        self.d = dimension

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Maps tensors (b, c_i, h, w) to (b, sum of c_i, h, w) for dimension 1."""
        return torch.cat(tuple(x), dim=self.d)


class Classify(nn.Module):
    """Classification head: global average of one map or several, then a convolution to c2 scores."""

    def __init__(self, c1: int, c2: int, k=1, s=1, p=None, g: int = 1):
        """Takes the channels c1 of all maps together, c2 classes, and kernel, stride, padding, groups."""
        super().__init__()
        self.aap = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv2d(c1, c2, k, s, autopad(k, p), groups=g)
        self.flat = nn.Flatten()

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Maps (b, c1, h, w), or several maps whose channels add up to c1, to (b, c2)."""
        maps = (x,) if isinstance(x, Tensor) else x
        return self.flat(self.conv(torch.cat([self.aap(one) for one in maps], dim=1)))


def half_channels(c2: int) -> int:
    """Returns c2 / 2.

    Raises:
        ValueError: c2 is odd, so that two halves would not make it up.
    """
    if c2 % 2:
        raise ValueError(f"needs an even number of output channels, got {c2}")
    return c2 // 2


def interleave_halves(x: Tensor) -> Tensor:
    """Reorders channels (b, c, h, w): the even ones, then the odd ones (0 2 4 6 1 3 5 7 for c = 8).

    After the two halves of a GSConv have been joined, this mixes them.
    """
    return channel_shuffle(x, x.shape[1] // 2)


def alternate_halves(x: Tensor) -> Tensor:
    """Reorders channels (b, c, h, w): one of the first half, one of the second and so on (0 4 1 5 2 6 3 7 for c = 8).

    ShuffleNet's shuffle of two groups: the inverse of `interleave_halves`.
    """
    return channel_shuffle(x, 2)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Reorders channels (b, c, h, w), c a multiple of `groups`: the first of each group, then the second of each ...

    The native kernel keeps the memory format on a CPU, where it is the fastest; on other devices it makes NCHW of
    channels_last, which every convolution behind it would copy back. Exporters know only the reshaping form, in which
    the batch axis stays where it is and height and width are read from the tensor.
    """
    if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
        if x.device.type != "cpu" and x.is_contiguous(memory_format=torch.channels_last):
            return shuffle_channels_last(x, groups)
        return F.channel_shuffle(x, groups)
    batch, channels, height, width = x.shape
    return x.reshape(batch, groups, -1, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shuffle_channels_last(x: Tensor, groups: int) -> Tensor:
    """Does what `channel_shuffle` does to a map (b, c, h, w) in the memory format channels_last, which it keeps."""
    return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class GSConv(nn.Module):
    """Half the channels by a dense convolution, the other half by a depthwise one on them, then shuffled together.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424, whose depthwise side is 5.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, g: int = 1, act: bool | nn.Module = True, d: int = 5):
        """Takes channels c1 in and c2 out (even); k, s, g of the dense convolution; side d (odd) of the depthwise."""
        super().__init__()
        if type(d) is not int or d < 1 or d % 2 == 0:
            raise ValueError(f"the depthwise side must be an odd whole number, got {d!r:.80}")
        c_ = half_channels(c2)
        self.cv1 = Conv(c1, c_, k, s, None, g, act)
        self.cv2 = Conv(c_, c_, d, 1, None, c_, act)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        x = self.cv1(x)
        return interleave_halves(torch.cat((x, self.cv2(x)), dim=1))


class GSConvns(GSConv):
    """GSConv whose shuffle is a learned 1x1 convolution with ReLU ("ns": no shuffle), for runtimes without shuffles.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424.
    """

    def __init__(self, c1: int, c2: int, k=1, s=1, g: int = 1, act: bool | nn.Module = True):
        """Takes what `GSConv` takes."""
        super().__init__(c1, c2, k, s, g, act)
        self.shuf = nn.Conv2d(c2, c2, 1, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        x = self.cv1(x)
        return F.relu(self.shuf(torch.cat((x, self.cv2(x)), dim=1)))


class GSBottleneck(nn.Module):
    """Two GSConvs, the second of side k, stride s, g groups and without activation, beside a 1x1 shortcut.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, e: float = 0.5, g: int = 1):
        """Takes channels c1 in, c2 * e (even) between the GSConvs, and c2 out."""
        super().__init__()
        c_ = int(c2 * e)
        self.conv_lighting = nn.Sequential(GSConv(c1, c_, 1, 1), GSConv(c_, c2, k, s, g, act=False))
        self.shortcut = self.make_shortcut(c1, c2, s)

    def make_shortcut(self, c1: int, c2: int, s: int) -> nn.Module:
        """Returns the module beside the GSConvs."""
        return Conv(c1, c2, 1, s, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        return self.conv_lighting(x) + self.shortcut(x)


class GSBottleneckC(GSBottleneck):
    """GSBottleneck with a cheaper, depthwise 1x1 shortcut.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424.
    """

    def make_shortcut(self, c1: int, c2: int, s: int) -> nn.Module:
        """Returns the module beside the GSConvs."""
        return DWConv(c1, c2, 1, s, act=False)


class VoVGSCSP(nn.Module):
    """Slim-neck's replacement of C3: n GSBottlenecks on one 1x1 branch, aggregated once with the other.

    `shortcut` is there for C3's rows; nothing reads it: a GSBottleneck's shortcut is a convolution and always present.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424.
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5):
        """Takes channels c1 in, c2 * e hidden and c2 out, and n GSBottlenecks whose second GSConv has g groups."""
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, 1, 1)
        self.cv2 = Conv(c1, c_, 1, 1)
        self.gsb = self.make_inner(c_, n, g)
        self.cv3 = Conv(2 * c_, c2, 1, 1)

    def make_inner(self, c_: int, n: int, g: int) -> nn.Module:
        """Returns the module of the first branch, c_ channels in and out."""
        return nn.Sequential(*(GSBottleneck(c_, c_, e=1.0, g=g) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h, w)."""
        return self.cv3(torch.cat((self.cv2(x), self.gsb(self.cv1(x))), dim=1))


class VoVGSCSPC(VoVGSCSP):
    """Cheaper VoVGSCSP around one GSBottleneckC, whatever n: the block of the published COCO figures.

    Source: Li et al., "Slim-neck by GSConv", https://arxiv.org/abs/2206.02424.
    """

    def make_inner(self, c_: int, n: int, g: int) -> nn.Module:
        """Returns the module of the first branch, c_ channels in and out."""
        return GSBottleneckC(c_, c_, g=g)


class ShuffleV2Block(nn.Module):
    """ShuffleNetV2's unit, with ReLU: half the channels pass by, or (s = 2) both branches see all and halve the size.

    Source: Ma et al., "ShuffleNet V2", https://arxiv.org/abs/1807.11164.
    """

    def __init__(self, c1: int, c2: int, s: int = 1):
        """Takes channels c1 in and c2 out (even; equal where the stride s is 1)."""
        super().__init__()
        c_ = half_channels(c2)
        if s == 1 and c1 != c2:
            raise ValueError(f"keeps the number of channels where its stride is 1: {c1}, not {c2}")
        self.s = s
        self.branch1 = nn.Sequential()
        if s != 1:
            self.branch1 = nn.Sequential(Conv(c1, c1, 3, s, g=c1, act=False), Conv(c1, c_, act=nn.ReLU()))
        self.branch2 = nn.Sequential(
            Conv(c1 if s != 1 else c_, c_, act=nn.ReLU()),
            Conv(c_, c_, 3, s, g=c_, act=False),
            Conv(c_, c_, act=nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        first, second = (x, x) if self.s != 1 else x.chunk(2, dim=1)
        return alternate_halves(torch.cat((self.branch1(first), self.branch2(second)), dim=1))


class DySample(nn.Module):
    """Upsampling that learns where to sample: bilinear at `scale` times the size, points moved by a 1x1 convolution.

    The paper's "lp" form: offsets times 0.25, each of `groups` groups of channels having its own. Computed in float32.

    Source: Liu et al., "Learning to Upsample by Learning to Sample", https://arxiv.org/abs/2308.15085.
    """

    def __init__(self, c1: int, scale: int, groups: int = 4):
        """Takes channels c1 in and out, a multiple of `groups`; `scale` is from 2 to 8."""
        super().__init__()
        if type(scale) is not int or not 2 <= scale <= 8:
            raise ValueError(f"scale must be a whole number from 2 to 8, got {scale!r:.80}")
        if c1 % groups:
            raise ValueError(f"needs a multiple of {groups} channels, got {c1}")
        self.scale, self.groups = scale, groups
        self.offset = nn.Conv2d(c1, 2 * groups * scale**2, 1)  # x of all groups, then y; of each the scale^2 points
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c1, h * scale, w * scale)."""
        batch, channels, height, width = x.shape
        rows, columns = height * self.scale, width * self.scale
        offset = F.pixel_shuffle(self.offset(x).float() * 0.25, self.scale)
        offset = offset.reshape(batch, 2, self.groups, rows, columns)
        # where bilinear upsampling samples, in cells of x; named types, for exporters take numbers for float64
        across = (torch.arange(columns, dtype=torch.float32, device=x.device) + 0.5) / self.scale
        down = (torch.arange(rows, dtype=torch.float32, device=x.device) + 0.5) / self.scale
        moved = ((offset[:, 0] + across) * (2 / width), (offset[:, 1] + down[:, None]) * (2 / height))
        points = torch.stack(moved, dim=-1) - 1  # -1 and 1 are the edges of the map
        sampled = F.grid_sample(
            x.float().reshape(batch * self.groups, channels // self.groups, height, width),
            points.reshape(batch * self.groups, rows, columns, 2),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return sampled.reshape(batch, channels, rows, columns).to(x.dtype)


class ASFF(nn.Module):
    """Adaptively spatial feature fusion: a level's map as a sum of all levels', weighed cell by cell, then a 3x3.

    Coarser maps come by a 1x1 convolution and nearest upsampling, finer ones by a 3x3 of stride 2, where they are more
    than twice as fine after max pooling.

    Source: Liu et al., "Learning Spatial Fusion for Single-Shot Object Detection", https://arxiv.org/abs/1911.09516.
    """

    def __init__(self, channels: Sequence[int], level: int):
        """Takes the channels of the levels, finest first and each twice as fine as the next, and which comes out."""
        super().__init__()
        c2 = channels[level]
        self.resize = nn.ModuleList()
        for source, c1 in enumerate(channels):
            if source < level:
                pools = [nn.MaxPool2d(3, 2, 1)] * (level - source - 1)
                parts = [*pools, Conv(c1, c2, 3, 2)]
            elif source > level:
                parts = [Conv(c1, c2), nn.Upsample(scale_factor=2.0 ** (source - level))]
            else:
                parts = []
            self.resize.append(nn.Sequential(*parts))
        self.weigh = nn.ModuleList(Conv(c2, 16) for _ in channels)
        self.weights = nn.Conv2d(16 * len(channels), len(channels), 1)
        self.expand = Conv(c2, c2, 3)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Maps one tensor (b, c, h, w) per level to one of the shape of its own level."""
        maps = [resize(one) for resize, one in zip(self.resize, x, strict=True)]
        weights = torch.cat([weigh(one) for weigh, one in zip(self.weigh, maps, strict=True)], dim=1)
        weights = self.weights(weights).softmax(dim=1)
        total = maps[0] * weights[:, :1]
        for level in range(1, len(maps)):
            total = total + maps[level] * weights[:, level : level + 1]
        return self.expand(total)


class MSCA(nn.Module):
    """Multi-scale convolutional attention: a map times what depthwise strips of 7, 11 and 21 cells see of it.

    Strips have little arithmetic but cost much time on CPUs.

    Source: Guo et al., "SegNeXt", https://arxiv.org/abs/2209.08575.
    """

    def __init__(self, c1: int, c2: int):
        """Takes equal channels in and out."""
        super().__init__()
        if c1 != c2:
            raise ValueError(f"keeps the number of channels: {c1}, not {c2}")
        self.local = nn.Conv2d(c1, c1, 5, padding=2, groups=c1)
        self.strips = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c1, c1, (1, k), padding=(0, k // 2), groups=c1),
                nn.Conv2d(c1, c1, (k, 1), padding=(k // 2, 0), groups=c1),
            )
            for k in (7, 11, 21)
        )
        self.mix = nn.Conv2d(c1, c1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to the same shape."""
        near = self.local(x)
        total = near
        for strip in self.strips:
            total = total + strip(near)
        return self.mix(total) * x


# Rarely used blocks. Saved YOLOv5 models have them under the name that `__module__` says, where scripts find them, too.


class CrossConv(nn.Module):
    """A k x k convolution split into 1 x k and k x 1, residual where `shortcut` is set and c1 = c2."""

    __module__ = "models.experimental"

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False):
        """Takes channels c1 in, c2 * e hidden and c2 out, kernel k, stride s, groups g of the second convolution."""
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, (1, k), (1, s))
        self.cv2 = Conv(c_, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class Sum(nn.Module):
    """Adds n maps of one shape; with `weight` all but the first are scaled by a learned factor between 0 and 2.

    Source: Tan et al., "EfficientDet", https://arxiv.org/abs/1911.09070.
    """

    __module__ = "models.experimental"

    def __init__(self, n: int, weight: bool = False):
        """Takes the number n of maps, and whether to weigh them."""
        super().__init__()
        self.weight = weight
        if weight:
            self.w = nn.Parameter(-torch.arange(1.0, n) / 2)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Maps n tensors (b, c, h, w) to one of the same shape."""
        factors = 2 * torch.sigmoid(self.w) if self.weight else [1.0] * (len(x) - 1)
        total = x[0]
        for factor, other in zip(factors, x[1:], strict=True):
            total = total + other * factor
        return total


class MixConv2d(nn.Module):
    """Convolutions of several sides beside each other, on all input channels.

    With `equal_ch` they share the output channels evenly, else such that they have about equally many weights.

    Source: Tan and Le, "MixConv", https://arxiv.org/abs/1907.09595.
    """

    __module__ = "models.experimental"

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (1, 3), s: int = 1, equal_ch: bool = True):
        super().__init__()
        if equal_ch:
            channels = np.bincount(np.floor(np.linspace(0, len(k) - 1e-6, c2)).astype(int), minlength=len(k))
        else:  # c2 shared such that share * side^2 is about the same for every side
            inverse_areas = 1 / np.square(np.asarray(k, dtype=float))
            channels = (c2 * inverse_areas / inverse_areas.sum()).round().astype(int)
            channels[channels.argmax()] += c2 - channels.sum()  # what rounding gained or lost
        self.m = nn.ModuleList(
            nn.Conv2d(c1, share, side, s, side // 2, groups=math.gcd(c1, share), bias=False)
            for side, share in zip(k, channels.tolist(), strict=True)
        )
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()
        self.default_act = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (b, c1, h, w) to (b, c2, h / s, w / s)."""
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], dim=1)))
