"""Files that would reach outside themselves are refused before their runtime sees them."""

import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from models.backends import load_backend
from models.backends.load_order import before_tensorflow
from models.backends.onnx_file import read_onnx
from utils.checks import UserError

SECRET = np.arange(4, dtype=np.float32).tobytes()


def onnx_file(path, location):
    """Writes a model whose one tensor lies in another file."""
    onnx = pytest.importorskip("onnx")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        weight.external_data.add(key=key, value=value)
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("way", ["above", "absolute", "link"])
@pytest.mark.parametrize("dnn", [False, True])
def test_onnx_tensors_outside_the_folder_are_refused(tmp_path, way, dnn):
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(SECRET)
    (folder / "link.bin").symlink_to(secret)
    location = {"above": "../secret.bin", "absolute": str(secret), "link": "link.bin"}[way]
    path = onnx_file(folder / "best.onnx", location)
    with pytest.raises(UserError, match=r"takes tensors from '.*', which is outside its folder: refused"):
        load_backend(path, "cpu", dnn=dnn)


def test_onnx_tensors_in_the_folder_are_found_by_the_walk(tmp_path):
    (tmp_path / "weights.bin").write_bytes(SECRET)
    assert read_onnx(onnx_file(tmp_path / "best.onnx", "weights.bin")).input_shape == [4]


def test_external_tensors_inside_branches_and_attributes_are_found(tmp_path):
    onnx = pytest.importorskip("onnx")
    hidden = onnx.TensorProto(name="h", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="/etc/passwd")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value=hidden)],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("c", 1, [4])],
    )
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    ends = [onnx.helper.make_tensor_value_info("x", 9, []), onnx.helper.make_tensor_value_info("y", 1, [4])]
    graph = onnx.helper.make_graph([branch], "g", ends[:1], ends[1:])
    path = tmp_path / "best.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(UserError, match=r"'/etc/passwd', which is outside its folder"):
        read_onnx(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"no model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_file_is_told(tmp_path, content):
    path = tmp_path / "best.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"best\.onnx: is not an ONNX file"):
        read_onnx(path)


class Reader(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + torch.from_file("/tmp/anything", shared=True, size=4).sum()


def test_torchscript_that_reaches_files_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "best.torchscript"
    torch.jit.script(Reader()).save(str(path))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"its code has the name 'from_file': refused"):
        load_backend(path, "cpu")


def test_torchscript_with_operators_of_an_extension_is_refused(tmp_path):
    path = tmp_path / "best.torchscript"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best/code/__torch__.py", "def forward(self, x):\n  return ops.mine.run_it(x)\n")
        archive.writestr("best/version", "3\n")
    with pytest.raises(UserError, match=r"its code has the name 'ops\.mine\.run_it': refused"):
        load_backend(path, "cpu")


@pytest.fixture
def tensorflow():
    before_tensorflow()
    return pytest.importorskip("tensorflow")


@pytest.mark.slow
def test_frozen_graphs_that_do_more_than_arithmetic_are_refused(tensorflow, tmp_path):
    from tensorflow.core.framework.graph_pb2 import GraphDef

    graph = GraphDef()
    graph.node.add(name="x", op="Placeholder")
    graph.node.add(name="name", op="Const")
    graph.node.add(name="y", op="WriteFile", input=["name", "x"])
    path = tmp_path / "best.pb"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(UserError, match=r"does more than arithmetic \(WriteFile\): refused"):
        load_backend(path, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["__inference_run_1", "__inference__traced_save_1"])
def test_saved_models_that_reach_files_are_refused(tensorflow, tmp_path, name):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    content = SavedModel()
    library = content.meta_graphs.add().graph_def.library
    saver = library.function.add()
    saver.signature.name = name
    saver.node_def.add(name="w", op="SaveV2")
    entry = library.function.add()
    entry.signature.name = "serve"
    call = entry.node_def.add(name="c", op="PartitionedCall")
    call.attr["f"].func.name = name
    folder = tmp_path / "best_saved_model"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(content.SerializeToString())
    leads = r"node_def.attr.func.name leads to a function that reads or writes files"
    with pytest.raises(UserError, match=leads if "traced" in name else r"more than arithmetic \(SaveV2\)"):
        load_backend(folder, "cpu")
