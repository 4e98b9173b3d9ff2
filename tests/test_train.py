"""train.py as a user runs it: what a run leaves behind, and that an interrupted run ends as if it had not been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import train
from utils.callbacks import HOOKS, Callbacks
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.train import prepare

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--cfg", "yolov5n-slimneck.yaml", "--img", "64", "--batch-size", "8", "--amp", "off", "--device", "cpu"]
SMALL_KEYWORDS = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 8, "amp": "off", "device": "cpu"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def assert_same_state(first: Path, second: Path) -> None:
    states = [load_checkpoint(path) for path in (first, second)]
    one, other = (
        dict(pytree.tree_flatten_with_path([state[key] for key in ("model", "ema", "optimizer", "generators")])[0])
        for state in states
    )
    assert one.keys() == other.keys() and len(one) > 500
    different = [path for path in one if not np.array_equal(one[path], other[path])]
    assert not different, f"{len(different)} of {len(one)} parts differ, for example {different[:3]}"
    for key in ("updates", "schedule", "stopper", "best_fitness"):
        assert states[0][key] == states[1][key]


@pytest.fixture(scope="module")
def finished(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of four epochs, in this process, without workers."""
    project = tmp_path_factory.mktemp("runs")
    options = train.run(
        data=str(tiny_shapes), epochs=4, workers=0, save_period=1, project=str(project), name="a", **SMALL_KEYWORDS
    )
    return Path(options.save_dir)


def test_a_run_leaves_what_users_expect_and_every_epoch_once_in_yolov5s_columns(finished: Path):
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    curves = {f"{name}_curve.png" for name in ("F1", "P", "PR", "R")}
    batches = {f"train_batch{index}.jpg" for index in range(3)} | {"val_batch0_labels.jpg", "val_batch0_pred.jpg"}
    expected = {"hyp.yaml", "opt.yaml", "results.csv", "results.png", "labels.jpg", "labels_correlogram.jpg"}
    expected |= {
        "metrics.json",
        "report.html",
        "confusion_matrix.png",
        "weights/best.pt",
        "weights/last.pt",
        "weights/epoch3.pt",
    }
    assert expected | curves | batches <= names
    assert not [name for name in names if name.endswith(".tmp")]
    header, *rows = [line.split(",") for line in (finished / "results.csv").read_text().splitlines()]
    columns = [cell.strip() for cell in header]
    assert columns[:4] == ["epoch", "train/box_loss", "train/obj_loss", "train/cls_loss"]
    assert columns[-3:] == ["x/lr0", "x/lr1", "x/lr2"]
    assert all(len(cell) == 20 for row in rows for cell in row)
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3]


def test_the_report_has_the_curves_and_the_data_of_the_training(finished: Path):
    page = (finished / "report.html").read_text(encoding="utf-8")
    for text in ("4 epochs; highest mAP50-95", "<h3>box loss</h3>", "Learning rate", "<td>train</td><td>24</td>"):
        assert text in page
    content = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    assert content["options"]["epochs"] == 4 and content["hyperparameters"]["lr0"] > 0 and content["images"] == 8
    assert content["model"].endswith("best.pt") and content["seconds"] > 0


def test_finished_checkpoints_hold_the_float16_ema_alone(finished: Path):
    kept = load_checkpoint(finished / "weights" / "epoch3.pt")
    last = load_checkpoint(finished / "weights" / "last.pt")
    assert last["epoch"] == -1
    assert all(last[key] is None for key in ("optimizer", "ema", "updates"))
    for name, value in last["model"].items():
        expected = kept["ema"][name]
        assert torch.equal(value, expected.half() if expected.is_floating_point() else expected)


def test_the_same_command_gives_the_same_weights_with_workers(finished: Path, tiny_shapes: Path, tmp_path: Path):
    options = train.run(
        data=str(tiny_shapes),
        epochs=4,
        workers=2,
        save_period=1,
        cache="ram",
        noplots=True,
        project=str(tmp_path),
        **SMALL_KEYWORDS,
    )
    assert_same_state(finished / "weights" / "epoch3.pt", Path(options.save_dir) / "weights" / "epoch3.pt")


@pytest.mark.slow
def test_kill_and_resume_ends_with_the_same_bits(finished: Path, tiny_shapes: Path, tmp_path: Path):
    arguments = ["--data", tiny_shapes, "--epochs", 4, "--save-period", 1, "--project", tmp_path, "--workers", 2]
    process = subprocess.Popen(command(*SMALL, *arguments), stderr=subprocess.DEVNULL)
    results = tmp_path / "exp" / "results.csv"
    while process.poll() is None and not (results.exists() and len(results.read_text().splitlines()) >= 3):
        time.sleep(0.02)  # two epochs are on record: the third is under way, or last.pt is being written
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")["epoch"]
    assert saved < 3, "the run ended before it could be killed"

    train.run(resume=str(tmp_path / "exp" / "weights" / "last.pt"), workers=0)
    assert_same_state(finished / "weights" / "epoch3.pt", tmp_path / "exp" / "weights" / "epoch3.pt")
    assert (tmp_path / "exp" / "results.csv").read_text() == (finished / "results.csv").read_text()
    assert not list((tmp_path / "exp").rglob("*.tmp"))


def test_what_cannot_be_resumed_is_refused(finished: Path):
    with pytest.raises(UserError, match="finished 4 epochs, nothing to resume"):
        train.run(resume=str(finished / "weights" / "last.pt"))
    with pytest.raises(UserError, match="--epochs 9 differs from the interrupted run's 4"):
        train.run(resume=str(finished / "weights" / "epoch2.pt"), epochs=9)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_how_to_go_on(number: int, status: int, tiny_shapes: Path, tmp_path: Path):
    arguments = [*SMALL, "--data", tiny_shapes, "--epochs", 50, "--noplots", "--project", tmp_path, "--workers", 2]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True)
    last = tmp_path / "exp" / "weights" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)  # as terminals and clusters do: workers get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"--resume {last}" in stderr
    assert "Traceback" not in stderr
    assert load_checkpoint(last)["optimizer"] is not None
    assert not list((tmp_path / "exp").rglob("*.tmp"))


@pytest.mark.parametrize(("poison", "term"), [("box", "box"), ("cls", "cls")])
def test_a_loss_that_is_not_finite_names_place_images_and_term(poison, term, tiny_shapes, tmp_path, monkeypatch):
    from utils.loss import anchor_based as loss
    from utils.loss.base import Mean

    terms = {"box": "box_term", "cls": "class_term"}

    def broken(logits, *arguments):
        return Mean(logits.sum() * float("nan"), 1)

    monkeypatch.setattr(loss, terms[poison], broken)
    with pytest.raises(UserError, match=rf"{term} is nan in epoch 0, batch 0 \(images .*\.jpg"):
        train.run(data=str(tiny_shapes), epochs=1, workers=0, noplots=True, project=str(tmp_path), **SMALL_KEYWORDS)


def test_callbacks_follow_a_run_and_can_stop_it(tiny_shapes: Path, tmp_path: Path):
    callbacks, seen = Callbacks(), []

    def after_batch(iteration, model, images, targets, paths, plots, sync_bn):
        seen.append((iteration, tuple(images.shape), len(paths)))
        callbacks.stop_training = iteration == 1

    callbacks.register_action("on_train_batch_end", callback=after_batch)
    train.run(
        callbacks, data=str(tiny_shapes), epochs=1, workers=0, noplots=True, project=str(tmp_path), **SMALL_KEYWORDS
    )
    assert seen == [(0, (8, 3, 64, 64), 8), (1, (8, 3, 64, 64), 8)]
    assert not (tmp_path / "exp" / "weights" / "last.pt").exists()


def test_all_hooks_see_the_run_and_one_ends_it_after_an_epoch(tiny_shapes, tiny_cfg, tmp_path, monkeypatch):
    options = {"data": str(tiny_shapes), "cfg": str(tiny_cfg), "imgsz": 64, "amp": "off", "device": "cpu", "workers": 0}
    options |= {"noplots": True, "project": str(tmp_path), "batch_size": -1}  # which a GPU's memory settles
    monkeypatch.setattr(prepare, "prepare_device", lambda *_: None)
    monkeypatch.setattr(prepare, "fitting_batch_size", lambda *_: 8)
    callbacks, heard, seen = Callbacks(), [], []
    for hook in HOOKS:
        callbacks.register_action(hook, callback=lambda *_, hook=hook, **named: heard.append(hook))

    def after_epoch(values, epoch, best_fitness, fitness, trainer):
        seen.append((epoch, trainer.options.batch_size, trainer.save_dir.name, list(trainer.losses)))
        assert list(trainer.figures.values()) == values and "metrics/mAP_0.5" in trainer.figures

    callbacks.register_action("on_fit_epoch_end", callback=after_epoch)
    train.run(callbacks, **options, epochs=1)
    assert set(heard) == set(HOOKS) and len(HOOKS) == 19
    assert seen == [(0, 8, "exp", ["box", "obj", "cls"])]

    callbacks.register_action("on_model_save", callback=lambda *_: setattr(callbacks, "stop_training", True))
    heard.clear()
    assert train.run(callbacks, **options, epochs=3).result is None
    assert heard.count("on_train_batch_end") == 3 and heard[-1] == "teardown"  # those of one epoch
    assert load_checkpoint(tmp_path / "exp2" / "weights" / "last.pt")["epoch"] == 0


def test_a_fine_tuned_run_trains_validates_and_keeps_frozen_weights(finished: Path, tiny_shapes: Path, tmp_path: Path):
    """With much that differs from a run from scratch; what each switch does to training is in utils/train."""
    start = finished / "weights" / "last.pt"
    keywords = {**SMALL_KEYWORDS, "cfg": "", "weights": str(start), "noplots": True, "workers": 0, "epochs": 1}
    keywords |= {"freeze": [3], "single_cls": True, "optimizer": "AdamW", "image_weights": True, "cache": "disk"}
    options = train.run(data=str(tiny_shapes), project=str(tmp_path), **keywords)
    values = (Path(options.save_dir) / "results.csv").read_text().splitlines()[1].split(",")
    assert np.isfinite([float(value) for value in values]).all()
    before = load_checkpoint(start)["model"]
    checkpoint = load_checkpoint(Path(options.save_dir) / "weights" / "last.pt")
    after = checkpoint["model"]
    assert (checkpoint["names"], checkpoint["nc"]) == ({0: "item"}, 1)
    frozen = [name for name in before if re.match(r"model\.[012]\.", name) and name.endswith("weight")]
    assert len(frozen) > 5
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["model.3.conv.weight"], after["model.3.conv.weight"])


def test_noval_and_nosave_still_end_with_a_validated_checkpoint(tiny_shapes: Path, tmp_path: Path):
    keywords = {**SMALL_KEYWORDS, "noplots": True, "workers": 0, "noval": True, "nosave": True}
    options = train.run(data=str(tiny_shapes), epochs=2, project=str(tmp_path), **keywords)
    rows = (Path(options.save_dir) / "results.csv").read_text().splitlines()[1:]
    validation_losses = [float(row.split(",")[8]) for row in rows]
    assert validation_losses[0] == 0
    assert validation_losses[1] > 0
    assert (Path(options.save_dir) / "weights" / "last.pt").exists()
