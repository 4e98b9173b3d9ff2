"""What the commands share: running them, echoing and checking their options, calling them from Python.

Free of torch, so that every command's `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.checks import UserError, did_you_mean
from utils.log import LOGGER, colorstr, setup_logging

EXIT_MISTAKE = 1
EXIT_INTERRUPTED = 130


class ReportedError(UserError):
    """A run that did all it could and named what failed on the way: nothing more is printed, the status is 1."""


def run_command(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser) -> int:
    """Parses the command line, runs `main` and returns the exit status.

    0 on success, 1 after a mistake of the user's (its message alone is printed), 130 after Ctrl-C; argparse itself
    exits with 2 for an unknown option.
    """
    options = parser.parse_args()
    setup_logging()
    try:
        main(options)
    except ReportedError:
        return EXIT_MISTAKE
    except UserError as error:
        LOGGER.error(f"{parser.prog}: error: {error}")
        return EXIT_MISTAKE
    except KeyboardInterrupt as error:
        LOGGER.error(f"\n{parser.prog}: interrupted. {error}".rstrip())
        return EXIT_INTERRUPTED
    finally:
        sys.stdout.flush()
    return 0


def options_from(parser: argparse.ArgumentParser, keywords: Mapping[str, Any]) -> argparse.Namespace:
    """Returns the parser's defaults with `keywords` in place of their namesakes, for calls from Python.

    Raises:
        UserError: a keyword is not an option.
    """
    options = parser.parse_args([])
    for name, value in keywords.items():
        if name not in vars(options):
            raise UserError(f"{parser.prog}: unknown option '{name}'.{did_you_mean(name, vars(options))}")
        setattr(options, name, value)
    return options


def echo_options(script: str, options: argparse.Namespace) -> None:
    """Logs `script: name=value, ...` in the options' order."""
    LOGGER.info(colorstr(f"{script}: ") + ", ".join(f"{name}={value}" for name, value in vars(options).items()))


def number(kind: type, minimum: float | None = None, maximum: float | None = None) -> Callable[[str], Any]:
    """Returns an argparse type: an `int` or a finite `float` between the bounds, both included."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is above {maximum}")
        return value

    parse.__name__ = kind.__name__
    return parse


def newest_weights(root: Path) -> Path:
    """Returns the newest `runs/train/*/weights/best.pt` below `root`, what val, detect and export use by default.

    Raises:
        UserError: nothing has been trained yet.
    """
    found = sorted((root / "runs" / "train").glob("*/weights/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no --weights given and none trained yet below {root / 'runs' / 'train'}: run train.py first.")
    return found[-1]
