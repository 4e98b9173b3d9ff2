"""What is settled before a run starts: sizes, frozen layers, COCO's extras, reproducibility, what may be resumed."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from utils.checkpoint import save_checkpoint
from utils.dataloaders.config import DataSpec, load_spec
from utils.dataloaders.images_cache import DiskImages, ImageFiles, RamImages
from utils.errors import UserError
from utils.files import ROOT, read_yaml
from utils.train import prepare as setup
from utils.train import resume
from utils.train.distributed import ALONE, World
from utils.train.hyp import Hyp

HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"


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


def spec_of(val: Path, names: dict[int, str]) -> DataSpec:
    return DataSpec(None, Path("/data"), (), (val,), (), names)


def test_only_coco_has_its_own_threshold_and_results_file():
    names = read_yaml(ROOT / "data" / "coco.yaml")["names"]
    assert setup.final_keywords(spec_of(Path("/data/coco128/images"), names)) == {}
    others = dict(enumerate(map(str, range(80))))  # a list of that name is no COCO
    assert setup.final_keywords(spec_of(Path("/data/coco/val2017.txt"), others)) == {}
    keywords = setup.final_keywords(spec_of(Path("/data/coco/val2017.txt"), names))
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
    needed = dict.fromkeys("model ema scaler schedule stopper generators hyp yaml".split(), {})
    needed |= {"updates": 0, "epoch": 0, "best_fitness": 0.0}
    save_checkpoint(path, {**needed, "optimizer": optimizer, "opt": options})
    return path


def test_resume_takes_the_newest_run_its_options_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.yaml").touch()
    same = {"data": str(tmp_path / "shapes.yaml"), "batch_size": 4, "imgsz": 64, "workers": 8}
    for number, name in enumerate(("a", "b", "c")):
        path = checkpoint_at(tmp_path / "runs" / name / "weights" / "last.pt", {"state": {}}, **same, epochs=number)
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


def test_of_a_checkpoint_without_a_record_of_its_data_it_is_said(caplog):
    resume.check_dataset({"data": "a.yaml"}, {}, Namespace(resume="old.pt", data="/now/b.yaml"))
    assert "old.pt is of an earlier version" in caplog.text and "whether /now/b.yaml has changed" in caplog.text


@pytest.mark.parametrize(
    ("switches", "processes", "words"),
    [
        ({"cfg": ""}, 1, "neither --cfg nor --weights"),
        ({"weights": "a.onnx"}, 1, "a checkpoint ending in .pt"),
        ({"batch_size": 0}, 1, "--batch-size 0: at least 1, or -1"),
        ({"batch_size": 6, "quad": True}, 1, "--quad .* 6 is not a multiple of 4"),
        ({"batch_size": -1}, 2, "--batch-size -1 measures one GPU alone"),
        ({"batch_size": 16}, 3, "--batch-size 16 is of all 3 processes together"),
        ({"image_weights": True}, 2, "--image-weights works in a single process only"),
        ({"image_weights": True, "rect": True}, 1, "--image-weights .* --rect keeps their order: leave one out"),
        ({"cache": "val", "noval": True}, 1, "--cache val .* --noval reads them only once: leave one out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(switches, processes, words):
    sound = {"cfg": "a.yaml", "weights": "", "resume": False, "batch_size": 16, "quad": False, "image_weights": False}
    sound |= {"rect": False, "cache": None, "noval": False}
    setup.check_options(Namespace(**sound), World(0, 2, 0, 2))
    setup.check_options(Namespace(**{**sound, "rect": True, "cache": "val"}))
    setup.check_options(Namespace(**{**sound, "cache": "ram", "noval": True}))
    setup.check_options(Namespace(**{**sound, "batch_size": -1, "quad": True, "image_weights": True}))
    with pytest.raises(UserError, match=words):
        setup.check_options(Namespace(**{**sound, **switches}), World(0, processes, 0, processes))


@pytest.mark.parametrize(
    ("found", "quad", "multi_scale", "px", "expected"),
    [(13, False, False, 96, 13), (13, True, False, 96, 12), (3, True, False, 96, 4), (5, False, True, 160, 5)]
    + [(13, True, True, 96, 12)],  # four images of 96 px are one of 192, and --multi-scale makes one of at most 160
)
def test_a_measured_batch_is_by_fours_with_quad_and_of_the_largest_images(
    monkeypatch, found, quad, multi_scale, px, expected
):
    def measured(model, imgsz, amp):
        assert (imgsz, amp) == (px, "auto")
        return found

    monkeypatch.setattr(setup, "autobatch", measured)
    options = Namespace(imgsz=96, quad=quad, multi_scale=multi_scale, amp="auto")
    assert setup.fitting_batch_size(Stub(), options, torch.device("cuda")) == expected


CACHES = {
    None: (ImageFiles, ImageFiles),
    "ram": (RamImages, RamImages),
    "disk": (DiskImages, DiskImages),
    "val": (ImageFiles, RamImages),
}


@pytest.fixture(scope="module")
def prepared(tiny_shapes):
    spec = load_spec(str(tiny_shapes))
    return setup.load_tables(spec, single_cls=False, workers=0), spec, Hyp.from_yaml(HYP)


def loaders_of(prepared, world=ALONE, **switches):
    tables, spec, hyp = prepared
    sound = {"imgsz": 64, "batch_size": 16, "workers": 8, "seed": 0, "rect": False, "quad": False, "noval": False}
    return setup.build_loaders(tables, spec, Stub(), hyp, Namespace(**{**sound, "cache": None, **switches}), world)


@pytest.mark.parametrize("cache", CACHES)
def test_caches_hold_the_images_that_they_are_asked_to(prepared, cache):
    loaders = loaders_of(prepared, cache=cache)
    assert (type(loaders.train.dataset.images), type(loaders.val.dataset.images)) == CACHES[cache]
    validated_once = loaders_of(prepared, cache=cache, noval=True)
    assert type(validated_once.val.dataset.images) is ImageFiles


def test_of_several_processes_the_first_alone_validates_and_all_share_batches(prepared, monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    first, second = (loaders_of(prepared, World(rank, 2, rank, 2)) for rank in range(2))
    assert second.val is None and first.val.batch_size == 8  # all that there are
    assert len(first.train) == len(second.train) == 2
    assert first.train.workers == 2
    batches = [list(loaders.train.batches) for loaders in (first, second)]
    assert [[len(batch) for batch in own] for own in batches] == [[8, 4], [8, 4]]
    positions = [key.position for both in zip(*batches, strict=True) for own in both for key in own]
    assert positions == list(range(24))
