"""What the tests of exports and of runtimes share: a small checkpoint like a trained one."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.yolo import Model
from utils.checkpoint import save_checkpoint

NAMES = {0: "ant", 1: "bee", 2: "fly"}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """At the sizes of tests a second thread costs more than it brings, and runtimes wait for each other's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory):
    """A function that writes a checkpoint of three classes, its batch norms not those of a new model.

    With `sure` its head finds things in any image.
    """

    def write(cfg="yolov5n-slimneck.yaml", sure=False, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Model(cfg, nc=len(NAMES))
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.running_mean.uniform_(-0.2, 0.2)
                    norm.running_var.uniform_(0.5, 2)
                    nn.init.uniform_(norm.weight, 0.8, 1.2)
            for conv in model.head.m if sure else ():
                nn.init.normal_(conv.weight, std=0.1)
                if model.head.objectness:
                    conv.bias.data.view(3, -1)[:, 4:] = torch.tensor([1.0, 0.5, 0.0, 0.3])
                elif conv.out_channels == len(NAMES):
                    conv.bias.data = torch.tensor([0.5, 0.0, 0.3])
        content = {"epoch": -1, "model": model.state_dict(), "ema": None, "yaml": model.yaml, "names": NAMES}
        content |= {"nc": len(NAMES), "stride": [8, 16, 32], "opt": {}, "hyp": {}, "data": "ants.yaml", **changes}
        path = tmp_path_factory.mktemp("weights") / "best.pt"
        save_checkpoint(path, content)
        return path

    return write


@pytest.fixture(scope="session")
def small_weights(write_checkpoint) -> dict[str, Path]:
    """Two small checkpoints, sure of themselves, by their heads: with "anchors", and with the "bins" of DetectAF."""
    backbone = [[-1, 1, "Conv", [16, 6, 4, 2]], *([-1, 1, block, [16, 3, 2]] for block in ("GSConv", "Conv", "Conv"))]
    cfg = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "backbone": backbone}
    anchors = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
    rows = {"anchors": ["Detect", ["nc", "anchors"]], "bins": ["DetectAF", ["nc", 16]]}
    return {
        name: write_checkpoint({**cfg, "anchors": anchors, "head": [[[1, 2, 3], 1, *row]]}, sure=True)
        for name, row in rows.items()
    }


@pytest.fixture(scope="session")
def anchor_free_weights(small_weights) -> Path:
    """The one with the anchor-free head."""
    return small_weights["bins"]


@pytest.fixture(scope="session")
def rockchip(tmp_path_factory) -> Path:
    """A folder to import stand-ins of Rockchip's libraries from; RKNN_PYTHON names a program that has the toolkit's."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    if os.name == "nt":
        pytest.skip("the toolkit's stand-in is a shell script")
    folder = tmp_path_factory.mktemp("rockchip")
    for package in ("rknn", "rknnlite"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("rknn_stand_in.py"), folder / package / "api.py")
    (folder / "rknn_toolkit2-9.8.7.dist-info").mkdir()
    (folder / "rknn_toolkit2-9.8.7.dist-info" / "METADATA").write_text("Name: rknn-toolkit2\nVersion: 9.8.7\n")
    run = f"import runpy, sys; sys.path.insert(0, '{folder}'); del sys.argv[0]; "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    program = folder / "python"
    program.write_text(f'#!/bin/sh\n[ "$1" = -I ] || exit 9\nshift\nexec "{sys.executable}" -I -c "{run}" "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RKNN_PYTHON", str(program))
        yield folder
