"""Core ML files, as far as they can be read without macOS: names, shapes, scaling, weights, metadata."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import export
from models.backends.base import before_tensorflow
from models.backends.metadata import Metadata
from models.export import coreml
from models.export.formats import ExportConfig
from models.export.run import make_jobs
from utils.cli import options_from
from utils.errors import UserError

if find_spec("coremltools") is None:  # not importorskip: its import must come after what `before_tensorflow` loads
    pytest.skip("coremltools is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


def job_of(weights, **options):
    given = {"weights": [str(weights)], "imgsz": [64, 96], "include": ["coreml"], **options}
    config = ExportConfig(**vars(options_from(export.build_parser(), given))).checked()
    return make_jobs(weights, config, torch.device("cpu"))[0]


def exported(weights, **options):
    """Returns the job, the file, its size, and what coremltools reads in it."""
    job = job_of(weights, **options)
    path = coreml.export(job)
    before_tensorflow()
    import coremltools

    return job, path, path.stat().st_size, coremltools.utils.load_spec(str(path))


def convolutions(spec):
    return [layer.convolution for layer in spec.neuralNetwork.layers if layer.WhichOneof("layer") == "convolution"]


@pytest.fixture(scope="module")
def weights(write_checkpoint):
    return write_checkpoint()


@pytest.fixture(scope="module")
def full(weights):
    return exported(weights)


def test_an_image_goes_in_and_rows_come_out(full):
    _, path, _, spec = full
    assert path.name == "best.mlmodel"
    (image,), (output,) = spec.description.input, spec.description.output
    picture = image.type.imageType
    assert (image.name, picture.height, picture.width) == ("image", 64, 96)
    assert picture.colorSpace == picture.ColorSpace.Value("RGB")
    rows = 3 * (8 * 12 + 4 * 6 + 2 * 3)
    assert (output.name, list(output.type.multiArrayType.shape)) == ("output", [1, rows, 8])


def test_the_image_is_scaled_to_0_to_1_inside(full):
    (step,) = full[3].neuralNetwork.preprocessing
    assert step.featureName == "image" and step.scaler.channelScale == pytest.approx(1 / 255)
    assert (step.scaler.redBias, step.scaler.greenBias, step.scaler.blueBias) == (0, 0, 0)


def test_the_weights_are_the_rewritten_models(full):
    job, _, _, spec = full
    expected = [module for module in job.model.trunk.modules() if isinstance(module, torch.nn.Conv2d)]
    held = convolutions(spec)
    assert len(held) == len(expected)
    sums = [sorted(float(np.sum(np.abs(layer.weights.floatValue))) for layer in held)]
    sums.append(sorted(float(module.weight.abs().sum()) for module in expected))
    np.testing.assert_allclose(*sums, rtol=1e-5)
    first = np.array(held[0].weights.floatValue, np.float32).reshape(expected[0].weight.shape)
    np.testing.assert_array_equal(first, expected[0].weight.numpy())


def test_it_says_what_it_is(full):
    _, path, _, spec = full
    said = Metadata.from_texts(dict(spec.description.metadata.userDefined), str(path))
    assert (said.names, said.shape_hw, said.stride) == ({0: "ant", 1: "bee", 2: "fly"}, (64, 96), 32)
    assert (said.precision, said.boxes_normalised) == ("float32", False)
    assert spec.description.metadata.license == said.licence


@pytest.mark.parametrize(("options", "bits", "share"), [({"half": True}, 16, 0.55), ({"int8": True}, 8, 0.35)])
def test_fewer_bits_a_weight_make_it_smaller(weights, full, options, bits, share, tiny_shapes):
    data = {"data": str(tiny_shapes)} if "int8" in options else {}
    job, _, size, spec = exported(weights, **options, **data)
    assert size < share * full[2]
    held = convolutions(spec)[0].weights
    assert len(held.float16Value) if bits == 16 else held.quantization.numberOfBits == 8
    if bits == 8:
        expected = next(module for module in job.model.trunk.modules() if isinstance(module, torch.nn.Conv2d)).weight
        linear = held.quantization.linearQuantization
        steps = np.frombuffer(held.rawValue, np.uint8).astype(np.float32).reshape(len(expected), -1)
        restored = steps * np.reshape(linear.scale, (-1, 1)) + np.reshape(linear.bias, (-1, 1))
        np.testing.assert_allclose(restored, expected.flatten(1).numpy(), atol=float(np.max(linear.scale)))


def test_nms_inside_gives_a_fixed_number_of_detections(write_checkpoint):
    *_, spec = exported(write_checkpoint("yolov5n.yaml"), nms=True, topk_all=9)
    assert list(spec.description.output[0].type.multiArrayType.shape) == [1, 9, 6]


def test_more_than_one_image_at_a_time_is_refused(weights):
    with pytest.raises(UserError, match="--batch-size 2: Core ML takes one image"):
        coreml.export(job_of(weights, batch_size=2))
