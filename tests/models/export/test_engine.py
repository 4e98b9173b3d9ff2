"""TensorRT engines, as far as they can be tested without a GPU: what is refused, and what the library is given."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import export
from models.backends.metadata import Metadata
from models.export import engine
from models.export.formats import ExportConfig
from models.export.onnx import quantize, write_onnx
from models.export.run import make_jobs
from models.load import load_model
from utils.cli import options_from
from utils.errors import UserError

onnx = pytest.importorskip("onnx")


def job_of(weights, device="cpu", **options):
    given = {"weights": [str(weights)], "imgsz": [64, 96], "include": ["engine"], "device": "0", **options}
    config = ExportConfig(**vars(options_from(export.build_parser(), given))).checked()
    return make_jobs(weights, config, torch.device(device))[0]


@pytest.fixture(scope="module")
def weights(write_checkpoint):
    return write_checkpoint()


class FakeTensorRT:
    """The part of TensorRT 10's interface that is used, by its documentation; keeps what it is given."""

    __version__ = "10.9.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")

    def __init__(self, readable=True, buildable=True):
        self.readable, self.buildable, self.seen = readable, buildable, {}

    def Logger(self, level):  # noqa: N802
        self.seen["level"] = level
        return "logger"

    Logger.VERBOSE, Logger.WARNING = "verbose", "warning"

    def Builder(self, logger):  # noqa: N802
        def build(network, config):
            self.seen["name"] = network.name
            return bytearray(b"plan") if self.buildable else None

        profile = SimpleNamespace(set_shape=lambda *shapes: self.seen.update(profile=shapes))
        config = SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.seen.update({pool: size}),
            add_optimization_profile=lambda given: self.seen.update(profiled=given is profile),
        )
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(name="", flags=self.seen.update(flags=flags)),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=build,
        )

    def OnnxParser(self, network, logger):  # noqa: N802
        def parse(content):
            self.seen["model"] = onnx.load_from_string(content)
            return self.readable

        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda index: f"no operator {index}")


def built(weights, tmp_path, trt, **options):
    job = job_of(weights, **options)
    write_onnx(job, tmp_path / "model.onnx", least_opset=engine.LEAST_OPSET)
    return engine.build(trt, (tmp_path / "model.onnx").read_bytes(), job)


def test_a_cpu_is_refused(weights):
    with pytest.raises(UserError, match="built on the CUDA GPU that is to run it, and this is cpu: add --device 0"):
        engine.export(job_of(weights))


def test_an_old_library_is_refused(weights, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(UserError, match="needs TensorRT 10 or newer, this is 8.6.1"):
        engine.export(job_of(weights, "cuda"))


def test_the_network_is_strongly_typed_named_and_limited(weights, tmp_path):
    trt = FakeTensorRT()
    assert built(weights, tmp_path, trt, workspace=2) == b"plan"
    assert (trt.seen["flags"], trt.seen["workspace"], trt.seen["level"]) == (2, 2 << 30, "warning")
    said = Metadata.from_texts({"metadata": trt.seen["name"]}, "engine")
    assert said.names == {0: "ant", 1: "bee", 2: "fly"} and said.shape_hw == (64, 96)
    assert "profile" not in trt.seen
    (images,) = trt.seen["model"].graph.input
    assert images.name == "images" and images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_half_hands_over_a_float16_model(weights, tmp_path):
    trt = FakeTensorRT()
    built(weights, tmp_path, trt, half=True, verbose=True)
    assert trt.seen["model"].graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert trt.seen["level"] == "verbose"


def test_a_dynamic_engine_takes_from_one_small_image_to_a_padded_batch(weights, tmp_path):
    trt = FakeTensorRT()
    built(weights, tmp_path, trt, dynamic=True, batch_size=4)
    assert trt.seen["profile"] == ("images", (1, 3, 32, 32), (4, 3, 64, 96), (4, 3, 128, 128))
    assert trt.seen["profiled"]
    shape = trt.seen["model"].graph.input[0].type.tensor_type.shape
    assert [axis.dim_param for axis in shape.dim] == ["batch", "", "height", "width"]


@pytest.mark.parametrize(
    ("abilities", "message"),
    [
        ({"readable": False}, "cannot read the model: no operator 0"),
        ({"buildable": False}, "could not build the model"),
    ],
)
def test_what_tensorrt_cannot_do_is_said(weights, tmp_path, abilities, message):
    with pytest.raises(UserError, match=message):
        built(weights, tmp_path, FakeTensorRT(**abilities))


def test_a_name_that_is_too_long_is_shortened_then_left_out(caplog):
    def named(count, **more):
        return Metadata({index: f"class number {index:04}" for index in range(count)}, 32, (640, 640), **more)

    text = engine.engine_name(named(110, versions={"torch": "x" * 1000}))
    assert len(text) <= 4095 and json.loads(text)["versions"] == {} and len(json.loads(text)["names"]) == 110
    assert json.loads(engine.engine_name(named(3)))["preprocessing"]
    assert not caplog.messages and engine.engine_name(named(1000)) == ""
    assert "no room for the names of 1000 classes" in caplog.text


@pytest.fixture(scope="module")
def quantised(weights, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("int8")
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (1, 3, 64, 96), np.uint8) for _ in range(4)]
    write_onnx(job_of(weights), folder / "full.onnx", least_opset=13)
    quantize(folder / "full.onnx", folder / "int8.onnx", images, symmetric=True)
    return folder / "int8.onnx", images


def test_int8_is_symmetric_and_leaves_biases_head_and_decoder_in_float(quantised):
    graph = onnx.load(quantised[0]).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    steps = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    zeros = [constants[node.input[2]] for node in steps]
    assert steps and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    dequantised = {node.output[0] for node in steps if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    in_float = [node for node in convolutions if node.input[1] not in dequantised]
    assert len(in_float) == 3 and all(constants[node.input[1]].shape[0] == 3 * 8 for node in in_float)
    assert not any(dequantised.intersection(node.input[2:]) for node in convolutions)


def test_int8_rows_are_near_the_checkpoints(weights, quantised):
    import onnxruntime

    path, images = quantised
    inputs = images[0].astype(np.float32) / 255
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = load_model(weights)(torch.from_numpy(inputs))[0].numpy()
    difference = np.abs(session.run(None, {"images": inputs})[0] - expected)
    assert difference[..., 4:].max() < 0.05 and difference[..., :4].max() < 8
