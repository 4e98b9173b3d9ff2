"""TorchScript: the graph that torch records of one run, for `torch.jit.load` and libtorch.

`config.txt` in the file is YOLOv5's (shape, stride, names as JSON); `metadata` tells the rest.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import torch

from models.export.job import ExportJob
from utils.errors import UserError
from utils.files import atomic_write


def export(job: ExportJob) -> Path:
    """Writes `<stem>.torchscript`, on the job's device; returns its path.

    Raises:
        UserError: --half on a CPU.
    """
    if job.config.half and job.device.type == "cpu":
        raise UserError("--half needs a GPU here: add --device 0, or leave --half out")
    dtype = torch.float16 if job.config.half else torch.float32
    model = copy.deepcopy(job.with_head(job.head())).to(job.device, dtype)
    example = job.example().to(job.device, dtype)
    metadata = job.metadata
    names = [metadata.names[number] for number in sorted(metadata.names)]
    config = {"shape": job.shape, "stride": metadata.stride, "names": names}
    path = job.path(job.format.suffix)
    with warnings.catch_warnings(), torch.no_grad(), atomic_write(path) as temporary:
        warnings.simplefilter("ignore", FutureWarning)  # tracing is deprecated; TorchScript has no other source here
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, example, strict=False, check_trace=False)
        extra = {"config.txt": json.dumps(config), "metadata": metadata.texts()["metadata"]}
        with open(temporary, "wb") as file:  # by its path the temporary's random name would get into the archive
            torch.jit.save(traced, file, _extra_files=extra)
    return path
