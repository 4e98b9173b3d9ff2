"""Kills a training run again and again and shows what is lost: at most the running epoch, and not one bit of the end.

Trains a small model on the embedded data set twice: once undisturbed, once killed (SIGKILL) at random moments and
resumed each time, with another number of workers. After every kill the last checkpoint must open and hold every epoch
that results.csv had before it; at the end all tensors, optimizer included, must be equal.

    python benchmarks/interruptions.py --kills 10
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.checkpoint import load_checkpoint  # noqa: E402 - the path above comes first

TRAIN = [sys.executable, str(ROOT / "train.py")]
RUN = ["--cfg", "yolov5n-slimneck.yaml", "--img", "64", "--batch-size", "32", "--amp", "off", "--noplots"]


def finished_epochs(run: Path) -> int:
    """Returns how many epochs results.csv has on record."""
    csv = run / "results.csv"
    return max(len(csv.read_text().splitlines()) - 1, 0) if csv.exists() else 0


def saved_epochs(run: Path) -> int:
    """Returns how many epochs the last checkpoint holds; it must open."""
    last = run / "weights" / "last.pt"
    return load_checkpoint(last)["epoch"] + 1 if last.exists() else 0


def tensors(value: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns all tensors in nested dicts, by path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    found = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        found.update(tensors(item, f"{prefix}/{key}"))
    return found


def killed_run(command: list[str], seconds: float) -> bool:
    """Runs a command and kills it after so many seconds; returns whether it was still running."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def main() -> None:
    """Runs the campaign; exits with status 1 at the first promise that does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seconds", type=float, nargs=2, default=[4, 9], help="when to kill, start-up included")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        last_epoch = f"epoch{options.epochs - 1}.pt"
        common = [*RUN, "--epochs", str(options.epochs), "--save-period", "1", "--project", folder]
        subprocess.run([*TRAIN, *common, "--name", "whole"], check=True, stderr=subprocess.DEVNULL)
        run, kills = Path(folder) / "killed", 0
        command = [*TRAIN, *common, "--name", "killed", "--exist-ok"]
        while kills < options.kills:
            moment = moments.uniform(*options.seconds)
            if not killed_run(command, moment):
                sys.exit(f"the run ended after {kills} kills: more --epochs are needed for {options.kills}")
            kills += 1
            saved, on_record = saved_epochs(run), finished_epochs(run)
            print(f"kill {kills:2d} after {moment:5.1f} s: {on_record} epochs on record, {saved} saved")
            if on_record - saved not in (0, 1):  # one: between results.csv and the checkpoint
                sys.exit("more than the running epoch was lost")
            if saved:
                resume = ["--resume", str(run / "weights" / "last.pt"), "--workers", str(kills % 3)]
                command = [*TRAIN, *resume]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        whole, other = (
            tensors(load_checkpoint(Path(folder) / name / "weights" / last_epoch)) for name in ("whole", "killed")
        )
        different = [name for name, tensor in whole.items() if not torch.equal(tensor, other[name])]
        leftovers = list(Path(folder).rglob("*.tmp"))
        print(f"{kills} kills; {len(different)} of {len(whole)} tensors differ; {len(leftovers)} temporaries left")
        if different or leftovers or whole.keys() != other.keys():
            sys.exit("the interrupted run did not end as the undisturbed one")


if __name__ == "__main__":
    main()
