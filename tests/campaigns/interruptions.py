"""Disturbs small training runs at random moments and shows what is lost: at most the running epoch.

Every run is hit once or twice: killed, ended or interrupted by a signal, its disk full, its folder read-only, its
images moved away, a loader's process killed. After each blow the checkpoints must open, results.csv may be one epoch
ahead of them, and what was said is looked at; then the run is resumed, with another number of workers. Its end must
equal that of an undisturbed run in every tensor (optimizer and EMA too), every row and every file name: no temporaries.
Linux only; the runs are forked from this process, so that none has to import PyTorch.

    python -m tests.campaigns.interruptions --count 200
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import torch

from utils.checkpoint import load_checkpoint
from utils.cli import ReportedError, run_command
from utils.errors import UserError
from utils.files import ROOT
from utils.tools.shapes import SPLITS, label_text, scene_of

EPOCHS, IMAGES = 3, (12, 4)
MODEL = """
nc: 4
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[6, 8, 12, 10, 16, 20], [20, 28, 32, 24, 40, 44]]
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, GSConv, [32, 3, 2]]]
head: [[-1, 1, GSConv, [32, 3, 2]], [[2, 3], 1, Detect, [nc, anchors]]]
"""
RUN = ["--img", "64", "--batch-size", "4", "--epochs", str(EPOCHS), "--save-period", "1", "--amp", "off"]
RUN += ["--device", "cpu", "--noautoanchor", "--noplots", "--exist-ok"]
IMPORTED_BEFORE = ("models.load", "models.yolo", "utils.train.engine", "utils.train.resume", "utils.train.prepare")
IMPORTED_BEFORE += ("utils.dataloaders.config", "torch.utils.tensorboard", "torch._dynamo", "thop", "tqdm", "yaml")
PATIENCE_S = 120  # a run that takes longer hangs
TRAINING = "Starting training"
SIGNALS = {signal.SIGINT, signal.SIGTERM}
DISK_BYTES = 4 << 20


# ---------------------------------------------------------------------------------------------------- runs and blows


class Process:
    """A training run in a forked process, at the head of a session of its own; what it says goes to a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        self.log.write_text("")
        self._process = multiprocessing.get_context("fork").Process(target=_train, args=(arguments, log))
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its own answers
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        self.pid = self._process.pid

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """Returns the exit status, negative for a signal; None while the process runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def wait_for(self, words: str = "") -> None:
        """Waits until the process has said this, or anything, or has ended."""
        while self.wait(0.005) is None:
            said = self.said()
            if said and words in said:
                return

    def send(self, number: int, group: bool = False) -> bool:
        """Sends a signal to the process, or to its workers too, as a terminal or a cluster does."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)
        return True

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _train(arguments: list[str], log: Path) -> None:
    """Runs train.py as the command line does."""
    os.setsid()
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Place(NamedTuple):
    """Where a run is and what is done to it."""

    data: Path
    project: Path  # holds the run's folder
    disk: bool = False  # whether `project` is a small file system of its own

    @property
    def run(self) -> Path:
        return self.project / "exp"

    @property
    def view(self) -> Path:
        """Where the run's folder can be seen read-only."""
        return self.project / "view"

    @property
    def last(self) -> Path:
        return self.run / "weights" / "last.pt"

    def has_ended(self) -> bool:
        """Tells whether there is nothing to resume: the checkpoint is stripped."""
        return self.last.exists() and load_checkpoint(self.last)["optimizer"] is None


def kill_worker(process: Process, _place: Place) -> bool:
    """Kills a loader's process, the next one that there is."""
    while process.wait(0.002) is None:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if children:
                os.kill(int(children[-1]), signal.SIGKILL)
                return True
    return False


def fill_disk(process: Process, place: Place) -> bool:
    """Leaves no byte free on the run's disk; without a disk of its own, no file may grow any more."""
    if not place.disk:
        import resource

        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, 1024))
        return True
    with contextlib.suppress(OSError), open(place.project / "ballast", "wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(size))
    return True


def lock_folder(process: Process, place: Place) -> bool:
    """Makes the run's folder read-only, once it is there, by mounting a read-only view of it on itself."""
    while process.wait(0.002) is None:
        if place.run.exists():
            place.view.mkdir(exist_ok=True)
            mount("--bind", place.run, place.view)
            mount("-o", "remount,bind,ro", place.view)
            mount("--bind", place.view, place.run)
            return True
    return False


def unlock_folder(place: Place) -> None:
    for folder in (place.run, place.view):
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: str | Path, check: bool = True) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=check).returncode == 0


def take_images(_process: Process, place: Place) -> bool:
    """Moves the images away, as when a disk is unplugged."""
    (place.data / "images").rename(place.data / "gone")
    return True


class Kind(NamedTuple):
    """A sort of blow."""

    statuses: tuple[int, ...]  # how a run may end; 0: it has come to its end, the blow came too late to matter
    strike: Callable[[Process, Place], bool]  # deals it; False when there is nothing to hit
    mend: Callable[[Place], object] = lambda place: None  # undoes it, so that the run can be resumed
    workers: tuple[int, ...] = (0, 1, 2)  # how many loader's processes the run may have


KINDS = {
    "SIGKILL": Kind((-9, 0), lambda process, _: process.send(signal.SIGKILL)),
    "SIGTERM": Kind((143, 0, -15), lambda process, _: process.send(signal.SIGTERM)),
    "SIGTERM to all": Kind((143, 0, -15), lambda process, _: process.send(signal.SIGTERM, group=True)),
    "SIGINT to all": Kind((130, 0), lambda process, _: process.send(signal.SIGINT, group=True)),
    "full disk": Kind((1, 0), fill_disk, lambda place: (place.project / "ballast").unlink(missing_ok=True)),
    "read-only folder": Kind((1, 0), lock_folder, unlock_folder),
    "images gone": Kind((1, 0), take_images, lambda place: (place.data / "gone").rename(place.data / "images")),
    "worker killed": Kind((1, 0), kill_worker, workers=(1, 2)),
}


# ---------------------------------------------------------------------------------------------------------- promises


def tensors(value: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns all tensors in nested dicts, by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    found = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        found.update(tensors(item, f"{prefix}/{key}"))
    return found


def rows(run: Path) -> list[str]:
    """Returns the rows of results.csv, without its header."""
    csv = run / "results.csv"
    return csv.read_text().splitlines()[1:] if csv.exists() else []


def files(run: Path) -> list[str]:
    """Returns the names of all files of a run but TensorBoard's, of which each start makes one."""
    found = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith("events.out."))


def after_blow(process: Process, place: Place, kind: Kind, status: int, seconds: float) -> Iterator[str]:
    """Yields what is wrong with what a blow has left."""
    said, saved = process.said(), 0
    if "Traceback" in said or "Exception ignored" in said:
        yield "a traceback"
    try:
        ended = place.has_ended()
        if place.last.exists():
            saved = EPOCHS if ended else load_checkpoint(place.last)["epoch"] + 1
    except UserError as error:
        yield str(error)
        return
    if status not in kind.statuses or (status in (0, -15) and not ended):
        yield f"status {status}, {seconds:.2f} s after the blow"
    if len(rows(place.run)) - saved not in (0, 1):  # one: between results.csv and the checkpoint
        yield f"{len(rows(place.run))} epochs on record, {saved} saved"
    if status > 0 and 0 < saved < EPOCHS and TRAINING in said and f"--resume {place.last}" not in said:
        yield "not told how to resume"
    if status > 0 and "train.py: " not in said:
        yield "no message"


def after_end(run: Path, whole: Path) -> Iterator[str]:
    """Yields where a resumed run ended otherwise than an undisturbed one."""
    if files(run) != files(whole):
        yield f"files differ: {sorted(set(files(run)) ^ set(files(whole)))}"
        return
    if rows(run) != rows(whole):
        yield "results.csv differs"
    for name in (f"epoch{EPOCHS - 1}.pt", "best.pt", "last.pt"):
        mine, other = (load_checkpoint(folder / "weights" / name) for folder in (run, whole))
        ours, theirs = tensors(mine), tensors(other)
        different = [key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])]
        if different or ours.keys() != theirs.keys():
            yield f"{name}: {len(different)} of {len(theirs)} tensors differ, such as {different[:2]}"
        for key in ("updates", "schedule", "stopper", "best_fitness"):
            if mine[key] != other[key]:
                yield f"{name}: {key} differs"


# ---------------------------------------------------------------------------------------------------------- campaign


@dataclass
class Tally:
    """What happened to the runs of a kind."""

    runs: int = 0
    blows: int = 0
    unsaved: int = 0  # blows before the first epoch was saved
    missed: int = 0  # runs that had ended before
    slowest_s: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Runs, one after the other, in a temporary folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Makes the data set, the model and the undisturbed run."""
        self.folder, self.moments = folder, random.Random(seed)
        self.data, self.sessions = folder / "shapes", []
        write_data(self.data)
        (folder / "tiny.yaml").write_text(MODEL)
        self.common = ["--cfg", str(folder / "tiny.yaml"), "--data", str(self.data / "shapes.yaml"), *RUN]
        self.whole = Place(self.data, folder / "whole")
        self.preparing_s = self.training_s = 0.0  # how long a run takes to its first batch, and from there
        for _ in range(2):  # the second finds the label cache, as all others will
            shutil.rmtree(self.whole.run, ignore_errors=True)
            process = self.start(self.whole, workers=1)
            if self.measured(process) != 0:
                raise UserError(f"the undisturbed run failed:\n{process.said()}")

    def measured(self, process: Process) -> int | None:
        """Lets an undisturbed run end, and takes its times for the next ones'; returns its status."""
        process.wait_for()
        started = time.monotonic()
        process.wait_for(TRAINING)
        begun = time.monotonic()
        status = process.wait()
        self.preparing_s, self.training_s = begun - started, time.monotonic() - begun
        return status

    def moment_comes(self, process: Process) -> bool:
        """Waits for a random moment, three times in four one of the training; False when the run ends before.

        What happens before the first words is Python's start, and no program's to answer.
        """
        process.wait_for()
        if self.moments.random() < 0.25:
            return process.wait(self.moments.uniform(0, self.preparing_s)) is None
        process.wait_for(TRAINING)
        return process.wait(self.moments.uniform(0, self.training_s)) is None

    def start(self, place: Place, workers: int) -> Process:
        """Starts a run, or goes on with the one that stands there."""
        new = [*self.common, "--project", str(place.project)]
        arguments = ["--resume", str(place.last)] if place.last.exists() else new
        process = Process([*arguments, "--workers", str(workers)], self.folder / "log.txt")
        self.sessions.append(process.pid)
        return process

    def run(self, kind: Kind, place: Place, tally: Tally) -> None:
        """Disturbs a run once, one time in four twice, and lets it end."""
        while not self.strike(kind, place, tally):
            shutil.rmtree(place.run)
        if not place.has_ended() and self.moments.random() < 0.25:
            self.strike(kind, place, tally)
        if not tally.problems and not place.has_ended():
            process = self.start(place, self.moments.choice((0, 1, 2)))
            status = self.measured(process)
            if status != 0:
                tally.problems.append(f"resumed, it ended with status {status}:\n{process.said()[-2000:]}")
        if not tally.problems:
            tally.problems.extend(after_end(place.run, self.whole.run))
        tally.runs += 1

    def strike(self, kind: Kind, place: Place, tally: Tally) -> bool:
        """Starts a run, hits it at a random moment, and looks at what is left; False if it had ended before."""
        process = self.start(place, self.moments.choice(kind.workers))
        if not self.moment_comes(process) or not kind.strike(process, place):
            if process.wait() != 0:
                raise UserError(f"a run that was not disturbed failed:\n{process.said()[-2000:]}")
            tally.missed += 1
            return False
        started = time.monotonic()
        status = process.wait()
        kind.mend(place)
        seconds = time.monotonic() - started
        if status is None:
            process.send(signal.SIGKILL, group=True)
            problems = [f"still running after {PATIENCE_S} s"]
        else:
            tally.blows += 1
            tally.statuses[status] += 1
            tally.unsaved += not place.last.exists()
            tally.slowest_s = max(tally.slowest_s, seconds)
            problems = after_blow(process, place, kind, status, seconds)
        tally.problems.extend(f"{problem}:\n{process.said()[-2000:]}" for problem in problems)
        return True


def living(sessions: set[int], patience_s: float = 0) -> list[int]:
    """Returns the processes of these sessions that are no zombies, once they had some time to end."""
    until = time.monotonic() + patience_s
    while True:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _parent, _group, session = stat.read_text().rpartition(")")[2].split()[:4]
                found += [int(stat.parent.name)] if int(session) in sessions and state != "Z" else []
        if not found or time.monotonic() >= until:
            return found
        time.sleep(0.05)


def write_data(root: Path) -> None:
    """Writes a few images of the embedded data set, with a data set YAML."""
    for split, count in zip(SPLITS, IMAGES, strict=True):
        for kind in ("images", "labels"):
            (root / kind / split.name).mkdir(parents=True)
        for index in range(count):
            scene = scene_of(split, index)
            cv2.imwrite(str(root / "images" / split.name / f"{index}.jpg"), cv2.resize(scene.image, (96, 96)))
            (root / "labels" / split.name / f"{index}.txt").write_text(label_text(scene))
    names = "names: [circle, square, triangle, star]"
    (root / "shapes.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\n{names}\n")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small file system on `folder`, where that is allowed; tells whether it was."""
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder, check=False)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def campaign(folder: Path, options: argparse.Namespace) -> bool:
    """Goes through all runs and prints what happened; returns whether every promise was kept."""
    started = time.monotonic()
    with small_disk(folder / "disk") as mounted:
        kinds = [name for name in options.kinds if mounted or name != "read-only folder"]
        print(f"disk that fills: {'tmpfs' if mounted else 'RLIMIT_FSIZE'}; seed {options.seed}")
        for name in sorted(set(options.kinds) - set(kinds)):
            print(f"{name}: skipped, for mounting is not allowed here")
        runs = Campaign(folder, options.seed)
        print(f"an undisturbed run takes {runs.preparing_s:.2f} + {runs.training_s:.2f} s", flush=True)
        tallies = {name: Tally() for name in kinds}
        for number in range(options.count):
            name = kinds[number % len(kinds)]
            disk = name == "full disk" and mounted
            place = Place(runs.data, folder / ("disk" if disk else f"run{number}"), disk)
            before = len(tallies[name].problems)
            runs.run(KINDS[name], place, tallies[name])
            for problem in tallies[name].problems[before:]:
                print(f"run {number}, {name}: {problem}", flush=True)
            shutil.rmtree(place.run, ignore_errors=True)
        leftover = len(living(set(runs.sessions), patience_s=10))
    print(f"\n{'blow':<18}  runs  blows  unsaved  too late  slowest  problems  statuses")
    for name, tally in tallies.items():
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(tally.statuses.items()))
        figures = f"{tally.runs:6}{tally.blows:7}{tally.unsaved:9}{tally.missed:10}{tally.slowest_s:7.1f} s"
        print(f"{name:<18}{figures}{len(tally.problems):10}  {statuses}")
    problems = sum(len(tally.problems) for tally in tallies.values())
    print(f"all: {options.count} runs, {sum(tally.blows for tally in tallies.values())} blows, {problems} problems")
    print(f"{time.monotonic() - started:.0f} s; {leftover} processes left over; torch {torch.__version__}")
    return not leftover and not problems


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("interruptions.py", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the numbers of workers")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="blows, in turn")
    return parser


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    sys.modules["tensorflow"] = None  # TensorBoard would import it, and what it starts does not survive a fork
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="interruptions-") as folder:
        if not campaign(Path(folder).resolve(), options):
            raise ReportedError("promises were broken")


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
