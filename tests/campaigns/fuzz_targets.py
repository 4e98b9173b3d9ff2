"""What `fuzz.py` feeds: every reader of files and option texts that people get from strangers.

A target has valid seeds, words of its format, and a probe, which hands one input to the reader as the program does.
The probe returns whether the reader accepted the input, lets its refusal (`UserError`, `ImageError`) through, and
raises `AssertionError` where an accepted value breaks what its documentation states.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.campaigns import fuzz_seeds as seeds
from tests.campaigns.fuzz_mutators import NUMBERS, Mutator, mutate_archive, mutate_image, mutate_text, mutate_zip
from utils.archives import list_members, unpack
from utils.cli import number
from utils.dataloaders import config as data_spec
from utils.dataloaders.labels import ParsedLabels, read_cache, read_label_file
from utils.dataloaders.paths import list_images
from utils.errors import UserError, check_img_size
from utils.files import read_yaml
from utils.images import ImageError, check_image, decode_image, image_info
from utils.media.counting import Counter
from utils.media.sources import files_of_list, is_live, live_inputs, read_list
from utils.tiles import Tiling, windows
from utils.tools.convert import convert_coco, convert_visdrone, convert_voc
from utils.train.hyp import Hyp

REFUSALS = (UserError, ImageError)
NAMES = {0: "cat", 1: "dog", 2: "a b"}


class Target(NamedTuple):
    """A reader under test."""

    probe: Callable[[bytes, Path], bool]  # the input and an empty folder of the target's own
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...]
    mutate: Mutator = mutate_text
    longest: int = 400  # bytes; short inputs are tried sooner
    modules: tuple[str, ...] = ()  # imported by the probe alone, since they need torch


# Labels ---------------------------------------------------------------------------------------------------------------


def probe_labels(data: bytes, folder: Path) -> bool:
    """Reads a label file: finite rows in 0 to 1, whole classes, one polygon a row, none twice."""
    path = folder / "labels.txt"
    path.write_bytes(data)
    labels = read_label_file(path)
    check_labels(labels)
    if labels.problems:
        for problem in labels.problems:
            assert problem.reason and problem.line >= 0  # 0: the file as a whole
        raise UserError(labels.problems[0].reason)
    return True


def check_labels(labels: ParsedLabels | None) -> None:
    """Holds a parsed label file against its documentation."""
    assert labels is not None
    rows = labels.rows
    assert rows.dtype == np.float32 and rows.ndim == 2 and rows.shape[1] == 5
    assert np.isfinite(rows).all() and (rows[:, 1:] >= 0).all() and (rows[:, 1:] <= 1).all()
    assert (rows[:, 0] >= 0).all() and (rows[:, 0] % 1 == 0).all()
    assert len(labels.polygons) == len(rows) == len({row.tobytes() for row in rows})
    for polygon in labels.polygons:
        assert polygon.dtype == np.float32 and polygon.ndim == 2 and polygon.shape[1] == 2
        assert len(polygon) == 0 or (len(polygon) >= 3 and np.isfinite(polygon).all())


# YAML -----------------------------------------------------------------------------------------------------------------


def _yaml_file(data: bytes, folder: Path) -> Path:
    path = folder / "input.yaml"
    path.write_bytes(data)
    return path


def probe_yaml(data: bytes, folder: Path) -> bool:
    """Reads any YAML file: plain data, not deep."""
    _check_plain(read_yaml(_yaml_file(data, folder)), 0)
    return True


def _check_plain(value: object, depth: int) -> None:
    assert depth <= 200
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, depth + 1)
            _check_plain(item, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _check_plain(item, depth + 1)
    else:
        kind = type(value).__module__
        assert kind in ("builtins", "datetime"), f"a {type(value).__qualname__} of {kind} came out"


def _obtain_nothing(*_: object, **__: object) -> bool:
    """Stands in for fetching, rendering and converting: a fuzzed description must not fill the disk."""
    raise UserError("nothing is fetched here")


def probe_data_yaml(data: bytes, folder: Path) -> bool:
    """Reads a data set YAML whose folders exist: names in order, absolute paths."""
    (folder / "train").mkdir(exist_ok=True)
    original, data_spec.obtain = data_spec.obtain, _obtain_nothing
    try:
        spec = data_spec.load_spec(_yaml_file(data, folder), need=("train",), download=True)
    finally:
        data_spec.obtain = original
    assert list(spec.names) == list(range(spec.nc)) and spec.nc >= 1
    assert all(isinstance(name, str) and name.strip() for name in spec.names.values())
    assert all(path.is_absolute() for path in (*spec.train, *spec.val, *spec.test)) and spec.train
    return True


BUILT_AT_MOST = 100_000_000  # parameters and statistics; larger models are only outlined, since they may be that large


def probe_model_yaml(data: bytes, folder: Path) -> bool:
    """Builds a small model: one stride and one row of anchors a level, all finite."""
    import torch

    from models.config import numbers_of
    from models.yolo import Model

    path = _yaml_file(data, folder)
    with torch.device("meta"):
        outline = Model(path)
    if numbers_of(outline) > BUILT_AT_MOST:
        return True
    with torch.random.fork_rng(devices=[]):
        model = Model(path)
    assert torch.equal(model.stride, outline.stride)
    assert model.nc >= 1 and len(model.names) == model.nc
    assert len(model.stride) == model.head.nl and bool((model.stride > 0).all())
    assert bool(torch.isfinite(model.head.anchors).all())
    return True


def probe_hyp_yaml(data: bytes, folder: Path) -> bool:
    """Reads hyperparameters: finite numbers that come out as they went in, and gains that stay finite."""
    hyp = Hyp.from_yaml(_yaml_file(data, folder))
    values = hyp.to_dict()
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())
    assert Hyp.from_dict(values) == hyp
    return True


# Checkpoints, caches, archives ----------------------------------------------------------------------------------------


def probe_checkpoint(data: bytes, folder: Path) -> bool:
    """Reads a weights file, ours or an original one, and builds its model: tensors, and names for all classes."""
    import torch

    from models.load import model_from, read_weights

    path = folder / "weights.pt"
    path.write_bytes(data)
    weights = read_weights(path)
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.state_dict.values())
    assert list(weights.names) == list(range(weights.nc))
    with torch.random.fork_rng(devices=[]):
        model_from(weights)
    return True


def probe_cache(data: bytes, folder: Path) -> bool:
    """Reads a label cache: None, or a table in which every image's labels can be had and are in range."""
    path = folder / "labels.cache.npz"
    path.write_bytes(data)
    table = read_cache(path, seeds.CACHE_KEY)
    if table is None:
        return False
    for index, image in enumerate(table.image_paths):
        assert isinstance(image, str)
        rows, polygons = table.labels(index), table.segments(index)
        assert len(rows) == len(polygons) and np.isfinite(rows).all()
        assert (rows >= 0).all() and (rows[:, 1:] <= 1).all() and (rows[:, 0] % 1 == 0).all()
        assert all(np.isfinite(polygon).all() for polygon in polygons)
    assert (table.sizes_wh >= 1).all() and str(table.counts) and min(table.counts) >= 0
    assert len(table.subset(np.arange(len(table)))) == len(table)
    return True


UNPACKED_AT_MOST = 1 << 20  # bytes; larger ones are only listed


def probe_archive(data: bytes, folder: Path) -> bool:
    """Lists an archive and unpacks a small one: nothing appears outside its folder, nothing but files and folders."""
    path, inside = folder / "archive", folder / "inside"
    path.write_bytes(data)
    members = list_members(path)
    for member in members:
        assert not os.path.isabs(member.name) and ".." not in member.name.split("/") and member.size >= 0
    if sum(member.size for member in members) > UNPACKED_AT_MOST:
        return True
    try:
        names = unpack(path, inside)
        assert not any(entry.is_symlink() for entry in inside.rglob("*"))
        assert all((inside / name).exists() for name in names)
    finally:
        shutil.rmtree(inside, ignore_errors=True)
        left = [entry.name for entry in folder.iterdir() if entry.name != "archive"]
        assert not left, f"{left} appeared outside the folder"
    return True


# Images ---------------------------------------------------------------------------------------------------------------


def probe_image(data: bytes, folder: Path) -> bool:
    """Reads an image's header, looks it through and decodes it: uint8, 3 channels, as large as the header says."""
    info = image_info(data)
    assert info.width >= 1 and info.height >= 1 and info.format
    path = folder / "image"
    path.write_bytes(data)
    with contextlib.suppress(ImageError):
        assert check_image(path)[:2] == info[:2]
    image = decode_image(data)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.flags.c_contiguous
    assert image.shape == (info.height, info.width, 3), f"{image.shape} is not {info}"
    return True


# Annotations of other kinds -------------------------------------------------------------------------------------------


def converting(convert: Callable, annotation: str, image: str, listed: str = "") -> Callable[[bytes, Path], bool]:
    """Returns a probe that converts an annotation file beside an image; the labels that come out must be readable."""

    def probe(data: bytes, folder: Path) -> bool:
        if not (folder / annotation).exists():
            for name, content in {annotation: b"", image: seeds.image("png"), listed: b"a\n"}.items():
                if name:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(content)
        (folder / annotation).write_bytes(data)
        before = set(folder.rglob("*"))
        try:
            count = convert(folder, NAMES)
            for path in folder.rglob("labels/**/*.txt"):
                labels = read_label_file(path)
                check_labels(labels)
                assert not labels.problems, labels.problems[0]
            return count > 0
        finally:
            for path in set(folder.rglob("*")) - before:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)

    return probe


# Options and lists ----------------------------------------------------------------------------------------------------


def probe_options(data: bytes, _: Path) -> bool:
    """Reads `--count`, or `--imgsz`, or `--tile` and `--tile-overlap`, from words of a text."""
    kind, _, value = data.decode(errors="surrogateescape").partition(" ")
    if kind == "imgsz":
        sides = check_img_size([_parsed(int, 1, None, word) for word in value.split()] or [1], 32)
        assert all(side % 32 == 0 and side > 0 for side in sides)
    elif kind == "tile":
        size, _, overlap = value.partition(" ")
        tiling = Tiling(_parsed(int, 32, None, size), _parsed(float, 0, 0.9, overlap or "0.2"))
        tiles = windows(480, 640, tiling)
        assert tiles.dtype == np.int64 and (tiles >= 0).all() and tiles[-1].tolist() == [0, 0, 640, 480]
    else:
        assert Counter.parse([value]).summary() == []
    return True


def _parsed(kind: type, minimum: float, maximum: float | None, text: str) -> float:
    try:
        return number(kind, minimum, maximum)(text)
    except (argparse.ArgumentTypeError, ValueError) as error:  # argparse makes usage errors of them
        raise UserError(str(error)) from error


def probe_lists(data: bytes, folder: Path) -> bool:
    """Reads a list of sources and a list of a data set's images; nothing is opened that they name."""
    path = folder / "list.txt"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        assert all(os.path.isabs(image) for image in list_images([path]))
    entries = read_list(path)
    live = [entry for entry in entries if is_live(entry)]
    names = [one.name for one in live_inputs(live)]
    assert len(set(names)) == len(live) and not any("/" in name or ".." in name for name in names)
    files_of_list(str(path), [entry for entry in entries if entry not in live])
    return True


# The table ------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, Target] = {
    "labels": Target(probe_labels, seeds.labels, (*NUMBERS, *seeds.SPACES, b"1.00005", b"-0.00005", b"0 .5 .5 1 1\n")),
    "yaml": Target(probe_yaml, seeds.yamls, (*seeds.YAML_WORDS, *seeds.SPACES)),
    "data": Target(probe_data_yaml, seeds.data_yamls, (*seeds.YAML_WORDS, *seeds.DATA_WORDS, *seeds.SPACES)),
    "model": Target(
        probe_model_yaml, seeds.model_yamls, (*seeds.YAML_WORDS, *seeds.MODEL_WORDS), modules=("models.yolo",)
    ),
    "hyp": Target(
        probe_hyp_yaml,
        seeds.hyp_yamls,
        (*seeds.YAML_WORDS, b"lr0: ", b"anchors: ", b"copy_paste: ", b"fl_gamma: "),
        longest=1200,
    ),
    "checkpoint": Target(probe_checkpoint, seeds.checkpoints, seeds.PICKLE_WORDS, mutate_zip, 16384, ("models.load",)),
    "cache": Target(
        probe_cache, seeds.caches, seeds.words("'descr' 'fortran_order' 'shape' ( ) , |O <f4 True"), mutate_zip, 8192
    ),
    "image": Target(probe_image, seeds.images, seeds.IMAGE_WORDS, mutate_image, 4096),
    "archive": Target(probe_archive, seeds.archives, seeds.MEMBER_WORDS, mutate_archive, 8192),
    "coco": Target(
        converting(convert_coco, "annotations/instances_train.json", "train/a.png"),
        seeds.cocos,
        seeds.words('[ ] { } , : " null true NaN Infinity "../a" "a.png" "id": {} [[]]'),
        longest=600,
    ),
    "voc": Target(
        converting(convert_voc, "set/Annotations/a.xml", "set/JPEGImages/a.png", "set/ImageSets/Main/train.txt"),
        seeds.vocs,
        (*seeds.XML_WORDS, *seeds.SPACES),
        longest=600,
    ),
    "visdrone": Target(
        converting(convert_visdrone, "set/annotations/a.txt", "set/images/a.png"),
        seeds.visdrones,
        (*NUMBERS, *seeds.SPACES, b",", b",,", b"\n1,1,1,1,1,1"),
    ),
    "options": Target(
        probe_options, seeds.options, (*NUMBERS, *seeds.SPACES, b"count ", b"imgsz ", b"tile ", b",", b"-")
    ),
    "lists": Target(
        probe_lists,
        seeds.lists,
        (*seeds.words(":// rtsp:// http:// @ [ ] ~ ~x ./ .. \\ .jpg .png screen ? # %00 youtu.be"), *seeds.SPACES),
    ),
}
