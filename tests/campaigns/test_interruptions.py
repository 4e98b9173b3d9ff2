"""What ends a run before its time is told in words, with what is saved and how to go on; nothing half-written stays.

Signals to whole commands are in test_train.py; interruptions.py does all of this at random moments.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from tests.campaigns.interruptions import living
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint
from utils.dataloaders.labels import load_labels, scan_chunk
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.process import process_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def options(tiny_shapes, tiny_cfg, tmp_path) -> dict:
    """Keywords of a run of a small model on a copy of the data."""
    data = tmp_path / "data.yaml"
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).symlink_to(tiny_shapes.parent / kind / split)
    data.write_text(
        f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n"
    )
    keywords = {"cfg": str(tiny_cfg), "data": str(data), "imgsz": 64, "batch_size": 8, "amp": "off"}
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

    words = r"^a worker process was killed.*--batch-size 8, --imgsz 64, --workers 2\. .*fewer --workers.*"
    with pytest.raises(UserError, match=words + r"Go on with: python train.py --resume .*last\.pt") as error:
        train.run(calling(on_train_batch_end=kill), **{**options, "workers": 2, "epochs": 9})
    saved = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["epoch"]
    assert f"Epoch {saved} is saved" in str(error.value)  # what was read ahead may suffice for some more
    assert saved < 8


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_kill_while_last_pt_is_written_leaves_nothing_once_resumed(options, tmp_path):
    """A process of its own is killed when half of the second epoch's last.pt is on disk."""
    script = """
import io, json, os, signal, sys
import torch, train
save = torch.save
def half(content, path):
    if content["epoch"] != 1 or ".last.pt." not in path.name:
        return save(content, path)
    save(content, whole := io.BytesIO())
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
train.run(**json.loads(sys.argv[1]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, json.dumps(options)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    weights = tmp_path / "exp" / "weights"
    (half,) = weights.glob("*.tmp")
    assert half.name.startswith(".last.pt.") and half.stat().st_size > 1000
    assert load_checkpoint(weights / "last.pt")["epoch"] == 0
    train.run(resume=str(weights / "last.pt"))
    assert sorted(path.name for path in weights.iterdir()) == ["best.pt", "last.pt"]
    assert len((tmp_path / "exp" / "results.csv").read_text().splitlines()) == 1 + options["epochs"]


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


@pytest.fixture
def long_scan(tiny_shapes, tmp_path) -> Path:
    """A data set YAML whose labels take two processes seconds: images that must be decoded, each listed often."""
    root = tmp_path / "set"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for index in range(24):
        image = cv2.imread(str(tiny_shapes.parent / "images" / "train" / f"{index}.jpg"))
        cv2.imwrite(str(root / "images" / f"{index}.webp"), cv2.resize(image, (96, 96)))
        shutil.copy(tiny_shapes.parent / "labels" / "train" / f"{index}.txt", root / "labels")
    (root / "train.txt").write_text("".join(f"./images/{number % 24}.webp\n" for number in range(12_000)))
    (root / "data.yaml").write_text("path: .\ntrain: train.txt\nval: train.txt\nnames: [a, b, c, d]\n")
    return root / "data.yaml"


def wait_for_scan(process: subprocess.Popen, log: Path) -> None:
    """Waits until two workers are at the labels."""
    until = time.monotonic() + 240
    while "images and labels..." not in log.read_text() or len(living({process.pid})) < 3:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)
    time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked for in /proc")
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGKILL, "")]
)
def test_a_scan_of_labels_that_is_ended_leaves_nothing(number, words, options, long_scan, tmp_path):
    """Signals go to the whole group, as terminals and clusters send them; SIGKILL hits the main process alone."""
    line = [sys.executable, str(ROOT / "train.py"), "--cfg", options["cfg"], "--data", str(long_scan), "--img", "64"]
    line += ["--workers", "2", "--device", "cpu", "--project", str(tmp_path / "runs"), "--noplots"]
    environment, log = {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(line, env=environment, stderr=file, start_new_session=True)
    try:
        wait_for_scan(process, log)
        assert len(living({process.pid})) == 3, log.read_text()
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        started = time.monotonic()
        status = process.wait(timeout=60)
        assert time.monotonic() - started < 10
        assert not living({process.pid}, patience_s=5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert status == (-number if number == signal.SIGKILL else 128 + number), log.read_text()
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    bar = next(index for index, line in enumerate(lines) if "images and labels..." in line)
    said = [line for line in lines[bar:] if "/12000 [" not in line]  # without the bar
    assert said == ([f"train.py: {words}."] if words else [])
    assert sorted(path.name for path in long_scan.parent.iterdir()) == ["data.yaml", "images", "labels", "train.txt"]


@pytest.mark.slow
def test_a_scan_after_one_that_was_ended_finds_all_labels(long_scan):
    """Here Ctrl-C comes between two results; the processes do no more than the image that they are at."""
    source = long_scan.with_name("train.txt")
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:3000]))
    images = list_images([source])
    parts = process_map(scan_chunk, [images[start : start + 500] for start in range(0, len(images), 500)], 2)
    next(parts)
    started = time.monotonic()
    parts.close()
    ended = time.monotonic()
    table = load_labels([source], workers=2)
    assert len(table) == table.counts.found == 3000
    assert ended - started < (time.monotonic() - ended) / 4  # half of the images were handed out
    assert source.with_name("train.cache.npz").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems limit memory in other ways")
def test_memory_that_really_runs_out_names_the_sizes(options):
    """The process may take 400 MB more than it has once everything is imported."""
    script = """
import json, resource, sys
import torch._dynamo, train, models.yolo, utils.train.engine
from utils.errors import UserError
from utils.dataloaders.labels import load_labels
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
    for _ in range(1000):
        writer.write(np.full((64, 64, 3), 90, np.uint8))
    writer.release()
    arguments = ["--weights", weights, "--source", source, "--img", 64, "--project", tmp_path, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "detect.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if "(20/1000)" in line:
            break
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert stderr.endswith(f"detect.py: ended by SIGTERM. Results so far are in {tmp_path / 'exp'}\n")
    video = cv2.VideoCapture(str(tmp_path / "exp" / "long.mp4"))
    assert 1 <= video.get(cv2.CAP_PROP_FRAME_COUNT) < 1000 and video.read()[0]
