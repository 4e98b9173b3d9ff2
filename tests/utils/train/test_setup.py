"""What is settled before a run starts: sizes, frozen layers, COCO's extras, reproducibility, what may be resumed."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.checkpoint import save_checkpoint
from utils.checks import UserError
from utils.data.spec import DataSpec
from utils.train import resume, setup


class Stub(nn.Module):
    """Three layers with batch norm, named as in a detector."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(12)))
        self.stride = torch.tensor([8.0, 16.0])


def trainable(model: nn.Module) -> set[int]:
    return {int(name.split(".")[1]) for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [([0], set(range(12))), ([3], set(range(3, 12))), ([1, 11], set(range(12)) - {1, 11}), ([0, 1], set(range(2, 12)))],
)
def test_one_number_freezes_all_layers_below_several_just_those(freeze, expected):
    model = Stub()
    setup.freeze_layers(model, freeze)
    assert trainable(model) == expected  # layer 1 must not take 10 and 11 with it


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="--freeze 12 leaves nothing to train"):
        setup.freeze_layers(Stub(), [12])


@pytest.mark.parametrize(("asked", "expected"), [(320, 320), (321, 352), (32, 64)])
def test_image_sides_are_multiples_of_at_least_32_and_two_of_them(asked, expected):
    assert setup.image_side(Stub(), Namespace(imgsz=asked)) == expected


def spec_of(val: Path, nc: int) -> DataSpec:
    return DataSpec(None, Path("/data"), (), (val,), (), {index: str(index) for index in range(nc)})


def test_only_coco_has_its_own_threshold_and_results_file():
    assert setup.final_keywords(spec_of(Path("/data/coco128/images"), 80)) == {}
    keywords = setup.final_keywords(spec_of(Path("/data/coco/val2017.txt"), 80))
    assert keywords["iou_thres"] == 0.65
    assert keywords["json_name"] == "best_predictions.json"
    assert keywords["categories"][79] == 90
    assert keywords["annotations"] == Path("/data/annotations/instances_val2017.json")


def test_deterministic_algorithms_are_on_inside_and_as_before_outside():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), setup.deterministic_algorithms(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        raise RuntimeError("an error on the way out")
    assert not torch.are_deterministic_algorithms_enabled()


def checkpoint_at(path: Path, optimizer: dict | None, **options) -> Path:
    path.parent.mkdir(parents=True)
    save_checkpoint(path, {"optimizer": optimizer, "opt": options})
    return path


def test_resume_takes_the_newest_run_its_options_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b", "c")):
        path = checkpoint_at(tmp_path / "runs" / name / "weights" / "last.pt", {"state": {}}, epochs=number, workers=8)
        os.utime(path, (1000 + number % 2, 1000 + number % 2))  # b is the newest
    options = Namespace(resume=True, epochs=300, workers=2, device="", save_dir=None)
    resume.resume_options(options, {"resume", "workers"}, {"epochs": 300, "workers": 8, "device": "", "resume": False})
    assert options.epochs == 1
    assert options.workers == 2  # given anew
    assert Path(options.resume) == Path("runs/b/weights/last.pt")
    assert Path(options.save_dir) == Path("runs/b")


def test_nothing_to_resume_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no last\*\.pt below"):
        resume.find_resumable(True)


def test_a_stripped_checkpoint_has_nothing_to_resume(tmp_path):
    path = checkpoint_at(tmp_path / "run" / "last.pt", None, epochs=7)
    with pytest.raises(UserError, match="finished 7 epochs, nothing to resume"):
        resume.load_resumable(path)
