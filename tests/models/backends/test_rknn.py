"""RKNN folders on a board whose library is a stand-in: the checkpoint's rows, and refusals in plain words."""

import shutil
import sys

import numpy as np
import pytest
import torch

from models.backends import load_backend, open_model
from models.load import load_model
from utils.errors import UserError


@pytest.fixture
def board(rockchip, monkeypatch):
    """Makes this machine a board: its library can be imported."""
    monkeypatch.syspath_prepend(rockchip)
    for name in ("rknnlite", "rknnlite.api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("rknnlite", "rknnlite.api"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(rockchip, exported, small_weights, tmp_path):
    """A copy of its own of an exported folder."""
    return shutil.copytree(exported("rknn", small_weights["anchors"]), tmp_path / "best_rknn_model")


@pytest.mark.parametrize("head", ["anchors", "bins"])
def test_rows_are_the_checkpoints_for_one_image_and_for_three(board, exported, small_weights, images, head):
    path = exported("rknn", small_weights[head])
    said = open_model(path).metadata
    backend = load_backend(path)
    assert type(backend).__module__ == "models.backends.rknn" and backend.device == "RKNN NPU (rk3588)"
    for metadata in (said, backend.metadata):
        assert (metadata.names, metadata.stride) == ({0: "ant", 1: "bee", 2: "fly"}, 32)
        assert (metadata.dynamic, metadata.nms, metadata.shape_hw) == (False, None, (64, 96))
    with torch.no_grad():
        expected = load_model(small_weights[head])(torch.from_numpy(images).float() / 255)[0].numpy()
    for count in (1, 3):
        found = backend.predict(images[:count])
        assert found.shape == expected[:count].shape and found.dtype == np.float32
        np.testing.assert_allclose(found[..., :4], expected[:count, :, :4], atol=0.02, rtol=1e-4)
        np.testing.assert_allclose(found[..., 4:], expected[:count, :, 4:], atol=2e-4)
    with pytest.raises(UserError, match=r"exported for images of 64x96 px .*not 64x64: use --imgsz 64 96"):
        backend.predict(images[:, :, :, :64])


def test_half_changes_nothing_and_that_is_said(board, folder, caplog):
    load_backend(folder, half=True)
    assert "--half: RKNN computes in the precision of the file" in caplog.text


def test_another_device_is_refused_by_name(board, folder):
    with pytest.raises(
        UserError, match="--device cpu: an RKNN model runs on the board's NPU alone: leave --device out"
    ):
        load_backend(folder, "cpu")


def test_without_the_boards_library_it_says_where_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "rknnlite", None)
    monkeypatch.delitem(sys.modules, "rknnlite.api", raising=False)
    wanted = (
        r"best_rknn_model, which runs on a board with rk3588, needs rknn-toolkit-lite2: pip install rknn-toolkit-lite2"
    )
    with pytest.raises(UserError, match=wanted):
        load_backend(folder)


@pytest.mark.parametrize("fault", ["other chip", "damaged"])
def test_a_model_that_the_npu_does_not_take_is_named(board, folder, monkeypatch, fault):
    monkeypatch.setenv("STAND_IN", fault)
    if fault == "damaged":
        (folder / "model.rknn").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"best_rknn_model: the NPU does not take it.* compiled for rk3588: .*--chip"):
        load_backend(folder)


def test_a_run_that_fails_is_said(board, folder, images, monkeypatch):
    monkeypatch.setenv("STAND_IN", "illness")
    with pytest.raises(UserError, match="the NPU could not compute the model; the library's own message is above"):
        load_backend(folder).predict(images)


@pytest.mark.parametrize("part", ["model.rknn", "metadata.yaml"])
def test_a_folder_that_lacks_a_part_is_named(board, folder, part):
    (folder / part).unlink()
    with pytest.raises(UserError, match="best_rknn_model: one .* is expected in this folder, there is none"):
        load_backend(folder)


def test_a_folder_that_does_not_say_how_it_is_decoded_is_refused(board, folder):
    (folder / "metadata.yaml").write_text("stride: 32\nnames: {0: ant, 1: bee, 2: fly}\n")
    with pytest.raises(UserError, match="does not say how its outputs are decoded: export it with export.py"):
        load_backend(folder)
