"""What the tests of exports and of runtimes share: a small checkpoint like a trained one."""

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
