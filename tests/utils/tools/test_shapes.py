"""The embedded data set on disk: complete, reproducible, and whole after any interruption."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from utils.errors import UserError
from utils.tools import shapes
from utils.tools.shapes import NAMES, render_scene

ROOT = Path(__file__).resolve().parents[3]
PINNED_ROWS, PINNED_FIRST_ROW = 1159, (1, 0.962109, 0.442578, 0.074219, 0.071094)
FOLDERS = ("images/train", "images/val", "labels/train", "labels/val")


def difference(first, second):
    """Mean difference of two pictures (h, w, 3) with the noise averaged out, which JPEG cannot keep."""
    return np.abs(cv2.blur(first, (9, 9)).astype(int) - cv2.blur(second, (9, 9))).mean()


def files_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def full_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded") / "shapes"
    started = time.process_time()
    shapes.render(root)
    assert time.process_time() - started < 20, "seconds of CPU time"
    return root


@pytest.fixture
def tiny_splits(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", (shapes.Split("train", 4, 1), shapes.Split("val", 2, 2)))


def test_counts_and_sizes(full_set):
    for split, count in (("train", 300), ("val", 60)):
        images = sorted((full_set / "images" / split).iterdir())
        labels = sorted((full_set / "labels" / split).iterdir())
        assert len(images) == count and [p.stem for p in images] == [p.stem for p in labels]
        assert cv2.imread(str(images[0])).shape == (320, 320, 3)
        assert 0 < sum(path.stat().st_size == 0 for path in labels) < 0.1 * count, "some backgrounds, not many"
    assert [path.name for path in full_set.parent.iterdir()] == ["shapes"], "no temporary folder is left"


def test_label_lines_are_valid_and_pinned(full_set):
    rows = [
        [float(cell) for cell in line.split()]
        for path in sorted((full_set / "labels" / "train").iterdir())
        for line in path.read_text().splitlines()
    ]
    table = np.array(rows)
    assert table.shape[1] == 5 and set(table[:, 0]) == set(range(len(NAMES)))
    low, high = table[:, 1:3] - table[:, 3:] / 2, table[:, 1:3] + table[:, 3:] / 2
    assert low.min() >= -1e-6 and high.max() <= 1 + 1e-6 and table[:, 3:].min() > 0
    # Another data set would silently change every figure that was measured on this one.
    assert len(table) == PINNED_ROWS
    np.testing.assert_allclose(table[0], PINNED_FIRST_ROW, atol=2e-3)


def test_files_hold_the_scenes(full_set):
    scene = shapes.scene_of(shapes.SPLITS[1], 11)
    stored = cv2.imread(str(full_set / "images" / "val" / "0011.jpg"))
    assert difference(stored, scene.image) < 1
    assert (full_set / "labels" / "val" / "0011.txt").read_text() == shapes.label_text(scene)


def test_label_text_of_a_worked_out_box():
    # x 32..96 of 320: centre 64/320 = 0.2, width 64/320 = 0.2; y 0..80 of 160: centre 0.25, height 0.5.
    scene = shapes.Scene(None, np.array([2]), np.array([[32.0, 0.0, 96.0, 80.0]]), np.zeros((160, 320), np.int16))
    assert shapes.label_text(scene) == "2 0.200000 0.250000 0.200000 0.500000\n"


def test_two_renderings_are_the_same_bytes(tmp_path, tiny_splits):
    shapes.render(tmp_path / "a")
    shapes.render(tmp_path / "b")
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b") and len(files_below(tmp_path / "a")) == 12


def test_interrupted_while_rendering_leaves_nothing(tmp_path, tiny_splits, monkeypatch):
    write_split = shapes._write_split

    def interrupted(folder, split):
        write_split(folder, split)
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_write_split", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.render(tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moves", range(4))
def test_stopped_while_moving_is_completed_by_the_next_call(tmp_path, tiny_splits, monkeypatch, moves):
    move, done = shapes._move_into_place, []

    def stopping(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        move(source, target)
        done.append(target)

    root = tmp_path / "shapes"
    monkeypatch.setattr(shapes, "_move_into_place", stopping)
    with pytest.raises(KeyboardInterrupt):
        shapes.render(root)
    assert not (root / "images" / "val").exists(), "the last folder tells that all are there"
    assert sum((root / folder).is_dir() for folder in FOLDERS) == moves
    monkeypatch.setattr(shapes, "_move_into_place", move)
    shapes.render(root)
    shapes.render(tmp_path / "uninterrupted")
    assert files_below(root) == files_below(tmp_path / "uninterrupted")


def test_existing_folders_are_kept(tmp_path, tiny_splits):
    mine = tmp_path / "shapes" / "images" / "train" / "mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    shapes.render(tmp_path / "shapes")
    assert [path.name for path in mine.parent.iterdir()] == ["mine.jpg"]
    assert len(list((tmp_path / "shapes" / "images" / "val").iterdir())) == 2


def test_several_at_once_end_well(tmp_path, tiny_splits):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(shapes.render, [tmp_path / "shapes"] * 4))
    shapes.render(tmp_path / "alone")
    assert files_below(tmp_path / "shapes") == files_below(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shapes"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_killed_process_leaves_no_data_set(tmp_path, tiny_splits):
    command = [sys.executable, "-m", "utils.tools.shapes", str(tmp_path / "shapes")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".shapes-rendering-*/images/train/0*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".shapes-rendering-")
    os.utime(left, (0, 0))  # old enough to be a dead process's
    shapes.render(tmp_path / "shapes")
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_young_temporary_folder_is_left_alone(tmp_path, tiny_splits):
    working = tmp_path / ".shapes-rendering-other"
    working.mkdir()
    shapes.render(tmp_path / "shapes")
    assert working.is_dir()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/shapes.*--data"):
        shapes.render(tmp_path / "file" / "shapes")


def test_yaml_names_what_is_rendered():
    spec = yaml.safe_load((ROOT / "data" / "shapes.yaml").read_text(encoding="utf-8"))
    assert tuple(spec["names"][index] for index in range(spec.get("nc", len(NAMES)))) == NAMES
    assert spec["generate"] == "shapes"
    assert {spec["train"], spec["val"]} == {f"images/{split.name}" for split in shapes.SPLITS}


@pytest.mark.parametrize("sample", shapes.SAMPLES, ids=lambda sample: sample.name)
def test_sample_images_are_rendered_by_this_code(sample):
    path = ROOT / "data" / "images" / sample.name
    stored = cv2.imread(str(path))
    scene = render_scene(shapes._generator(0, sample.seed), sample.width, sample.height)
    assert stored.shape == (sample.height, sample.width, 3) and path.stat().st_size < 150_000
    assert difference(stored, scene.image) < 1 and len(scene.classes) >= 4
