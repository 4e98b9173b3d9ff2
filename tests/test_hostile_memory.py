"""Weights files that run nothing and are small, but would fill the memory, or whose parts are of the wrong kind."""

import zipfile
from pathlib import Path

import pytest
import torch

import models.yolo
from models.load import read_weights
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError


def empty_archive(path: Path) -> Path:
    """Writes a file of torch's that holds an empty dict."""
    torch.save({}, path)
    return path


def own(**changes) -> dict:
    content = {"model": {"a": torch.zeros(2)}, "ema": None, "yaml": {"nc": 1}, "names": {0: "a"}, "nc": 1}
    return {**content, "stride": [8], "format": "yolov5-slim", "format_version": 1, **changes}


def repeated(levels: int) -> list:
    """Ten times itself at each level: little to store, without bounds to walk through or print."""
    value: list = []
    for _ in range(levels):
        value = [value] * 10
    return value


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def itself() -> dict:
    value: dict = {}
    value["again"] = value
    return value


EXPLODING = {  # content without any name to run, small in the file
    "repeated list": lambda: own(opt=repeated(30)),
    "repeated text": lambda: own(opt=["x" * 10_000] * 20_000),
    "nested list": lambda: own(yaml={"nc": nested(400)}),
    "itself": lambda: own(yaml=itself()),
    "wide tensor": lambda: own(model={"a": torch.zeros(1, dtype=torch.float16).expand(1 << 40)}),
    "tensor on meta": lambda: own(model={"a": torch.zeros(1 << 40, device="meta")}),
    "sparse tensor": lambda: own(model={"a": torch.sparse_coo_tensor([[0]], [1.0], [1 << 40])}),
    "optimizer": lambda: own(optimizer={"state": {"a": torch.zeros(1).expand(1 << 50)}}),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_files_that_would_fill_the_memory_are_refused(tmp_path, name):
    path = tmp_path / "bomb.pt"
    torch.save(EXPLODING[name](), path)
    assert path.stat().st_size < 200_000
    for reader in (read_weights, load_checkpoint):
        with pytest.raises(UserError, match="bomb.pt: refused, for") as caught:
            reader(path)
        assert len(str(caught.value)) < 1000


def test_a_wide_tensor_in_a_pickled_model_is_refused(tmp_path):
    layer = torch.nn.Linear(1, 1)
    detector = torch.nn.Sequential(layer)
    detector.model, detector.yaml = torch.nn.Sequential(layer), {"nc": 1}
    layer.weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float16).expand(1 << 20, 1 << 20))
    type_of = type("Detect", (torch.nn.Linear,), {"__module__": "models.yolo"})
    layer.__class__ = type_of
    path = tmp_path / "bomb.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.yolo, "Detect", type_of)
        torch.save({"model": detector}, path)
    with pytest.raises(UserError, match=r"bomb.pt: .*values of a tensor \(float16 \(1048576, 1048576\)"):
        read_weights(path)


def test_an_archive_of_zeros_is_refused_before_it_is_unpacked(tmp_path):
    path = empty_archive(tmp_path / "bomb.pt")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data/0", bytes(80 << 20))
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="bomb.pt: refused, for its .* bytes unpack to 8388"):
        read_weights(path)


DAMAGED = {
    "model": {"model": "text"},
    "tensor": {"model": {"a": "text"}},
    "names": {"names": ["a", "b"]},
    "class number": {"names": {"one": "a"}},
    "yaml": {"yaml": 5},
    "number of classes": {"nc": "many"},
    "stride": {"stride": 8},
    "steps": {"stride": ["a"]},
    "no model": {"model": None},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_checkpoints_whose_parts_are_of_the_wrong_kind_are_told(tmp_path, name):
    save_checkpoint(tmp_path / "odd.pt", own(**DAMAGED[name]))
    with pytest.raises(UserError, match="odd.pt: the checkpoint is damaged"):
        read_weights(tmp_path / "odd.pt")
