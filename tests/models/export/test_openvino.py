"""OpenVINO folders: what is in them, the checkpoint's numbers out of them, and int8 where it belongs."""

import logging
import os
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml

import export
from models.load import load_model
from utils.errors import UserError

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

from models.backends.metadata import Metadata  # noqa: E402
from models.export.job import atomic_folder, without_telemetry  # noqa: E402


def written(weights, **options):
    (path,) = export.run(weights=str(weights), include="openvino", **{"imgsz": [64, 96], **options})
    return path


def compiled(folder, stem="best"):
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(f"{folder}/{stem}.xml", "CPU", exact)


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def rows_of(weights, images):
    with torch.no_grad():
        return load_model(weights)(images)[0].numpy()


@pytest.fixture(scope="module")
def fixed(write_checkpoint):
    weights = write_checkpoint()
    return weights, written(weights)


@pytest.fixture(scope="module")
def quantised(write_checkpoint, tiny_shapes):
    if find_spec("nncf") is None:  # not importorskip: the import itself changes the process
        pytest.skip("NNCF is not installed")
    weights = write_checkpoint("yolov5n.yaml")
    folder = written(weights, int8=True, data=str(tiny_shapes), int8_max_drop=1.0)
    return weights, folder


def test_the_folder_holds_graph_weights_and_a_yaml_of_names_and_stride(fixed):
    folder = fixed[1]
    assert sorted(os.listdir(folder)) == ["best.bin", "best.xml", "best.yaml"]
    with open(f"{folder}/best.yaml", encoding="utf-8") as file:
        assert yaml.safe_load(file) == {"stride": 32, "names": {0: "ant", 1: "bee", 2: "fly"}}
    model = openvino.Core().read_model(f"{folder}/best.xml")
    texts = {name: model.get_rt_info(["model_info", name]).astype(str) for name in ("stride", "names", "metadata")}
    metadata = Metadata.from_texts(texts, "best.xml")
    assert texts["names"] == "{0: 'ant', 1: 'bee', 2: 'fly'}"
    assert (metadata.stride, metadata.shape_hw, metadata.precision) == (32, (64, 96), "float32")


def test_input_and_output_are_named_as_yolov5_names_them(fixed):
    model = compiled(fixed[1])
    assert model.input("images").get_partial_shape().to_shape() == [1, 3, 64, 96]
    assert model.output("output").get_partial_shape().to_shape() == [1, 378, 8]


def test_half_stores_half_as_much_and_stays_close(fixed, write_checkpoint):
    weights = write_checkpoint()
    folder = written(weights, half=True)
    size, whole = (os.path.getsize(f"{path}/best.bin") for path in (folder, fixed[1]))
    assert size < 0.52 * whole
    images = random_images(1, 3, 64, 96)
    found = compiled(folder)(images.numpy())["output"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows_of(weights, images), rtol=0.02, atol=0.5)


@pytest.mark.slow
def test_int8_convolutions_are_all_but_the_heads(quantised):
    folder = quantised[1]
    assert folder.endswith("best-int8_openvino_model")
    text = open(f"{folder}/best.xml", encoding="utf-8").read()
    convolutions = len(re.findall(r'type="Convolution"', text))
    int8 = len(re.findall(r'type="Const".*?\n\s*<data element_type="i8"', text))
    assert convolutions > 40
    assert int8 == convolutions - 3


@pytest.mark.slow
def test_int8_leaves_the_decoding_in_float(quantised):
    from models.export.openvino import activation_ranges, float_operations

    model = openvino.Core().read_model(f"{quantised[1]}/best.xml")
    names = float_operations(model)
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ops()}
    assert [kinds[name] for name in names].count("Convolution") == 3
    assert "Sigmoid" in {kinds[name] for name in names}
    measured = {entry.name: entry for entry in activation_ranges(model)}
    assert not set(measured) & set(names)
    assert measured["images"].low == 0
    assert 0.9 < measured["images"].high <= 1.001


@pytest.mark.slow
def test_int8_rows_stay_near_the_checkpoints(quantised):
    weights, folder = quantised
    images = random_images(1, 3, 64, 96)
    found, expected = compiled(folder)(images.numpy())["output"], rows_of(weights, images)
    assert 0 < np.abs(found[..., 4:] - expected[..., 4:]).max() < 0.1


@pytest.mark.slow
def test_quantising_leaves_the_process_as_it_was(quantised):
    assert logging.getLoggerClass() is logging.Logger
    assert "NNCF_CI" not in os.environ


def test_telemetry_is_off_inside_and_the_environment_as_before_after(monkeypatch):
    monkeypatch.setenv("CI", "no")
    monkeypatch.delenv("NNCF_CI", raising=False)
    with without_telemetry():
        assert (os.environ["CI"], os.environ["NNCF_CI"]) == ("true", "1")
    assert os.environ["CI"] == "no"
    assert "NNCF_CI" not in os.environ


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.name for entry in target.iterdir()] == ["new"]


def test_a_failure_leaves_the_former_folder_alone(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [entry.name for entry in tmp_path.rglob("*")] == ["model", "old"]


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "model"):
        pass
