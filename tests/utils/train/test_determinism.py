"""`--deterministic`: what it sets on a GPU, what it says on a CPU, and what it leaves; `--seed`. No GPU is needed."""

import logging
import os

import pytest
import torch

import train
from utils.errors import UserError
from utils.train import prepare as setup

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def settings() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), strict, cudnn.deterministic, cudnn.benchmark


@pytest.fixture
def in_a_hurry(monkeypatch):
    """A caller that lets cuDNN choose the fastest algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return settings()


@pytest.mark.parametrize(
    ("device", "asked", "within"),
    [
        (CUDA, True, (True, True, True, False)),
        (CUDA, False, (False, True, False, True)),
        (CPU, True, (True, True, True, False)),
        (CPU, False, (True, True, True, False)),
    ],
)
def test_algorithms_are_chosen_inside_and_as_before_outside(device, asked, within, in_a_hurry):
    with pytest.raises(RuntimeError, match="on the way"), setup.deterministic_algorithms(device, asked):
        assert settings() == within
        raise RuntimeError("on the way out")
    assert settings() == in_a_hurry == (False, True, False, True)


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_on_a_gpu_cublas_is_told_unless_the_user_has(given, monkeypatch):
    monkeypatch.delenv(setup.CUBLAS_VARIABLE, raising=False)
    if given:
        monkeypatch.setenv(setup.CUBLAS_VARIABLE, given)
    else:
        monkeypatch.setenv(setup.CUBLAS_VARIABLE, "")  # so that it is taken away again
        monkeypatch.delenv(setup.CUBLAS_VARIABLE)
    setup.prepare_determinism(CUDA)
    assert os.environ[setup.CUBLAS_VARIABLE] == (given or ":4096:8")


def test_a_workspace_that_cublas_is_not_deterministic_with_is_refused(monkeypatch):
    monkeypatch.setenv(setup.CUBLAS_VARIABLE, ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0.* Unset it, or set :4096:8 or :16:8"):
        setup.prepare_determinism(CUDA)


def test_metal_has_no_such_promise():
    with pytest.raises(UserError, match="--deterministic: .* not for mps"):
        setup.prepare_determinism(torch.device("mps"))


def test_a_training_asks_for_it_before_anything_touches_the_gpu(monkeypatch, tiny_shapes, tmp_path, caplog):
    """The option reaches both places: what is said on a CPU, and the algorithms of the training loop."""
    seen = []

    def watched(device, asked=False):
        seen.append(asked)
        return original(device, asked)

    original = setup.deterministic_algorithms
    monkeypatch.setattr("utils.train.engine.deterministic_algorithms", watched)
    caplog.set_level(logging.INFO, "yolov5")
    small = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 24, "epochs": 1, "device": "cpu", "workers": 0}
    small |= {"noplots": True, "amp": "off", "data": str(tiny_shapes), "project": str(tmp_path)}
    train.run(deterministic=True, **small)
    assert seen == [True] and "--deterministic: on the CPU training is so without it" in caplog.text
    assert "Fingerprint: best.pt " in caplog.text


def test_the_seed_alone_decides_the_first_weights(monkeypatch, tiny_shapes, tmp_path):
    """Not what was drawn before, and nothing is taken from whoever draws afterwards."""
    started = []

    def start(model, *_):
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        raise UserError("that is all")

    monkeypatch.setattr("utils.train.engine.Trainer", start)
    small = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 24, "device": "cpu", "workers": 0}
    small |= {"noplots": True, "noautoanchor": True, "data": str(tiny_shapes), "project": str(tmp_path)}
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        with pytest.raises(UserError, match="that is all"):
            train.run(seed=seed, **small)
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = started
    assert all(torch.equal(first[name], again[name]) for name in first)
    convolutions = [name for name in first if first[name].ndim == 4]
    assert len(convolutions) > 50 and not any(torch.equal(first[name], other[name]) for name in convolutions)
