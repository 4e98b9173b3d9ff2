"""Weights files: the published YOLOv5n, the forms original files take, hostile ones, and our own."""

import builtins
import dataclasses
import itertools
import json
import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

from models import config, load, yolo
from models.common import C3, Conv
from models.load import Weights, find_stub, load_model, model_from, read_weights, transfer, with_classes_of
from models.yolo import BLOCKS, Model, register_block
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.images import letterbox, read_image

PUBLISHED = "yolov5n-v6-coco.pt"


def image_tensor(path, size: int) -> torch.Tensor:
    image = letterbox(read_image(path), size, auto=True, stride=32).image
    return torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())[None].float() / 255


@pytest.fixture(scope="module")
def published(golden_dir):
    return read_weights(golden_dir / PUBLISHED)


def test_the_published_checkpoint_opens_whole(published):
    assert (len(published.state_dict), published.nc, published.stride) == (349, 80, [8, 16, 32])
    assert {tensor.dtype for tensor in published.state_dict.values()} == {torch.float32, torch.int64}
    assert (published.names[0], published.names[79], published.source) == ("person", "toothbrush", "yolov5")
    assert published.yaml["anchors"][2] == [116, 90, 156, 198, 373, 326]
    assert "activation" not in published.yaml
    assert published.meta["epoch"] == -1
    model = model_from(published)
    assert not model.training and model.names == published.names
    moved = transfer(Model(published.yaml), published)
    assert (moved.loaded, moved.total, moved.missing_keys, moved.rows) == (349, 349, [], [])


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", ["bus.jpg", "zidane.jpg"])
def test_the_published_checkpoint_gives_the_golden_output(golden_dir, name, fuse):
    golden = json.loads((golden_dir / "detections.json").read_text())["images"][name]
    model = load_model(golden_dir / PUBLISHED, fuse=fuse)
    x = image_tensor(golden_dir / "images" / name, 640)
    assert list(x.shape) == golden["input_shape"]
    with torch.no_grad():
        y = model(x)[0]
    assert y.shape[1] == golden["n_raw"]
    assert y.mean().item() == pytest.approx(golden["raw_mean"], rel=1e-4)
    assert y.std().item() == pytest.approx(golden["raw_std"], rel=1e-4)
    best = y[0, y[0, :, 4].argsort(descending=True)[:20]]
    expected = torch.tensor(golden["raw_top20_by_objectness_xywh_obj_bestcls"])
    torch.testing.assert_close(best[:, :4], expected[:, :4], atol=5e-3, rtol=0)
    torch.testing.assert_close(best[:, 4], expected[:, 4], atol=1e-4, rtol=0)
    confidence, number = best[:, 5:].max(1)
    torch.testing.assert_close(confidence, expected[:, 6], atol=1e-4, rtol=0)
    assert number.tolist() == expected[:, 5].int().tolist()


def test_loading_leaves_no_trace_in_torchs_generator(golden_dir):
    state = torch.get_rng_state()
    model = load_model(golden_dir / PUBLISHED)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in model.parameters())


def test_another_number_of_classes_keeps_all_but_the_head(published):
    model = model_from(published, nc=3)
    assert (model.nc, model.names) == (3, {0: "0", 1: "1", 2: "2"})
    moved = transfer(model, published)
    assert (moved.loaded, moved.total) == (343, 349)
    assert all(key.startswith("model.24.m.") for key in moved.missing_keys)
    assert torch.equal(model.model[0].conv.weight, published.state_dict["model.0.conv.weight"])


def test_excluded_keys_stay_as_they_were(published):
    moved = transfer(Model(published.yaml), published, exclude=("anchor", "model.0."))
    assert set(moved.missing_keys) == {key for key in published.state_dict if "anchor" in key or "model.0." in key}


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_numbers_of_another_kind_are_not_taken_for_weights(published, kind):
    """Whole numbers would make zeros of most weights."""
    model, key = Model(published.yaml), "model.0.conv.weight"
    own = model.state_dict()[key].clone()
    changed = {**published.state_dict, key: published.state_dict[key].to(kind)}
    moved = transfer(model, dataclasses.replace(published, state_dict=changed))
    assert moved.missing_keys == [name for name in published.state_dict if name.startswith("model.0.")]
    assert torch.equal(model.state_dict()[key], own)


def tiny(block: str = "C3", **changes) -> dict:
    config = {
        "nc": 2,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[8, 16], [32, 64]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[-1, 1, block, [16]], [[1, 3], 1, "Detect", ["nc", "anchors"]]],
    }
    return {**config, **changes}


def random_statistics(model):
    """Batch norms as after some training; returns the model in evaluation mode."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def weights_of(model, path="a.pt") -> Weights:
    return Weights(model.yaml, model.state_dict(), model.names, model.nc, [4, 8], "ours", {}, pathlib.Path(path))


CROSS_STAGE = ["C3", "C3TR", "C3SPP", "C3Ghost", "C3GS", "VoVGSCSP", "VoVGSCSPC"]


def without_inner(block):
    """A cross-stage block whose inner module passes its input on."""
    setattr(block, "gsb" if hasattr(block, "gsb") else "m", nn.Identity())
    return block


@pytest.mark.parametrize("taker", CROSS_STAGE)
@pytest.mark.parametrize("giver", CROSS_STAGE)
def test_cross_stage_blocks_take_over_what_each_branch_did(giver, taker):
    """C3 joins its branches in the other order than VoVGSCSP: with equal inner modules both must do the same."""
    torch.manual_seed(0)
    old, new = random_statistics(Model(tiny(giver))), Model(tiny(taker)).eval()
    transfer(new, weights_of(old))
    x = torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(without_inner(new.model[3])(x), without_inner(old.model[3])(x))


def test_a_published_model_gives_a_slim_neck_its_branches(published):
    dense, slim = model_from(published), model_from(published, "yolov5n-slimneck.yaml", nc=80)
    with torch.no_grad():
        for row in (13, 17, 20, 23):
            x = torch.rand(1, dense.model[row].cv1.conv.in_channels, 8, 8)
            expected, found = (without_inner(model.model[row])(x) for model in (dense, slim))
            torch.testing.assert_close(found, expected)


def test_whatever_comes_over_whole_does_the_same():
    """Equal names and shapes do not make an equal meaning: GhostConv and GSConv order their output differently."""
    torch.manual_seed(0)
    names = [name for name, block in BLOCKS.items() if block.plan is config.scaled_channels and name != "Focus"]
    models = {name: random_statistics(Model(tiny(name))) for name in names}
    shapes = {name: {(key, value.shape) for key, value in models[name].state_dict().items()} for name in names}
    x, same = torch.rand(1, 16, 8, 8), []
    for giver, taker in itertools.permutations(names, 2):
        if shapes[taker] <= shapes[giver]:
            new = Model(models[taker].yaml).eval()
            if transfer(new, weights_of(models[giver])).missing_keys:
                continue
            same.append((giver, taker))
            with torch.no_grad():
                torch.testing.assert_close(new.model[3](x), models[giver].model[3](x))
    assert ("SPP", "SPPF") in same and shapes["GSConv"] == shapes["GhostConv"] and ("GhostConv", "GSConv") not in same


def test_a_transfer_says_row_by_row_what_came_over(published, caplog):
    with caplog.at_level("INFO", "yolov5"):
        model_from(published, "yolov5n-slimneck.yaml", nc=3)
    assert caplog.text.splitlines()[-3:] == [
        "  rows 10, 14, 18, 21: GSConv from Conv: nothing",
        "  rows 13, 17, 20, 23: VoVGSCSP from C3: cv1, cv2, cv3 (input halves exchanged), not gsb",
        "  row 24: Detect: anchors, not m",
    ]
    caplog.clear()
    with caplog.at_level("INFO", "yolov5"):
        dense_rows = model_from(published, "yolov5n-slimneck-q.yaml", nc=3)
    assert "rows 13, 17, 20, 23: C3GS from C3: cv1, cv2, cv3, a part of m" in caplog.text
    for key in ("model.10.conv.weight", "model.13.m.0.cv1.conv.weight", "model.23.cv3.bn.running_var"):
        assert torch.equal(dense_rows.state_dict()[key], published.state_dict[key])
    assert "model.10.cv1.conv.weight" in transfer(Model("yolov5n-slimneck.yaml"), published).missing_keys


TWO_ANCHORS = [[8, 16, 16, 8], [32, 64, 64, 32]]


def test_a_head_of_other_classes_takes_the_boxes_and_the_classes_of_the_same_name():
    torch.manual_seed(0)
    old, new = (Model(tiny(nc=nc, anchors=TWO_ANCHORS)).eval() for nc in (3, 4))
    old.names, new.names = {0: "cat", 1: "dog", 2: "hen"}, {0: "cow", 1: " Hen", 2: "pig", 3: "cat "}
    for head in (old.head, new.head):
        for tensor in head.parameters():
            nn.init.normal_(tensor)
    own = [layer.bias.detach().view(2, 9).clone() for layer in new.head.m]
    given = with_classes_of(new, weights_of(old))
    assert transfer(new, given).missing_keys == []
    maps = [torch.rand(1, layer.in_channels, 4, 4) for layer in old.head.m]
    with torch.no_grad():
        before, after = (model.head.maps(maps) for model in (old, new))
    for level, (one, other) in enumerate(zip(before, after, strict=True)):
        one, other = one.view(2, 8, 16), other.view(2, 9, 16)
        torch.testing.assert_close(other[:, [0, 1, 2, 3, 4, 6, 8]], one[:, [0, 1, 2, 3, 4, 7, 5]])
        assert torch.equal(new.head.m[level].bias.view(2, 9)[:, [5, 7]], own[level][:, [5, 7]])


@pytest.mark.parametrize(
    ("names", "taken"), [("cat hen dog", [0, 2, 1]), ("cow pig fox", [0, 1, 2]), ("cat pig fox", [0, None, None])]
)
def test_classes_of_one_number_are_told_apart_by_their_names_unless_all_are_other(names, taken):
    torch.manual_seed(0)
    old, new = (Model(tiny(nc=3, anchors=TWO_ANCHORS)) for _ in range(2))
    old.names, new.names = ({number: name for number, name in enumerate(one.split())} for one in ("cat dog hen", names))
    own, given = (model.head.m[0].weight.detach().view(2, 8, -1) for model in (new, old))
    found = with_classes_of(new, weights_of(old)).state_dict["model.4.m.0.weight"].view(2, 8, -1)
    for number, source in enumerate(taken):
        assert torch.equal(found[:, 5 + number], own[:, 5 + number] if source is None else given[:, 5 + source])


@pytest.mark.parametrize("wanted", ["hen cat dog", "hen cow", "cow cat dog hen"])
def test_the_anchor_free_head_has_its_classes_in_layers_of_their_own(wanted):
    yaml = tiny()
    yaml["head"][-1] = [[1, 3], 1, "DetectAF", ["nc", 4]]
    torch.manual_seed(0)
    old, new = (Model({**yaml, "nc": nc}) for nc in (3, len(wanted.split())))
    old.names, new.names = (dict(enumerate(one.split())) for one in ("cat dog hen", wanted))
    found = with_classes_of(new, weights_of(old)).state_dict
    for level in range(2):
        assert torch.equal(found[f"model.4.m.{level}.weight"], old.head.m[level].weight)
        for number, name in new.names.items():
            giver, row = (new, number) if name == "cow" else (old, "cat dog hen".split().index(name))
            assert torch.equal(found[f"model.4.m.{2 + level}.weight"][number], giver.head.m[2 + level].weight[row])


def test_blocks_of_other_programs_take_what_has_the_same_keys(monkeypatch, published):
    monkeypatch.setattr(yolo, "BLOCKS", dict(BLOCKS))
    monkeypatch.setattr(load, "BLOCKS", yolo.BLOCKS)

    @register_block(repeats_inside=True)
    class C3Scaled(C3):
        def __init__(self, c1, c2, n=1, shortcut=True):
            super().__init__(c1, c2, n, shortcut)
            self.scale = nn.Parameter(torch.ones(c2))

    yaml = {
        **published.yaml,
        "head": [[*row[:2], row[2].replace("C3", "C3Scaled"), row[3]] for row in published.yaml["head"]],
    }
    moved = transfer(Model(yaml), published)
    assert moved.missing_keys == [f"model.{row}.scale" for row in (13, 17, 20, 23)]
    assert moved.rows == ["rows 13, 17, 20, 23: C3Scaled from C3: cv1, cv2, cv3, m, not scale"]


def test_rows_beyond_the_files_take_nothing_and_rows_that_are_none_are_refused(published):
    small = dataclasses.replace(published, yaml={**published.yaml, "head": published.yaml["head"][:-1]})
    assert transfer(Model(published.yaml), small).rows == ["row 24: Detect: nothing"]
    with pytest.raises(UserError, match="its model YAML is damaged.*a row is"):
        transfer(Model(published.yaml), dataclasses.replace(published, yaml={"backbone": [], "head": [7]}))


def original(path, block="C3", change=lambda model: None, **extra):
    """Saves a whole pickled model, as YOLOv5 does; `change` makes it one of the forms that occur. Returns it too."""
    torch.manual_seed(1)
    model = random_statistics(Model(tiny(block))).train()
    model.names = ["ball", "cube"]
    change(model)
    torch.save({"epoch": 7, "model": model, "ema": None, **extra}, path)
    return model


def assert_same_output(model, path):
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(x)[0], model.eval()(x)[0], rtol=1e-5, atol=1e-4)


def test_a_pickled_model_gives_its_own_output(tmp_path):
    path = tmp_path / "a.pt"
    assert_same_output(original(path), path)
    weights = read_weights(path)
    assert (weights.names, weights.nc, weights.stride, weights.meta["epoch"]) == ({0: "ball", 1: "cube"}, 2, [4, 8], 7)


@pytest.mark.parametrize(("names", "read"), [({0: "x", 1: "y"}, {0: "x", 1: "y"}), (["x"], {0: "x", 1: "1"})])
def test_names_may_be_a_dict_and_missing_ones_are_numbers_and_said_so(tmp_path, caplog, names, read):
    original(tmp_path / "a.pt", change=lambda model: setattr(model, "names", names))
    with caplog.at_level("WARNING", "yolov5"):
        assert read_weights(tmp_path / "a.pt").names == read
    assert ("1 names for 2 classes" in caplog.text) == (len(names) == 1)


def test_the_anchors_of_the_buffer_are_taken_not_the_yamls(tmp_path):
    def refit(model):
        model.head.anchors.copy_(torch.tensor([[[3.0, 5.0]], [[6.0, 7.5]]]))

    original(tmp_path / "a.pt", change=refit)
    assert read_weights(tmp_path / "a.pt").yaml["anchors"] == [[12, 20], [48, 60]]
    assert load_model(tmp_path / "a.pt").head.anchors.flatten().tolist() == [3, 5, 6, 7.5]


@pytest.mark.parametrize(
    ("act", "text"),
    [(nn.Mish(), "nn.Mish()"), (nn.LeakyReLU(0.1), "nn.LeakyReLU(negative_slope=0.1)"), (nn.SiLU(), None)],
)
def test_the_activation_is_read_from_the_pickled_modules(tmp_path, act, text):
    def activate(model):
        for block in model.modules():
            if isinstance(block, Conv) and not isinstance(block.act, nn.Identity):
                block.act = act

    path = tmp_path / "a.pt"
    model = original(path, "VoVGSCSP", activate)
    assert read_weights(path).yaml.get("activation") == text
    assert_same_output(model, path)


def test_blocks_may_have_different_activations(tmp_path):
    def activate(model):
        for block in model.modules():
            if hasattr(block, "act"):
                block.act = nn.Hardswish() if isinstance(block, Conv) else nn.LeakyReLU(0.1)

    path = tmp_path / "a.pt"
    model = original(path, "BottleneckCSP", activate)
    expected = {"Conv": "nn.Hardswish()", "BottleneckCSP": "nn.LeakyReLU(negative_slope=0.1)"}
    assert read_weights(path).yaml["activation"] == expected
    assert_same_output(model, path)


def test_unused_res_convolutions_are_left_out_with_one_line(tmp_path, caplog):
    path = tmp_path / "a.pt"
    model = original(path, "VoVGSCSP", lambda model: setattr(model.model[3], "res", Conv(8, 8, 3)))
    with caplog.at_level("INFO", "yolov5"):
        weights = read_weights(path)
    assert [record.message for record in caplog.records] == [
        f"{path}: left out 6 tensors of 'res' convolutions, which VoVGSCSP never calls"
    ]
    assert not any(".res." in key for key in weights.state_dict)
    assert_same_output(model, path)


def test_buffers_of_old_versions_and_profilers_are_left_out(tmp_path):
    def age(model):
        model.head.register_buffer("anchor_grid", torch.zeros(2, 1, 1, 1, 1, 2))
        model.model[0].register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))

    path = tmp_path / "a.pt"
    assert_same_output(original(path, change=age), path)


def test_half_and_folded_models_open(tmp_path):
    path = tmp_path / "a.pt"
    model = original(path, change=lambda model: model.half())
    assert {t.dtype for t in read_weights(path).state_dict.values()} == {torch.float32, torch.int64}
    assert_same_output(model.float(), path)
    assert_same_output(original(path, change=lambda model: model.eval().fuse()), path)


def test_the_average_is_preferred_unless_training_goes_on(tmp_path):
    path = tmp_path / "a.pt"
    average = Model(tiny())
    own = original(path, ema=average)
    key = "model.0.conv.weight"
    assert torch.equal(read_weights(path).state_dict[key], average.state_dict()[key])
    assert torch.equal(read_weights(path, prefer_ema=False).state_dict[key], own.state_dict()[key])


def test_numpy_numbers_and_paths_are_read_as_plain_data(tmp_path):
    path = tmp_path / "a.pt"
    opt = {"data": pathlib.PurePosixPath("/data/coco.yaml"), "save_dir": pathlib.PureWindowsPath("c:/runs/exp")}
    hyp = {"lr0": np.float64(0.01), "anchors": np.int64(3), "odd": np.zeros(3)}
    original(path, opt=opt, hyp=hyp, best_fitness=np.array([0.5]), date="2024-01-02")
    meta = read_weights(path).meta
    assert meta["hyp"] == {"lr0": 0.01, "anchors": 3, "odd": None}
    assert (meta["data"], meta["date"]) == ("/data/coco.yaml", "2024-01-02")
    assert "exp" in meta["opt"]["save_dir"] and isinstance(meta["opt"]["save_dir"], str)


@pytest.mark.parametrize(
    "name",
    [
        *("models.yolo.DetectionModel", "models.common.SPPF", "models.experimental.CrossConv"),
        *("torch.nn.modules.conv.Conv2d", "pathlib.PosixPath", "pathlib._local.WindowsPath", "numpy.ndarray"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
    ],
)
def test_names_of_original_files_are_allowed_and_none_is_the_thing_itself(name):
    stand_in = find_stub(name)
    assert stand_in is not None
    assert stand_in.__module__.split(".")[0] == name.split(".")[0] or stand_in.__module__ == "models.load"
    assert not isinstance(stand_in, type) or issubclass(stand_in, load.PickleStub)


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "torch.hub.load"),
        *("models.common.os.system", "models.load.load_model", "xmodels.common.Conv", "torch.nn.modules.os.system.x"),
        *("ultralytics.nn.tasks.DetectionModel", "utils.general.check_file", "pathlib.os.system", "numpy.load"),
        *("models.tf.TFModel", "models.common2.Conv", "torch.nn.parallel.DataParallel", "torch.nn.Conv2d"),
    ],
)
def test_other_names_are_not(name):
    assert find_stub(name) is None


def test_of_all_that_a_process_has_loaded_these_modules_alone_are_allowed():
    """Whatever widens the list shows here, if anything that Python, torch or this program has falls under it."""
    loaded = [(name, module) for name, module in list(sys.modules.items()) if module is not None]
    names = {f"{name}.{item}" for name, module in loaded for item in list(vars(module))}
    allowed = {name for name in names if find_stub(name) is not None}
    modules = {name.rpartition(".")[0] for name in allowed}
    of_torch = {module for module in modules if module.startswith("torch.nn.modules.")}
    ours = {"models.common", "models.yolo", "models.experimental"}
    others = {name for name in allowed if name.rpartition(".")[0] not in of_torch | ours}
    assert len(names) > 10_000 and len(of_torch) > 20 and modules >= ours - {"models.experimental"}
    paths = {f"pathlib.{kind}Path" for kind in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")}
    arrays = {f"numpy.{room}.multiarray.{name}" for room in ("core", "_core") for name in ("scalar", "_reconstruct")}
    assert {name.replace("pathlib._local.", "pathlib.") for name in others} <= paths | arrays | {
        "numpy.ndarray",
        "numpy.dtype",
    }


class Calls:
    """Unpickled freely, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(canary) -> dict:
    text = f"open({str(canary)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {canary}"),
        "eval": Calls(builtins.eval, text),
        "exec": Calls(builtins.exec, text),
        "open": Calls(builtins.open, str(canary), "w"),
        "getattr": Calls(builtins.getattr, "text", "upper"),
        "touch": Calls(pathlib.Path.touch, pathlib.PurePosixPath(str(canary))),
    }


@pytest.mark.parametrize("kind", list(hostile("x")))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_file_is_refused_before_anything_runs(tmp_path, kind, protocol):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    content = {"model": Model(tiny()), "extra": hostile(canary)[kind]}
    torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(UserError, match="evil.pt") as caught:
        load_model(path)
    assert not canary.exists()
    if protocol == 2 and kind in ("eval", "exec", "open", "getattr"):
        assert "refused" in str(caught.value) and kind in str(caught.value)


def test_foreign_classes_are_named(tmp_path):
    path = tmp_path / "a.pt"
    original(path, sampler=torch.utils.data.SequentialSampler([1]))
    with pytest.raises(UserError, match=r"a.pt: refused.*: torch.utils.data.sampler.SequentialSampler\.$"):
        read_weights(path)


def test_a_model_within_itself_is_refused(tmp_path):
    original(tmp_path / "a.pt", change=lambda model: model.model[0]._modules.update(again=model))
    with pytest.raises(UserError, match="too many modules"):
        read_weights(tmp_path / "a.pt")


def test_other_pickled_modules_are_no_detector(tmp_path):
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 3, 1))}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: is not a YOLOv5 detector"):
        read_weights(tmp_path / "a.pt")


def test_an_unknown_block_is_named(tmp_path):
    def rename(model):
        model.yaml["head"][0][2] = "MyBlock"

    original(tmp_path / "a.pt", change=rename)
    with pytest.raises(UserError, match="row 3 .*unknown block 'MyBlock'"):
        load_model(tmp_path / "a.pt")


def test_weights_that_do_not_fit_their_yaml_are_refused(tmp_path):
    original(tmp_path / "a.pt", change=lambda model: model.yaml["backbone"][0][3].__setitem__(0, 16))
    with pytest.raises(UserError, match="do not fit their own model YAML.*model.0.conv.weight"):
        load_model(tmp_path / "a.pt")


def test_our_own_checkpoint_comes_back_whole(tmp_path):
    path = tmp_path / "best.pt"
    model, average = Model(tiny(activation="nn.Mish()")).eval(), Model(tiny(activation="nn.Mish()")).eval()
    checkpoint = {
        "epoch": 3,
        "model": model.state_dict(),
        "ema": {key: t.half() if t.is_floating_point() else t for key, t in average.state_dict().items()},
        "yaml": model.yaml,
        "names": {0: "ball", 1: "cube"},
        "nc": 2,
        "stride": [4, 8],
        "data": "shapes.yaml",
    }
    save_checkpoint(path, checkpoint)
    weights = read_weights(path)
    assert (weights.source, weights.meta["data"], weights.meta["epoch"]) == ("ours", "shapes.yaml", 3)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(path)(x)[0], average(x)[0], rtol=1e-2, atol=0.2)
        own = model_from(read_weights(path, prefer_ema=False))
        torch.testing.assert_close(own(x)[0], model(x)[0], rtol=0, atol=0)
    assert own.names == {0: "ball", 1: "cube"}
    del checkpoint["names"]
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match="best.pt: the checkpoint has no 'names'"):
        read_weights(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is a folder, a checkpoint .* is expected"):
        read_weights(tmp_path)
