"""Keeps what converters print off the terminal, and shows the end of it when they fail.

Converters are written to talk: progress bars, notes of C++ libraries, deprecations of their own parts. It goes to the
process's streams by several ways (print, logging, C++), so that the streams themselves are turned aside. Tools that
are programs of their own are run the same way.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.checks import UserError
from utils.log import LOGGER

SHOWN_LINES = 15


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Turns the process's output aside while the block runs; logs its last lines when the block fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as record:
        try:
            with _streams_to(record.fileno()), contextlib.redirect_stdout(record), contextlib.redirect_stderr(record):
                yield
        except Exception:
            record.flush()
            record.seek(0)
            LOGGER.error(last_lines(record.read()))
            raise


@contextlib.contextmanager
def _streams_to(target: int) -> Iterator[None]:
    """Points the descriptors of standard output and error, where they are open, at another one for a while."""
    with contextlib.ExitStack() as restoring:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if stream is None:
                continue
            stream.flush()
            kept = os.dup(descriptor)
            restoring.callback(os.close, kept)
            restoring.callback(os.dup2, kept, descriptor)
            os.dup2(target, descriptor)
        yield


def run_tool(command: Sequence[str], folder: Path) -> str:
    """Runs a program without a word, in a folder of its own; returns what it printed.

    Args:
        command: program and arguments.
        folder: its working folder.

    Raises:
        UserError: it cannot be started or fails; the message holds the last lines that it printed.
    """
    try:
        done = subprocess.run(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror}).") from error
    if done.returncode:
        raise UserError(f"{command[0]} failed with status {done.returncode}:\n{last_lines(done.stdout)}")
    return done.stdout


def last_lines(text: str) -> str:
    """Returns the end of what a tool printed."""
    return "\n".join(text.strip().splitlines()[-SHOWN_LINES:])
