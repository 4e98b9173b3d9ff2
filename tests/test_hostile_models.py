"""Model YAMLs and exported models made to run something, to read other files or to fill the memory: all are refused.

What a runtime would do with them is not tried: the refusal comes before it sees the file. More of ONNX, TorchScript and
TensorFlow is in models/backends/test_safety.py.
"""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models.backends import load_backend, openvino
from models.backends import safety as onnx_file
from models.backends.base import before_tensorflow
from models.backends.metadata import Metadata
from models.backends.safety import suspicious
from models.common import parse_activation
from models.yolo import Model
from utils.errors import UserError


def config(**changes) -> dict:
    own = {
        "nc": 1,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[8, 16], [32, 64]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[-1, 1, "C3", [16]], [[1, 3], 1, "Detect", ["nc", "anchors"]]],
    }
    return {**own, **changes}


def with_row(*row) -> dict:
    own = config()
    own["backbone"][2] = list(row)
    return own


TEXTS = [
    *("__import__", "__import__('os').system('touch {canary}')", "os.system", "eval", "exec", "open", "lambda: 0"),
    *(
        "torch.hub.load",
        "nn.__dict__",
        "nn.utils.torch.hub.load",
        "models.common.os.system",
        "Conv.__init__.__globals__",
    ),
    *("nn.modules.activation.torch.hub", "__class__", "Model", "C3\0", "nn.Module\n", "", "../../evil", "{canary}"),
    *("nn.__import__('os').system('touch {canary}')", "nn.SiLU(__import__('os').system('touch {canary}'))"),
    *("nn.SiLU().__class__.__init__.__globals__", "nn.Tensor(5)", "nn.Parameter", "nn.MultiheadAttention(8, 2)"),
    *("nn.PReLU(1000000000)", "nn.PReLU(num_parameters=1000000000)", "-" * 100_000 + "1", "-" * 190 + "1"),
    *(
        "(" * 5000,
        "nn.SiLU(" + "-" * 180 + "1)",
        "9" * 10_000,
        "nn.SiLU() if open('{canary}', 'w') else 1",
    ),
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_texts_in_a_model_yaml_are_names_and_literals_only(tmp_path, text):
    canary = tmp_path / "canary"
    text = text.replace("{canary}", str(canary))
    with pytest.raises(UserError, match=r"model: row 2 .*unknown block") as caught:
        Model(with_row(-1, 1, text, [16]))
    assert len(str(caught.value)) < 1500
    with pytest.raises(UserError, match="row 0 .*is not an activation"):
        Model(config(activation=text))
    with pytest.raises(ValueError, match="is not an activation"):
        parse_activation(text)
    with pytest.raises(UserError, match=r"row 2 "):
        Model(with_row(-1, 1, "Conv", [16, 3, 2, None, 1, text]))
    assert not canary.exists()


BIG = 10**9
HUGE_ROWS = [
    *((-1, 1, "Conv", [BIG, 3, 2]), (-1, BIG, "C3", [16]), (-1, BIG, "Conv", [16]), (-1, 1, "Conv", [16, BIG])),
    *((-1, 1, "nn.Upsample", [None, 10**6, "nearest"]), (-1, 1, "SPP", [16, [BIG]]), (-1, 1, "Contract", [BIG])),
    *((-1, 1, "Conv", [16, [3, -BIG]]), (-1, 1, "Conv", [16, 3, 2, [BIG, 1]]), (-1, 1, "Conv", [16, float("inf")])),
    *(
        (-1, 1, "Conv", [16, float("nan")]),
        (-1, 1, "Expand", [0]),
        (-1, 1, "Contract", [0]),
        ([-1] * 100_000, 1, "Concat", [1]),
    ),
]


@pytest.mark.parametrize("row", HUGE_ROWS, ids=range(len(HUGE_ROWS)))
def test_layers_beyond_all_measure_are_refused_before_they_are_built(row):
    with pytest.raises(UserError, match="model: row 2 ") as caught:
        Model(with_row(*row))
    assert len(str(caught.value)) < 1000


HUGE_KEYS = [
    *({"nc": BIG}, {"depth_multiple": float("inf")}, {"depth_multiple": -1}, {"width_multiple": float("nan")}),
    *(
        {"width_multiple": BIG},
        {"anchors": BIG},
        {"anchors": -1},
        {"anchors": [["a"] * 2] * 2},
        {"ch": "x"},
        {"ch": BIG},
    ),
    *({"anchors": [[float("nan")] * 2] * 2}, {"anchors": [[1] * 10**5] * 2}, {"channel_multiple": 0}),
    *({"backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 10**4}, {"activation": 5}, {"activation": {"Conv": ["nn.SiLU()"]}}),
]


@pytest.mark.parametrize("keys", HUGE_KEYS, ids=[f"{next(iter(keys))}-{index}" for index, keys in enumerate(HUGE_KEYS)])
def test_keys_beyond_all_measure_are_refused(keys):
    with pytest.raises(UserError, match="^model: ") as caught:
        Model(config(**keys))
    assert len(str(caught.value)) < 1000


def program(path: Path, line: str, member: str = "{folder}/code/{name}.py", twice: bool = False) -> Path:
    """Writes a TorchScript file of one module, with a line of code put into its forward."""

    class Plain(nn.Module):
        def forward(self, x):
            return x

    content = io.BytesIO()
    torch.jit.save(torch.jit.script(Plain()), content)
    with zipfile.ZipFile(content) as harmless, zipfile.ZipFile(path, "w") as archive:
        for info in harmless.infolist():
            data, name = harmless.read(info), info.filename
            if name.endswith(".py"):
                if twice:
                    archive.writestr(name, data)
                folder, _, inner = name.partition("/code/")
                name = member.format(folder=folder, name=inner.removesuffix(".py"))
                data = data.replace(b"    return x", f"    {line}\n    return x".encode())
            archive.writestr(name, data)
    return path


PROGRAMS = {
    "save": 'torch.save(x, "{canary}")',
    "another name": 'f = torch.save\n    f(x, "{canary}")',
    "the module by another name": 't = torch\n    t.save(x, "{canary}")',
    "by text": 'getattr(torch, "save")(x, "{canary}")',
    "by text in pieces": 'getattr(torch, "sa" "ve")(x, "{canary}")',
    "by text in other pieces": "getattr(torch, \"sa\" 've')(x, '{canary}')",
    "by text in three quotes": 'getattr(torch, """sa""" "ve")(x, "{canary}")',
    "by octal codes": 'getattr(torch, "\\163ave")(x, "{canary}")',
    "by hexadecimal codes": 'getattr(torch, "\\x73ave")(x, "{canary}")',
    "over two lines": 'torch.save\\\n(x, "{canary}")',
    "text over two lines": 'getattr(torch, "sa\\\nve")(x, "{canary}")',
    "namespace": 'ops.aten.save(x, "{canary}")',
    "namespace by another name": 'o = ops\n    o.aten.save(x, "{canary}")',
    "spaces": 'torch . save (x, "{canary}")',
    "extension": "y = ops.mine.run(x)",
    "extension, spaces": "y = ops . mine . run(x)",
    "class of an extension": "y = __torch__.torch.classes.mine.Runner()",
    "file": 'y = torch.from_file("{canary}", True, 4)',
    "thread": "y = fork(f, x)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_torchscript_that_reaches_files_is_refused_however_it_names_them(tmp_path, name, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    canary = tmp_path / "canary"
    path = program(tmp_path / "evil.torchscript", PROGRAMS[name].replace("{canary}", str(canary)))
    with pytest.raises(UserError, match="evil.torchscript: its code has .*: refused"):
        load_backend(path, "cpu")
    assert not canary.exists()


@pytest.mark.parametrize("member", ["{folder}/CODE/{name}.PY", "{folder}/code/{name}.Py", "{folder}/./code/{name}.py"])
def test_torchscript_whose_code_has_an_unusual_name_is_read_as_torch_reads_it(tmp_path, member, monkeypatch):
    canary = tmp_path / "canary"
    path = program(tmp_path / "evil.torchscript", f'torch.save(x, "{canary}")', member)
    with pytest.raises(UserError, match="evil.torchscript: (its code has the name 'save'|is not a TorchScript file)"):
        load_backend(path, "cpu")
    assert not canary.exists()


def test_torchscript_with_two_codes_of_one_name_is_refused(tmp_path):
    path = program(tmp_path / "evil.torchscript", 'torch.save(x, "x")', "{folder}/code/{name}.PY", twice=True)
    with pytest.raises(UserError, match="evil.torchscript: is not a TorchScript file.*stands twice"):
        load_backend(path, "cpu")


@pytest.mark.parametrize(
    "code",
    [
        'x = torch._convolution(y, w, None, [1, 1], "zeros", device="")\nz = getattr(getattr(self.model, "0"), "conv")',
        'def saved(self):\n  return (self.loader).forward(x, "it\'s, \\"quoted\\"\\n", \'floor\', )',
        "y = ops.torchvision.nms(a, b, 0.5)\nz = ops.prim.NumToTensor(y)\nw = ops.quantized.conv2d(x)",
    ],
)
def test_code_of_detectors_is_not_suspicious(code):
    assert suspicious(code) == ""


def test_torchscript_that_unpacks_to_zeros_is_refused(tmp_path):
    path = program(tmp_path / "bomb.torchscript", "y = x")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/constants/0", bytes(80 << 20))
    with pytest.raises(UserError, match="bomb.torchscript: (refused, for its .* bytes unpack|is not a TorchScript)"):
        load_backend(path, "cpu")


NAMES = {
    "nested": "[" * 100_000,
    "minus": "-" * 100_000 + "1",
    "call": "__import__('os').system('touch {canary}')",
    "number": "nan",
    "function": "open('{canary}', 'w')",
    "list of lists": "[[[[[[[[",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says_of_itself_is_never_evaluated(tmp_path, name):
    canary = tmp_path / "canary"
    text = NAMES[name].replace("{canary}", str(canary))
    for texts in ({"stride": "32", "names": text}, {"metadata": text}, {"stride": text, "names": "['a']"}):
        with pytest.raises(UserError, match="evil.onnx: what the file says of itself is damaged") as caught:
            Metadata.from_texts(texts, "evil.onnx")
        assert len(str(caught.value).splitlines()) == 1
    assert not canary.exists()


def test_onnx_that_trains_itself_cannot_reach_files_either(tmp_path):
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph)
    hidden = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="../../secret")
    model.training_info.add().algorithm.initializer.append(hidden)
    path = tmp_path / "best.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="takes tensors from '../../secret', which is outside its folder: refused"):
        onnx_file.read_onnx(path)


GRAPH = '<?xml version="1.0"?>\n<net name="a" version="11"><layers></layers><edges></edges></net>'


def openvino_folder(folder: Path, graph: bytes = GRAPH.encode()) -> Path:
    folder.mkdir()
    (folder / "best.xml").write_bytes(graph)
    (folder / "best.bin").write_bytes(bytes(64))
    return folder


@pytest.mark.parametrize("kind", ["openvino_model", "ncnn_model", "rknn_model", "saved_model", "mlpackage", "xml"])
def test_folders_with_links_to_elsewhere_are_refused(tmp_path, kind):
    folder = openvino_folder(tmp_path / (f"evil.{kind}" if kind == "mlpackage" else f"evil_{kind}"))
    (folder / "variables").mkdir()
    secret, inside = (
        tmp_path / "secret.bin",
        folder / "best.bin" if kind == "xml" else folder / "variables" / "link.bin",
    )
    (folder / "best.bin").rename(secret)
    (folder / "best.bin").symlink_to("best.xml")  # inside the folder all is well
    inside.unlink(missing_ok=True)
    inside.symlink_to(secret)
    with pytest.raises(UserError, match=f"'{inside.name}' is a link to .*secret.bin, outside it: refused"):
        load_backend(folder / "best.xml" if kind == "xml" else folder, "cpu")


GRAPHS = {
    "ONNX": b"\x08\x08\x12\x04evil:\x00",
    "entities": b'<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a SYSTEM "file:///etc/passwd">]><net>&a;</net>',
    "elsewhere": b"<?xml version='1.0'?><html/>",
    "empty": b"",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_only_is_called_an_openvino_graph_is_refused(tmp_path, name):
    folder = openvino_folder(tmp_path / "evil_openvino_model", GRAPHS[name])
    with pytest.raises(UserError, match=r"best.xml: is not an OpenVINO graph"):
        openvino.load(folder, "cpu")


PARAMETERS = {
    "counts": "7767517\n1000000000 1000000000\nInput in0 0 1 in0\n",
    "negative": "7767517\n-1 -1\n",
    "no number": "7767517\nmany blobs\n",
    "magic": "1\n1 1\nInput in0 0 1 in0\n",
    "blobs": "7767517\n2 2\nInput in0 0 1000000000 in0\nSplit s 1 1 in0 out0\n",
    "binary": "\0\1\2\3" * 10,
    "empty": "",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_ncnn_graphs_whose_counts_are_wrong_are_refused_before_ncnn_sees_them(tmp_path, name):
    folder = tmp_path / "evil_ncnn_model"
    folder.mkdir()
    (folder / "model.param").write_text(PARAMETERS[name])
    (folder / "model.bin").write_bytes(bytes(8))
    (folder / "metadata.yaml").write_text("stride: 32\nnames: {0: a}\n")
    with pytest.raises(UserError, match="model.param: is not an NCNN graph"):
        load_backend(folder, "cpu")


SAVER, CONSTANT = "__inference__traced_save_1", "tf.TrackableConstant"
WAYS_TO_A_SAVER = {
    "signature": lambda part: part.object_graph_def.concrete_functions[SAVER].bound_inputs.append(0),
    "function": lambda part: part.object_graph_def.nodes.add().function.concrete_functions.append(SAVER),
    "bare function": lambda part: setattr(
        part.object_graph_def.nodes.add().bare_concrete_function, "concrete_function_name", SAVER
    ),
    "call": lambda part: setattr(entry_of(part).node_def.add(op="PartitionedCall").attr["f"].func, "name", SAVER),
    "call of a call": lambda part: setattr(
        entry_of(part).node_def.add(op="PartitionedCall").attr["f"].func.attr["g"].func, "name", SAVER
    ),
    "branches": lambda part: entry_of(part).node_def.add(op="PartitionedCall").attr["f"].list.func.add(name=SAVER),
    "name in bytes": lambda part: setattr(
        entry_of(part).node_def.add(op="PartitionedCall").attr["f"], "s", SAVER.encode()
    ),
    "attribute of a function": lambda part: setattr(entry_of(part).attr["forward_function_name"], "s", SAVER.encode()),
    "gradient": lambda part: part.graph_def.library.gradient.add(function_name="serve", gradient_func=SAVER),
    "another's, loaded before": lambda part: setattr(
        entry_of(part).node_def.add(op="PartitionedCall").attr["f"].func, "name", f"{SAVER}_load_7"
    ),
    "deep in the top graph": lambda part: setattr(part.graph_def.node[0].attr["f"].func.attr["g"].func, "name", SAVER),
    "TensorFlow 1": lambda part: part.ClearField("object_graph_def"),
    "operator": lambda part: entry_of(part).node_def.add(op=SAVER),
    "operator at the top": lambda part: part.graph_def.node.add(op="WriteFile"),
    "evil saver": lambda part: part.graph_def.library.function[0].node_def.add(op="WriteFile"),
    "nearly a saver": lambda part: setattr(part.graph_def.library.function[0].signature, "name", f"{SAVER}_x"),
    "replaceable": lambda part: setattr(entry_of(part).attr["api_implements"], "s", b"same"),
    "saveable object": lambda part: setattr(
        part.object_graph_def.nodes[0].saveable_objects["a"], "restore_function", 1
    ),
    "registered class": lambda part: setattr(part.object_graph_def.nodes[0], "registered_name", "some.Class"),
    "a constant's class": lambda part: setattr(
        part.object_graph_def.nodes[0], "registered_name", "tf.TrackableConstant"
    ),
    "class of a constant": lambda part: setattr(part.object_graph_def.nodes[1], "registered_name", "some.Class"),
    "registered saver": lambda part: setattr(part.object_graph_def.nodes[0], "registered_saver", "some.saver"),
    "resource": lambda part: setattr(part.object_graph_def.nodes.add().resource, "device", "cpu"),
}


def entry_of(part):
    return part.graph_def.library.function[1]


def saved_model():
    """A SavedModel as TensorFlow writes it, of which only the graph for other languages calls the saver."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    content = SavedModel()
    part = content.meta_graphs.add()
    saver, entry = part.graph_def.library.function.add(), part.graph_def.library.function.add()
    saver.signature.name, entry.signature.name = SAVER, "serve"
    saver.node_def.add(name="w", op="SaveV2")
    entry.node_def.add(name="a", op="Identity")
    part.graph_def.node.add(name="c", op="StatefulPartitionedCall").attr["f"].func.name = SAVER
    part.object_graph_def.concrete_functions["serve"].bound_inputs.append(0)
    part.object_graph_def.nodes.add().user_object.identifier = "_generic_user_object"
    constant = part.object_graph_def.nodes.add(registered_name=CONSTANT)
    constant.constant.operation = "c"
    return content


@pytest.mark.slow
def test_saved_models_have_no_way_to_the_functions_that_reach_files(tmp_path):
    before_tensorflow()
    pytest.importorskip("tensorflow")
    from models.backends.safety import check_saved_model

    check_saved_model(saved_model(), tmp_path)
    for name, change in WAYS_TO_A_SAVER.items():
        content = saved_model()
        change(content.meta_graphs[0])
        with pytest.raises(UserError, match="evil_saved_model: .*: refused"):
            check_saved_model(content, Path("evil_saved_model"))
            pytest.fail(name)
    content = saved_model()
    content.meta_graphs.add().CopyFrom(content.meta_graphs[0])  # TensorFlow would run their top graphs
    (tmp_path / "two_saved_model").mkdir()
    (tmp_path / "two_saved_model" / "saved_model.pb").write_bytes(content.SerializeToString())
    with pytest.raises(UserError, match="two_saved_model: one graph is expected in it, it has 2: refused"):
        load_backend(tmp_path / "two_saved_model", "cpu")


def test_texts_in_a_tflite_file_are_never_evaluated(tmp_path):
    from models.backends import tflite

    for name, text in {"a.txt": "-" * 100_000 + "1", "a.json": "[" * 100_000, "b.txt": "__import__('os')"}.items():
        path = tmp_path / "evil.tflite"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, text)
        with pytest.raises(UserError, match="evil.tflite: what the file says of itself is damaged"):
            tflite.read_texts(path)


def test_json_of_torchscript_is_told_when_it_is_nested_to_exhaust(tmp_path):
    path = program(tmp_path / "evil.torchscript", "y = x")
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/extra/config.txt", "[" * 100_000)
    with pytest.raises(UserError, match="evil.torchscript: what the file says of itself is damaged"):
        load_backend(path, "cpu")
    assert json.loads("[]") == []
