"""ExecuTorch, PyTorch's runtime for phones and microcontrollers: a program (.pte) whose operators run in XNNPACK.

Input (b, 3, h, w) of values 0 to 1, output rows (b, n, 5 + nc), or with --raw maps of scores, one or two a level
(`models.raw`). What the file says of itself is a zip archive at its end, as in TensorFlow Lite's; the runtime reads
past it.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

from models.export.job import ExportJob, quietly
from utils.files import atomic_write

METADATA_MEMBER = "metadata.json"


def export(job: ExportJob) -> Path:
    """Writes `<stem>.pte`; returns its path."""
    model, path = job.with_head(job.head()), job.path(job.format.suffix)
    with quietly(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(model, (job.example(),))
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    with atomic_write(path) as temporary:
        temporary.write_bytes(program.buffer)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(METADATA_MEMBER, json.dumps(job.metadata.texts()))
    return path
