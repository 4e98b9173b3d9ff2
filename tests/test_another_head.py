"""Another head and its loss beside YOLOv5's: defined here, entered in the tables, and nothing else is touched.

Anchor-free: each cell has one box, told by the distances of its sides from the cell's centre, and no objectness. Each
label is learnt by the cells that hold its centre.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import detect
import export
import train
import val
from models import config, yolo
from models.backends import load_backend
from models.common import Conv
from models.heads import Head, LevelDecoder
from models.load import load_model
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.loggers import LOGGERS
from utils.loggers.base import Logger
from utils.loss import LOSSES
from utils.loss.base import BatchReduction, Loss, Mean
from utils.plots.training import _read_results, _results_figure

MODEL = """
nc: 4
depth_multiple: 1.0
width_multiple: 1.0
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, GSConv, [16, 3, 2]]]
head: [[-1, 1, VoVGSCSP, [16]], [-1, 1, GSConv, [16, 3, 2]], [[3, 4], 1, PointHead, [nc]]]
"""
COLUMNS = "train/sides_loss,train/class_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95,"
COLUMNS += "val/sides_loss,val/class_loss,x/lr0,x/lr1,x/lr2"

pytestmark = pytest.mark.usefixtures("one_thread")


class PointDecoder(LevelDecoder):
    def decode(self, values, grid):
        sides = F.softplus(values[:, :, :4])
        before, after = sides[:, :, :2] * self.cell, sides[:, :, 2:] * self.cell
        return grid + (after - before) / 2, before + after, values[:, :, 4:].sigmoid()


class PointHead(Head):
    loss = "points"
    level_decoder = PointDecoder
    objectness = False

    def __init__(self, nc, ch):
        super().__init__(nc, len(ch))
        self.m = nn.ModuleList(nn.Sequential(Conv(c, 16, 3), nn.Conv2d(16, self.channels, 1)) for c in ch)

    @property
    def channels(self):
        return 4 + self.nc


class PointLoss(Loss):
    terms = ("sides", "class")
    gains = ("box", "cls", "label_smoothing")  # the last of which the file leaves out

    def means(self, outputs, targets):
        means = []
        for output, stride in zip(outputs, self.head.stride.tolist(), strict=True):
            batch, _, height, width, channels = output.shape
            scale = torch.tensor([width, height], device=output.device)
            centre, size = targets[:, 2:4] * scale, targets[:, 4:6] * scale
            cell = torch.minimum(centre.long(), scale - 1)
            index = (targets[:, 0].long() * height + cell[:, 1]) * width + cell[:, 0]
            rows = output.float().reshape(-1, channels)
            mine = rows.index_select(0, index)
            to_centre = centre - (cell + 0.5)
            wanted = torch.cat((size / 2 - to_centre, size / 2 + to_centre), dim=1).clamp(min=0)
            weight = targets[:, 4:6].prod(dim=1).sqrt() + stride / 100  # soft, so that counts are no whole numbers
            distance = (F.softplus(mine[:, :4]) - wanted).abs().mean(dim=1)
            classes = torch.zeros_like(rows[:, 4:])
            classes[index, targets[:, 1].long()] = 1.0
            entropy = F.binary_cross_entropy_with_logits(rows[:, 4:], classes, reduction="sum")
            means += [Mean((distance * weight).sum(), weight.sum()), Mean(entropy, batch * height * width)]
        return means

    def weigh(self, means):
        return torch.stack([sum(mean.value() for mean in means[term::2]) for term in (0, 1)]) * self.weights()

    def weights(self):
        return torch.tensor([self.hyp["box"], self.hyp["cls"]])


class Remembered(Logger):
    """A destination of one's own."""

    told: list = []

    def __init__(self, save_dir, start_epoch, settings):
        self.told.append((start_epoch, settings["opt"]["imgsz"], settings["hyp"]["lr0"]))

    def log_epoch(self, epoch, figures):
        self.told.append((epoch, list(figures)))

    def close(self):
        self.told.append("closed")


@pytest.fixture(scope="module", autouse=True)
def _entered():
    """The rows of the tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(yolo.BLOCKS, "PointHead", yolo.Block(PointHead, config.head_channels))
        patch.setitem(LOSSES, "points", PointLoss)
        patch.setitem(LOGGERS, "tensorboard", lambda *_: None)
        patch.setitem(LOGGERS, "mine", Remembered)
        yield


@pytest.fixture(scope="module")
def trained(tiny_shapes, tmp_path_factory):
    """A run of three epochs, a copy of it after the second, and what was logged."""
    folder = tmp_path_factory.mktemp("points")
    (folder / "points.yaml").write_text(MODEL)
    callbacks, headers = Callbacks(), []

    def copy(_last, epoch, *_):
        if epoch == 1:
            shutil.copytree(folder / "exp", folder / "copy")

    callbacks.register_action("on_model_save", callback=copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.train.engine.LOGGER", SimpleNamespace(info=headers.append))
        done = train.run(
            callbacks,
            **{"cfg": str(folder / "points.yaml"), "data": str(tiny_shapes), "imgsz": 64, "batch_size": 8, "epochs": 3},
            **{"device": "cpu", "amp": "off", "noplots": True, "workers": 0, "project": str(folder), "save_period": 1},
        )
    return SimpleNamespace(folder=folder, run=folder / "exp", done=done, headers=headers)


def test_the_figures_bear_the_names_of_its_terms(trained):
    header, *rows = (trained.run / "results.csv").read_text().splitlines()
    assert header.replace(" ", "") == f"epoch,{COLUMNS}"
    figures = [[float(cell) for cell in row.split(",")] for row in rows]
    assert len(figures) == 3 and all(loss > 0 for row in figures for loss in (*row[1:3], *row[7:9]))
    assert figures[2][1] < figures[0][1] and figures[2][7] < figures[0][7]  # it learns
    assert any(line.split() == "Epoch gpu_mem sides class labels img_size eta".split() for line in trained.headers)
    assert len(trained.done.result.losses) == 2
    figure = _results_figure({"a": _read_results(trained.run / "results.csv")})
    panels = [axes.get_title(loc="left") for axes in figure.axes]
    assert panels == [COLUMNS.split(",")[column] for column in (0, 1, 2, 3, 6, 7, 4, 5)]
    assert Remembered.told[:2] == [(0, 64, 0.01), (0, COLUMNS.split(","))] and Remembered.told[-1] == "closed"


def test_a_loss_that_is_lost_is_named(trained, tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(PointLoss, "weights", lambda _: torch.tensor([1.0, float("nan")]))
    options = {"cfg": str(trained.folder / "points.yaml"), "data": str(tiny_shapes), "imgsz": 64, "batch_size": 8}
    with pytest.raises(UserError, match="class is nan in epoch 0, batch 0"):
        train.run(**options, device="cpu", amp="off", noplots=True, workers=0, project=str(tmp_path))


def test_an_interrupted_run_goes_on(trained):
    train.run(resume=str(trained.folder / "copy" / "weights" / "last.pt"))
    whole, resumed = (load_checkpoint(trained.folder / run / "weights" / "epoch2.pt") for run in ("exp", "copy"))
    assert not [key for key, value in whole["model"].items() if not torch.equal(value, resumed["model"][key])]
    assert (trained.folder / "copy" / "results.csv").read_text() == (trained.run / "results.csv").read_text()


def test_it_is_validated_and_detects(trained, tiny_shapes, tmp_path):
    weights = str(trained.run / "weights" / "best.pt")
    figures, maps, _ = val.run(str(tiny_shapes), weights, imgsz=64, plots=False, project=str(tmp_path), workers=0)
    assert figures[:4] == pytest.approx(trained.done.result.as_tuple()[:4], abs=1e-3) and maps.shape == (4,)
    source = str(tiny_shapes.parent / "images" / "val" / "0.jpg")
    found = list(detect.run(stream=True, weights=weights, source=source, imgsz=64, conf_thres=0.001))
    assert [len(result.detections) > 0 for result in found] == [True]


def test_rows_are_decoded_alike_everywhere(trained):
    model = load_model(trained.run / "weights" / "best.pt")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows, raw = model(images)
        maps = model.head.maps([torch.rand(1, 16, 8, 8), torch.rand(1, 16, 4, 4)])
        fixed, free = (model.head.decoder(shape)(maps) for shape in ((64, 64), None))
    assert rows.shape == (2, 8 * 12 + 4 * 6, 9) and (rows[..., 4] == 1).all()
    assert [level.shape for level in raw] == [(2, 1, 8, 12, 8), (2, 1, 4, 6, 8)]
    torch.testing.assert_close(fixed, free)


@pytest.mark.parametrize("switches", [{}, {"dynamic": True}, {"nms": True}, {"train": True}])
def test_an_export_gives_the_same(trained, tmp_path, switches):
    pytest.importorskip("onnx")
    weights = shutil.copy(trained.run / "weights" / "best.pt", tmp_path)
    (written,) = export.run(weights=str(weights), include=["onnx"], imgsz=64, **switches)  # which checks parity itself
    model, image = load_model(weights), np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    with torch.no_grad():
        rows, raw = model(torch.from_numpy(image))
    if switches.get("train"):
        import onnxruntime

        outputs = onnxruntime.InferenceSession(written).run(None, {"images": image})
        for found, expected in zip(outputs, raw, strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    elif not switches.get("nms"):
        found = np.asarray(load_backend(written, "cpu").infer(image))
        np.testing.assert_allclose(found, rows.numpy(), rtol=1e-3, atol=1e-3)


def test_it_is_not_exported_for_yolov5s_own_program(trained, tmp_path, caplog):
    weights = shutil.copy(trained.run / "weights" / "best.pt", tmp_path)
    assert export.run(weights=str(weights), include=["yolov5"], imgsz=64) == []
    assert "YOLOv5 has no head PointHead" in caplog.text


def test_parts_of_a_batch_add_up_to_the_whole(trained):
    """Three images as two parts of two processes, with counts that are sums of weights."""
    model = load_model(trained.run / "weights" / "best.pt").train()
    model.hyp = {"box": 0.5, "cls": 2.0, "label_smoothing": 0.0}
    loss, images = PointLoss(model), torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 0.3, 0.4, 0.2, 0.2], [1, 3, 0.6, 0.7, 0.5, 0.1], [2, 0, 0.5, 0.2, 0.1, 0.3]])
    outputs = [output.detach() for output in model(images)]
    whole, figures = loss.compute(outputs, targets), []
    parts = [([level[:2] for level in outputs], targets[:2]), ([level[2:] for level in outputs], targets[2:])]
    parts[1][1][:, 0] = 0
    for part in parts:
        loss.compute(*part, BatchReduction(lambda own: figures.append(own) or own, 2))
    results = [loss.compute(*part, BatchReduction(lambda _: sum(figures), 2)) for part in parts]
    assert sum(result.total for result in results) / 2 == pytest.approx(whole.total.item(), rel=1e-5)
    for result in results:
        assert result.items.tolist() == pytest.approx(whole.items.tolist(), rel=1e-5) and result.labels == 3
