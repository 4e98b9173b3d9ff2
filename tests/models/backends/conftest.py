"""What the tests of runtimes share: a small checkpoint that finds things, and its exports, each made once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

NAMES = {0: "ant", 1: "bee", 2: "fly"}
SHAPE_HW = (64, 96)


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
def weights(tmp_path_factory) -> Path:
    """A checkpoint of three classes with GSConv and batch norms unlike those of a new model, sure of itself."""
    from models.yolo import Model
    from utils.checkpoint import TRAINING_STATE, save_checkpoint

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model("yolov5n-slimneck.yaml", nc=len(NAMES))
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.8, 1.2)
        for conv in model.head.m:
            nn.init.normal_(conv.weight, std=0.1)
            conv.bias.data.view(3, -1)[:, 4:] = torch.tensor([1.0, 0.5, 0.0, 0.3])
    content = {"epoch": 3, "model": model.state_dict(), "yaml": model.yaml, "names": NAMES, "nc": len(NAMES)}
    content |= {"stride": [8, 16, 32], "hyp": {}, "opt": {"imgsz": 96}, "data": "ants.yaml", "versions": {}}
    content |= {"format": "yolov5-slim", "format_version": 1, **dict.fromkeys(TRAINING_STATE), "date": "", "updates": 7}
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_checkpoint(path, content)
    return path


@pytest.fixture(scope="session")
def exported(weights, tmp_path_factory):
    """A function that returns the export of the checkpoint to a format with options, made when first asked for."""
    import export
    from models.export.formats import FORMATS

    made: dict[tuple, Path] = {}

    def path_of(form: str, **options) -> Path:
        key = (form, *sorted(options.items()))
        if key not in made:
            for package in FORMATS[form].packages:
                pytest.importorskip(package)
            own = Path(shutil.copy(weights, tmp_path_factory.mktemp(form) / "best.pt"))
            given = {"include": [form], "imgsz": list(SHAPE_HW), "device": "cpu", **options}
            (written,) = export.run(weights=[str(own)], **given)
            made[key] = Path(written)
        return made[key]

    return path_of


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Three smooth random images, uint8 (3, 3, 64, 96), unlike each other."""
    small = np.random.default_rng(0).integers(0, 255, (3, 3, 8, 12), np.uint8)
    return small.repeat(8, axis=2).repeat(8, axis=3)


@pytest.fixture(scope="session")
def rows(weights, images) -> np.ndarray:
    """What the checkpoint, not rewritten, makes of the images: rows (3, n, 8)."""
    from models.load import load_model

    with torch.no_grad():
        return load_model(weights)(torch.from_numpy(images).float() / 255)[0].numpy()
