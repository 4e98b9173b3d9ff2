"""Hyperparameter files: the shipped ones, mistakes in one's own, scaling."""

import json
import logging

import pytest
import yaml

from utils.errors import UserError
from utils.files import ROOT
from utils.train.hyp import Hyp

HYPS = ROOT / "data" / "hyps"
SHIPPED = ["scratch-low", "scratch-med", "scratch-high", "VOC", "Objects365", "no-augmentation", "small"]


def plain(name="scratch-low"):
    return yaml.safe_load((HYPS / f"hyp.{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_reads_says_what_it_is_and_comes_back_in_its_order(name):
    path = HYPS / f"hyp.{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith("# Hyperparameters ")
    assert list(Hyp.from_yaml(path).to_dict().items()) == list(plain(name).items())


def test_default_file_is_what_the_golden_losses_were_made_with(golden_dir):
    golden = json.loads((golden_dir / "loss.json").read_text())[0]["hyp"]
    golden.pop("label_smoothing")
    assert Hyp.from_yaml(HYPS / "hyp.scratch-low.yaml").to_dict() == golden


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scratch-med", {"lrf": 0.1, "cls": 0.3, "obj": 0.7, "scale": 0.9, "mixup": 0.1, "copy_paste": 0.0}),
        ("scratch-high", {"lrf": 0.1, "cls": 0.3, "obj": 0.7, "scale": 0.9, "mixup": 0.1, "copy_paste": 0.1}),
        ("VOC", {"lr0": 0.0033, "warmup_epochs": 3.4278, "anchor_t": 3.4172, "anchors": 3.3556, "mosaic": 0.87158}),
        ("Objects365", {"lr0": 0.00258, "warmup_bias_lr": 0.0711, "anchors": 3.2, "hsv_h": 0.0188, "scale": 0.491}),
        ("small", {"nominal_batch": 16.0, "close_mosaic": 0.1667, "ema_tau": 0.25, "optimizer": "AdamW", "lr0": 0.003}),
        ("no-augmentation", {"mosaic": 0.0, "fliplr": 0.0, "translate": 0.0, "hsv_s": 0.0, "scale": 0.0}),
    ],
)
def test_values_of_shipped_files(name, expected):
    hyp = Hyp.from_yaml(HYPS / f"hyp.{name}.yaml")
    assert {key: getattr(hyp, key) for key in expected} == expected


def test_the_recipe_for_small_data_differs_from_the_default_in_its_optimizer_steps_and_shares_alone():
    default, small = plain(), plain("small")
    assert {key for key, value in small.items() if default.get(key) != value} == {
        *["optimizer", "lr0", "momentum", "warmup_bias_lr"],
        *["nominal_batch", "close_mosaic", "ema_tau", "warmup_ratio"],
    }
    assert default.keys() < small.keys()


def test_evolved_files_hold_anchors_where_evolution_expects_them():
    assert list(plain("VOC"))[-1] == "anchors"
    assert list(plain("Objects365")).index("anchors") == list(plain("Objects365")).index("anchor_t") + 1


def test_unknown_keys_name_file_and_nearest_missing_ones_are_all_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**plain(), "mozaic": 1.0}))
    with pytest.raises(UserError, match=r"mine\.yaml: unknown hyperparameter 'mozaic'. Did you mean 'mosaic'"):
        Hyp.from_yaml(path)
    with pytest.raises(UserError, match="missing hyperparameters box, hsv_s"):
        Hyp.from_dict({key: value for key, value in plain().items() if key not in ("box", "hsv_s")})
    with pytest.raises(UserError, match="hyp.yaml: .* found list"):
        Hyp.from_dict([1, 2], source="hyp.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mosaic", 1.5, "'mosaic' is 1.5; it must be at least 0 and at most 1"),
        ("lr0", 0, "'lr0' is 0; it must be more than 0"),
        ("lr0", -0.1, "'lr0'"),
        ("momentum", 1.0, "'momentum' is 1; it must be at least 0 and below 1"),
        ("anchor_t", 1.0, "'anchor_t'"),
        ("scale", 1.0, "'scale'"),
        ("box", float("nan"), "'box' is nan"),
        ("cls", float("inf"), "'cls' is inf"),
        ("cls", 10**400, "'cls' is inf"),
        ("lr0", "fast", "'lr0' is 'fast'; a number is expected"),
        ("fliplr", True, "'fliplr' is True; a number is expected"),
        ("box", None, "'box' is None; a number is expected"),
        ("mosaic9", 2, "'mosaic9'"),
        ("close_mosaic", 10, "'close_mosaic' is 10; it must be at least 0 and at most 1"),  # epochs elsewhere
        ("box_loss", "cious", "'box_loss' is 'cious'; it must be one of ciou, giou,"),
        ("box_loss", 0.05, "'box_loss' is 0.05; it must be one of ciou, giou,"),  # `box` is the gain
        ("box_loss", None, "'box_loss' is None; it must be one of ciou, giou,"),
        ("optimizer", "adamW", "'optimizer' is 'adamW'; it must be one of SGD, Adam, AdamW"),
        ("ema_tau", 2000, "'ema_tau' is 2000; it must be at least 0 and at most 1"),
    ],
)
def test_bad_value_names_file_key_and_what_is_allowed(key, value, message):
    with pytest.raises(UserError, match="my file: hyperparameter") as error:
        Hyp.from_dict({**plain(), key: value}, source="my file")
    assert message in str(error.value)


def test_older_files_lack_copy_paste_which_is_said(caplog):
    values = plain()
    del values["copy_paste"]
    with caplog.at_level(logging.INFO, logger="yolov5"):
        hyp = Hyp.from_dict(values, source="old.yaml")
    assert hyp.copy_paste == 0.0
    assert "old.yaml: no copy_paste, using 0" in caplog.text
    assert "copy_paste" not in hyp.to_dict()


def test_optional_keys_survive_a_round_trip():
    hyp = Hyp.from_dict({**plain(), "mosaic9": 0.5, "anchors": 3, "label_smoothing": 0.1, "box_loss": "siou"})
    assert Hyp.from_dict(hyp.to_dict()) == hyp
    assert (hyp.mosaic9, hyp.anchors, hyp.label_smoothing, hyp.box_loss) == (0.5, 3.0, 0.1, "siou")
    assert Hyp.from_dict({**plain(), "anchors": None}).anchors is None
