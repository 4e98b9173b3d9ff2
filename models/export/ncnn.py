"""NCNN, for phones and small boards: a folder of the graph (.param), its weights (.bin) and metadata.yaml.

Made from TorchScript by the program pnnx. Input `in0` (3, h, w), output `out0` (rows, 5 + nc): NCNN has no batches, and
the image size is fixed. With --half the weights are stored in float16.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

from models.export.job import ExportJob, atomic_folder, run_tool
from utils.errors import UserError
from utils.files import write_yaml

GRAPH, WEIGHTS, METADATA = "model.ncnn.param", "model.ncnn.bin", "metadata.yaml"
_HEADER_LINES = 2  # of a .param: a magic number, and how many layers and blobs follow


def export(job: ExportJob) -> Path:
    """Writes `<stem>_ncnn_model/`; returns its path.

    Raises:
        UserError: --batch-size above 1, or an operation that NCNN does not have.
    """
    if job.metadata.batch != 1:
        raise UserError(f"--batch-size {job.metadata.batch}: NCNN takes one image at a time: leave it at 1.")
    path = job.path(job.format.suffix)
    with tempfile.TemporaryDirectory() as scratch, atomic_folder(path) as folder:
        _convert(job, Path(scratch), folder)
        _check_layers(folder / GRAPH)
        write_yaml(folder / METADATA, job.metadata.texts())
    return path


def _convert(job: ExportJob, scratch: Path, folder: Path) -> None:
    """Has pnnx write graph and weights to `folder`; what else it writes goes to `scratch`."""
    from pnnx import EXEC_PATH

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # tracing is deprecated, but pnnx reads nothing else
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(job.with_head(job.head()), job.example(), check_trace=False)
        traced.save(str(scratch / "model.torchscript"))
    sides = ",".join(map(str, job.shape))
    options = {
        "inputshape": f"[{sides}]f32",
        "ncnnparam": folder.absolute() / GRAPH,
        "ncnnbin": folder.absolute() / WEIGHTS,
        "fp16": int(job.config.half),
    }
    printed = run_tool([EXEC_PATH, "model.torchscript", *(f"{key}={value}" for key, value in options.items())], scratch)
    if not all((folder / name).is_file() for name in (GRAPH, WEIGHTS)):
        raise UserError(f"pnnx wrote no model:\n{printed}")


def _check_layers(graph: Path) -> None:
    """Refuses a graph with operations that pnnx had no layer for and left under their own names."""
    lines = graph.read_text(encoding="utf-8").splitlines()[_HEADER_LINES:]
    unknown = sorted({line.split()[0] for line in lines if "." in line.split()[0] or "::" in line.split()[0]})
    if unknown:
        raise UserError(f"NCNN has no layer for {', '.join(unknown)}, which this model needs.")
