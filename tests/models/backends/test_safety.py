"""Files that would reach outside themselves are refused before their runtime sees them."""

import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from models.backends import load_backend
from models.backends import safety as onnx_walk
from models.backends.base import before_tensorflow
from models.backends.safety import read_onnx
from utils.errors import UserError

SECRET = np.arange(4, dtype=np.float32).tobytes()
OUTSIDE = "which is outside its folder: refused"


def weight(location):
    """Returns a tensor that lies in another file."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*weights):
    """Returns a model that adds the tensor w to its input."""
    from onnx import helper

    ends = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def onnx_file(path, location):
    """Writes a model whose one tensor lies in another file."""
    path.write_bytes(model(weight(location)).SerializeToString())
    return path


LOCATIONS = ["above", "absolute", "link", "folder", "memory"]


@pytest.mark.parametrize("way", LOCATIONS)
@pytest.mark.parametrize("dnn", [False, True])
def test_onnx_tensors_outside_the_folder_are_refused(tmp_path, way, dnn):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    secret = tmp_path / "secret.bin"
    secret.write_bytes(SECRET)
    (folder / "link.bin").symlink_to(secret)
    (folder / "inner" / "w.bin").write_bytes(SECRET)
    # "memory": ONNX Runtime takes the offset for an address in its own memory, whatever file is there
    places = ["../secret.bin", str(secret), "link.bin", "inner/w.bin", "*/_ORT_MEM_ADDR_/*"]
    path = onnx_file(folder / "best.onnx", dict(zip(LOCATIONS, places, strict=True))[way])
    with pytest.raises(UserError, match=rf"takes tensors from '.*', {OUTSIDE}"):
        load_backend(path, "cpu", dnn=dnn)


def test_onnx_tensors_beside_the_model_are_found_and_missed(tmp_path):
    path = onnx_file(tmp_path / "best.onnx", "weights.bin")
    with pytest.raises(UserError, match=r"from 'weights.bin', and there is no such file: put it beside the model"):
        read_onnx(path)
    (tmp_path / "weights.bin").write_bytes(SECRET)
    assert read_onnx(path).input_shape == [4]


def test_onnx_runtime_reads_what_was_checked_and_not_another_format_by_the_name(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "best.onnx.ort"  # ONNX Runtime has a format of its own under this suffix
    (tmp_path / "weights.bin").write_bytes(SECRET)
    path.write_bytes(model(weight("weights.bin")).SerializeToString())
    with pytest.raises(UserError, match=r"its input is tensor\(float\) \[4\], not float images"):
        load_backend(path, "cpu")


def messages_of(descriptor, found):
    """Fills in the messages that a message leads to: by name, its fields."""
    if descriptor.full_name not in found:
        found[descriptor.full_name] = list(descriptor.fields)
        for field in descriptor.fields:
            if field.message_type:
                messages_of(field.message_type, found)
    return found


def ways_to_tensors(descriptor, way=()):
    """Yields every way from a message to a tensor: fields, none of them twice."""
    for field in descriptor.fields:
        if field.message_type and field not in way:
            if field.message_type.name == "TensorProto":
                yield (*way, field)
            else:
                yield from ways_to_tensors(field.message_type, (*way, field))


def shortest_ways_by_last_field():
    """Returns, for each field of onnx.proto on a way to tensors, the shortest way that goes through it."""
    onnx = pytest.importorskip("onnx")
    shortest = {}
    for way in ways_to_tensors(onnx.ModelProto.DESCRIPTOR):
        for field in way:
            if len(way) < len(shortest.get(field.full_name, way * 2)):
                shortest[field.full_name] = way
    return shortest


def put(message, way, tensor):
    """Puts a tensor into a message at the end of a way."""
    for field in way:
        inner = getattr(message, field.name)
        message = inner.add() if hasattr(inner, "add") else inner
    message.CopyFrom(tensor)


def test_onnx_tensors_are_found_in_every_field_of_the_format(tmp_path):
    """By onnx's own description of the format, so that a new field in it fails here."""
    ways = shortest_ways_by_last_field()
    assert len(ways) >= 16
    for name, way in ways.items():
        content = model()
        put(content, way, weight("../secret.bin"))
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content.SerializeToString())
        with pytest.raises(UserError, match=OUTSIDE):
            read_onnx(path)
            pytest.fail(" > ".join(field.name for field in way))


def test_the_walk_knows_all_fields_of_the_format(tmp_path):
    onnx = pytest.importorskip("onnx")
    names = {"ModelProto": "model", "GraphProto": "graph", "TrainingInfoProto": "training", "NodeProto": "node"}
    names |= {"FunctionProto": "function", "AttributeProto": "attribute", "SparseTensorProto": "sparse"}
    names |= {"TensorProto": "tensor"}
    found = messages_of(onnx.ModelProto.DESCRIPTOR, {})
    known = {name: set(fields) for name, fields in onnx_walk._FIELDS.items()}
    assert known == {names[n]: {f.number for f in found[f"onnx.{n}"]} for n in names}


def varint(number, longest=0):
    data = bytearray()
    while number > 0x7F or len(data) + 1 < longest:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])


def test_onnx_files_that_libraries_read_in_different_ways_are_refused(tmp_path):
    """Keys of more than 32 bits, which some take for the field of a graph, and fields that the format did not have."""
    content, hidden = model(), model(weight("../secret.bin")).graph.SerializeToString()
    graph = 7 << 3 | 2
    keys = {
        "33 bits": varint(graph | 1 << 32),
        "35 bits": varint(graph | 1 << 34),
        "64 bits": varint(graph | 1 << 63),
        "6 bytes": varint(graph, longest=6),
        "10 bytes": varint(graph, longest=10),
        "field 0": varint(2),
        "unknown field": varint(99 << 3 | 2),
        "group": varint(7 << 3 | 3),
    }
    path = tmp_path / "best.onnx"
    for name, key in keys.items():
        path.write_bytes(content.SerializeToString() + key + varint(len(hidden)) + hidden)
        with pytest.raises(UserError, match="best.onnx: is not an ONNX file, or is damaged") as caught:
            read_onnx(path)
            pytest.fail(name)
        assert len(str(caught.value).splitlines()) == 1
    for key in (1 << 3 | 1 << 32, 0):  # a number under a key that is none
        path.write_bytes(content.SerializeToString() + varint(key) + b"\x01")
        with pytest.raises(UserError, match=f"is damaged .a field's key is {key}"):
            read_onnx(path)
    for longest in (2, 5):  # a key or a length with needless bytes is the same number to all
        path.write_bytes(content.SerializeToString() + varint(graph, longest) + varint(len(hidden), longest) + hidden)
        with pytest.raises(UserError, match=OUTSIDE):
            read_onnx(path)
    path.write_bytes(content.SerializeToString())
    assert read_onnx(path).output_shape == [4]


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
