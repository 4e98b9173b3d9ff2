"""What ends a run before its time is told in words, with what is saved and how to go on; nothing half-written stays.

Signals to whole commands are in test_train.py; benchmarks/interruptions.py does all of this at random moments.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from utils.checkpoint import load_checkpoint
from utils.checks import UserError
from utils.data.labels import load_labels
from utils.train.callbacks import Callbacks

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
nc: 4
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[6, 8, 12, 10, 16, 20], [20, 28, 32, 24, 40, 44]]
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, GSConv, [32, 3, 2]]]
head: [[-1, 1, GSConv, [32, 3, 2]], [[2, 3], 1, Detect, [nc, anchors]]]
"""


@pytest.fixture
def options(tiny_shapes, tmp_path) -> dict:
    """Keywords of a run of a small model on a copy of the data."""
    (tmp_path / "tiny.yaml").write_text(MODEL)
    data = tmp_path / "data.yaml"
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).symlink_to(tiny_shapes.parent / kind / split)
    data.write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n"
    )
    keywords = {"cfg": str(tmp_path / "tiny.yaml"), "data": str(data), "imgsz": 64, "batch_size": 8, "amp": "off"}
    keywords |= {"device": "cpu", "epochs": 3, "noplots": True, "noautoanchor": True, "project": str(tmp_path)}
    return {**keywords, "workers": 0}


def calling(**hooks) -> Callbacks:
    callbacks = Callbacks()
    for name, hook in hooks.items():
        callbacks.register_action(name, callback=hook)
    return callbacks


def test_a_killed_loader_process_is_told_with_what_to_do(options, tmp_path):
    def kill(iteration, *_):
        if iteration == 4:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    words = (
        r"^a worker process was killed.*--batch-size 8, --imgsz 64, --workers 2\. .*fewer --workers.*Epoch 0 is saved"
    )
    with pytest.raises(UserError, match=words + r"\. Go on with: python train.py --resume .*last\.pt"):
        train.run(calling(on_train_batch_end=kill), **{**options, "workers": 2, "epochs": 9})
    assert load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["epoch"] == 0


def test_images_that_vanish_are_named_and_the_run_goes_on_when_they_are_back(options, tmp_path):
    train.run(**options, name="whole")
    images, gone = tmp_path / "images" / "val", tmp_path / "gone"

    def take(last, epoch, *_):
        if epoch == 1:
            images.rename(gone)

    with pytest.raises(
        UserError, match=r"images/val/\d\.jpg: .*put it back.*Epoch 1 is saved\. Go on with: .*--resume"
    ):
        train.run(calling(on_model_save=take), **options)
    gone.rename(images)
    run = tmp_path / "exp"
    stale = [run / ".hyp.yaml.0123abcd.tmp", run / "weights" / ".last.pt.0123abcd.tmp"]  # of a killed process
    for path in stale:
        path.write_text("half")
    train.run(resume=str(run / "weights" / "last.pt"))
    assert (run / "results.csv").read_text() == (tmp_path / "whole" / "results.csv").read_text()
    assert not any(path.exists() for path in stale)


def test_a_full_disk_keeps_the_former_checkpoint_and_says_how_to_go_on(options, tmp_path, monkeypatch):
    """The disk takes the first epoch and nothing after it."""
    synchronise = os.fsync

    def fill(last, epoch, *_):
        monkeypatch.setattr(os, "fsync", refuse)

    def refuse(handle):
        if "weights" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronise(handle)

    words = r"(best|last)\.pt: cannot be written \(No space left on device\).*Epoch 0 is saved\. Go on with: .*--resume"
    with pytest.raises(UserError, match=words):
        train.run(calling(on_model_save=fill), **options)
    assert load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["epoch"] == 0
    assert not list((tmp_path / "exp").rglob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(options, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def refuse(path, *arguments, **keywords):
        if path.name == "weights":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"exp/weights: cannot be used \(Read-only file system\)"):
        train.run(**options)


def test_processes_that_build_one_label_cache_at_once_end_well(tiny_shapes, tmp_path):
    """Each finds all labels, one cache is left that holds, and nothing half-written beside it."""
    shutil.copytree(tiny_shapes.parent, tmp_path / "set", ignore=shutil.ignore_patterns("*.npz"))
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    together, answers = context.Barrier(4), context.Queue()
    arguments = (tmp_path / "set" / "images" / "train", together, answers)
    processes = [context.Process(target=scan_at_once, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    table = load_labels([arguments[0]])
    assert found == [(24, table.rows.tolist())] * 4
    assert [path.name for path in (tmp_path / "set" / "labels").iterdir() if path.is_file()] == ["train.cache.npz"]


def scan_at_once(images, together, answers):
    for _ in range(5):
        together.wait()
        table = load_labels([images])
        answer = len(table), table.rows.tolist()
        together.wait()
        (images.parents[1] / "labels" / "train.cache.npz").unlink(missing_ok=True)
    together.wait()
    load_labels([images])
    answers.put(answer)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems limit memory in other ways")
def test_memory_that_really_runs_out_names_the_sizes(options):
    """The process may take 400 MB more than it has once everything is imported."""
    script = """
import json, resource, sys
import torch._dynamo, train, models.yolo, utils.train.engine
from utils.checks import UserError
from utils.data.labels import load_labels
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400_000_000,) * 2)
try:
    train.run(**json.loads(sys.argv[1]))
except UserError as error:
    print(error)
"""
    arguments = json.dumps({**options, "imgsz": 1600, "batch_size": 16})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout.startswith("out of memory"), done.stderr
    assert "--batch-size 16, --imgsz 1600, --workers 0. Lower --batch-size or --imgsz" in done.stdout
    assert "No epoch was finished" in done.stdout


@pytest.mark.slow
def test_sigterm_closes_detects_videos_and_exits_143(weights, tmp_path):
    source = tmp_path / "long.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 64))
    for _ in range(3000):
        writer.write(np.full((64, 64, 3), 90, np.uint8))
    writer.release()
    arguments = ["--weights", weights, "--source", source, "--img", 64, "--project", tmp_path, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "detect.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if "(20/3000)" in line:
            break
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert stderr.endswith(f"detect.py: ended by SIGTERM. Results so far are in {tmp_path / 'exp'}\n")
    video = cv2.VideoCapture(str(tmp_path / "exp" / "long.mp4"))
    assert 1 <= video.get(cv2.CAP_PROP_FRAME_COUNT) < 3000 and video.read()[0]
