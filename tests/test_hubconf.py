"""`torch.hub.load` on this repository: every entry, from any folder, and plain errors."""

import logging
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def hub(entry, *arguments, **options):
    return torch.hub.load(str(ROOT), entry, *arguments, source="local", **options)


@pytest.fixture(scope="module")
def hubconf():
    """The file as torch.hub imports it."""
    from torch.hub import _import_module

    return _import_module("hubconf", str(ROOT / "hubconf.py"))


@pytest.fixture(scope="module")
def weights(golden_dir):
    return golden_dir / "yolov5n-v6-coco.pt"


@pytest.mark.slow
def test_loads_a_checkpoint_from_another_folder(weights, golden_dir, tmp_path):
    """As a user's program does: with no file of ours beside it."""
    program = (
        "import sys, torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'custom', path={str(weights)!r}, source='local')\n"
        "model.conf = 0.4\n"
        f"results = model({str(golden_dir / 'images' / 'zidane.jpg')!r}, augment=True)\n"
        "results.print()\n"
        "results.save()\n"
        "assert not {'pandas', 'matplotlib', 'export', 'train'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("image 1/1: 720x1280 2 persons"), run.stdout
    assert [path.name for path in tmp_path.rglob("*.jpg")] == ["zidane.jpg"]


@pytest.mark.slow
def test_a_model_can_be_sent_to_a_spawned_process(more_weights, tmp_path):
    """Windows and macOS start processes anew, and these import `models` before they have the model."""
    weights = more_weights(tmp_path / "tiny.pt", {0: "cat"})
    (tmp_path / "program.py").write_text(
        "import multiprocessing, numpy, torch\n"
        "def work(model):\n"
        "    print(model.names, model(numpy.zeros((32, 32, 3), numpy.uint8), size=32).xyxy[0].shape[1])\n"
        "if __name__ == '__main__':\n"
        f"    model = torch.hub.load({str(ROOT)!r}, 'custom', path={str(weights)!r}, source='local', device='cpu')\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work, args=(model,))\n"
        "    process.start()\n"
        "    process.join()\n"
        "    raise SystemExit(process.exitcode)\n"
    )
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "{0: 'cat'} 6\n", run.stderr


def test_loads_a_checkpoint_by_a_relative_path(weights, golden_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = torch.hub.load(".", "custom", path=weights, source="local", device="cpu")
    assert next(model.parameters()).device.type == "cpu" and not model.training
    results = model(golden_dir / "images" / "bus.jpg", size=320)
    assert results.pred[0][:, 5].tolist().count(5) == 1, "the bus"


def test_there_is_an_entry_for_every_model_of_the_table(hubconf):
    """What torch.hub lists: the callables without an underscore."""
    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    yamls = {path.stem for folder in ("models", "models/hub") for path in (ROOT / folder).glob("yolov5[nsmlx]*.yaml")}
    yamls -= {"yolov5s-ghost", "yolov5s-transformer"}
    yamls -= {f"yolov5n-{module}" for module in ("asff", "dysample", "msca", "shufflenet")}
    assert entries == {"custom"} | {name.replace("-", "_") for name in yamls}
    assert len(entries) == 46
    entry = hubconf.yolov5m_slimneck_c
    assert entry.__name__ in entries and entry.__doc__.startswith(
        "yolov5m-slimneck-c, with pretrained=False: no weights"
    )


def test_all_its_dependencies_are_named_and_here(hubconf):
    assert {"torch", "numpy", "cv2", "PIL", "yaml"} <= set(hubconf.dependencies)
    torch.hub._check_dependencies(hubconf)


@pytest.mark.parametrize(
    "name", ["yolov5n", "yolov5n_slimneck", "yolov5n_slimneck_c", "yolov5n_gsneck", "yolov5n_slimneck_af"]
)
def test_builds_untrained_models(name):
    model = hub(name, pretrained=False, channels=4, classes=3, autoshape=False, device="cpu")
    assert model.yaml_file == f"{name.replace('_', '-')}.yaml"
    assert model.nc == 3 and model.model[0].conv.weight.shape[1] == 4 and model.training
    assert model.eval()(torch.zeros(1, 4, 64, 64))[0].shape == (1, 84 * model.head.na, 8)


def test_autoshape_wraps_what_was_built():
    model = hub("yolov5n6", pretrained=False, device="cpu")
    assert type(model).__name__ == "AutoShape" and model.stride.tolist() == [8, 16, 32, 64] and not model.training


@pytest.mark.parametrize("classes", [80, 3])
def test_released_weights_are_taken(weights, monkeypatch, tmp_path, classes):
    """A file of the name in the working folder is taken as it is; with other classes, what fits."""
    shutil.copy(weights, tmp_path / "yolov5n.pt")
    monkeypatch.chdir(tmp_path)
    model = hub("yolov5n", classes=classes, autoshape=False, device="cpu")
    detector = model.model if classes == 80 else model
    from models.load import read_weights

    state = read_weights(weights).state_dict
    own = detector.state_dict()
    assert torch.equal(own["model.0.conv.weight"], state["model.0.conv.weight"])
    assert detector.nc == classes and own["model.24.m.0.bias"].shape == (3 * (classes + 5),)
    assert detector.names[0] == ("person" if classes == 80 else "0")
    assert any(".bn." in key for key in own), "without AutoShape it is a model to train"


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no released weights for yolov5s-slimneck.*pretrained=False"):
        hub("yolov5s_slimneck")
    with pytest.raises(UserError, match="lost.pt: no such file"):
        hub("custom", str(tmp_path / "lost.pt"))


def test_says_when_weights_cannot_be_fetched(monkeypatch, tmp_path):
    from utils import downloads

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(downloads.RELEASES, "yolov5x.pt", downloads.Release("http://127.0.0.1:9/yolov5x.pt", "0" * 64))
    for classes in (80, 3):
        with pytest.raises(UserError, match="127.0.0.1 cannot be reached.*Offline") as told:
            hub("yolov5x", classes=classes)
        assert "force_reload" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_without_verbose_loading_is_silent_and_what_comes_after_is_told(
    hubconf, weights, caplog, monkeypatch, tmp_path
):
    logger = logging.getLogger("yolov5")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    for quiet in ({"verbose": False}, {"_verbose": False}):  # torch.hub.load keeps `verbose` for itself
        caplog.clear()
        hubconf.custom(weights, device="cpu", **quiet)
        assert not caplog.records and logger.level == logging.INFO
    model = hubconf.custom(weights, device="cpu")
    assert caplog.records, "what was loaded"
    hubconf.custom(weights, device="cpu", verbose=False)
    caplog.clear()
    model(np.zeros((32, 32, 3), np.uint8), size=32).save(tmp_path / "out")
    assert "Saved 1 image to" in caplog.text
    with pytest.raises(UserError):
        hubconf.custom(tmp_path / "lost.pt", verbose=False)
    assert logger.level == logging.INFO


def test_foreign_packages_of_our_names_are_told(hubconf, monkeypatch):
    foreign = types.ModuleType("utils")
    foreign.__file__ = "/somewhere/utils.py"
    monkeypatch.setitem(sys.modules, "utils", foreign)
    with pytest.raises(ImportError, match="'utils' is loaded already, from /somewhere/utils.py"):
        hubconf.custom("best.pt")
