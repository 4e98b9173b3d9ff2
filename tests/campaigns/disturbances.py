"""Training runs in forked processes, and the ways to disturb them, for `interruptions.py`.

Linux only. The disk that fills is a small tmpfs where mounting is allowed, else a limit to the size of files; a folder
becomes read-only by a mount.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120  # a run that takes longer hangs
TRAINING = "Starting training"
SIGNALS = {signal.SIGINT, signal.SIGTERM}
DISK_BYTES = 4 << 20


class Process:
    """A training run in a forked process, at the head of a session of its own; what it says goes to a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        """Starts `train.py` with `arguments`."""
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

    def workers(self) -> list[int]:
        """Returns the loaders' processes."""
        with contextlib.suppress(OSError):
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return []

    def said(self) -> str:
        """Returns what the process printed so far."""
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


@dataclass
class Place:
    """Where a run is and what is done to it.

    Attributes:
        data: the data set's folder.
        project: holds the run's folder.
        disk: whether `project` is a small file system of its own.
    """

    data: Path
    project: Path
    disk: bool = False

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.project / "exp"

    @property
    def view(self) -> Path:
        """Where the run's folder can be seen read-only."""
        return self.project / "view"

    @property
    def last(self) -> Path:
        """The checkpoint that a run is resumed from."""
        return self.run / "weights" / "last.pt"


class Kind(NamedTuple):
    """A sort of blow.

    Attributes:
        strike: deals it, to a process and its place; returns False when there is nothing to hit.
        mend: undoes it, so that the run can be resumed.
        statuses: how a run may end; 0, of a run that has come to its end, where the blow came too late to matter.
        workers: how many loader's processes the run may have.
    """

    strike: Callable[[Process, Place], bool]
    mend: Callable[[Place], None]
    statuses: tuple[int, ...]
    workers: tuple[int, ...] = (0, 1, 2)


def sending(number: signal.Signals, group: bool = False) -> Callable[[Process, Place], bool]:
    """Returns what sends a signal to the process, or to its workers too, as a terminal or a cluster does."""

    def strike(process: Process, _place: Place) -> bool:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)
        return True

    return strike


def kill_worker(process: Process, _place: Place) -> bool:
    """Kills a loader's process, the next one that there is."""
    while process.wait(0.002) is None:
        workers = process.workers()
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[-1], signal.SIGKILL)
            return True
    return False


def fill_disk(process: Process, place: Place) -> bool:
    """Leaves no byte free on the run's disk; without a disk of its own, no file may grow any more."""
    if not place.disk:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, 1024))
        return True
    with contextlib.suppress(OSError), open(place.project / "ballast", "wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(size))
    return True


def empty_disk(place: Place) -> None:
    """Makes room again."""
    (place.project / "ballast").unlink(missing_ok=True)


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
    """Makes it writable again."""
    for folder in (place.run, place.view):
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: str | Path, check: bool = True) -> bool:
    """Calls the system's command of this name; tells whether it succeeded."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=check).returncode == 0


def take_images(_process: Process, place: Place) -> bool:
    """Moves the images away, as when a disk is unplugged."""
    (place.data / "images").rename(place.data / "gone")
    return True


def bring_images(place: Place) -> None:
    """Brings them back."""
    (place.data / "gone").rename(place.data / "images")


def nothing(_place: Place) -> None:
    """There is nothing to mend."""


KINDS = {
    "SIGKILL": Kind(sending(signal.SIGKILL), nothing, (-9, 0)),
    "SIGTERM": Kind(sending(signal.SIGTERM), nothing, (143, 0, -15)),
    "SIGTERM to all": Kind(sending(signal.SIGTERM, group=True), nothing, (143, 0, -15)),
    "SIGINT to all": Kind(sending(signal.SIGINT, group=True), nothing, (130, 0)),
    "full disk": Kind(fill_disk, empty_disk, (1, 0)),
    "read-only folder": Kind(lock_folder, unlock_folder, (1, 0)),
    "images gone": Kind(take_images, bring_images, (1, 0)),
    "worker killed": Kind(kill_worker, nothing, (1, 0), workers=(1, 2)),
}


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
