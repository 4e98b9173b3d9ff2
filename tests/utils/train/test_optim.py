"""Parameter groups, the schedule against golden curves, and optimizer state that survives an interruption."""

import csv
import dataclasses
import io
import logging

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.files import ROOT
from utils.train.hyp import Hyp
from utils.train.optim import (
    Schedule,
    accumulation,
    apply_settings,
    build_optimizer,
    fitting_epochs,
    load_optimizer_state,
    lr_factor,
    optimizer_state_by_name,
    parameter_groups,
    scaled_weight_decay,
)


class Odd(nn.Module):
    """Every kind of parameter that a detector may have."""

    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.depthwise = nn.Conv2d(width, width, 1, groups=width, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.attention = nn.MultiheadAttention(width, 1)
        self.p1 = nn.Parameter(torch.ones(1, width, 1, 1))
        self.mix = nn.Parameter(torch.ones(2))
        self.prelu = nn.PReLU(width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)

    def forward(self, images):
        features = self.prelu(self.bn(self.depthwise(self.conv(images))) * self.p1)
        tokens = features.flatten(2).permute(2, 0, 1)
        return self.frozen(self.attention(tokens, tokens, tokens)[0]).sum() * self.mix.sum()


@pytest.fixture
def hyp():
    return Hyp.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")


def trained(optimizer, model, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(2, 3, 5, 5, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def model_of(seed=0):
    torch.manual_seed(seed)
    return Odd()


def test_every_parameter_is_in_exactly_one_group_and_only_weights_decay():
    undecayed, weights, biases = parameter_groups(Odd())
    decayed = ["conv", "depthwise", "attention.in_proj", "attention.out_proj", "frozen"]
    assert set(weights) == {f"{name}{'_' if name.endswith('in_proj') else '.'}weight" for name in decayed}
    with_bias = ["conv.", "bn.", "attention.in_proj_", "attention.out_proj.", "frozen."]
    assert set(biases) == {f"{name}bias" for name in with_bias}
    assert set(undecayed) == {"bn.weight", "p1", "mix", "prelu.weight"}
    assert sorted([*undecayed, *weights, *biases]) == sorted(name for name, _ in Odd().named_parameters())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_decay_of_the_groups_and_what_momentum_is_to_each_optimizer(name, caplog):
    with caplog.at_level(logging.INFO, logger="yolov5"):
        optimizer = build_optimizer(Odd(), name, lr=0.01, momentum=0.9, weight_decay=0.0005)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0005, 0.0]
    own = {"nesterov": True, "momentum": 0.9} if name == "SGD" else {"betas": (0.9, 0.999)}
    assert all(group[key] == value for group in optimizer.param_groups for key, value in own.items())
    assert f"optimizer: {name} with parameter groups 4 weight (no decay), 5 weight, 5 bias" in caplog.text


@pytest.mark.parametrize(
    ("batch", "accumulate", "decay"), [(16, 4, 1.0), (24, 3, 1.125), (64, 1, 1.0), (128, 1, 2.0), (1, 64, 1.0)]
)
def test_accumulation_and_weight_decay(hyp, batch, accumulate, decay):
    assert accumulation(hyp, batch) == accumulate
    assert scaled_weight_decay(hyp, batch) == pytest.approx(0.0005 * decay)


def test_a_nominal_batch_of_ones_own(hyp):
    """Batches of 8 at a nominal 8 step each; at 20 they step by twos (2.5 rounds to even), with 16 images' decay."""
    ones = dataclasses.replace(hyp, nominal_batch=8)
    assert (accumulation(ones, 8), scaled_weight_decay(ones, 8)) == (1, 0.0005)
    assert {Schedule(ones, 40, 38, 8).at(epoch, 5).accumulate for epoch in range(40)} == {1}
    twenty = dataclasses.replace(hyp, nominal_batch=20)
    assert (accumulation(twenty, 8), scaled_weight_decay(twenty, 8)) == (2, pytest.approx(0.0004))
    assert [Schedule(twenty, 40, 100, 8).at(0, batch).accumulate for batch in (0, 99)] == [1, 1]
    assert [Schedule(twenty, 40, 100, 8).at(epoch, 0).accumulate for epoch in (2, 3, 9)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("epoch", "lrf", "cosine", "expected"),
    [
        (24, 0.01, False, 0.604),
        (0, 0.01, False, 1),
        (60, 0.01, False, 0.01),
        (30, 0.2, True, 0.6),  # half way down: the mean of 1 and lrf
        (15, 0.2, True, 1 - (1 - 2**-0.5) / 2 * 0.8),  # a quarter of the way: cos 45 degrees
        (60, 0.2, True, 0.2),
    ],
)
def test_factor_of_an_epoch_of_sixty(epoch, lrf, cosine, expected):
    assert lr_factor(epoch, 60, lrf, cosine) == pytest.approx(expected)


def test_last_epoch_of_300_shows_the_rate_of_the_last_but_one(hyp):
    settings = Schedule(hyp, epochs=300, batches=1000, batch_size=16).at(299, 999)
    assert f"{settings.lrs[0]:.5g}" == "0.000166"


@pytest.mark.parametrize("model", ["yolov5n", "yolov5n-slimneck"])
def test_rates_at_the_end_of_each_epoch_are_those_of_the_golden_run(golden_dir, hyp, model):
    """205 images in batches of 16, 60 epochs; the golden file has the bias group first."""
    schedule = Schedule(hyp, epochs=60, batches=13, batch_size=16)
    with open(golden_dir / f"bccd_curve_{model}.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 60
    for row in rows:
        undecayed, weights, bias = schedule.at(int(row[0]), 12).lrs
        assert [bias, weights, undecayed] == pytest.approx([float(cell) for cell in row[-3:]], rel=1e-4)


def test_warm_up_runs_in_straight_lines(hyp):
    schedule = Schedule(hyp, epochs=100, batches=200, batch_size=16)
    assert schedule.warmup_iterations == 600
    assert Schedule(hyp, epochs=10, batches=5, batch_size=64).warmup_iterations == 100  # of small data
    first = schedule.at(0, 0)
    assert (first.lrs, first.momentum, first.accumulate) == ((0.0, 0.0, 0.1), 0.8, 1)
    middle, target = schedule.at(1, 100), 0.01 * lr_factor(1, 100, 0.01)
    assert middle.lrs == pytest.approx((target / 2, target / 2, (0.1 + target) / 2))
    assert middle.momentum == pytest.approx((0.8 + 0.937) / 2)
    assert middle.accumulate == 2  # 2.5 rounds to even
    end = schedule.at(3, 0)
    assert end.lrs == pytest.approx((0.01 * lr_factor(3, 100, 0.01),) * 3)
    assert (end.momentum, end.accumulate) == (0.937, 4)


def test_after_the_warm_up_rates_hold_for_the_epoch_and_then_follow_one_behind(hyp):
    schedule = Schedule(hyp, epochs=100, batches=200, batch_size=16)
    assert schedule.at(3, 199).lrs == pytest.approx((0.01 * lr_factor(3, 100, 0.01),) * 3)
    assert schedule.at(4, 0).lrs == pytest.approx((0.01 * lr_factor(3, 100, 0.01),) * 3)
    assert schedule.at(5, 0).lrs == pytest.approx((0.01 * lr_factor(4, 100, 0.01),) * 3)


@pytest.mark.parametrize("epochs", [26, 400])
def test_the_recipe_for_small_data_steps_at_every_batch_of_16_and_slows_down_from_its_warm_up_on(epochs):
    small = Hyp.from_yaml(ROOT / "data/hyps/hyp.small.yaml")
    schedule = Schedule(small, epochs, batches=19, batch_size=16)
    settings = [schedule.at(epoch, batch) for epoch in range(epochs) for batch in range(19)]
    assert {step.accumulate for step in settings} == {1}
    rates = [step.lrs[1] for step in settings]
    warmed = round(0.05 * epochs * 19)
    assert rates[: warmed + 1] == sorted(rates[: warmed + 1]) and rates[warmed:] == sorted(rates[warmed:], reverse=True)
    assert 0.94 * small.lr0 < max(rates) <= small.lr0 and [step.lrs[2] for step in settings] == rates


@pytest.mark.parametrize(
    ("hours", "epoch_s", "finish_s", "epochs"),
    [
        (1, 35, 5, 102),  # 3595 seconds hold 102.7
        (1, 36, 0, 100),
        (1, 36, 1, 99),
        (10, 36, 0, 300),  # as many as are wanted
        (0.001, 36, 5, 1),
        (0, 36, 5, 1),
        (1e308, 1e-3, 0, 300),
    ],
)
def test_epochs_that_fit_into_hours(hours, epoch_s, finish_s, epochs):
    assert fitting_epochs(hours, epoch_s, finish_s, most=300) == epochs


def test_a_runs_steps_by_hand(hyp):
    """205 images in batches of 16. The warm-up of 100 iterations gathers 1 to 4 batches, each epoch begins anew.

    By its place i: 1 batch to i = 16, 2 to 50, 3 to 83, then 4, so the epochs have 13, 9, 7, 7, 5, 5, 4 and 4 steps.
    """
    assert Schedule(hyp, epochs=30, batches=13, batch_size=16).steps == 13 + 9 + 7 + 7 + 5 + 5 + 4 + 4 + 22 * 4
    assert Schedule(hyp, epochs=2, batches=13, batch_size=16).steps == 13 + 9
    small = dataclasses.replace(hyp, nominal_batch=16)
    assert [Schedule(small, epochs, 13, 16).steps for epochs in (1, 60)] == [13, 780]


def test_shares_of_a_run_follow_its_length(hyp):
    assert [Schedule(hyp, 60, 13, 16).ema_tau, Schedule(hyp, 60, 13, 16).warmup_iterations] == [2000, 100]
    shares = Hyp.from_yaml(ROOT / "data/hyps/hyp.small.yaml")
    run, short = Schedule(shares, epochs=60, batches=13, batch_size=16), Schedule(shares, 10, 13, 16)
    assert (run.warmup_iterations, run.ema_tau) == (39, 195)  # of 780 iterations, each a step
    assert (short.warmup_iterations, short.ema_tau) == (6, 32.5)  # 6.5 rounds to even; of 130
    assert [short.at(0, batch).lrs[1] for batch in (0, 3, 6, 7)] == pytest.approx([0, 0.0015, 0.003, 0.003])
    assert [schedule.has_mosaic(epoch) for schedule in (run, short) for epoch in (7, 8, 49, 50, 59)] == [
        *[True, True, True, False, False],
        *[True, False, False, False, False],
    ]


@pytest.mark.parametrize(
    ("share", "epochs", "mosaics"), [(0, 4, 4), (0.1667, 1, 1), (0.5, 4, 2), (0.99, 4, 0), (1, 1, 0)]
)
def test_mosaics_end_for_a_share_of_the_epochs(hyp, share, epochs, mosaics):
    schedule = Schedule(dataclasses.replace(hyp, close_mosaic=share), epochs, batches=5, batch_size=16)
    assert [schedule.has_mosaic(epoch) for epoch in range(epochs)] == [True] * mosaics + [False] * (epochs - mosaics)


def test_settings_reach_the_optimizer(hyp):
    optimizer = build_optimizer(Odd(), "SGD", lr=0.01, momentum=0.9, weight_decay=0.0)
    apply_settings(optimizer, Schedule(hyp, epochs=100, batches=200, batch_size=16).at(0, 300))
    settings = [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
    assert settings == [(0.005, pytest.approx(0.8685))] * 2 + [(pytest.approx(0.055), pytest.approx(0.8685))]
    adam = build_optimizer(Odd(), "Adam", lr=0.01, momentum=0.9, weight_decay=0.0)
    apply_settings(adam, Schedule(hyp, epochs=100, batches=200, batch_size=16).at(0, 300))
    assert adam.param_groups[0]["betas"] == (0.9, 0.999)
    assert "momentum" not in adam.param_groups[0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_stored_state_continues_to_the_bit(name):
    """Five steps in one go equal three, a file read as plain data, and two more."""
    straight = model_of()
    optimizer = build_optimizer(straight, name, 0.01, 0.9, 0.0005)
    trained(optimizer, straight, steps=3, seed=1)
    before = straight.conv.weight.clone()
    trained(optimizer, straight, steps=2, seed=2)

    stopped = model_of()
    optimizer = build_optimizer(stopped, name, 0.01, 0.9, 0.0005)
    trained(optimizer, stopped, steps=3, seed=1)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer_state_by_name(optimizer, stopped)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = model_of(seed=9)
    resumed.load_state_dict(saved["model"])
    optimizer = build_optimizer(resumed, name, 0.01, 0.9, 0.0005)
    load_optimizer_state(optimizer, resumed, saved["optimizer"])
    trained(optimizer, resumed, steps=2, seed=2)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert not torch.equal(straight.conv.weight, before)


def test_state_is_keyed_by_name_and_that_of_another_optimizer_or_model_is_refused():
    model = model_of()
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 0.0)
    trained(optimizer, model, steps=1)
    state = optimizer_state_by_name(optimizer, model)
    assert state["name"] == "SGD"
    assert set(state["state"]) == {name for name, part in model.named_parameters() if part.requires_grad}
    with pytest.raises(UserError, match="pass --optimizer SGD"):
        load_optimizer_state(build_optimizer(model, "Adam", 0.01, 0.9, 0.0), model, state)
    wider = Odd(width=8)
    with pytest.raises(UserError, match=r"conv\.weight|bn\.weight|p1"):
        load_optimizer_state(build_optimizer(wider, "SGD", 0.01, 0.9, 0.0), wider, state)
    other = nn.Linear(2, 2)
    with pytest.raises(UserError, match="this one has no"):
        load_optimizer_state(build_optimizer(other, "SGD", 0.01, 0.9, 0.0), other, state)
