"""Bad weights files, generated: cut anywhere, a byte changed anywhere, of another kind, with wrong parts.

Each is refused in one message that names the file; what opens in spite of a changed byte is as it was. Files of other
kinds are told apart in utils/test_checkpoint.py, files made to attack are in test_hostile*.py.
"""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import detect
import train
import val
from models.backends import load_backend
from models.load import model_from, read_weights
from models.yolo import Model
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

NAMES = ["circle", "square", "triangle", "star"]
KEY = "model.0.conv.weight"
BN = "model.0.bn.running_var"


def read_model(path: Path) -> Model:
    """Reads weights and builds their model, as val and detect do."""
    return model_from(read_weights(path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, more_weights) -> Path:
    """Weights of the small data set's four classes."""
    return more_weights(tmp_path_factory.mktemp("sound") / "sound.pt", dict(enumerate(NAMES)))


@pytest.fixture(scope="module")
def whole(sound) -> bytes:
    return sound.read_bytes()


@pytest.fixture(scope="module")
def content(sound) -> dict:
    return load_checkpoint(sound)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, whole, refusal):
    path = tmp_path / "cut.pt"
    for twentieths in range(20):
        path.write_bytes(whole[: len(whole) * twentieths // 20])
        reason = "is cut short" if twentieths else "is empty (0 bytes)"
        for reader in (load_checkpoint, read_weights):
            assert refusal(reader, path).startswith(f"{path}: {reason}")


def assert_same(opened: dict, content: dict) -> None:
    """Two checkpoints hold the same, to the bit."""
    mine, others = ({key: part for key, part in one.items() if key != "model"} for one in (opened, content))
    assert mine == others
    assert opened["model"].keys() == content["model"].keys()
    assert all(torch.equal(opened["model"][key], tensor) for key, tensor in content["model"].items())


# in its head, in its pickle, through all tensors, in its directory, at its end
PLACES = [0, 2, 6, 8, 14, 26, 28, 30, 35, 60, 64, 90, 200, 1000, 5000]
SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]
ENDS = [-1, -2, -6, -10, -14, -18, -22, -60, -150, -1000, -10_000]


def found_or_harmless(path: Path, data: bytes, place: int, content: dict) -> bool:
    """Tells whether a file with a changed byte is refused, in one line; else it must hold the same."""
    path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    try:
        opened = load_checkpoint(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return True
    assert_same(opened, content)
    return False


def test_a_changed_byte_is_found_or_harmless(tmp_path, whole, content):
    for place in [*PLACES, *(int(share * len(whole)) for share in SHARES), *(len(whole) + end for end in ENDS)]:
        found_or_harmless(tmp_path / "changed.pt", whole, place, content)


def test_a_changed_byte_anywhere_in_a_small_file_is_found_or_harmless(tmp_path):
    """All of them, the directory's included: some are what tells a folder, or where a second disk begins."""
    path = tmp_path / "small.pt"
    save_checkpoint(path, {"model": {"a": torch.arange(20.0)}, "names": {0: "a"}})
    data, content = path.read_bytes(), load_checkpoint(path)
    refused = sum(found_or_harmless(path, data, place, content) for place in range(len(data)))
    assert 0.4 * len(data) < refused < len(data)  # the rest is padding, times and the like


@pytest.mark.parametrize(("share", "bit"), [(0.2, 0), (0.5, 7), (0.8, 0)])
def test_a_changed_bit_among_the_numbers_is_refused(tmp_path, whole, share, bit, refusal):
    changed = bytearray(whole)
    changed[int(share * len(whole))] ^= 1 << bit
    path = tmp_path / "flipped.pt"
    path.write_bytes(changed)
    for reader in (load_checkpoint, read_weights):
        message = refusal(reader, path)
        assert message.startswith(f"{path}: is a damaged archive (") and "download or copy it again" in message


def test_a_changed_bit_of_a_torchscript_program_is_refused(tmp_path, refusal):
    layer = torch.nn.Conv2d(3, 64, 3)
    path = tmp_path / "changed.torchscript"
    torch.jit.trace(layer, torch.zeros(1, 3, 32, 32)).save(path)
    data = bytearray(path.read_bytes())
    place = data.index(layer.weight.detach().numpy().tobytes()[:200]) + 100
    data[place] ^= 1
    path.write_bytes(data)
    message = refusal(load_backend, [str(path)])
    assert str(path) in message and "is damaged (its part changed/data/" in message and "has changed" in message


def zipped(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def onnx_model() -> bytes:
    """Returns an ONNX model whose first 512 bytes have no NUL."""
    onnx = pytest.importorskip("onnx")
    nodes = [onnx.helper.make_node("Relu", [f"value_{n}"], [f"value_{n + 1}"]) for n in range(30)]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 3, 64, 64]) for name in ("value_0", "value_30")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:]))
    data = model.SerializeToString()
    assert b"\0" not in data[:512]
    return data


FOREIGN = {  # what stands in the file -> what is said
    "no pickle in a zip": (lambda: zipped({"archive/version": b"3\n"}), "zip archive, but not a checkpoint"),
    "a pickle elsewhere": (lambda: zipped({"data.pkl": pickle.dumps({})}), "zip archive, but not a checkpoint"),
    "a plain pickle": (lambda: pickle.dumps({"model": [1.0]}), "torch before 1.6"),
    "a pickle of protocol 0": (lambda: pickle.dumps({"model": [1.0]}, 0), "is a text file"),
    "an ONNX model": (onnx_model, "is not a checkpoint (unknown format"),
    "a page": (lambda: b"<!DOCTYPE html>\n<html>404</html>\n", "is a text file ('<!DOCTYPE html>"),
    "a page in Chinese": (lambda: "<p>未找到文件</p>\n".encode() * 40, "is a text file ('<p>未找"),
    "a model YAML": (lambda: b"nc: 80\ndepth_multiple: 0.33\n", "is a text file ('nc: 80"),
    "an image": (lambda: b"\xff\xd8\xff\xe0" + bytes(600), "is not a checkpoint (unknown format"),
    "arrays": (lambda: zipped({"rows.npy": b"\x93NUMPY"}), "zip archive, but not a checkpoint"),
    "zeros": (lambda: bytes(5000), "is not a checkpoint (unknown format"),
}


@pytest.mark.parametrize(("make", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_files_of_another_kind_are_refused(tmp_path, make, reason, refusal):
    path = tmp_path / "renamed.pt"
    path.write_bytes(make())
    message = refusal(read_weights, path)
    assert message.startswith(f"{path}: ") and reason in message


def with_model(**changes):
    """Returns a change of a checkpoint that sets or, with None, removes parts of its state dict."""

    def change(checkpoint: dict) -> None:
        for key, tensor in changes.items():
            if tensor is None:
                del checkpoint["model"][key]
            else:
                checkpoint["model"][key] = tensor

    return change


def without(key: str):
    return lambda checkpoint: checkpoint.pop(key)


def nan_at(key: str):
    def change(checkpoint: dict) -> None:
        checkpoint["model"][key] = checkpoint["model"][key].clone()
        checkpoint["model"][key].flatten()[-1] = float("nan")

    return change


WRONG = {  # parts that no command can do without, or that spoil all
    "no weights": (without("model"), "the checkpoint has no 'model'"),
    "no architecture": (without("yaml"), "the checkpoint has no 'yaml'"),
    "no names": (without("names"), "the checkpoint has no 'names'"),
    "no number of classes": (without("nc"), "the checkpoint has no 'nc'"),
    "no strides": (without("stride"), "the checkpoint has no 'stride'"),
    "no numbers": (nan_at(KEY), "NaN"),
    "no numbers in statistics": (nan_at(BN), "NaN"),
    "a list for a tensor": (with_model(**{KEY: [1.0, 2.0]}), "damaged"),
    "a number for a tensor": (with_model(**{KEY: 1.0}), "damaged"),
    "a list for the weights": (lambda checkpoint: checkpoint.update(model=[torch.zeros(3)]), "damaged"),
    "no strides that are numbers": (lambda checkpoint: checkpoint.update(stride=["a"]), "damaged"),
    "names that are no names": (lambda checkpoint: checkpoint.update(names=5), "damaged"),
}


def changed(path: Path, content: dict, change) -> Path:
    """Writes a checkpoint after a change of its content."""
    checkpoint = {**content, "model": dict(content["model"]), "yaml": dict(content["yaml"])}
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def another_state(checkpoint: dict) -> None:
    checkpoint["model"] = Model("yolov5n-slimneck.yaml", nc=4).state_dict()


def another_architecture(checkpoint: dict) -> None:
    checkpoint["yaml"] = Model("yolov5n-slimneck.yaml", nc=4).yaml


LESS, MORE = "1 tensors missing or of another shape, 0 unknown", "0 tensors missing or of another shape, 1 unknown"
WRONG |= {  # parts that do not fit the architecture beside them
    "a tensor less": (with_model(**{KEY: None}), LESS),
    "a tensor of another shape": (with_model(**{KEY: torch.zeros(16, 3, 6, 5)}), LESS),
    "a single number": (with_model(**{KEY: torch.tensor(0.5)}), LESS),
    "an empty tensor": (with_model(**{KEY: torch.zeros(0)}), LESS),
    "a tensor more": (with_model(extra=torch.zeros(3)), MORE),
    "a number for a key": (lambda checkpoint: checkpoint["model"].update({7: torch.zeros(3)}), f"{MORE}, such as 7"),
    "another model's weights": (another_state, "do not fit their own"),
    "another model's architecture": (another_architecture, "do not fit their own"),
    "an empty architecture": (lambda checkpoint: checkpoint.update(yaml={}), "a model YAML needs nc, "),
    "an architecture of text": (lambda checkpoint: checkpoint["yaml"].update(backbone="none"), "backbone"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_parts_are_refused(tmp_path, content, change, reason, refusal):
    path = changed(tmp_path / "wrong.pt", content, change)
    message = refusal(read_model, path)
    assert str(path) in message and reason in message


@pytest.mark.parametrize("script", [train, val, detect], ids=lambda script: script.__name__)
def test_every_command_refuses_them_in_the_same_words(tmp_path, command, data, content, script):
    (tmp_path / "page.pt").write_bytes(FOREIGN["a page"][0]())
    files = [(tmp_path / "page.pt", FOREIGN["a page"][1])]
    for name in ("no architecture", "no numbers", "a list for a tensor", "a tensor less"):
        change, reason = WRONG[name]
        files.append((changed(tmp_path / f"{name}.pt", content, change), reason))
    if script is train:
        files.pop()  # it takes over what fits
    line = ["--img", 64, "--device", "cpu", "--project", tmp_path / "runs"]
    line += (
        ["--source", data.parent / "images" / "val"]
        if script is detect
        else ["--data", data, "--workers", 0, "--noplots"]
    )
    for path, reason in files:
        command(script, *line, "--weights", path).assert_refused(str(path), reason)
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_kinds_of_floating_numbers_are_read_right(tmp_path, content, dtype):
    def change(checkpoint: dict) -> None:
        floating = {key: value.to(dtype) for key, value in checkpoint["model"].items() if value.is_floating_point()}
        checkpoint["model"] |= floating

    state = model_from(read_weights(changed(tmp_path / "other.pt", content, change))).state_dict()
    for key, expected in content["model"].items():
        torch.testing.assert_close(
            state[key], expected.to(dtype).to(expected.dtype) if expected.is_floating_point() else expected
        )
