"""How a data set of very many images starts and loads: speed of the first scan, second start, memory.

Writes tiny JPEGs of varied content with label files, a few of them cut short, then measures in processes of their own:
the first scan; the second start, from the label cache; and epochs of the training loader, with mosaics and without.
A worker that makes mosaics keeps decoded images up to a bound (`MosaicSampler.recent_bytes`), so its memory grows to
that bound before it is flat; without mosaics it must be flat from the second epoch on. Needs Linux (see `usage.py`).

    python -m tests.campaigns.many_images --folder /dev/shm
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns.usage import Usage, peak_resident_mb, require_linux, usage_of
from utils.cli import ReportedError, number, run_command
from utils.errors import UserError
from utils.log import LOGGER

SIDE_PX = 32
CLASSES = 5
CUT_EVERY = 1000  # images
A_FOLDER = 10_000  # images
BATCH_SIZE = 64
SAMPLES, FIFTH = 40, 8  # an epoch; of them the first and the last fifth are compared
STAGES = ("first scan", "second start", "epochs")
# Epochs by the share of mosaics; the last one counts. In the first, a worker makes its own copies of the pages that it
# shares with its parent and writes to, once for all, and with mosaics fills its memory.
EPOCHS = {0.0: 3, 1.0: 2}
TOLERANCE_MB = 8.0  # by which a worker may be larger at an epoch's end than at its start


class Aim(NamedTuple):
    """What a figure should be."""

    name: str
    unit: str
    limit: float
    at_least: bool = False

    def line(self, value: float) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "reached" if self.reached(value) else "MISSED"
        return f"{self.name:46} {value:10.1f} {self.unit:9} {sign} {self.limit:6g}  {verdict}"

    def reached(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


AIMS = {
    "scan_per_s": Aim("first scan", "images/s", 3000, at_least=True),
    "scan_peak_mb": Aim("first scan, main process at its peak", "MB", 600),
    "start_s": Aim("second start, from the cache", "s", 3),
    "start_mb": Aim("second start, main process", "MB", 600),
    "epochs_main_mb": Aim("training loader, main process", "MB", 600),
    "plain_growth_mb": Aim("a worker's growth in an epoch, no mosaics", "MB", TOLERANCE_MB),
    "filled_growth_mb": Aim("a worker's growth, mosaics, memory filled", "MB", TOLERANCE_MB),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("many_images", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--count", type=number(int, 100), default=100_000, help="images")
    add("--workers", type=number(int, 1), default=2, help="processes that scan, and that load")
    add("--imgsz", "--img", "--img-size", type=number(int, 32), default=64, help="image side in training, pixels")
    add("--seed", type=number(int, 0), default=0, help="of the images")
    add("--folder", default="", help="where the data set is written and removed again; default: the system's temporary")
    add("--measure", choices=STAGES, help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser


def main(options: argparse.Namespace) -> None:
    """Writes the data set, measures all stages and prints a table; in a process of its own, one stage."""
    require_linux()
    if options.measure:
        print(json.dumps(STAGE_FUNCTIONS[options.measure](options)))
        return
    with tempfile.TemporaryDirectory(prefix="many-images-", dir=options.folder or None) as folder:
        start_s = time.perf_counter()
        cut = write_images(Path(folder), options.count, options.seed)
        took_s = time.perf_counter() - start_s
        print(f"{options.count} images written in {took_s:.0f} s, {cut} of them cut short", flush=True)
        options.folder = folder
        figures: dict[str, Any] = {}
        for stage in STAGES:
            found = run_apart(stage, options)
            print(*(aim.line(found[name]) for name, aim in AIMS.items() if name in found), sep="\n", flush=True)
            figures |= found
    if figures.pop("corrupt") != cut:
        raise UserError("the scan did not find the images that were cut short.")
    missed = [aim.name for name, aim in AIMS.items() if not aim.reached(figures[name])]
    if missed:
        LOGGER.error(f"Missed: {', '.join(missed)}.")
        raise ReportedError("aims missed")


def write_images(root: Path, count: int, seed: int) -> int:
    """Writes images and labels below a folder; returns how many images were cut short."""
    import cv2
    import numpy as np

    generator = np.random.default_rng(seed)
    for index in range(count):
        folders = [root / kind / "train" / f"{index // A_FOLDER:03}" for kind in ("images", "labels")]
        if index % A_FOLDER == 0:
            for folder in folders:
                folder.mkdir(parents=True)
        coarse = generator.integers(0, 256, (4, 4, 3), np.uint8)
        data = cv2.imencode(".jpg", cv2.resize(coarse, (SIDE_PX, SIDE_PX)))[1].tobytes()
        cut = len(data) - 20 if index % CUT_EVERY == CUT_EVERY - 1 else len(data)
        (folders[0] / f"{index:07}.jpg").write_bytes(data[:cut])
        boxes_xy_norm = generator.uniform(0.25, 0.75, (generator.integers(0, 4), 2))
        lines = (f"{generator.integers(CLASSES)} {x:.6f} {y:.6f} 0.2 0.3\n" for x, y in boxes_xy_norm)
        (folders[1] / f"{index:07}.txt").write_text("".join(lines))
    return count // CUT_EVERY


def run_apart(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a stage in a process of its own, showing what it prints; returns its figures, which come last."""
    line = [sys.executable, "-m", "tests.campaigns.many_images", "--measure", stage, "--folder", options.folder]
    line += ["--workers", str(options.workers), "--imgsz", str(options.imgsz), "--seed", str(options.seed)]
    last = ""
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            print(last, end="", flush=True)
            last = text
    if process.returncode:
        raise UserError(f"the stage '{stage}' failed: see above.")
    return json.loads(last)


# -------------------------------------------------------------------------------------------------------------- stages


def load(options: argparse.Namespace) -> tuple[Any, float]:
    from utils.dataloaders.labels import load_labels

    LOGGER.setLevel("ERROR")
    start_s = time.perf_counter()
    table = load_labels([Path(options.folder) / "images" / "train"], workers=options.workers)
    return table, time.perf_counter() - start_s


def first_scan(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the scan that makes the label cache."""
    import torch  # noqa: F401 - train.py's main process has it in memory

    before_mb = usage_of().resident_mb
    table, took_s = load(options)
    counts, processor_s = table.counts, sum(os.times()[:4])  # the processes that scanned have ended and count too
    print(f"the main process has {before_mb:.0f} MB before it reads a label")
    print(f"processor time of the first scan, start included: {processor_s:.1f} s on {options.workers} workers")
    return {"scan_per_s": counts.total / took_s, "scan_peak_mb": peak_resident_mb(), "corrupt": counts.corrupt}


def second_start(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the start from the label cache."""
    import torch  # noqa: F401 - as above

    before_s = sum(os.times()[:4])
    _, took_s = load(options)
    print(f"processor time of the second start: {sum(os.times()[:4]) - before_s:.1f} s")
    return {"start_s": took_s, "start_mb": usage_of().resident_mb}


def epochs(options: argparse.Namespace) -> dict[str, Any]:
    """Measures memory over epochs of the training loader, without mosaics and with them; prints a line for each."""
    table, _ = load(options)
    print(f"{'private MB':26} {'main RSS':>9}  workers at the start -> end, growth")
    growth_by_mosaics, mains_mb = {}, []
    for mosaics, count in EPOCHS.items():
        loader = make_loader(table, options, mosaics)
        bound_mb = loader.dataset.plan.recent_bytes(options.workers, options.imgsz) / 2**20 if mosaics else 0
        for epoch in range(count):
            loader.set_epoch(epoch)
            main, *workers = zip(*sampled_epoch(loader), strict=True)
            mains_mb.append(max(usage.resident_mb for usage in main))
            ends_mb = [[median_mb(part) for part in (worker[:FIFTH], worker[-FIFTH:])] for worker in workers]
            growth_by_mosaics[mosaics] = max(end - start for start, end in ends_mb)
            told = "; ".join(f"{start:.1f} -> {end:.1f}, {end - start:+.2f}" for start, end in ends_mb)
            print(f"{f'mosaics {mosaics:.0%}, epoch {epoch + 1}':26} {mains_mb[-1]:9.0f}  {told}", flush=True)
        print(f"{'':37} decoded images that a worker keeps: {bound_mb:.0f} MB at most", flush=True)
        loader.close()
    growths = {"plain_growth_mb": growth_by_mosaics[0.0], "filled_growth_mb": growth_by_mosaics[1.0]}
    return {"epochs_main_mb": max(mains_mb), **growths}


def median_mb(usages: Sequence[Usage]) -> float:
    return statistics.median(usage.private_mb for usage in usages)


def make_loader(table: Any, options: argparse.Namespace, mosaic: float) -> Any:
    from utils.dataloaders.loader import create_dataloader

    hyp = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "mosaic": mosaic}
    shared = {"workers": options.workers, "shuffle": True, "seed": options.seed}
    return create_dataloader(table, options.imgsz, BATCH_SIZE, 32, hyp=hyp, augment=True, **shared)[0]


def sampled_epoch(loader: Iterable[Any]) -> list[list[Usage]]:
    """Runs an epoch; returns samples of [main process, worker, worker, ...]."""
    samples = []
    every = max(len(loader) // SAMPLES, 1)
    for index, _ in enumerate(loader):
        if index % every == 0:
            workers = sorted(process.pid for process in multiprocessing.active_children())
            samples.append([usage_of(pid) for pid in ("self", *workers)])
    return samples


STAGE_FUNCTIONS = dict(zip(STAGES, (first_scan, second_start, epochs), strict=True))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
