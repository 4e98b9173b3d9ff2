"""Files of other people's: YOLOv5's own exports, with less said in them, and int8 inputs; what is no detector."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.backends import load_backend
from models.backends.base import before_tensorflow
from models.backends.metadata import Graph, describe
from models.backends.tflite import _floats, _quantised
from models.inference.predictor import Predictor
from utils.errors import UserError
from utils.files import write_yaml
from utils.nms import NMSConfig


class Raw(nn.Module):
    """Rows from pixels, with the maps behind them, as YOLOv5 6.1 exports them."""

    def __init__(self, columns=7, rows=40):
        super().__init__()
        self.columns, self.rows = columns, rows

    def forward(self, images):
        rows = images.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, self.rows, self.columns)
        return rows + 0.0, images * 2, images * 3


def write_onnx(path, module, dynamic=False):
    pytest.importorskip("onnx")
    import warnings

    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output": {0: "batch"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(1, 3, 64, 64),), str(path), dynamo=False, opset_version=12,
            input_names=["images"], output_names=["output", "maps8", "maps16"], dynamic_axes=axes,
        )  # fmt: skip
    return path


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_of_yolov5_6_1_says_nothing_and_its_first_output_counts(tmp_path, dynamic):
    pytest.importorskip("onnxruntime")
    backend = load_backend(write_onnx(tmp_path / "v6.onnx", Raw(), dynamic), "cpu")
    images = np.full((2, 3, 64, 64), 51, np.uint8)
    np.testing.assert_allclose(backend.predict(images), np.full((2, 40, 7), 0.2), rtol=1e-5)
    assert (backend.names, backend.stride) == ({0: "class0", 1: "class1"}, 64)
    assert (backend.dynamic, backend.metadata.shape_hw) == (dynamic, (640, 640) if dynamic else (64, 64))


def test_onnx_that_is_no_yolov5_detector_is_told(tmp_path):
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "v8.onnx", Raw(columns=8400, rows=84))
    with pytest.raises(UserError, match=r"first output is 84 x 8400 per image, not rows of x, y, w, h"):
        load_backend(path, "cpu")


def described(rows, columns=6, height=160, width=160, **texts):
    return describe(texts, Graph(1, height, width, rows, columns), "drone.onnx")


ONE = {"names": "{0: 'drone'}", "stride": "32"}
TWO = {"names": "{0: 'drone', 1: 'bird'}", "stride": "32"}


@pytest.mark.parametrize("names", [ONE, TWO])
def test_a_model_that_chooses_its_boxes_itself_is_known_by_what_it_says(names):
    """1 x 300 x 6, as YOLOv10 and YOLO26 give it: of one class it looks like raw rows."""
    found = described(300, **names, end2end="True")
    assert found.nms == NMSConfig(0.0, 1.0, 300, agnostic=False)
    assert described(300, height=None, width=None, **names, end2end="True").dynamic
    with pytest.raises(UserError, match=r"chooses boxes itself .* has 38 columns"):
        described(300, columns=38, **names, end2end="True")


@pytest.mark.parametrize(
    ("rows", "size", "texts"),
    [(300, 160, {}), (300, 160, ONE), (300, None, ONE), (300, 640, {**ONE, "end2end": "False"}), (1575, 160, TWO)],
)
def test_boxes_chosen_by_rules_that_are_not_told_are_refused(rows, size, texts):
    with pytest.raises(UserError, match=rf"drone\.onnx: its first output is {rows} x 6 .* export it without NMS"):
        described(rows, height=size, width=size, **texts)


@pytest.mark.parametrize(
    ("rows", "height", "width"),
    [(25200, 640, 640), (1575, 160, 160), (2520, 640, 64), (102000, 1280, 1280), (2535, 416, 416), (None, None, None)],
)
def test_raw_rows_of_one_class_are_taken(rows, height, width):
    """YOLOv5 at three sizes, its four levels at 1280 px, YOLOv3-tiny's two at 416, and rows that depend on the size."""
    assert described(rows, height=height, width=width, **ONE).nms is None


def test_boxes_that_a_model_chose_itself_are_found(tmp_path):
    """Every picture has two of them; what fills the list up is next to noise, not nothing."""

    class Chosen(nn.Module):
        def forward(self, images):
            boxes = torch.full((300, 6), 0.01)
            boxes[:2] = torch.tensor([[10.0, 10, 30, 40, 0.9, 0], [20, 10, 50, 60, 0.8, 0]])
            return boxes[None] + 0 * images.mean((1, 2, 3)).view(-1, 1, 1), images * 2, images * 3

    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = write_onnx(tmp_path / "drone.onnx", Chosen())
    model = onnx.load(path)
    for key, value in {**ONE, "end2end": "True"}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, path)
    found = Predictor(load_backend(path, "cpu"), None, 64).detect(np.zeros((64, 64, 3), np.uint8)).rounded().rows
    np.testing.assert_allclose(found, [[10, 10, 30, 40, 0.9, 0], [20, 10, 50, 60, 0.8, 0]], rtol=1e-6)


def test_raw_maps_are_told(exported):
    with pytest.raises(UserError, match="--train"):
        load_backend(exported("onnx", train=True), "cpu")


def test_openvino_folder_of_yolov5_has_its_names_beside(tmp_path):
    openvino = pytest.importorskip("openvino")
    folder = tmp_path / "v6_openvino_model"
    folder.mkdir()
    model = openvino.Core().read_model(write_onnx(tmp_path / "v6.onnx", Raw()))
    openvino.save_model(model, folder / "v6.xml", compress_to_fp16=False)
    write_yaml(folder / "v6.yaml", {"stride": 32, "names": ["a", "b"]})
    backend = load_backend(folder, "cpu")
    assert (backend.names, backend.stride, backend.metadata.shape_hw) == ({0: "a", 1: "b"}, 32, (64, 64))
    found = backend.predict(np.full((2, 3, 64, 64), 51, np.uint8))
    np.testing.assert_allclose(found, np.full((2, 40, 7), 0.2), rtol=1e-5)
    write_yaml(folder / "v6.yaml", {"stride": 32, "names": ["a", "b", "c"]})
    with pytest.raises(UserError, match="names 3 classes, but its rows tell 2"):
        load_backend(folder, "cpu")


def test_ncnn_folder_of_another_exporter(exported, tmp_path, images, rows):
    folder = tmp_path / "v5_ncnn_model"
    shutil.copytree(exported("ncnn"), folder)
    write_yaml(folder / "metadata.yaml", {"stride": 32, "imgsz": [64, 96], "names": {0: "a", 1: "b", 2: "c"}})
    backend = load_backend(folder, "cpu")
    np.testing.assert_allclose(backend.predict(images), rows, atol=0.02)
    (folder / "metadata.yaml").write_text("stride: 32\n")
    with pytest.raises(UserError, match="says neither stride nor names"):
        load_backend(folder, "cpu")


def test_torchscript_of_yolov5_with_its_config(tmp_path):
    path = tmp_path / "v6.torchscript"
    config = {"shape": [1, 3, 64, 64], "stride": 32, "names": ["a", "b"]}
    traced = torch.jit.trace(Raw(), torch.zeros(1, 3, 64, 64))
    torch.jit.save(traced, str(path), _extra_files={"config.txt": json.dumps(config)})
    backend = load_backend(path, "cpu")
    found = backend.predict(np.full((3, 3, 64, 64), 51, np.uint8))
    torch.testing.assert_close(found, torch.full((3, 40, 7), 0.2))
    assert (backend.names, backend.stride, backend.metadata.shape_hw) == ({0: "a", 1: "b"}, 32, (64, 64))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_int8_tensors_are_scaled_by_what_the_file_says(kind):
    zero_point = 3 if kind == np.uint8 else -120
    details = {"dtype": kind, "quantization": (0.5, zero_point)}
    quantised = _quantised(np.array([0, 0.2, 0.6, 1.0, 1e6], np.float32), details)
    assert quantised.dtype == kind
    limit = np.iinfo(kind).max
    assert quantised.tolist() == [zero_point, zero_point, zero_point + 1, zero_point + 2, limit]
    np.testing.assert_array_equal(_floats(quantised[:4], details), np.array([0, 0, 0.5, 1], np.float32))


def core_ml_description(height, width, output_shape):
    """What coremltools says of a model with a picture as input."""
    picture = SimpleNamespace(imageType=SimpleNamespace(height=height, width=width), WhichOneof=lambda _: "imageType")
    array = SimpleNamespace(multiArrayType=SimpleNamespace(shape=output_shape))
    ends = {"input": SimpleNamespace(name="image", type=picture), "output": SimpleNamespace(name="output", type=array)}
    return SimpleNamespace(description=SimpleNamespace(**{name: [end] for name, end in ends.items()}))


def test_core_ml_model_gets_images_and_gives_rows(images, rows, tmp_path, monkeypatch):
    class Model:
        def __init__(self, path, compute_units):
            assert path.endswith("best.mlmodel")

        user_defined_metadata = {"stride": "32", "names": "{0: 'a', 1: 'b', 2: 'c'}"}

        def get_spec(self):
            return core_ml_description(64, 96, rows[:1].shape)

        def predict(self, inputs):
            picture = np.asarray(inputs["image"]).transpose(2, 0, 1)
            number = next(index for index, own in enumerate(images) if (own == picture).all())
            return {"output": rows[number : number + 1]}

    units = SimpleNamespace(ALL=0)
    coremltools = SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=units, __version__="9")
    monkeypatch.setitem(sys.modules, "coremltools", coremltools)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    (tmp_path / "best.mlmodel").touch()
    backend = load_backend(tmp_path / "best.mlmodel")
    np.testing.assert_array_equal(backend.predict(images), rows)
    assert backend.names[2] == "c"


@pytest.fixture(scope="module")
def tensorflow():
    before_tensorflow()
    return pytest.importorskip("tensorflow")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saved_model", "pb"])
def test_tensorflow_models_give_boxes_as_fractions_and_say_nothing(tensorflow, tmp_path, kind):
    """The mean of an image, as YOLOv5's SavedModel and frozen graph would give it."""
    variable = tensorflow.Variable(np.ones((1, 40, 7), np.float32))
    signature = [tensorflow.TensorSpec((1, 64, 64, 3), tensorflow.float32, name="x")]
    function = tensorflow.function(lambda x: tensorflow.reduce_mean(x) * variable, input_signature=signature)
    path = tmp_path / ("v6_saved_model" if kind == "saved_model" else "v6.pb")
    if kind == "saved_model":
        module = tensorflow.Module()
        module.function, module.variable = function, variable
        tensorflow.saved_model.save(module, str(path), signatures=function.get_concrete_function())
    else:
        from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

        frozen = convert_variables_to_constants_v2(function.get_concrete_function())
        path.write_bytes(frozen.graph.as_graph_def().SerializeToString())
    backend = load_backend(path, "cpu")
    found = backend.predict(np.full((2, 3, 64, 64), 51, np.uint8))
    np.testing.assert_allclose(found, np.tile([12.8] * 4 + [0.2] * 3, (2, 40, 1)), rtol=1e-5)
    assert (backend.names, backend.metadata.shape_hw) == ({0: "class0", 1: "class1"}, (64, 64))
