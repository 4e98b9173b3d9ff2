"""TensorFlow Lite files: the checkpoint's numbers out of them, float16 and int8 where they belong, and the Edge TPU."""

import json
import os
import shutil
import stat
import zipfile

import numpy as np
import pytest
import torch

import export
from models.backends import load_backend
from models.backends.metadata import Metadata
from models.export.formats import ExportConfig
from models.export.job import ExportJob
from models.export.run import make_jobs
from models.load import load_model
from utils.cli import options_from
from utils.errors import UserError

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_quantizer")
litert = pytest.importorskip("ai_edge_litert.interpreter")

from models.export import tflite  # noqa: E402

pytestmark = pytest.mark.slow
HEIGHT, WIDTH = 64, 96
ROWS = 3 * (8 * 12 + 4 * 6 + 2 * 3)
SCALE = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)


def job_of(weights, name="tflite", **options) -> ExportJob:
    given = {"weights": [str(weights)], "imgsz": [HEIGHT, WIDTH], "include": [name], **options}
    config = ExportConfig(**vars(options_from(export.build_parser(), given))).checked()
    return make_jobs(weights, config, torch.device("cpu"))[0]


def interpreter(**source):
    model = litert.Interpreter(num_threads=1, **source)
    model.allocate_tensors()
    return model


def run(model, images):
    """Runs an interpreter on images (b, 3, h, w); returns its output, dequantised."""
    entry, leaving = model.get_input_details()[0], model.get_output_details()[0]
    values = images.permute(0, 2, 3, 1).numpy()
    if entry["dtype"] != np.float32:
        scale, zero = entry["quantization"]
        values = np.clip(np.rint(values / scale + zero), -128, 127).astype(entry["dtype"])
    model.set_tensor(entry["index"], values)
    model.invoke()
    output = model.get_tensor(leaving["index"])
    if leaving["dtype"] == np.float32:
        return output.copy()
    scale, zero = leaving["quantization"]
    return (output.astype(np.float32) - zero) * scale


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def rows_of(weights, images):
    with torch.no_grad():
        rows = load_model(weights)(images)[0].numpy()
    rows[..., :4] /= SCALE
    return rows


def types(model, kind):
    """Returns what the data inputs and outputs of all operations of a kind hold."""
    tensors = {entry["index"]: entry["dtype"] for entry in model.get_tensor_details()}
    operations = [entry for entry in model._get_ops_details() if entry["op_name"] == kind]
    return [(tensors[entry["inputs"][0]], tensors[entry["outputs"][0]]) for entry in operations]


def unfused(content):
    """An interpreter that shows its operations as they are in the file."""
    return interpreter(
        model_content=content, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )


@pytest.fixture(scope="module")
def weights(write_checkpoint):
    return write_checkpoint()


@pytest.fixture(scope="module")
def full(weights):
    return tflite.convert(job_of(weights))


@pytest.fixture(scope="module")
def half_file(weights, full):
    """What `export.py --include tflite` writes; one conversion serves all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tflite, "convert", lambda job: full)
        options = export.build_parser().parse_args(
            ["--weights", str(weights), "--include", "tflite", "--img", "64", "96"]
        )
        report = export.main(options)  # fails where the file does not agree with the checkpoint
    return str(report.paths[0])


@pytest.fixture(scope="module")
def calibration():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (1, 3, HEIGHT, WIDTH), np.uint8) for _ in range(6)]


def test_names_and_shapes(half_file, weights):
    assert half_file == str(weights.with_name("best-fp16.tflite"))
    model = interpreter(model_path=half_file)
    assert model.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["output"]}}
    entry, leaving = model.get_input_details()[0], model.get_output_details()[0]
    assert (entry["shape"].tolist(), entry["dtype"]) == ([1, HEIGHT, WIDTH, 3], np.float32)
    assert (leaving["shape"].tolist(), leaving["dtype"]) == ([1, ROWS, 8], np.float32)


def test_float32_rows_are_the_checkpoints_with_boxes_as_fractions(weights, full):
    images = random_images(1, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(run(interpreter(model_content=full), images), rows_of(weights, images), atol=2e-5)


def test_float16_weights_halve_the_file_and_keep_the_rows(weights, full, half_file):
    content = open(half_file, "rb").read()
    assert len(content) < 0.55 * len(full)
    images = random_images(1, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(run(interpreter(model_path=half_file), images), rows_of(weights, images), atol=3e-3)
    assert np.float16 in {entry["dtype"] for entry in unfused(content).get_tensor_details()}


def test_what_the_file_says_stands_in_a_zip_at_its_end(half_file):
    with zipfile.ZipFile(half_file) as archive:
        assert archive.namelist() == ["metadata.json"]
        texts = json.loads(archive.read("metadata.json"))
    said = Metadata.from_texts(texts, half_file)
    assert (said.names, said.shape_hw, said.stride) == ({0: "ant", 1: "bee", 2: "fly"}, (HEIGHT, WIDTH), 32)
    assert said.boxes_normalised and said.precision == "float16" and said.nms is None
    assert set(said.versions) == {"torch", "litert_torch", "ai_edge_quantizer"}


def test_int8_quantises_the_trunk_and_leaves_head_and_decoder_in_float(weights, full, calibration, caplog):
    with caplog.at_level("INFO", "yolov5"):
        content = tflite.quantize(full, "images", calibration)
    model = unfused(content)
    convolutions = types(model, "CONV_2D") + types(model, "DEPTHWISE_CONV_2D")
    total = sum(isinstance(module, torch.nn.Conv2d) for module in job_of(weights).model.trunk.modules())
    assert len(convolutions) == total
    assert convolutions.count((np.int8, np.int8)) == total - 3
    assert convolutions.count((np.float32, np.float32)) == 3
    assert {model.get_input_details()[0]["dtype"], model.get_output_details()[0]["dtype"]} == {np.float32}
    assert f"{total - 3} convolutions and " in caplog.text and "calibrated on 6 images" in caplog.text
    assert len(content) < 0.4 * len(full)
    images = torch.from_numpy(calibration[0]).float() / 255
    difference = np.abs(run(interpreter(model_content=content), images) - rows_of(weights, images))
    assert difference[..., 4:].max() < 0.05 and difference[..., :4].max() < 0.08


def test_int8_ranges_come_from_the_images_it_is_calibrated_on(full, calibration):
    dark = [images // 8 for images in calibration]
    contents = [tflite.quantize(full, "images", images) for images in (calibration, dark)]
    scales = []
    for content in contents:
        model = unfused(content)
        quantised = [entry for entry in model._get_ops_details() if entry["op_name"] == "QUANTIZE"]
        details = {entry["index"]: entry for entry in model.get_tensor_details()}
        scales.append(details[quantised[0]["outputs"][0]]["quantization"][0])
    assert scales[0] == pytest.approx(1 / 255, rel=0.02) and scales[1] == pytest.approx(31 / 255 / 255, rel=0.05)


def test_export_writes_int8_beside_the_checkpoint(weights, full, calibration, tiny_shapes, monkeypatch):
    monkeypatch.setattr(tflite, "convert", lambda job: full)
    path = tflite.export(job_of(weights, int8=True, data=str(tiny_shapes)))
    assert path == weights.with_name("best-int8.tflite")
    texts = json.loads(zipfile.ZipFile(path).read("metadata.json"))
    assert Metadata.from_texts(texts, str(path)).precision == "int8"
    run(interpreter(model_path=str(path)), random_images(1, 3, HEIGHT, WIDTH))
    assert not [entry.name for entry in weights.parent.iterdir() if entry.name.endswith(".tmp")]


def test_nms_inside_gives_what_the_same_head_gives_in_torch(write_checkpoint):
    job = job_of(write_checkpoint("yolov5n.yaml"), nms=True, topk_all=9, conf_thres=1e-6)
    images = random_images(1, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        for level in range(3):  # an untrained model's scores are all but equal: spread them, or rounding decides
            job.model.trunk.get_submodule(f"model.24.m.{level}").weight.mul_(20)
        expected = job.with_head(job.head(normalised=True))(images).numpy()
    found = run(interpreter(model_content=tflite.convert(job)), images)
    assert found.shape == (1, 9, 6) and (expected[0, :, 4] > 0).all()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in for edgetpu_compiler: notes its arguments, and copies its input as it names its output."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program, notes = folder / "edgetpu_compiler", tmp_path / "notes"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > "{notes}"\n'
        'while [ $# -gt 1 ]; do [ "$1" = --out_dir ] && out=$2; shift; done\n'
        '[ -z "$BROKEN" ] || { echo "Internal compiler error"; exit 1; }\n'
        'cp "$1" "$out/$(basename "$1" .tflite)_edgetpu.tflite"\necho "Number of operations that will run on CPU: 0"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return notes


@pytest.mark.skipif(
    os.name == "nt", reason="the compiler's stand-in is a shell script; the compiler runs on Linux only"
)
def test_for_the_edge_tpu_everything_is_int8(weights, full, calibration, compiler, tiny_shapes, monkeypatch, caplog):
    monkeypatch.setattr(tflite, "convert", lambda job: full)
    job = job_of(weights, "edgetpu", int8=True, data=str(tiny_shapes))
    with caplog.at_level("INFO", "yolov5"):
        path = tflite.export(job)
    assert path == weights.with_name("best-int8_edgetpu.tflite")
    assert "will run on CPU: 0" in caplog.text
    arguments = compiler.read_text().split("\n")
    assert arguments[:2] == ["--show_operations", "--out_dir"] and arguments[3] == "best-int8.tflite"
    model = unfused(path.read_bytes())
    held = {entry["dtype"] for entry in model.get_tensor_details()}
    assert np.float32 not in held and {np.int8} <= held
    images = random_images(1, 3, HEIGHT, WIDTH)
    assert np.abs(run(model, images) - rows_of(weights, images))[..., 4:].max() < 0.1
    assert zipfile.is_zipfile(path)


@pytest.mark.skipif(os.name == "nt", reason="the compiler's stand-in is a shell script")
def test_maps_for_the_edge_tpu_are_int8_and_decoded_on_the_host(weights, calibration, compiler, tiny_shapes, tmp_path):
    path = tflite.export(job_of(weights, "edgetpu", int8=True, raw=True, data=str(tiny_shapes)))
    assert path == weights.with_name("best-raw-int8_edgetpu.tflite")
    assert all(entry["dtype"] != np.float32 for entry in unfused(path.read_bytes()).get_tensor_details())
    backend = load_backend(shutil.copy(path, tmp_path / "on-the-cpu.tflite"), "cpu")
    assert backend.metadata.raw is not None
    images = np.concatenate(calibration[:2])
    found, expected = backend.predict(images), rows_of(weights, torch.from_numpy(images).float() / 255)
    assert np.abs(found - expected)[..., 4:].max() < 0.1
    assert np.abs(found[..., :4] / SCALE - expected[..., :4]).max() < 0.1


@pytest.mark.skipif(os.name == "nt", reason="the compiler's stand-in is a shell script")
def test_a_failing_compiler_shows_what_it_said(weights, full, compiler, tiny_shapes, monkeypatch):
    monkeypatch.setattr(tflite, "convert", lambda job: full)
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(UserError, match=r"(?s)edgetpu_compiler failed with status 1.*Internal compiler error"):
        tflite.export(job_of(weights, "edgetpu", int8=True, data=str(tiny_shapes)))
    assert not list(weights.parent.glob("*edgetpu*.tmp"))


def test_the_edge_tpu_is_refused_without_its_compiler_or_int8(weights, tiny_shapes, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs Google's edgetpu_compiler .* on the PATH: see https://coral.ai"):
        tflite.export(job_of(weights, "edgetpu", int8=True, data=str(tiny_shapes)))
    with pytest.raises(UserError, match="int8 only: add --int8"):
        tflite.export(job_of(weights, "edgetpu"))


def test_calibration_inputs_are_counted_and_read_more_than_once(calibration):
    inputs = tflite._Inputs("images", calibration, 4)
    first, second = list(inputs), list(inputs)
    assert len(inputs) == len(first) == len(second) == 2
    assert first[0]["images"].shape == (4, HEIGHT, WIDTH, 3) and first[0]["images"].dtype == np.float32
    np.testing.assert_array_equal(first[0]["images"][1], calibration[1][0].transpose(1, 2, 0).astype(np.float32) / 255)
    np.testing.assert_array_equal(first[1]["images"][2], first[0]["images"][0])  # filled up from the start
