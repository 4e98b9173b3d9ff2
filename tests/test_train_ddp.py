"""Several processes train as one: they follow a single process, write once, and end together whatever happens.

Rank 0 is this process, so that its losses and errors can be looked at; rank 1 is a helper process that stays for all
tests. One test goes through torch.distributed.run.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

import train
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint
from utils.cli import ReportedError
from utils.dataloaders.labels import load_labels
from utils.dataloaders.sampling import epoch_order
from utils.errors import UserError
from utils.loss import ComputeLoss

ROOT = Path(__file__).resolve().parents[1]
HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"
SMALL = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 16, "amp": "off", "device": "cpu", "workers": 0}
HELPER = """
import json, os, sys
from torch import nn
import train
from utils.errors import UserError

for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job["environment"])
    if job["still"]:
        nn.BatchNorm2d.train = lambda module, mode=True: nn.Module.train(module, False)
    try:
        train.run(**job["options"])
        answer = "done"
    except UserError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
        sys.exit(1)  # as a command does: by the end of its connections the other process notices
    if job["still"]:
        del nn.BatchNorm2d.train
    print(json.dumps(answer), flush=True)
"""


class Helper:
    """Runs train.run as one of two processes, in a process of its own."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", HELPER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def start(self, environment: dict, options: dict, still: bool = False) -> None:
        self.process.stdin.write(json.dumps({"environment": environment, "options": options, "still": still}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def helper():
    running = Helper()
    yield running
    running.close()


@pytest.fixture
def launch(monkeypatch):
    """Returns the environments of two ranks that meet here, after giving this process one of them."""

    def settle(own_rank: int = 0) -> dict:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        for name, value in environments[own_rank].items():
            monkeypatch.setenv(name, value)
        return environments[1 - own_rank]

    return settle


def tensors_of(value: dict) -> dict[str, torch.Tensor]:
    leaves = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def few_images(tiny_shapes: Path, folder: Path, count: int) -> Path:
    """A data set YAML of the first `count` training images."""
    images = sorted((tiny_shapes.parent / "images" / "train").glob("*.jpg"))[:count]
    (folder / "few.txt").write_text("\n".join(map(str, images)))
    yaml = folder / "few.yaml"
    names = "[circle, square, triangle, star]"
    yaml.write_text(f"path: {folder}\ntrain: few.txt\nval: {tiny_shapes.parent}/images/val\nnames: {names}\n")
    return yaml


@pytest.fixture
def still(monkeypatch):
    """Keeps batch norm to its running statistics: over 8 and over 16 images it would reckon with different ones."""
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda module, mode=True: nn.Module.train(module, False))


@pytest.fixture
def figures(monkeypatch) -> list:
    """Collects what every training batch costs: three items, labels."""
    seen, call = [], ComputeLoss.compute

    def noting(self, *arguments):
        result = call(self, *arguments)
        if result.total.requires_grad:
            seen.append([*result.items.tolist(), result.labels])
        return result

    monkeypatch.setattr(ComputeLoss, "compute", noting)
    return seen


VARIANTS = {
    "17 images in one memory: the last batch leaves rank 1 none of its own": {"batch_size": 16, "cache": "ram"},
    "AdamW, WIoU; batches of 6, and 5 in the end": {"batch_size": 6, "optimizer": "AdamW", "box_loss": "wiou"},
    "fours and sizes": {"batch_size": 16, "quad": True, "multi_scale": True, "imgsz": 96},
}


@pytest.mark.parametrize("switches", VARIANTS.values(), ids=VARIANTS)
def test_two_processes_follow_one(switches, helper, launch, still, figures, tiny_shapes, tmp_path):
    """In float32: every step's losses within 1e-6; after all steps weights within 1e-5 and optimizer within 1e-4.

    All relative, weights and optimizer by the norm of each tensor; SGD's memory is made of all steps' gradients.
    """
    data = few_images(tiny_shapes, tmp_path, 17)
    options = {**SMALL, "data": str(data), "epochs": 3, "save_period": 1, "noplots": True, "noval": True, **switches}
    options["project"] = str(tmp_path)
    train.run(**options, name="one")
    expected = list(figures)
    figures.clear()
    helper.start(launch(), {**options, "name": "two"}, still=True)
    train.run(**options, name="two")
    assert helper.answer() == "done"
    assert len(expected) == 3 * -(-17 // options["batch_size"])
    for row, wanted in zip(figures, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    one, two = (load_checkpoint(tmp_path / name / "weights" / "epoch2.pt") for name in ("one", "two"))
    for key, tolerance in (("model", 1e-5), ("ema", 1e-5), ("optimizer", 1e-4)):
        first, second = tensors_of(one[key]), tensors_of(two[key])
        assert first.keys() == second.keys() and len(first) > 200
        for name, value in first.items():
            distance = (value.double() - second[name].double()).norm()
            assert distance <= tolerance * value.double().norm(), f"{key} {name}"
    assert (tmp_path / "two" / "results.csv").read_text().count("\n") == 4


def test_a_resumed_run_ends_with_the_same_bits(helper, launch, more_weights, tiny_shapes, tmp_path):
    options = {**SMALL, "data": str(tiny_shapes), "epochs": 3, "save_period": 1, "project": str(tmp_path), "name": "a"}
    options.update(noplots=True, noval=True, cache="ram", teacher=str(more_weights(tmp_path / "t.pt", {0: "cat"})))
    helper.start(launch(), options)
    train.run(**options)
    assert helper.answer() == "done"
    middle = tmp_path / "b" / "weights" / "last.pt"
    middle.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "weights" / "epoch1.pt", middle)
    helper.start(launch(), {"resume": str(middle)})
    train.run(resume=str(middle))
    assert helper.answer() == "done"
    whole, resumed = (load_checkpoint(tmp_path / name / "weights" / "epoch2.pt") for name in ("a", "b"))
    for key in ("model", "ema", "optimizer"):
        first, second = tensors_of(whole[key]), tensors_of(resumed[key])
        assert first.keys() == second.keys()
        assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert whole["schedule"] == resumed["schedule"] and whole["stopper"] == resumed["stopper"]


def test_early_stopping_ends_all(helper, launch, tiny_shapes, tmp_path, monkeypatch):
    from utils.eval.evaluate import EvalResult

    fitnesses = iter([0.5, 0.1, 0.1, 0.1])
    monkeypatch.setattr(EvalResult, "fitness", property(lambda self: next(fitnesses)))
    options = {**SMALL, "data": str(tiny_shapes), "epochs": 9, "patience": 1, "noplots": True, "project": str(tmp_path)}
    helper.start(launch(), options)
    train.run(**options)
    assert helper.answer() == "done"
    assert (tmp_path / "exp" / "results.csv").read_text().count("\n") == 1 + 2  # the best, and one without gain


def test_the_first_process_alone_finds_how_many_epochs_fit_into_hours(helper, launch, tiny_shapes, tmp_path):
    options = {**SMALL, "data": str(tiny_shapes), "epochs": 9, "hours": 0.0, "noplots": True, "project": str(tmp_path)}
    helper.start(launch(own_rank=1), options)
    assert train.run(**options).epochs == 1
    assert helper.answer() == "done"
    assert (tmp_path / "exp" / "results.csv").read_text().count("\n") == 1 + 1


def test_a_callback_of_the_first_process_stops_all(helper, launch, tiny_shapes, tmp_path):
    callbacks, seen = Callbacks(), []

    def after_batch(iteration, model, images, targets, paths, plots, sync_bn):
        seen.append((iteration, len(images), len(paths), sync_bn))
        callbacks.stop_training = True

    callbacks.register_action("on_train_batch_end", callback=after_batch)
    options = {**SMALL, "data": str(tiny_shapes), "epochs": 2, "noplots": True, "project": str(tmp_path)}
    helper.start(launch(), options)
    train.run(callbacks, **options)
    assert helper.answer() == "done"
    assert seen == [(0, 8, 8, False)]
    assert not dist.is_initialized()


def test_a_mistake_met_by_rank_1_alone_ends_all_and_is_told_once(launch, tiny_shapes, tmp_path):
    """An image that only rank 1 reads is damaged after the scan."""
    helper = Helper()
    shutil.copytree(tiny_shapes.parent, tmp_path / "shapes")
    data = tmp_path / "shapes" / tiny_shapes.name
    table = load_labels([tmp_path / "shapes" / "images" / "train"])
    ninth = Path(table.image_paths[epoch_order(24, seed=0, epoch=0)[8]])
    callbacks = Callbacks()
    callbacks.register_action("on_pretrain_routine_end", callback=lambda: ninth.write_bytes(b"no image"))
    (tmp_path / "hyp.yaml").write_text(re.sub("(?m)^mosaic:.*", "mosaic: 0.0", HYP.read_text()))
    options = {**SMALL, "data": str(data), "hyp": str(tmp_path / "hyp.yaml"), "epochs": 1, "noplots": True}
    options["project"] = str(tmp_path)
    helper.start(launch(), options)
    with pytest.raises(ReportedError):  # prints nothing
        train.run(callbacks, **options)
    assert helper.answer().startswith(f"UserError: {ninth}: ")
    assert helper.process.wait(20) == 1
    helper.close()
    assert not dist.is_initialized()


@pytest.mark.parametrize("own_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_with_a_message(own_rank, launch, tiny_shapes, tmp_path, monkeypatch):
    victim, calls, call = Helper(), [], ComputeLoss.compute

    def killing(self, outputs, targets, pool=None):
        if pool:
            calls.append(1)
            if len(calls) == 4:  # the second batch of the second epoch
                victim.process.send_signal(signal.SIGKILL)
        return call(self, outputs, targets, pool)

    monkeypatch.setattr(ComputeLoss, "compute", killing)
    options = {**SMALL, "data": str(tiny_shapes), "epochs": 9, "noplots": True, "noval": True, "project": str(tmp_path)}
    victim.start(launch(own_rank), options)
    words = rf"the process of rank {1 - own_rank} has ended.* killed.*Epoch 0 is saved.*torch\.distributed\.run "
    with pytest.raises(UserError, match=words + r"--nproc_per_node 2 train\.py --resume .*last\.pt"):
        train.run(**options)
    assert victim.process.wait(10) == -signal.SIGKILL
    victim.close()


def launched(module: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_torchrun_writes_and_tells_everything_once(tiny_shapes, tmp_path):
    arguments = ["--cfg", "yolov5n-slimneck.yaml", "--img", 64, "--device", "cpu", "--workers", 1, "--epochs", 1]
    done = launched("torch.distributed.run", *arguments, "--data", tiny_shapes, "--project", tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("Starting training for 1 epochs", "Model Summary", "1 epochs completed", "Results saved to"):
        assert done.stderr.count(line) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]
    names = {path.name for path in (tmp_path / "exp").rglob("*") if path.is_file()}
    assert {"opt.yaml", "hyp.yaml", "results.png", "train_batch0.jpg", "labels.jpg", "best.pt", "last.pt"} <= names
    rows = (tmp_path / "exp" / "results.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [0]
    assert len(list((tmp_path / "exp").glob("events.*"))) == 1


@pytest.mark.slow
def test_the_legacy_launcher_passes_local_rank_and_a_mistake_is_told_once(tiny_shapes, tmp_path):
    done = launched("torch.distributed.launch", "--cfg", "yolov5n.yaml", "--batch-size", 15, "--project", tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("train.py: error: --batch-size 15 is of all 2 processes together") == 1, done.stderr
    assert "unrecognized arguments" not in done.stderr
    assert not list(tmp_path.iterdir())
