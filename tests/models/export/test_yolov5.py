"""`--include yolov5`: what the pickle names, and that programs with classes of those names alone can run it."""

import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch

import export
from models.load import load_model
from utils.errors import UserError

# Classes under YOLOv5's names that bring nothing but a forward: all they read must be in the file.
STAND_IN_LAYERS = """
import torch
from torch import nn

class Conv(nn.Module):
    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

class DWConv(Conv):
    pass

class Bottleneck(nn.Module):
    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))

class C3(nn.Module):
    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))

class SPPF(nn.Module):
    def forward(self, x):
        x = self.cv1(x)
        pooled = [x]
        for _ in range(3):
            pooled.append(self.m(pooled[-1]))
        return self.cv2(torch.cat(pooled, 1))

class Concat(nn.Module):
    def forward(self, x):
        return torch.cat(x, self.d)
"""
STAND_IN_GS = """
class GSConv(nn.Module):
    def forward(self, x):
        x = self.cv1(x)
        both = torch.cat((x, self.cv2(x)), 1)
        return torch.cat((both[:, 0::2], both[:, 1::2]), 1)

class GSBottleneck(nn.Module):
    def forward(self, x):
        return self.conv_lighting(x) + self.shortcut(x)

class VoVGSCSP(nn.Module):
    def forward(self, x):
        return self.cv3(torch.cat((self.cv2(x), self.gsb(self.cv1(x))), 1))
"""
STAND_IN_MODEL = """
import torch
from torch import nn

class Detect(nn.Module):
    def forward(self, features):
        rows = []
        for i in range(self.nl):
            b, _, ny, nx = features[i].shape
            maps = self.m[i](features[i]).view(b, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2)
            if self.grid[i].shape[2:4] != maps.shape[2:4]:
                y, x = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
                self.grid[i] = torch.stack((x, y), 2).view(1, 1, ny, nx, 2).float()
                self.anchor_grid[i] = (self.anchors[i] * self.stride[i]).view(1, self.na, 1, 1, 2)
            y = maps.sigmoid()
            xy = (y[..., 0:2] * 2 - 0.5 + self.grid[i]) * self.stride[i]
            wh = (y[..., 2:4] * 2) ** 2 * self.anchor_grid[i]
            rows.append(torch.cat((xy, wh, y[..., 4:]), -1).view(b, -1, self.nc + 5))
        return torch.cat(rows, 1)

class Model(nn.Module):
    def forward(self, x):
        outputs = []
        for layer in self.model:
            if layer.f != -1:
                sources = [layer.f] if isinstance(layer.f, int) else layer.f
                picked = [x if source == -1 else outputs[source] for source in sources]
                x = picked[0] if isinstance(layer.f, int) else picked
            x = layer(x)
            outputs.append(x if layer.i in self.save else None)
        return x
"""
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
file, inputs, output = sys.argv[1:]
checkpoint = torch.load(file, map_location="cpu", weights_only=False)
model = checkpoint["model"].float().eval()
with torch.no_grad():
    rows = model(torch.load(inputs))
facts = {name: checkpoint[name] for name in ("epoch", "best_fitness", "ema", "updates", "optimizer")}
facts |= {"names": model.names, "stride": model.stride, "detect_stride": model.model[-1].stride, "yaml": model.yaml}
facts |= {"types": [layer.type for layer in model.model], "np": sum(layer.np for layer in model.model)}
torch.save({"rows": rows, **facts}, output)
"""


@pytest.fixture(scope="module")
def exported(write_checkpoint):
    files = {}
    for cfg, half in (("yolov5n.yaml", False), ("yolov5n.yaml", True), ("yolov5n-slimneck.yaml", False)):
        weights = write_checkpoint(cfg)
        written = export.run(weights=str(weights), include=["yolov5"], imgsz=64, half=half)
        files[cfg, half] = weights, weights.with_name("best_yolov5.pt")
        assert written == [str(files[cfg, half][1])]
    return files


def run_elsewhere(tmp_path, file, images, layers):
    """Opens the file in a process that has the stand-ins only."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "common.py").write_text(layers)
    (tmp_path / "models" / "yolo.py").write_text(STAND_IN_MODEL)
    (tmp_path / "program.py").write_text(PROGRAM)
    torch.save(images, tmp_path / "in.pt")
    subprocess.run([sys.executable, "program.py", file, "in.pt", "out.pt"], cwd=tmp_path, check=True)
    return torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 5e-3)])
def test_a_program_with_yolov5s_classes_alone_runs_it(tmp_path, exported, half, tolerance):
    weights, file = exported["yolov5n.yaml", half]
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    seen = run_elsewhere(tmp_path, file, images, STAND_IN_LAYERS)
    with torch.no_grad():
        expected = load_model(weights)(images)[0]
    torch.testing.assert_close(seen["rows"], expected, rtol=tolerance, atol=tolerance)
    assert (seen["names"], seen["stride"].tolist()) == (["ant", "bee", "fly"], [8, 16, 32])
    assert seen["detect_stride"].tolist() == [8, 16, 32] and seen["yaml"]["nc"] == 3
    assert (seen["epoch"], seen["ema"], seen["optimizer"], seen["updates"], seen["best_fitness"]) == (-1, *[None] * 4)
    assert seen["types"][0] == "models.common.Conv" and seen["types"][-1] == "models.yolo.Detect"
    assert seen["np"] == sum(parameter.numel() for parameter in load_model(weights).parameters())


def test_slim_necks_fork_finds_its_blocks(tmp_path, exported):
    weights, file = exported["yolov5n-slimneck.yaml", False]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    seen = run_elsewhere(tmp_path, file, images, STAND_IN_LAYERS + STAND_IN_GS)
    with torch.no_grad():
        torch.testing.assert_close(seen["rows"], load_model(weights)(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_the_pickle_names_nothing_but_yolov5_and_torch(exported, half):
    with zipfile.ZipFile(exported["yolov5n.yaml", half][1]) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    modules = {str(value).split(" ")[0] for code, value, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    ours = {name for name in modules if not name.startswith("torch.nn.modules")}
    assert ours <= {"models.yolo", "models.common", "torch", "torch._utils", "collections", "__builtin__"}
    assert {"models.yolo", "models.common"} <= modules


@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5n-slimneck.yaml"])
def test_we_read_it_back(exported, cfg):
    weights, file = exported[cfg, False]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    own, back = load_model(weights), load_model(file)
    assert back.names == own.names == {0: "ant", 1: "bee", 2: "fly"}
    with torch.no_grad():
        torch.testing.assert_close(back(images)[0], own(images)[0])


def test_half_halves_the_file(exported):
    full, half = (exported["yolov5n.yaml", half][1].stat().st_size for half in (False, True))
    assert half == pytest.approx(full / 2, rel=0.05)


def test_blocks_that_yolov5_lacks_are_named(write_checkpoint, caplog):
    weights = write_checkpoint("yolov5n-slimneck.yaml")
    with caplog.at_level("WARNING", "yolov5"):
        export.run(weights=str(weights), include=["yolov5"], imgsz=64)
    assert any("YOLOv5 itself has no GSBottleneck, GSConv, VoVGSCSP" in message for message in caplog.messages)


def test_an_export_is_no_source(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match="start from a checkpoint"):
        export.run(weights=str(tmp_path / "model.onnx"), include=["yolov5"], imgsz=64)
