"""The model that a training starts from: which architecture, which weights, and what is said of unsound files."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import train
from models.load import build_for_training, load_model, read_weights
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.train.hyp import Hyp
from utils.train.prepare import TrainConfig

CATS = {0: "cat", 1: "dog", 2: "hen"}


def test_the_seed_alone_decides_the_initial_weights():
    before = torch.get_rng_state()
    first, again, other = (build_for_training("yolov5n-slimneck.yaml", CATS, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert not torch.equal(first["model.0.conv.weight"], other["model.0.conv.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def start(weights, cfg="", anchors=None, act=None):
    """The model that `train.py --weights --cfg --act` trains, with this hyperparameter `anchors`."""
    options = {**vars(train.build_parser().parse_args([])), "weights": str(weights), "cfg": str(cfg), "act": act}
    config = TrainConfig(**options)
    hyp, given = replace(Hyp.from_yaml(config.hyp), anchors=anchors), read_weights(weights) if weights else None
    model = train._new_model(given, CATS, hyp, config)
    if given:
        train._start_from(given, model, [], hyp, config)
    return model


def kinds(model):
    """The activations of a model's blocks."""
    return {type(block.act) for block in model.modules() if getattr(block, "default_act", False)}


def test_an_activation_is_the_option_s_the_yaml_s_or_that_of_the_weights(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    relu = start("", tiny_cfg, act="relu")
    assert kinds(relu) == {nn.ReLU} and relu.yaml["activation"] == "nn.ReLU()"
    assert kinds(start("", tiny_cfg)) == {nn.SiLU}
    content = {
        "model": relu.state_dict(),
        "ema": None,
        "yaml": relu.yaml,
        "names": relu.names,
        "nc": relu.nc,
        "stride": [8, 16],
    }
    weights = tmp_path / "relu.pt"
    save_checkpoint(weights, content)
    assert kinds(load_model(weights)) == kinds(start(weights)) == {nn.ReLU}
    assert kinds(start(weights, act="nn.LeakyReLU(0.2)")) == {nn.LeakyReLU}
    assert "says no activation" not in caplog.text
    assert kinds(start(weights, tiny_cfg)) == {nn.ReLU}
    assert f"says no activation: it is that of {weights}, nn.ReLU() (--act says another)" in caplog.text
    (own := tmp_path / "own.yaml").write_text(tiny_cfg.read_text() + "\nactivation: nn.Mish()\n")
    assert kinds(start(weights, own)) == {nn.Mish}
    assert kinds(start(weights, own, act="silu")) == {nn.SiLU}


def test_an_activation_that_does_not_exist_is_told(tiny_cfg):
    with pytest.raises(UserError, match=r"--act 'nn.relux\(\)' is not an activation.*ReLU"):
        start("", tiny_cfg, act="relux")


def test_weights_give_the_architecture_and_what_fits_other_classes(weights):
    given = load_checkpoint(weights)
    model = start(weights)
    state = model.state_dict()
    assert model.names == CATS and model.nc == 3
    alike = [key for key, tensor in given["model"].items() if state[key].shape == tensor.shape]
    assert len(alike) == len(state) - 6  # the head's three convolutions
    assert all(torch.equal(state[key], given["model"][key].float()) for key in alike)


@pytest.mark.parametrize(("cfg", "anchors"), [("yolov5n.yaml", None), ("", 3)])
def test_anchors_are_the_yaml_s_or_to_be_fitted_not_the_weights_own(cfg, anchors, weights, tmp_path):
    content = load_checkpoint(weights)
    content["model"]["model.24.anchors"] = content["model"]["model.24.anchors"] * 2
    save_checkpoint(tmp_path / "other.pt", content)
    model = start(tmp_path / "other.pt", cfg, anchors)
    assert not torch.equal(model.head.anchors, content["model"]["model.24.anchors"])


def test_an_unsound_architecture_is_told_with_its_file(weights, tmp_path):
    content = load_checkpoint(weights)
    content["yaml"]["depth_multiple"] = -1
    save_checkpoint(path := tmp_path / "bad.pt", content)
    with pytest.raises(UserError, match=f"^{path}: .*depth_multiple"):
        build_for_training(read_weights(path).yaml, CATS, source=path)
    with pytest.raises(UserError, match="^runs/last.pt: .*depth_multiple"):
        build_for_training(content["yaml"], CATS, source="runs/last.pt")
    (tmp_path / "bad.yaml").write_text("depth_multiple: -1\n")
    with pytest.raises(UserError, match=r"^\S*bad.yaml: "):
        build_for_training(tmp_path / "bad.yaml", CATS)
