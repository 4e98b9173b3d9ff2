"""From the options of export.py to files: loads each checkpoint, exports it format by format, and checks the results.

A format that fails is logged and the others go on; what failed is in the report. Not here: how a format is written (a
module each), and which options go together (`models.export.formats`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.backends.metadata import Metadata
from models.deploy import rewrite
from models.export.formats import TOLERANCES, Format, complete_options, find_formats
from models.export.job import ExportJob
from models.export.verify import check_parity, run_checkpoint, sample_pictures
from models.load import model_from, read_weights
from utils.cli import find_weights
from utils.dataloaders.config import load_spec
from utils.dataloaders.paths import list_images
from utils.devices import device_line, select_device
from utils.errors import UserError, check_img_size, grid_stride
from utils.files import ROOT
from utils.log import LOGGER, colorstr
from utils.nms import NMSConfig


@dataclass
class Report:
    """What came of an export: the files that were written, and the formats that failed or do not agree."""

    paths: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def export_all(options: argparse.Namespace) -> Report:
    """Exports every checkpoint of `options.weights` to every format of `options.include`.

    Args:
        options: of export.py, as parsed; without `weights` the newest run's are taken.

    Raises:
        UserError: options that do not go together, weights or data that cannot be read.
    """
    start = time.perf_counter()
    formats = find_formats(options.include)
    options = complete_options(options, formats)
    files = find_weights(options.weights)
    for path in files:
        if path.suffix != ".pt":
            raise UserError(f"--weights {path}: exports start from a checkpoint, a file ending in .pt.")
    device = select_device(options.device)
    pictures = sample_pictures(list_images(_picture_sources(options.data)))
    LOGGER.info(device_line(device))
    report = Report()
    for weights in files:
        jobs = make_jobs(weights, options, formats, device)
        for job in jobs:
            _export_one(job, pictures, report)
    _conclude(report, options, time.perf_counter() - start)
    return report


def make_jobs(
    weights: Path, options: argparse.Namespace, formats: Sequence[Format], device: torch.device
) -> list[ExportJob]:
    """Loads a checkpoint and returns a job for each format; logs what it starts from.

    Args:
        weights: the checkpoint.
        options: complete.
        formats: what to export to.
        device: for formats that are made on a device.

    Raises:
        UserError: see `models.load.read_weights`.
    """
    content = read_weights(weights)
    with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
        source = model_from(content).float().requires_grad_(False)
    stride = grid_stride(source.stride)
    shape_hw = check_img_size(options.imgsz, stride)
    trained = (content.meta.get("opt") or {}).get("imgsz")
    if trained and trained != max(shape_hw):
        LOGGER.info(f"Image size {'x'.join(map(str, shape_hw))}; the checkpoint was trained at {trained}")
    metadata = Metadata(
        names=dict(source.names),
        stride=stride,
        shape_hw=(shape_hw[0], shape_hw[1]),
        batch=options.batch_size,
        dynamic=options.dynamic,
        nms=_suppression(options),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        data=content.meta.get("data") or "",
    )
    jobs = [
        ExportJob(
            entry,
            weights,
            source,
            model,
            replace(metadata, precision=_precision(entry, options), versions=_versions(entry)),
            options,
            device,
            partial(_calibration_images, options.data, metadata.shape_hw),
        )
        for model in (rewrite(source),)
        for entry in formats
    ]
    shape = tuple(run_checkpoint(jobs[0], np.zeros(jobs[0].shape, np.uint8)).shape)
    LOGGER.info(f"\n{colorstr('PyTorch:')} starting from {weights} with output shape {shape} ({_megabytes(weights)})")
    return jobs


def _suppression(options: argparse.Namespace) -> NMSConfig | None:
    """Returns how detections are to be chosen in the graph; None without --nms."""
    if not options.nms:
        return None
    return NMSConfig(options.conf_thres, options.iou_thres, options.topk_all, options.agnostic_nms)


def _precision(entry: Format, options: argparse.Namespace) -> str:
    """Returns the type of the weights in a format's file."""
    return "int8" if options.int8 else "float16" if options.half else entry.precision


def _versions(entry: Format) -> dict[str, str]:
    """Returns the versions of the libraries that write a format, by package."""
    versions = {"torch": torch.__version__}
    for package in entry.packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another name, or not installed
            versions[package] = importlib.metadata.version(package)
    return versions


def _calibration_images(data: str, shape_hw: tuple[int, int], count: int) -> Sequence[np.ndarray]:
    """Returns up to `count` training images of `data`, letterboxed to the shape, each uint8 (1, 3, h, w) RGB."""
    from models.export.calibrate import calibration_images

    return calibration_images(data, shape_hw, count)


def _picture_sources(data: str) -> Sequence[Path]:
    """Returns where the pictures to compare on are: the data set's validation images, else data/images."""
    return load_spec(data, need=("val",), download=False).val if data else [ROOT / "data" / "images"]


def _export_one(job: ExportJob, pictures: Sequence[np.ndarray], report: Report) -> None:
    """Exports to one format and checks the result; failures go into the report, and the log."""
    title = job.format.title
    prefix = colorstr(f"{title}:")
    LOGGER.info(f"\n{prefix} starting export ...")
    try:
        job.format.check_packages()
        path = importlib.import_module(f"models.export.{job.format.module}").export(job)
    # Whatever a converter raises, the other formats are to be tried
    except Exception as error:
        LOGGER.error(f"{prefix} export failure: {_reason(error)}")
        LOGGER.debug("", exc_info=True)
        report.failures.append(f"{title} was not exported")
        return
    report.paths.append(path)
    LOGGER.info(f"{prefix} export success, saved as {path} ({_megabytes(path)})")
    for what, check in (("parity", _check_parity), ("quality", _check_quality)):
        try:
            problem = check(job, path, pictures, prefix)
        except Exception as error:  # the same holds for runtimes
            problem = _reason(error)
        if problem:
            LOGGER.error(f"{prefix} {what} failure: {problem}")
            report.failures.append(f"{title} failed the check of its {what}")


def _check_parity(job: ExportJob, path: Path, pictures: Sequence[np.ndarray], prefix: str) -> str:
    """Compares a file with its checkpoint; returns what is wrong, in words."""
    reason = job.format.why_not_here(job.device.type == "cuda")
    if job.source.yaml["ch"] != 3:
        reason = f"the model takes {job.source.yaml['ch']} channels, pictures have 3"
    if reason:
        LOGGER.warning(f"WARNING: {prefix} parity was not checked: {reason}.")
        return ""
    tolerance = TOLERANCES[job.metadata.precision]
    parity = check_parity(job, path, pictures, tolerance)
    LOGGER.info(f"{prefix} parity with {job.weights.name} on {parity.summary()}")
    return "; ".join(parity.problems(tolerance))


def _check_quality(job: ExportJob, path: Path, _: Sequence[np.ndarray], prefix: str) -> str:
    """Validates an int8 file beside its checkpoint; returns what is wrong, in words."""
    if not job.options.int8:
        return ""
    reason = job.format.why_not_here(job.device.type == "cuda")
    if reason:
        LOGGER.warning(f"WARNING: {prefix} mAP was not measured: {reason}.")
        return ""
    from models.export.verify import compare_map

    measured = compare_map(job.weights, path, job.options.data, job.metadata.shape_hw, job.run_device)
    loss, limit = measured.drop, job.options.int8_max_drop
    LOGGER.info(
        f"{prefix} mAP50-95 on {job.options.data}: checkpoint {measured.checkpoint:.4f}, int8 {measured.exported:.4f}, "
        f"loss {loss:.4f}"
    )
    return f"mAP50-95 falls by {loss:.4f} (--int8-max-drop {limit:g})" if loss > limit else ""


def _reason(error: Exception) -> str:
    """Returns an error's message; for what is no message to people, with its kind."""
    text = str(error).strip()
    return text.rstrip(".") if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _megabytes(path: Path) -> str:
    """Returns the size of a file or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _conclude(report: Report, options: argparse.Namespace, seconds: float) -> None:
    """Logs where the files are and what can be done with the last one."""
    if not report.paths:
        return
    last = report.paths[-1]
    weights = shlex.quote(str(last))
    data = f" --data {shlex.quote(str(options.data))}" if options.data else ""
    LOGGER.info(
        f"\nExport complete ({seconds:.1f}s)\n"
        f"Results saved to {colorstr('bold', last.parent.resolve())}\n"
        f"Detect:   python detect.py --weights {weights}\n"
        f"Validate: python val.py --weights {weights}{data}"
    )
