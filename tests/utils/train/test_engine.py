"""The trainer's checkpoints: which is written first, and the state of the loss scaler, which only GPUs use as it is.

Also when gradients are used, or lost. Every other part of a resumed run's state is in tests/test_resume.py.
"""

import dataclasses
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from tests.campaigns.interruptions import MODEL
from utils.callbacks import HOOKS, Callbacks
from utils.checkpoint import load_checkpoint
from utils.dataloaders.loader import DetectionLoader
from utils.errors import UserError
from utils.files import ROOT, read_yaml, write_yaml
from utils.loggers import LOGGERS
from utils.loss import ComputeLoss
from utils.loss.distill import Teacher
from utils.train import engine
from utils.train.hyp import Hyp

FITNESS = (0.1, 0.9, 0.2, 0.3)  # of the epochs: the second is the best
EPOCHS = 3
HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def options(tiny_shapes: Path, tmp_path: Path, monkeypatch) -> dict:
    """Keywords of a run of three epochs whose second is the best."""
    validate = engine.Trainer._validate

    def validated(trainer, final=False):
        fitness = FITNESS[trainer.epoch + (not final)]
        return dataclasses.replace(validate(trainer, final), map50=fitness, map=fitness)

    monkeypatch.setattr(engine.Trainer, "_validate", validated)
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda *_: None)
    (tmp_path / "tiny.yaml").write_text(MODEL)
    keywords = {"cfg": str(tmp_path / "tiny.yaml"), "data": str(tiny_shapes), "imgsz": 64, "batch_size": 8}
    keywords |= {"epochs": EPOCHS, "device": "cpu", "amp": "off", "noplots": True, "noautoanchor": True}
    return {**keywords, "workers": 0, "save_period": 1, "project": str(tmp_path)}


def assert_same_tensors(first: Path, second: Path, key: str) -> None:
    one, other = (load_checkpoint(path)[key] for path in (first, second))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_a_run_that_dies_between_its_checkpoints_of_an_epoch_loses_neither(options, tmp_path, monkeypatch):
    """The best epoch so far must not be taken for done, in last.pt, before best.pt holds it."""
    train.run(**options, name="whole")
    replace, written = os.replace, []

    def die_at_the_last_of_the_second_epoch(source, target):
        written.append(Path(target).name)
        if written.count("last.pt") == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_at_the_last_of_the_second_epoch)
        with pytest.raises(KeyboardInterrupt, match="Epoch 0 is saved"):
            train.run(**options)
    order = ["best.pt", "last.pt", "best.pt", "epoch1.pt", "last.pt"]
    assert [name for name in written if name.endswith(".pt")] == order
    weights, whole = tmp_path / "exp" / "weights", tmp_path / "whole" / "weights"
    assert load_checkpoint(weights / "best.pt")["epoch"] == 1 and load_checkpoint(weights / "last.pt")["epoch"] == 0
    train.run(resume=str(weights / "last.pt"))
    for name in ("best.pt", "last.pt"):
        assert_same_tensors(weights / name, whole / name, "model")
    assert (tmp_path / "exp" / "results.csv").read_text() == (tmp_path / "whole" / "results.csv").read_text()


def test_a_checkpoint_of_several_names_is_serialised_once(options, tmp_path, monkeypatch):
    save, saved = torch.save, []
    monkeypatch.setattr(torch, "save", lambda content, path: (saved.append(content["epoch"]), save(content, path)))
    callbacks, weights = Callbacks(), tmp_path / "exp" / "weights"
    equal = []
    callbacks.register_action(
        "on_model_save",
        callback=lambda *_: equal.append((weights / "best.pt").read_bytes() == (weights / "last.pt").read_bytes()),
    )
    train.run(callbacks, **options)
    assert saved == [*range(EPOCHS), -1, -1]  # and both are stripped at the end
    assert equal == [value == max(FITNESS[: epoch + 1]) for epoch, value in enumerate(FITNESS[:EPOCHS])]


def test_epochs_are_validated_folded_in_the_precision_of_training_and_the_best_one_as_it_is(options, monkeypatch):
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: torch.bfloat16)
    evaluate, seen = engine.evaluate, []

    def evaluated(predictor, *arguments, **keywords):
        backend = predictor.backend
        seen.append((any(isinstance(part, torch.nn.BatchNorm2d) for part in backend.module.modules()), backend.dtype))
        return evaluate(predictor, *arguments, **keywords)

    monkeypatch.setattr(engine, "evaluate", evaluated)
    train.run(**options)
    assert seen == [(False, torch.bfloat16)] * EPOCHS + [(True, None)]


def test_a_teacher_sees_what_the_model_sees_in_the_precision_of_training(options, more_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: torch.bfloat16)
    teach, seen, trained, terms = Teacher.maps, [], [], []

    def taught(teacher, images):
        maps = teach(teacher, images)
        seen.append((images, {level.dtype for level in maps}, any(level.requires_grad for level in maps)))
        return maps

    def ended(_iteration, model, images, *_):
        trained.append(images)
        assert not model.head._forward_pre_hooks and "teacher" not in model.state_dict()

    monkeypatch.setattr(Teacher, "maps", taught)
    callbacks = Callbacks()
    callbacks.register_action("on_train_batch_end", callback=ended)
    callbacks.register_action("on_fit_epoch_end", callback=lambda values, *_: terms.append(values))
    more_weights(tmp_path / "t.pt", {0: "cat"}, cfg=options["cfg"])
    options = {**options, "teacher": str(tmp_path / "t.pt"), "multi_scale": True, "epochs": 1}
    train.run(callbacks, **options)
    assert len(seen) == len(trained) == 3 and len({images.shape for images in trained}) > 1
    assert all(images is batch for (images, *_), batch in zip(seen, trained, strict=True))
    assert all(how == [{torch.bfloat16}, False] for _, *how in seen)
    header = (tmp_path / "exp" / "results.csv").read_text().splitlines()[0].replace(" ", "").split(",")
    assert header[1:6] == [*(f"train/{term}_loss" for term in ("box", "obj", "cls", "distill")), "metrics/precision"]
    assert "val/distill_loss" not in header and len(terms[0]) == len(header) - 1 and terms[0][3] > 0
    more_weights(tmp_path / "t.pt", {0: "cat"})
    with pytest.raises(
        UserError, match=r"--teacher .*t\.pt: .* 64 at stride 8, .*Choose a teacher of this model's size"
    ):
        train.run(**options)
    assert not (tmp_path / "exp2").exists()


@pytest.mark.parametrize("image_weights", [False, True])
def test_the_next_epochs_batches_are_begun_before_validation(options, monkeypatch, image_weights):
    """Unless it draws its images by the validation's figures, or there is none."""
    events = []
    start, evaluate = DetectionLoader.start, engine.evaluate

    def started(loader):
        if loader.keys.shuffle and loader._ahead is None:
            events.append(f"epoch {loader.keys.epoch}")
        return start(loader)

    monkeypatch.setattr(DetectionLoader, "start", started)
    monkeypatch.setattr(engine, "evaluate", lambda *a, **k: (events.append("validation"), evaluate(*a, **k))[1])
    train.run(**{**options, "epochs": 2, "image_weights": image_weights})
    early = ["epoch 0", "epoch 1", "validation", "validation", "validation"]
    late = ["epoch 0", "validation", "epoch 1", "validation", "validation"]
    assert events == (late if image_weights else early)


@pytest.mark.parametrize(("fitting", "expected"), [(3, [True, True, False]), (2, [True, False])])
def test_the_last_epochs_have_no_mosaics_where_the_hyperparameters_say_so(
    fitting, expected, options, tmp_path, monkeypatch
):
    """Also where --hours leaves fewer, with workers, which begin each epoch during the validation before it.

    Of three epochs what is begun is used, of two the second one is begun with mosaics and then anew without.
    """
    train_batch, start, mosaics, begun = engine.Trainer._train_batch, DetectionLoader.start, {}, []

    def started(loader):
        if loader.keys.shuffle and loader._ahead is None:
            begun.append((loader.keys.epoch, loader.keys.mosaic))
        return start(loader)

    def trained(trainer, batch, epoch, index):
        mosaics.setdefault(epoch, set()).update(shapes is None for shapes in batch.shapes)
        return train_batch(trainer, batch, epoch, index)

    monkeypatch.setattr(engine.Trainer, "_train_batch", trained)
    monkeypatch.setattr(DetectionLoader, "start", started)
    monkeypatch.setattr(engine, "fitting_epochs", lambda *_: fitting)
    (tmp_path / "hyp.yaml").write_text(HYP.read_text() + "close_mosaic: 0.34\n")  # one epoch of three, and of two
    train.run(**{**options, "workers": 2, "hyp": str(tmp_path / "hyp.yaml"), "hours": 1.0})
    assert mosaics == {epoch: {mosaic} for epoch, mosaic in enumerate(expected)}
    assert begun == ([(0, True), (1, True), (2, False)] if fitting == 3 else [(0, True), (1, True), (1, False)])


@pytest.mark.parametrize("hook", ["on_val_start", "on_fit_epoch_end"])
def test_no_worker_is_left_where_a_run_ends_while_the_next_epoch_is_begun(options, hook):
    def interrupt(*_):
        raise KeyboardInterrupt

    callbacks = Callbacks()
    callbacks.register_action(hook, callback=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.run(callbacks, **{**options, "workers": 2})
    assert not multiprocessing.active_children()


def test_a_resumed_run_scales_its_loss_as_before(options, tmp_path, monkeypatch):
    """In float16, which train.py takes on GPUs alone: the scale falls at overflows, and its count of steps goes on."""
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: torch.float16)
    callbacks, run = Callbacks(), tmp_path / "exp"

    def copy(_last, epoch, *_):
        if epoch == 1:
            shutil.copytree(run, tmp_path / "copy")

    callbacks.register_action("on_model_save", callback=copy)
    train.run(callbacks, **options)
    fresh = torch.amp.GradScaler("cpu").state_dict()
    assert load_checkpoint(run / "weights" / "epoch1.pt")["scaler"] != fresh
    train.run(resume=str(tmp_path / "copy" / "weights" / "last.pt"))
    first, second = (folder / "weights" / "epoch2.pt" for folder in (run, tmp_path / "copy"))
    assert load_checkpoint(first)["scaler"] == load_checkpoint(second)["scaler"]
    assert_same_tensors(first, second, "model")


@pytest.mark.parametrize(("begun", "resumed"), [(None, torch.float16), (torch.float16, None)])
def test_a_run_resumed_in_another_precision_goes_on_and_says_so(
    begun, resumed, options, monkeypatch, command, tmp_path
):
    """As from a CPU to a GPU and back: one has no loss scaler, the other has."""
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: begun)
    with pytest.raises(KeyboardInterrupt):
        train.run(stopping_at(3), **options)
    shutil.copytree(tmp_path / "exp", tmp_path / "same")
    same = command(train, "--resume", tmp_path / "same" / "weights" / "last.pt")
    assert same.status == 0 and "WARNING" not in same.said
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: resumed)
    other = command(train, "--resume", tmp_path / "exp" / "weights" / "last.pt")
    was, now = ("float16" if dtype else "float32" for dtype in (begun, resumed))
    assert other.status == 0 and f"WARNING: the run was begun in {was} and goes on in {now}" in other.said


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_step(options, tmp_path, monkeypatch):
    """The loss may be finite all the same: a root of 0 is 0, and its slope is not."""
    reckon = ComputeLoss.compute

    def lost(loss, outputs, *arguments):
        result = reckon(loss, outputs, *arguments)
        return result._replace(total=result.total + (outputs[0].sum() * 0).sqrt())

    monkeypatch.setattr(ComputeLoss, "compute", lost)
    with pytest.raises(UserError, match=r"gradient norm is nan in epoch 0, batch 0 \(images .*\.jpg"):
        train.run(**options, recipe="yolov5")
    assert not list((tmp_path / "exp" / "weights").iterdir())


@pytest.mark.parametrize(
    ("key", "in_file", "option"),
    [("label_smoothing", 0.1, None), ("label_smoothing", 0.1, 0.0), ("label_smoothing", 0.1, 0.3)]
    + [("box_loss", "giou", None), ("box_loss", "giou", "ciou"), ("box_loss", "giou", "siou")],
)
def test_what_the_file_says_holds_unless_the_option_is_given(key, in_file, option, options, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ComputeLoss, "__init__", lambda loss, model: made.append(model.hyp[key]) or 1 / 0)
    (tmp_path / "hyp.yaml").write_text(HYP.read_text() + f"{key}: {in_file}\n")
    given = {} if option is None else {key: option}
    with pytest.raises(ZeroDivisionError):
        train.run(**options, hyp=str(tmp_path / "hyp.yaml"), **given)
    expected = in_file if option is None else option
    assert made == [expected] and getattr(Hyp.from_yaml(tmp_path / "exp" / "hyp.yaml"), key) == expected


@pytest.mark.parametrize(
    ("given", "kept", "file"),
    [
        ({}, "small", "hyp.small.yaml"),
        ({"recipe": "yolov5"}, "yolov5", "hyp.scratch-low.yaml"),
        (
            {"recipe": "small", "optimizer": "AdamW", "label_smoothing": 0.1, "box_loss": "wiou"},
            *("small", "hyp.small.yaml"),
        ),
        ({"recipe": "auto", "hyp": HYP}, "yolov5", "hyp.scratch-low.yaml"),  # the default, but stated
        ({"recipe": "small", "hyp": HYP.with_name("hyp.scratch-med.yaml")}, "yolov5", "hyp.scratch-med.yaml"),
    ],
)
def test_a_recipe_is_kept_with_the_run_and_a_stated_file_wins(given, kept, file, options, tmp_path, caplog):
    caplog.set_level("INFO", "yolov5")
    with pytest.raises(KeyboardInterrupt):
        train.run(stopping_at(3), **{**options, **given})
    stated = {name: given[name] for name in ("label_smoothing", "box_loss") if name in given}
    expected = dataclasses.replace(Hyp.from_yaml(HYP.with_name(file)), **stated)
    last = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")
    recorded = read_yaml(tmp_path / "exp" / "opt.yaml")
    assert Hyp.from_dict(last["hyp"]) == Hyp.from_yaml(tmp_path / "exp" / "hyp.yaml") == expected
    for opt in (last["opt"], recorded):
        assert (opt["recipe"], Path(opt["hyp"]).name) == (kept, file)
    assert last["optimizer"]["name"] == expected.optimizer == recorded["optimizer"]
    assert ("holds, --recipe" in caplog.text) == ("hyp" in given)
    caplog.clear()
    seen, callbacks = [], Callbacks()
    callbacks.register_action("on_train_start", callback=lambda trainer: seen.append(trainer.hyp))
    train.run(callbacks, resume=str(tmp_path / "exp" / "weights" / "last.pt"))
    assert seen == [expected] and "--recipe" not in caplog.text


def test_a_label_smoothing_that_leaves_nothing_to_learn_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(UserError, match="--label-smoothing 1 .* below 1"):
        train.run(**{**options, "project": str(tmp_path / "runs")}, label_smoothing=1.0)
    assert not (tmp_path / "runs").exists()


def test_all_hooks_run_at_their_moments_with_their_arguments(options, tmp_path, monkeypatch):
    """Two epochs of two batches; the numbers of arguments are YOLOv5's."""
    callbacks, calls = Callbacks(), []
    for hook in HOOKS:
        callbacks.register_action(hook, callback=lambda *args, hook=hook, **named: calls.append((hook, args, named)))
    monkeypatch.setattr("utils.train.prepare.prepare_device", lambda *_: None)  # which wants a GPU for it
    monkeypatch.setattr("utils.train.prepare.fitting_batch_size", lambda *_: 16)
    monkeypatch.setattr("utils.train.optim.WARMUP_FLOOR", 4)
    train.run(callbacks, **{**options, "epochs": 2, "batch_size": -1, "recipe": "yolov5"})
    validation = ["on_val_start", "on_val_batch_start", *["on_val_image_end"] * 8, "on_val_batch_end", "on_val_end"]
    step, end = ["optimizer_step", "on_before_zero_grad"], ["on_train_batch_end"]
    epoch = ["on_train_epoch_end", *validation, "on_fit_epoch_end", "on_model_save"]
    assert [hook for hook, *_ in calls] == [
        *["on_pretrain_routine_start", "on_params_update", "on_pretrain_routine_end", "on_train_start"],
        *["on_train_epoch_start", "on_train_batch_start", *step, *end, "on_train_batch_start", *step, *end, *epoch],
        *["on_train_epoch_start", "on_train_batch_start", *end, "on_train_batch_start", *step, *end, *epoch],
        *[*validation, "on_train_end", "teardown"],
    ]
    arguments = {hook: (args, named) for hook, args, named in calls}
    last, best = (tmp_path / "exp" / "weights" / name for name in ("last.pt", "best.pt"))
    assert set(arguments) == set(HOOKS)
    assert arguments["on_params_update"] == (({"batch_size": 16},), {})
    assert arguments["on_train_epoch_end"] == ((), {"epoch": 1})
    assert len(arguments["on_train_batch_end"][0]) == 7 and len(arguments["on_val_image_end"][0]) == 5
    assert len(arguments["on_fit_epoch_end"][0][0]) == 13 and arguments["on_fit_epoch_end"][0][1:] == (1, 0.9, 0.9)
    assert arguments["on_model_save"] == ((last, 1, True, 0.9, 0.9), {})
    assert arguments["on_train_end"][0][:4] == (last, best, False, 1) and len(arguments["on_train_end"][0][4]) == 7
    with_arguments = {hook for hook, value in arguments.items() if value != ((), {})}
    assert with_arguments == {
        *["on_params_update", "on_train_batch_end", "on_train_epoch_end", "on_val_image_end"],
        *["on_fit_epoch_end", "on_model_save", "on_train_end"],
    }


def test_a_hook_sees_the_run_and_its_result_comes_back(options):
    callbacks, seen = Callbacks(), []

    def after_epoch(values, epoch, best_fitness, fitness, trainer):
        seen.append((epoch, best_fitness == trainer.best_fitness, trainer.options.epochs, trainer.model.nc))

    callbacks.register_action("on_fit_epoch_end", callback=after_epoch)
    done = train.run(callbacks, **options)
    assert seen == [(epoch, True, EPOCHS, 4) for epoch in range(EPOCHS)]
    assert done.epochs == EPOCHS and done.result.fitness == pytest.approx(FITNESS[EPOCHS - 1])


def test_what_a_caller_opened_is_torn_down_however_a_run_ends(options, tmp_path):
    callbacks, calls = Callbacks(), []
    callbacks.register_action("on_train_start", callback=lambda: 1 / 0)
    callbacks.register_action("teardown", callback=lambda: calls.append("teardown"))
    with pytest.raises(ZeroDivisionError):
        train.run(callbacks, **options)
    with pytest.raises(UserError):
        train.run(callbacks, **{**options, "data": str(tmp_path / "nowhere.yaml")})
    assert calls == ["teardown"] * 2


@pytest.mark.parametrize("quad", [False, True])
def test_the_progress_bar_counts_the_images_of_the_data_set(quad, options, monkeypatch):
    bars, make = [], engine.progress

    def progress(*arguments, **named):
        bars.append((make(*arguments, **named), []))
        monkeypatch.setattr(bars[-1][0], "update", bars[-1][1].append)
        return bars[-1][0]

    monkeypatch.setattr(engine, "progress", progress)
    train.run(**{**options, "epochs": 1, "batch_size": 16}, quad=quad)
    assert [(bar.total, seen) for bar, seen in bars] == [(24, [16, 8])]


@pytest.fixture
def clock(monkeypatch) -> tuple[Callbacks, list]:
    """Lets a batch of training take 10 seconds, a validation 5; keeps what the progress line says of time."""
    now, told, make = [1000.0], [], engine.progress
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_time(seconds):
        now[0] += seconds

    def progress(*arguments, **named):
        bar = make(*arguments, **named)
        monkeypatch.setattr(bar, "set_description_str", lambda text, refresh: told.append(text.split()[-1]))
        return bar

    monkeypatch.setattr(engine, "progress", progress)
    callbacks = Callbacks()
    callbacks.register_action("on_train_batch_start", callback=lambda: pass_time(10))
    callbacks.register_action("on_val_start", callback=lambda: pass_time(5))
    return callbacks, told


def test_the_progress_line_tells_how_long_the_run_goes_on(options, clock, tmp_path):
    """By the epochs, of 35 seconds each, that are finished."""
    callbacks, told = clock
    train.run(callbacks, **options)
    assert told == ["-"] * 3 + ["01:00", "00:50", "00:40", "00:25", "00:15", "00:05"]


@pytest.mark.parametrize(
    ("seconds", "noval", "epochs", "said"),
    [
        (110, False, 3, "an epoch takes 35.0 s, 3 epochs fit instead of 4"),  # 3 * 35 and a last validation
        (109, False, 2, "an epoch takes 35.0 s, 2 epochs fit instead of 4"),
        (20, False, 1, "an epoch takes 35.0 s, 1 epoch fits instead of 4"),
        (9999, False, 4, "an epoch takes 35.0 s, all 4 epochs fit"),
        (105, True, 3, "an epoch takes 30.0 s, 3 epochs fit instead of 4"),  # 3 * 30, three validations
        (104, True, 2, "an epoch takes 30.0 s, 2 epochs fit instead of 4"),
    ],
)
def test_hours_set_the_number_of_epochs_after_the_first(seconds, noval, epochs, said, options, clock, tmp_path, caplog):
    caplog.set_level("INFO", "yolov5")
    callbacks, _ = clock
    schedules = []
    callbacks.register_action("on_train_epoch_end", callback=lambda epoch, trainer: schedules.append(trainer.schedule))
    given = {**options, "epochs": 4, "noval": noval, "hours": seconds / 3600}
    done = train.run(callbacks, **given)
    assert [schedule.epochs for schedule in schedules] == [4] + [epochs] * (epochs - 1)
    assert [message.partition(": ")[2] for message in caplog.messages if message.startswith("--hours")] == [said]
    assert done.epochs == epochs and len((tmp_path / "exp" / "results.csv").read_text().splitlines()) == 1 + epochs
    last = load_checkpoint(tmp_path / "exp" / "weights" / "last.pt")
    assert last["opt"]["epochs"] == epochs and last["opt"]["hours"] == seconds / 3600
    assert read_yaml(tmp_path / "exp" / "opt.yaml")["epochs"] == 4  # as it was asked


def test_the_moving_average_follows_the_number_of_epochs_that_hours_leave(options, clock, tmp_path):
    callbacks, taus = clock[0], []
    callbacks.register_action("on_train_epoch_end", callback=lambda epoch, trainer: taus.append(trainer.ema.tau))
    (tmp_path / "hyp.yaml").write_text(HYP.read_text() + "nominal_batch: 8\nema_tau: 0.5\n")
    train.run(callbacks, **{**options, "epochs": 4, "hyp": str(tmp_path / "hyp.yaml"), "hours": 80 / 3600})
    assert taus == [6.0, 3.0]  # half of the steps, of which an epoch has three


def test_every_image_counts_in_a_step(options, tmp_path, monkeypatch):
    """Two batches an epoch, of 16 and 8 images, where four make a step: gradients left over are used, not dropped."""
    events, reckon, step = [], ComputeLoss.compute, torch.optim.SGD.step

    def reckoned(loss, outputs, *arguments):
        if outputs[0].requires_grad:
            events.append(len(outputs[0]))
        return reckon(loss, outputs, *arguments)

    def stepped(optimizer, *arguments):
        events.append("step")
        return step(optimizer, *arguments)

    monkeypatch.setattr(ComputeLoss, "compute", reckoned)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    monkeypatch.setattr("utils.train.optim.WARMUP_FLOOR", 1)
    (tmp_path / "hyp.yaml").write_text(re.sub("(?m)^warmup_epochs:.*", "warmup_epochs: 0.0", HYP.read_text()))
    train.run(**{**options, "batch_size": 16, "hyp": str(tmp_path / "hyp.yaml")})
    assert events == [16, "step", 8, "step", 16, 8, "step", 16, 8, "step"]
    assert "last_step" not in load_checkpoint(tmp_path / "exp" / "weights" / "epoch1.pt")["schedule"]


def stopping_at(number: int) -> Callbacks:
    """Presses Ctrl-C after the batch of this number since the run's start; an epoch has three."""

    def stop(iteration, *_):
        if iteration == number:
            raise KeyboardInterrupt

    callbacks = Callbacks()
    callbacks.register_action("on_train_batch_end", callback=stop)
    return callbacks


def test_a_new_run_in_a_used_folder_takes_nothing_of_the_former_for_its_own(options, tmp_path):
    """Its best epoch is not saved (--nosave), and its model is another one."""
    train.run(**{**options, "epochs": 2})
    weights, results = tmp_path / "exp" / "weights", tmp_path / "exp" / "results.csv"
    former = {path.name: path.read_bytes() for path in [*weights.iterdir(), results]}
    assert former.keys() == {"best.pt", "last.pt", "epoch1.pt", "results.csv"}
    (tmp_path / "wider.yaml").write_text(MODEL.replace("[16, 3, 2]", "[24, 3, 2]"))
    (weights / "mine.pt").touch()
    again = {**options, "cfg": str(tmp_path / "wider.yaml"), "exist_ok": True, "nosave": True, "save_period": -1}
    for number, told in ((0, r"No epoch was finished: start again\."), (3, r"No epoch was saved \(--nosave\): start")):
        with pytest.raises(KeyboardInterrupt, match=told):
            train.run(stopping_at(number), **again)
        assert {name: (weights / name).read_bytes() for name in former if name.endswith(".pt")} == {
            name: content for name, content in former.items() if name.endswith(".pt")
        }
        assert (results.read_bytes() == former["results.csv"]) is (number == 0)
    train.run(**again)
    assert {path.name for path in weights.iterdir()} == {"last.pt", "mine.pt"}
    assert load_checkpoint(weights / "last.pt")["model"]["model.1.conv.weight"].shape[0] == 24
    assert len(results.read_text().splitlines()) == 1 + EPOCHS


def test_a_run_resumed_from_its_best_and_stopped_at_once_has_lost_nothing(options, tmp_path):
    """The best epoch is the second, the last one the third; the fourth is interrupted."""
    options = {**options, "epochs": 4}
    with pytest.raises(KeyboardInterrupt, match=rf"Epoch 2 is saved\. .*--resume {tmp_path}/exp/weights/last\.pt"):
        train.run(stopping_at(9), **options)
    weights, results = tmp_path / "exp" / "weights", tmp_path / "exp" / "results.csv"
    before = results.read_text(), (weights / "last.pt").read_bytes()
    with pytest.raises(KeyboardInterrupt, match=rf"Epoch 1 is saved\. .*--resume {weights}/best\.pt"):
        train.run(stopping_at(6), resume=str(weights / "best.pt"))
    assert (results.read_text(), (weights / "last.pt").read_bytes()) == before
    with pytest.raises(KeyboardInterrupt, match=rf"Epoch 2 is saved\. .*--resume {weights}/last\.pt"):
        train.run(stopping_at(9), resume=str(weights / "best.pt"))
    assert [int(line.split(",")[0]) for line in results.read_text().splitlines()[1:]] == [0, 1, 2]


def test_what_python_gives_is_taken_as_from_the_command_line(options, tmp_path, caplog):
    given = {"data": Path(options["data"]), "cfg": Path(options["cfg"]), "project": tmp_path, "name": None, "hyp": HYP}
    given |= {"device": torch.device("cpu"), "epochs": 1, "imgsz": 65, "noautoanchor": False}
    done = train.run(**{**options, **given})
    kept = read_yaml(tmp_path / "exp" / "opt.yaml")
    assert {**kept, "result": done.result} == vars(done) and kept["device"] == "cpu" and kept["name"] == "exp"
    assert caplog.text.count("--img-size 65 must be a multiple") == 1 and kept["imgsz"] == 96


def test_a_run_that_is_refused_leaves_no_folder(options, tmp_path):
    data = read_yaml(options["data"])
    folder = Path(options["data"]).parent
    write_yaml(tmp_path / "few.yaml", {**data, "path": str(folder), "names": ["circle", "square"]})
    (tmp_path / "none.yaml").write_text(re.sub("anchors: .*", "anchors: 3", MODEL, count=1))
    for name, wrong, words in (("data", "few.yaml", "exceeds nc=2"), ("cfg", "none.yaml", "--noautoanchor")):
        with pytest.raises(UserError, match=words):
            train.run(**{**options, name: tmp_path / wrong, "project": tmp_path / "runs"})
    assert not (tmp_path / "runs").exists()
