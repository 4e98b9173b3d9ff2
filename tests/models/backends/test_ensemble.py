"""Several checkpoints as one model: rows side by side, the largest stride, and what makes no ensemble."""

import numpy as np
import pytest
import torch
from torch import nn

from models.backends import load_backend, open_model
from models.inference.evaluation import val_shape
from models.inference.multibackend import Ensemble
from models.load import load_model, read_weights
from models.yolo import Model
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

NAMES = {0: "ant", 1: "bee", 2: "fly"}


def checkpoint(path, cfg, names=NAMES):
    """An untrained model of a YAML, saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Model(cfg, nc=len(names))
    content = {"epoch": -1, "model": model.state_dict(), "ema": None, "yaml": model.yaml, "names": names, "hyp": {}}
    strides = [int(stride) for stride in model.stride]
    save_checkpoint(path, {**content, "nc": len(names), "stride": strides, "opt": {}, "data": ""})
    assert read_weights(path).names == names
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of the same classes with four levels, the coarsest of 64 px."""
    return checkpoint(tmp_path_factory.mktemp("other") / "six.pt", "yolov5n6.yaml")


@pytest.fixture(scope="module")
def ensemble(weights, other):
    return load_backend([weights, str(other)], "cpu")


@pytest.fixture(scope="module")
def squares():
    return np.random.default_rng(0).integers(0, 255, (2, 3, 64, 128), np.uint8)


def test_rows_of_the_members_stand_side_by_side(ensemble, weights, other, squares):
    first, second = (load_backend(file, "cpu").predict(squares) for file in (weights, other))
    assert (first.shape[1], second.shape[1]) == (3 * 168, 3 * 170)
    torch.testing.assert_close(ensemble.predict(squares), torch.cat((first, second), dim=1))


def test_images_must_suit_the_largest_stride_and_classes_are_the_members(ensemble):
    assert (ensemble.stride, ensemble.names, ensemble.dynamic, ensemble.has_nms) == (64, NAMES, True, False)
    assert [member.stride for member in ensemble.members] == [32, 64]


def test_validation_sizes_images_for_the_largest_stride_whichever_member_has_it(weights, other):
    for files in ([weights, other], [other, weights]):
        opened = open_model([str(file) for file in files], "cpu")
        assert (opened.metadata.stride, val_shape(opened, 96)) == (64, 128)


def test_each_member_looks_at_every_view(ensemble, squares):
    inputs = ensemble.preprocess(squares)
    parts = [member.infer(inputs, augment=True) for member in ensemble.members]
    torch.testing.assert_close(ensemble.infer(inputs, augment=True), torch.cat(parts, dim=1))
    assert all(part.shape[1] > 3 * 170 for part in parts)


def test_creation_is_logged_and_a_list_of_one_is_that_one(weights, caplog):
    with caplog.at_level("INFO", "yolov5"):
        assert not hasattr(load_backend([weights], "cpu"), "members")
        assert "Ensemble" not in caplog.text
        load_backend([weights, weights], "cpu").warm_up(64, 64)
    assert f"Ensemble created with ['{weights}', '{weights}']" in caplog.text


def test_a_module_of_modules_gives_the_same_rows(ensemble, weights, other, squares):
    """`Ensemble`, which scripts build themselves, plain and in several views."""
    module = Ensemble([load_model(weights), load_model(other)])
    images = torch.from_numpy(squares).float() / 255
    for augment in (False, True):
        with torch.no_grad():
            rows, raw = module(images, augment=augment)
        assert raw is None
        found = ensemble.infer(ensemble.preprocess(squares), augment=augment)
        torch.testing.assert_close(found, rows, rtol=1e-3, atol=2e-3)


def test_what_makes_no_ensemble_is_named(ensemble, weights, squares, tmp_path):
    renamed = checkpoint(tmp_path / "renamed.pt", "yolov5n.yaml", {0: "ant", 1: "wasp", 2: "fly"})
    with pytest.raises(UserError, match=rf"{weights.name} and .*renamed\.pt have different classes; an ensemble"):
        load_backend([weights, renamed], "cpu")
    fewer = checkpoint(tmp_path / "fewer.pt", "yolov5n.yaml", {0: "ant"})
    with pytest.raises(UserError, match=r"fewer\.pt have different classes \(3 and 1\)"):
        load_backend([weights, fewer], "cpu")
    (tmp_path / "b.onnx").touch()
    with pytest.raises(UserError, match=r"an ensemble of checkpoints \(\.pt\), and .*b\.onnx is none"):
        load_backend([weights, tmp_path / "b.onnx"], "cpu")
    with pytest.raises(UserError, match="--dnn"):
        load_backend([weights, weights], "cpu", dnn=True)
    with pytest.raises(UserError, match="--visualize shows the layers of one model"):
        ensemble.infer(ensemble.preprocess(squares), lambda *_: None)


class FixedDetector(nn.Module):
    """Gives the same rows for every image."""

    def __init__(self, value: float, rows: int, strides: list[float], name: str):
        super().__init__()
        self.value, self.rows, self.stride, self.names = value, rows, torch.tensor(strides), {0: name}

    def forward(self, x, augment=False):
        return torch.full((x.shape[0], self.rows, 6), self.value), []


def test_ensemble_puts_rows_side_by_side():
    ensemble = Ensemble([FixedDetector(1.0, 3, [8, 64], "first"), FixedDetector(2.0, 2, [8, 32], "last")])
    y, raw = ensemble(torch.zeros(2, 3, 64, 64))
    assert raw is None
    assert y[1, :, 0].tolist() == [1, 1, 1, 2, 2]
    assert ensemble.names == {0: "last"}
    assert ensemble.stride.tolist() == [8, 64]
