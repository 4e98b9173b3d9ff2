"""What the benchmarks share: measuring in a process of its own, and telling on what it was measured.

Runtimes' waiting threads slow each other down, and memory is a process's: so each measurement has its own.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from typing import Any

from models.backends.base import processor_name
from utils.errors import UserError


def run(script: object, *arguments: object) -> str:
    """Runs a script; returns what it printed. Where it fails, the line that tells of it is the error's message."""
    line = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [text for text in re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).splitlines() if text.strip()]
        telling = [text for text in said if "failure" in text or "error" in text]
        raise UserError((telling or said or [f"{script} ended without a word"])[-1])
    return done.stdout


def measured(script: object, *arguments: object) -> Any:
    """Runs a script that prints its figures as JSON on its last line; returns them."""
    return json.loads(run(script, *arguments).splitlines()[-1])


def machine() -> str:
    """Returns what figures were taken on."""
    return f"{processor_name()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
