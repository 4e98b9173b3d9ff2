"""Every runtime that runs here: the checkpoint's rows, its names and stride, any number of images, its own refusals."""

import importlib

import numpy as np
import pytest
import torch

from models.backends import load_backend, open_model
from models.load import load_model
from utils.errors import UserError

slow = pytest.mark.slow
FIXED = ["torchscript", "onnx", "openvino", "ncnn", pytest.param("tflite", marks=slow)]
DYNAMIC = ["torchscript", "onnx", "openvino"]
MODULES = {
    "torchscript": "torchscript",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "ncnn": "ncnn",
    "tflite": "tflite",
}


def close(found, expected, box_px=0.02, score=2e-4):
    found = np.asarray(found)
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found[..., :4], expected[..., :4], atol=box_px, rtol=1e-4)
    np.testing.assert_allclose(found[..., 4:], expected[..., 4:], atol=score)


@pytest.mark.parametrize("form", FIXED)
def test_rows_are_the_checkpoints_for_one_image_and_for_three(exported, images, rows, form):
    backend = load_backend(exported(form), "cpu")
    assert type(backend).__module__ == f"models.backends.{MODULES[form]}"
    tolerance = {"box_px": 0.5, "score": 5e-3} if form == "tflite" else {}  # its weights are float16
    for count in (1, 3):
        close(backend.predict(images[:count]), rows[:count], **tolerance)


@pytest.mark.parametrize("form", FIXED)
def test_rows_of_an_anchor_free_head_are_the_checkpoints(exported, anchor_free_weights, images, form):
    with torch.no_grad():
        expected = load_model(anchor_free_weights)(torch.from_numpy(images).float() / 255)[0].numpy()
    tolerance = {"box_px": 0.5, "score": 5e-3} if form == "tflite" else {}  # its weights are float16
    close(load_backend(exported(form, anchor_free_weights), "cpu").predict(images), expected, **tolerance)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"dynamic": True}, {"half": True}], ids=str)
@pytest.mark.parametrize("head", ["anchors", "bins"])
def test_maps_that_are_decoded_on_the_host_give_the_checkpoints_rows(exported, small_weights, images, head, options):
    checkpoint = small_weights[head]
    path = exported("onnx", checkpoint, raw=True, **options)
    backend = load_backend(path, "cpu")
    assert path.name == "best-raw.onnx" and backend.metadata.raw is not None and not backend.has_nms
    with torch.no_grad():
        expected = load_model(checkpoint)(torch.from_numpy(images).float() / 255)[0].numpy()
    tolerance = {"box_px": 1, "score": 0.02} if options.get("half") else {}
    for count in (1, 3):
        close(backend.predict(images[:count]), expected[:count], **tolerance)
    if not options:
        close(load_backend(path, "cpu", dnn=True).predict(images), expected)


@slow
def test_tflite_maps_have_channels_last(exported, anchor_free_weights, images):
    backend = load_backend(exported("tflite", anchor_free_weights, raw=True), "cpu")
    with torch.no_grad():
        expected = load_model(anchor_free_weights)(torch.from_numpy(images).float() / 255)[0].numpy()
    close(backend.predict(images), expected, box_px=0.5, score=5e-3)


def test_maps_that_do_not_fit_the_metadata_are_named(exported, small_weights, images, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported("onnx", small_weights["anchors"], raw=True))
    texts = {entry.key: entry for entry in model.metadata_props}
    texts["metadata"].value = texts["metadata"].value.replace('"nc": 3', '"nc": 4')
    onnx.save(model, tmp_path / "best.onnx")
    with pytest.raises(UserError, match=r"best.onnx: names 3 classes, but its rows tell 4: export it again"):
        load_backend(tmp_path / "best.onnx", "cpu")
    texts["metadata"].value = texts["metadata"].value.replace('"2": "fly"', '"2": "fly", "3": "owl"')
    onnx.save(model, tmp_path / "best.onnx")
    with pytest.raises(UserError, match=r"outputs do not fit its metadata \(no map is 27x8x12 .*: export it again"):
        load_backend(tmp_path / "best.onnx", "cpu").predict(images)


@pytest.mark.parametrize("form", FIXED)
def test_files_say_what_they_are(exported, form):
    backend = load_backend(exported(form), "cpu")
    assert (backend.names, backend.stride) == ({0: "ant", 1: "bee", 2: "fly"}, 32)
    assert (backend.dynamic, backend.has_nms, backend.metadata.shape_hw) == (False, False, (64, 96))
    assert backend.metadata.data == "ants.yaml"
    assert backend.device


@pytest.mark.parametrize("form", [*FIXED, "checkpoint"])
def test_what_a_file_says_is_known_before_its_runtime_is_started(exported, weights, monkeypatch, form):
    """Loader processes are forked in between: runtimes leave threads behind that they might hang on."""
    path = weights if form == "checkpoint" else exported(form)
    runtime = importlib.import_module(f"models.backends.{MODULES.get(form, 'pytorch')}")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_build" if form == "checkpoint" else "load", lambda *_: pytest.fail("it was loaded"))
        opened = open_model(path, "cpu")
    said, backend = opened.metadata, load_backend(path, "cpu")
    assert (said.names, said.stride, said.nms, said.data) == (backend.names, 32, None, "ants.yaml")
    assert (said.dynamic, said.shape_hw) == (backend.dynamic, backend.metadata.shape_hw)
    assert opened.trained_px == (96 if form == "checkpoint" else None)


@pytest.mark.parametrize("form", FIXED)
def test_a_fixed_file_refuses_other_sizes_the_layers_of_any_and_views(exported, images, form):
    backend = load_backend(exported(form), "cpu")
    with pytest.raises(UserError, match=r"exported for images of 64x96 px .*not 64x64: use --imgsz 64 96"):
        backend.predict(images[:, :, :, :64])
    with pytest.raises(UserError, match=r"--visualize shows the layers of a checkpoint"):
        backend.infer(backend.preprocess(images), lambda *_: None)
    with pytest.raises(UserError, match=r"--augment is for checkpoints \(\.pt\), not for exported models"):
        backend.infer(backend.preprocess(images), augment=True)


@pytest.mark.parametrize("form", DYNAMIC)
def test_a_dynamic_file_takes_any_size_and_number(exported, weights, images, form):
    backend = load_backend(exported(form, dynamic=True), "cpu")
    assert backend.dynamic
    model = load_model(weights)
    for chosen in (images, images[:1, :, :, :64], np.tile(images, (1, 1, 2, 1))[:2]):
        with torch.no_grad():
            expected = model(torch.from_numpy(np.ascontiguousarray(chosen)).float() / 255)[0].numpy()
        close(backend.predict(chosen), expected)


@pytest.mark.parametrize("form", ["torchscript", "onnx", "openvino"])
def test_a_file_for_two_images_takes_three_and_one(exported, images, rows, form):
    backend = load_backend(exported(form, batch_size=2), "cpu")
    assert backend.batch == 2
    close(backend.predict(images), rows)
    close(backend.predict(images[:1]), rows[:1])


@pytest.mark.parametrize("form", FIXED)
def test_what_predict_returned_stays_as_it_is(exported, images, form):
    backend = load_backend(exported(form), "cpu")
    first = backend.predict(images[:1])
    kept = np.asarray(first).copy()
    backend.predict(images[1:2])
    np.testing.assert_array_equal(np.asarray(first), kept)


@pytest.mark.parametrize("form", FIXED)
def test_other_devices_are_refused_by_name(exported, form):
    with pytest.raises(UserError, match=r"--device '?7'?: "):
        load_backend(exported(form), "7")


@pytest.mark.parametrize("form", FIXED)
def test_a_damaged_file_is_named(exported, form, tmp_path):
    path = exported(form)
    if path.is_dir():
        copy = tmp_path / path.name
        copy.mkdir()
        for part in path.iterdir():
            content = part.read_bytes()
            (copy / part.name).write_bytes(
                content[: len(content) // 3] if part.suffix in (".xml", ".param") else content
            )
    else:
        copy = tmp_path / path.name
        copy.write_bytes(b"no model at all, whatever its name says" * 10)
    with pytest.raises(UserError, match=str(copy)):
        load_backend(copy, "cpu")


def test_opencv_runs_onnx_files(exported, images, rows):
    for path in (exported("onnx"), exported("onnx", batch_size=2)):
        backend = load_backend(path, "cpu", dnn=True)
        assert type(backend).__module__ == "models.backends.opencv"
        close(backend.predict(images), rows)
        assert backend.names[2] == "fly"


def test_dnn_is_for_onnx_files(exported):
    with pytest.raises(UserError, match=r"--dnn runs ONNX files in OpenCV, and .*\.torchscript is none"):
        load_backend(exported("torchscript"), "cpu", dnn=True)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_suppression_inside_gives_what_it_gives_outside(exported, images, rows, form):
    from utils.nms import non_max_suppression

    backend = load_backend(exported(form, nms=True), "cpu")
    assert backend.has_nms and backend.metadata.nms.conf_thres == 0.25
    found = backend.predict(images)
    limits = backend.metadata.nms
    expected = non_max_suppression(rows, limits.conf_thres, limits.iou_thres, max_det=limits.max_det)
    for detections, wanted in zip(found, expected, strict=True):
        assert detections.shape == (limits.max_det, 6) and 0 < len(wanted) <= limits.max_det
        kept = detections[detections[:, 4] > 0]
        np.testing.assert_allclose(kept, wanted, atol=0.02)


def test_half_is_bfloat16_where_openvino_has_it_and_said_where_it_is_not(exported, images, rows, caplog):
    openvino = pytest.importorskip("openvino")
    backend = load_backend(exported("openvino"), "cpu", half=True)
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if {"BF16", "FP16"} & set(able):
        assert "f16" in backend.device
        close(backend.predict(images), rows, box_px=4, score=0.05)
    else:
        assert "this CPU computes in float32 only" in caplog.text
        close(backend.predict(images), rows)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_half_on_a_float32_file_is_said(exported, form, caplog):
    load_backend(exported(form), "cpu", half=True)
    assert "computes in the precision of the file" in caplog.text


def test_a_float16_onnx_file_takes_and_gives_what_others_do(exported, images, rows):
    backend = load_backend(exported("onnx", half=True), "cpu")
    assert backend.metadata.precision == "float16"
    close(backend.predict(images), rows, box_px=1, score=0.02)
