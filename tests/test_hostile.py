"""Weights files made to run something: each is refused in one line, and a canary file shows that nothing ran.

The payloads are written opcode by opcode, so that they also hold what Python's own pickler would never write. Hostile
exports and model YAMLs are in test_hostile_models.py, hostile data in test_hostile_data.py.
"""

import contextlib
import copyreg
import gzip
import io
import os
import pickle
import shlex
import struct
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import detect
import export
import hubconf
import serve
import train
import val
from models.backends import load_backend
from models.experimental import attempt_load
from models.load import read_weights
from utils.checkpoint import load_checkpoint, strip_checkpoint
from utils.cli import run_command
from utils.errors import UserError
from utils.general import strip_optimizer
from utils.train.resume import load_resumable

EXTENSION_CODE = 240  # of copyreg's registry, free for private use
START, NEWER, STOP = b"\x80\x02", b"\x80\x04", b"."  # protocol 2 is torch's, 4 knows dotted names


def text(value: str | Path) -> bytes:
    return b"X" + struct.pack("<I", len(str(value).encode())) + str(value).encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def listed(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"l"


def filled(pairs: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


SYSTEM, EVAL = named(os.system.__module__, "system"), named("builtins", "eval")
GETATTR, LAYER = named("builtins", "getattr"), named("torch.nn.modules.linear", "Identity")


def payloads(canary: Path) -> dict[str, bytes]:
    """Values that create the canary when they are unpickled freely."""
    touch, write = text(f"touch {shlex.quote(str(canary))}"), text(f"open({str(canary)!r}, 'w').close()")
    words = listed(text("touch"), text(canary))
    posix = called(named("builtins", "__import__"), text("os"))
    inner = START + called(SYSTEM, touch) + STOP
    return {
        "system": called(SYSTEM, touch),
        "os.system": called(named("os", "system"), touch),
        "by the stack": called(stacked("os", "system"), touch),
        "eval": called(EVAL, write),
        "exec": called(named("builtins", "exec"), write),
        "eval of Python 2": called(named("__builtin__", "eval"), write),
        "open": called(named("builtins", "open"), text(canary), text("w")),
        "io.open": called(named("_io", "open"), text(canary), text("w")),
        "subprocess": called(named("subprocess", "check_output"), words),
        "map": called(named("builtins", "list"), called(named("builtins", "map"), EVAL, listed(write))),
        "partial": called(called(named("functools", "partial"), EVAL, write)),
        "method caller": called(
            called(named("operator", "methodcaller"), text("system"), touch),
            called(named("importlib", "import_module"), text("os")),
        ),
        "reduce in reduce": called(called(GETATTR, posix, text("system")), touch),
        "run_path": called(named("runpy", "run_path"), text(canary.with_name("hubconf.py"))),
        "torch.hub.load": called(named("torch.hub", "_load_local"), text(canary.parent), text("custom")),
        "pickle in pickle": called(named("_pickle", "loads"), b"C" + bytes([len(inner)]) + inner),
        "torch.load": called(named("torch.serialization", "_legacy_load"), *legacy_arguments(inner)),
        "path": called(named("pathlib", "Path.touch"), called(named("pathlib", "PosixPath"), text(canary))),
        "by way of blocks": called(named("models.common", "torch.os.system"), touch),
        "by way of models": called(named("models.yolo", "torch.os.system"), touch),
        "by way of torch": called(named("torch.nn.modules.module", "torch.os.system"), touch),
        "instance": b"(" + touch + b"i" + f"{os.system.__module__}\nsystem\n".encode(),
        "object": b"(" + SYSTEM + touch + b"o",
        "new object": b"(" + named("subprocess", "Popen") + words + b"o",
        "extension": b"\x82" + bytes([EXTENSION_CODE]) + b"(" + touch + b"tR",
        "extension of two bytes": b"\x83" + struct.pack("<H", EXTENSION_CODE) + b"(" + touch + b"tR",
        "extension of four bytes": b"\x84" + struct.pack("<i", EXTENSION_CODE) + b"(" + touch + b"tR",
        "memo": SYSTEM + b"q\x05" + b"0" + b"h\x05(" + touch + b"tR",
        "far memo": SYSTEM + b"r\xff\xff\x00\x00" + b"0" + b"j\xff\xff\x00\x00(" + touch + b"tR",
        "memo in text": SYSTEM + b"p77\n0g77\n(" + touch + b"tR",
        "frame": b"\x95" + struct.pack("<Q", 4) + b"N0N0" + called(SYSTEM, touch),
        "state": called(named("collections", "OrderedDict")) + filled({"__setstate__": EVAL}) + b"b" + write + b"b",
        "state of a layer": called(LAYER) + filled({"__setstate__": EVAL}) + b"b" + write + b"b",
        "item": called(named("collections", "OrderedDict")) + text("a") + called(SYSTEM, touch) + b"s",
        "key": b"}" + called(SYSTEM, touch) + b"Ns",
        "popped": called(SYSTEM, touch) + b"0N",
        "doubled": SYSTEM + b"2(" + touch + b"tR0",
    }


def legacy_arguments(inner: bytes) -> tuple[bytes, ...]:
    """What torch's old reader takes to unpickle bytes: a file, no device, Python's pickle."""
    file = called(named("_io", "BytesIO"), b"C" + bytes([len(inner)]) + inner)
    return file, b"N", called(named("builtins", "__import__"), text("pickle"))


SHAPES = {  # where in a file a value may stand
    "the whole": lambda value: value,
    "model": lambda value: filled({"epoch": b"K\x01", "model": value, "ema": b"N"}),
    "options": lambda value: filled({"epoch": b"K\x01", "model": called(LAYER), "opt": filled({"data": value})}),
    "state dict": lambda value: filled({"model.0.conv.weight": value}),
    "optimizer": lambda value: filled(
        {
            **{"format": text("yolov5-slim"), "format_version": b"K\x01", "model": b"}", "names": b"}"},
            "optimizer": filled({"state": filled({"0": filled({"momentum_buffer": value})})}),
        }
    ),
}
READERS = {"weights": read_weights, "checkpoint": load_checkpoint}


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that exists once anything ran; beside it lies a script that would make it, too."""
    path = tmp_path / "canary"
    (tmp_path / "hubconf.py").write_text(f"open({str(path)!r}, 'w').close()\ndef custom():\n    return 1\n")
    return path


@pytest.fixture
def extension():
    """A number that stands for os.system in pickles, as a library of the user's may have agreed on."""
    copyreg.add_extension(os.system.__module__, "system", EXTENSION_CODE)
    yield
    copyreg.remove_extension(os.system.__module__, "system", EXTENSION_CODE)


def torch_zip(path: Path, pickled: bytes, folder: str = "archive") -> Path:
    """Writes what torch.save would, around any bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", "little")
        archive.writestr(f"{folder}/version", "3\n")
    return path


def test_the_payloads_are_live(canary, extension):
    """Otherwise the other tests would show nothing: unpickled freely, every one of them creates the file."""
    for name, payload in payloads(canary).items():
        for start in (START, NEWER):
            with contextlib.suppress(Exception):  # what comes after the file was made does not matter
                pickle.loads(start + payload + STOP)
        for _ in range(200 if name == "new object" else 0):  # that one does not wait for its process
            if canary.exists():
                break
            time.sleep(0.02)
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [START, NEWER])
def test_pickles_are_refused_wherever_the_payload_stands(tmp_path, canary, extension, shape, start):
    for name, payload in payloads(canary).items():
        path = torch_zip(tmp_path / "evil.pt", start + SHAPES[shape](payload) + STOP)
        for reader in READERS.values():
            with pytest.raises(UserError, match="evil.pt: ") as caught, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, of pickles in other protocols
                reader(path)
            assert len(str(caught.value).splitlines()) == 1
            assert not canary.exists(), f"{name} ran"


def in_zip(path: Path, pickled: bytes) -> None:
    inner = torch_zip(path.with_name("inner.pt"), pickled)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "best.pt")


def in_tar(path: Path, pickled: bytes) -> None:
    """The format of torch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))


def in_legacy_file(path: Path, pickled: bytes) -> None:
    """The format of torch before 1.6: a number, a version, the system, the object, the storages."""
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))


def twice(path: Path, pickled: bytes, first: bytes = START + b"}.") -> None:
    """Two members of one name: which one is read?"""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for content in (first, pickled):
            archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")


def in_capitals(path: Path, pickled: bytes) -> None:
    torch_zip(path, START + b"}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.PKL", pickled)


def in_two_folders(path: Path, pickled: bytes) -> None:
    torch_zip(path, START + b"}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickled)


def two_directories(path: Path, pickled: bytes) -> None:
    """A list of members where readers look that go by its place, another where those look that go by the number."""
    harmless, evil = (torch_zip(path.with_name("part.zip"), part).read_bytes() for part in (START + b"}.", pickled))
    path.write_bytes(evil[:-22] + harmless[:-22] + evil[-22:])


CONTAINERS = {
    "zip": in_zip,
    "tar": in_tar,
    "legacy": in_legacy_file,
    "raw": lambda path, pickled: path.write_bytes(pickled),
    "raw, in text": lambda path, pickled: path.write_bytes(pickled.removeprefix(START)),
    "gzip": lambda path, pickled: path.write_bytes(gzip.compress(pickled)),
    "twice": twice,
    "twice, evil first": lambda path, pickled: twice(path, START + b"}.", first=pickled),
    "in capitals": in_capitals,
    "two folders": in_two_folders,
    "two directories": two_directories,
    "text first": lambda path, pickled: path.write_bytes(b"#!/bin/sh\n" + torch_zip(path, pickled).read_bytes()),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["system", "eval"])
def test_pickles_are_refused_in_every_container(tmp_path, canary, container, name):
    path = tmp_path / "evil.pt"
    CONTAINERS[container](path, START + SHAPES["model"](payloads(canary)[name]) + STOP)
    for reader in READERS.values():
        with pytest.raises(UserError, match="evil.pt: "):
            reader(path)
    assert not canary.exists()


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a script's command line in this process; returns its exit status and what it said."""

    def run(script, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        status = run_command(script.main, script.build_parser())
        return status, "".join(capsys.readouterr())

    return run


PICTURES = str(Path(detect.__file__).parent / "data" / "images")
COMMANDS = {
    "train": (train, "--weights", "{}", "--data", "shapes.yaml", "--device", "cpu", "--project", "runs"),
    "resume": (train, "--resume", "{}"),
    "val": (val, "--weights", "{}", "--data", "shapes.yaml", "--device", "cpu", "--project", "runs"),
    "detect": (detect, "--weights", "{}", "--source", PICTURES, "--device", "cpu", "--project", "runs"),
    "export": (export, "--weights", "{}", "--include", "torchscript", "--device", "cpu"),
    "serve": (serve, "--weights", "{}", "--port", "0", "--device", "cpu"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("container", ["torch", "legacy"])
def test_commands_refuse_them(tmp_path, canary, command, name, container):
    path = tmp_path / "evil.pt"
    CONTAINERS.get(container, torch_zip)(path, START + SHAPES["model"](payloads(canary)["system"]) + STOP)
    script, *arguments = COMMANDS[name]
    status, said = command(script, *(argument.format(path) for argument in arguments))
    assert status == 1 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert "evil.pt: refused, for it holds pickled" in line or "torch before 1.6" in line
    assert not canary.exists()


CALLS = {
    "hub": lambda path: hubconf.custom(path, device="cpu"),
    "hub, by name": lambda path: torch.hub.load(str(Path(hubconf.__file__).parent), "custom", path, source="local"),
    "attempt_load": attempt_load,
    "attempt_load of several": lambda path: attempt_load([path, path]),
    "load_backend": load_backend,
    "strip_checkpoint": strip_checkpoint,
    "strip_optimizer": strip_optimizer,
    "strip_optimizer to a copy": lambda path: strip_optimizer(path, path.with_name("copy.pt")),
    "resume": load_resumable,
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_refuse_them(tmp_path, canary, name):
    path = torch_zip(tmp_path / "evil.pt", START + SHAPES["model"](payloads(canary)["eval"]) + STOP)
    before = path.read_bytes()
    with pytest.raises(UserError, match="evil.pt: refused"):
        CALLS[name](path)
    assert not canary.exists()
    assert path.read_bytes() == before and not (tmp_path / "copy.pt").exists()
