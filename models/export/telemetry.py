"""Keeps OpenVINO's and NNCF's tools from reporting over the network, which they do unasked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Both tools stay silent in automatic tests, which they know by these variables.
_SILENT = {"CI": "true", "NNCF_CI": "1"}


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Sets what silences the reports while the block runs: NNCF looks when it is imported, OpenVINO at every call."""
    former = {name: os.environ.get(name) for name in _SILENT}
    os.environ.update(_SILENT)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
