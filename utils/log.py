"""The program's logger, colours on a terminal, and progress bars.

Everything goes to stderr, as in YOLOv5; nothing is configured before a script calls `setup_logging`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

LOGGER = logging.getLogger("yolov5")

_ANSI = {"blue": "\033[34m", "green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m", "bold": "\033[1m"}
_ANSI_END = "\033[0m"
# What a name from a file must not bring to a terminal: any control but lines, tabs and the styles above, and no text.
_STYLES = "|".join(re.escape(code[1:]) for code in (*_ANSI.values(), _ANSI_END))
_UNSAFE = re.compile(rf"\033(?!{_STYLES})|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff]")


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


def colorstr(text: str, *styles: str) -> str:
    """Returns `text` in ANSI `styles` (default blue and bold) when stderr is a terminal, else unchanged."""
    if not on_terminal():
        return text
    return "".join(_ANSI[style] for style in styles or ("blue", "bold")) + text + _ANSI_END


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
