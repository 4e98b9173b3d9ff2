"""Checkpoint files: plain data alone goes in, nothing runs on the way out, and a failed write loses nothing."""

import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from utils.checkpoint import (
    ForeignPickle,
    load_checkpoint,
    plain_data,
    read_archive,
    save_checkpoint,
    strip_checkpoint,
)
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def example() -> dict:
    weights = {"a.weight": torch.randn(3, 4), "a.count": torch.tensor(7)}
    return {
        "epoch": 3,
        "best_fitness": 0.25,
        "model": weights,
        "ema": {key: tensor + 1 for key, tensor in weights.items()},
        "updates": 12,
        "optimizer": {"state": {"a.weight": {"momentum_buffer": torch.randn(3, 4)}}, "groups": [{"lr": 0.01}]},
        "scaler": {},
        "schedule": {"iteration": 5},
        "stopper": {"best": 0.25},
        "generators": {"torch": torch.get_rng_state()},
        "spent": {"seconds": 2.5, "watt_hours": {"cpu": 1.0}},
        "yaml": {"nc": 1, "backbone": [[-1, 1, "Conv", [8]]]},
        "names": {0: "cell"},
    }


def test_what_was_saved_is_read_back(tmp_path):
    checkpoint = example()
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    read = load_checkpoint(tmp_path / "last.pt")
    assert (read.pop("format"), read.pop("format_version")) == ("yolov5-slim", 1)
    assert (read.pop("yaml"), read.pop("names")) == (checkpoint.pop("yaml"), checkpoint.pop("names"))
    torch.testing.assert_close(read, checkpoint, rtol=0, atol=0)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_relatives_of_plain_data_become_plain():
    class Text(str):
        pass

    parameter = torch.nn.Parameter(torch.ones(2))
    got = plain_data({"a": np.float64(0.5), Text("b"): Path("x", "y"), "c": (Text("t"), True)})
    assert got == {"a": 0.5, "b": str(Path("x", "y")), "c": ("t", True)}
    assert [type(value) for value in (got["a"], got["c"][0], got["c"][1])] == [float, str, bool]
    assert type(plain_data(OrderedDict(a=1))) is dict
    assert not plain_data([parameter])[0].requires_grad


def test_other_objects_are_refused_with_their_place(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['opt'\]\['f'\]\[1\] is a Linear"):
        save_checkpoint(tmp_path / "a.pt", {"opt": {"f": [1, torch.nn.Linear(1, 1)]}})
    assert not list(tmp_path.iterdir())


def test_stripping_keeps_the_average_in_float16(tmp_path):
    path, checkpoint = tmp_path / "best.pt", example()
    checkpoint["ema"]["a.large"] = torch.tensor([1e6, 2.0])
    save_checkpoint(path, checkpoint)
    strip_checkpoint(path)
    stripped = load_checkpoint(path)
    assert stripped["epoch"] == -1
    gone = ("best_fitness", "ema", "updates", "optimizer", "scaler", "schedule", "stopper", "generators", "spent")
    assert all(stripped[key] is None for key in gone)
    assert torch.equal(stripped["model"]["a.weight"], checkpoint["ema"]["a.weight"].half())
    assert stripped["model"]["a.count"].dtype == torch.int64
    assert torch.equal(stripped["model"]["a.large"], checkpoint["ema"]["a.large"])  # float16 ends at 65504
    assert (stripped["names"], stripped["yaml"]) == (checkpoint["names"], checkpoint["yaml"])
    strip_checkpoint(path)
    assert torch.equal(load_checkpoint(path)["model"]["a.weight"], stripped["model"]["a.weight"])


def test_eight_threads_read_pickles_of_different_classes_at_once(tmp_path):
    """torch keeps the names that it lets through for the whole process: one thread must not see another's."""
    kinds = [type(f"Kind{i}", (), {"__module__": "models.common"}) for i in range(4)]
    for i, kind in enumerate(kinds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("models.common." + kind.__name__, kind, raising=False)
            torch.save([kind() for _ in range(20)], tmp_path / f"{i}.pt", pickle_protocol=2)
    stub = type("Stub", (), {})
    start, failures = threading.Barrier(8), []

    def read(number):
        start.wait()
        for _ in range(5):
            try:
                with pytest.raises(ForeignPickle, match=f"models.common.Kind{number}"):
                    load_checkpoint(tmp_path / f"{number}.pt")
                content = read_archive(tmp_path / f"{number}.pt", {f"models.common.Kind{number}": stub})
                assert {type(item) for item in content} == {stub}
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=read, args=(number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]


def test_torchs_advice_to_let_a_file_run_code_is_not_passed_on(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name, data in members.items():
            a_list_with_attributes = b"\x80\x02]}b."
            archive.writestr(name, a_list_with_attributes if name.endswith("data.pkl") else data)
    with pytest.raises(
        UserError, match="a.pt: cannot be read as a checkpoint.*more than tensors and plain data"
    ) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert not re.search("weights_only|safe_globals|trust", str(caught.value)), caught.value


FULL_DISK = """
import resource, signal, sys, torch
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save_checkpoint(sys.argv[1], {"model": {"w": torch.zeros(100_000)}})
except UserError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.skipif(os.name == "nt", reason="limits on file size are POSIX")
def test_the_former_checkpoint_survives_a_full_disk(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, example())
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.stderr.startswith(f"refused: {path}: cannot be written"), done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_only_names_with_a_stub_are_opened(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"when": PurePosixPath("x"), "layer": torch.nn.ReLU()}, path)
    with pytest.raises(ForeignPickle, match="torch.nn.modules.activation.ReLU") as caught:
        read_archive(path, {name: str for name in ("pathlib.PurePosixPath", "pathlib._local.PurePosixPath")})
    assert caught.value.names == ["torch.nn.modules.activation.ReLU"]


def write_legacy(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def write_truncated(path: Path) -> None:
    torch.save({"model": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_broken_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00(X\x05")
        archive.writestr("archive/version", "3\n")


FILES = {
    "is empty": lambda path: path.write_bytes(b""),
    r"is a text file \('version https": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "torch before 1.6": write_legacy,
    "torch before 1.6, which": lambda path: path.write_bytes(pickle.dumps({"model": 1})),
    "is cut short": write_truncated,
    "zip archive, but not a checkpoint": write_zip,
    "damaged or of another kind": write_broken_pickle,
    "unknown format": lambda path: path.write_bytes(b"\0\1\2\3" * 100),
    "no checkpoint of this program": lambda path: torch.save({"w": torch.zeros(1)}, path),
    "format 99, this program reads 1": lambda path: torch.save({"format": "yolov5-slim", "format_version": 99}, path),
}


@pytest.mark.parametrize("message", FILES)
def test_files_of_other_kinds_are_told_apart(tmp_path, message):
    path = tmp_path / "weights.pt"
    FILES[message](path)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent.pt: cannot be read \(No such file"):
        load_checkpoint(tmp_path / "absent.pt")
