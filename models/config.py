"""Model YAMLs: read, checked, and their rows' arguments turned into those of a layer's class.

Nothing in a YAML is evaluated. What a file asks for is tried on torch's meta device first, whose tensors have shapes
and no values: files made to fill the memory or to keep the processor busy are refused at no cost.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from models.common import is_activation, parse_activation
from utils.errors import UserError, did_you_mean, make_divisible, shown
from utils.files import find_file, read_yaml

CONFIG_KEYS = {
    "nc": int,
    "depth_multiple": (int, float),
    "width_multiple": (int, float),
    "backbone": list,
    "head": list,
}
OPTIONAL_KEYS = {"ch": int, "channel_multiple": int, "inplace": bool}  # and `activation`, which is a block's to read
# Far beyond any detector: these stop YAMLs that would fill the memory. The largest of YOLOv5's layers comes to 41e6.
LIMITS = {  # key -> least and greatest value
    "nc": (1, 100_000),
    "depth_multiple": (0, 100),
    "width_multiple": (0.001, 100),
    "ch": (1, 1000),
    "channel_multiple": (1, 1024),
}
MAX_LAYER_SIZE = 1 << 30  # repeats, channels squared and the largest other number squared, multiplied
MAX_ROWS = 500
MAX_SOURCES = 64  # of a row
MAX_REPEATS = 100  # of a row, times depth_multiple
MAX_ANCHORS = 100  # per level
MAX_ANCHOR_PX = 1e6
MAX_LITERAL = 200  # characters


def read_config(cfg: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns a model YAML as a dict of its own, and the file's name ("model" for a mapping).

    Raises:
        UserError: no such file, not a model YAML, or a key is missing or of the wrong kind.
    """
    if isinstance(cfg, Mapping):
        config, source = copy.deepcopy(dict(cfg)), "model"
    else:
        path = find_file(str(cfg), suffixes=(".yaml", ".yml"), what="model YAML")
        config, source = read_yaml(path), path.name
    if not isinstance(config, dict):
        raise UserError(f"{source}: not a model YAML: keys such as nc, anchors, backbone and head are expected.")
    for key, kinds in CONFIG_KEYS.items():
        if not _is_a(config.get(key), kinds):
            given = f"'{key}: {shown(config.get(key))}' is of the wrong kind"
            problem = given if key in config else f"'{key}' is missing"
            raise UserError(f"{source}: {problem}; a model YAML needs {', '.join(CONFIG_KEYS)}.")
    _check_optional_keys(config, source, from_file=not isinstance(cfg, Mapping))
    if config["nc"] < 1:
        raise UserError(f"{source}: nc: {config['nc']}: a detector needs at least one class.")
    for key, (least, greatest) in LIMITS.items():
        value = config.get(key, least)
        if not least <= value <= greatest:
            raise UserError(f"{source}: '{key}: {value}' is no number from {least} to {greatest}.")
    if not 1 <= len(config["backbone"]) + len(config["head"]) <= MAX_ROWS:
        raise UserError(f"{source}: backbone and head must have from 1 to {MAX_ROWS} rows together.")
    if "anchors" in config and not (_is_a(config["anchors"], (int, list)) and _are_anchors(config["anchors"])):
        given = f"{source}: anchors: {shown(config['anchors'])}"
        raise UserError(f"{given}: give one list [w, h, w, h, ...] of sizes per level, or their number.")
    return config, source


def reason_of(error: Exception) -> str:
    """Returns the first line of what an error says, for torch's fill pages; its kind where it says nothing."""
    return str(error).partition("\n")[0].rstrip(":") or type(error).__name__


def _is_a(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))  # which are numbers in Python


def _check_optional_keys(config: Mapping[Any, Any], source: str, from_file: bool) -> None:
    for key, kind in OPTIONAL_KEYS.items():
        if key in config and not _is_a(config[key], kind):
            words = "true or false" if kind is bool else "a whole number from {} to {}".format(*LIMITS[key])
            raise UserError(f"{source}: '{key}: {shown(config[key])}' must be {words}.")
    if from_file:  # a checkpoint's may hold other programs' keys; files' may, but no misspelt ones
        absent = sorted({"activation", "channel_multiple", "inplace"} - set(config))
        for key in [key for key in config if key not in (*CONFIG_KEYS, *OPTIONAL_KEYS, "activation")][:100]:
            if hint := did_you_mean(shown(key), absent):
                raise UserError(f"{source}: unknown key '{shown(key)}'.{hint}")


def _are_anchors(anchors: int | list) -> bool:
    """Tells whether these are anchors: a number of them per level, or rows of positive numbers."""
    if isinstance(anchors, int):
        return 1 <= anchors <= MAX_ANCHORS
    rows = [row for row in anchors if isinstance(row, list) and len(row) <= 2 * MAX_ANCHORS]
    numbers = [side for row in rows for side in row]
    positive = all(_is_a(side, (int, float)) and 0 < side < MAX_ANCHOR_PX for side in numbers)
    return bool(anchors) and len(rows) == len(anchors) and positive


def check_row(row: Any) -> list[Any]:
    """Returns the row when it has the form [from, number, module, args]."""
    kinds = ((int, list), int, str, list)
    formed = isinstance(row, list) and len(row) == 4 and all(map(_is_a, row, kinds))
    if not formed or (isinstance(row[0], list) and not all(_is_a(source, int) for source in row[0])):
        raise ValueError("a row is [from, number, module, [args]], from being a row's number or a list of them")
    if row[1] < 1 or row[0] == []:
        raise ValueError("a row needs at least one source and one repeat")
    if isinstance(row[0], list) and len(row[0]) > MAX_SOURCES:
        raise ValueError(f"a row with {len(row[0])} sources reads more than any detector's (at most {MAX_SOURCES})")
    return row


def absolute_row(position: int, index: int) -> int:
    """Returns the row that `position` of row `index` means; -1 for the image, which only row 0 reads."""
    row = position if position >= 0 else index + position
    if not (0 <= row < index or (row == -1 and index == 0)):
        raise ValueError(f"reads from row {position}, but only rows before it can be read")
    return row


def gather(sources: int | list[int], previous: Tensor, outputs: list[Tensor | None]) -> Tensor | list[Tensor]:
    """Returns what a layer reads: one earlier output, or a list of them; -1 is the previous layer's."""
    if isinstance(sources, int):
        return outputs[sources]
    return [previous if source == -1 else outputs[source] for source in sources]


def resolve_argument(value: Any, names: Mapping[str, Any]) -> Any:
    """Turns a row's argument into a value: a name of `names`, a literal, an activation, else the text itself."""
    if isinstance(value, list):
        return [resolve_argument(item, names) for item in value]
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    if len(value) > MAX_LITERAL:
        raise ValueError(f"an argument of {len(value)} characters is too long")
    if value.startswith(("nn.", "torch.nn.")) or is_activation(value.split("(")[0]):
        return parse_activation(value)
    try:
        return ast.literal_eval(value)
    except (MemoryError, RecursionError, SyntaxError, ValueError):  # a word such as 'nearest'
        return value


def channel_scale(config: Mapping[str, Any]) -> Callable[[int], int]:
    """Returns how channel counts are scaled: by width_multiple, up to a multiple of 8 (`channel_multiple`)."""
    anchors = config.get("anchors", 0)  # a head may have none
    outputs = (anchors if isinstance(anchors, int) else len(anchors[0]) // 2) * (config["nc"] + 5)
    multiple = config.get("channel_multiple", 8)
    return lambda width: width if width == outputs else make_divisible(width * config["width_multiple"], multiple)


class RowInputs(NamedTuple):
    """What a row's arguments may depend on: its sources' channels and how a channel count of the YAML is scaled."""

    channels: list[int]
    scale: Callable[[int], int]
    inplace: bool


class LayerPlan(NamedTuple):
    """Arguments for a block's class, and the channels that come out of the layer."""

    args: list[Any]
    channels: int


def check_size(repeats: int, inputs: RowInputs, width: int, args: list[Any]) -> None:
    """Refuses layers that no memory would hold, before they are built; `args` are the row's own.

    Raises:
        ValueError: more channels, repeats or larger kernels than any detector has.
    """
    if repeats > MAX_REPEATS:
        raise ValueError(f"{repeats} repeats are more than any detector has (at most {MAX_REPEATS})")
    flat = [value for argument in args[1:] for value in (argument if isinstance(argument, list) else [argument])]
    others = [abs(value) for value in flat if isinstance(value, (int, float))]
    size = repeats * max(width, 1, *inputs.channels) ** 2 * max([1, *others]) ** 2
    if not size <= MAX_LAYER_SIZE:
        raise ValueError(f"{repeats} layers of {width} channels with these arguments are larger than any detector's")


def scaled_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans (c1, c2, rest ...): c1 from the source, c2 the row's first argument times the model's width."""
    if len(inputs.channels) != 1:
        raise ValueError(f"takes one source, got {len(inputs.channels)}")
    if not args or not _is_a(args[0], int) or args[0] < 1:
        raise ValueError("its first argument must be the number of output channels")
    width = inputs.scale(args[0])
    return LayerPlan([inputs.channels[0], width, *args[1:]], width)


def same_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans the row's arguments as they are; the channels stay those of the first source."""
    return LayerPlan(args, inputs.channels[0])


def norm_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans the source's channels as the first argument."""
    return LayerPlan([inputs.channels[0], *args], inputs.channels[0])


def joined_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans a layer whose output has the channels of all sources."""
    return LayerPlan(args, sum(inputs.channels))


def contracted_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans Contract: gain squared times the channels."""
    return LayerPlan(args, inputs.channels[0] * (args[0] if args else 2) ** 2)


def expanded_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans Expand: the channels divided by gain squared."""
    return LayerPlan(args, inputs.channels[0] // (args[0] if args else 2) ** 2)


def fused_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans ASFF from (level): the sources' channels come first, and out come those of the source of that number."""
    levels = len(inputs.channels)
    if levels < 2:
        raise ValueError("takes the maps of at least two levels, finest first")
    if len(args) != 1 or not _is_a(args[0], int) or not 0 <= args[0] < levels:
        raise ValueError(f"its argument must be the level that comes out, a whole number from 0 to {levels - 1}")
    return LayerPlan([inputs.channels, *args], inputs.channels[args[0]])


def head_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans a detection head (nc, ch, rest ...) from (nc, rest ...): the sources' channels come second."""
    if not args or not _is_a(args[0], int) or args[0] < 1:
        raise ValueError("its first argument must be nc, a whole number from 1")
    return LayerPlan([args[0], inputs.channels, *args[1:]], inputs.channels[0])


def detect_channels(inputs: RowInputs, args: list[Any]) -> LayerPlan:
    """Plans Detect from (nc, anchors): checks the anchors and appends the sources' channels."""
    nc, anchors = args
    levels = len(inputs.channels)
    if anchors is None:
        raise ValueError("'anchors' is missing in the model YAML")
    if not isinstance(nc, int) or nc < 1 or not _are_anchors(anchors):
        raise ValueError("its arguments are nc and anchors: a whole number from 1, and sizes per level or their number")
    if isinstance(anchors, int):
        anchors = [list(range(anchors * 2))] * levels  # to be found by AutoAnchor
    if len(anchors) != levels:
        raise ValueError(f"{len(anchors)} rows of anchors for {levels} detection levels; give one row per level")
    sizes = {len(row) for row in anchors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every level needs the same number of anchors, got rows of {[len(row) for row in anchors]}")
    if sizes.pop() % 2:
        raise ValueError("anchors are pairs of width and height: a row with an odd number of values is missing one")
    return LayerPlan([nc, anchors, inputs.channels, inputs.inplace], inputs.channels[0])


# Far beyond any detector; in brackets what the largest of our models comes to.
MAX_LAYERS = 500  # rows, each times its repeats (80)
MAX_NUMBERS = 500_000_000  # parameters and statistics of all layers (144e6)
MAX_CALLS = 20_000  # of torch's functions for tensors, to build a model and to run it once (6e3)
MAX_MAP_NUMBERS = 1 << 24  # in what a layer makes of one image (0.3e6 at 128 px)


class _CallLimit(TorchFunctionMode):
    """Counts calls of torch's functions in this thread: layers that are small and very many cost time alone."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Passes a call on; those that return no tensor are free, for they may restore torch's state.

        Raises:
            ValueError: it is one too many.
        """
        result = func(*args, **(kwargs or {}))
        self._calls += isinstance(result, Tensor)
        if self._calls > MAX_CALLS and isinstance(result, Tensor):
            raise ValueError(f"up to here the model takes more than {MAX_CALLS} operations, far more than any detector")
        return result


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Lets layers be made and run without memory and work; torch's generators stay as they are."""
    with torch.device("meta"), _CallLimit():
        yield


def run_hollow(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a model made in `on_meta_device`, on the CPU: each of its tensors stands for one number, repeated."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    with torch.device("cpu"):
        zero = torch.zeros(())
        hollow = {name: zero.expand(tensor.shape) for name, tensor in tensors}
        return functional_call(model, hollow, args, kwargs)


def numbers_of(layer: nn.Module) -> int:
    """Returns how many numbers a layer holds."""
    return sum(tensor.numel() for tensor in chain(layer.parameters(), layer.buffers()))


class Totals:
    """What the layers of a model come to."""

    def __init__(self) -> None:
        self._layers = self._numbers = 0

    def add(self, layer: nn.Module, repeats: int) -> None:
        """Adds a row's layer, made of `repeats` equal ones.

        Raises:
            ValueError: with it the model is larger than any detector, or it is none for images.
        """
        if any(isinstance(part, nn.Conv2d) and part.weight.dim() != 4 for part in layer.modules()):
            raise ValueError("a kernel has one side or two")
        self._layers += repeats
        self._numbers += numbers_of(layer)
        for what, found, limit in (
            ("layers, repeats counted,", self._layers, MAX_LAYERS),
            ("parameters and statistics,", self._numbers, MAX_NUMBERS),
        ):
            if found > limit:
                raise ValueError(f"up to here it has {found:,} {what} more than any detector (at most {limit:,})")


def check_map(output: Any) -> None:
    """Refuses layers whose output, a map (b, c, h, w) or several, is empty or no memory would hold.

    Raises:
        ValueError: it has no numbers, or more than any detector's.
    """
    maps = output if isinstance(output, (list, tuple)) else [output]
    numbers = sum(math.prod(one.shape[1:]) for one in maps if isinstance(one, Tensor))
    if numbers == 0:
        raise ValueError("makes a map without cells")
    if numbers > MAX_MAP_NUMBERS:
        raise ValueError(
            f"makes {numbers:,} numbers of one small image, more than any detector (at most {MAX_MAP_NUMBERS:,})"
        )


def strides_of(maps: Sequence[Tensor], side_px: int) -> list[float]:
    """Returns the pixels per cell of maps (b, na, h, w, no) made of a square image of `side_px`.

    Raises:
        ValueError: they are not whole, or not the same both ways.
    """
    strides = []
    for one in maps:
        height, width = one.shape[2:4]
        if height != width or side_px % height:
            raise ValueError(
                f"gets {height} x {width} cells of {side_px} x {side_px} px, and strides must be whole: use odd "
                "kernels, and strides that halve"
            )
        strides.append(side_px / height)
    return strides
