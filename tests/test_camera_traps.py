"""Checkpoints like MegaDetector's, P6 models of YOLOv5 5.0 pickled by an old PyTorch, through the commands."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import detect
import export
import val
from models.load import read_weights
from models.yolo import Model
from utils.boxes import xywhn2xyxy
from utils.files import ROOT

IMAGE = cv2.resize(cv2.imread(str(ROOT / "data" / "images" / "shapes-wide.jpg")), (256, 192))
NAMES = ["animal", "person", "vehicle"]
CONV = [[-1, 1, "Conv", [channels, 3, 2]] for channels in (128, 256, 512, 768, 1024)]
# YOLOv5 5.0's x6 with its widths and depths scaled down: Focus, C3, and SPP at stride 64; four levels of three anchors
YAML = {
    "nc": len(NAMES),
    "depth_multiple": 0.33,
    "width_multiple": 0.0625,
    "anchors": [
        *([19, 27, 44, 40, 38, 94], [96, 68, 86, 152, 180, 137]),
        *([140, 301, 303, 264, 238, 542], [436, 615, 739, 380, 925, 792]),
    ],
    "backbone": [
        *([-1, 1, "Focus", [64, 3]], CONV[0], [-1, 3, "C3", [128]], CONV[1], [-1, 9, "C3", [256]]),
        *(CONV[2], [-1, 9, "C3", [512]], CONV[3], [-1, 3, "C3", [768]], CONV[4]),
        *([-1, 1, "SPP", [1024, [3, 5, 7]]], [-1, 3, "C3", [1024, False]]),
    ],
    "head": [
        *([-1, 1, "Conv", [768, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]),
        *([[-1, 8], 1, "Concat", [1]], [-1, 3, "C3", [768, False]]),
        *([-1, 1, "Conv", [512, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]),
        *([[-1, 6], 1, "Concat", [1]], [-1, 3, "C3", [512, False]]),
        *([-1, 1, "Conv", [256, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]),
        *([[-1, 4], 1, "Concat", [1]], [-1, 3, "C3", [256, False]]),
        *([-1, 1, "Conv", [256, 3, 2]], [[-1, 20], 1, "Concat", [1]], [-1, 3, "C3", [512, False]]),
        *([-1, 1, "Conv", [512, 3, 2]], [[-1, 16], 1, "Concat", [1]], [-1, 3, "C3", [768, False]]),
        *([-1, 1, "Conv", [768, 3, 2]], [[-1, 12], 1, "Concat", [1]], [-1, 3, "C3", [1024, False]]),
        [[23, 26, 29, 32], 1, "Detect", ["nc", "anchors"]],
    ],
}


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """The checkpoint as 5.0 left it after training: the model in half precision, no options, no date."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(YAML)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None  # measure: an untrained model answers all images alike
        for conv in model.head.m:
            nn.init.normal_(conv.weight, std=0.3)
            conv.bias.data.view(3, -1)[:, 4:] = torch.tensor([0.0, 1.0, 0.0, 0.5])
        with torch.no_grad():
            model.train()(torch.from_numpy(IMAGE[..., ::-1].copy()).permute(2, 0, 1)[None] / 255)
        for norm in model.eval().modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.clamp_(min=0.1)  # little of it would make much of rounding
    model.names = NAMES
    model.head.register_buffer("anchor_grid", model.head.anchors.clone().view(4, 1, -1, 1, 1, 2))
    for module in model.modules():
        if isinstance(module, nn.Upsample):
            del module.recompute_scale_factor  # newer than that PyTorch: upon it 5.0's own loader fails today
    path = tmp_path_factory.mktemp("weights") / "md_v5a.0.0.pt"
    kept = {"epoch": -1, "best_fitness": None, "training_results": None, "ema": None, "updates": None}
    torch.save({**kept, "model": model.half(), "optimizer": None, "wandb_id": None}, path)
    return path


def found_in(folder):
    (labels,) = folder.glob("labels/*.txt")
    return np.loadtxt(labels, ndmin=2)


def test_it_is_read_as_it_was_pickled(pickled):
    weights = read_weights(pickled)
    assert (weights.stride, list(weights.names.values()), weights.meta["epoch"]) == ([8, 16, 32, 64], NAMES, -1)
    assert not any("anchor_grid" in key for key in weights.state_dict)


def test_it_goes_through_all_commands(pickled, command, tmp_path, one_thread):
    """What it finds in an image is found again in its export, and scores where its own best are the labels."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "trap.png"), IMAGE)
    words = ["--source", tmp_path / "images", "--img", 192, 256, "--conf", 0.5, "--save-txt", "--save-conf"]
    words += ["--project", tmp_path]
    outcome = command(detect, "--weights", pickled, *words, "--name", "checkpoint")
    assert outcome.status == 0, outcome.said
    own = found_in(tmp_path / "checkpoint")
    assert len(own) >= 5 and set(own[:, 0]) <= {0, 1, 2}

    outcome = command(export, "--weights", pickled, "--include", "onnx", "--img", 192, 256)
    assert outcome.status == 0 and "raw boxes in place" in outcome.said, outcome.said
    outcome = command(detect, "--weights", pickled.with_suffix(".onnx"), *words, "--name", "onnx")
    assert outcome.status == 0, outcome.said
    exported = found_in(tmp_path / "onnx")
    assert len(own) == len(exported) and np.abs(own - exported).max() < 1e-2

    best = own[own[:, 5] >= np.sort(own[:, 5])[-3]]
    np.savetxt(tmp_path / "labels" / "trap.txt", best[:, :5], "%g")
    assert (xywhn2xyxy(best[:, 1:5], w=256, h=192) > -1).all()
    (tmp_path / "traps.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {NAMES}\n")
    words = ["--data", tmp_path / "traps.yaml", "--img", 256, "--project", tmp_path, "--name", "val", "--noplots"]
    outcome = command(val, "--weights", pickled, *words)
    assert outcome.status == 0, outcome.said
    (line,) = [line for line in outcome.said.splitlines() if line.split()[:1] == ["all"]]
    assert line.split()[1:3] == ["1", str(len(best))] and float(line.split()[5]) > 0.02, line  # among its many others
