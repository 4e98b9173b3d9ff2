"""Training hyperparameters: read and checked.

Covers every key of YOLOv5 6.1's `data/hyps/*.yaml`, plus optional ones, without which a run is 6.1's. A `Hyp` does
not change. Not here: what the augmentations do with their keys (`utils.augmentations`), how a loss fits its gains to a
model (`utils.loss`), the schedule (`utils.train.optim`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError, did_you_mean
from utils.files import read_yaml
from utils.log import LOGGER
from utils.loss.iou import BOX_LOSSES


class Range(NamedTuple):
    """Allowed values of one hyperparameter; the ends belong to it unless said otherwise."""

    low: float = 0.0
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        lower = f"{'more than' if self.low_open else 'at least'} {self.low:g}"
        upper = f" and {'below' if self.high_open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return lower + upper


class OneOf(tuple[str, ...]):
    """Allowed texts of one hyperparameter."""

    def __str__(self) -> str:
        return f"one of {', '.join(self)}"


_NOT_NEGATIVE = Range()
_POSITIVE = Range(low_open=True)
_FRACTION = Range(0.0, 1.0)
_BELOW_ONE = Range(0.0, 1.0, high_open=True)


def _key(allowed: Range | OneOf, **default: Any) -> Any:
    """Declares one hyperparameter; without `default` a file must hold it."""
    return field(metadata={"range": allowed}, **default)


@dataclass(frozen=True)
class Hyp:
    """Hyperparameters of a run, numbers but for `optimizer` and `box_loss`; `anchors` is None unless a file gives it.

    Raises:
        UserError: a value outside its range, when one is constructed.
    """

    lr0: float = _key(_POSITIVE)  # initial learning rate
    lrf: float = _key(_NOT_NEGATIVE)  # final learning rate as a fraction of lr0
    momentum: float = _key(_BELOW_ONE)  # SGD's momentum, Adam's first beta
    weight_decay: float = _key(_NOT_NEGATIVE)  # at the nominal batch
    warmup_epochs: float = _key(_NOT_NEGATIVE)
    warmup_momentum: float = _key(_BELOW_ONE)
    warmup_bias_lr: float = _key(_NOT_NEGATIVE)
    box: float = _key(_NOT_NEGATIVE)  # gains of the three loss terms of YOLOv5's head
    cls: float = _key(_NOT_NEGATIVE)
    cls_pw: float = _key(_POSITIVE)  # weight of positives in the two cross entropies
    obj: float = _key(_NOT_NEGATIVE)
    obj_pw: float = _key(_POSITIVE)
    iou_t: float = _key(_FRACTION)  # without effect
    anchor_t: float = _key(Range(1.0, low_open=True))  # largest side ratio of a target and an anchor that match
    fl_gamma: float = _key(_NOT_NEGATIVE)  # focal loss exponent, 0 = plain cross entropy
    hsv_h: float = _key(_FRACTION)
    hsv_s: float = _key(_FRACTION)
    hsv_v: float = _key(_FRACTION)
    degrees: float = _key(Range(0.0, 180.0))
    translate: float = _key(_FRACTION)
    scale: float = _key(_BELOW_ONE)  # images are scaled by 1 - scale to 1 + scale
    shear: float = _key(Range(0.0, 90.0, high_open=True))  # degrees
    perspective: float = _key(Range(0.0, 0.01))
    flipud: float = _key(_FRACTION)  # from here on probabilities
    fliplr: float = _key(_FRACTION)
    mosaic: float = _key(_FRACTION)
    mixup: float = _key(_FRACTION)
    copy_paste: float = _key(_FRACTION, default=0.0)
    anchors: float | None = _key(Range(0.0, 100.0), default=None)  # per layer, rounded; 0 = as the model says
    mosaic9: float = _key(_FRACTION, default=0.0)  # share of mosaics made of nine images
    label_smoothing: float = _key(_BELOW_ONE, default=0.0)
    optimizer: str = _key(OneOf(("SGD", "Adam", "AdamW")), default="SGD")
    box_loss: str = _key(OneOf(BOX_LOSSES), default="ciou")
    af_box: float = _key(_NOT_NEGATIVE, default=7.5)  # gains of the anchor-free head's loss
    af_cls: float = _key(_NOT_NEGATIVE, default=0.5)
    af_dfl: float = _key(_NOT_NEGATIVE, default=1.5)
    nominal_batch: float = _key(Range(1.0), default=64.0)  # images an optimizer step; smaller batches are accumulated
    warmup_ratio: float = _key(_FRACTION, default=0.0)  # warm-up's share of the run; 0 = warmup_epochs with its floor
    ema_tau: float = _key(_FRACTION, default=0.0)  # EMA's time constant as a share of the run's steps; 0 = 2000 updates
    close_mosaic: float = _key(_FRACTION, default=0.0)  # share of the epochs, at the end, without mosaics
    distill: float = _key(_NOT_NEGATIVE, default=0.1)  # gain of what `--teacher` adds to the loss
    key_order: tuple[str, ...] = field(default=(), repr=False, compare=False)  # as the file had them, for to_dict

    def __post_init__(self) -> None:
        for name, entry in _KEYS.items():
            value, allowed = getattr(self, name), entry.metadata["range"]
            if (value is None and name == "anchors") or value in allowed:
                continue
            if name in _TEXTS:
                raise UserError(f"hyperparameter '{name}' is {value!r:.80}; it must be {allowed}.")
            finite = "" if math.isfinite(value) else "finite, "
            raise UserError(f"hyperparameter '{name}' is {value:g}; it must be {finite}{allowed}.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Hyp:
        """Reads a hyperparameter file; errors as of `from_dict`."""
        return cls.from_dict(read_yaml(path), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "hyperparameters") -> Hyp:
        """Makes a `Hyp` of a mapping as files and checkpoints hold it; `source` names it in messages.

        Raises:
            UserError: a key that is unknown (the nearest is named), missing, not a number or out of range; no mapping.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: lines of 'key: value' are expected, found {type(values).__name__}.")
        for name, value in values.items():
            if name not in _KEYS:
                hint = did_you_mean(str(name)[:80], _KEYS)
                raise UserError(f"{source}: unknown hyperparameter {name!r:.80}.{hint}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and name not in _TEXTS and not (value is None and name == "anchors"):
                raise UserError(f"{source}: hyperparameter '{name}' is {value!r:.80}; a number is expected.")
        missing = [name for name, entry in _KEYS.items() if entry.default is dataclasses.MISSING and name not in values]
        if missing:
            raise UserError(
                f"{source}: missing hyperparameter{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
                "Copy them from data/hyps/hyp.scratch-low.yaml."
            )
        if "copy_paste" not in values:  # the releases before 6.0 had no such key
            LOGGER.info(f"{source}: no copy_paste, using {_KEYS['copy_paste'].default:g}")
        if values["iou_t"] != UNUSED_IOU_T:
            LOGGER.warning(f"WARNING: {source}: iou_t has no effect, as in YOLOv5")
        try:
            # by way of text a whole number beyond float's range is infinite, and refused as such
            kept = {
                name: value if value is None or name in _TEXTS else float(str(value)) for name, value in values.items()
            }
            return cls(**kept, key_order=tuple(values))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, float | str]:
        """Returns the values in the order of the file they came from; optional keys only where they say something."""
        added = [name for name in _KEYS if name not in self.key_order and getattr(self, name) != _KEYS[name].default]
        return {name: getattr(self, name) for name in (*self.key_order, *added) if getattr(self, name) is not None}


_KEYS: dict[str, dataclasses.Field] = {entry.name: entry for entry in dataclasses.fields(Hyp) if entry.metadata}
_TEXTS = {name for name, entry in _KEYS.items() if isinstance(entry.metadata["range"], OneOf)}
UNUSED_IOU_T = 0.2  # what YOLOv5's files give the key that nothing reads
