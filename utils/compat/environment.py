"""What a program runs on: containers and notebooks, versions of packages, network, display.

Answers questions and warns; nothing is installed, downloaded or created.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.files import ROOT
from utils.log import LOGGER, setup_logging
from utils.media.display import display_problem

SETTINGS_FOLDERS = {"Windows": "AppData/Roaming", "Darwin": "Library/Application Support"}
ONLINE_PROBE = ("1.1.1.1", 443)  # a public name server
PROBE_TIMEOUT_S = 5.0


def script_logger() -> logging.Logger:
    """Returns the program's logger, its messages shown on stderr: for scripts that log by it."""
    setup_logging(int(os.environ.get("RANK", -1)))
    return LOGGER


def user_config_dir() -> Path:
    """Returns where YOLOv5's settings lie: $YOLOV5_CONFIG_DIR, or a folder of this user's; it is not created."""
    named = os.environ.get("YOLOV5_CONFIG_DIR")
    return Path(named) if named else Path.home() / SETTINGS_FOLDERS.get(platform.system(), ".config") / "Ultralytics"


def is_kaggle() -> bool:
    """Tells whether this is a Kaggle notebook."""
    return "KAGGLE_URL_BASE" in os.environ


def is_colab() -> bool:
    """Tells whether this is a Google Colab notebook."""
    return "google.colab" in sys.modules


def is_docker() -> bool:
    """Tells whether this process runs in a Docker container."""
    return Path("/.dockerenv").exists()


def is_pip() -> bool:
    """Tells whether this program was installed as a package."""
    return "site-packages" in ROOT.parts


def is_writeable(dir: str | Path) -> bool:
    """Tells whether files can be written into a folder."""
    return os.access(dir, os.W_OK)


def check_online() -> bool:
    """Tells whether the internet answers; asks a public name server."""
    try:
        socket.create_connection(ONLINE_PROBE, PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def check_imshow(warn: bool = True) -> bool:
    """Tells whether a window can be opened, and warns, saying why, when it cannot."""
    problem = display_problem()
    if problem and warn:
        LOGGER.warning(f"WARNING: no windows: {problem}")
    return not problem


def check_python(minimum: str = "3.10") -> None:
    """Raises an error for a Python older than `minimum`.

    Raises:
        UserError: it is older.
    """
    check_version(platform.python_version(), minimum, name="Python ", hard=True)


def check_version(
    current: str = "0.0.0",
    minimum: str = "0.0.0",
    name: str = "version ",
    pinned: bool = False,
    hard: bool = False,
    verbose: bool = False,
) -> bool:
    """Compares versions by their leading numbers: `1.12.0a0+git` counts as 1.12.0.

    Args:
        current: what is there.
        minimum: what is wanted.
        name: of the thing, for messages.
        pinned: want exactly this version, not a later one.
        hard: raise an error when it is not met.
        verbose: warn when it is not met.

    Raises:
        UserError: with `hard`.
    """
    have, want = _release(current), _release(minimum)
    met = have == want if pinned else have >= want
    message = f"{name}{'==' if pinned else '>='}{minimum} is required, {current} is installed."
    if hard and not met:
        raise UserError(message)
    if verbose and not met:
        LOGGER.warning(f"WARNING: {message}")
    return met


def _release(version: str) -> tuple[int, ...]:
    """Returns a version's leading numbers, less zeros at the end."""
    numbers = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    if numbers is None:
        raise UserError(f"'{version}' is not a version number such as 1.12.0.")
    release = [int(number) for number in numbers[1].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def check_requirements(
    requirements: str | Path | Iterable[str] = ROOT / "requirements.txt", exclude: Sequence[str] = ()
) -> bool:
    """Warns of packages that are missing or of the wrong version, with the command that installs them.

    Args:
        requirements: a requirements file; one requirement such as `onnx>=1.12`; or several.
        exclude: names of packages to leave out.

    Returns:
        Whether all are there.

    Raises:
        UserError: no such file, or a line that is no requirement.
    """
    wanted = [text for text in _requirement_lines(requirements) if _package(text) not in exclude]
    missing = [text for text in wanted if not _is_met(text)]
    if missing:
        quoted = " ".join(f'"{text}"' for text in missing)
        LOGGER.warning(f"WARNING: packages are missing or of another version: pip install {quoted}")
    return not missing


def _requirement_lines(requirements: str | Path | Iterable[str]) -> list[str]:
    """Returns requirements without comments and pip's own options."""
    if isinstance(requirements, (str, Path)):
        path = Path(requirements)
        if path.suffix == ".txt" and not path.is_file():
            raise UserError(f"{path}: no such requirements file.")
        requirements = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [str(requirements)]
    stripped = (re.sub(r"(^|\s)#.*", "", text).strip() for text in requirements)
    return [text for text in stripped if text and not text.startswith("-")]


def _package(requirement: str) -> str:
    """Returns the name of the package that a requirement is about."""
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]


def _is_met(requirement: str) -> bool:
    """Tells whether a requirement `name>=1.0,<2` is met; names alone want any version."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        parsed = Requirement(requirement)
    except InvalidRequirement as error:
        raise UserError(f"'{requirement}' is not a requirement such as numpy>=1.26 ({error}).") from error
    if parsed.marker is not None and not parsed.marker.evaluate():
        return True
    try:
        return parsed.specifier.contains(importlib.metadata.version(parsed.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False
