"""The model that a training starts from: which architecture, which weights, and what is said of unsound files."""

from dataclasses import replace

import pytest
import torch

import train
from models.load import build_for_training, read_weights
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


def start(weights, cfg="", anchors=None):
    """The model that `train.py --weights --cfg` trains, with this hyperparameter `anchors`."""
    config = TrainConfig(**{**vars(train.build_parser().parse_args([])), "weights": str(weights), "cfg": cfg})
    hyp, given = replace(Hyp.from_yaml(config.hyp), anchors=anchors), read_weights(weights)
    model = train._new_model(given, CATS, hyp, config)
    train._start_from(given, model, [], hyp, config)
    return model


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
