"""Errors meant for people: `UserError`, suggestions for misspelt names, and what a machine has run out of, in words.

Libraries tell of exhausted memory, processes and disks in errors of their own kinds; they are recognised by their
type's name and their text, so that nothing is imported for it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

LOGGER = logging.getLogger("yolov5")
MIN_GRID_STRIDE = 32
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no console or file takes them as text
MAX_IMAGE_SIDE_PX = 16384  # a mosaic of this side takes 3 GiB; --tile is for larger images


class UserError(Exception):
    """A mistake that the user can fix: its text says what is wrong, where, and what to do.

    Scripts print the text alone and exit with status 1 (see `utils.cli.run_command`).
    """


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'a' or 'b'?" with up to three of `options` that resemble `name`, else an empty string."""
    by_lower = {str(option).lower(): str(option) for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f"'{by_lower[key]}'" for key in close) + "?"


def shown(value: Any, longest: int = 80) -> str:
    """Returns a value of a file for messages: in one line of at most `longest` characters."""
    return (value if isinstance(value, str) and not UNPRINTABLE.search(value) else repr(value))[:longest]


def printable(text: Any) -> str:
    """Returns a text with U+FFFD in place of what no console, file or font takes, such as bytes that are not UTF-8."""
    return UNPRINTABLE.sub("\ufffd", str(text))


def make_divisible(x: float, divisor: Any) -> int:
    """Returns the smallest multiple of `divisor` (of a tensor, its largest value) that is not below `x`."""
    divisor = int(divisor.max()) if hasattr(divisor, "max") else divisor
    return math.ceil(x / divisor) * divisor


def grid_stride(strides: Iterable[float]) -> int:
    """Returns what image sides must be multiples of: the largest of a model's strides, at least 32.

    A model may detect on fine levels alone while its backbone halves the image five times.
    """
    return max([MIN_GRID_STRIDE, *(int(stride) for stride in strides)])


def check_img_size(imgsz: int | Sequence[int], s: Any = 32, floor: int = 0) -> int | list[int]:
    """Rounds image sides up to multiples of the model's stride and says so when that changes them.

    Args:
        imgsz: one side for squares, or (height, width), in pixels.
        s: the model's largest stride, a number or a tensor.
        floor: the smallest side allowed, in pixels.

    Returns:
        An int for an int, a list for a sequence.

    Raises:
        UserError: a side is not positive, or beyond MAX_IMAGE_SIDE_PX.
    """
    sides, stride = [imgsz] if isinstance(imgsz, int) else list(imgsz), int(s)
    if any(side < 1 for side in sides):
        raise UserError(f"--img-size {imgsz}: image sides must be at least 1 pixel.")
    if any(side > MAX_IMAGE_SIDE_PX for side in sides):
        raise UserError(
            f"--img-size {imgsz}: image sides must be at most {MAX_IMAGE_SIDE_PX} pixels; larger images are scaled "
            "down, or cut into tiles with --tile."
        )
    rounded = [max(make_divisible(side, stride), floor) for side in sides]
    result = rounded[0] if isinstance(imgsz, int) else rounded
    if rounded != sides:
        LOGGER.warning(
            f"WARNING: --img-size {imgsz} must be a multiple of the model's stride {stride}"
            f"{f' and at least {floor}' if floor else ''}: using {result}"
        )
    return result


class ResourceError(NamedTuple):
    """A way to run out of something."""

    signs: str  # what an error of this kind has in its type's name and text
    what: str
    remedy: str  # beside smaller options


RESOURCE_ERRORS = (  # the first that fits holds
    ResourceError(
        r"Bus error|out of shared memory|unable to (open|write to|resize) (file|shared memory)|/dev/shm",
        "out of shared memory, through which a loader's processes hand over their batches",
        "give it more (docker run --shm-size 8g), or use --workers 0",
    ),
    ResourceError(
        r"(?s:DataLoader worker.*(killed by signal|exited unexpectedly))|^BrokenProcessPool",
        "a worker process was killed, as systems do when memory runs out",
        "use fewer --workers and no --cache ram",
    ),
    ResourceError(r"ancdata|Too many open files", "too many files are open", "use fewer --workers"),
    ResourceError(
        r"(CUDA|HIP|MPS|CUBLAS|CUDNN|cuDNN).*(out of memory|ALLOC_FAILED)|^(Cuda)?OutOfMemoryError",
        "out of GPU memory",
        "stop other programs that use the GPU",
    ),
    ResourceError(
        r"MemoryError|DefaultCPUAllocator|bad_alloc|Insufficient memory|Cannot allocate memory",
        "out of memory",
        "stop other programs",
    ),
)
DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE")
    if hasattr(errno, name)
}
_AMOUNT = re.compile(r"(?:[Tt]ried|[Tt]rying|[Uu]nable) to allocate ([\d.]+) (\w+)")


@contextlib.contextmanager
def explain_resource_errors(sizes: Mapping[str, Any]) -> Iterator[None]:
    """Turns running out of something, inside, or a disk that fails, into a message.

    Args:
        sizes: the options that more of it is needed with, and their values, such as {"--batch-size": 16}; the first
            are the ones to lower first.

    Raises:
        UserError: something has run out, or a file cannot be written or read.
        KeyboardInterrupt: the error arose while this was being answered.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        before = error.__context__
        while before is not None:  # what breaks while Ctrl-C or SIGTERM is being answered is no news
            if isinstance(before, KeyboardInterrupt):
                raise before from error
            before = before.__context__
        words = f"{type(error).__name__}: {error}"
        kind = next((kind for kind in RESOURCE_ERRORS if re.search(kind.signs, words)), None)
        if kind:
            amount = _AMOUNT.search(words)
            number, unit = amount.groups() if amount else ("", "")
            number, unit = (f"{int(number) / 2**20:.0f}", "MiB") if unit == "bytes" else (number, unit)
            asked = f" ({number} {unit} more were asked for)" if amount else ""
            given = {name: value for name, value in sizes.items() if value is not None}
            shown = {name: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else v for name, v in given.items()}
            here = ", ".join(f"{name} {value}" for name, value in shown.items())
            lower = " or ".join(name for name in sizes if name != "--workers")
            remedies = f"lower {lower}, or {kind.remedy}." if lower else f"{kind.remedy}."
            message = f"{kind.what}{asked}{here and f', with {here}'}. {remedies[0].upper()}{remedies[1:]}"
        elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
            message = f"{error.filename or 'a file'}: cannot be used ({error.strerror}). Free the disk or allow access."
        else:
            raise
        raise UserError(message) from error


# Where a version of Linux's control groups tells of memory: its folder, the files of the limit and of what is used, and
# the keys of memory.stat for caches, which the system takes back when it needs them.
_CONTROL_GROUPS = {
    1: (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_active_file", "total_inactive_file"),
    ),
    2: ("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
}


def memory_left(root: str | Path = "/") -> int | None:
    """Returns how many bytes of memory this process may still take: the machine's, or its container's if that is less.

    Args:
        root: the file system that holds `proc` and `sys`.

    Returns:
        Where the system does not tell what is left, what it has in all; None where it tells neither (Windows).
    """
    root = Path(root)
    found = re.search(r"^MemAvailable: +(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    left = [int(found[1]) * 1024] if found else []
    for line in _text(root / "proc/self/cgroup").splitlines():
        version, controllers, path = line.split(":", 2)
        if version != "0" and "memory" not in controllers.split(","):
            continue
        mount, limit_file, used_file, caches = _CONTROL_GROUPS[2 if version == "0" else 1]
        # A container may see its own group as the outermost one, but its path as the host does: folders not there.
        group = root / mount / path.lstrip("/")
        for folder in (folder for folder in (group, *group.parents) if folder.is_relative_to(root / mount)):
            limit, used = _text(folder / limit_file).strip(), _text(folder / used_file).strip()
            if limit.isdecimal() and used.isdecimal():  # not "max"
                rows = (line.split() for line in _text(folder / "memory.stat").splitlines())
                left.append(int(limit) - int(used) + sum(int(value) for name, value in rows if name in caches))
    if left:
        return max(min(left), 0)
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _text(path: Path) -> str:
    """Returns a system's file, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
