"""mAP of an export beside its checkpoint's: real images, the same shapes for both, an export that was spoilt."""

import logging
import shutil

import numpy as np
import pytest

import export
from models.export.verify import compare_map

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SHAPE_HW = (96, 128)


@pytest.fixture(scope="module")
def data(part_of_coco128):
    return part_of_coco128(16)


@pytest.fixture(scope="module")
def files(tmp_path_factory, golden_dir, data):
    """The COCO checkpoint and ONNX exports of it: of one shape, dynamic, and with NMS inside."""
    paths = {}
    for kind in ("fixed", "dynamic", "has_nms"):
        folder = tmp_path_factory.mktemp(kind)
        paths["checkpoint"] = shutil.copy(golden_dir / "yolov5n-v6-coco.pt", folder / "coco.pt")
        options = {"imgsz": list(SHAPE_HW), "dynamic": kind == "dynamic", "nms": kind == "has_nms", "data": str(data)}
        (paths[kind],) = export.run(weights=[str(paths["checkpoint"])], include=["onnx"], **options)
    return paths


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "has_nms"])
def test_a_float_export_loses_nothing_and_nothing_is_printed(files, data, kind, caplog):
    with caplog.at_level(logging.INFO, "yolov5"):
        checkpoint, exported = compare_map(files["checkpoint"], files[kind], str(data), SHAPE_HW, "cpu")
    assert checkpoint > 0.1
    assert checkpoint - exported == pytest.approx(0, abs=1e-3)
    assert "mAP" not in caplog.text and "Speed" not in caplog.text


def test_the_two_shapes_are_not_the_same_measurement(files, data):
    fixed, dynamic = (
        compare_map(files["checkpoint"], files[kind], data, SHAPE_HW, "cpu") for kind in ("fixed", "dynamic")
    )
    assert fixed[0] != dynamic[0]


def test_a_spoilt_export_shows_a_drop(files, data, tmp_path):
    model = onnx.load(files["fixed"])
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 4:
            noisy = values + np.random.default_rng(0).normal(0, 0.3 * values.std(), values.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array(noisy.astype(values.dtype), tensor.name))
    spoilt = tmp_path / "spoilt.onnx"
    onnx.save(model, spoilt)
    checkpoint, exported = compare_map(files["checkpoint"], spoilt, data, SHAPE_HW, "cpu")
    assert checkpoint - exported > 0.05
