"""ONNX files as any runtime sees them: names, shapes, metadata, precision; and the same numbers as the checkpoint."""

import json

import numpy as np
import pytest
import torch

import export
from models.config import read_config
from models.load import load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def written(weights, **options):
    (path,) = export.run(weights=str(weights), include="onnx", **{"imgsz": [64, 96], **options})
    return path


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def rows_of(weights, images):
    with torch.no_grad():
        return load_model(weights)(images)


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fixed(write_checkpoint):
    weights = write_checkpoint()
    return weights, written(weights, batch_size=2)


@pytest.fixture(scope="module")
def dynamic(write_checkpoint):
    weights = write_checkpoint()
    return weights, written(weights, dynamic=True, simplify=True, opset=17)


def test_it_has_one_input_and_one_output_of_fixed_shape(fixed):
    model = session(fixed[1])
    (images,), (output,) = model.get_inputs(), model.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", [2, 3, 64, 96], "tensor(float)")
    rows = 3 * (8 * 12 + 4 * 6 + 2 * 3)
    assert (output.name, output.shape, output.type) == ("output", [2, rows, 8], "tensor(float)")


def test_its_rows_are_the_checkpoints(fixed):
    weights, path = fixed
    images = random_images(2, 3, 64, 96)
    (output,) = session(path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(output, rows_of(weights, images)[0].numpy(), rtol=1e-4, atol=1e-4)


def test_it_says_what_it_is(fixed):
    texts = session(fixed[1]).get_modelmeta().custom_metadata_map
    assert texts["stride"] == "32" and texts["names"] == "{0: 'ant', 1: 'bee', 2: 'fly'}"
    said = json.loads(texts["metadata"])
    assert said["names"] == {"0": "ant", "1": "bee", "2": "fly"}
    assert (said["shape_hw"], said["batch"], said["dynamic"], said["precision"]) == ([64, 96], 2, False, "float32")
    assert (said["nms"], said["task"], said["data"]) == (None, "detect", "ants.yaml")
    assert set(said["versions"]) == {"torch", "onnx"} and said["date"] and said["licence"] and said["preprocessing"]


def test_the_operator_set_is_12_unless_asked(fixed, dynamic):
    versions = [onnx.load(path).opset_import[0].version for _, path in (fixed, dynamic)]
    assert versions == [12, 17]


@pytest.mark.parametrize(("name", "opset"), [("shufflenet", 12), ("dysample", 16), ("asff", 12), ("msca", 12)])
def test_modules_of_the_field_give_the_checkpoints_rows_at_any_size(name, opset, write_checkpoint):
    config = {**read_config(f"yolov5n-{name}.yaml")[0], "width_multiple": 0.125}
    weights = write_checkpoint(config)
    path = written(weights, dynamic=True)
    assert onnx.load(path).opset_import[0].version == opset
    images = random_images(2, 3, 96, 64)
    (output,) = session(path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(output, rows_of(weights, images)[0].numpy(), rtol=1e-4, atol=2e-4)


def test_an_operator_set_that_a_block_cannot_use_is_refused(write_checkpoint, caplog):
    with caplog.at_level("ERROR", "yolov5"):
        assert export.run(weights=str(write_checkpoint("yolov5n-dysample.yaml")), include="onnx", opset=15) == []
    assert any("--opset 15 is too low: at least 16 is needed here" in message for message in caplog.messages)


def test_a_simplified_dynamic_file_takes_other_sizes_and_numbers(dynamic):
    weights, path = dynamic
    images = random_images(3, 3, 96, 64)
    (output,) = session(path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(output, rows_of(weights, images)[0].numpy(), rtol=1e-4, atol=2e-4)


def test_a_dynamic_file_names_its_free_axes(dynamic):
    model = session(dynamic[1])
    assert model.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert model.get_outputs()[0].shape[::2] == ["batch", 8]


@pytest.mark.slow
def test_torchs_newer_exporter_gives_the_same_rows_without_a_shuffle(small_weights):
    pytest.importorskip("onnxscript")
    path = written(small_weights["anchors"], dynamic=True, torch_export=True)
    model = onnx.load(path)
    assert model.opset_import[0].version == 18
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Transpose") == 3 and "Gather" not in kinds  # the decoder's; GSConv's shuffle is folded
    images = random_images(3, 3, 96, 64)
    (output,) = session(path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(output, rows_of(small_weights["anchors"], images)[0].numpy(), rtol=1e-4, atol=2e-4)


def test_torchs_newer_exporter_starts_at_opset_18(small_weights, caplog):
    with caplog.at_level("ERROR", "yolov5"):
        assert export.run(weights=str(small_weights["bins"]), include="onnx", torch_export=True, opset=17) == []
    assert any("--opset 17 is too low: at least 18 is needed here" in message for message in caplog.messages)


def test_half_has_float16_weights_and_float32_rows(write_checkpoint):
    weights = write_checkpoint()
    path = written(weights, half=True)
    model = session(path)
    assert (model.get_inputs()[0].type, model.get_outputs()[0].type) == ("tensor(float16)", "tensor(float)")
    images = random_images(1, 3, 64, 96)
    (output,) = model.run(None, {"images": images.numpy().astype(np.float16)})
    expected = rows_of(weights, images)[0].numpy()
    np.testing.assert_allclose(output[..., :4], expected[..., :4], atol=0.5)
    np.testing.assert_allclose(output[..., 4:], expected[..., 4:], atol=5e-3)
    weights_kept = [
        tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    assert max((int(np.prod(tensor.dims)) for tensor in weights_kept), default=0) <= 2 * 378  # the decoder's tables


def test_train_gives_the_maps_of_each_level(write_checkpoint):
    weights = write_checkpoint("yolov5n.yaml")
    path = written(weights, train=True)
    model = session(path)
    assert [output.shape for output in model.get_outputs()] == [[1, 3, 64 // s, 96 // s, 8] for s in (8, 16, 32)]
    images = random_images(1, 3, 64, 96)
    for own, other in zip(rows_of(weights, images)[1], model.run(None, {"images": images.numpy()}), strict=True):
        np.testing.assert_allclose(other, own.numpy(), rtol=1e-4, atol=1e-4)


def test_nms_inside_gives_a_fixed_number_of_detections(write_checkpoint):
    weights = write_checkpoint("yolov5n.yaml")
    path = written(weights, nms=True, topk_all=7, conf_thres=1e-5, iou_thres=0.6, agnostic_nms=True)
    model = session(path)
    assert model.get_outputs()[0].shape == [1, 7, 6]
    said = json.loads(model.get_modelmeta().custom_metadata_map["metadata"])["nms"]
    assert said == {"conf_thres": 1e-5, "iou_thres": 0.6, "max_det": 7, "agnostic": True}
    (found,) = model.run(None, {"images": random_images(1, 3, 64, 96).numpy()})
    assert (np.diff(found[0, :, 4]) <= 0).all() and found[0, 0, 4] > 0


def test_an_operator_set_that_int8_cannot_use_is_refused(write_checkpoint, tiny_shapes, caplog):
    with caplog.at_level("ERROR", "yolov5"):
        assert (
            export.run(weights=str(write_checkpoint()), include="onnx", int8=True, data=str(tiny_shapes), opset=12)
            == []
        )
    assert any("ONNX: export failure: --opset 12 is too low: at least 13" in message for message in caplog.messages)


def test_simplify_without_onnxslim_says_what_to_install(write_checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("models.export.onnx.missing_packages", lambda names: list(names))
    with caplog.at_level("ERROR", "yolov5"):
        assert export.run(weights=str(write_checkpoint()), include="onnx", imgsz=64, simplify=True) == []
    assert any("onnxslim" in message and "requirements-export.txt" in message for message in caplog.messages)
