"""A slim neck that inherits a trained dense one: without labels, in a fraction of a training's time.

The rows of a slim model (`yolov5s-slimneck.yaml`) have dense twins: rows of the same inputs and output shape that hold
a Conv in place of the GSConv, a C3 in place of the VoVGSCSP. So a slim model can be *fitted* to a trained dense one,
its teacher, on images alone:

1. What is equal is copied; the maps that the teacher's backbone gives on some hundred images are recorded.
2. Row by row, least squares bring the student's convolutions to the twin's pre-activations, from the student's own
   maps so far (towards the twin's filters, where it has such). Each channel of a GSConv's second half sees one channel
   of the first alone: which channel of the twin comes from which is chosen by how well one tells the other, and the
   rows that read them are fitted to that order.
3. Some gradient steps tune the fitted rows together: maps that the head reads, and its logits, against the teacher's.
4. The head is fitted to the teacher's logits, its branches, where it has such, first to the teacher's. A head of
   another kind stays as it is: training has to teach it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common import C3, C3GS, SPPF, Conv, DWConv, DySample, GSBottleneck, GSConv, VoVGSCSP, VoVGSCSPC
from models.config import read_config
from models.heads import Detect, DetectAF, Head
from models.inference.evaluation import make_loader, module_predictor
from models.load import load_model, read_weights
from models.yolo import Model
from utils.checkpoint import save_checkpoint, strip_checkpoint
from utils.cli import CommandParser, echo_options, find_weights, number, run_command
from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import LabelTable, load_labels
from utils.dataloaders.loader import create_dataloader
from utils.devices import resolve_amp, select_device
from utils.errors import MAX_IMAGE_SIDE_PX, UserError, check_img_size, explain_resource_errors
from utils.eval.evaluate import NMS, EvalResult, evaluate
from utils.files import ROOT, find_file, increment_path, read_yaml, run_folder
from utils.images import DEFAULT_IMGSZ
from utils.log import LOGGER, colorstr

Maps = list[Tensor]  # of one row, batch by batch: (b, c, h, w)

POSITIONS = 16_000  # places in a row's maps that its least squares see
FIT_IMAGES = 96  # images whose maps they see; the gradient steps see all
RIDGE = 1e-2  # pull towards the twin's filters, as a share of the inputs' mean variance
FREE_RIDGE = 1e-3  # pull towards zero where there are none
RIDGE_OF_HEAD = 1e-3
CHUNK = 32_000_000  # numbers that side-by-side problems may hold at a time
HEAD_BATCHES = 16  # recorded batches that the head's fit and batch norm see
MIN_IMAGES = 32
IMAGES, BATCH_SIZE = 416, 16  # augmented training images, and of a batch, if nobody says otherwise
AUGMENTATION = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"
STEPS = 90
LEARNING_RATE, BETAS, WARMUP_STEPS, CLIP_NORM = 2e-3, (0.9, 0.99), 10, 10.0
LOGIT_GAIN, OBJECTNESS_GAIN, BOX_GAIN = 0.3, 20.0, 10.0


class LeastSquares:
    """Weighted ridge regression with a free bias over a stream of samples; one problem, or several side by side."""

    def __init__(self) -> None:
        """Begins without samples."""
        self.total = 0.0

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Takes n samples: inputs (..., n, d) and targets (..., n, o) float32, and their weights (n,)."""
        if not self.total:  # products in float32 lose little when taken about a point near the mean
            self.x0, self.y0 = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
            self.gram = self.cross = self.sum_x = self.sum_y = self.power = 0.0
        x, y = x - self.x0, y - self.y0
        wx, wy = (x, y) if weights is None else (x * weights[:, None], y * weights[:, None])
        self.total += x.shape[-2] if weights is None else weights.sum().item()
        with torch.autocast(x.device.type, enabled=False):  # it would multiply in 16 bits
            products = (wx.mT @ x, wx.mT @ y, wx.sum(-2), wy.sum(-2), (wy * y).sum(-2))
        gram, cross, sum_x, sum_y, power = (one.cpu().double() for one in products)  # not every GPU has float64
        self.gram, self.cross, self.power = self.gram + gram, self.cross + cross, self.power + power
        self.sum_x, self.sum_y = self.sum_x + sum_x, self.sum_y + sum_y

    def solve(self, ridge: float, towards: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Minimises the mean squared error plus a pull of the weights towards `towards` (..., o, d), or zero.

        Returns:
            Weights (..., o, d) and biases (..., o) float32, and R2 of each target (..., o); on the CPU.
        """
        mean_x, mean_y = self.sum_x / self.total, self.sum_y / self.total
        gram = self.gram / self.total - mean_x[..., :, None] * mean_x[..., None, :]
        cross = self.cross / self.total - mean_x[..., :, None] * mean_y[..., None, :]
        variance = (self.power / self.total - mean_y.square()).clamp(min=1e-12)
        centre_x = self.x0.cpu().double()[..., 0, :] + mean_x
        pull = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[..., None, None]
        right = cross if towards is None else cross + pull * towards.cpu().double().mT
        weight = torch.linalg.solve(gram + pull * torch.eye(gram.shape[-1], dtype=torch.float64), right)  # (..., d, o)
        error = variance + (weight * (gram @ weight - 2 * cross)).sum(-2)
        bias = self.y0.cpu().double()[..., 0, :] + mean_y - (weight * centre_x[..., :, None]).sum(-2)
        return weight.mT.float(), bias.float(), (1 - error / variance).float()


# ------------------------------------------------------------------------------------------------ maps and places


def draw_places(maps: Maps, generator: torch.Generator) -> list[Tensor]:
    """Draws places (n, 3) [image, row, column] in each batch's maps, about POSITIONS together."""
    places = []
    for one in maps:
        shape = (one.shape[0], *one.shape[2:])
        count = min(math.prod(shape), -(-POSITIONS // len(maps)))
        flat = torch.randperm(math.prod(shape), generator=generator)[:count]
        places.append(torch.stack(torch.unravel_index(flat, shape), dim=1))
    return places


def values_at(maps: Tensor, places: Tensor) -> Tensor:
    """Returns the values of maps (b, c, h, w) at places (n, 3): (n, c) float32."""
    return maps[places[:, 0], :, places[:, 1], places[:, 2]].float()


def patches_at(maps: Tensor, places: Tensor, conv: nn.Conv2d) -> Tensor:
    """Returns what `conv` reads of maps (b, c, h, w) for its output at places (n, 3): (n, c, k * k) float32."""
    (kernel_h, kernel_w), (pad_h, pad_w), (stride_h, stride_w) = conv.kernel_size, conv.padding, conv.stride
    padded = F.pad(maps, (pad_w, pad_w, pad_h, pad_h))
    image, top, left = places[:, 0], places[:, 1] * stride_h, places[:, 2] * stride_w
    taps = [padded[image, :, top + row, left + column] for row in range(kernel_h) for column in range(kernel_w)]
    return torch.stack(taps, dim=2).float()


def pre_activation(block: Conv, maps: Tensor) -> Tensor:
    """Returns what a Conv hands to its activation."""
    maps = block.conv(maps)
    return maps if block.bn is None else block.bn(maps)


def folded_weight(block: Conv, order: Tensor | None = None) -> Tensor:
    """Returns a Conv's weight (o, i * k * k) with its batch norm in it, for inputs in `order`."""
    weight = block.conv.weight
    if block.bn is not None:
        weight = weight * (block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt())[:, None, None, None]
    return (weight if order is None else weight[:, order]).flatten(1)


def settle(block: Conv, weight: Tensor, bias: Tensor, inputs: Maps) -> None:
    """Makes a Conv give weight * input + bias exactly, with the batch-norm statistics of `inputs`."""
    block.conv.weight.copy_(weight.reshape(block.conv.weight.shape))
    outputs = [block.conv(maps).float() for maps in inputs]
    mean = torch.stack([maps.mean((0, 2, 3)) for maps in outputs]).mean(0)
    square = torch.stack([(maps - mean[:, None, None]).square().mean((0, 2, 3)) for maps in outputs]).mean(0)
    block.bn.running_mean.copy_(mean)
    block.bn.running_var.copy_(square)
    block.bn.weight.copy_((square + block.bn.eps).sqrt())
    block.bn.bias.copy_(bias.flatten().to(mean.device) + mean)


# -------------------------------------------------------------------------------------------------------- the fits


def fit_conv(block: Conv, inputs: Maps, targets: Maps, places: list[Tensor], ridge: float, towards=None) -> Tensor:
    """Fits a dense or depthwise Conv to pre-activations `targets`; returns R2 of each channel."""
    squares, depthwise = LeastSquares(), block.conv.groups > 1
    for maps, target, where in zip(inputs, targets, places, strict=True):
        seen, wanted = patches_at(maps, where, block.conv), values_at(target, where)
        if depthwise:  # a problem of its own for each channel
            squares.add(seen.transpose(0, 1), wanted.T[..., None])
        else:
            squares.add(seen.flatten(1), wanted)
    weight, bias, r2 = squares.solve(ridge, towards)
    settle(block, weight, bias, inputs)
    return r2.flatten()


def pair_channels(activated: Maps, targets: Maps, places: list[Tensor], reader: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Chooses which channels a GSConv computes densely, and which by a depthwise convolution on which of those.

    Args:
        activated: what the dense half would give, for every channel of the twin.
        targets: what the depthwise half shall give, for every channel.
        places: where they are compared.
        reader: the depthwise convolution.

    Returns:
        (c / 2,) dense channels, and (c / 2,) the channel that each tells.
    """
    channels = targets[0].shape[1]
    samples = max(len(where) for where in places)
    chunk = max(1, CHUNK // (samples * (channels + math.prod(reader.kernel_size))))
    r2 = []
    for start in range(0, channels, chunk):
        squares = LeastSquares()
        for maps, target, where in zip(activated, targets, places, strict=True):
            seen = patches_at(maps[:, start : start + chunk], where, reader).transpose(0, 1)
            squares.add(seen, values_at(target, where).expand(len(seen), -1, -1))
        r2.append(squares.solve(FREE_RIDGE)[2])
    spread = torch.stack([maps.float().var((0, 2, 3)) for maps in activated]).mean(0)
    loss = (1 - torch.cat(r2)) * spread.cpu()  # of channel (column) told by channel (row)
    return match(loss)


def match(loss: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs c channels so that the sum of `loss` (c, c) [teller, told] is small: greedily, then by exchanges.

    Returns:
        (c / 2,) tellers and (c / 2,) told.
    """
    both = torch.minimum(loss, loss.T).fill_diagonal_(math.inf)
    left, pairs = both.clone(), []
    for _ in range(len(loss) // 2):
        first, second = divmod(int(left.argmin()), len(loss))
        pairs.append((first, second))
        left[[first, second]] = math.inf
        left[:, [first, second]] = math.inf
    ends = torch.tensor(pairs)
    while True:
        a, b = ends.T
        kept = both[a, b]
        ways = torch.stack((both[a][:, a] + both[b][:, b], both[a][:, b] + both[b][:, a]))  # of two pairs, crossed
        gain = kept[:, None] + kept - ways
        gain[:, range(len(ends)), range(len(ends))] = 0
        way, one, other = (int(place) for place in torch.unravel_index(gain.argmax(), gain.shape))
        if gain[way, one, other] <= 1e-9 * kept.sum():
            break
        (a1, b1), (a2, b2) = ends[one].tolist(), ends[other].tolist()
        ends[[one, other]] = torch.tensor([[a1, b2], [b1, a2]] if way else [[a1, a2], [b1, b2]])
    a, b = ends.T
    forwards = loss[a, b] <= loss[b, a]
    return torch.where(forwards, a, b), torch.where(forwards, b, a)


def shuffled(channels: Tensor) -> Tensor:
    """Returns (c,) in the order in which a GSConv gives what it has joined."""
    return channels.view(-1, 2).T.flatten()


def fit_gsconv(block: GSConv, inputs: Maps, targets: Maps, ridge: float, towards, generator, fixed=False) -> Tensor:
    """Fits a GSConv to pre-activations `targets`; returns the target's channel that each of its channels gives.

    `fixed` keeps the targets' order, for a sum with what has it.
    """
    places = draw_places(targets, generator)
    activated = [block.cv1.act(maps) for maps in targets]
    if fixed:
        dense, told = torch.argsort(shuffled(torch.arange(targets[0].shape[1]))).chunk(2)
    else:
        dense, told = pair_channels(activated, targets, places, block.cv2.conv)
    towards = None if towards is None else towards[dense]
    fit_conv(block.cv1, inputs, [maps[:, dense] for maps in targets], places, ridge, towards)
    fit_conv(block.cv2, [block.cv1(maps) for maps in inputs], [maps[:, told] for maps in targets], places, FREE_RIDGE)
    return shuffled(torch.cat((dense, told)))


def fit_bottleneck(block: GSBottleneck, twin: Sequence[nn.Module], inputs: Maps, originals: Maps, generator) -> tuple:
    """Fits a GSBottleneck to one bottleneck, or several in a row.

    Args:
        block: the receiver.
        twin: the bottlenecks.
        inputs: what the receiver reads.
        originals: what the first bottleneck reads.
        generator: draws the places.

    Returns:
        What the last bottleneck gives, and the channel of it that each of the receiver's channels gives.
    """
    first, second = block.conv_lighting
    hidden = [pre_activation(twin[0].cv1, maps) for maps in originals]
    wanted = 2 * first.cv1.conv.out_channels
    if wanted < hidden[0].shape[1]:  # the cheaper block has fewer: those that vary most
        spread = torch.stack([maps.float().var((0, 2, 3)) for maps in hidden]).mean(0)
        hidden = [maps[:, spread.topk(wanted).indices] for maps in hidden]
    fit_gsconv(first, inputs, hidden, FREE_RIDGE, None, generator)
    for bottleneck in twin:
        originals = [bottleneck(maps) for maps in originals]
    # The second GSConv has no activation, so that it and the shortcut are one linear map: fitted as one
    read = [first(maps) for maps in inputs]
    places = draw_places(originals, generator)
    dense, told = pair_channels(originals, originals, places, second.cv2.conv)
    cheap = block.shortcut.conv.groups > 1
    channels, half = originals[0].shape[1], len(dense)
    position = torch.argsort(shuffled(torch.arange(channels)))  # where a joined channel comes out
    shortcut = torch.zeros(channels, 1 if cheap else inputs[0].shape[1])
    bias = torch.zeros(channels)

    squares = LeastSquares()
    for maps, passed, target, where in zip(read, inputs, originals, places, strict=True):
        seen = patches_at(maps, where, second.cv1.conv).flatten(1)
        seen = seen if cheap else torch.cat((seen, values_at(passed, where)), 1)
        squares.add(seen, values_at(target, where)[:, dense])
    weight, bias[position[:half]], _ = squares.solve(FREE_RIDGE)
    taps = second.cv1.conv.weight[0].numel()
    settle(second.cv1, weight[:, :taps], torch.zeros(half), read)
    if not cheap:
        shortcut[position[:half]] = weight[:, taps:]

    read = [second.cv1(maps) for maps in read]
    taps = second.cv2.conv.weight[0].numel()
    depthwise = torch.zeros(half, taps)
    per_channel = max(len(where) for where in places) * (taps + shortcut.shape[1])
    chunk = max(1, CHUNK // per_channel)
    for start in range(0, half, chunk):
        part = slice(start, min(start + chunk, half))
        out = position[half:][part]
        squares = LeastSquares()
        for maps, passed, target, where in zip(read, inputs, originals, places, strict=True):
            seen = patches_at(maps[:, part], where, second.cv2.conv).transpose(0, 1)
            beside = values_at(passed, where)
            beside = beside[:, out].T[..., None] if cheap else beside.expand(len(seen), -1, -1)
            squares.add(torch.cat((seen, beside), 2), values_at(target, where)[:, told[part]].T[..., None])
        weight, found, _ = squares.solve(FREE_RIDGE)
        depthwise[part], shortcut[out], bias[out] = weight[:, 0, :taps], weight[:, 0, taps:], found[:, 0]
    settle(second.cv2, depthwise, torch.zeros(half), read)
    settle(block.shortcut, shortcut, bias, inputs)
    return originals, shuffled(torch.cat((dense, told)))


# A row's fit takes (receiver, twin, receiver's inputs, twin's inputs, order of the inputs, generator) and returns the
# twin's channel that each of the receiver's channels gives.


def fit_row_conv(block, twin, inputs, originals, order, generator) -> Tensor:
    """Conv for Conv."""
    targets = [pre_activation(twin, maps) for maps in originals]
    fit_conv(block, inputs, targets, draw_places(targets, generator), RIDGE, folded_weight(twin, order))
    return torch.arange(targets[0].shape[1])


def fit_row_gsconv(block, twin, inputs, originals, order, generator) -> Tensor:
    """GSConv for Conv."""
    targets = [pre_activation(twin, maps) for maps in originals]
    return fit_gsconv(block, inputs, targets, RIDGE, folded_weight(twin, order), generator)


def fit_row_depthwise(block, twin, inputs, originals, order, generator) -> Tensor:
    """Depthwise Conv for depthwise Conv; the channels stay in the order of the inputs."""
    targets = [pre_activation(twin, maps)[:, order] for maps in originals]
    towards = folded_weight(twin)[order, None]
    fit_conv(block, inputs, targets, draw_places(targets, generator), RIDGE, towards)
    return order


def fit_row_same_gsconv(block, twin, inputs, originals, order, generator) -> Tensor:
    """GSConv for GSConv."""
    order = fit_row_conv(block.cv1, twin.cv1, inputs, originals, order, generator)
    inputs, originals = [block.cv1(maps) for maps in inputs], [twin.cv1(maps) for maps in originals]
    fit_row_depthwise(block.cv2, twin.cv2, inputs, originals, order, generator)
    return torch.arange(2 * len(order))


def fit_row_sppf(block, twin, inputs, originals, order, generator) -> Tensor:
    """SPPF for SPPF."""
    fit_row_conv(block.cv1, twin.cv1, inputs, originals, order, generator)

    def pooled(pools, maps):
        maps = [pools.cv1(maps)]
        for _ in range(3):
            maps.append(pools.m(maps[-1]))
        return torch.cat(maps, 1)

    inputs, originals = [pooled(block, maps) for maps in inputs], [pooled(twin, maps) for maps in originals]
    return fit_row_conv(block.cv2, twin.cv2, inputs, originals, torch.arange(inputs[0].shape[1]), generator)


def fit_row_dysample(block, twin, inputs, originals, order, generator) -> Tensor:
    """DySample for an Upsample: points where that reads, from where training may move them; the order stays."""
    nn.init.zeros_(block.offset.weight)
    if twin.mode == "nearest":  # at a cell's middle; else bilinear, as without offsets
        points = (torch.arange(block.scale) + 0.5) / block.scale
        towards = ((0.5 - points) / 0.25).expand(block.scale, -1)
        bias = torch.stack([towards.flatten(), towards.T.flatten()])  # x of a cell's points, then y
        block.offset.bias.copy_(bias[:, None].expand(-1, block.groups, -1).flatten())
    return order


def is_narrower(block: C3, twin: C3) -> bool:
    """Tells whether a C3 has fewer hidden channels than another."""
    return block.cv1.conv.out_channels < twin.cv1.conv.out_channels


def fit_row_narrow_c3(block, twin, inputs, originals, order, generator) -> Tensor:
    """C3 of fewer hidden channels for C3: those that tell what reads them most."""

    def fit(own, other, inputs, originals, order, reader, kept=None):
        targets = [pre_activation(other, maps) for maps in originals]
        if kept is None:
            spread = torch.stack([other.act(maps).float().var((0, 2, 3)) for maps in targets]).mean(0)
            strength = spread * reader.square().unflatten(1, (len(spread), -1)).sum((0, 2))
            kept = strength.topk(own.conv.out_channels).indices.sort().values
        places, towards = draw_places(targets, generator), folded_weight(other, order)[kept]
        fit_conv(own, inputs, [maps[:, kept] for maps in targets], places, RIDGE, towards)
        return kept

    joined = folded_weight(twin.cv3).chunk(2, 1)  # what reads the bottlenecks, and what reads the other branch
    first = folded_weight(twin.m[0].cv1)
    trunk = fit(block.cv1, twin.cv1, inputs, originals, order, first)
    passed = fit(block.cv2, twin.cv2, inputs, originals, order, joined[1])
    inner, target = [block.cv1(maps) for maps in inputs], [twin.cv1(maps) for maps in originals]
    for place, (own, other) in enumerate(zip(block.m, twin.m, strict=True)):
        reader = folded_weight(twin.m[place + 1].cv1) if place + 1 < len(twin.m) else joined[0]
        hidden = fit(own.cv1, other.cv1, inner, target, trunk, folded_weight(other.cv2))
        read, original = [own.cv1(maps) for maps in inner], [other.cv1(maps) for maps in target]
        trunk = fit(own.cv2, other.cv2, read, original, hidden, reader, trunk if other.add else None)
        inner, target = [own(maps) for maps in inner], [other(maps) for maps in target]
    given = [torch.cat((one, block.cv2(maps)), 1) for one, maps in zip(inner, inputs, strict=True)]
    wanted = [torch.cat((one, twin.cv2(maps)), 1) for one, maps in zip(target, originals, strict=True)]
    order = torch.cat((trunk, twin.cv1.conv.out_channels + passed))
    return fit_row_conv(block.cv3, twin.cv3, given, wanted, order, generator)


def fit_row_csp(block, twin, inputs, originals, order, generator) -> Tensor:
    """C3 or VoVGSCSP for C3."""
    if isinstance(block, C3) and is_narrower(block, twin):
        return fit_row_narrow_c3(block, twin, inputs, originals, order, generator)
    fit_row_conv(block.cv1, twin.cv1, inputs, originals, order, generator)
    fit_row_conv(block.cv2, twin.cv2, inputs, originals, order, generator)
    inner, target = [block.cv1(maps) for maps in inputs], [twin.cv1(maps) for maps in originals]
    passed, passed_target = [block.cv2(maps) for maps in inputs], [twin.cv2(maps) for maps in originals]
    hidden = inner[0].shape[1]
    order = torch.arange(hidden)
    if isinstance(block, C3):
        block.m.load_state_dict(twin.m.state_dict())
        inner, target = [block.m(maps) for maps in inner], [twin.m(maps) for maps in target]
    elif isinstance(block, C3GS):
        for own, other in zip(block.m, twin.m, strict=True):
            fit_row_conv(own.cv1, other.cv1, inner, target, order, generator)
            read, hidden_target = [own.cv1(maps) for maps in inner], [other.cv1(maps) for maps in target]
            goal, towards = [pre_activation(other.cv2, maps) for maps in hidden_target], folded_weight(other.cv2)
            order = fit_gsconv(own.cv2, read, goal, RIDGE, towards, generator, fixed=other.add)
            inner, target = [own(maps) for maps in inner], [other(maps) for maps in target]
    else:
        chain = list(block.gsb) if isinstance(block.gsb, nn.Sequential) else [block.gsb]
        for number, bottleneck in enumerate(chain):
            last = number + 1 == len(chain)
            part = list(twin.m)[number:] if last else [twin.m[number]]
            target, order = fit_bottleneck(bottleneck, part, inner, target, generator)
            inner = [bottleneck(maps) for maps in inner]
    joined = [torch.cat(pair, 1) for pair in zip(target, passed_target, strict=True)]  # as C3 does
    if isinstance(block, C3 | C3GS):
        own, order = zip(inner, passed, strict=True), torch.cat((order, torch.arange(hidden, 2 * hidden)))
    else:
        own, order = zip(passed, inner, strict=True), torch.cat((torch.arange(hidden, 2 * hidden), order))
    return fit_row_conv(block.cv3, twin.cv3, [torch.cat(pair, 1) for pair in own], joined, order, generator)


FITS: dict[tuple[type, type], Callable[..., Tensor]] = {
    (Conv, Conv): fit_row_conv,
    (DWConv, DWConv): fit_row_depthwise,
    (GSConv, Conv): fit_row_gsconv,
    (GSConv, GSConv): fit_row_same_gsconv,
    (SPPF, SPPF): fit_row_sppf,
    (DySample, nn.Upsample): fit_row_dysample,
    (C3, C3): fit_row_csp,
    (C3GS, C3): fit_row_csp,
    (VoVGSCSP, C3): fit_row_csp,
    (VoVGSCSPC, C3): fit_row_csp,
}


# ------------------------------------------------------------------------------------------------------- the heads


def divergence(logits: Tensor, share: Tensor) -> Tensor:
    """Returns how far each probability, as a logit, is from a share between 0 and 1 (Kullback and Leibler)."""
    entropy = F.binary_cross_entropy_with_logits(torch.logit(share, 1e-6), share, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, share, reduction="none") - entropy


def anchor_logit_loss(given: Tensor, wanted: Tensor, head: Detect) -> Tensor:
    """Compares raw maps of `Detect`: objectness everywhere, boxes and classes where the teacher sees objects."""
    given, wanted = (logits.unflatten(1, (head.na, -1)) for logits in (given, wanted.detach()))
    target = wanted.sigmoid()
    objectness = target[:, :, 4]
    total = objectness.sum() + 1e-3
    boxes = ((given[:, :, :4].sigmoid() - target[:, :, :4]).square().sum(2) * objectness).sum() / total
    classes = (divergence(given[:, :, 5:], target[:, :, 5:]).sum(2) * objectness).sum() / total
    return OBJECTNESS_GAIN * divergence(given[:, :, 4], objectness).mean() + BOX_GAIN * boxes + classes


def distribution_logit_loss(given: Tensor, wanted: Tensor, head: DetectAF) -> Tensor:
    """Compares raw maps of `DetectAF`: classes everywhere, the sides' distributions where the teacher sees objects."""
    wanted = wanted.detach()
    confidence = class_confidence(wanted, head)
    log_p, log_q = (maps[:, : 4 * head.bins].unflatten(1, (4, -1)).log_softmax(2) for maps in (wanted, given))
    sides = (log_p.exp() * (log_p - log_q)).sum(2).mean(1)
    classes = divergence(given[:, 4 * head.bins :], wanted[:, 4 * head.bins :].sigmoid()).sum(1).mean()
    return OBJECTNESS_GAIN * classes + (sides * confidence).sum() / (confidence.sum() + 1e-3)


def class_confidence(maps: Tensor, head: DetectAF) -> Tensor:
    """Returns the highest class score of each place."""
    return maps[:, 4 * head.bins :].sigmoid().amax(1)


class HeadFit(NamedTuple):
    """How a type of head is fitted."""

    branches: Callable[[Head], Iterable[Sequence[nn.Module]]]  # what stands before each layer of `m`
    confidence: Callable[[Tensor, Head], Tensor]  # raw map -> how sure the head is of an object at a place, (b, h, w)
    logit_loss: Callable[[Tensor, Tensor, Head], Tensor]  # a student's and the teacher's raw map -> ()


HEADS: dict[type[Head], HeadFit] = {
    Detect: HeadFit(
        lambda head: itertools.repeat(()),
        lambda maps, head: maps.unflatten(1, (head.na, -1))[:, :, 4].sigmoid().amax(1),
        anchor_logit_loss,
    ),
    DetectAF: HeadFit(lambda head: (*head.box, *head.cls), class_confidence, distribution_logit_loss),
}


def raw_maps(head: Head, features: Sequence[Tensor], autocast: torch.autocast) -> list[Tensor]:
    """Returns the raw maps of a head, as it computes them in training."""
    with autocast:
        hidden = head.hidden(features)
    return head.predict([maps.float() for maps in hidden])


# ------------------------------------------------------------------------------------------------- the whole model


class RowFit(NamedTuple):
    """How well a row gives what its twin gives."""

    row: int
    block: str
    twin: str
    r2: float  # share of the variance of the twin's maps that it explains, on the images of the fit


def log_fits(fits: Sequence[RowFit]) -> None:
    """Says what became of each row."""
    if fits[0].row:
        LOGGER.info(f"rows 0 to {fits[0].row - 1}: copied")
    for fit in fits:
        LOGGER.info(f"row {fit.row:>3}  {f'{fit.block} for {fit.twin}':<22} R2 {fit.r2:.3f}")


def inherit(
    student: Model,
    teacher: Model,
    images: Iterable[Tensor],
    steps: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[RowFit]:
    """Fits a model to another, row by row, without labels; the head too where the two have the same (`same_heads`).

    Args:
        student: of the teacher's number of classes; changed in place, its anchors too; left in evaluation mode.
        teacher: trained, in evaluation mode, on the same device; left as it is.
        images: batches, uint8 (b, 3, h, w) RGB of one shape; the least squares see the first FIT_IMAGES images, the
            gradient steps all.
        steps: gradient steps; None for what suits the rows: 90, or none where every C3 is kept.
        seed: of the places that are compared, and of the order of the batches.
        dtype: of autocast; None computes in float32.

    Returns:
        A line for each fitted row.

    Raises:
        UserError: the models differ in more than blocks that can be fitted, or there are no images.
    """
    student.eval()
    with torch.no_grad():
        first, head = check_rows(student, teacher), len(teacher.model) - 1
    generator = torch.Generator().manual_seed(seed)
    if steps is None:
        changed = (
            isinstance(twin, C3) and (type(own) is not C3 or is_narrower(own, twin))
            for own, twin in zip(student.model, teacher.model, strict=True)
        )
        steps = STEPS if any(changed) else 0
    device = next(teacher.parameters()).device
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    heads_agree = same_heads(student, teacher)
    with torch.no_grad(), autocast:
        for row in (*range(first), *([head] if heads_agree else [])):
            student.model[row].load_state_dict(teacher.model[row].state_dict())
        wanted = {source for row in range(first, head) for source in rows_read(teacher, row) if source < first}
        wanted.update(rows_read(teacher, head))
        record = []
        for batch in images:
            maps = {-1: (batch.to(device, memory_format=torch.channels_last).float() / 255).to(dtype or torch.float32)}
            for row in range(head):
                maps[row] = run_row(teacher, row, maps)
            record.append({row: maps[row] for row in wanted})
        if not record:
            raise UserError("there are no images to fit the model on.")
        orders, fits = _fit_rows(student, teacher, record, first, generator)
    if steps:
        _tune(student, teacher, record, orders, first, steps, generator, autocast)
    if heads_agree:
        with torch.no_grad():
            _fit_head(student, teacher, record[:HEAD_BATCHES], orders, first, autocast, generator)
    return fits


def make_student(teacher: Model, cfg: str | Path | Mapping[str, Any], seed: int) -> Model:
    """Builds a slim model of the teacher's classes, on its device, in evaluation mode.

    Its activation is the teacher's unless the YAML says one.

    Raises:
        UserError: the two are no twins (`check_rows`), or the YAML is unsound.
    """
    if teacher.yaml.get("activation") is not None:
        content, _ = read_config(cfg)
        cfg = content if content.get("activation") else {**content, "activation": teacher.yaml["activation"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Model(cfg, nc=teacher.nc)
    student = student.to(next(teacher.parameters()).device, memory_format=torch.channels_last).eval()
    student.names = dict(teacher.names)
    with torch.no_grad():
        check_rows(student, teacher)
    return student


def augmented_images(
    table: LabelTable, imgsz: int, batch_size: int, count: int, workers: int, seed: int
) -> Iterator[Tensor]:
    """Yields whole batches (b, 3, imgsz, imgsz) uint8 of training images, `count` in all, as YOLOv5 augments them.

    They go on epoch after epoch; of a set smaller than a batch, all are one.
    """
    hyp, loading = read_yaml(AUGMENTATION), {"workers": workers, "seed": seed}
    loader, _ = create_dataloader(table, imgsz, batch_size, stride=32, hyp=hyp, augment=True, shuffle=True, **loading)
    size = min(batch_size, len(table))
    with contextlib.closing(loader):
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        whole = (batch.images for batch in epochs if len(batch.images) == size)
        yield from itertools.islice(whole, -(-count // batch_size))


def rows_read(model: Model, row: int) -> list[int]:
    """Returns the rows that a row reads; -1 is the image."""
    read = model.model[row].f
    return [row - 1 if source == -1 else source for source in (read if isinstance(read, list) else [read])]


def run_row(model: Model, row: int, maps: dict[int, Tensor]) -> Tensor:
    """Returns a row's output for what it reads among `maps`."""
    read = [maps[source] for source in rows_read(model, row)]
    return model.model[row](read if isinstance(model.model[row].f, list) else read[0])


def activations(model: Model) -> set[str]:
    """Returns the activations of the blocks that leave theirs to the model."""
    acts = {str(block.act) for block in model.modules() if getattr(block, "default_act", False)}
    return {text.replace("inplace=True", "").replace(", )", ")") for text in acts}


def check_rows(student: Model, teacher: Model) -> int:
    """Returns the first row that is to be fitted.

    Raises:
        UserError: the models differ in more than blocks that can be fitted, or not at all.
    """
    if len(student.model) != len(teacher.model):
        raise UserError(f"not the same body: the models have {len(student.model)} and {len(teacher.model)} rows.")
    acts = [sorted(activations(model)) for model in (student, teacher)]
    if acts[0] != acts[1]:
        told = " and ".join(", ".join(one) for one in acts)
        raise UserError(f"not the same activation ({told}): what was learned with one gives other maps with another.")
    first, head = None, len(teacher.model) - 1
    image = torch.zeros(1, 3, 128, 128, device=next(teacher.parameters()).device)
    given = [{-1: image}, {-1: image}]
    for row in range(head):
        own, twin = student.model[row], teacher.model[row]
        names = f"row {row} ({type(own).__name__} for {type(twin).__name__})"
        if rows_read(student, row) != rows_read(teacher, row):
            raise UserError(f"not the same body: {names} reads other rows in the two models.")
        for model, maps in zip((student, teacher), given, strict=True):
            maps[row] = run_row(model, row, maps)
        shapes = [maps[row].shape[1:] for maps in given]
        if shapes[0] != shapes[1]:
            raise UserError(f"not the same body: {names} gives maps {tuple(shapes[0])}, not {tuple(shapes[1])}.")
        tensors = [{key: value.shape for key, value in one.state_dict().items()} for one in (own, twin)]
        if first is None and (type(own) is not type(twin) or tensors[0] != tensors[1]):
            first = row
        if first is not None and tensors[0] and (type(own), type(twin)) not in FITS:
            raise UserError(f"{names}: there is no way to fit one to the other.")
    if first is None:
        raise UserError("the two models have the same rows before the head: there is nothing to fit.")
    _check_heads(student, teacher)
    return first


def _check_heads(student: Model, teacher: Model) -> None:
    if rows_read(student, len(student.model) - 1) != rows_read(teacher, len(teacher.model) - 1):
        raise UserError("not the same body: the heads read other rows in the two models.")
    if type(teacher.head) not in HEADS:
        raise UserError(f"there is no way to fit to the head {type(teacher.head).__name__}.")


def same_heads(student: Model, teacher: Model) -> bool:
    """Says whether two models' heads are of one kind and shape, so that one can be fitted to the other."""
    shapes = [{key: value.shape for key, value in one.head.state_dict().items()} for one in (student, teacher)]
    return type(student.head) is type(teacher.head) and shapes[0] == shapes[1]


def _fit_rows(student, teacher, record, first, generator) -> tuple[dict[int, Tensor], list[RowFit]]:
    """Fits the rows from `first` to the one before the head.

    Returns:
        For each row the twin's channel that each of its channels gives; and how well they fit.
    """
    head = len(teacher.model) - 1
    batches = record[: -(-FIT_IMAGES // len(next(iter(record[0].values()))))]
    own, originals = ([{row: maps[row] for row in maps if row < first} for maps in batches] for _ in range(2))
    orders = {row: torch.arange(maps.shape[1]) for row, maps in own[0].items()}
    fits = []
    for row in range(first, head):
        block, twin = student.model[row], teacher.model[row]
        offsets = [0]
        for source in rows_read(teacher, row):
            offsets.append(offsets[-1] + len(orders[source]))
        orders[row] = torch.cat(
            [orders[one] + start for one, start in zip(rows_read(teacher, row), offsets, strict=False)]
        )
        fit = FITS.get((type(block), type(twin)))
        if fit:
            (source,) = rows_read(teacher, row)
            inputs, read = ([maps[source] for maps in one] for one in (own, originals))
            orders[row] = fit(block, twin, inputs, read, orders[row], generator)
        for model, one in ((student, own), (teacher, originals)):
            for maps in one:
                maps[row] = run_row(model, row, maps)
        if fit:
            given, wanted = ([maps[row].float() for maps in one] for one in (own, originals))
            wanted = torch.cat([maps[:, orders[row]] for maps in wanted])
            error = (torch.cat(given) - wanted).square().mean((0, 2, 3)).sum() / wanted.var((0, 2, 3)).sum()
            fits.append(RowFit(row, type(block).__name__, type(twin).__name__, 1 - error.item()))
        needed = {source for later in range(row + 1, head + 1) for source in rows_read(teacher, later)}
        own, originals = (
            [{row: maps[row] for row in maps if row in needed} for maps in one] for one in (own, originals)
        )
    return orders, fits


def _student_maps(student, maps, first) -> dict[int, Tensor]:
    """Returns the student's maps for a recorded batch."""
    own = {row: one for row, one in maps.items() if row < first}
    for row in range(first, len(student.model) - 1):
        own[row] = run_row(student, row, own)
    return own


def _tune(student, teacher, record, orders, first, steps, generator, autocast) -> None:
    """Takes gradient steps on the fitted rows together, then measures their batch-norm statistics again."""
    head, read = teacher.model[-1], rows_read(teacher, len(teacher.model) - 1)
    spread = {row: torch.stack([maps[row].float().var((0, 2, 3)) for maps in record]).mean(0) for row in read}
    student.requires_grad_(False)
    rows = student.model[first:-1]
    rows.train().requires_grad_(True)
    parameters = list(rows.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=BETAS)
    queue: list[int] = []
    for step in range(steps):
        share = min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        queue = queue or torch.randperm(len(record), generator=generator).tolist()
        maps = record[queue.pop()]
        with autocast:
            own = _student_maps(student, maps, first)
        given = [own[row][:, torch.argsort(orders[row])].float() for row in read]
        wanted = [maps[row].float() for row in read]
        loss = 0.0
        for row, one, twin in zip(read, given, wanted, strict=True):
            error = (one - twin).square().mean((0, 2, 3)) / (spread[row] + 0.05 * spread[row].mean())
            loss = loss + error.mean()
        for one, twin in zip(*(raw_maps(head, levels, autocast) for levels in (given, wanted)), strict=True):
            loss = loss + LOGIT_GAIN * HEADS[type(head)].logit_loss(one, twin, head)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
    norms = [one for one in rows.modules() if isinstance(one, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.usual = None, norm.momentum  # None: the plain mean of all batches
    with torch.no_grad(), autocast:
        for maps in record[:HEAD_BATCHES]:
            _student_maps(student, maps, first)
    for norm in norms:
        norm.momentum = norm.usual
        del norm.usual
    student.eval().requires_grad_(True)


def _fit_head(student, teacher, record, orders, first, autocast, generator) -> None:
    """Fits the head's layers in turn, the last to the teacher's logits; places weigh by what the teacher sees there."""
    head, own_head, fit = teacher.head, student.head, HEADS[type(teacher.head)]
    read = rows_read(teacher, len(teacher.model) - 1)
    originals = [[maps[row] for row in read] for maps in record]
    with autocast:
        own = [[maps[row] for row in read] for maps in (_student_maps(student, maps, first) for maps in record)]
    sure = [
        [
            fit.confidence(maps, head).flatten() + 0.02
            for maps in raw_maps(head, [maps.float() for maps in levels], autocast)
        ]
        for levels in originals
    ]
    branches = (fit.branches(one) for one in (own_head, head))
    layers = zip(own_head.m, head.m, *branches, itertools.cycle(range(head.nl)), strict=False)
    for own_layer, layer, own_branch, branch, level in layers:
        inputs, targets = ([levels[level] for levels in batches] for batches in (own, originals))
        order = orders[read[level]]
        with autocast:
            for block, twin in zip(own_branch, branch, strict=True):
                order = FITS[type(block), type(twin)](block, twin, inputs, targets, order, generator)
                inputs, targets = [block(maps) for maps in inputs], [twin(maps) for maps in targets]
        squares = LeastSquares()
        for maps, target, weights in zip(inputs, targets, sure, strict=True):
            seen, logits = (one.permute(0, 2, 3, 1).flatten(0, 2) for one in (maps.float(), layer(target.float())))
            squares.add(seen, logits, weights[level])
        weight, bias, _ = squares.solve(RIDGE_OF_HEAD, layer.weight.flatten(1)[:, order])
        own_layer.weight.copy_(weight[..., None, None])
        own_layer.bias.copy_(bias)


# ------------------------------------------------------------------------------------------------------- the command


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser(
        "models.transplant", description="Turn a trained dense model into a slim one, on images without labels."
    )
    add = parser.add_argument
    add("--weights", default="", help="trained dense model; default: the newest runs/train/*/weights/best.pt")
    add("--cfg", required=True, help="model YAML of the slim model, such as yolov5s-slimneck.yaml")
    add("--data", default="", help="data set YAML; default: the one that the model was trained on")
    add(
        "--imgsz",
        "--img",
        "--img-size",
        type=number(int, 32, MAX_IMAGE_SIDE_PX),
        help="image side in px; default: as trained, else 640",
    )
    add("--batch-size", type=number(int, 2), default=BATCH_SIZE, help="images per batch")
    add("--images", type=number(int, MIN_IMAGES), default=IMAGES, help="augmented training images to fit on")
    add("--steps", type=number(int, 0), help="gradient steps; default: 90, or none where every C3 is kept")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="mixed precision")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed")
    add("--project", default=str(ROOT / "runs" / "transplant"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    return parser


def main(options: argparse.Namespace) -> tuple[EvalResult, EvalResult]:
    """Converts, validates both models, and writes the slim one; returns the teacher's figures and the student's.

    Raises:
        UserError: the weights, YAML and data do not go together, or a file is missing or unsound.
    """
    echo_options("transplant", options)
    folder = run_folder(options.project, options.name)  # refused, if at all, before anything is read
    with explain_resource_errors({"--batch-size": options.batch_size, "--imgsz": options.imgsz}):
        return convert(options, folder)


def convert(options: argparse.Namespace, folder: Path) -> tuple[EvalResult, EvalResult]:
    """Does what `main` says, and makes `folder` or the next free one."""
    device = select_device(options.device)
    dtype = resolve_amp(options.amp, device)
    (path,) = find_weights(options.weights)
    meta = read_weights(path).meta
    teacher = load_model(path, device).to(memory_format=torch.channels_last)
    if not (options.data or meta["data"]):
        raise UserError(f"{path} does not say which data set it was trained on: give --data.")
    spec = load_spec(options.data or meta["data"])
    known, wanted = (
        [str(name).strip().lower() for _, name in sorted(one.items())] for one in (teacher.names, spec.names)
    )
    if known != wanted:
        raise UserError(
            f"{path} knows the classes {', '.join(known[:5])}{' ...' * (len(known) > 5)}, the data set others "
            f"({', '.join(wanted[:5])}{' ...' * (len(wanted) > 5)}): train the dense model on this data set first."
        )
    cfg = find_file(options.cfg, (".yaml", ".yml"), "--cfg")
    try:
        student = make_student(teacher, cfg, options.seed)
        if not same_heads(student, teacher):
            raise UserError("the heads differ: only a training with labels, train.py, can go from one to the other.")
    except UserError as error:
        raise UserError(f"--cfg {cfg} and --weights {path}: {error}") from error
    trained = (meta["opt"] or {}).get("imgsz")
    imgsz = options.imgsz or (trained if isinstance(trained, int) else DEFAULT_IMGSZ)
    stride = int(max(teacher.stride))
    imgsz = check_img_size(imgsz, stride)
    table = load_labels(spec.train, spec, False, options.workers, "train: ", need_labels=False)
    if len(table) < MIN_IMAGES:
        raise UserError(
            f"{len(table)} training images are too few to fit a model on: at least {MIN_IMAGES} are needed."
        )
    started = time.monotonic()
    batches = augmented_images(table, imgsz, options.batch_size, options.images, options.workers, options.seed)
    log_fits(inherit(student, teacher, batches, options.steps, options.seed, dtype))
    seconds = time.monotonic() - started
    val = make_loader(spec, imgsz, stride, batch_size=2 * options.batch_size, workers=options.workers)
    with contextlib.closing(val):
        results = []
        for name, model in ((path, teacher), (cfg, student)):
            LOGGER.info(f"\nValidating {name}...")
            results.append(evaluate(module_predictor(model, NMS), val, names=spec.names))
    before, after = results
    folder = increment_path(folder, exist_ok=options.exist_ok, mkdir=True)
    file = folder / "weights" / "best.pt"
    file.parent.mkdir(exist_ok=True)
    save_checkpoint(
        file,
        {
            **{"epoch": -1, "model": student.state_dict(), "ema": None, "yaml": student.yaml, "names": student.names},
            **{"nc": student.nc, "stride": [int(one) for one in student.stride], "data": str(spec.source)},
            **{"hyp": read_yaml(AUGMENTATION), "opt": {**vars(options), "imgsz": imgsz}},
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
        },
    )
    strip_checkpoint(file)
    sizes = [sum(value.numel() for value in model.parameters()) / 1e6 for model in (teacher, student)]
    LOGGER.info(
        f"\nFitted in {seconds:.0f} s. mAP50-95 {before.map:.4f} -> {after.map:.4f} ({after.map - before.map:+.4f}), "
        f"mAP50 {before.map50:.4f} -> {after.map50:.4f}, {sizes[0]:.2f} M -> {sizes[1]:.2f} M parameters\n"
        f"Results saved to {colorstr('bold', file)}"
    )
    return before, after


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
