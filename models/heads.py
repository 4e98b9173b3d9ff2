"""Detection heads: their layers, and how their outputs become boxes, in training, validation and exports alike.

A head is a subclass of `Head`, a row of `models.yolo.BLOCKS` and the name of its loss (`utils.loss.LOSSES`). The rest
of the program asks it: for its loss, for raw outputs, for rows that NMS reads. All consists of plain tensor operations
on at most four axes, which every converter knows; only raw outputs need five. `Detect` is YOLOv5's, `DetectAF` the
anchor-free one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from models.common import Conv, DWConv, GSConv
from models.raw import RawHead
from utils.errors import make_divisible
from utils.log import LOGGER
from utils.nms import MAX_SIDE_PX, MIN_SIDE_PX, NMSConfig

MIN_CANDIDATES = 1024  # candidates per image that enter the suppression inside a model, at least
SUPPRESSION_ROUNDS = 16


class Head(nn.Module):
    """A detection head: maps of the neck to raw outputs for the loss and, in evaluation, to rows for NMS.

    A row is [x, y, w, h in px, objectness, class probabilities], and a box's confidence objectness times class; a head
    without objectness leaves that column to the decoder, which fills it with ones.

    A subclass makes `m`, names its `loss` and its `level_decoder`, and prepares in `set_strides` what depends on the
    strides (biases, anchors). Layers before the last ones are for `hidden`.

    Attributes:
        loss: the row of `utils.loss.LOSSES` that trains it.
        level_decoder: the subclass of `LevelDecoder` that turns its raw maps into rows.
        has_anchors: whether it has a buffer `anchors` that AutoAnchor may fit to the labels.
        objectness: whether its level decoders give an objectness.
        m: the last layers, from the maps of `hidden` to the numbers of the raw maps: here a module per level, from the
            neck's map (b, ch_i, ny_i, nx_i) to the raw map (b, na * channels, ny_i, nx_i).
        nc, nl, na, no: classes, levels, boxes per cell, columns of a row (5 + nc).
        stride: buffer (nl,), pixels per cell; not in the state dict.
    """

    loss: str
    level_decoder: type[LevelDecoder]
    has_anchors = False
    objectness = True
    m: nn.ModuleList

    def __init__(self, nc: int, levels: int, boxes_per_cell: int = 1) -> None:
        super().__init__()
        self.nc, self.no = nc, nc + 5
        self.nl, self.na = levels, boxes_per_cell
        self.register_buffer("stride", torch.zeros(levels, device="cpu"), persistent=False)

    @property
    def channels(self) -> int:
        """Raw numbers per box."""
        return self.no

    @property
    def largest_box_px(self) -> float:
        """The longest side that a box can have."""
        return math.inf

    def has_class_rows(self, key: str) -> bool:
        """Tells of a tensor of the state dict whether its first axis holds, box by box, other rows and then classes."""
        return key.startswith("m.")

    def set_strides(self, stride: Tensor, source: str) -> None:
        """Takes the pixels per cell (nl,) of each level, once, when a model is made; `source` names it in messages."""
        self.stride.copy_(stride)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Predicts from nl maps (b, ch_i, ny_i, nx_i).

        Returns:
            In training the raw outputs, a list of nl (b, na, ny, nx, channels). In evaluation (rows, raw outputs): rows
            are float32 (b, n, no), level by level, then by box of a cell, y, x. Under autocast the raw outputs have the
            weights' own type.
        """
        hidden, device_type = self.hidden(features), features[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            # bfloat16 has steps of 1/32 at the -5 to -8 of the objectness' biases
            dtype = next(self.m.parameters()).dtype
            with torch.autocast(device_type, enabled=False):
                return self._outputs([maps.to(dtype) for maps in hidden])
        return self._outputs(hidden)

    def _outputs(self, hidden: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        maps = self.predict(hidden)
        raw = [raw_output(level, self.na) for level in maps]
        return [level.contiguous() for level in raw] if self.training else (self.decoder()(maps), raw)

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns the raw maps (b, na * channels, ny, nx) of each level: the head's part with weights."""
        return self.predict(self.hidden(features))

    def hidden(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns what each layer of `m` reads, in autocast's precision where there is one; here the features."""
        return list(features)

    def score_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns what `export.py --raw` gives in place of rows: maps whose scores have been through the sigmoid.

        `raw_head` says how they are decoded. A tensor holds numbers of one range alone, for int8 has one scale for it.
        """
        raise NotImplementedError

    def raw_head(self) -> RawHead | None:
        """Returns what decodes `score_maps` without torch; None where nothing does, so that --raw is refused."""
        return None

    def predict(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Maps what `hidden` returns to the raw maps of each level; in the weights' own precision."""
        return [layer(maps) for layer, maps in zip(self.m, hidden, strict=True)]

    def decoder(self, shape_hw: Sequence[int] | None = None, normalised: bool = False) -> Decoder:
        """Returns the module that makes rows of the raw maps.

        Args:
            shape_hw: height and width of the images where they are fixed, px; None lets them follow from the maps.
            normalised: boxes as fractions of the images' width and height; needs `shape_hw`.

        Raises:
            ValueError: `normalised` without `shape_hw`.
        """
        unit_px = _unit_px(shape_hw, normalised)
        return Decoder([self.level_decoder(self, level, shape_hw, unit_px) for level in range(self.nl)])

    def output(
        self,
        shape_hw: Sequence[int] | None = None,
        nms: NMSConfig | None = None,
        topk_per_class: int | None = None,
        normalised: bool = False,
    ) -> nn.Module:
        """Returns the module that makes an export's output of the raw maps: rows, or with `nms` detections.

        Args:
            shape_hw, normalised: as of `decoder`.
            nms: choose detections inside the model; None leaves all rows.
            topk_per_class: most detections of a class in an image, with `nms`; None sets no limit.

        Raises:
            ValueError: `normalised` without `shape_hw`.
        """
        if nms is None:
            return self.decoder(shape_hw, normalised)
        return NMSHead(self.decoder(shape_hw), nms, topk_per_class, _unit_px(shape_hw, normalised))


def raw_output(level: Tensor, boxes_per_cell: int) -> Tensor:
    """Turns a raw map (b, na * channels, ny, nx) into (b, na, ny, nx, channels), as losses read it."""
    batch, channels, height, width = level.shape
    split = level.reshape(batch, boxes_per_cell, channels // boxes_per_cell, height, width)
    return split.permute(0, 1, 3, 4, 2)


class RawOutputs(nn.Module):
    """Raw maps of a head to its raw outputs, for those who decode themselves (`export.py --train`)."""

    def __init__(self, head: Head) -> None:
        """Takes the head that they are of."""
        super().__init__()
        self.na = head.na

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps nl tensors (b, na * channels, ny, nx) to as many (b, na, ny, nx, channels)."""
        return [raw_output(level, self.na).contiguous() for level in maps]


class _Float32(nn.Module):
    """A module whose constants stay float32 when the model's weights become half: pixels want the precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class LevelDecoder(_Float32):
    """The raw map of one level to boxes and scores; what a head's own decoder has in common with all others.

    Boxes are decoded while the channels still stand before the cells, where taking four of them apart is cheap: a fifth
    of the time less than on finished rows in ONNX Runtime and OpenVINO on a CPU. With a fixed image size the cells'
    places are constants of the graph; without, they follow from the map's.

    Attributes:
        grid_offset: where in a cell its grid point lies: 0 is the upper left corner, 1 the lower right one.
        cell: buffer (1, 1, 2, 1), width and height of a cell in units.
        row_count: rows of an image of the fixed size, else None.
    """

    grid_offset = 0.5
    grid: Tensor | None

    def __init__(self, head: Head, level: int, shape_hw: Sequence[int] | None, unit_px: Sequence[int]) -> None:
        """Takes what is known of the images.

        Args:
            head: for its strides and the numbers of a row and of a cell.
            level: number of the level.
            shape_hw: height and width of the images where they are fixed.
            unit_px: pixels that make a unit of x and of y in the rows.
        """
        super().__init__()
        self.na, self.channels, self.no, self.objectness = head.na, head.channels, head.no, head.objectness
        stride = head.stride[level].float().to(next(head.parameters()).device)
        self.row_count: int | None = None
        self.register_buffer("stride", stride)
        self.register_buffer("cell", stride.expand(1, 1, 2, 1))
        self.register_buffer("grid", None)
        if shape_hw is not None:
            unit = stride.new_tensor(unit_px).view(1, 1, 2, 1)
            size = [round(side / float(stride)) for side in shape_hw]
            self.cell, self.grid = self.cell / unit, self._make_grid(size, stride.device) / unit
            self.row_count = self.na * size[0] * size[1]

    def decode(self, values: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps raw values to boxes and scores.

        Args:
            values: (b, na, channels, n) float32, of n cells.
            grid: (1, 1, 2, n) x and y of each cell's grid point, in units.

        Returns:
            Centres x, y and sides w, h in units, (b, na, 2, n) each; objectness, where the head has one, and class
            probabilities, (b, na, nc or 1 + nc, n). All float32.
        """
        raise NotImplementedError

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (b, na * channels, ny, nx) to what `decode` returns, of the map's ny * nx cells."""
        grid = self._make_grid(level.shape[2:], level.device) if self.grid is None else self.grid
        return self.decode(self._split(level.float(), self.na, self.channels), grid)

    def _split(self, values: Tensor, *shape: int) -> Tensor:
        """Returns values of all cells as (b, *shape, n)."""
        if self.grid is None:
            return values.reshape(values.shape[0], *shape, -1)
        # The number of images alone is free, so that no size is computed in the graph
        return values.reshape(-1, *shape, self.row_count // self.na)

    def _make_grid(self, size: Sequence[int], device: torch.device) -> Tensor:
        """Returns x and y in px of each cell's grid point, (1, 1, 2, ny * nx), of a map of `size` ny, nx cells."""
        rows = (torch.arange(size[0], device=device, dtype=torch.float32) + self.grid_offset) * self.stride
        columns = (torch.arange(size[1], device=device, dtype=torch.float32) + self.grid_offset) * self.stride
        return torch.stack(torch.meshgrid(columns, rows, indexing="xy")).reshape(1, 1, 2, -1)


class Decoder(nn.Module):
    """Raw maps of a head to rows [x, y, w, h in px, objectness, class probabilities], float32.

    Attributes:
        row_count: rows of an image of the fixed size, else None.
    """

    def __init__(self, levels: Sequence[LevelDecoder]) -> None:
        """Takes the decoders of all levels."""
        super().__init__()
        self.levels, self.no = nn.ModuleList(levels), levels[0].no
        self.row_count = None if levels[0].row_count is None else sum(level.row_count for level in levels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps nl tensors (b, na * channels, ny, nx) to (b, rows, no), level by level, then by box, y, x."""
        found = [decode(level) for decode, level in zip(self.levels, maps, strict=True)]
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return torch.cat([self._joined(level, *parts) for level, parts in zip(self.levels, found, strict=True)], 1)
        # Written straight to their places, which no converter knows; on a CPU up to seven times as fast
        counts = [xy.shape[1] * xy.shape[3] for xy, *_ in found]
        rows, start = found[0][0].new_empty(len(maps[0]), sum(counts), self.no), 0
        for count, (xy, wh, scores) in zip(counts, found, strict=True):
            part = rows[:, start : start + count].view(len(xy), xy.shape[1], xy.shape[3], self.no)
            columns, first_score = part.transpose(2, 3), self.no - scores.shape[2]
            columns[:, :, :2], columns[:, :, 2:4], columns[:, :, first_score:] = xy, wh, scores
            columns[:, :, 4:first_score] = 1.0
            start += count
        return rows

    def _joined(self, level: LevelDecoder, xy: Tensor, wh: Tensor, scores: Tensor) -> Tensor:
        """Returns a level's rows (b, n, no)."""
        ones = () if level.objectness else (torch.ones_like(xy[:, :, :1]),)
        columns = torch.cat((xy, wh, *ones, scores), dim=2)
        batch, rows = (xy.shape[0], -1) if level.row_count is None else (-1, level.row_count)
        return columns.transpose(2, 3).reshape(batch, rows, self.no)


class _AnchorDecoder(LevelDecoder):
    """The decoder of a level of `Detect`."""

    grid_offset = -0.5

    def __init__(self, head: Detect, level: int, shape_hw: Sequence[int] | None, unit_px: Sequence[int]) -> None:
        super().__init__(head, level, shape_hw, unit_px)
        self.register_buffer("scale", 2 * self.cell)
        self.register_buffer("anchors", 4 * self.cell * head.anchors[level].float().view(1, self.na, 2, 1))

    def decode(self, values: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = values.sigmoid()
        xy, wh = Detect.decode_boxes(scores[:, :, :2], scores[:, :, 2:4], self.scale, grid, self.anchors)
        return xy, wh, scores[:, :, 4:]


class Detect(Head):
    """YOLOv5's head: one 1x1 convolution per level, boxes relative to anchors.

    Args:
        nc: number of classes.
        anchors: per level a flat list [w, h, w, h, ...] in pixels.
        ch: channels of each level.
        inplace: kept for YOLOv5's program, which reads it in models that are exported for it; without effect here.

    Attributes:
        anchors: buffer (nl, na, 2), width and height in units of the level's stride once `Model` has set it.
    """

    __module__ = "models.yolo"  # where YOLOv5's checkpoints look for it
    loss = "anchor_based"
    level_decoder = _AnchorDecoder
    has_anchors = True

    def __init__(self, nc: int = 80, anchors: Sequence[Sequence[float]] = (), ch: Sequence[int] = (), inplace=True):
        super().__init__(nc, len(anchors), len(anchors[0]) // 2)
        self.inplace = inplace
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32).view(self.nl, self.na, 2))
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)

    def set_strides(self, stride: Tensor, source: str) -> None:
        """Sets strides, anchors in units of them (small ones go with small strides), and biases.

        The biases expect 8 objects in an image of 640 px and, of the classes, 0.6 spread over all.
        """
        super().set_strides(stride, source)
        anchors = self.arguments[1]
        growth_px = math.prod(anchors[-1][-2:]) - math.prod(anchors[0][:2])
        if growth_px * (stride[-1] - stride[0]) < 0:
            LOGGER.info(f"{source}: reversing the order of the anchors' levels")
            anchors = anchors[::-1]
        anchors_px = torch.tensor(anchors, dtype=torch.float32, device="cpu").view(self.nl, self.na, 2)
        self.anchors.copy_(anchors_px / stride.view(-1, 1, 1))
        for conv, pixels in zip(self.m, stride.tolist(), strict=True):
            bias = conv.bias.detach().view(self.na, self.no)
            bias[:, 4] += math.log(8 / (640 / pixels) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.999999))

    def score_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns the raw maps after the sigmoid, one of a level."""
        return [level.sigmoid() for level in self.maps(features)]

    def raw_head(self) -> RawHead:
        """Returns what decodes `score_maps`."""
        anchors = [tuple(map(tuple, level)) for level in (self.anchors * self.stride.view(-1, 1, 1)).double().tolist()]
        return RawHead(self.nc, tuple(self.stride.tolist()), tuple(anchors))

    @staticmethod
    def decode_boxes(
        xy: Tensor, wh: Tensor, scale: Tensor | float, offset: Tensor | float, anchors_4: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turns scores (after the sigmoid) into centres and sides, in the unit of the other arguments; all broadcast.

        Args:
            xy, wh: two scores each, 0 to 1.
            scale: twice the cell's side.
            offset: the cell's upper left corner less half a cell.
            anchors_4: four times the anchors' width and height.
        """
        return xy * scale + offset, wh * wh * anchors_4  # not a power: some converters have none


class _BinDecoder(LevelDecoder):
    """The decoder of a level of `DetectAF`."""

    def __init__(self, head: DetectAF, level: int, shape_hw: Sequence[int] | None, unit_px: Sequence[int]) -> None:
        super().__init__(head, level, shape_hw, unit_px)
        self.register_buffer("bins", head.stride.new_ones(head.bins).float().cumsum(0).sub(1).view(1, 1, -1, 1))

    def decode(self, values: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bins = self.bins.shape[2]
        logits = self._split(values[:, :, : 4 * bins], 4, bins)
        distances = DetectAF.distances(logits, self.bins, 2).transpose(1, 2)
        before, after = distances[:, :, :2] * self.cell, distances[:, :, 2:] * self.cell
        return grid + (after - before) / 2, before + after, values[:, :, 4 * bins :].sigmoid()


_BRANCHES: dict[str, Callable[[int, int], list[nn.Module]]] = {  # a step of a branch, from c1 channels to c2
    "Conv": lambda c1, c2: [Conv(c1, c2, 3)],
    "DWConv": lambda c1, c2: [DWConv(c1, c1, 3), Conv(c1, c2, 1)],
    "GSConv": lambda c1, c2: [GSConv(c1, c2, 3)],
}


class DetectAF(Head):
    """An anchor-free head: each cell has one box and no objectness, the class score alone is the confidence.

    A branch of convolutions for boxes and one for classes, on each level. A box is told by the distances of its left,
    upper, right and lower side from the cell's centre, in cells, each the expectation of a distribution over 0, 1 ..
    bins - 1: so boxes have at most 2 * (bins - 1) cells a side. With 8 bins that is 448 px at a stride of 32.

    The last 1x1 convolutions are computed in float32, the branches in autocast's precision.

    Sources: Generalized Focal Loss, arXiv:2006.04388 (distributions); TOOD, arXiv:2108.07755; the branches are those of
    the YOLO family since 2023, the class branch depthwise since 2024.

    Args:
        nc: number of classes.
        ch: channels of each level.
        bins: numbers that a distance is made of, at least 2.
        box, cls: [kind, width, steps] of the branch; what is left out, or null, is as published. A kind is "Conv" (a
            step is a 3x3), "DWConv" (a depthwise 3x3 and a 1x1) or "GSConv" (a 3x3). The width is a share of the first
            level's channels, rounded up to a multiple of 8. Steps are 2; with 0 the last layer reads the neck's map.

    Attributes:
        bins: numbers that a distance is made of.
        box, cls: the branches of each level, but for their last layers.
        m: those: nl 1x1 convolutions to 4 * bins numbers, side by side, then nl to nc.

    Raises:
        ValueError: an argument that is none of these.
    """

    loss = "anchor_free"
    level_decoder = _BinDecoder
    objectness = False

    def __init__(
        self,
        nc: int,
        ch: Sequence[int],
        bins: int = 16,
        box: Sequence[str | float | None] = (),
        cls: Sequence[str | float | None] = (),
    ) -> None:
        super().__init__(nc, len(ch))
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins are a whole number from 2, not {bins}")
        self.bins = bins
        self.box, box_widths = _branches(ch, box, "Conv", max(16, ch[0] // 4, 4 * bins))
        self.cls, cls_widths = _branches(ch, cls, "DWConv", max(ch[0], min(nc, 100)))
        last = [nn.Conv2d(width, 4 * bins, 1) for width in box_widths]
        self.m = nn.ModuleList(last + [nn.Conv2d(width, nc, 1) for width in cls_widths])

    @property
    def channels(self) -> int:
        """Raw numbers per box: of each side the logits of all bins, then of the classes."""
        return 4 * self.bins + self.nc

    @property
    def largest_box_px(self) -> float:
        """The longest side that a box can have, on the coarsest level."""
        return 2 * (self.bins - 1) * self.stride.max().item()

    def set_strides(self, stride: Tensor, source: str) -> None:
        """Sets strides and biases: the classes' expect 5 objects in an image of 640 px, on each level."""
        super().set_strides(stride, source)
        for box, cls, pixels in zip(self.m[: self.nl], self.m[self.nl :], stride.tolist(), strict=True):
            nn.init.constant_(box.bias, 2.0)
            nn.init.constant_(cls.bias, math.log(5 / self.nc / (640 / pixels) ** 2))

    def has_class_rows(self, key: str) -> bool:
        """Tells of a tensor of the state dict whether its first axis holds the classes."""
        name, _, rest = key.partition(".")
        return name == "m" and int(rest.partition(".")[0]) >= self.nl

    def hidden(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns what each layer of `m` reads: the maps of the box branches, then of the class branches."""
        both = zip((*self.box, *self.cls), (*features, *features), strict=True)
        return [branch(maps) for branch, maps in both]

    def predict(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Maps what `hidden` returns to the raw maps (b, 4 * bins + nc, ny, nx) of each level."""
        maps = super().predict(hidden)
        return [torch.cat(pair, 1) for pair in zip(maps[: self.nl], maps[self.nl :], strict=True)]

    def score_maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Returns of each level the logits of the sides' distances, then the class probabilities."""
        maps = super().predict(self.hidden(features))
        pairs = zip(maps[: self.nl], maps[self.nl :], strict=True)
        return [part for box, cls in pairs for part in (box, cls.sigmoid())]

    def raw_head(self) -> RawHead:
        """Returns what decodes `score_maps`."""
        return RawHead(self.nc, tuple(self.stride.tolist()), bins=self.bins)

    @staticmethod
    def distances(logits: Tensor, bins: Tensor, dim: int) -> Tensor:
        """Returns the distances of sides in cells from logits of all `bins` (0 .. bins - 1) along `dim`, which stays.

        All of the arguments broadcast.
        """
        return (logits.softmax(dim) * bins).sum(dim, keepdim=True)


def _branches(
    ch: Sequence[int], asked: Sequence[str | float | None], kind: str, width: int
) -> tuple[nn.ModuleList, list[int]]:
    """Makes the branches of `DetectAF` for each level, as `asked` or else of the published `kind` and `width`.

    Returns:
        The branches, and the channels that each gives.
    """
    try:
        kind, share, steps = (usual if given is None else given for given, usual in zip_longest(asked, (kind, None, 2)))
        width = width if share is None else make_divisible(share * ch[0], 8)
        step, counts = _BRANCHES[kind], range(steps)
        branches = [[step(c1 if not count else width, width) for count in counts] for c1 in ch]
    except (KeyError, TypeError, ValueError):
        kinds = f"kinds are {', '.join(_BRANCHES)}"
        raise ValueError(f"a branch is [kind, width, steps] such as [DWConv, 0.5, 2] ({kinds}), not {asked}") from None
    made = nn.ModuleList(nn.Sequential(*chain.from_iterable(branch)) for branch in branches)
    return made, [width if steps else c1 for c1 in ch]


def _unit_px(shape_hw: Sequence[int] | None, normalised: bool) -> tuple[int, int]:
    """Returns how many pixels make a unit of x and of y."""
    if not normalised:
        return 1, 1
    if shape_hw is None:
        raise ValueError("normalised boxes need a fixed image size")
    return shape_hw[1], shape_hw[0]


class NMSHead(_Float32):
    """Maps of the head to the detections that are kept: `utils.nms.non_max_suppression` inside the model.

    The same boxes come out in the same order as from there (one class a box) so long as two bounds hold.

    - Candidates: of the boxes above the threshold the max(1024, 2 * max_det) of highest score enter. Should there be
      more, detections less confident than the last that entered are missing; all others are as they should be.
    - Rounds: whether a box is kept depends on the kept ones before it. All are settled at once, again and again, from
      "all kept" on: a box that no better one overlaps is right from the start, and each round settles those that depend
      on settled ones alone. So 16 rounds bound the length of chains to 17 (a suppresses b, which therefore does not
      suppress c, which therefore suppresses d ...), not the number of boxes on an object: hundreds around one need one
      round. On photographs 5 rounds were needed at a confidence of 0.05, 10 at 0.001.
    """

    def __init__(
        self,
        decoder: nn.Module,
        suppression: NMSConfig,
        topk_per_class: int | None = None,
        unit_px: Sequence[int] = (1, 1),
    ):
        """Takes how rows are made and how detections are chosen.

        Args:
            decoder: maps to rows in pixels.
            suppression: thresholds, number of detections, whether classes matter.
            topk_per_class: most detections of a class in an image; None sets no limit.
            unit_px: pixels that make a unit of x and of y in the detections.
        """
        super().__init__()
        self.decoder, self.suppression = decoder, suppression
        self.topk_per_class = topk_per_class
        wanted = max(MIN_CANDIDATES, 2 * suppression.max_det)
        self.candidates = wanted if decoder.row_count is None else min(wanted, decoder.row_count)
        self.register_buffer("unit", torch.tensor([*unit_px, *unit_px, 1, 1], dtype=torch.float32))
        self.register_buffer("rank", torch.arange(self.candidates, dtype=torch.float32).unsqueeze(1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps nl tensors (b, na * no, ny, nx) to (b, max_det, 6) [x1, y1, x2, y2 in px, confidence, class].

        The most confident comes first; what is left over at the end is zero.
        """
        found = self._candidates(self.decoder(maps))
        kept = self._kept(found, (found[..., 4:5] > 0).float())
        found = torch.cat((found[..., :4], found[..., 4:5] * kept, found[..., 5:]), dim=2)
        score, index = torch.topk(found[..., 4], min(self.suppression.max_det, self.candidates), dim=1)
        best = _picked(found, index) * (score > 0).float().unsqueeze(2) / self.unit
        return _zero_pad(best, self.suppression.max_det - self.candidates)

    def _candidates(self, rows: Tensor) -> Tensor:
        """Turns rows (b, n, 5 + nc) into candidates (b, k, 6) [x1, y1, x2, y2 in px, score or 0, class], best first."""
        sides = rows[..., 2:4]
        score = rows[..., 4] * rows[..., 5:].amax(dim=2)
        # No probability exceeds 1, so that the objectness is above the threshold wherever the score is
        passes = (score > self.suppression.conf_thres).float()
        passes = passes * (sides.amin(dim=2) >= MIN_SIDE_PX).float() * (sides.amax(dim=2) <= MAX_SIDE_PX).float()
        score = (score * passes).unsqueeze(2)
        if self.decoder.row_count is None:  # small images have fewer rows
            rows, score = _zero_pad(rows, self.candidates), _zero_pad(score, self.candidates)
        score, index = torch.topk(score[..., 0], self.candidates, dim=1)
        rows = _picked(rows, index)
        label = (rows[..., 5:] * rows[..., 4:5]).argmax(dim=2, keepdim=True).float()  # slow, so not of all rows
        half = rows[..., 2:4] / 2
        return torch.cat((rows[..., :2] - half, rows[..., :2] + half, score.unsqueeze(2), label), dim=2)

    def _kept(self, found: Tensor, valid: Tensor) -> Tensor:
        """Returns (b, k, 1), 1 for the candidates that are detections, else 0.

        Args:
            found: (b, k, 6) candidates [x1, y1, x2, y2 in px, score, class], best first.
            valid: (b, k, 1), 1 for those above the threshold, else 0.
        """
        # Multiplied, so that no converter stores the k x k comparison as a constant; the others' places do not matter
        place = self.rank * valid
        earlier = (place > place.transpose(1, 2)).float()
        rivals = earlier * self._overlapping(found)
        label = found[..., 5:]
        like = earlier * (label == label.transpose(1, 2)).float()
        if not self.suppression.agnostic:
            rivals = like * rivals
        kept = valid
        for _ in range(SUPPRESSION_ROUNDS):
            kept = valid * (1 - torch.clamp(torch.bmm(rivals, kept), max=1.0))
        if self.topk_per_class is not None:
            kept = kept * (torch.bmm(like, kept) < self.topk_per_class).float()
        return kept

    def _overlapping(self, found: Tensor) -> Tensor:
        """Returns (b, k, k), 1 where two of the boxes [x1, y1, x2, y2, ...] (b, k, 6) overlap too much, else 0."""
        x1, y1, x2, y2 = (found[..., side : side + 1] for side in range(4))
        across = torch.minimum(x2, x2.transpose(1, 2)) - torch.maximum(x1, x1.transpose(1, 2))
        down = torch.minimum(y2, y2.transpose(1, 2)) - torch.maximum(y1, y1.transpose(1, 2))
        shared = across.clamp(min=0) * down.clamp(min=0)
        area = (x2 - x1) * (y2 - y1)
        union = area + area.transpose(1, 2) - shared
        return (shared > self.suppression.iou_thres * union).float()


def _picked(table: Tensor, index: Tensor) -> Tensor:
    """Returns the rows of (b, n, c) that index (b, k) names, (b, k, c)."""
    return torch.gather(table, 1, index.unsqueeze(2).expand(-1, -1, table.shape[2]))


def _zero_pad(table: Tensor, count: int) -> Tensor:
    """Returns (b, n, c) with `count` rows of zeros more at the end, where it is above zero."""
    return torch.cat((table, table.new_zeros(table.shape[0], count, table.shape[2])), dim=1) if count > 0 else table
