"""The same command gives the same result twice, to the bit: training, detection, validation, export.

Each kind of training has an undisturbed run of its own, without worker processes and caches; what a run may have
differently without another result is set against it. Runs in another process and resumed ones are in test_train.py,
several processes in test_train_ddp.py, batches without a training in utils/dataloaders/test_loader.py.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from utils.checkpoint import load_checkpoint
from utils.files import ROOT
from utils.train.fingerprint import fingerprint, tensors_digest

EPOCHS = 2
OF_THIS_RUN = {"seconds", "speed_ms", "energy_wh", "options"}  # of metrics.json
# A detector of a few layers, of the blocks that the models are made of.
MODEL = """
nc: 4
depth_multiple: 0.33
width_multiple: 0.125
anchors: [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]
backbone:
  [[-1, 1, Conv, [64, 6, 2, 2]], [-1, 1, Conv, [128, 3, 2]], [-1, 1, C3, [128]], [-1, 1, Conv, [256, 3, 2]],
   [-1, 1, GSConv, [256, 3, 2]], [-1, 1, SPPF, [256, 5]]]
head:
  [[-1, 1, nn.Upsample, [None, 2, nearest]], [[-1, 3], 1, Concat, [1]], [-1, 1, VoVGSCSP, [256, False]],
   [[8, 5], 1, Detect, [nc, anchors]]]
"""
SMALL = {"imgsz": 64, "batch_size": 4, "epochs": EPOCHS, "device": "cpu"}
SMALL |= {"amp": "off", "noplots": True, "save_period": 1}
KINDS = {
    "mosaic": {},
    "rect": {"rect": True},
    "multi-scale": {"multi_scale": True},
    "image weights": {"image_weights": True},
    "quad": {"quad": True},
    "bfloat16": {"amp": "bf16"},
}
NO_MATTER = [  # what makes no difference: worker processes, where images are cached
    ("mosaic", {"workers": 4}),
    ("mosaic", {"workers": 2, "cache": "disk"}),
    ("mosaic", {"workers": 0, "cache": "disk"}),  # reads the copies that the line above made
    ("mosaic", {"workers": 0, "cache": "ram"}),
    ("rect", {"workers": 2, "cache": "ram"}),
    ("multi-scale", {"workers": 4}),
    ("image weights", {"workers": 4}),
    ("quad", {"workers": 4}),
    ("bfloat16", {"workers": 2}),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


@pytest.fixture(scope="module")
def data(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set YAML: 16 of the training images, half of them cut to other shapes, and four for validation."""
    root = tmp_path_factory.mktemp("sixteen")
    for split, count in (("train", 16), ("val", 4)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image = cv2.imread(str(tiny_shapes.parent / "images" / split / f"{index}.jpg"))
            height = image.shape[0] // (1 + index % 2)
            cv2.imwrite(str(root / "images" / split / f"{index}.png"), cv2.resize(image, (image.shape[1], height)))
            labels = tiny_shapes.parent / "labels" / split / f"{index}.txt"
            (root / "labels" / split / labels.name).write_text(labels.read_text())
    (root / "model.yaml").write_text(MODEL)
    yaml = root / "sixteen.yaml"
    yaml.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n")
    return yaml


def train_on(data: Path, project: Path, kind: str, **differently) -> Path:
    """Trains as a kind of training does, and returns the run's folder."""
    files = {"data": str(data), "cfg": str(data.with_name("model.yaml")), "project": str(project)}
    return Path(train.run(**{**SMALL, **KINDS[kind], **files, **differently}).save_dir)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Gives the folder of a kind's undisturbed run, trained when first asked for."""
    project, folders = tmp_path_factory.mktemp("undisturbed"), {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = train_on(data, project, kind, workers=0, name=kind)
        return folders[kind]

    return folder


def assert_same_run(first: Path, second: Path) -> None:
    """The float32 weights after the last epoch, their average, the records and all lines of the fingerprint."""
    states = [load_checkpoint(folder / "weights" / f"epoch{EPOCHS - 1}.pt") for folder in (first, second)]
    for key in ("model", "ema"):
        one, other = (state[key] for state in states)
        assert one.keys() == other.keys()
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"{key}: {len(different)} of {len(one)} tensors differ, for example {different[:3]}"
    assert (first / "results.csv").read_bytes() == (second / "results.csv").read_bytes()
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize(("kind", "differently"), NO_MATTER, ids=str)
def test_workers_and_caches_make_no_difference(kind, differently, undisturbed, data, tmp_path, monkeypatch, caplog):
    expected = undisturbed(kind)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # no more workers are started than there are cores
    caplog.set_level("INFO", "yolov5")
    folder = train_on(data, tmp_path, kind, **differently)
    assert f"Using {differently['workers']} dataloader workers" in caplog.text
    assert_same_run(expected, folder)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="needs a forkserver")
def test_workers_that_a_server_starts_make_no_difference(undisturbed, data, tmp_path):
    """As Python 3.14 starts them; they are given all that they need, like those that Windows and macOS start."""
    expected, former = undisturbed("mosaic"), multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert_same_run(expected, train_on(data, tmp_path, "mosaic", workers=2, cache="ram"))
    finally:
        multiprocessing.set_start_method(former, force=True)


def test_the_kinds_are_different(undisturbed):
    """So what was set against them was no one and the same run."""
    ends = {fingerprint(undisturbed(kind), images=False)[1].digest for kind in KINDS}
    assert len(ends) == len(KINDS)


def test_neither_the_folder_nor_the_order_of_its_listing_matters(undisturbed, data, tmp_path, monkeypatch):
    expected = undisturbed("mosaic")  # trained before the listing is turned round
    copy = shutil.copytree(data.parent, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.npz", "*_npy"))
    walk, listed = os.walk, []

    def backwards(*arguments, **keywords):
        for folder, folders, names in walk(*arguments, **keywords):
            listed.append(len(names))
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    folder = train_on(copy / data.name, tmp_path, "mosaic", workers=0)
    assert 16 in listed
    assert_same_run(expected, folder)


def test_two_threads_give_the_same_as_two_threads(data, tmp_path):
    """What they give differs from one thread's in the last bits; see the test of the fingerprint for its record."""
    torch.set_num_threads(2)  # `one_thread` takes it back
    folders = [train_on(data, tmp_path, "mosaic", workers=0, batch_size=16, name=name) for name in ("a", "b")]
    assert_same_run(*folders)
    assert load_checkpoint(folders[0] / "weights" / "last.pt")["versions"]["threads"] == 2


# ------------------------------------------------------------------------------------- detection, validation, export


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run, of its figures and report what is of neither time nor place."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "metrics.json" in files:
        figures = json.loads(files["metrics.json"])
        files["metrics.json"] = json.dumps(
            {key: value for key, value in figures.items() if key not in OF_THIS_RUN}
        ).encode()
        files["report.html"] = re.sub(rb"<b>[\d.]+</b>|<h3>Time</h3>.*", b"", files["report.html"], flags=re.DOTALL)
    return files


def assert_same_files(first: Path, second: Path) -> dict[str, bytes]:
    one, other = content(first), content(second)
    assert one.keys() == other.keys()
    different = [name for name in one if one[name] != other[name]]
    assert not different, f"{len(different)} of {len(one)} files differ: {different[:5]}"
    return one


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images and a video."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("b.jpg", "a.png"):
        cv2.imwrite(str(folder / name), generator.integers(0, 255, (48, 64, 3), np.uint8))
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(3):
        writer.write(generator.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    return folder


def command(script: str, hash_seed: int, *arguments: object) -> None:
    """Runs a script in a process of its own, in which sets of texts have an order of their own."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(line, env=environment, check=True, capture_output=True, timeout=120)


def test_detection_writes_the_same_files_twice(weights, images, tmp_path):
    switches = ["save_txt", "save_conf", "save_csv", "save_crop", "augment"]
    options = {"weights": str(weights), "source": str(images), "imgsz": [64], "device": "cpu", "max_det": 5}
    detect.run(project=str(tmp_path), name="a", **options, **dict.fromkeys(switches, True))
    flags = [f"--{name.replace('_', '-')}" for name in switches]
    line = ["--weights", weights, "--source", images, "--img", 64, "--device", "cpu", "--max-det", 5, *flags]
    command("detect.py", 1, *line, "--project", tmp_path, "--name", "b")
    files = assert_same_files(tmp_path / "a", tmp_path / "b")
    assert {"a.png", "b.jpg", "clip.mp4", "predictions.csv", "labels/a.txt", "labels/clip_3.txt"} <= files.keys()


def test_validation_writes_the_same_files_twice(undisturbed, data, tmp_path):
    best = undisturbed("mosaic") / "weights" / "best.pt"
    options = {"weights": str(best), "imgsz": 64, "device": "cpu", "batch_size": 2, "conf_thres": 0.0001}
    options |= {"save_txt": True, "save_conf": True, "save_json": True, "project": str(tmp_path)}
    figures = [val.run(name=f"{workers}", workers=workers, **options)[0] for workers in (0, 2)]
    assert figures[0] == figures[1]
    files = assert_same_files(tmp_path / "0", tmp_path / "2")
    assert {"best_predictions.json", "confusion_matrix.png", "val_batch0_pred.jpg"} <= files.keys()
    assert sum(name.startswith("labels/") for name in files) == 4 and len(files["best_predictions.json"]) > 1000


class Noon:
    """Stands in for datetime: it is always the same second."""

    def now(self):
        return self

    def astimezone(self):
        return self

    def isoformat(self, timespec: str) -> str:
        return "2026-01-01T12:00:00+00:00"


def exported(checkpoint: Path, form: str, folder: Path) -> Path:
    """Exports a copy of a checkpoint in `folder`."""
    folder.mkdir()
    (path,) = export.run(weights=[str(shutil.copy(checkpoint, folder / "best.pt"))], include=[form], imgsz=[64, 64])
    return Path(path)


def test_onnx_files_differ_by_their_date_alone(undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setattr("models.export.run.datetime", Noon())
    best = undisturbed("mosaic") / "weights" / "best.pt"
    first, second = (exported(best, "onnx", tmp_path / name).read_bytes() for name in ("a", "b"))
    assert b"2026-01-01T12:00:00" in first and first == second


def test_torchscript_files_hold_the_same_weights_and_answer_alike(undisturbed, tmp_path):
    """The bytes differ: torch numbers the classes of a program on through the process."""
    best, image = undisturbed("mosaic") / "weights" / "best.pt", torch.rand(1, 3, 64, 64)
    paths = [exported(best, "torchscript", tmp_path / name) for name in ("a", "b")]
    states, answers = zip(*((model.state_dict(), model(image)) for model in map(torch.jit.load, paths)), strict=True)
    assert tensors_digest(states[0]) == tensors_digest(states[1]) and len(states[0]) > 20
    assert torch.equal(*answers)
    roots = [zipfile.ZipFile(path).namelist()[0].split("/")[0] for path in paths]
    assert roots[0] == roots[1]  # no name of a temporary file
