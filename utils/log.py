"""The program's logger, colours on a terminal, and progress bars.

Everything goes to stderr, as in YOLOv5; nothing is configured before a script calls `setup_logging`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LOGGER = logging.getLogger("yolov5")

_COLORS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_STYLES = {
    **{color: 30 + number for number, color in enumerate(_COLORS)},
    **{f"bright_{color}": 90 + number for number, color in enumerate(_COLORS)},
    **{"end": 0, "bold": 1, "underline": 4},
}
# What a name from a file must not bring to a terminal: any control but lines, tabs and these styles, and no text.
_UNSAFE = re.compile(
    rf"\033(?!\[({'|'.join(map(str, _STYLES.values()))})m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff]"
)


class _Formatter(logging.Formatter):
    """Shows the message alone, U+FFFD in place of what a terminal cannot show or would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return _UNSAFE.sub("\ufffd", super().format(record))


def setup_logging(rank: int | None = None) -> None:
    """Sends the logger's plain messages to stderr: INFO on the main process, WARNING on other ranks.

    Unless given, the rank is what the environment variable `RANK` says. `YOLOv5_VERBOSE` set to anything but `true`
    silences INFO as well.
    """
    rank = int(os.environ.get("RANK", -1)) if rank is None else rank
    verbose = os.environ.get("YOLOv5_VERBOSE", "true").lower() == "true" and rank in (-1, 0)
    if not LOGGER.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter("%(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if verbose else logging.WARNING)


@contextlib.contextmanager
def logging_from(level: int) -> Iterator[None]:
    """Leaves out meanwhile what is less severe than `level`."""
    before = LOGGER.level
    LOGGER.setLevel(max(before, level))
    try:
        yield
    finally:
        LOGGER.setLevel(before)


def colorstr(*input: str) -> str:
    """Returns the last text in the styles before it, or in blue and bold: `colorstr("red", "underline", "text")`.

    Where stderr is not a terminal, unchanged.
    """
    *styles, text = input
    if not on_terminal():
        return str(text)
    codes = "".join(f"\033[{_STYLES[style]}m" for style in styles or ("blue", "bold"))
    return f"{codes}{text}\033[0m"


def on_terminal() -> bool:
    """Tells whether stderr is a terminal; where there is none (pythonw, services), Python has None in its place."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(
    iterable: Iterable[Any] | None = None,
    total: int | None = None,
    desc: str = "",
    leave: bool = True,
    disable: bool = False,
    unit: str = "it",
) -> Any:
    """Returns a tqdm bar on stderr; silent when INFO is silent, and rarely redrawn where stderr is not a terminal."""
    from tqdm import tqdm

    silent = sys.stderr is None or not LOGGER.isEnabledFor(logging.INFO)
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        leave=leave,
        disable=disable or silent,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.1 if on_terminal() else 10.0,
        bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    )
