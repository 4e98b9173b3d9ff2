"""Checkpoint files: plain data, read without running anything, written all or nothing.

A checkpoint is a dict of tensors, numbers, strings, None, lists, tuples and dicts, in torch's zip format. Keys: format,
format_version, epoch (the last finished one, -1 once stripped), best_fitness, model (state dict, float32; the float16
EMA once stripped), ema, updates, optimizer, scaler, schedule, stopper, generators, spent, dataset (None once stripped),
yaml, names, nc, stride, hyp, opt, precision, data, versions, date; with `--teacher` also teacher, a digest of its
weights. Building a model from one, and what original YOLOv5 files hold, is `models.load`'s concern.
"""

from __future__ import annotations

import pickle
import shutil
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_write, native_path

FORMAT, FORMAT_VERSION = "yolov5-slim", 1
TRAINING_STATE = tuple("best_fitness ema updates optimizer scaler schedule stopper generators spent dataset".split())

# Far beyond any checkpoint: these stop files that are made to explode when they are read, copied or shown.
MAX_RATIO = 8  # unpacked to packed; torch does not compress
RATIO_FROM_BYTES = 64 << 20  # below this no ratio is a bomb
MAX_PARTS = 100_000  # items of dicts and lists, shared ones counted each time
MAX_DEPTH = 64
MAX_TEXT = 64 << 20  # characters and digits

FULL_DISK_BYTES = 1 << 20  # a disk with less room than this has no room for a checkpoint

_NAMES_LOCK = threading.Lock()  # of the names that torch lets through, which are the whole process's

_FOLDER_BIT = 0x10  # of a zip member's attributes; torch writes no folders

# What torch's readers raise on damaged or foreign content.
_DAMAGE = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(RecursionError, MemoryError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


class ForeignPickle(UserError):
    """The file holds pickled classes or functions, so it is no checkpoint of this program's. Nothing of it was run.

    Attributes:
        names: the full names of those classes and functions, sorted.
    """

    def __init__(self, path: str | Path, names: list[str]):
        """Takes the file and the names found in it."""
        super().__init__(
            f"{path}: refused, for it holds pickled classes or functions that no checkpoint needs: {', '.join(names)}."
        )
        self.names = names


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any], copies: Iterable[str | Path] = ()) -> None:
    """Writes a checkpoint; a former file of that name stays until the new one is complete.

    Numpy scalars become numbers and paths become strings; the format's name and version are added.

    Args:
        path: the file.
        checkpoint: its content.
        copies: files of the same content, which are complete, one after the other, before `path` is.

    Raises:
        UserError: a file cannot be written (disk full, folder not writable).
        TypeError: something in it is not plain data; says where.
    """
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **plain_data(checkpoint)}
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch's zip writer reports a full disk, in words of its own
            full = shutil.disk_usage(temporary.parent).free < FULL_DISK_BYTES
            raise OSError(None, "the disk is full" if full else str(error).splitlines()[0]) from error
        for copy in copies:
            with atomic_write(copy) as temporary_copy:
                shutil.copyfile(temporary, temporary_copy)


def plain_data(value: Any, where: str = "checkpoint") -> Any:
    """Returns a copy that consists of tensors, numbers, strings, None, lists, tuples and dicts alone.

    Raises:
        TypeError: something else is in it; `where` and the keys on the way name the place.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (str, Path)):
        return str(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain_data(key, where): plain_data(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain_data(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds plain data only")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that `save_checkpoint` wrote, with all tensors on the CPU.

    Raises:
        ForeignPickle: the file holds pickled classes, as original YOLOv5 checkpoints do.
        UserError: no such file, empty, cut short, not a checkpoint, or one of a later version of this program.
    """
    content = read_archive(path)
    _check_content(path, content)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: holds tensors or other plain data, but is no checkpoint of this program's.")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: is of checkpoint format {content.get('format_version')}, this program reads {FORMAT_VERSION}: "
            "update it."
        )
    return content


def _check_content(path: str | Path, content: Any) -> None:
    """Refuses content that is small in the file and without bounds once it is walked through."""
    parts = characters = 0
    pending = [(content, 0)]
    while pending:
        item, depth = pending.pop()
        parts += 1
        characters += len(item) if isinstance(item, str) else 0
        if parts > MAX_PARTS or depth > MAX_DEPTH or characters > MAX_TEXT:
            raise UserError(f"{path}: refused, for its content is nested or repeated beyond all measure.")
        if isinstance(item, Tensor):
            try:
                check_tensor(item)
            except ValueError as error:
                raise UserError(f"{path}: refused, for {error}.") from error
        elif isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, (list, tuple, set)):
            pending += [(part, depth + 1) for part in item]


def check_tensor(tensor: Tensor) -> None:
    """Refuses a tensor, of any shape, whose values are not all in the file, or are no numbers.

    Raises:
        ValueError: it is of another kind than plain memory on the CPU, repeats what is stored to become larger, or
            holds NaN: a single one makes every output of a model NaN, which looks like an image without objects.
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"the values of a tensor ({kind}) are not in it")
    if tensor.is_floating_point() and tensor.float().isnan().any():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} holds NaN, as those of a run that diverged do")


def strip_checkpoint(path: str | Path) -> None:
    """Reduces a checkpoint, in place, to what inference needs: the EMA (or model) in float16, without training state.

    Tensors with values that float16 cannot hold stay float32.

    Raises:
        UserError: not a checkpoint, or the file cannot be written.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint["ema"] or checkpoint["model"]
    checkpoint["model"] = {key: _halved(tensor) for key, tensor in weights.items()}
    checkpoint.update(dict.fromkeys(TRAINING_STATE), epoch=-1)
    save_checkpoint(path, checkpoint)


def _halved(tensor: Tensor) -> Tensor:
    """Returns a floating tensor in float16 unless a value would overflow; others as they are."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return tensor if (half.isinf() & ~tensor.isinf()).any() else half


def read_archive(path: str | Path, stubs: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Reads what a file of torch's zip format holds, by torch's reader for plain data; nothing in it is run.

    Args:
        path: the file.
        stubs: what to make in place of a pickled class or function, by full name; all others are refused.

    Raises:
        ForeignPickle: classes or functions without a stub.
        UserError: no such file, empty, text, of another format, cut short or damaged.
    """
    path, stubs = Path(path), stubs or {}
    _check_container(path)
    try:
        with _NAMES_LOCK:
            foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(stubs)
            if foreign:
                raise ForeignPickle(path, sorted(foreign))
            with torch.serialization.safe_globals([(stub, name) for name, stub in stubs.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        message = f"{path}: cannot be read as a checkpoint; damaged or of another kind ({_reason(error)})."
        raise UserError(message) from error


def _check_container(path: Path) -> None:
    """Refuses what is no archive of torch's, saying what it looks like instead, or a TorchScript program."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
        is_zip = zipfile.is_zipfile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except zipfile.BadZipFile as error:  # of a damaged end, by which an archive is known
        raise UserError(f"{path}: is a damaged archive ({error}): download or copy it again.") from error
    if is_zip:
        _check_members(path)
        return
    if size == 0:
        raise UserError(f"{path}: is empty (0 bytes).")
    if head.startswith(b"PK"):
        raise UserError(f"{path}: is cut short ({size} bytes): download or copy it again.")
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        raise UserError(
            f"{path}: is in the format of torch before 1.6, which could run code and is not opened. Where you trust "
            "it, load it with an old torch and save it again."
        )
    if not set(head) & (set(range(32)) - set(b"\t\n\f\r")):  # control characters, which no text has
        text = head[:40].decode(errors="replace").strip().splitlines() or [""]
        raise UserError(f"{path}: is a text file ('{text[0]}...'), not a checkpoint.")
    raise UserError(f"{path}: is not a checkpoint (unknown format, {size} bytes).")


def _check_members(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [name.partition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in inner:
            raise UserError(f"{path}: is a TorchScript program; give it the suffix .torchscript to run it as such.")
        if "data.pkl" not in inner:
            raise UserError(f"{path}: is a zip archive, but not a checkpoint.")
        open_records(path)
    except _DAMAGE as error:
        raise UserError(f"{path}: is a damaged archive ({_reason(error)}): download or copy it again.") from error


def open_records(path: Path) -> torch._C.PyTorchFileReader:
    """Opens an archive of torch's, whose checksums are right, by torch's own reader, which takes members by name.

    Other readers may see other members in a file that is made to deceive them: torch's does not tell apart capital and
    small letters, compares no checksums, and leaves the memory meant for a member marked as a folder as it was found.

    Raises:
        UserError: it unpacks to many times its size.
        RuntimeError: no such archive, or a damaged one.
        ValueError: a name stands twice, Python's reader sees other members, or a member has changed.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        sizes = {info.filename.partition("/")[2]: info.file_size for info in entries if not info.is_dir()}
        total, packed = sum(sizes.values()), path.stat().st_size
        if total > max(RATIO_FROM_BYTES, packed * MAX_RATIO):
            raise UserError(f"{path}: refused, for its {packed} bytes unpack to {total}, which torch's own never do.")
        named = isinstance(native_path(path), str)  # torch takes no other names, but files opened by Python
        reader = torch._C.PyTorchFileReader(str(path) if named else open(path, "rb"))  # noqa: SIM115
        names = [name for name in reader.get_all_records() if not name.endswith("/")]
        if len({name.lower() for name in names}) != len(entries) or set(names) != set(sizes):
            raise ValueError("a member stands twice, or outside the archive's one folder")
        try:
            changed = next((info.filename for info in entries if info.external_attr & _FOLDER_BIT), archive.testzip())
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if changed:
            raise ValueError(f"its part {changed} has changed")
    return reader


def _reason(error: Exception) -> str:
    """Returns the first line of what an error says; torch's advice to let the file run code is not passed on."""
    if "weights only" in str(error).lower():
        return "it holds more than tensors and plain data"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
