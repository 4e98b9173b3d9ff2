"""From the options of export.py to files: loads each checkpoint, exports it format by format, and checks the results.

A format that fails is logged and the others go on; what failed is in the report. Not here: how a format is written (a
module each), and which options go together (`models.export.formats`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from models.backends import ModelFile
from models.backends.metadata import Metadata
from models.deploy import rewrite
from models.export.formats import TOLERANCES, ExportConfig
from models.export.job import ExportJob
from models.export.verify import check_parity, compare_map, run_checkpoint, sample_images
from models.load import model_from, read_weights
from utils.cli import find_weights
from utils.dataloaders.config import load_spec
from utils.dataloaders.paths import list_images
from utils.devices import device_line, select_device
from utils.errors import UserError, grid_stride
from utils.files import ROOT
from utils.images import inference_hw
from utils.log import LOGGER, colorstr
from utils.nms import NMSConfig


@dataclass
class Report:
    """What came of an export: the files written, those that nothing here runs, and the formats that failed."""

    paths: list[Path] = field(default_factory=list)
    unchecked: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def export_all(config: ExportConfig) -> Report:
    """Exports every checkpoint of `config.weights` to every format of `config.include`.

    Raises:
        UserError: options that do not go together, weights or data that cannot be read.
    """
    start = time.perf_counter()
    config = config.checked()
    files = find_weights(config.weights)
    for path in files:
        if path.suffix != ".pt":
            raise UserError(f"--weights {path}: exports start from a checkpoint, a file ending in .pt.")
    device = select_device(config.device)
    sources = load_spec(config.data, need=("val",), download=False).val if config.data else [ROOT / "data" / "images"]
    images = sample_images(list_images(sources))
    LOGGER.info(device_line(device))
    report = Report()
    for path in files:
        for job in make_jobs(path, config, device):
            with job.closing:
                _export_one(job, images, report)
    if report.paths:
        last = report.paths[-1]
        names = ", ".join(path.name for path in report.unchecked)
        unchecked = f"Not run here, and so not compared with the checkpoint: {names}\n" if names else ""
        data = f" --data {shlex.quote(str(config.data))}" if config.data else ""
        LOGGER.info(
            f"\nExport complete ({time.perf_counter() - start:.1f}s)\n"
            f"Results saved to {colorstr('bold', last.parent.resolve())}\n"
            f"{unchecked}"
            f"Detect:   python detect.py --weights {shlex.quote(str(last))}\n"
            f"Validate: python val.py --weights {shlex.quote(str(last))}{data}"
        )
    return report


def make_jobs(weights: Path, config: ExportConfig, device: torch.device) -> list[ExportJob]:
    """Loads a checkpoint and returns a job for each format; logs what it starts from.

    Args:
        weights: the checkpoint.
        config: checked.
        device: for formats that are made on a device.

    Raises:
        UserError: see `models.load.read_weights`.
    """
    content = read_weights(weights)
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
        source = model_from(content).float().requires_grad_(False)
    stride = grid_stride(source.stride)
    height, width = inference_hw(config.imgsz, stride)
    trained = (content.meta.get("opt") or {}).get("imgsz")
    if trained and trained != max(height, width):
        LOGGER.info(f"Image size {height}x{width}; the checkpoint was trained at {trained}")
    raw = source.head.raw_head()
    if config.raw and raw is None:
        raise UserError(f"--raw: nothing here decodes {type(source.head).__name__} on the host. Leave it out.")
    nms = NMSConfig(config.conf_thres, config.iou_thres, config.topk_all, config.agnostic_nms)
    metadata = Metadata(
        names=dict(source.names),
        stride=stride,
        shape_hw=(height, width),
        batch=config.batch_size,
        dynamic=config.dynamic,
        nms=nms if config.nms else None,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        data=content.meta.get("data") or "",
    )
    models, jobs = {}, []
    for entry in config.formats:
        versions = {"torch": torch.__version__}
        for package in entry.packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another name, or not installed
                versions[package] = importlib.metadata.version(package)
        precision = "int8" if config.int8 else "float16" if config.half else entry.precision
        left = raw is not None and (config.raw or entry.raw)
        said = replace(metadata, raw=raw if left else None, precision=precision, versions=versions)
        models[left] = models.get(left) or rewrite(source, left)
        jobs.append(ExportJob(entry, weights, source, models[left], said, replace(config, raw=left), device))
    shape = tuple(run_checkpoint(jobs[0], np.zeros(jobs[0].shape, np.uint8)).shape)
    LOGGER.info(f"\n{colorstr('PyTorch:')} starting from {weights} with output shape {shape} ({_megabytes(weights)})")
    return jobs


def _export_one(job: ExportJob, images: Sequence[np.ndarray], report: Report) -> None:
    """Exports to one format and checks the result; failures go into the report, and the log."""
    title = job.format.title
    prefix = colorstr(f"{title}:")
    LOGGER.info(f"\n{prefix} starting export ...")
    try:
        job.format.check_blocks(job.source)
        job.format.check_packages()
        made = importlib.import_module(f"models.export.{job.format.module}").export(job)
    except Exception as error:  # whatever a converter raises, the other formats are to be tried
        LOGGER.error(f"{prefix} export failure: {_reason(error)}")
        LOGGER.debug("", exc_info=True)
        report.failures.append(f"{title} was not exported")
        return
    path = made.path if isinstance(made, ModelFile) else made
    report.paths.append(path)
    LOGGER.info(f"{prefix} export success, saved as {path} ({_megabytes(path)})")
    reason = "" if isinstance(made, ModelFile) else job.format.why_not_here(job.device.type == "cuda")
    report.unchecked += [path] if reason else []
    for what, check in (("parity", _parity_problem), ("quality", _quality_problem))[: 2 if job.config.int8 else 1]:
        if reason:
            done = "parity was not checked" if what == "parity" else "mAP was not measured"
            LOGGER.warning(f"WARNING: {prefix} {done}: {reason}.")
            continue
        try:
            problem = check(job, made, images, prefix)
        except Exception as error:  # the same holds for runtimes
            problem = _reason(error)
        if problem:
            LOGGER.error(f"{prefix} {what} failure: {problem}")
            report.failures.append(f"{title} failed the check of its {what}")


def _parity_problem(job: ExportJob, made: Path | ModelFile, images: Sequence[np.ndarray], prefix: str) -> str:
    """Compares a file with its checkpoint; returns what is wrong, in words."""
    if job.source.yaml["ch"] != 3:
        channels = job.source.yaml["ch"]
        LOGGER.warning(f"WARNING: {prefix} parity was not checked: the model takes {channels} channels, images have 3.")
        return ""
    tolerance = TOLERANCES[job.metadata.precision]
    parity = check_parity(job, made, images, tolerance)
    LOGGER.info(f"{prefix} parity with {job.weights.name} on {parity.summary()}")
    return "; ".join(parity.problems(tolerance))


def _quality_problem(job: ExportJob, made: Path | ModelFile, _: Sequence[np.ndarray], prefix: str) -> str:
    """Validates an int8 file beside its checkpoint; returns what is wrong, in words."""
    data, limit = job.config.data, job.config.int8_max_drop
    checkpoint, exported = compare_map(job.weights, made, data, job.metadata.shape_hw, job.run_device)
    loss = checkpoint - exported
    LOGGER.info(f"{prefix} mAP50-95 on {data}: checkpoint {checkpoint:.4f}, int8 {exported:.4f}, loss {loss:.4f}")
    return f"mAP50-95 falls by {loss:.4f} (--int8-max-drop {limit:g})" if loss > limit else ""


def _reason(error: Exception) -> str:
    """Returns an error's message; for what is no message to people, with its kind."""
    text = str(error).strip()
    return text.rstrip(".") if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _megabytes(path: Path) -> str:
    """Returns the size of a file or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
