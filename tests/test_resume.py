"""A run that ends after any epoch and is resumed ends as one that was not disturbed, to the bit.

Each kind of training carries some state from epoch to epoch that could be forgotten. It is trained once; on the way
its folder is copied at a moment after each epoch, as a kill at that moment would leave it, and each copy is resumed.
What fitness and figures a model of a few layers has would hide much, so they are set for each epoch. Kills at random
moments are in tests/campaigns/interruptions.py, signals to commands in test_train.py.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import train
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import ROOT
from utils.loggers import LOGGERS
from utils.loss import ComputeLoss
from utils.train import engine
from utils.train.prepare import TrainConfig
from utils.train.resume import check_dataset, find_resumable, resume_options

EPOCHS, BATCHES = 4, 4
FITNESS = (0.3, 0.5, 0.2, 0.4)  # of the epochs: the second is the best
HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"
MODEL = """
nc: 4
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[6, 8, 12, 10, 16, 20], [20, 28, 32, 24, 40, 44]]
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, GSConv, [32, 3, 2]]]
head: [[-1, 1, GSConv, [32, 3, 2]], [-1, 1, nn.Dropout, [0.2]], [[2, 4], 1, Detect, [nc, anchors]]]
"""
KINDS = {  # what is forgotten shows in
    "SGD": {"recipe": "yolov5"},  # momentum, the generator of the dropout
    "AdamW": {"recipe": "small", "cos_lr": True, "cache": "ram"},  # both moments and the count of steps
    "Adam, rect": {"optimizer": "Adam", "rect": True},
    "multi-scale": {"multi_scale": True, "label_smoothing": 0.1, "freeze": [1]},  # the iteration
    "image weights": {"image_weights": True, "cache": "disk"},  # the last validation's figures of each class
    "WIoU": {"box_loss": "wiou"},  # the running mean of its distances
    "patience": {"patience": 1},  # the best epoch so far; the run ends with the third
    "shares of the run": {"hyp": "shares.yaml"},  # where the mosaics end, the pace of the moving average
    "hours": {"epochs": 30, "hours": 1.0, "hyp": "shares.yaml"},  # how many epochs the first one's time has settled
    "teacher": {"teacher": "teacher.pt", "multi_scale": True, "hyp": "alike.yaml"},  # its weights, which a file has
    "fitted anchors": {"noautoanchor": False, "cfg": "none.yaml"},  # anchors that only the checkpoint has
    "balance": {},  # the weights of the layers' objectness; see the test
}

OWN_CACHE = ("AdamW", "image weights")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_shapes, more_weights, tmp_path_factory) -> Path:
    """Eight images to train on and two to validate with, a data set YAML, two models and a teacher."""
    root = tmp_path_factory.mktemp("eight")
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image = cv2.imread(str(tiny_shapes.parent / "images" / split / f"{index}.jpg"))
            cv2.imwrite(str(root / "images" / split / f"{index}.png"), cv2.resize(image, (96, 64 + 16 * index)))
            shutil.copy(tiny_shapes.parent / "labels" / split / f"{index}.txt", root / "labels" / split)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c, d]\n")
    (root / "tiny.yaml").write_text(MODEL)
    shares = "close_mosaic: 0.5\nema_tau: 0.25\nwarmup_ratio: 0.5\nnominal_batch: 4\n"
    (root / "shares.yaml").write_text(HYP.read_text() + shares)
    rows = MODEL.splitlines()
    (root / "dense.yaml").write_text(MODEL.replace("GSConv", "Conv"))
    more_weights(root / "teacher.pt", dict(enumerate("abcdefg")), cfg=str(root / "dense.yaml"))
    only = re.sub(r"(?m)^(box|obj|cls): .*", r"\1: 0.0", HYP.read_text())
    (root / "alike.yaml").write_text(only + "distill: 1.0\nwarmup_ratio: 0.1\nnominal_batch: 2\n")
    (root / "none.yaml").write_text("\n".join("anchors: 3" if row.startswith("anchors") else row for row in rows))
    return root


@pytest.fixture(autouse=True)
def set_figures(monkeypatch):
    """Lets each epoch's validation find its own fitness, and figures of the classes that depend on the epoch.

    TensorBoard is left out: each start makes a file of its own.
    """
    validate = engine.Trainer._validate

    def validated(trainer, final=False):
        epoch = trainer.epoch + (not final)
        maps = np.random.default_rng(epoch).random(trainer.model.nc)
        found = validate(trainer, final)
        return dataclasses.replace(found, map50=FITNESS[epoch], map=FITNESS[epoch], maps=maps)

    monkeypatch.setattr(engine.Trainer, "_validate", validated)
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda *_: None)


def start(folder: Path, project: Path, callbacks: Callbacks, **differently) -> Path:
    """Trains and returns the run's folder."""
    options = {"cfg": "tiny.yaml", "imgsz": 64, "batch_size": 2, "epochs": EPOCHS, "device": "cpu", "amp": "off"}
    options |= {"noplots": True, "noautoanchor": True, "save_period": 1, "workers": 0, **differently}
    options |= {name: str(folder / options[name]) for name in ("cfg", "hyp") if name in options}
    options = {"data": str(folder / "data.yaml"), **options}
    return Path(train.run(callbacks, project=str(project), **options).save_dir)


def ending(at: int) -> Callbacks:
    """Presses Ctrl-C after batch `at` since the run's start."""

    def end(iteration, *_):
        if iteration == at:
            raise KeyboardInterrupt

    callbacks = Callbacks()
    callbacks.register_action("on_train_batch_end", callback=end)
    return callbacks


def copying(run: Path, copies: Path) -> Callbacks:
    """Copies a run's folder at another moment after each of the first three epochs: `copies`/1 to 3."""

    def saved(_last, epoch, *_):  # the very moment that the first epoch is saved
        if epoch == 0:
            shutil.copytree(run, copies / "1")

    def recorded(_values, epoch, *_):  # the third epoch is on record, but only the second is saved
        if epoch == 2:
            shutil.copytree(run, copies / "2")

    def trained(iteration, *_):  # in the middle of the fourth
        if iteration == 3 * BATCHES + 1:
            shutil.copytree(run, copies / "3")

    callbacks = Callbacks()
    for name, hook in (("on_model_save", saved), ("on_fit_epoch_end", recorded), ("on_train_batch_end", trained)):
        callbacks.register_action(name, callback=hook)
    return callbacks


def parts(value: object) -> dict[str, object]:
    """All tensors, numbers and texts in nested dicts and lists, by path."""
    return {pytree.keystr(path): part for path, part in pytree.tree_flatten_with_path(value)[0]}


def assert_same_end(run: Path, whole: Path) -> None:
    """The same files, records, and checkpoints in every part; those of single epochs hold EMA and optimizer."""
    names = [sorted(path.relative_to(one).as_posix() for path in one.rglob("*")) for one in (run, whole)]
    assert names[0] == names[1]
    assert (run / "results.csv").read_text() == (whole / "results.csv").read_text()
    for path in sorted(whole.glob("weights/*.pt")):
        mine, other = (parts(load_checkpoint(one / "weights" / path.name)) for one in (run, whole))
        assert mine.keys() == other.keys()
        different = [
            key
            for key, value in other.items()
            if not key.startswith(("['date']", "['opt']", "['spent']", "['versions']"))
            and not (torch.equal(mine[key], value) if isinstance(value, torch.Tensor) else mine[key] == value)
        ]
        assert not different, f"{path.name}: {len(different)} of {len(other)} parts differ, such as {different[:4]}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_after_any_epoch_the_end_is_the_same(kind, folder, tmp_path, monkeypatch):
    if kind == "balance":  # train.py has no option for it
        monkeypatch.setattr(ComputeLoss, "__init__", functools.partialmethod(ComputeLoss.__init__, autobalance=True))
        monkeypatch.setattr("utils.loss.anchor_based._REFERENCE_STRIDE", 8)
    monkeypatch.chdir(folder)  # where the teacher is
    monkeypatch.setattr(engine, "fitting_epochs", lambda *_: EPOCHS)
    copies = tmp_path / "copies"
    whole = start(folder, tmp_path, copying(tmp_path / "exp", copies), **KINDS[kind])
    epochs = 3 if kind == "patience" else EPOCHS
    rows = (whole / "results.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(epochs))
    assert load_checkpoint(whole / "weights" / f"epoch{epochs - 1}.pt")["optimizer"] is not None
    assert len(list(copies.iterdir())) == epochs - 1
    if kind == "teacher":
        header, values = (whole / "results.csv").read_text().splitlines()[0], [float(row.split(",")[4]) for row in rows]
        assert header.split(",")[4].strip() == "train/distill_loss" and "val/distill_loss" not in header
        assert values[3] < values[0] - 0.1, values  # it learns, and of the teacher alone
    monkeypatch.setattr(engine, "fitting_epochs", lambda *_: 2)  # of another machine, say
    for number in range(1, epochs):
        last = copies / str(number) / "weights" / "last.pt"
        assert load_checkpoint(last)["epoch"] == number - 1
        changed = {} if kind in OWN_CACHE else {"cache": (None, "ram", "disk")[number - 1]}
        train.run(resume=str(last), workers=2 * (number == 2), **changed)  # neither makes a difference
        assert_same_end(copies / str(number), whole)


def test_an_empty_name_to_resume_starts_no_new_run(command, folder, tmp_path):
    """`--resume "$LAST"` of a variable that is not set; `--resume` alone means the newest run."""
    line = ["--cfg", folder / "tiny.yaml", "--data", folder / "data.yaml", "--project", tmp_path, "--img", 64]
    command(train, *line, "--resume", "").assert_refused("--resume", "empty", "weights/last.pt", "newest")
    with pytest.raises(UserError, match="name is empty"):
        train.run(resume=" ")
    assert not list(tmp_path.iterdir())


def test_a_path_to_resume_may_be_a_path_object(tmp_path, monkeypatch):
    """It was once taken for `--resume` alone, which resumes the newest run instead."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no last\*\.pt below"):
        find_resumable(True)
    for name in ("wanted", "newest"):
        (tmp_path / f"last-{name}.pt").touch()
    assert find_resumable(Path("last-wanted.pt")) == Path("last-wanted.pt")
    with pytest.raises(UserError, match=r"gone\.pt: no such file"):
        find_resumable(Path("gone.pt"))


def test_resume_takes_the_newest_run_its_options_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").touch()
    content = dict.fromkeys("model ema scaler schedule stopper generators hyp yaml optimizer".split(), {"state": {}})
    content |= {"updates": 0, "epoch": 0, "best_fitness": 0.0}
    for number, name in enumerate(("a", "b", "c")):
        path = tmp_path / "runs" / name / "weights" / "last.pt"
        path.parent.mkdir(parents=True)
        opt = {"data": str(tmp_path / "shapes.yaml"), "batch_size": 4, "imgsz": 64, "workers": 8, "epochs": number}
        save_checkpoint(path, {**content, "opt": opt})
        os.utime(path, (1000 + number % 2, 1000 + number % 2))  # b is the newest
    defaults = vars(train.build_parser().parse_args([]))
    config = TrainConfig(**{**defaults, "resume": True, "workers": 2})
    resume_options(config, {"resume", "workers"}, defaults)
    assert (config.epochs, config.batch_size) == (1, 4)
    assert config.workers == 2  # given anew
    assert (Path(config.resume), Path(config.save_dir)) == (Path("runs/b/weights/last.pt"), Path("runs/b"))


def test_of_a_checkpoint_without_a_record_of_its_data_it_is_said(caplog):
    check_dataset({"data": "a.yaml"}, {}, "old.pt", "/now/b.yaml")
    assert "old.pt is of an earlier version" in caplog.text and "whether /now/b.yaml has changed" in caplog.text


@pytest.fixture
def interrupted(folder, tmp_path) -> Path:
    """The last checkpoint of a run that was interrupted in its second epoch."""
    return stopped(folder, tmp_path, data=str(folder / "data.yaml"))


def test_the_time_before_an_interruption_counts(interrupted):
    checkpoint = load_checkpoint(interrupted)
    assert 0 < checkpoint["spent"]["seconds"] < 10_000
    checkpoint["spent"] = {"seconds": 10_000.0, "watt_hours": {"gpu": 4.5}}
    save_checkpoint(interrupted, checkpoint)
    train.run(resume=str(interrupted))
    told = json.loads((interrupted.parents[1] / "metrics.json").read_text())
    assert told["seconds"] > 10_000 and told["energy_wh"]["gpu"] == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda yaml: yaml.pop("anchors"), ["'anchors' is missing"]),
        (lambda yaml: yaml["head"].__setitem__(0, [-1, 1, "GSConw", [32, 3, 2]]), ["GSConw", "Did you mean 'GSConv'"]),
        (lambda yaml: yaml.update(nc="four"), ["nc"]),
    ],
    ids=["key", "block", "number"],
)
def test_a_bad_model_in_a_checkpoint_to_resume_is_told_with_the_file(change, words, command, interrupted):
    checkpoint = load_checkpoint(interrupted)
    change(checkpoint["yaml"])
    save_checkpoint(interrupted, checkpoint)
    outcome = command(train, "--resume", interrupted)
    outcome.assert_refused(f"{interrupted}: ", *words)
    assert load_checkpoint(interrupted)["epoch"] == 0


def test_what_else_is_wrong_at_a_resume_is_not_laid_on_the_checkpoint(command, interrupted, folder):
    data = folder / "data.yaml"
    text = data.read_text()
    data.write_text(text.replace("images/train", "images/nothing"))
    try:
        outcome = command(train, "--resume", interrupted)
    finally:
        data.write_text(text)
    outcome.assert_refused("data.yaml")
    assert f"error: {interrupted}" not in outcome.said


@pytest.fixture
def own_folder(folder, tmp_path, monkeypatch):
    """Makes a data set of one's own, data.yaml and set/, in a folder of its own; works there."""

    def make(name: str, names: str = "[a, b, c, d]") -> Path:
        place = tmp_path / name
        for kind in ("images", "labels"):
            shutil.copytree(folder / kind, place / "set" / kind, ignore=shutil.ignore_patterns("*.npz", "*_npy"))
        (place / "data.yaml").write_text(f"path: set\ntrain: images/train\nval: images/val\nnames: {names}\n")
        monkeypatch.chdir(place)
        return place

    return make


def stopped(folder: Path, project: Path, **differently) -> Path:
    """The last checkpoint of a run on ./data.yaml that was interrupted in its second epoch."""
    with pytest.raises(KeyboardInterrupt):
        start(folder, project, ending(BATCHES), **{"data": "data.yaml", **differently})
    return project / "exp" / "weights" / "last.pt"


def test_a_run_keeps_to_its_data_wherever_it_goes_on(folder, own_folder, tmp_path):
    """Another folder has a data.yaml too, of other images, and classes of the same names."""
    mine = own_folder("mine")
    last = stopped(folder, tmp_path)
    assert load_checkpoint(last)["data"] == load_checkpoint(last)["opt"]["data"] == str(mine / "data.yaml")
    assert f"data: {mine / 'data.yaml'}" in (tmp_path / "exp" / "opt.yaml").read_text()
    own_folder("other")
    seen, callbacks = set(), Callbacks()
    callbacks.register_action("on_train_batch_end", callback=lambda *arguments: seen.update(arguments[4]))
    options = train.run(callbacks, resume=str(last))
    assert options.data == str(mine / "data.yaml")
    assert len(seen) == 8 and all(Path(path).is_relative_to(mine / "set") for path in seen)


def test_a_resumed_run_says_what_has_changed_in_its_data(command, folder, own_folder, tmp_path):
    mine = own_folder("mine")
    last = stopped(folder, tmp_path)
    shutil.copytree(tmp_path / "exp", tmp_path / "unchanged")
    outcome = command(train, "--resume", tmp_path / "unchanged" / "weights" / "last.pt")
    assert outcome.status == 0 and "WARNING" not in outcome.said
    for number in (0, 1):
        (mine / "set" / "images" / "train" / f"{number}.png").unlink()
    shutil.copy(mine / "set" / "images" / "val" / "0.png", mine / "set" / "images" / "train" / "8.png")
    for number in (3, 4, 5):
        (mine / "set" / "labels" / "train" / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (mine / "set" / "labels" / "val" / "1.txt").unlink()
    outcome = command(train, "--resume", last)
    (warning,) = (line for line in outcome.said.splitlines() if line.startswith("WARNING"))
    assert "train: 2 removed, 1 added, 3 relabelled; val: 1 relabelled" in warning
    assert f"{mine / 'data.yaml'} (train: 8 images, val: 2 images)" in warning  # what was
    assert f"{mine / 'data.yaml'} (train: 7 images, val: 2 images)" in warning  # what is
    assert outcome.status == 0


def test_a_run_is_not_resumed_on_other_classes(command, folder, own_folder, tmp_path):
    mine = own_folder("mine")
    last = stopped(folder, tmp_path)
    others = {"[d, b, c, a]": "a is d, d is a", "[a, b, c, d, e]": "e is new", "[a, b, c]": "d is gone"}
    for names, told in others.items():
        yaml = (mine / "data.yaml").read_text()
        (mine / "data.yaml").write_text(re.sub(r"names: .*", f"names: {names}", yaml))
        command(train, "--resume", last).assert_refused(str(mine / "data.yaml"), told, "--weights")
    assert load_checkpoint(last)["epoch"] == 0


def test_data_that_was_moved_is_named_anew(command, folder, own_folder, tmp_path):
    mine = own_folder("mine")
    last = stopped(folder, tmp_path)
    mine.rename(tmp_path / "moved")
    command(train, "--resume", last).assert_refused(str(mine / "data.yaml"), "--data")
    outcome = command(train, "--resume", last, "--data", tmp_path / "moved" / "data.yaml")
    assert outcome.status == 0 and "WARNING" not in outcome.said


def test_data_given_as_a_dict_is_found_again_from_another_folder(folder, own_folder, tmp_path):
    mine = own_folder("mine")
    splits = {"train": "set/images/train", "val": "set/images/val"}
    last = stopped(folder, tmp_path, data={**splits, "names": ["a", "b", "c", "d"]})
    assert load_checkpoint(last)["data"] is None  # no file that val.py could read
    own_folder("other")
    assert train.run(resume=str(last)).data["train"] == [str(mine / "set" / "images" / "train")]


def test_a_run_keeps_to_its_teacher(command, folder, own_folder, more_weights, tmp_path):
    mine = own_folder("mine")
    names, cfg, file = {0: "a"}, str(folder / "dense.yaml"), mine / "dense.pt"
    more_weights(file, names, cfg=cfg)
    last = stopped(folder, tmp_path, teacher="dense.pt")
    assert load_checkpoint(last)["opt"]["teacher"] == str(file)
    own_folder("other")
    more_weights(file, names, seed=1, cfg=cfg)
    command(train, "--resume", last).assert_refused("--resume", str(file), "other weights")
    file.unlink()
    command(train, "--resume", last).assert_refused("--teacher", str(file), "no such file")
    more_weights(file, names, cfg=cfg)
    command(train, "--resume", last, "--teacher", "").assert_refused("--teacher", str(file))
    assert load_checkpoint(last)["epoch"] == 0
    train.run(resume=str(last))
    assert (tmp_path / "exp" / "results.csv").read_text().count("\n") == 1 + EPOCHS
