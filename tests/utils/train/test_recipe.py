"""The numbers of the recipe: the trainer's steps against a loop written here, and that every setting acts.

The loop is written from the recipe alone. It leaves to the program the forward pass and the three terms of the loss,
which have golden values of their own (test_yolo.py, test_loss.py).
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch

import train
from models.inference.evaluation import module_predictor
from models.yolo import Model
from utils.callbacks import Callbacks
from utils.dataloaders.loader import Batch
from utils.errors import UserError
from utils.files import ROOT
from utils.loggers import LOGGERS
from utils.loss import ComputeLoss
from utils.train import engine
from utils.train.hyp import Hyp

MODEL = """
nc: 3
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[6, 8, 12, 10, 16, 20], [20, 28, 32, 24, 40, 44]]
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [8, 3, 2]], [-1, 1, GSConv, [8, 3, 2]]]
head: [[-1, 1, GSConv, [8, 3, 2]], [[2, 3], 1, Detect, [nc, anchors]]]
"""
EPOCHS, BATCHES, BATCH, SIDE_PX, NC, LAYERS = 3, 5, 2, 64, 3, 2
STEPS = 11  # in three epochs, by the recipe below
LOW = Hyp.from_yaml(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
# A warm-up of 7 of the 15 batches, which ends within the second epoch; steps of two batches when it has ended; gains
# with which some gradients are clipped and others not; a decay that can be seen.
RECIPE = {"lr0": 0.02, "lrf": 0.2, "warmup_epochs": 1.4, "warmup_bias_lr": 0.05, "weight_decay": 0.05, "box": 3.0}
RECIPE |= {"cls": 90.0, "obj": 450.0, "cls_pw": 0.9, "obj_pw": 1.1, "label_smoothing": 0.1, "nominal_batch": 4.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tmp_path) -> torch.nn.Module:
    """A tiny detector in float64, which no mixed precision touches."""
    (tmp_path / "tiny.yaml").write_text(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Model(str(tmp_path / "tiny.yaml")).double()
    made.register_forward_pre_hook(lambda _, images: (images[0].double(),))
    return made


def batches() -> list[Batch]:
    """Five batches of two noisy images with three boxes each."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(BATCHES):
        images = torch.randint(0, 256, (BATCH, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8, generator=generator)
        targets = torch.rand(3 * BATCH, 6, generator=generator) * 0.5 + 0.2
        targets[:, 0], targets[:, 1] = torch.arange(3 * BATCH) // 3, torch.arange(3 * BATCH) % NC
        made.append(Batch(images, targets, ["a.jpg", "b.jpg"], [None, None]))
    return made


class Loader(list):
    """Gives the same batches in every epoch."""

    dataset, workers = range(BATCH * BATCHES), 0

    def set_epoch(self, epoch: int, mosaic: bool) -> None:
        """Has no order to settle."""


def trainer_of(model, hyp: Hyp, folder: Path, device: str = "cpu", **options) -> engine.Trainer:
    settings = train.build_parser().parse_args([])
    vars(settings).update(epochs=EPOCHS, batch_size=BATCH, save_dir=str(folder), noplots=True, **options)
    loaders = SimpleNamespace(train=Loader(batches()), val=None, imgsz=SIDE_PX, grid_stride=32, final={})
    return engine.Trainer(model, hyp, settings, loaders, torch.device(device), Callbacks(), module_predictor)


def trained_by_hand(model, hyp: Hyp, factor: float = 1.0) -> tuple[dict, dict, list[float]]:
    """Returns the weights and their moving average after three epochs, and the norm of every step's gradient."""
    scaled = dataclasses.replace(
        hyp,
        box=hyp.box * 3 / LAYERS,
        cls=hyp.cls * NC / 80 * 3 / LAYERS,
        obj=hyp.obj * (SIDE_PX / 640) ** 2 * 3 / LAYERS,
    )
    model.hyp = scaled.to_dict()
    reckon = ComputeLoss(model)
    decay = hyp.weight_decay * BATCH * max(round(hyp.nominal_batch / BATCH), 1) / hyp.nominal_batch
    average = {name: value.float() for name, value in copy.deepcopy(model.state_dict()).items()}
    warmup, gathered, norms, velocity = round(hyp.warmup_epochs * BATCHES), 0, [], {}
    for epoch, (index, batch) in itertools.product(range(EPOCHS), enumerate(batches())):
        iteration = epoch * BATCHES + index
        progress = min(iteration / warmup, 1)
        behind = 1 if epoch * BATCHES > warmup else 0  # once warm, an epoch has the rate of the one before it
        rate = hyp.lr0 * ((1 - (epoch - behind) / EPOCHS) * (1 - hyp.lrf) + hyp.lrf)
        rates = {"bias": hyp.warmup_bias_lr + (rate - hyp.warmup_bias_lr) * progress, "other": rate * progress}
        momentum = hyp.warmup_momentum + (hyp.momentum - hyp.warmup_momentum) * progress
        accumulate = max(round(1 + (hyp.nominal_batch / BATCH - 1) * progress), 1)
        (reckon(model(batch.images.float() / 255), batch.targets)[0] * factor).backward()
        gathered += 1
        if gathered < accumulate and index + 1 < BATCHES:
            continue
        gathered = 0
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        for name, parameter in model.named_parameters():
            gradient = parameter.grad * min(1, 10 / norms[-1])
            if parameter.ndim > 1:  # weights of convolutions, neither biases nor batch norm
                gradient = gradient + decay * parameter.detach()
            velocity[name] = momentum * velocity.get(name, 0) + gradient
            step = gradient + momentum * velocity[name]  # Nesterov
            parameter.data -= rates["bias" if name.endswith("bias") else "other"] * step
            parameter.grad = None
        keep = 0.9999 * (1 - math.exp(-len(norms) / (hyp.ema_tau * STEPS or 2000)))
        for name, value in model.state_dict().items():
            average[name] = keep * average[name] + (1 - keep) * value if value.is_floating_point() else value
    return model.state_dict(), average, norms


@pytest.mark.parametrize(("quad", "amp", "tau"), [(False, "off", 0), (True, "off", 0.5), (False, "fp16", 0)])
def test_the_trainer_takes_the_steps_of_the_recipe(quad, amp, tau, model, tmp_path, monkeypatch):
    """With fp16 the loss is scaled, as on a GPU; of a float64 model that is all it does."""
    monkeypatch.setattr("utils.train.optim.WARMUP_FLOOR", 1)
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda *_: None)
    monkeypatch.setattr(engine, "resolve_amp", lambda mode, device: torch.float16 if mode == "fp16" else None)
    hyp = dataclasses.replace(LOW, **RECIPE, ema_tau=tau)
    expected, average, norms = trained_by_hand(copy.deepcopy(model), hyp, 4.0 if quad else 1.0)
    start = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, hyp, tmp_path / "run", quad=quad, amp=amp)
    for epoch in range(EPOCHS):
        trainer._train_epoch(epoch)
    assert (
        len(norms) == STEPS == trainer.schedule.steps and max(norms) > 10 and (quad or min(norms) < 10)
    )  # some are clipped
    assert trainer.scaler.is_enabled() == (amp == "fp16")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert not value.is_floating_point() or name.endswith("anchors") or not torch.equal(value, start[name]), name
    for name, value in trainer.ema.ema.state_dict().items():
        torch.testing.assert_close(value.double(), average[name].double(), rtol=1e-5, atol=1e-6)


def test_a_step_waits_for_the_device_for_the_loss_and_the_norm_alone(model, tmp_path, monkeypatch):
    """Tensors on the meta device have no values: whatever asks for one, or for how many there are, fails.

    What the trainer does ask for, the three terms and whether the gradient is finite, is answered here.
    """
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda *_: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    reckon, clip = ComputeLoss.compute, torch.nn.utils.clip_grad_norm_
    calls = []

    def reckoned(*arguments):
        calls.append("loss")
        return reckon(*arguments)._replace(items=torch.ones(3))

    def clipped(*arguments):
        calls.append("norm")
        return torch.ones(()) if clip(*arguments).is_meta else None

    monkeypatch.setattr(ComputeLoss, "compute", reckoned)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    anchors = model.head.anchors.float()
    trainer = trainer_of(model.to("meta"), LOW, tmp_path / "run", device="meta")
    trainer.loss.anchors = anchors
    assert trainer._train_epoch(0).tolist() == [1.0] * 3
    assert calls.count("loss") == BATCHES and calls[-1] == "norm"


UNUSED = {"iou_t"}
CHANGED = {  # another value of every key, with which the same four batches come to other weights
    **dict.fromkeys("lrf momentum warmup_momentum obj_pw copy_paste mosaic9 mixup fliplr flipud".split(), 0.95),
    **dict.fromkeys("hsv_h hsv_s hsv_v translate scale mosaic label_smoothing".split(), 0.3),
    **dict.fromkeys("lr0 weight_decay warmup_bias_lr box cls obj cls_pw af_cls".split(), 0.2),
    **{"warmup_epochs": 90.0, "anchor_t": 1.5, "fl_gamma": 1.5, "degrees": 20.0, "shear": 10.0, "perspective": 0.001},
    **{"anchors": 2.0, "nominal_batch": 10.0, "box_loss": "giou", "optimizer": "AdamW"},
}
SWITCHES = {"rect": True, "image_weights": True, "multi_scale": True, "single_cls": True, "quad": True, "cos_lr": True}
SWITCHES |= {"label_smoothing": 0.1, "optimizer": "AdamW", "seed": 1, "amp": "bf16", "freeze": [1]}


def polygon(box: re.Match) -> str:
    """Returns a label line's box as its four corners: only polygons are copied and pasted."""
    if not box[0]:
        return ""
    cls, x, y, w, h = map(float, box[0].split())
    corners = [(x + dx * w / 2, y + dy * h / 2) for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    return " ".join(map(str, (int(cls), *itertools.chain(*corners))))


class Outcomes:
    """Trains on eight images for two epochs of two batches, and keeps what came of each set of options."""

    def __init__(self, data: Path, folder: Path):
        self.folder, self.known = folder, {}
        for kind in ("images", "labels"):
            (folder / kind).mkdir()
        for image in sorted((data.parent / "images" / "train").glob("*.jpg"))[:8]:
            cv2.imwrite(str(folder / "images" / f"{image.stem}.png"), cv2.resize(cv2.imread(str(image)), (80, 64)))
            label = data.parent / "labels" / "train" / f"{image.stem}.txt"
            (folder / "labels" / label.name).write_text(re.sub("(?m)^.*", polygon, label.read_text()))
        names = "[circle, square, triangle, star]"
        yaml = f"path: {folder}\ntrain: images\nval: {data.parent}/images/val\nnames: {names}\n"
        (folder / "eight.yaml").write_text(yaml)
        (folder / "tiny.yaml").write_text(MODEL)
        anchor_free = re.sub("anchors: .*", "", MODEL).replace("Detect, [nc, anchors]", "DetectAF, [nc, 4]")
        (folder / "anchor_free.yaml").write_text(anchor_free)

    def of(self, hyp: dict[str, float] | None = None, **switches) -> list[torch.Tensor]:
        """Returns the weights and their average after four batches; nothing is validated, saved or drawn."""
        key = str((hyp, sorted(switches.items())))
        if key not in self.known:
            self.known[key] = self.train(hyp or {}, switches)
        return self.known[key]

    def train(self, hyp: dict[str, float], switches: dict) -> list[torch.Tensor]:
        run, callbacks, weights = self.folder / f"run{len(self.known)}", Callbacks(), []

        def after_batch(iteration, *_, trainer):
            if iteration == 3:
                for model in (trainer.model, trainer.ema.ema):
                    weights.extend(value.clone() for value in model.state_dict().values())
                callbacks.stop_training = True

        callbacks.register_action("on_train_batch_end", callback=after_batch)
        for hook in ("on_val_start", "on_model_save"):
            callbacks.register_action(hook, callback=lambda *_: pytest.fail("--noval and --nosave leave this out"))
        (self.folder / "hyp.yaml").write_text("".join(f"{k}: {v}\n" for k, v in {**LOW.to_dict(), **hyp}.items()))
        options = {"data": str(self.folder / "eight.yaml"), "cfg": str(self.folder / "tiny.yaml"), "imgsz": 64}
        options |= {"hyp": str(self.folder / "hyp.yaml"), "batch_size": 4, "epochs": 3, "workers": 0, "device": "cpu"}
        options |= {"amp": "off", "noplots": True, "noval": True, "nosave": True, "noautoanchor": True}
        train.run(callbacks, **{**options, "project": str(self.folder), "name": run.name, **switches})
        assert not [path for path in run.rglob("*") if path.suffix in (".jpg", ".png", ".pt")]
        return weights


@pytest.fixture(scope="module")
def outcomes(tiny_shapes, more_weights, tmp_path_factory) -> Outcomes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGGERS, "tensorboard", lambda *_: None)
        made = Outcomes(tiny_shapes, tmp_path_factory.mktemp("outcomes"))
        more_weights(made.folder / "teacher.pt", {0: "cat"}, cfg=str(made.folder / "tiny.yaml"))
        yield made


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Hyp) if field.metadata])
def test_every_hyperparameter_acts_or_is_known_not_to(key, outcomes):
    switches = {"noautoanchor": False} if key == "anchors" else {}  # how many, without saying which
    needed = {"teacher": str(outcomes.folder / "teacher.pt")} if key == "distill" else {}
    needed |= {"cfg": str(outcomes.folder / "anchor_free.yaml")} if key.startswith("af_") else {}
    changed = {key: CHANGED.get(key, 0.5)}
    assert same(outcomes.of(changed, **switches, **needed), outcomes.of(**needed)) == (key in UNUSED)
    if needed:
        assert same(outcomes.of(changed), outcomes.of()) and not same(outcomes.of(**needed), outcomes.of())


def test_a_key_without_effect_is_told_where_it_was_changed(caplog):
    caplog.set_level("INFO", "yolov5")
    Hyp.from_dict(LOW.to_dict(), "mine.yaml")
    assert not caplog.messages
    Hyp.from_dict({**LOW.to_dict(), "iou_t": 0.5}, "mine.yaml")
    assert caplog.messages == ["WARNING: mine.yaml: iou_t has no effect, as in YOLOv5"]


@pytest.mark.parametrize(("one", "other"), itertools.combinations(SWITCHES, 2))
def test_of_two_switches_each_acts_beside_the_other_or_a_message_names_both(one, other, outcomes, caplog):
    alone = [outcomes.of(**{name: SWITCHES[name]}) for name in (one, other)]
    caplog.clear()
    try:
        both = outcomes.of(**{name: SWITCHES[name] for name in (one, other)})
    except UserError as error:
        said = [str(error)]
    else:
        if not same(both, alone[0]) and not same(both, alone[1]):
            return
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(all(f"--{name.replace('_', '-')}" in message for name in (one, other)) for message in said), said


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_acts(switch, outcomes):
    assert not same(outcomes.of(**{switch: SWITCHES[switch]}), outcomes.of())
