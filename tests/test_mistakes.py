"""What people commonly do wrong or otherwise with train.py: it simply works, or one message says what to mend.

What is wrong in one option, YAML, label, image or weights file is in test_bad_*.py.
"""

import re
import shutil

import pytest
import torch

import train

QUICK = ["--img", 64, "--epochs", 1, "--batch-size", 8, "--workers", 0]
QUICK += ["--device", "cpu", "--amp", "off", "--noplots"]


@pytest.fixture
def run(command, data, tiny_cfg, tmp_path):
    """Trains quickly on a data set of one's own; what follows on the line overrides what stands before."""
    line = ["--cfg", tiny_cfg, *QUICK, "--data", data, "--project", tmp_path / "runs"]
    return lambda *arguments: command(train, *line, *arguments)


def test_no_labels_at_all_shows_the_rule(run, data):
    shutil.rmtree(data.parent / "labels")
    run().assert_refused("/images/", "/labels/", str(data.parent / "labels" / "train" / "0.txt"))


def test_an_image_size_off_the_stride_is_rounded_up_and_said(run):
    outcome = run("--img", 70)
    assert outcome.status == 0, outcome.said
    assert re.search(r"--im\S+ 70.* using 96", outcome.said)


def test_weights_of_another_number_of_classes_say_what_came_over(run, data, tmp_path):
    assert run("--name", "first").status == 0
    five = data.with_name("five.yaml")
    five.write_text(data.read_text().replace("star]", "star, hexagon]"))
    weights = tmp_path / "runs" / "first" / "weights" / "last.pt"
    keys = len(torch.load(weights, weights_only=True)["model"])
    for recipe, said in (
        ("yolov5", f"Transferred {keys - 4}/{keys} items from {weights}"),  # all but the two outputs
        ("auto", "row 4: Detect: boxes and 4 of 5 classes, by name"),
    ):
        outcome = run("--data", five, "--cfg", "", "--weights", weights, "--recipe", recipe)
        assert outcome.status == 0, outcome.said
        assert said in outcome.said


def test_roboflows_folders_and_windows_paths_are_found(run, data):
    """Its YAML stands in a folder of its own, and names the images first and the split behind."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (data.parent / split).mkdir(exist_ok=True)
            (data.parent / kind / split).rename(data.parent / split / kind)
    yaml = data.parent / "export" / "data.yaml"
    yaml.parent.mkdir()
    yaml.write_text("train: ..\\train\\images\nval: ../val/images\nnc: 4\nnames: [circle, square, triangle, star]\n")
    outcome = run("--data", yaml)
    assert outcome.status == 0, outcome.said


def test_a_metal_device_where_there_is_none(run):
    outcome = run("--device", "mps")
    if torch.backends.mps.is_available():
        assert outcome.status == 0, outcome.said
    else:
        outcome.assert_refused("--device mps", "--device cpu")
