"""Mistakes that people make with train.py: each ends in one clear message, or is skipped and named, or simply works.

The readers' own tests hold the finer points; here the whole command is run, in this process.
"""

import logging
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
import train
import val
from utils.cli import run_command

QUICK = ["--cfg", "yolov5n-slimneck.yaml", "--img", "64", "--epochs", "1", "--batch-size", "8", "--workers", "0"]
QUICK += ["--device", "cpu", "--amp", "off", "--noplots"]


class Outcome:
    """What a command returned and said."""

    def __init__(self, status: int, said: str):
        self.status, self.said = status, said


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a script with a command line; what follows on the line overrides what stands before."""

    def run(script, *arguments: object) -> Outcome:
        line = [script.__name__ + ".py", *map(str, arguments), "--project", str(tmp_path / "runs")]
        monkeypatch.setattr("sys.argv", line)
        logging.getLogger("yolov5").handlers.clear()
        try:
            status = run_command(script.main, script.build_parser())
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return Outcome(status, captured.out + captured.err)

    return run


@pytest.fixture
def data(tiny_shapes: Path, tmp_path: Path) -> Path:
    """A data set YAML of one's own to spoil."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_shapes.parent, folder)
    for cache in folder.rglob("*.cache.npz"):
        cache.unlink()
    return folder / tiny_shapes.name


def label_of(data: Path, index: int = 3) -> Path:
    return data.parent / "labels" / "train" / f"{index}.txt"


def image_of(data: Path, index: int = 3) -> Path:
    return data.parent / "images" / "train" / f"{index}.jpg"


def yaml_with(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


OPTIONS = {
    "data missing": (["--data", "coco129.yaml"], ["coco129.yaml", "coco128.yaml"]),
    "cfg missing": (["--cfg", "yolov5s-slimnek.yaml"], ["yolov5s-slimnek.yaml", "yolov5s-slimneck.yaml"]),
    "weights missing": (["--weights", "runs/yolov5q.pt"], ["yolov5q.pt"]),
    "weights not a checkpoint": (["--weights", "model.onnx"], ["--weights", ".pt"]),
    "hyp missing": (["--hyp", "hyp.scratch-lo.yaml"], ["hyp.scratch-lo.yaml", "hyp.scratch-low.yaml"]),
    "no model": (["--cfg", ""], ["--cfg", "--weights"]),
    "device": (["--device", "7"], ["--device"]),
    "device of letters": (["--device", "gpu"], ["--device"]),
    "nothing left to train": (["--freeze", "99"], ["--freeze", "nothing to train"]),
    "quad": (["--quad", "--batch-size", "6"], ["--quad", "6"]),
    "half precision without a GPU": (["--amp", "fp16"], ["--amp fp16"]),
    "nothing to resume": (["--resume", "no/last.pt"], ["no/last.pt"]),
}


def assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.status == 1, outcome.said
    assert "Traceback" not in outcome.said
    error = outcome.said[outcome.said.index("error: ") :]
    for word in words:
        assert word in error
    assert len(error.strip().splitlines()) <= 3


@pytest.mark.parametrize(("arguments", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(arguments, words, run, data):
    assert_refused(run(train, *QUICK, "--data", data, *arguments), *words)


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--epochs", "x"], ["--optimiser", "SGD"]])
def test_argparse_refuses(arguments, run):
    outcome = run(train, *QUICK, *arguments)
    assert outcome.status == 2
    assert arguments[0] in outcome.said


DATA_YAMLS = {
    "syntax": ("path: .\ntrain: [images/train\nval: x\n", ["tiny.yaml:3"]),
    "names and nc": ("path: .\ntrain: images/train\nval: images/val\nnc: 3\nnames: [a, b]\n", ["nc: 3", "2 names"]),
    "split missing": ("path: .\ntrain: images/train\nval: images/nowhere\nnames: [a]\n", ["images/nowhere"]),
    "script": ("path: gone\ntrain: a\nval: b\nnames: [a]\ndownload: bash get.sh\n", ["runs nothing"]),
    "object": ("path: !!python/object/apply:os.system ['touch canary']\n", ["tiny.yaml:1"]),
    "empty": ("", ["names"]),
}


@pytest.mark.parametrize(("text", "words"), DATA_YAMLS.values(), ids=DATA_YAMLS)
def test_data_yamls(text, words, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.write_text(text)
    assert_refused(run(train, *QUICK, "--data", data), *words)
    assert not (tmp_path / "canary").exists()


LABELS = {
    "four numbers": "0 0.5 0.5 0.2",
    "six numbers": "0 0.5 0.5 0.2 0.2 0.9",
    "not a number": "0 0.5 nan 0.2 0.2",
    "negative": "0 0.5 -0.5 0.2 0.2",
    "beyond 1": "0 0.5 0.5 1.2 0.2",
    "pixels": "0 120 80 40 40",
    "text": "circle 0.5 0.5 0.2 0.2",
    "half a class": "0.5 0.5 0.5 0.2 0.2",
    "class beyond nc": "4 0.5 0.5 0.2 0.2",
}


@pytest.mark.parametrize("line", LABELS.values(), ids=LABELS)
def test_label_lines_are_named_with_file_and_line(line, run, data):
    label_of(data).write_text(f"1 0.5 0.5 0.25 0.25\n{line}\n")
    assert_refused(run(train, *QUICK, "--data", data), f"{label_of(data)}, line 2")


def test_no_labels_at_all_shows_the_rule(run, data):
    shutil.rmtree(data.parent / "labels")
    outcome = run(train, *QUICK, "--data", data)
    assert_refused(outcome, "/images/", "/labels/", str(label_of(data, 0)))


def test_an_empty_image_list(run, data):
    shutil.rmtree(data.parent / "images" / "train")
    (data.parent / "images" / "train").mkdir()
    assert_refused(run(train, *QUICK, "--data", data), "No images found", "images/train")


HYPS = {"unknown": ("lr_0: 0.01\n", ["lr_0", "lr0"]), "a word": ("lr0: fast\n", ["lr0", "fast"])}


@pytest.mark.parametrize(("line", "words"), HYPS.values(), ids=HYPS)
def test_hyperparameters(line, words, run, data, tmp_path):
    lines = (Path(train.ROOT) / "data" / "hyps" / "hyp.scratch-low.yaml").read_text()
    kept = "".join(f"{one}\n" for one in lines.splitlines() if not one.startswith("lr0"))
    assert_refused(run(train, *QUICK, "--data", data, "--hyp", yaml_with(tmp_path, "hyp.yaml", kept + line)), *words)


MODELS = {
    "unknown block": ("1, GSConv,      [512, 1, 1]]", "1, GSConvv, [512, 1, 1]]", ["row 10", "GSConvv", "'GSConv'"]),
    "anchors of two levels": ("  - [116, 90, 156, 198, 373, 326]", "  #", ["2 rows of anchors for 3"]),
    "odd anchors": ("116, 90, 156", "116, 156", ["same number of anchors"]),
}


@pytest.mark.parametrize(("old", "new", "words"), MODELS.values(), ids=MODELS)
def test_model_yamls(old, new, words, run, data, tmp_path):
    text = (Path(train.ROOT) / "models" / "yolov5n-slimneck.yaml").read_text()
    assert old in text
    cfg = yaml_with(tmp_path, "m.yaml", text.replace(old, new))
    assert_refused(run(train, *QUICK, "--data", data, "--cfg", cfg), *words)


def test_an_output_folder_that_is_a_file(run, data, tmp_path):
    (tmp_path / "runs").write_text("a file")
    assert_refused(run(train, *QUICK, "--data", data), str(tmp_path / "runs"))


def foreign_pickle(path: Path) -> None:
    """A checkpoint in torch's zip format whose pickle runs a command when it is loaded."""

    class Attack:
        def __reduce__(self):
            import os

            return os.system, (f"touch {path.parent / 'canary'}",)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Attack()}, protocol=2))
        archive.writestr("archive/version", "3\n")


WEIGHTS = {
    "text": (lambda path: path.write_text("not weights"), []),
    "empty": (lambda path: path.write_bytes(b""), []),
    "legacy": (lambda path: torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False), []),
    "bare pickle": (lambda path: path.write_bytes(pickle.dumps({"model": 1})), []),
    "foreign classes": (foreign_pickle, ["system"]),
    "another program's": (lambda path: torch.save({"weights": torch.zeros(2)}, path), []),
}


@pytest.mark.parametrize(("make", "words"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("script", [train, val, detect], ids=lambda script: script.__name__)
def test_files_that_are_no_weights(script, make, words, run, data, tmp_path):
    path = tmp_path / "weights.pt"
    make(path)
    arguments = {train: [*QUICK, "--data", data], val: ["--data", data], detect: []}[script]
    assert_refused(run(script, *arguments, "--weights", path), str(path), *words)
    assert not (tmp_path / "canary").exists()


def spoil(data: Path) -> list[Path]:
    """Makes five of the training images unusable in five ways."""
    images = [image_of(data, index) for index in range(5)]
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[: len(whole) // 2])
    images[1].write_bytes(b"")
    images[2].write_text("not an image")
    cv2.imwrite(str(images[3]), np.zeros((1, 20000, 3), np.uint8))
    images[4].write_bytes(whole[:100] + bytes(200) + whole[300:400])
    return images


def test_images_that_cannot_be_used_are_skipped_counted_and_named(run, data):
    images = spoil(data)
    outcome = run(train, *QUICK, "--data", data)
    assert outcome.status == 0, outcome.said
    assert "5 corrupt" in outcome.said
    for image in images:
        assert str(image) in outcome.said


def test_unusual_images_are_accepted(run, data):
    picture = Image.open(image_of(data, 0)).convert("RGB")
    for index, mode in enumerate(["L", "RGBA", "P", "LA"]):
        image_of(data, index).unlink()
        picture.convert(mode).save(image_of(data, index).with_suffix(".png"))
    picture.convert("CMYK").save(image_of(data, 4))
    image_of(data, 5).unlink()
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(image_of(data, 5).with_suffix(".png"))
    image_of(data, 6).unlink()
    picture.save(image_of(data, 6).with_suffix(".webp"), save_all=True, append_images=[picture.rotate(90)])
    outcome = run(train, *QUICK, "--data", data)
    assert outcome.status == 0, outcome.said
    assert re.search(r"24 found, 0 missing, \d+ empty, 0 corrupt", outcome.said)


def test_an_image_size_off_the_stride_is_rounded_up_and_said(run, data):
    outcome = run(train, *QUICK, "--data", data, "--img", 70)
    assert outcome.status == 0, outcome.said
    assert "--img-size 70" in outcome.said
    assert "using 96" in outcome.said


def test_weights_of_another_number_of_classes_say_what_came_over(run, data, tmp_path):
    first = run(train, *QUICK, "--data", data, "--name", "first")
    assert first.status == 0, first.said
    two = data.read_text().replace("[circle, square, triangle, star]", "[circle, square, triangle, star, hexagon]")
    weights = tmp_path / "runs" / "first" / "weights" / "last.pt"
    outcome = run(train, *QUICK, "--data", yaml_with(data.parent, "five.yaml", two), "--cfg", "", "--weights", weights)
    assert outcome.status == 0, outcome.said
    keys = len(torch.load(weights, weights_only=True)["model"])
    assert f"Transferred {keys - 6}/{keys} items from {weights}" in outcome.said  # all but the three outputs


def test_roboflow_yamls(run, data):
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (data.parent / split).mkdir(exist_ok=True)
            (data.parent / kind / split).rename(data.parent / split / kind)
    (data.parent / "export").mkdir()
    text = "train: ../train/images\nval: ../val/images\nnc: 4\nnames: ['circle', 'square', 'triangle', 'star']\n"
    outcome = run(train, *QUICK, "--data", yaml_with(data.parent / "export", "data.yaml", text))
    assert outcome.status == 0, outcome.said


def test_windows_paths(run, data):
    data.write_text(data.read_text().replace("images/train", "images\\train").replace("images/val", "images\\val"))
    outcome = run(train, *QUICK, "--data", data)
    assert outcome.status == 0, outcome.said


def test_a_metal_device_where_there_is_none(run, data):
    if torch.backends.mps.is_available():
        outcome = run(train, *QUICK, "--data", data, "--device", "mps")
        assert outcome.status == 0, outcome.said
    else:
        assert_refused(run(train, *QUICK, "--data", data, "--device", "mps"), "--device mps", "--device cpu")
