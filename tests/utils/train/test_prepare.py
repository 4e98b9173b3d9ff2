"""What is settled before a run starts: options that are refused, frozen layers, loaders, reproducibility."""

import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from models.heads import Detect, DetectAF
from utils.dataloaders.config import DataSpec, load_spec
from utils.dataloaders.images_cache import DiskImages, ImageFiles, RamImages
from utils.dataloaders.labels import LabelTable
from utils.errors import UserError
from utils.files import ROOT, read_yaml
from utils.train import prepare
from utils.train.distributed import ALONE, World
from utils.train.hyp import Hyp
from utils.train.prepare import TrainConfig

HYP = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"
CUDA, CPU, METAL = torch.device("cuda", 0), torch.device("cpu"), torch.device("mps")


def config_of(**switches) -> TrainConfig:
    """What the command line comes to with a model and `switches`."""
    return TrainConfig(**{**vars(train.build_parser().parse_args([])), "cfg": "a.yaml", "imgsz": 64, **switches})


@pytest.mark.parametrize(
    ("switches", "processes", "words"),
    [
        ({"resume": " "}, 1, "--resume '': the name is empty"),
        ({"cfg": ""}, 1, "neither --cfg nor --weights"),
        ({"weights": "a.onnx"}, 1, "a checkpoint ending in .pt"),
        ({"batch_size": 0}, 1, "--batch-size 0: at least 1, or -1"),
        ({"batch_size": 6, "quad": True}, 1, "--quad .* 6 is not a multiple of 4"),
        ({"image_weights": True, "rect": True}, 1, "--image-weights .* --rect keeps their order: leave one out"),
        ({"cache": "val", "noval": True}, 1, "--cache val .* --noval reads them only once: leave one out"),
        ({"label_smoothing": 1.0}, 1, "--label-smoothing 1 .* below 1"),
        ({"batch_size": -1}, 2, "--batch-size -1 measures one GPU alone"),
        ({"batch_size": 16}, 3, "--batch-size 16 is of all 3 processes together"),
        ({"image_weights": True}, 2, "--image-weights works in a single process only"),
    ],
)
def test_options_that_do_not_go_together_are_refused(switches, processes, words):
    prepare.check_options(config_of(), 2)
    for sound in (
        {"rect": True, "cache": "val"},
        {"cache": "ram", "noval": True},
        {"batch_size": -1, "quad": True, "image_weights": True},
    ):
        prepare.check_options(config_of(**sound))
    with pytest.raises(UserError, match=words):
        prepare.check_options(config_of(**switches), processes)


@pytest.mark.parametrize(
    ("switches", "device", "words"),
    [
        ({"amp": "fp16"}, CPU, "--amp fp16 needs a CUDA GPU"),
        ({"batch_size": -1}, CPU, "CUDA GPU; this run computes on cpu. Name a number, .*--batch-size 16"),
        ({"sync_bn": True}, CPU, "--sync-bn: PyTorch synchronises batch norm on CUDA GPUs, not on cpu"),
        ({"deterministic": True}, METAL, "--deterministic: .* not for mps"),
    ],
)
def test_what_a_device_cannot_do_is_refused(switches, device, words):
    prepare.prepare_device(config_of(), device)
    with pytest.raises(UserError, match=words):
        prepare.prepare_device(config_of(**switches), device)


def test_batch_norm_of_one_process_is_not_synchronised_and_it_is_said(caplog):
    prepare.prepare_device(config_of(sync_bn=True), CUDA, processes=2)
    assert not caplog.messages
    prepare.prepare_device(config_of(sync_bn=True), CUDA)
    assert "nobody to synchronise with" in caplog.text


@pytest.mark.parametrize("given", [None, ":16:8", ":0:0"])
def test_cublas_is_told_to_be_deterministic_unless_the_user_has_said_otherwise(given, monkeypatch):
    monkeypatch.setenv(prepare.CUBLAS_VARIABLE, given or "")  # so that it is taken away again
    if given is None:
        monkeypatch.delenv(prepare.CUBLAS_VARIABLE)
    if given == ":0:0":
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:0:0.* Unset it, or set :4096:8 or :16:8"):
            prepare.prepare_device(config_of(deterministic=True), CUDA)
        return
    prepare.prepare_device(config_of(deterministic=True), CUDA)
    assert os.environ[prepare.CUBLAS_VARIABLE] == (given or ":4096:8")


def algorithms() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), strict, cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize(
    ("device", "asked", "within"),
    [
        (CUDA, True, (True, True, True, False)),
        (CUDA, False, (False, True, False, True)),
        (CPU, False, (True, True, True, False)),
    ],
)
def test_algorithms_are_chosen_inside_and_as_before_outside(device, asked, within, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # a caller in a hurry
    with pytest.raises(RuntimeError, match="on the way"), prepare.deterministic_algorithms(device, asked):
        assert algorithms() == within
        raise RuntimeError("on the way out")
    assert algorithms() == (False, True, False, True)


def test_a_training_asks_for_them(monkeypatch, tiny_shapes, tmp_path, caplog):
    """The option reaches both places: what is said on a CPU, and the algorithms of the training loop."""
    seen, original = [], prepare.deterministic_algorithms

    def watched(device, asked=False):
        seen.append(asked)
        return original(device, asked)

    monkeypatch.setattr("utils.train.engine.deterministic_algorithms", watched)
    caplog.set_level(logging.INFO, "yolov5")
    small = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 24, "epochs": 1, "device": "cpu", "workers": 0}
    small |= {"noplots": True, "amp": "off", "data": str(tiny_shapes), "project": str(tmp_path)}
    train.run(deterministic=True, **small)
    assert seen == [True] and "--deterministic: on the CPU training is so without it" in caplog.text
    assert "Fingerprint: best.pt " in caplog.text


def test_the_seed_alone_decides_the_first_weights(monkeypatch, tiny_shapes, tmp_path):
    """Not what was drawn before, and nothing is taken from whoever draws afterwards."""
    started = []

    def start(model, *_):
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        raise UserError("that is all")

    monkeypatch.setattr("utils.train.engine.Trainer", start)
    small = {"cfg": "yolov5n-slimneck.yaml", "imgsz": 64, "batch_size": 24, "device": "cpu", "workers": 0}
    small |= {"noplots": True, "noautoanchor": True, "data": str(tiny_shapes), "project": str(tmp_path)}
    for seed, before in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        with pytest.raises(UserError, match="that is all"):
            train.run(seed=seed, **small)
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = started
    assert all(torch.equal(first[name], again[name]) for name in first)
    convolutions = [name for name in first if first[name].ndim == 4]
    assert len(convolutions) > 50 and not any(torch.equal(first[name], other[name]) for name in convolutions)


class Layers(nn.Module):
    """Twelve layers with batch norm, named as in a detector."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(12)))


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [([0], set(range(12))), ([3], set(range(3, 12))), ([1, 11], set(range(12)) - {1, 11}), ([0, 1], set(range(2, 12)))],
)
def test_one_number_freezes_all_layers_below_several_just_those(freeze, expected):
    model = Layers()
    prepare.freeze_layers(model, freeze)
    trainable = {int(name.split(".")[1]) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == expected  # layer 1 must not take 10 and 11 with it


@pytest.mark.parametrize(("freeze", "words"), [([12], "12 leaves nothing to train"), ([3, 12], "12: .* 0 to 11")])
def test_freezing_everything_or_what_is_not_there_is_refused(freeze, words):
    with pytest.raises(UserError, match=f"--freeze {words}"):
        prepare.freeze_layers(Layers(), freeze)


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

    monkeypatch.setattr(prepare, "autobatch", measured)
    config = config_of(imgsz=96, quad=quad, multi_scale=multi_scale)
    assert prepare.fitting_batch_size(Layers(), config, stride=32) == expected


def test_multi_scale_spans_half_to_one_and_a_half_in_strides_and_follows_seed_and_batch():
    def shapes(seed):
        images = torch.rand(1, 3, 64, 96)
        return [tuple(prepare.rescaled(images, 96, 32, seed, iteration).shape[2:]) for iteration in range(60)]

    assert {width for _, width in shapes(0)} == {64, 96, 128, 160}  # 48 to 175, rounded down; at least two strides
    assert all(height % 32 == 0 and height <= width for height, width in shapes(0))
    assert shapes(0) == shapes(0) != shapes(1)


def test_a_batch_of_one_image_keeps_two_cells_at_the_smallest_size():
    """As of the last batch of 17 images: batch norm has no variance of a single value."""
    for height in (32, 64):
        for iteration in range(20):
            cells = nn.Conv2d(3, 1, 32, 32)(prepare.rescaled(torch.rand(1, 3, height, 64), 64, 32, 0, iteration))
            assert nn.BatchNorm2d(1)(cells).isfinite().all()


def test_only_coco_has_its_own_threshold_and_results_file():
    def keywords(val: str, names: dict[int, str]) -> dict:
        return prepare.final_keywords(DataSpec(None, Path("/data"), (), (Path(val),), (), names))

    names = read_yaml(ROOT / "data" / "coco.yaml")["names"]
    assert keywords("/data/coco128/images", names) == {}
    assert keywords("/data/coco/val2017.txt", dict(enumerate(map(str, range(80))))) == {}  # a list of that name only
    found = keywords("/data/coco/val2017.txt", names)
    assert found.pop("categories")[79] == 90
    annotations = Path("/data/annotations/instances_val2017.json")
    assert found == {
        "iou_thres": 0.65, "save_json": True, "json_name": "best_predictions.json", "annotations": annotations
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "epochs", "batch_size", "chosen", "said"),
    [
        # 205 images in batches of 16: 54 steps in eight epochs of warm-up, then 4 in each
        ("auto", 2494, 16, "small", "small, as YOLOv5's makes 9998 optimizer steps of this run, fewer than 10000"),
        ("auto", 2495, 16, "yolov5", "yolov5, as YOLOv5's makes 10002 optimizer steps of this run, at least 10000"),
        ("auto", 9999, 205, "small", "small, as YOLOv5's makes 9999 optimizer steps of this run, fewer than 10000"),
        ("small", 300, 16, "small", ""),
        ("yolov5", 1, 16, "yolov5", ""),
    ],
)
def test_a_recipe_is_chosen_by_the_steps_of_the_run(recipe, epochs, batch_size, chosen, said, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    config = config_of(recipe=recipe, epochs=epochs, batch_size=batch_size, label_smoothing=0.1)
    hyp = prepare.choose_recipe(prepare.with_options(Hyp.from_yaml(HYP), config), config, images=205)
    file = {"small": HYP.with_name("hyp.small.yaml"), "yolov5": HYP}[chosen]
    assert (config.recipe, config.hyp) == (chosen, str(file))
    assert hyp == dataclasses.replace(Hyp.from_yaml(file), label_smoothing=0.1)
    assert [message.removeprefix("--recipe auto: ") for message in caplog.messages] == [said] * bool(said)


@pytest.mark.parametrize(("optimizer", "lr0", "momentum"), [(None, 0.003, 0.9), ("SGD", 0.01, 0.937)])
def test_the_rates_of_a_recipe_are_for_its_own_optimizer(optimizer, lr0, momentum):
    config = config_of(recipe="small", optimizer=optimizer)
    hyp = prepare.choose_recipe(prepare.with_options(Hyp.from_yaml(HYP), config), config, images=205)
    assert (hyp.optimizer, hyp.lr0, hyp.momentum) == (optimizer or "AdamW", lr0, momentum)
    assert (hyp.nominal_batch, hyp.warmup_ratio) == (16, 0.05)


CACHES = {
    None: (ImageFiles, ImageFiles),
    "ram": (RamImages, RamImages),
    "disk": (DiskImages, DiskImages),
    "val": (ImageFiles, RamImages),
}


def loaders_of(data, world=ALONE, **switches):
    spec, config = load_spec(str(data)), config_of(**switches)
    return prepare.build_loaders(spec, prepare.load_tables(spec, config, world), 32, Hyp.from_yaml(HYP), config, world)


@pytest.mark.parametrize("cache", CACHES)
def test_caches_hold_the_images_that_they_are_asked_to(tiny_shapes, cache):
    loaders = loaders_of(tiny_shapes, cache=cache)
    assert (type(loaders.train.dataset.images), type(loaders.val.dataset.images)) == CACHES[cache]
    validated_once = loaders_of(tiny_shapes, cache=cache, noval=True)
    assert type(validated_once.val.dataset.images) is ImageFiles


def test_of_several_processes_the_first_alone_validates_and_all_share_batches(tiny_shapes, monkeypatch):
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    first, second = (loaders_of(tiny_shapes, World(rank, 2, rank, 2)) for rank in range(2))
    assert second.val is None and first.val.dataset.batch_size == 8  # all that there are
    assert len(first.train) == len(second.train) == 2
    assert first.train.workers == 2
    batches = [list(loaders.train.keys) for loaders in (first, second)]
    assert [[len(batch) for batch in own] for own in batches] == [[8, 4], [8, 4]]
    positions = [key.position for both in zip(*batches, strict=True) for own in both for key in own]
    assert positions == list(range(24))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (DetectAF(2, [8]), "label_smoothing, cls_pw: without effect on the loss of DetectAF"),
        (Detect(1, [[8, 8]], [8]), "--label-smoothing has no effect: one class"),
        (Detect(2, [[8, 8]], [8]), ""),
    ],
    ids=["anchor-free", "one class", "two classes"],
)
def test_what_the_heads_loss_does_not_read_is_told(head, words, caplog):
    hyp = dataclasses.replace(Hyp.from_yaml(HYP), label_smoothing=0.1, cls_pw=2.0)
    prepare.warn_of_unread(hyp, head)
    assert words in caplog.text and bool(words) == bool(caplog.text)


def test_labels_larger_than_a_heads_boxes_are_counted(caplog):
    head = DetectAF(2, [8, 8], bins=3)
    head.set_strides(torch.tensor([8.0, 16.0]), "")
    rows = torch.tensor([[0, 0.5, 0.5, 0.6, 0.1], [1, 0.5, 0.5, 0.1, 0.7], [1, 0.5, 0.5, 0.6, 0.7]]).numpy()
    counts = np.array([0, 1, 3])  # of 96 px: 57.6 x 4.8; and of a square image 9.6 x 67.2, 57.6 x 67.2; boxes: 64 px
    table = LabelTable(["a.jpg", "b.jpg"], np.array([[40, 20], [50, 50]]), rows, counts, None, None)
    prepare.warn_of_large(table, head, 64)
    assert not caplog.text
    prepare.warn_of_large(table, head, 96)
    assert "2 of 3 labels have a side of over 64 px at --imgsz 96, and DetectAF finds none so large" in caplog.text
    caplog.clear()
    prepare.warn_of_large(table, Detect(2, [[8, 8]], [8]), 4000)
    assert not caplog.text
