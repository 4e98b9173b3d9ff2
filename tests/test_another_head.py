"""Another head than YOLOv5's, from training to exports: the anchor-free one and its loss.

Under names of their own, entered in the tables from here, as those of somebody's script would be; nothing else is
touched.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from models import config, yolo
from models.backends import load_backend
from models.heads import DetectAF
from models.load import load_model
from utils.callbacks import Callbacks
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.loggers import LOGGERS
from utils.loggers.base import Logger
from utils.loss import LOSSES, AnchorFreeLoss
from utils.plots.training import _read_results, _results_figure

MODEL = """
nc: 4
depth_multiple: 1.0
width_multiple: 1.0
backbone: [[-1, 1, Conv, [8, 6, 2, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, GSConv, [16, 3, 2]]]
head: [[-1, 1, VoVGSCSP, [16]], [-1, 1, GSConv, [16, 3, 2]], [[3, 4], 1, PointHead, [nc, 8, [GSConv, 1, 1]]]]
"""
COLUMNS = "train/sides_loss,train/class_loss,train/bins_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
COLUMNS += "metrics/mAP_0.5:0.95,val/sides_loss,val/class_loss,val/bins_loss,x/lr0,x/lr1,x/lr2"


class PointHead(DetectAF):
    loss = "points"

    def set_strides(self, stride, source):
        super().set_strides(stride, source)
        for conv in self.m[self.nl :]:  # to be sure of something after three epochs
            torch.nn.init.constant_(conv.bias, -3.0)


class PointLoss(AnchorFreeLoss):
    terms = ("sides", "class", "bins")
    gains = ("box", "cls", "af_dfl", "label_smoothing")  # the last two of which the file leaves out

    def weigh(self, means):
        return torch.stack([mean.value() for mean in means[:3]]) * self.weights()

    def weights(self):
        return torch.tensor([self.hyp[gain] for gain in self.gains[:3]])


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
    """The rows of the tables; one thread, for sums have other roundings with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(yolo.BLOCKS, "PointHead", yolo.Block(PointHead, config.head_channels))
        patch.setitem(LOSSES, "points", PointLoss)
        patch.setitem(LOGGERS, "tensorboard", lambda *_: None)
        patch.setitem(LOGGERS, "mine", Remembered)
        yield
    torch.set_num_threads(threads)


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
            **{
                "recipe": "yolov5",
                "device": "cpu",
                "amp": "off",
                "noplots": True,
                "workers": 0,
                "project": str(folder),
                "save_period": 1,
            },
        )
    return SimpleNamespace(folder=folder, run=folder / "exp", done=done, headers=headers)


def test_the_figures_bear_the_names_of_its_terms(trained):
    header, *rows = (trained.run / "results.csv").read_text().splitlines()
    assert header.replace(" ", "") == f"epoch,{COLUMNS}"
    figures = [[float(cell) for cell in row.split(",")] for row in rows]
    assert len(figures) == 3 and all(loss > 0 for row in figures for loss in (*row[1:4], *row[8:11]))
    assert all(figures[2][term] < figures[0][term] for term in (*range(1, 4), *range(8, 11)))  # it learns
    assert any(line.split() == "Epoch gpu_mem sides class bins labels img_size eta".split() for line in trained.headers)
    assert len(trained.done.result.losses) == 3
    figure = _results_figure({"a": _read_results(trained.run / "results.csv")})
    panels = [axes.get_title(loc="left") for axes in figure.axes]
    assert panels == [COLUMNS.split(",")[column] for column in (0, 1, 2, 3, 4, 7, 8, 9, 5, 6)]
    assert Remembered.told[:2] == [(0, 64, 0.01), (0, COLUMNS.split(","))] and Remembered.told[-1] == "closed"


def test_a_loss_that_is_lost_is_named(trained, tiny_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(PointLoss, "weights", lambda _: torch.tensor([1.0, float("nan"), 1.0]))
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
    assert figures[2] > 0
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
    assert [level.shape for level in raw] == [(2, 1, 8, 12, 36), (2, 1, 4, 6, 36)]
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
