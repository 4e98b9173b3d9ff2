"""From a weights file to a model: our own checkpoints, and original YOLOv5 5.0 to 7.0 files.

Original files are pickles of whole modules. They are opened without running anything: every class and function that
they name must be on the allow-list below, a stub that only keeps attributes stands in for each, and the stubs' tensors
are then collected by name. This file and `utils.checkpoint` are the only places that know about file formats.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.config import check_row, reason_of
from models.yolo import BLOCKS, Model
from utils.checkpoint import ForeignPickle, check_tensor, load_checkpoint, read_archive
from utils.cli import find_weights
from utils.errors import UserError
from utils.files import find_file
from utils.log import LOGGER

# Blocks that do the same with tensors of the same name, so that one can take them over from another.
INNER_FIRST = ("C3", "C3TR", "C3SPP", "C3Ghost", "C3GS", "BottleneckCSP")  # cv3 reads (inner(cv1 x), cv2 x)
INNER_LAST = ("VoVGSCSP", "VoVGSCSPC")  # cv3 reads (cv2 x, inner(cv1 x))
ALIKE = (INNER_FIRST, INNER_LAST, ("SPP", "SPPF"), ("GSBottleneck", "GSBottleneckC"))


@dataclass(frozen=True)
class Weights:
    """What a weights file says.

    Attributes:
        yaml: the model YAML as a dict, with the file's own number of classes, anchors in pixels and activation.
        state_dict: tensors by the keys of `models.yolo.Model`, on the CPU, floating ones in float32.
        names: class names {number: name}.
        nc: number of classes.
        stride: pixels per cell of each level.
        source: "ours" or "yolov5".
        meta: epoch, date, opt, hyp, data: None where the file does not say.
        path: the file, for messages.
    """

    yaml: dict[str, Any]
    state_dict: dict[str, Tensor]
    names: dict[int, str]
    nc: int
    stride: list[int]
    source: str
    meta: dict[str, Any]
    path: Path


class Transfer(NamedTuple):
    """Tensors taken over, tensors of the model, the keys that kept the model's own values, and lines for people: which
    rows did not come over as they were."""

    loaded: int
    total: int
    missing_keys: list[str]
    rows: list[str]

    def told(self, source: str | Path) -> str:
        """Says what came over from the file `source`, and what did not."""
        return "\n  ".join([f"Transferred {self.loaded}/{self.total} items from {source}", *self.rows])


def _exchange_halves(weight: Tensor) -> Tensor:  # of input channels: (c2, c1, h, w) to the same shape
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


# (block that gives, block that takes) -> what to do with tensors that do not mean the same in both, by key
CONVERSIONS: dict[tuple[str, str], dict[str, Callable[[Tensor], Tensor]]] = {
    **{pair: {} for alike in ALIKE for pair in permutations(alike, 2)},
    **dict.fromkeys(
        [*product(INNER_FIRST, INNER_LAST), *product(INNER_LAST, INNER_FIRST)], {"cv3.conv.weight": _exchange_halves}
    ),
}


def load_model(weights: str | Path, device: str | torch.device = "cpu", fuse: bool = False) -> Model:
    """Loads a model for inference: float32, in evaluation mode, without gradients, with the EMA where there is one.

    Args:
        weights: a checkpoint of ours or an original YOLOv5 one; a released name (`yolov5s.pt`) is fetched.
        device: where to put it.
        fuse: fold batch norm into the convolutions.

    Raises:
        UserError: see `read_weights`.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
        model = model_from(read_weights(weights)).for_inference()
    if fuse:
        LOGGER.info("Fusing layers... ")
        model.fuse()
        LOGGER.info(model.info(gflops=False))
    return model.to(device)


def model_from(weights: Weights, cfg: str | Path | Mapping[str, Any] | None = None, nc: int | None = None) -> Model:
    """Builds a model with the file's weights, in evaluation mode.

    Args:
        weights: the file's content.
        cfg: another model YAML than the file's own.
        nc: another number of classes. With either, what fits is taken over and the rest stays as drawn.

    Raises:
        UserError: the model cannot be built, or the file's weights do not fit its own YAML.
    """
    try:
        model = Model(cfg or weights.yaml, nc=nc).eval()
    except UserError as error:
        raise error if cfg else UserError(f"{weights.path}: {error}") from error
    if not any(".bn." in key for key in weights.state_dict):
        model.fuse()  # as the file's model was before it was saved
    moved, own = transfer(model, weights), model.state_dict()
    if cfg is None and nc in (None, weights.nc):
        missing = [key for key in own if not _fits(weights.state_dict.get(key), own[key])]
        unknown = sorted(set(weights.state_dict) - set(own))
        if missing or unknown:
            raise UserError(
                f"{weights.path}: the weights do not fit their own model YAML: {len(missing)} tensors missing or of "
                f"another shape, {len(unknown)} unknown, such as {(missing + unknown)[0]}."
            )
    else:
        LOGGER.info(moved.told(weights.path))
    if model.nc == weights.nc:
        model.names = dict(weights.names)
    return model


def transfer(model: Model, weights: Weights, exclude: Sequence[str] = ()) -> Transfer:
    """Copies what fits from a weights file into a model, row by row.

    A row takes the layers whose tensors have its own keys, shapes and kinds (floating or not). Where the file's row of
    that number is another block, CONVERSIONS says whether the two can be compared and what must be rearranged; without
    an entry nothing is taken. Blocks that another program has registered are taken to mean the same by the same keys.

    Args:
        model: the receiver.
        weights: the giver.
        exclude: keys that contain one of these texts are left out.

    Raises:
        UserError: the file's model YAML has rows that are none.
    """
    try:
        givers = _block_names(weights.yaml)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{weights.path}: its model YAML is damaged ({reason_of(error)}).") from error
    taken: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}  # what to say -> the rows of which to say it
    own = model.state_dict()
    excluded = {key for key in own if any(text in key for text in exclude)}
    for index, block in enumerate(_block_names(model.yaml)):
        giver = givers[index] if index < len(givers) else None
        conversions = _conversions(giver, block)
        prefix = f"model.{index}."
        keys = [key for key in own if key.startswith(prefix)]
        came: set[str] = set()
        layers: dict[str, list[str]] = {}  # a batch norm belongs to its convolution, whose outputs it knows
        for key in keys if conversions is not None else ():
            layers.setdefault(re.sub(r"(\.conv|\.bn)?\.\w+$", "", key), []).append(key)
        for layer in layers.values():
            if all(_fits(weights.state_dict.get(key), own[key]) for key in layer) and not excluded.intersection(layer):
                came.update(layer)
        for key in came:
            convert = conversions.get(key.removeprefix(prefix))
            taken[key] = convert(weights.state_dict[key]) if convert else weights.state_dict[key]
        if len(came) < len(keys) or conversions:
            origin = "" if giver in (block, None) else f" from {giver}"
            rows.setdefault(f"{block}{origin}: {_parts_told(keys, came, conversions, prefix)}", []).append(index)
    model.load_state_dict(taken, strict=False)
    told = [f"row{'s' * (len(which) > 1)} {', '.join(map(str, which))}: {row}" for row, which in rows.items()]
    return Transfer(len(taken), len(own), [key for key in own if key not in taken], told)


def with_classes_of(model: Model, weights: Weights) -> Weights:
    """Returns weights whose head has the model's classes, so that `transfer` takes it over.

    What belongs to no class (boxes, objectness) and the classes of the same name, whatever their case, are the file's,
    the other classes the model's own. A head that differs in more stays the file's, and so does one without a name in
    common if the number of classes is the same: they may have been renamed.
    """
    known, wanted = ([str(name).strip().lower() for _, name in sorted(one.names.items())] for one in (weights, model))
    if known == wanted or (len(known) == len(wanted) and not set(known) & set(wanted)):
        return weights
    head, row = model.head, len(model.model) - 1
    prefix, state = f"model.{row}.", dict(weights.state_dict)
    for key, own in head.state_dict().items():
        given = state.get(prefix + key)
        if not head.has_class_rows(key) or given is None:
            continue
        rows = len(own) // head.na - len(wanted)  # of a box, before those of the classes
        if given.shape != (head.na * (rows + len(known)), *own.shape[1:]):
            continue
        given, own = (tensor.unflatten(0, (head.na, -1)) for tensor in (given, own.clone()))
        own[:, :rows] = given[:, :rows]
        for number, name in enumerate(wanted):
            if name in known:
                own[:, rows + number] = given[:, rows + known.index(name)]
        state[prefix + key] = own.flatten(0, 1)
    if any(state[key] is not tensor for key, tensor in weights.state_dict.items()):
        came = len(set(known) & set(wanted))
        LOGGER.info(f"row {row}: {type(head).__name__}: boxes and {came} of {len(wanted)} classes, by name")
    return replace(weights, state_dict=state)


def _fits(tensor: Tensor | None, own: Tensor) -> bool:
    return tensor is not None and tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _block_names(yaml: Mapping[str, Any]) -> list[str]:
    return [check_row(row)[2] for row in (*yaml["backbone"], *yaml["head"])]


def _conversions(giver: str | None, taker: str) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """Returns how a row's tensors are to be rearranged, by key; None where they mean something else."""
    if giver is None:
        return None
    ours = [name in BLOCKS and BLOCKS[name].cls.__module__.startswith("models.") for name in (giver, taker)]
    return CONVERSIONS.get((giver, taker)) if giver != taker and all(ours) else {}


def _parts_told(keys: Sequence[str], came: set[str], conversions: Mapping[str, Any] | None, prefix: str) -> str:
    """Says which parts of a row came over, of those that its keys name."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        parts.setdefault(key.removeprefix(prefix).partition(".")[0], []).append(key)
    took, left = [], []
    for part, own in parts.items():
        count = sum(key in came for key in own)
        turned = any(prefix + key in own for key in conversions or ())
        if count:
            took.append(f"{'' if count == len(own) else 'a part of '}{part}{' (input halves exchanged)' * turned}")
        else:
            left.append(part)
    return ", ".join(took or ["nothing"]) + (f", not {', '.join(left)}" if took and left else "")


def read_weights(weights: str | Path, prefer_ema: bool = True) -> Weights:
    """Reads a weights file: a checkpoint of ours, or an original YOLOv5 one through the allow-list.

    Args:
        weights: file, or a released name such as `yolov5s.pt`.
        prefer_ema: take the moving average of the weights where the file has it beside them.

    Raises:
        UserError: missing, empty, text, cut short, legacy; holds classes that are not allowed (they are named); or is
            not a detector.
    """
    (path,) = find_weights(weights)
    if path.is_dir():
        raise UserError(f"--weights {path}: is a folder, a checkpoint (.pt) is expected here.")
    try:
        checkpoint = load_checkpoint(path)
    except ForeignPickle as foreign:
        return _read_original(path, foreign, prefer_ema)
    try:
        state_dict = (checkpoint["ema"] if prefer_ema else None) or checkpoint["model"]
        return Weights(
            yaml=dict(checkpoint["yaml"]),
            state_dict={str(key): _float(tensor) for key, tensor in state_dict.items()},
            names={int(number): str(name) for number, name in checkpoint["names"].items()},
            nc=int(checkpoint["nc"]),
            stride=[int(pixels) for pixels in checkpoint["stride"]],
            source="ours",
            meta={key: checkpoint.get(key) for key in ("epoch", "date", "opt", "hyp", "data")},
            path=path,
        )
    except KeyError as error:
        raise UserError(f"{path}: the checkpoint has no {error}.") from error
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error}).") from error


def build_for_training(
    cfg: str | Mapping[str, Any],
    names: Mapping[int, str],
    seed: int = 0,
    anchors: float | None = None,
    source: str | Path = "",
    verbose: bool = True,
) -> Model:
    """Builds the architecture of `cfg` with initial weights; on the CPU, float32.

    Args:
        cfg: model YAML; or the content of one, as checkpoints hold it.
        names: the data's class names by number.
        seed: of the initial weights; no other generator is touched.
        anchors: anchors per level, in place of the YAML's (the hyperparameter of that name).
        source: the file that `cfg` as a mapping is from, for messages.
        verbose: log the table of layers.

    Raises:
        UserError: a file is missing or unsound.
    """
    if not isinstance(cfg, Mapping):
        cfg = find_file(cfg, (".yaml", ".yml"), "--cfg")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = Model(cfg, nc=len(names), anchors=anchors, verbose=verbose)
        except UserError as error:
            if not source:
                raise
            raise UserError(f"{source}: {error}") from error
    model.names = dict(names)
    return model


# Original YOLOv5 files: what their pickles may name, and what is made in place of it.
MAX_PARTS = 100_000  # modules, or items of metadata, in one file; far beyond any model, it stops files made to explode
MAX_DEPTH = 50
NUMPY_SCALAR_CODES = {"b1": "?", "f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q"}  # to `struct`'s
DERIVED_BUFFERS = {"anchor_grid", "total_ops", "total_params"}  # computed anew, or left by a profiler
UNUSED_CHILD = ("VoVGSCSP", "res")  # the published block constructs this convolution and never calls it
ACTIVATION_ARGUMENTS = {
    "ELU": ("alpha",),
    "Hardtanh": ("min_val", "max_val"),
    "LeakyReLU": ("negative_slope",),
    "PReLU": ("num_parameters",),
    "Softplus": ("beta", "threshold"),
}


class PickleStub:
    """Stands in for a pickled object: keeps its attributes, does nothing. Subclasses carry the name it was saved by."""

    def __new__(cls, *_: Any) -> PickleStub:
        """Takes any arguments that the pickle holds; they are of no use."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keeps a state that is a dict of attributes."""
        if isinstance(state, dict):
            self.__dict__.update(state)


class NumpyStub(PickleStub):
    """Stands in for numpy's arrays, which nothing reads, and types, of which the first argument tells the kind."""

    def __new__(cls, *args: Any) -> NumpyStub:
        """Keeps the arguments."""
        stub = object.__new__(cls)
        stub.args = args
        return stub


def numpy_number(kind: NumpyStub, raw: bytes) -> int | float | bool | None:
    """Returns the number that a pickled numpy scalar holds, None for kinds that checkpoints do not use."""
    code = NUMPY_SCALAR_CODES.get(kind.args[0] if kind.args else None)
    return None if code is None else struct.unpack(f"<{code}", raw)[0]


def path_text(*parts: str) -> str:
    """Returns a pickled path as text: the class that was saved need not exist on this system."""
    return re.sub("^//", "/", "/".join(parts))


STUBS: dict[str, Callable[[str], Any]] = {  # pattern of allowed names -> what makes a stub for one
    r"(models\.(common|yolo|experimental)|torch\.nn\.modules\.\w+)\.\w+": lambda name: type(
        name.rpartition(".")[2], (PickleStub,), {"__module__": name.rpartition(".")[0]}
    ),
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path": lambda name: path_text,
    r"numpy\.(core|_core)\.multiarray\.scalar": lambda name: numpy_number,
    r"numpy\.(ndarray|dtype|(core|_core)\.multiarray\._reconstruct)": lambda name: type(name, (NumpyStub,), {}),
}


def find_stub(name: str) -> Callable[..., Any] | None:
    """Returns what to make in place of the pickled class or function `name`; None for one that is not allowed."""
    return next((make(name) for pattern, make in STUBS.items() if re.fullmatch(pattern, name)), None)


def _read_original(path: Path, foreign: ForeignPickle, prefer_ema: bool) -> Weights:
    """Reads an original YOLOv5 file, whose foreign classes and functions have been listed."""
    stubs = {name: find_stub(name) for name in foreign.names}
    refused = [name for name, stub in stubs.items() if stub is None]
    if refused:
        raise ForeignPickle(path, refused) from foreign
    content = read_archive(path, stubs)
    if isinstance(content, PickleStub):  # a bare module
        content = {"model": content}
    model = isinstance(content, dict) and ((content.get("ema") if prefer_ema else None) or content.get("model"))
    layers = list(_children(_children(model).get("model")).values())
    if not layers or type(layers[-1]).__name__ != "Detect" or not isinstance(getattr(model, "yaml", None), dict):
        raise UserError(f"{path}: is not a YOLOv5 detector (a models.yolo model that ends in Detect).")
    try:
        return _collect(path, content, model, layers[-1])
    except (AttributeError, LookupError, OverflowError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise UserError(f"{path}: the YOLOv5 model in it is incomplete ({error}).") from error


def _collect(path: Path, content: Mapping[str, Any], model: PickleStub, detect: PickleStub) -> Weights:
    """Gathers what a pickled detector says."""
    modules = dict(islice(_walk(model), MAX_PARTS))
    if len(modules) == MAX_PARTS:
        raise ValueError("it has too many modules")
    state_dict, unused = _state_dict(modules)
    if unused:
        LOGGER.info(f"{path}: left out {unused} tensors of 'res' convolutions, which VoVGSCSP never calls")
    stride = [int(pixels) for pixels in model.stride]
    anchors = next(tensor for key, tensor in state_dict.items() if key.endswith(".anchors"))  # grid units
    nc = int(detect.nc)
    own = {"nc": nc, "anchors": (anchors * torch.tensor(stride).view(-1, 1, 1)).flatten(1).tolist()}
    activation = _activation(modules)
    own |= {} if activation is None else {"activation": activation}
    meta = {key: _plain(content.get(key)) for key in ("epoch", "date", "opt", "hyp")}
    meta["hyp"] = meta["hyp"] or _plain(getattr(model, "hyp", None))
    meta["data"] = meta["opt"].get("data") if isinstance(meta["opt"], dict) else None
    names = _plain(getattr(model, "names", None)) or {}
    pairs = names.items() if isinstance(names, dict) else enumerate(names)  # a list to 6.1, a dict from 6.2
    named = {int(number): str(name) for number, name in pairs if int(number) < nc}
    if len(named) != nc:
        LOGGER.warning(f"WARNING: {path}: {len(named)} names for {nc} classes; the others are shown by number")
    names = {number: named.get(number, str(number)) for number in range(nc)}
    return Weights({**_plain(model.yaml), **own}, state_dict, names, nc, stride, "yolov5", meta, path)


def _children(stub: Any) -> dict[str, Any]:
    """Returns a pickled module's children by name."""
    children = getattr(stub, "_modules", None) if isinstance(stub, PickleStub) else None
    return children if isinstance(children, dict) else {}


def _walk(stub: PickleStub, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, PickleStub]]:
    """Yields (dotted path, module) for a pickled module and all below it."""
    if depth > MAX_DEPTH:
        raise ValueError("it has too many modules")
    yield prefix, stub
    for name, child in _children(stub).items():
        if isinstance(child, PickleStub):
            yield from _walk(child, f"{prefix}.{name}" if prefix else name, depth + 1)


def _state_dict(modules: Mapping[str, PickleStub]) -> tuple[dict[str, Tensor], int]:
    """Returns the tensors of the modules by key, and how many of convolutions that are never called were left out."""
    block, child = UNUSED_CHILD
    unused = tuple(
        f"{path}.{child}."
        for path, module in modules.items()
        if type(module).__name__.startswith(block) and child in _children(module)
    )
    state_dict, left_out = {}, 0
    for path, module in modules.items():
        tensors = {**getattr(module, "_parameters", {}), **getattr(module, "_buffers", {})}
        temporary = getattr(module, "_non_persistent_buffers_set", set()) | DERIVED_BUFFERS
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None and name not in temporary}
        if f"{path}.".startswith(unused):
            left_out += len(kept)
        else:
            state_dict.update({f"{path}.{name}": _float(tensor) for name, tensor in kept.items()})
    return state_dict, left_out


def _float(tensor: Tensor) -> Tensor:
    """Returns a tensor without gradient, in float32 if it is a floating one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a {type(tensor).__name__} stands where a tensor is expected")
    check_tensor(tensor)
    return tensor.detach().float() if tensor.is_floating_point() else tensor.detach()


def _activation(modules: Mapping[str, PickleStub]) -> str | dict[str, str] | None:
    """Returns the `activation` key that a pickled model's blocks amount to; None when all have SiLU or none.

    Original model YAMLs do not say it: whoever trained with another one changed the program.
    """
    by_block: dict[str, set[str]] = {}
    for module in modules.values():
        act = _children(module).get("act")
        if act is not None and type(act).__module__ == "torch.nn.modules.activation":
            name = type(act).__name__
            arguments = ", ".join(f"{key}={getattr(act, key)!r}" for key in ACTIVATION_ARGUMENTS.get(name, ()))
            by_block.setdefault(type(module).__name__, set()).add(f"nn.{name}({arguments})")
    texts = set().union(*by_block.values())
    if len(texts) < 2:
        return next((text for text in texts if text != "nn.SiLU()"), None)
    mixed = [block for block, own in by_block.items() if len(own) > 1]
    if mixed:
        raise ValueError(f"blocks {mixed} have several activations, which a model YAML cannot say")
    return {block: own.pop() for block, own in by_block.items()}


def _plain(value: Any) -> Any:
    """Returns a copy of pickled metadata as numbers, texts, lists and dicts; None for what is neither."""
    parts = count()

    def copied(item: Any, depth: int) -> Any:
        if next(parts) >= MAX_PARTS or depth > MAX_DEPTH:
            raise ValueError("its metadata is too large")
        if isinstance(item, Mapping):
            return {key: copied(entry, depth + 1) for key, entry in item.items() if isinstance(key, (str, int, float))}
        if isinstance(item, (list, tuple)):
            return [copied(entry, depth + 1) for entry in item]
        return item if isinstance(item, (str, int, float)) else None

    return copied(value, 0)
