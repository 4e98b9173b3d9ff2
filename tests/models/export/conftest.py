"""What the tests of exports share: a small trained-like checkpoint."""

import pytest
import torch
from torch import nn

from models.yolo import Model
from utils.checkpoint import save_checkpoint

NAMES = {0: "ant", 1: "bee", 2: "fly"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function that writes a checkpoint of three classes, its batch norms not those of a new model."""

    def write(cfg="yolov5n-slimneck.yaml", folder=None):
        torch.manual_seed(0)
        model = Model(cfg, nc=len(NAMES))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.5, 2)
                nn.init.uniform_(norm.weight, 0.8, 1.2)
        path = (folder or tmp_path_factory.mktemp("weights")) / "best.pt"
        content = {"epoch": -1, "model": model.state_dict(), "ema": None, "yaml": model.yaml, "names": NAMES}
        extra = {"nc": len(NAMES), "stride": [8, 16, 32], "opt": {}, "hyp": {}, "data": "ants.yaml"}
        save_checkpoint(path, {**content, **extra})
        return path

    return write


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At the sizes of tests a second thread costs more than it brings, and runtimes wait for each other's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
