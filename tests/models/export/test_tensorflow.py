"""SavedModel, GraphDef and TensorFlow.js: the checkpoint's numbers out of them, and how the converters are called."""

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import export
from models.backends.base import before_tensorflow
from models.backends.metadata import Metadata
from models.export import tensorflow as exporter
from models.export.formats import ExportConfig, missing_packages
from models.export.run import make_jobs
from models.load import load_model
from utils.cli import options_from
from utils.errors import UserError

if missing_packages(("onnx", "tensorflow")):  # not importorskip: TensorFlow must come after what its loader loads first
    pytest.skip("onnx and tensorflow are not installed", allow_module_level=True)
if os.name == "nt":
    pytest.skip("the converters' stand-ins are shell scripts", allow_module_level=True)

pytestmark = pytest.mark.slow
HEIGHT, WIDTH = 64, 96
ROWS = 3 * (8 * 12 + 4 * 6 + 2 * 3)


def job_of(weights, name):
    given = {"weights": [str(weights)], "imgsz": [HEIGHT, WIDTH], "include": [name]}
    config = ExportConfig(**vars(options_from(export.build_parser(), given))).checked()
    return make_jobs(weights, config, torch.device("cpu"))[0]


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def images_and_rows(weights):
    """Returns images (1, h, w, 3), and the checkpoint's rows with boxes as fractions."""
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = load_model(weights)(images)[0].numpy()
    rows[..., :4] /= np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
    return images.permute(0, 2, 3, 1).numpy(), rows


@pytest.fixture(scope="module")
def library():
    before_tensorflow()
    import tensorflow

    return tensorflow


@pytest.fixture(scope="module")
def weights(write_checkpoint):
    return write_checkpoint()


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory):
    """What onnx2tf itself makes of the checkpoint; one run serves all tests here."""
    try:
        program = exporter.find_converter()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("onnx2tf")
    return exporter.convert(job_of(weights, "pb"), program, exporter.converter_version(program, folder), folder)


@pytest.fixture
def converter(converted, tmp_path, monkeypatch):
    """A stand-in for onnx2tf: hands out `converted`, and notes its arguments and working folder."""
    notes = tmp_path / "notes"
    program = script(
        tmp_path / "onnx2tf",
        f'[ "$1" = -V ] && {{ echo "a warning 0.1 of old"; echo "${{SAID:-1.29.24}}"; exit; }}\n'
        '[ -z "$BROKEN" ] || { echo "first"; echo "ValueError: no such operator"; exit 3; }\n'
        f'printf "%s\\n" "$@" > "{notes}"; pwd >> "{notes}"; cp *.npy "{tmp_path}/pictures.npy"\n'
        f'cp -r "{converted}" results\n',
    )
    monkeypatch.setenv("ONNX2TF", str(program))
    return notes


def test_a_saved_model_gives_the_checkpoints_rows(weights, converter, library):
    folder = exporter.export(job_of(weights, "saved_model"))
    assert folder == weights.with_name("best_saved_model")
    function = library.saved_model.load(str(folder)).signatures["serving_default"]
    (images,) = function.structured_input_signature[1].values()
    assert (images.name, images.shape.as_list()) == ("images", [1, HEIGHT, WIDTH, 3])
    given, expected = images_and_rows(weights)
    outputs = function(library.constant(given))
    assert list(outputs) == ["output_0"]
    np.testing.assert_allclose(outputs["output_0"].numpy(), expected, atol=2e-5)


def test_a_saved_model_says_what_it_is(weights, converter):
    folder = exporter.export(job_of(weights, "saved_model"))
    said = Metadata.from_texts(yaml.safe_load((folder / "metadata.yaml").read_text()), str(folder))
    assert (said.names, said.shape_hw, said.boxes_normalised) == ({0: "ant", 1: "bee", 2: "fly"}, (HEIGHT, WIDTH), True)
    assert said.versions["onnx2tf"] == "1.29.24"
    assert not list(folder.rglob("*.tflite")) and not list(weights.parent.glob(".*"))


def test_a_frozen_graph_has_yolov5s_names_and_the_checkpoints_rows(weights, converter, library):
    path = exporter.export(job_of(weights, "pb"))
    assert path == weights.with_name("best.pb")
    graph = library.compat.v1.GraphDef.FromString(path.read_bytes())
    imported = library.compat.v1.wrap_function(lambda: library.compat.v1.import_graph_def(graph, name=""), [])
    element = imported.graph.as_graph_element
    function = imported.prune(element("x:0"), element("Identity:0"))
    given, expected = images_and_rows(weights)
    np.testing.assert_allclose(function(library.constant(given)).numpy(), expected, atol=2e-5)
    (note,) = [node for node in graph.node if node.name == "metadata"]
    texts = json.loads(library.make_ndarray(note.attr["value"].tensor).item())
    assert Metadata.from_texts(texts, str(path)).names == {0: "ant", 1: "bee", 2: "fly"}


def test_the_converter_works_apart_and_finds_real_pictures_to_compare_on(weights, converter, tmp_path):
    exporter.export(job_of(weights, "pb"))
    *arguments, folder = converter.read_text().split("\n")[:-1]
    assert arguments == [
        *("-i", "model.onnx", "-o", "results", "--non_verbose", "--output_signaturedefs", "--output_tfv1_pb")
    ]
    assert not Path(folder).exists() and Path(folder) not in (Path.cwd(), weights.parent)
    pictures = np.load(tmp_path / "pictures.npy", allow_pickle=False)
    assert (pictures.shape, pictures.dtype) == ((20, 128, 128, 3), np.float32)
    assert 0 <= pictures.min() and pictures.max() <= 1 and pictures.std() > 0.1


def test_later_versions_are_told_to_go_through_tensorflow(weights, converter, monkeypatch):
    monkeypatch.setenv("SAID", "2.4.1")
    exporter.export(job_of(weights, "saved_model"))
    arguments = converter.read_text()
    assert "--tflite_backend\ntf_converter\n" in arguments and "--output_tfv1_pb" not in arguments


def test_a_failing_converter_shows_the_end_of_what_it_said(weights, converter, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(UserError, match=r"(?s)onnx2tf failed with status 3:.*ValueError: no such operator"):
        exporter.export(job_of(weights, "pb"))


def test_a_version_that_is_none_is_said(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNX2TF", str(script(tmp_path / "onnx2tf", "echo what?\n")))
    with pytest.raises(UserError, match="does not tell its version: 'what?"):
        exporter.export(job_of(weights, "pb"))


def test_other_names_in_the_frozen_graph_are_refused(converted, tmp_path, library):
    graph = library.compat.v1.GraphDef.FromString(next(converted.glob("*_float32.pb")).read_bytes())
    next(node for node in graph.node if node.op == "Placeholder").name = "picture"
    (tmp_path / "other.pb").write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match="other names than images and Identity"):
        exporter.write_frozen(tmp_path / "out.pb", tmp_path / "other.pb", {})
    assert not (tmp_path / "out.pb").exists()


def test_without_the_converter_it_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.delenv("ONNX2TF", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    with pytest.raises(UserError, match="needs the program onnx2tf, .* pipx install onnx2tf, or name it in .* ONNX2TF"):
        exporter.find_converter()
    monkeypatch.setenv("ONNX2TF", "/no/such/program")
    with pytest.raises(UserError, match="ONNX2TF=/no/such/program is no program"):
        exporter.find_converter()


def test_the_converter_is_found_where_make_installs_it(monkeypatch, tmp_path):
    monkeypatch.delenv("ONNX2TF", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    folder = tmp_path / ".venv-onnx2tf" / "bin"
    folder.mkdir(parents=True)
    program = script(folder / "onnx2tf", "")
    assert exporter.find_converter() == str(program)


def test_a_browser_model_is_made_of_the_frozen_graph(weights, converter, tmp_path, monkeypatch, library, caplog):
    notes = tmp_path / "web_notes"
    script(
        tmp_path / "tensorflowjs_converter",
        f'printf "%s\\n" "$@" > "{notes}"; cp "$3" "{tmp_path}/given.pb"; echo "{{}}" > "$4/model.json"\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = exporter.export(job_of(weights, "tfjs"))
    assert folder == weights.with_name("best_web_model")
    assert "tfjs is deprecated" in caplog.text and "--include web" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["metadata.json", "model.json"]
    assert notes.read_text().split("\n")[:2] == ["--input_format=tf_frozen_model", "--output_node_names=Identity"]
    graph = library.compat.v1.GraphDef.FromString((tmp_path / "given.pb").read_bytes())
    assert {"x", "Identity"} <= {node.name for node in graph.node}
    said = Metadata.from_texts(json.loads((folder / "metadata.json").read_text()), str(folder))
    assert said.boxes_normalised and said.stride == 32


def test_a_browser_model_is_refused_without_its_converter(weights, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs the program tensorflowjs_converter .* pipx install tensorflowjs"):
        exporter.export(job_of(weights, "tfjs"))
