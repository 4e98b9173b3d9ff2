"""docs/extending.md does what it says: its code pasted into a copy of the tree, its commands run there."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Of the runs that the commands describe, small ones, all in one process: importing torch takes longer than they do
RUN = """
import runpy, sys
for line in sys.stdin:
    sys.argv = line.split()
    print(">", *sys.argv, flush=True)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{line}: {stop.code}")
"""
# Sides of 1, 2, 3 and 4 cells; then, for the loss, boxes of 2 x 2 cells and a score of 0.75 for class 1 at all points,
# and a label that is the box of a cell of stride 8
CHECK = """
import json, torch
from pathlib import Path
from models.load import Weights, transfer
from models.yolo import Model
from utils.loss import LOSSES
model = Model("yolov5n-sides.yaml", nc=4)
model.hyp = {"af_box": 1.0, "af_cls": 0.5}
sides = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0]).log().view(1, 8, 1, 1)
rows = model.head.decoder()([sides.expand(1, 8, side, side) for side in (8, 4, 2)])
loss = LOSSES["sides"](model)
target = torch.tensor([[0, 1, 28 / 64, 28 / 64, 16 / 64, 16 / 64]])
raw = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0]).log()
_, terms = loss([raw.expand(1, 1, side, side, 8) for side in (8, 4, 2)], target)
plain = Model("yolov5n.yaml", nc=4)
weights = Weights(plain.yaml, plain.state_dict(), plain.names, 4, [8, 16, 32], "ours", {}, Path("plain.pt"))
missing = transfer(Model("yolov5n-c3se.yaml", nc=4), weights).missing_keys
json.dump([rows[0].tolist(), terms.tolist(), missing], open("check.json", "w"))
"""
SMALL = {
    "train.py": "--img 64 --epochs 1 --batch-size 24 --recipe yolov5 --noplots --device cpu --workers 0",
    "val.py": "--img 64 --batch-size 8 --device cpu --workers 0",
    "export.py": "--img 64",
}


def paste(block: str, tree: Path) -> None:
    """Puts a block where its first line says."""
    first, code = block.split("\n", 1)
    file, place = re.fullmatch(r"# ([\w/]+\.py), (at the end|a new file|below: .+)", first).groups()
    path = tree / file
    assert path.exists() == (place != "a new file")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if place.startswith("below: "):
        lines = old.splitlines(keepends=True)
        (number,) = [number for number, line in enumerate(lines) if line.startswith(place.removeprefix("below: "))]
        old, code = "".join(lines[: number + 1]), code + "".join(lines[number + 1 :])
    path.write_text(old + code, encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, tiny_shapes):
    """A copy of the tree in which the page has been followed from above to below."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    tree = tmp_path_factory.mktemp("extended") / "tree"
    for name in ("models", "utils", "data"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tree)
    shutil.copytree(tiny_shapes.parent, tree / "shapes", ignore=shutil.ignore_patterns("*.npz"))
    (tree / "mine.yaml").write_text((tree / "shapes" / "tiny.yaml").read_text().replace("path: .", "path: shapes"))
    (tree / "check.py").write_text(CHECK)
    commands = []
    for language, block in BLOCKS:
        if language == "python":
            paste(block, tree)
        for line in block.splitlines() if language == "bash" else ():
            if line.startswith("python "):
                line = line.removeprefix("python ")
                commands.append(f"{line} {SMALL.get(line.split()[0], '')}")
            else:
                subprocess.run(line, shell=True, check=True, cwd=tree)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tree,
        env=environment,
        input="\n".join([*commands, "check.py"]),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (tree / "said.txt").write_text(run.stdout + run.stderr)
    return tree


def figures(tree, run):
    """The losses of the one epoch."""
    with open(tree / "runs" / "train" / run / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {key.strip(): float(value) for key, value in row.items() if "loss" in key}


def test_they_are_trained(tree):
    said = (tree / "said.txt").read_text()
    assert re.search(r" 8 .* models\.common\.C3SE +\[", said)  # in the table of layers
    c3se, log_iou, sides = (figures(tree, run) for run in ("c3se", "log-iou", "sides"))
    assert c3se["train/box_loss"] != log_iou["train/box_loss"] and c3se["train/cls_loss"] == log_iou["train/cls_loss"]
    assert list(sides) == ["train/box_loss", "train/cls_loss", "val/box_loss", "val/cls_loss"]
    assert all(math.isfinite(value) and value > 0 for run in (c3se, log_iou, sides) for value in run.values())


@pytest.mark.parametrize("run", ["c3se", "sides"])
def test_they_are_exported(tree, run):
    assert (tree / "runs" / "train" / run / "weights" / "best.onnx").is_file()  # which export.py has compared


def test_a_block_takes_over_what_it_has_in_common(tree):
    *_, missing = json.loads((tree / "check.json").read_text())
    assert {re.sub(r"\.squeeze\..*", "", key) for key in missing} == {"model.8"}


def test_the_head_and_its_loss_mean_the_same_boxes(tree):
    rows, (box, cls), _ = json.loads((tree / "check.json").read_text())
    # About (4, 4) px from -4 to 28 and from -12 to 36; about (48, 48) px four times as large
    assert rows[0] == pytest.approx([12, 12, 32, 48, 1, *[0.5] * 4])
    assert rows[-1] == pytest.approx([80, 80, 128, 192, 1, *[0.5] * 4]) and len(rows) == 64 + 16 + 4
    # Inside the label lie its own cell's point, CIoU 1, and that of a cell of stride 16, whose box of 32 px
    # has IoU 16^2 / 32^2, and its centre lies (4, 4) apart
    other = 0.25 - (4**2 + 4**2) / (32**2 + 32**2)
    degrees = 1 + other**6
    assert box == pytest.approx((1 - other) * other**6 / degrees, rel=5e-3)  # 1.27e-4
    # softplus(x) - x * target of every point and class: ln 2 of three classes, ln 4 - ln 3 * degree of class 1
    assert cls == pytest.approx(0.5 * (84 * math.log(2**3 * 4) / degrees - math.log(3)), rel=1e-4)
