"""What follows the detection head's convolutions, for inference and exports: from maps to boxes.

`head_for` returns what an export needs: `Decoder` (rows, as `Detect` in evaluation mode gives them), `NMSHead` (the
few detections that are kept) or, by name, `RawMaps` (logits, as `Detect` in training gives them). All consist of plain
tensor operations on at most four axes, which every converter knows; only `RawMaps` needs five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.nms import MAX_SIDE_PX, MIN_SIDE_PX, NMSConfig

MIN_CANDIDATES = 1024  # candidates per image that enter the suppression inside a model, at least
SUPPRESSION_ROUNDS = 16


def head_for(
    detect: nn.Module,
    shape_hw: Sequence[int] | None = None,
    nms: NMSConfig | None = None,
    topk_per_class: int | None = None,
    normalised: bool = False,
) -> nn.Module:
    """Returns the module that makes an export's output of the head's maps.

    Args:
        detect: the trained model's `Detect`.
        shape_hw: height and width of the images where they are fixed, px; None lets them follow from the maps.
        nms: choose detections inside the model; None leaves all rows.
        topk_per_class: most detections of a class in an image, with `nms`; None sets no limit.
        normalised: boxes as fractions of the images' width and height; needs `shape_hw`.

    Raises:
        ValueError: `normalised` without `shape_hw`.
    """
    if nms is None:
        return Decoder.of(detect, shape_hw, normalised)
    return NMSHead(Decoder.of(detect, shape_hw), nms, topk_per_class, normalised)


class _Float32(nn.Module):
    """A module whose constants stay float32 when the model's weights become half: pixels want the precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class RawMaps(nn.Module):
    """Maps of the head to logits, as `Detect` in training gives them: for those who decode themselves."""

    def __init__(self, anchors_per_cell: int):
        """Takes the number of anchors per cell, na."""
        super().__init__()
        self.na = anchors_per_cell

    @classmethod
    def of(cls, detect: nn.Module) -> RawMaps:
        """Makes it for a `Detect`."""
        return cls(detect.na)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps nl tensors (b, na * no, ny, nx) to as many (b, na, ny, nx, no)."""
        logits = []
        for level in maps:
            batch, channels, height, width = level.shape
            split = level.reshape(batch, self.na, channels // self.na, height, width)
            logits.append(split.permute(0, 1, 3, 4, 2).contiguous())
        return logits


class Decoder(nn.Module):
    """Maps of the head to rows [x, y, w, h in px, objectness, class probabilities], float32.

    With a fixed image size the cells' places are constants of the graph; without, they follow from the maps' sizes.

    Attributes:
        shape_hw: height and width of the images where they are fixed, px, else None.
        row_count: rows of an image of that size, else None.
    """

    def __init__(
        self,
        anchors_px: Tensor,
        stride: Tensor,
        columns: int,
        shape_hw: Sequence[int] | None = None,
        normalised: bool = False,
    ):
        """Takes the anchors and what is known of the images.

        Args:
            anchors_px: (nl, na, 2) width and height in pixels.
            stride: (nl,) pixels per cell.
            columns: of a row, no = 5 + nc.
            shape_hw: height and width of the images where they are fixed.
            normalised: give boxes as fractions of the images' width and height.

        Raises:
            ValueError: `normalised` without `shape_hw`.
        """
        super().__init__()
        self.shape_hw = None if shape_hw is None else (shape_hw[0], shape_hw[1])
        unit_px = _unit_px(self.shape_hw, normalised)
        levels = zip(anchors_px, stride.tolist(), strict=True)
        self.levels = nn.ModuleList(_LevelDecoder(*level, columns, self.shape_hw, unit_px) for level in levels)
        self.row_count = None if shape_hw is None else sum(level.row_count for level in self.levels)

    @classmethod
    def of(cls, detect: nn.Module, shape_hw: Sequence[int] | None = None, normalised: bool = False) -> Decoder:
        """Makes the decoder of a `Detect`; arguments as said at the constructor."""
        stride = detect.stride.float().to(detect.anchors.device)
        return cls(detect.anchors.float() * stride.view(-1, 1, 1), stride, detect.no, shape_hw, normalised)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps nl tensors (b, na * no, ny, nx) to (b, rows, no), level by level, then by anchor, y, x."""
        rows = [decode(level) for decode, level in zip(self.levels, maps, strict=True)]
        return torch.cat(rows, dim=1)


class _LevelDecoder(_Float32):
    """The decoder of one level.

    Boxes are decoded while the channels still stand before the cells, where taking four of them apart is cheap: on a
    CPU that takes less than half the time of working on finished rows in PyTorch, a fifth less in ONNX Runtime and
    OpenVINO.
    """

    def __init__(
        self,
        anchors_px: Tensor,
        stride: float,
        columns: int,
        shape_hw: tuple[int, int] | None,
        unit_px: tuple[int, int],
    ):
        """Takes what `Decoder` takes, anchors (na, 2) and stride of this level; `unit_px` divides x and y."""
        super().__init__()
        self.na, self.no, self.stride = len(anchors_px), columns, stride
        unit = anchors_px.new_tensor(unit_px)
        self.register_buffer("scale", (2 * stride / unit).view(1, 1, 2, 1))
        self.register_buffer("anchors", (4 * anchors_px / unit).view(1, self.na, 2, 1))
        self.offset: Tensor | None
        self.register_buffer("offset", None)
        if shape_hw is not None:
            size = [round(side / stride) for side in shape_hw]
            self.offset = self._offset(size, anchors_px.device) / unit.view(1, 1, 2, 1)
            self.row_count = self.na * size[0] * size[1]

    def forward(self, level: Tensor) -> Tensor:
        """Maps (b, na * no, ny, nx) to (b, na * ny * nx, no)."""
        if self.offset is None:
            batch, rows = level.shape[0], -1
            offset = self._offset(level.shape[2:], level.device)
        else:  # the number of images alone is free, so that no size is computed in the graph
            batch, rows = -1, self.row_count
            offset = self.offset
        scores = level.float().sigmoid().reshape(batch, self.na, self.no, max(rows // self.na, -1))
        xy = scores[:, :, :2] * self.scale + offset
        wh = scores[:, :, 2:4] * scores[:, :, 2:4] * self.anchors  # not a power: some converters have none
        decoded = torch.cat((xy, wh, scores[:, :, 4:]), dim=2)
        return decoded.transpose(2, 3).reshape(batch, rows, self.no)

    def _offset(self, size: Sequence[int], device: torch.device) -> Tensor:
        """Returns the summand of x and y for each cell, (1, 1, 2, ny * nx) px, of a map of `size` ny, nx cells."""
        rows = (torch.arange(size[0], device=device, dtype=torch.float32) - 0.5) * self.stride
        columns = (torch.arange(size[1], device=device, dtype=torch.float32) - 0.5) * self.stride
        return torch.stack(torch.meshgrid(columns, rows, indexing="xy")).reshape(1, 1, 2, -1)


def _unit_px(shape_hw: tuple[int, int] | None, normalised: bool) -> tuple[int, int]:
    """Returns how many pixels make a unit of x and of y.

    Raises:
        ValueError: `normalised` without a fixed image size.
    """
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
        decoder: Decoder,
        suppression: NMSConfig,
        topk_per_class: int | None = None,
        normalised: bool = False,
    ):
        """Takes how rows are made and how detections are chosen.

        Args:
            decoder: maps to rows in pixels.
            suppression: thresholds, number of detections, whether classes matter.
            topk_per_class: most detections of a class in an image; None sets no limit.
            normalised: give boxes as fractions of the images' width and height.

        Raises:
            ValueError: `normalised` without a fixed image size.
        """
        super().__init__()
        unit_px = _unit_px(decoder.shape_hw, normalised)
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
