"""Fingerprints: what moves a digest and what does not, what is missing, the command line."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import ROOT
from utils.train import fingerprint

NAMES = {0: "cat", 1: "dog"}
OPTIONS = {"batch_size": 4, "seed": 0, "workers": 8, "project": "runs/train", "cache": None, "device": ""}
VERSIONS = {"python": "3.11.7", "torch": "2.14.1", "threads": 2}


@pytest.fixture
def run(tmp_path: Path, tiny_shapes: Path) -> Path:
    """The folder of a run on a copy of the small data set."""
    shutil.copytree(tiny_shapes.parent, tmp_path / "set", ignore=shutil.ignore_patterns("*.npz", "*_npy"))
    (tmp_path / "set" / "labels" / "val" / "1.txt").write_text("0 0.1 0.1 0.5 0.2 0.5 0.8 0.2 0.5\n")  # a polygon
    weights = tmp_path / "exp" / "weights"
    weights.mkdir(parents=True)
    model = {"a.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "a.count": torch.tensor(3)}
    content = {"epoch": -1, "model": model, "ema": None, "opt": OPTIONS, "hyp": {"lr0": 0.01}, "yaml": {"nc": 2}}
    content |= {"data": str(tmp_path / "set" / tiny_shapes.name), "versions": VERSIONS}
    for name in ("best.pt", "last.pt"):
        save_checkpoint(weights / name, content)
    return tmp_path / "exp"


def digests(run: Path, **keywords) -> dict[str, str | None]:
    return {part.name: part.digest for part in fingerprint.fingerprint(run, **keywords)}


def in_checkpoint(edit, name: str = "last.pt"):
    """What changes a checkpoint's content by `edit` and writes it again."""

    def change(run: Path) -> None:
        content = load_checkpoint(run / "weights" / name)
        edit(content)
        save_checkpoint(run / "weights" / name, content)

    return change


def update(key: str, **values):
    return in_checkpoint(lambda content: content[key].update(values))


def next_bit(content: dict) -> None:
    weight = content["model"]["a.weight"]
    weight[1, 2, 1, 1] = torch.nextafter(weight[1, 2, 1, 1], torch.tensor(100.0))


def rename_weight(content: dict) -> None:
    content["model"]["a.weights"] = content["model"].pop("a.weight")


def memory_and_order(content: dict) -> None:
    """The same values, channels last, in another order of keys."""
    content["model"] = dict(reversed(content["model"].items()))
    content["model"]["a.weight"] = content["model"]["a.weight"].contiguous(memory_format=torch.channels_last)


def edit_label(run: Path) -> None:
    next((run.parent / "set" / "labels" / "train").glob("*.txt")).write_text("1 0.5 0.5 0.25 0.25\n")


def edit_number(name: str, position: int, text: str):
    """One number of the first label in a file of the validation set; as many labels and points as before."""

    def change(run: Path) -> None:
        file = run.parent / "set" / "labels" / "val" / name
        first, *others = file.read_text().splitlines()
        numbers = first.split()
        assert float(numbers[position]) != float(text)
        numbers[position] = text
        file.write_text("\n".join([" ".join(numbers), *others]))

    return change


def edit_image(run: Path) -> None:
    """The last bytes of a JPEG change; its size in pixels and its labels stay."""
    file = run.parent / "set" / "images" / "val" / "0.jpg"
    file.write_bytes(file.read_bytes() + b"\0")


def resize_image(run: Path) -> None:
    file = str(run.parent / "set" / "images" / "val" / "0.jpg")
    cv2.imwrite(file, cv2.imread(file)[:-8])


def rename_image(run: Path) -> None:
    for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
        file = run.parent / "set" / kind / "val" / f"0{suffix}"
        file.rename(file.with_stem("00"))


CHANGES = {
    "written again": (in_checkpoint(lambda content: None), ""),
    "memory format, order": (in_checkpoint(memory_and_order), ""),
    "workers, paths": (update("opt", workers=0, project="/b", recipe="small"), ""),
    "a weight's last bit": (in_checkpoint(next_bit), "last.pt"),
    "a weight more": (update("model", b=torch.zeros(1)), "last.pt"),
    "a weight's name": (in_checkpoint(rename_weight), "last.pt"),
    "the best": (in_checkpoint(next_bit, "best.pt"), "best.pt"),
    "an option": (update("opt", seed=1), "options"),
    "a hyperparameter": (update("hyp", lr0=0.02), "options"),
    "the model": (update("yaml", depth_multiple=0.5), "options"),
    "threads": (update("versions", threads=1), "versions"),
    "a label": (edit_label, "labels"),
    "a box": (edit_number("0.txt", 1, "0.4321"), "labels"),
    "a class": (edit_number("1.txt", 0, "3"), "labels"),
    "a point of a polygon within its box": (edit_number("1.txt", 7, "0.3"), "labels"),
    "an image": (edit_image, "images"),
    "an image's height": (resize_image, "images labels"),
    "an image's name": (rename_image, "labels"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "lines"), CHANGES.values(), ids=CHANGES)
def test_a_change_moves_its_line_and_the_last_one(change, lines, run):
    before = digests(run)
    change(run)
    after = digests(run)
    assert before.keys() == after.keys() and None not in (*before.values(), *after.values())
    assert {name for name in before if before[name] != after[name]} == {*lines.split(), *["all"][: len(lines)]}


def test_a_data_set_elsewhere_has_the_same_labels_and_images(run, tmp_path, tiny_shapes):
    before = digests(run)
    moved = shutil.copytree(tmp_path / "set", tmp_path / "moved" / "set", ignore=shutil.ignore_patterns("*.npz"))
    assert digests(run, data=moved / tiny_shapes.name) == before


def test_labels_with_keypoints_are_read_as_training_reads_them(tiny_shapes, tmp_path):
    shutil.copytree(tiny_shapes.parent, tmp_path / "set", ignore=shutil.ignore_patterns("*.npz", "*_npy"))
    for split in ("train", "val"):
        for path in (tmp_path / "set" / "labels" / split).iterdir():
            path.write_text("".join(f"{line} 0.5 0.5 2\n" for line in path.read_text().splitlines()))
    data = tmp_path / "set" / tiny_shapes.name
    data.write_text(f"{data.read_text()}kpt_shape: [1, 3]\n")
    keypoints, boxes = (fingerprint.labels_part(*fingerprint.read_data(yaml)) for yaml in (data, tiny_shapes))
    assert keypoints == boxes


def test_a_record_of_the_data_tells_what_has_changed(run, tmp_path, tiny_shapes):
    def record(yaml: Path) -> dict:
        return fingerprint.dataset_record(*fingerprint.read_data(yaml))

    yaml = tmp_path / "set" / tiny_shapes.name
    before = record(yaml)
    assert {split: tuple(rows.shape) for split, rows in before.items()} == {"train": (24, 2), "val": (8, 2)}
    moved = shutil.copytree(tmp_path / "set", tmp_path / "moved" / "set", ignore=shutil.ignore_patterns("*.npz"))
    assert fingerprint.dataset_changes(before, record(moved / tiny_shapes.name)) == ""
    edit_number("1.txt", 7, "0.3")(run)  # a point of a polygon within its box
    resize_image(run)
    assert fingerprint.dataset_changes(before, record(yaml)) == "val: 2 relabelled"
    rename_image(run)
    assert fingerprint.dataset_changes(before, record(yaml)) == "val: 1 removed, 1 added, 1 relabelled"
    images = sorted((tmp_path / "set" / "images" / "train").iterdir())
    (tmp_path / "set" / "often.txt").write_text("".join(f"{image}\n" for image in [*images, *images[:3]]))
    yaml.write_text(yaml.read_text().replace("images/train", "often.txt"))
    assert fingerprint.dataset_changes(before, record(yaml)).startswith("train: 3 added; val")


def test_an_unfinished_run_shows_its_average_too(run, tmp_path):
    before = digests(run)["last.pt"]

    def edit(content):
        content.update(epoch=3, ema=copy.deepcopy(content["model"]))

    in_checkpoint(edit)(run)
    other = shutil.copy(run / "weights" / "last.pt", tmp_path / "detector.pt")  # one file, whatever its name
    for part in (fingerprint.fingerprint(run)[1], fingerprint.fingerprint(other)[0]):
        assert part.digest != before and part.detail == "4 tensors of float32, int64, epoch 3 of an unfinished run"


def test_without_its_data_the_rest_is_told_and_why(run):
    shutil.rmtree(run.parent / "set" / "images")
    parts = {part.name: part for part in fingerprint.fingerprint(run)}
    assert parts["last.pt"].digest and parts["options"].digest
    for name in ("labels", "images"):
        assert parts[name].digest is None and "not found" in parts[name].detail.lower()
    assert parts["all"] == fingerprint.Part("all", None, "not available without labels and images")


def test_the_line_at_the_end_shortens_the_digests_and_is_quiet(run, caplog):
    caplog.set_level("INFO", "yolov5")
    parts = digests(run)
    caplog.clear()
    line = fingerprint.summary(run)
    assert not caplog.records
    for name in ("best.pt", "last.pt", "labels", "options", "versions"):
        assert f"{name} {parts[name][:12]}" in line
    assert line.endswith(f"python -m utils.train.fingerprint {run})") and parts["images"][:12] not in line


def test_the_command_prints_a_line_each(run, command, tmp_path):
    done = command(fingerprint, run)
    assert done.status == 0, done.said
    lines = [line.split() for line in done.said.splitlines()]
    assert digests(run).items() <= {line[0]: line[1] for line in lines if len(line) > 1}.items()
    wrong = command(fingerprint, tmp_path / "no such run")
    assert wrong.status == 1 and "is no training run: neither weights/best.pt nor weights/last.pt" in wrong.said


def test_help_answers_without_torch():
    program = (
        "import runpy, sys\nsys.argv = ['fingerprint', '--help']\n"
        "try:\n    runpy.run_module('utils.train.fingerprint', run_name='__main__')\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = sorted({'torch', 'cv2', 'numpy', 'matplotlib', 'pandas'} & set(sys.modules))\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m utils.train.fingerprint" in done.stdout
