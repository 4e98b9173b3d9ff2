"""ONNX files in int8: what is quantised, what stays in float, and that the numbers stay near the checkpoint's."""

import numpy as np
import pytest
import torch

import export
from models.load import load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from models.export.onnx import activation_ranges, float_nodes  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[{"batch_size": 2}, {"dynamic": True}], ids=["fixed", "dynamic"])
def quantised(request, write_checkpoint, tiny_shapes):
    weights = write_checkpoint("yolov5n.yaml")
    options = {"imgsz": [64, 96], "int8": True, "data": str(tiny_shapes), "int8_max_drop": 1.0}
    (path,) = export.run(weights=str(weights), include="onnx", **options, **request.param)
    return weights, path


def test_weights_of_all_convolutions_but_the_heads_are_int8_by_channel(quantised):
    graph = onnx.load(quantised[1]).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    sources = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    weights = [sources.get(node.input[1]) for node in convolutions]
    scales = [constants[node.input[1]] for node in weights if node is not None]
    assert len(convolutions) > 50
    assert len(scales) == len(convolutions) - 3
    assert all(scale.ndim == 1 and len(scale) > 1 for scale in scales)


def test_nothing_behind_the_heads_convolutions_is_quantised(quantised):
    graph = onnx.load(quantised[1]).graph
    names = set(float_nodes(graph))
    kinds = [node.op_type for node in graph.node if node.name in names]
    assert kinds.count("Conv") == 3
    assert "Sigmoid" in kinds
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(kinds)


def test_ranges_hold_what_the_images_hold(quantised):
    measured = {entry.name: entry for entry in activation_ranges(onnx.load(quantised[1]).graph)}
    assert measured["images"].low == 0
    assert 0.9 < measured["images"].high <= 1.001


def test_rows_stay_near_the_checkpoints(quantised):
    weights, path = quantised
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    (found,) = onnxruntime.InferenceSession(path).run(["output"], {"images": images.numpy()})
    with torch.no_grad():
        expected = load_model(weights)(images)[0].numpy()
    assert 0 < np.abs(found[..., 4:] - expected[..., 4:]).max() < 0.1


def test_the_file_says_that_it_is_int8(quantised):
    texts = {entry.key: entry.value for entry in onnx.load(quantised[1]).metadata_props}
    assert '"precision": "int8"' in texts["metadata"]


def test_with_raw_maps_everything_is_int8_and_scores_have_all_steps(anchor_free_weights, tiny_shapes):
    options = {"imgsz": [64, 96], "int8": True, "data": str(tiny_shapes), "int8_max_drop": 1.0}
    (path,) = export.run(weights=str(anchor_free_weights), include="onnx", raw=True, **options)
    assert path.endswith("best-raw-int8.onnx")
    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    sources = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        if node.op_type in ("Conv", "Sigmoid"):
            assert [sources[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * len(node.input[:2])
    ports = [sources[port.name] for port in graph.output]
    assert [node.op_type for node in ports] == ["DequantizeLinear"] * 6  # of each level the boxes and the classes
    assert [float(constants[node.input[1]]) for node in ports[1::2]] == pytest.approx([1 / 255] * 3)
