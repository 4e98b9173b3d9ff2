"""MNN, Alibaba's runtime for phones and other small processors: one file, made from ONNX.

Input `images` (b, 3, h, w) of values 0 to 1, output `output`: rows (b, n, 5 + nc); with --raw maps of scores, one or
two a level (`models.raw`). With --half the weights are stored in float16. What the file says of itself is its business
code, a text that MNN keeps for its users.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from models.export.job import ExportJob, run_tool
from models.export.onnx import write_onnx
from utils.errors import UserError
from utils.files import atomic_write

# Not the command mnnconvert: it installs a package by itself and then reports every conversion over the network.
_CONVERTER = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def export(job: ExportJob) -> Path:
    """Writes `<stem>.mnn`; returns its path.

    Raises:
        UserError: MNN's converter fails.
    """
    path = job.path(job.format.suffix)
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as temporary:
        source, target = Path(folder, "float32.onnx"), Path(folder, "model.mnn")
        write_onnx(replace(job, config=replace(job.config, half=False)), source)
        options = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target)]
        options += ["--bizCode", job.metadata.texts()["metadata"], *["--fp16"] * job.config.half]
        printed = run_tool([sys.executable, "-c", _CONVERTER, *options], Path(folder))
        if not target.is_file():
            raise UserError(f"MNN's converter wrote no model:\n{printed.strip()[-1000:]}")
        temporary.write_bytes(target.read_bytes())
    return path
