"""NCNN folders: what is in them, the checkpoint's numbers out of them, and what is refused."""

import logging
import os

import numpy as np
import pytest
import torch
import yaml

import export
from models.backends.metadata import Metadata
from models.export.ncnn import _check_layers
from models.load import load_model
from utils.errors import UserError

ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(write_checkpoint):
    """The same model in float32 and with float16 weights, by name."""
    found = {}
    for name, half in (("float32", False), ("float16", True)):
        weights = write_checkpoint()
        (found[name],) = export.run(weights=str(weights), include="ncnn", imgsz=[64, 96], half=half)
    return weights, found


def run(folder, image):
    """Runs a model on an image (3, h, w) in float32 arithmetic."""
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert net.load_param(f"{folder}/model.ncnn.param") == 0
    assert net.load_model(f"{folder}/model.ncnn.bin") == 0
    with net.create_extractor() as extractor:
        extractor.input("in0", ncnn.Mat(image))
        status, output = extractor.extract("out0")
        assert status == 0
        return np.array(output)


def test_the_folder_holds_graph_weights_and_metadata(folders):
    found = folders[1]
    assert sorted(os.listdir(found["float32"])) == ["metadata.yaml", "model.ncnn.bin", "model.ncnn.param"]
    with open(f"{found['float32']}/metadata.yaml", encoding="utf-8") as file:
        metadata = Metadata.from_texts(yaml.safe_load(file), "metadata.yaml")
    assert metadata.names == {0: "ant", 1: "bee", 2: "fly"}
    assert (metadata.stride, metadata.shape_hw, metadata.precision) == (32, (64, 96), "float32")


def test_rows_of_float16_weights_are_near_the_checkpoints(folders):
    weights, found = folders
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(weights)(image)[0][0].numpy()
    np.testing.assert_allclose(run(found["float16"], image[0].numpy()), expected, rtol=0.02, atol=0.5)


def test_float16_weights_take_half_the_room(folders):
    whole, half = (os.path.getsize(f"{folders[1][name]}/model.ncnn.bin") for name in ("float32", "float16"))
    assert half < 0.55 * whole


def test_batches_are_refused(write_checkpoint, caplog):
    logging.getLogger("yolov5").propagate = True
    assert export.run(weights=str(write_checkpoint()), include="ncnn", imgsz=64, batch_size=2) == []
    assert "--batch-size 2: NCNN takes one image at a time" in caplog.text


def test_an_operation_that_ncnn_lacks_is_named(tmp_path):
    graph = tmp_path / "model.ncnn.param"
    graph.write_text("7767517\n2 2\nInput in0 0 1 in0\naten::roll roll_1 1 1 in0 out0\n")
    with pytest.raises(UserError, match="aten::roll"):
        _check_layers(graph)
