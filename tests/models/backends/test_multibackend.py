"""`DetectMultiBackend` and `attempt_load`: exports and checkpoints through one call agree, under YOLOv5's names."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import models.common
import models.experimental
from models.backends.base import ArrayBackend
from models.backends.pytorch import describe_model
from models.inference.autoshape import AutoShape
from models.inference.multibackend import DetectMultiBackend, ModelType, attempt_load
from models.load import load_model
from models.yolo import Model
from utils.errors import UserError

FORMATS = {"onnx": "onnx", "torchscript": "jit", "openvino": "xml"}


@pytest.fixture(scope="module")
def tensor(images):
    """The images as the model sees them: (3, 3, 64, 96), values 0 to 1."""
    return torch.from_numpy(images).float() / 255


@pytest.fixture(scope="module")
def checkpoint(weights):
    return DetectMultiBackend(weights, device="cpu")


@pytest.mark.parametrize(("form", "flag"), FORMATS.items())
def test_exports_agree_with_the_checkpoint(exported, checkpoint, tensor, rows, form, flag):
    model = DetectMultiBackend(exported(form), device="cpu")
    assert [name for name in ModelType._fields if getattr(model, name)] == [flag]
    assert (model.names, model.nc, model.stride) == (checkpoint.names, 3, 32)
    assert model.fixed_hw == (64, 96) and checkpoint.fixed_hw is None
    found, logits = model(tensor, val=True)
    assert logits == [] and found.dtype == torch.float32
    assert np.abs(found.numpy() - rows).max() < 2e-3
    assert np.abs(checkpoint(tensor).numpy() - rows).max() < 2e-3


class ChannelsLast(ArrayBackend):
    """Called as TensorFlow's models are: (b, h, w, 3) in, boxes as fractions out; keeps what it was given."""

    channels_last, batch, dynamic = True, None, True

    def __init__(self, model, kind):
        """Runs `model`, a torch module, on inputs of the type `kind`: pictures where that is uint8."""
        self.model, self.kind, self.seen = model, kind, None
        self.metadata = replace(describe_model(model), boxes_normalised=True)

    def preprocess(self, images):
        inputs = super().preprocess(images)
        return np.rint(inputs * 255).astype(np.uint8) if self.kind is np.uint8 else inputs

    def run(self, inputs):
        self.seen = inputs
        values = inputs / np.float32(255) if self.kind is np.uint8 else inputs
        with torch.no_grad():
            found = self.model(torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2))))[0].numpy()
        height, width = inputs.shape[1:3]
        found[..., :4] /= (width, height, width, height)
        return found


@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_a_runtime_gets_its_own_layout_and_type(checkpoint, tensor, rows, tmp_path, monkeypatch, kind):
    """Values between the steps of 8 bits are kept where the runtime takes them."""
    backend = ChannelsLast(checkpoint.model, kind)
    monkeypatch.setattr("models.inference.multibackend.load_backend", lambda *_: backend)
    (tmp_path / "some_saved_model").mkdir()
    model = DetectMultiBackend(tmp_path / "some_saved_model")
    assert model.saved_model and np.abs(model(tensor).numpy() - rows).max() < 2e-3
    between = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0))
    model(between)
    wanted = between.permute(0, 2, 3, 1).numpy()
    assert backend.seen.dtype == kind
    assert np.array_equal(backend.seen, wanted if kind is np.float32 else np.rint(wanted * 255))
    model(between.to(torch.float64))
    assert backend.seen.dtype == kind


def test_autoshape_detects_alike_with_an_export(exported, checkpoint, images):
    """A fixed export sees its own shape; the checkpoint is told the same."""
    pictures = [image.transpose(1, 2, 0) for image in images] + [images[0].transpose(1, 2, 0)[:40]]
    ours = AutoShape(checkpoint)(pictures, size=(64, 96))
    export = AutoShape(DetectMultiBackend(exported("onnx"), device="cpu"))
    theirs = export(pictures)
    assert theirs.s == ours.s == (4, 3, 64, 96)
    for found, wanted in zip(theirs.xyxy, ours.xyxy, strict=True):
        assert len(wanted) and torch.allclose(found, wanted, atol=1e-2)
    assert AutoShape.forward(export, pictures[0], size=[64, 96]).s == (1, 3, 64, 96)
    for size in (640, (96, 64)):
        with pytest.raises(UserError, match=r"exported for \(64, 96\)"):
            export(pictures, size=size)
    for option in ("augment", "profile"):
        with pytest.raises(UserError, match="checkpoint"):
            export(pictures[0], **{option: True})


def test_a_dynamic_export_sees_the_same_rectangles(exported, checkpoint, images):
    export = AutoShape(DetectMultiBackend(exported("onnx", dynamic=True), device="cpu"))
    picture = images[0].transpose(1, 2, 0)[:50]
    ours, theirs = AutoShape(checkpoint)(picture, size=128), export(picture, size=128)
    assert ours.s == theirs.s == (1, 3, 96, 128)
    assert len(ours.xyxy[0]) == len(theirs.xyxy[0]) > 0
    gaps = (ours.xyxy[0][:, None] - theirs.xyxy[0][None]).abs().amax(dim=2)
    assert gaps.amin(dim=1).max() < 0.01, "in whatever order equal ones come"


def test_an_export_that_chooses_inside_is_narrowed_down(exported, checkpoint, images):
    pictures = [image.transpose(1, 2, 0) for image in images]
    export = AutoShape(DetectMultiBackend(exported("onnx", nms=True), device="cpu"))
    plain = AutoShape(checkpoint)(pictures, size=(64, 96))
    inside = export(pictures)
    assert all(len(found) for found in inside.xyxy)
    for found, wanted in zip(inside.xyxy, plain.xyxy, strict=True):
        assert torch.allclose(found[:3], wanted[:3], atol=1e-2)
    export.classes, export.max_det = [1], 2
    for rows in export(pictures).xyxy:
        assert len(rows) <= 2 and set(rows[:, 5].tolist()) <= {1.0}


def test_files_without_names_take_those_of_a_data_set(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(exported("onnx")))
    del graph.metadata_props[:]
    onnx.save(graph, str(tmp_path / "plain.onnx"))
    (tmp_path / "bees.yaml").write_text("names: [worker, drone, queen]\n")
    assert DetectMultiBackend(tmp_path / "plain.onnx", "cpu").names == {0: "class0", 1: "class1", 2: "class2"}
    named = DetectMultiBackend(tmp_path / "plain.onnx", "cpu", data=tmp_path / "bees.yaml")
    assert named.names == {0: "worker", 1: "drone", 2: "queen"}
    own = DetectMultiBackend(exported("onnx"), "cpu", data=tmp_path / "bees.yaml")
    assert own.names == {0: "ant", 1: "bee", 2: "fly"}, "a file that knows its classes is right"
    (tmp_path / "bees.yaml").write_text("names: [worker]\n")
    with pytest.raises(UserError, match="names 1 classes, but the model has 3"):
        DetectMultiBackend(tmp_path / "plain.onnx", "cpu", data=tmp_path / "bees.yaml")


def test_a_checkpoint_is_a_torch_module(weights, tensor, rows):
    model = DetectMultiBackend(weights, device=torch.device("cpu"))
    assert isinstance(model.model, Model) and model.device.type == "cpu" and not model.fp16
    model.model.half()
    assert model.fp16
    found, logits = model(tensor, val=True)
    assert found.dtype == torch.float32 and [maps.shape[1:] for maps in logits] == [
        (3, 8, 12, 8),
        (3, 4, 6, 8),
        (3, 2, 3, 8),
    ]
    assert 0 < np.abs(found.numpy() - rows).max() < 1
    model.warmup(imgsz=(1, 3, 64, 64), half=True)


def test_unfused_models_can_be_trained(weights):
    model = DetectMultiBackend(weights, "cpu", fuse=False)
    assert any(".bn." in name for name in model.state_dict())
    assert not any(".bn." in name for name in DetectMultiBackend(weights, "cpu").state_dict())


def test_visualize_writes_an_image_of_every_layer(checkpoint, tensor, rows, tmp_path):
    found = checkpoint(tensor[:1], visualize=tmp_path / "maps")
    assert np.abs(found.numpy() - rows[:1]).max() < 2e-3
    written = sorted((tmp_path / "maps").glob("*.png"))
    assert len(written) == len(checkpoint.model.model) - 1, "all but the head"
    assert (tmp_path / "maps" / "stage0_Conv_features.png") in written
    assert cv2.imread(str(written[0])).std() > 0


def test_several_checkpoints_make_an_ensemble(weights, tensor, rows, caplog, tmp_path):
    other = Path(shutil.copy(weights, tmp_path / "other.pt"))
    with caplog.at_level("INFO", "yolov5"):
        model = DetectMultiBackend([weights, other], device="cpu")
    assert f"Ensemble created with ['{weights}', '{other}']" in caplog.text
    found = model(tensor)
    assert found.shape == (3, 2 * 378, 8) and np.abs(found.numpy() - np.concatenate([rows, rows], 1)).max() < 2e-3
    single = DetectMultiBackend(weights, device="cpu")
    single = DetectMultiBackend(weights, device="cpu")(tensor, augment=True)
    assert torch.allclose(model(tensor, augment=True), torch.cat([single, single], dim=1), atol=1e-3)
    with pytest.raises(UserError, match="one checkpoint"):
        model(tensor, visualize=tmp_path)


def test_what_does_not_go_together_is_refused(exported, weights, golden_dir, tmp_path):
    export = DetectMultiBackend(exported("onnx"), device="cpu")
    with pytest.raises(UserError, match="hides its own"):
        export(torch.zeros(1, 3, 64, 96), visualize=tmp_path)
    with pytest.raises(UserError, match="64x96"):
        export(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="OpenCV"):
        DetectMultiBackend(weights, device="cpu", dnn=True)
    with pytest.raises(UserError, match="no such file"):
        DetectMultiBackend(tmp_path / "lost.pt")
    with pytest.raises(UserError, match="different classes"):
        attempt_load([weights, golden_dir / "yolov5n-v6-coco.pt"])
    with pytest.raises(UserError, match="is not a checkpoint"):
        DetectMultiBackend([weights, exported("onnx")])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/exp.onnx/best.pt", "pt"),
        ("best.torchscript", "jit"),
        ("yolov5s.onnx", "onnx"),
        ("yolov5s_openvino_model", "xml"),
        ("yolov5s.xml", "xml"),
        ("yolov5s.engine", "engine"),
        ("yolov5s.mlmodel", "coreml"),
        ("yolov5s_saved_model/", "saved_model"),
        ("yolov5s.pb", "pb"),
        ("yolov5s-fp16.tflite", "tflite"),
        ("yolov5s-int8_edgetpu.tflite", "edgetpu"),
        ("yolov5s_web_model", "tfjs"),
        ("best.pt.txt", None),
    ],
)
def test_formats_are_told_by_the_names_end(name, expected):
    kind = DetectMultiBackend.model_type(name)
    assert len(kind) == 11 and [field for field, fits in kind._asdict().items() if fits] == [expected] * bool(expected)


def test_attempt_load_gives_the_trained_model(weights, tensor, rows):
    model = attempt_load(weights, map_location="cpu", inplace=False)
    assert isinstance(model, Model) and not model.training and not model.head.inplace
    assert not any(module.inplace for module in model.modules() if isinstance(module, torch.nn.SiLU))
    assert np.abs(model(tensor)[0].numpy() - rows).max() < 2e-3
    unfused = attempt_load(str(weights), device=torch.device("cpu"), fuse=False)
    assert unfused.state_dict().keys() == load_model(weights).state_dict().keys()


def test_the_names_are_found_where_other_programs_look():
    assert models.common.DetectMultiBackend is DetectMultiBackend
    assert models.common.AutoShape is AutoShape and models.common.Detections.__name__ == "Detections"
    assert models.experimental.attempt_load is attempt_load
    for module in (models.common, models.experimental):
        with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
            module.Nonsense  # noqa: B018
