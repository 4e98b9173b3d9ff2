"""Exports that are folders: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils.checks import UserError


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes its place once the block has ended well.

    Raises:
        UserError: it cannot be written, or `path` is a file; what was there is intact.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a folder of that name is to be written. Move it away.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as parent:
            new, former = Path(parent, "new"), Path(parent, "former")
            new.mkdir()
            yield new
            if path.exists():  # systems do not rename onto a folder that holds files
                os.replace(path, former)
            try:
                os.replace(new, path)
            except OSError:
                if former.exists():
                    os.replace(former, path)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error
