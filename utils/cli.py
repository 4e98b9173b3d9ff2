"""What the commands share: running them, echoing and checking their options, calling them from Python.

Free of torch, so that every command's `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import numbers
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError, did_you_mean
from utils.files import ROOT
from utils.log import LOGGER, colorstr, setup_logging
from utils.process import Terminated, sigterm_raised

EXIT_MISTAKE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 128 + signal.SIGTERM
OWN_PACKAGES = ("models", "service", "utils")
LARGEST_INT = 2**31 - 1  # what an option takes that names no maximum; libraries overflow beyond


class CommandParser(argparse.ArgumentParser):
    """Tells a mistake on the command line in one line, without the page of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong, names that resemble an unknown option, and where all options are listed; exits with 2.

        Args:
            message: argparse's.
        """
        _, _, unknown = message.partition("unrecognized arguments: ")
        options = [name for name in self._option_string_actions if name.startswith("--")]
        hint = did_you_mean(unknown.split("=")[0].split()[0], options) if unknown.strip() else ""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}.{hint} See {self.prog} --help.\n")


class ReportedError(UserError):
    """A run that did all it could and named what failed on the way: nothing more is printed, the status is 1."""


def run_command(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser) -> int:
    """Parses the command line, runs `main` and returns the exit status.

    0 on success, 1 after a mistake of the user's or where a library is missing (the message alone is printed), 130
    after Ctrl-C, 143 after SIGTERM; argparse itself exits with 2 for an unknown option.
    """
    _open_streams()
    options = parser.parse_args()
    setup_logging()
    try:
        with sigterm_raised():
            main(options)
    except ReportedError:
        return EXIT_MISTAKE
    except UserError as error:
        LOGGER.error(f"{parser.prog}: error: {error}")
        return EXIT_MISTAKE
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in OWN_PACKAGES:
            raise
        LOGGER.error(f"{parser.prog}: error: needs {package}, which is not installed: pip install -r requirements.txt")
        return EXIT_MISTAKE
    except Terminated as error:
        LOGGER.error(f"\n{parser.prog}: ended by SIGTERM. {error}".rstrip())
        return EXIT_TERMINATED
    except KeyboardInterrupt as error:
        LOGGER.error(f"\n{parser.prog}: interrupted. {error}".rstrip())
        return EXIT_INTERRUPTED
    finally:
        sys.stdout.flush()
    return 0


def _open_streams() -> None:
    """Puts the null device in place of standard streams that are closed, as services and windowed programs have them.

    Libraries write to them without asking. And each takes the lowest number that is free, its own: else the next file
    that is opened would get it, and with it what native code prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def with_hint(advice: Callable[[], str]) -> Iterator[None]:
    """Adds `advice` to what ends the body, a mistake, Ctrl-C or SIGTERM, unless it is in there already."""
    try:
        yield
    except ReportedError:
        raise
    except (UserError, KeyboardInterrupt) as stop:
        if advice() in str(stop):
            raise
        kind = type(stop) if isinstance(stop, KeyboardInterrupt) else UserError
        raise kind(f"{stop} {advice()}".strip()) from stop


def options_from(parser: argparse.ArgumentParser, keywords: Mapping[str, Any]) -> argparse.Namespace:
    """Returns the parser's defaults with `keywords` in place of their namesakes, for calls from Python.

    None stands for the default. Paths, numbers and devices are returned as the text that the command line would have
    brought, where it brings text. What takes several values there may be given one here, or several in a list or tuple;
    it is a list in what is returned. Numbers and choices are checked as they are there.

    Raises:
        UserError: a keyword is not an option, or its value is none that the option takes.
    """
    options = parser.parse_args([])
    actions = {action.dest: action for action in parser._actions}
    for name, value in keywords.items():
        if name not in vars(options):
            raise UserError(f"{parser.prog}: unknown option '{name}'.{did_you_mean(name, vars(options))}")
        action = actions[name]
        if value is None or value is action.default:
            continue
        if action.nargs == 0:
            value = bool(value)
        elif action.nargs == "+":
            value = [_checked(action, item) for item in (value if isinstance(value, (list, tuple)) else [value])]
        else:
            value = _checked(action, value)
        setattr(options, name, value)
    return options


def _checked(action: argparse.Action, value: Any) -> Any:
    """Returns one value as a number where the option takes numbers, else as text; flags and dicts stay."""
    name = action.option_strings[0]
    if action.choices is not None and value not in action.choices:
        names = ", ".join(map(str, action.choices))
        raise UserError(f"{name} '{value}': one of {names} is expected.{did_you_mean(value, action.choices)}")
    if action.type is None:
        return _text(name, value)
    try:
        return action.type(str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}.") from error
    except ValueError as error:
        raise UserError(f"{name} {value}: a number ({action.type.__name__}) is expected.") from error


def _text(name: str, value: Any) -> str | bool | Mapping:
    """Returns a value as text: a path, a number (`device=0`, `source=0`) or a device; flags and dicts stay."""
    if isinstance(value, (str, bool, Mapping)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    torch = sys.modules.get("torch")  # whoever has a device has imported it
    if isinstance(value, numbers.Number) or torch and isinstance(value, torch.device):
        return str(value)
    raise UserError(f"{name} {value!r:.80}: text or a path is expected.")


def echo_options(script: str, options: argparse.Namespace) -> None:
    """Logs `script: name=value, ...` in the options' order."""
    LOGGER.info(colorstr(f"{script}: ") + ", ".join(f"{name}={value}" for name, value in vars(options).items()))


def number(kind: type, minimum: float | None = None, maximum: float | None = None) -> Callable[[str], Any]:
    """Returns an argparse type: an `int` or a finite `float` between the bounds, both included.

    Integers without a maximum are held below 2**31.
    """
    if kind is int and maximum is None:
        maximum = LARGEST_INT

    def parse(text: str) -> Any:
        value = kind(text)
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if minimum is not None and value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is above {maximum}")
        return value

    parse.__name__ = kind.__name__
    return parse


def find_weights(weights: str | Path | Sequence[str | Path] | None = None, option: str = "--weights") -> list[Path]:
    """Returns the files and folders that `--weights` names; without any, the newest runs/train/*/weights/best.pt.

    Weights that YOLOv5 publishes (`yolov5s.pt`) are fetched where there is no such file. `option` is for messages.

    Raises:
        UserError: nothing has been trained yet, no such file (the nearest names are shown), or it cannot be fetched.
    """
    names = [weights] if isinstance(weights, (str, Path)) else list(weights or ())
    if any(map(str, names)):
        return [_existing(Path(name), option) for name in names if str(name)]
    trained = ROOT / "runs" / "train"
    found = list(trained.glob("*/weights/best.pt"))
    if not found:
        raise UserError(f"no --weights given and none trained yet below {trained}: run train.py first.")
    return [max(found, key=os.path.getmtime)]


def _existing(path: Path, option: str) -> Path:
    if os.path.isfile(path) or os.path.isdir(path):  # a pipe would be waited for; Path's own raise for names too long
        return path
    from utils.downloads import RELEASES, attempt_download

    if path.name in RELEASES:
        return Path(attempt_download(path))
    nearby = [str(path.parent / name) for name in os.listdir(path.parent)] if os.path.isdir(path.parent) else []
    nearby += [str(file) for pattern in ("*.pt", "runs/*/*/weights/*.pt") for file in ROOT.glob(pattern)]
    hint = did_you_mean(path.name, {*map(os.path.basename, nearby), *RELEASES})
    alike = sorted({file for file in nearby if os.path.isfile(file) and Path(file).suffix == path.suffix})
    there = f" There are: {', '.join(alike[:5])}." if alike else ""
    raise UserError(f"{option} {path}: no such file or folder.{hint}{there}")
