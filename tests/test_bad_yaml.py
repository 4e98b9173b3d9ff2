"""Bad YAML files, generated: every key of the three kinds of file with every kind of wrong value, and spoilt files.

Data set, hyperparameter and model YAMLs each have a valid file here, into which one mistake is put at a time. All end
soon in a message of at most three lines that names the file, what is wrong (with the line, for syntax) and the remedy.
"""

import itertools
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from models.config import CONFIG_KEYS
from models.yolo import BLOCKS, Model
from utils.dataloaders import config as obtain
from utils.dataloaders import config as spec
from utils.dataloaders.paths import list_images
from utils.errors import UserError
from utils.train.hyp import Hyp

SECONDS = 5  # of processor time a case may take
MAX_MESSAGE = 1500  # characters; where data is missing, nine folders are named
MIN_CASES = 2000
HYP_TEXT = (Path(train.ROOT) / "data" / "hyps" / "hyp.scratch-low.yaml").read_text(encoding="utf-8")
ROW = "[-1, 1, Conv, [16, 3, 2]]"  # row 2 of the model
FIELDS = {"from": "-1", "number": "1", "module": "Conv", "channels": "16", "kernel": "3", "stride": "2"}  # of ROW
BASES = {
    "data": {"path": "set", "train": "images/train", "val": "images/val", "test": "images/test"}
    | {"nc": "2", "names": "[cat, dog]", "kpt_shape": "[17, 3]", "download": None, "convert": None, "generate": None},
    "hyp": dict(re.findall(r"^(\w+): (\S+)", HYP_TEXT, re.MULTILINE))
    | {"anchors": "3", "mosaic9": "0.1", "label_smoothing": "0.1", "nominal_batch": "64", "box_loss": "ciou"}
    | {"optimizer": "SGD", "distill": "0.1", "af_box": "7.5", "af_cls": "0.5", "af_dfl": "1.5"}
    | {"warmup_ratio": "0.05", "ema_tau": "0.25", "close_mosaic": "0.1"},
    "model": {"nc": "1", "depth_multiple": "1.0", "width_multiple": "1.0", "anchors": "[[8, 16], [32, 64]]"}
    | {"backbone": f"[[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [8, 3, 2]], {ROW}]"}
    | {"head": "[[-1, 1, C3, [16]], [[1, 3], 1, Detect, [nc, anchors]]]"}
    | {"ch": "3", "inplace": "true", "activation": "nn.ReLU()", "channel_multiple": "8"},
}


class Case(NamedTuple):
    reader: str
    text: str | bytes
    said: str = ""  # what the message has beside the file's name; several parts are joined by " + "
    line: bool = False  # it names a line
    named: bool = True  # it names the file


def text_of(reader: str, **changes: str | None) -> str:
    """Returns the valid file with some keys' values replaced, or left out where None."""
    return "".join(f"{key}: {value}\n" for key, value in {**BASES[reader], **changes}.items() if value is not None)


def model_with(row: str) -> str:
    return text_of("model", backbone=BASES["model"]["backbone"].replace(ROW, row))


SIGNS = str.maketrans({"⏎": "\n", "⇥": "\t", "$": "[nc, anchors]"})  # in tables


def table(text: str) -> Iterator[list[str]]:
    """Yields the heads of lines `head | head | value ¦ value ...` with each value; indented lines go on."""
    heads: list[str] = []
    for line in text.strip("\n").splitlines():
        *own, values = line.strip().split(" | ")
        heads = own or heads
        yield from ([*heads, value.translate(SIGNS)] for value in values.split(" ¦ "))


KINDS = {"missing": None, "huge": "9" * 60, "endless": "9" * 400, "long text": "x" * 5000, "long list": str([0] * 400)}
PLAIN = r"""
null ¦ true ¦ [1, 2] ¦ [[[]]] ¦ !!set {a, b} ¦ {a: 1} ¦ -1 ¦ -.inf ¦ 1e400 ¦ .nan ¦ .inf ¦ !!binary AAEC/w==
2020-01-31 ¦ fast ¦ "a\nb\nc\nd\ne" ¦ "\e[2J\a\0" ¦ "\ud800" ¦ '0.5' ¦ '0,5' ¦ '  ' ¦ 50% ¦ ''
"""
KINDS |= {value: value for [value] in table(PLAIN)}
UNBOUNDED = (
    "lr0|lrf|weight_decay|nominal_batch|warmup_epochs|warmup_bias_lr|box|cls|cls_pw|obj|obj_pw|anchor_t|fl_gamma"
    "|distill|af_box|af_cls|af_dfl"
)
SHARES = "warmup_ratio|ema_tau|close_mosaic"
LEGAL = {  # reader and key, kind -> why what only looks wrong is taken
    r"data nc: (missing|null)": "the names count",
    r"data names: (missing|null)": "with nc alone the classes are called class0, class1, ...",
    r"data names: \[1, 2]": "a number is a name, too",
    r"data (convert|generate|download|kpt_shape): (missing|null)": "most data sets need none",
    r"data kpt_shape: \[1, 2]": "one keypoint of two numbers",
    rf"hyp ({UNBOUNDED}): huge": "no bound is right for every optimizer and schedule",
    rf"hyp (copy_paste|anchors|mosaic9|label_smoothing|nominal_batch|{SHARES}): missing": "younger than many files",
    r"hyp (box_loss|optimizer|distill|af_box|af_cls|af_dfl): missing": "the same",
    r"hyp anchors: null": "means as many as the model has",
    r"model (ch|inplace|activation|channel_multiple): missing": "have defaults",
    r"model activation: (null|\{a: 1})": "the default, and a block that is not there",
    r"model inplace: true": "is one",
    r"row from: -1": "counts from the row",
    r"row kernel: true": "the second argument of other blocks is one",
}


def crossed(legal: bool = False) -> Iterator[tuple[str, Case]]:
    places = [(reader, key) for reader, base in BASES.items() for key in base] + [("row", field) for field in FIELDS]
    for (reader, key), (kind, value) in itertools.product(places, KINDS.items()):
        name = f"{reader} {key}: {kind}"
        if legal != any(re.fullmatch(rule, name) for rule in LEGAL) or (reader == "row" and value is None):
            continue
        if reader == "row":
            fields = list({**FIELDS, key: value}.values())
            case = Case("model", model_with(f"[{', '.join(fields[:3])}, [{', '.join(fields[3:])}]]"), "row ")
        else:
            changes = {"path": "nowhere"} if key == "download" and not legal else {}
            said = "row" if key in ("backbone", "head") and kind in ("[1, 2]", "[[[]]]", "long list") else key
            case = Case(reader, text_of(reader, **changes, **{key: value}), said)
        yield name, case._replace(said="400 characters + Mend", line=True) if kind == "endless" else case


ADDED = r"""
Mend this line | ⇥x: 1 ¦ x:⏎⇥y: 1 ¦    x: 1 ¦ x: [1, 2 ¦ x: {a: 1 ¦ x: 1]⏎y: ] ¦ x: "1 ¦ x: a: b ¦ x = 1 ¦ x: @a
Mend this line | x: `a` ¦ %x: 1 ¦ x: "C:\data" ¦ ? [a, b]⏎: 1 ¦ ---⏎x: 1 ¦ x: 1⏎x: 2 ¦ x: !!python/name:os.system
Mend this line | x: !mine 1 ¦ x: |x ¦ x: 'it's' ¦ - 1 ¦ x: {a: 1, a: 2} ¦ <<: 5 ¦ x: ] ¦ x: } ¦ x: , ¦ x: * ¦ x: &
write the value out | x: &a [1]⏎y: *a ¦ y: *a ¦ x: &a {b: 1}⏎<<: *a ¦ x: &a [*a]
"""
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in itertools.pairwise("abcdefghij"))
DEEP = ["[" * 10_000, "[" * 10_000 + "]" * 10_000, "{a: " * 10_000, "\n " + "- " * 10_000, "\n " + "? " * 10_000]
WHOLE = r"""
Mend this line | [train]⏎lr0 = 0.01 ¦ <html lang='en'>⏎<title>x: y: z</title> ¦ <<<<<<< HEAD⏎x: 1
expected | # x ¦ --- ¦ - 1⏎- 2 ¦ fast ¦ 5 ¦ import os⏎os.remove('a') ¦ [] ¦ 'x' ¦ [path, train] ¦ null ¦ true
not a YAML file | 2020-99-99 ¦ !!int a ¦ !!bool a ¦ !!float x ¦ !!timestamp x
"""
BINARY = {
    "not a YAML file": [bytes(99), b"PK\3\4" + bytes(9), b"n\0c\0", b"x: \0", b"x: \x1b[2J", b"x: \x7f"],
    "encoding UTF-8": [b"\x89PNG\r\n\x1a\n\0", b"\x80\x02}q\x00.", bytes(range(256)), b"\xff\xd8\xff\xe0", b"\xc3"],
    "expected": [b"", b"\xef\xbb\xbf", b"\n\n"],
    "too large": [b"# " + b"x" * (2 << 20)],
}
CODECS = "utf-16 utf-16-le utf-16-be utf-32 latin-1 cp1252 cp437 cp037 mac-roman".split()


def spoilt() -> Iterator[tuple[str, Case]]:
    for reader in BASES:
        text = text_of(reader)
        added = [*table(ADDED), ("write the value out", BOMB), *(("64 levels", f"x: {piece}") for piece in DEEP)]
        for index, (said, piece) in enumerate(added):
            yield f"{reader} added: {index}", Case(reader, f"{text}{piece}\n", said, line=True)
        whole = [*table(WHOLE), ("", text[: len(text) // 2]), ("stands twice + Mend this line", text + text)]
        whole += [(said, content) for said, contents in BINARY.items() for content in contents]
        whole += [("encoding UTF-8", f"# é\n{text}".encode(codec)) for codec in CODECS]
        for index, (said, content) in enumerate(whole):
            yield f"{reader} whole: {index}", Case(reader, content, said, line="line" in said or "UTF-8" in said)


VALUES = r"""
data nc | nc + from 1 to 100000 | 100001 ¦ 2.0 ¦ '2' ¦ 0 ¦ true
data names | disagree. Mend one | [cat, dog, cow] ¦ {0: cat} ¦ [cat]
data names | is missing | {0: cat, 99999999999999999999999999999999999999: dog} ¦ {0: cat, 2: dog} ¦ {1: cat, 2: dog}
data names | twice | {0: cat, '00': dog} ¦ {0: cat, '0': dog} ¦ {0: cat, 0: dog}
data names | not a class id (0, 1, 2 | {2020-01-31: cat, 1: dog} ¦ {no: cat, yes: dog} ¦ {0: cat, null: dog} ¦ {-1: cat}
  {"a\nb\nc\nd": cat} ¦ {0.5: cat, 1: dog} ¦ {cat: 0}
data names | 'names:' + quotes | [cat, 2020-01-31] ¦ [cat, {dog: 1}] ¦ [cat, dog: 1] ¦ {0: cat, 1: } ¦ [cat, [dog]]
  [cat, null] ¦ [cat, ' '] ¦ [yes, no] ¦ [cat, '']
data names | 'names:' + Leave out | [cat, "\ud800"] ¦ [cat, "\e[2J"] ¦ [cat, "d\ng"] ¦ [cat, "\0"]
data names | must be a list | cat, dog ¦ [] ¦ {}
data kpt_shape | must be [keypoints, 2] | [17] ¦ [17, 3, 1] ¦ [17, 4] ¦ [17, 1] ¦ [-1, 2] ¦ [true, 2] ¦ [17.0, 3] ¦ 17
  [10001, 3] ¦ {17: 3} ¦ ['17', 3]
data path | 'path: | https://a.invalid/x ¦ set/images/train ¦ ~nobody-there/x ¦ picture.jpg ¦ /dev/null ¦ images ¦ ..
data val | 'val' + mend 'path:' | [images/val, images/nowhere] ¦ images/val, images/test ¦ images/nowhere ¦ images/*.jpg
  images/link ¦ images/pipe ¦ /dev/zero ¦ ~nobody/x ¦ /dev/tty
data val | 'val:' + name folders | [images/val, null] ¦ [images/val, 1] ¦ {a: images/val} ¦ [[images/val]]
data val | 'val:' + a folder of images, a list file | []
data val | No images + Image files end in | images/none ¦ picture.jpg ¦ binary.txt ¦ empty.txt ¦ words.txt ¦ a.yaml
data convert | convert + voc, coco, visdrone | [voc] ¦ yolo ¦ vco
data download | download | https://a.invalid/.bashrc ¦ "bash get.sh\n\nrm x\n\n" ¦ [https://a.invalid/x, sh] ¦ import os
  ftp://a.invalid/x.zip ¦ https://a.invalid/a b ¦ https://a.invalid/%00 ¦ https://a.invalid/.. ¦ file:///etc/passwd ¦ {}
  https://a.invalid/ ¦ data:text/plain,x ¦ 'http://[/x.zip' ¦ python get.py ¦ http:///x.zip ¦ bash get.sh ¦ /etc/passwd
  {file: x} ¦ rm -rf / ¦ C:\x.zip ¦ {url: 5} ¦ [null] ¦ {x: 1} ¦ x.zip ¦ [[]] ¦ 5
data source | download | dir: "../../a\nb\nc\nd" ¦ file: "a\nb\nc\nd" ¦ "a\nb\nc\nd": x ¦ file: .profile ¦ sha256: 12345
  dir: ../../x ¦ dir: 'C:/x' ¦ sha256: '0' ¦ file: ../x ¦ dir: /etc ¦ file: -rf ¦ dir: null ¦ x: 5
model nc | nc | 0x100000 ¦ 100001 ¦ 1.0 ¦ '1' ¦ 0
model depth_multiple | depth_multiple + 0 to 100 | -0.1 ¦ 101 ¦ 1e9
model width_multiple | width_multiple + to 100 | 1e-9 ¦ 101 ¦ 0
model ch | ch + from 1 | 1001 ¦ 2.5 ¦ [3] ¦ 0
model anchors | anchors | [[8, 16], [32, 64], [64, 96]] ¦ [[8, 16, 9], [32, 64, 9]] ¦ [[[8, 16]], [[32, 64]]] ¦ [[], []]
  [['8', '16'], [32, 64]] ¦ [[8, .nan], [32, 64]] ¦ [[8, .inf], [32, 64]] ¦ [[8, -16], [32, 64]] ¦ [[8, 16], [32, 1e7]]
  [[8, 16], {32: 64}] ¦ [[8, 0], [32, 64]] ¦ [[a, b], [c, d]] ¦ [[8, 16], [32]] ¦ [[8, 16], null] ¦ [[8], [32]] ¦ [[]]
  [[true, 16], [32, 64]] ¦ [[8, 16]] ¦ [8, 16] ¦ auto ¦ 101 ¦ 2.5 ¦ [] ¦ 0
model head | the last row must be Detect | [[[1, 2], 1, Detect, $], [1, 1, Conv, [8]]] ¦ [[[1, 2], 2, Detect, $]] ¦ []
model head | 2 rows of anchors for | [[[1, 1, 1, 2], 1, Detect, $]] ¦ [[[0, 1, 2], 1, Detect, $]] ¦ [[2, 1, Detect, $]]
model head | row 3 | [[[1, 2], 1, Detect, [nc, anchors, 1]]] ¦ [[[1, 2], 1, Detect, [anchors, nc]]]
  [[[1, 2], 1, Detect, [0, anchors]]] ¦ [[[1, 2], 1, Detect, [c, d]]] ¦ [[[1, 2], 1, Detect, [nc]]]
model head | write nc there | [[[1, 2], 1, Detect, [7, anchors]]]
"""
MISSPELT = "data path paht, data train trian, data train Train, data val valid, data val vall, data names nams, "
MISSPELT += (
    "model backbone bakcbone, model head haed, model activation activaton, model channel_multiple chanel_multiple"
)
ABOVE = {"degrees": "181", "shear": "90", "perspective": "0.011", "anchors": "100.5"}  # for the other keys 1.5
ENDS = "lr0 0, cls_pw 0, obj_pw 0.0, anchor_t 1, momentum 1, scale 1.0, label_smoothing 1, lrf -1e-9, mosaic 1.0000001"
ENDS += ", nominal_batch 0.5"
UNKNOWN = ["1", "null", "true", "2020-01-31", "!!binary AAEC", r'"a\nb\nc\nd"', "x" * 5000, "nbs", "lr_0", r'"\e[2J"']


def values() -> Iterator[tuple[str, Case]]:
    for place, said, value in table(VALUES):
        reader, key = place.split()
        changes = {"path": "nowhere"} if key in ("download", "source") else {}
        changes |= {"download": f"{{url: https://a.invalid/x.zip, {value}}}"} if key == "source" else {key: value}
        yield f"{place}: {value}", Case(reader, text_of(reader, **changes), said, named="No images" not in said)
    yield "data nc: neither", Case("data", text_of("data", nc=None, names=None), "'names:' + 'nc:' + List the class")
    for reader, key, misspelt in map(str.split, MISSPELT.split(", ")):
        text = text_of(reader, **{key: None, misspelt: BASES[reader][key]})
        said = f"'{misspelt}:'. Did you mean '{key}'?" if reader == "data" else f"'{key}'"
        yield f"{reader} {key}: {misspelt}", Case(reader, text, said)


def hyperparameters() -> Iterator[tuple[str, Case]]:
    for key in BASES["hyp"]:
        misspelt = key[0] + key[2:]
        text, above = text_of("hyp", **{key: None, misspelt: "0.5"}), text_of("hyp", **{key: ABOVE.get(key, "1.5")})
        yield f"hyp {key}: {misspelt}", Case("hyp", text, f"'{misspelt}' + Did you mean + '{key}'")
        if not re.fullmatch(f"{UNBOUNDED}|box_loss|optimizer", key):
            yield f"hyp {key}: above", Case("hyp", above, f"'{key}' + must be + and ")
    for key, value in map(str.split, ENDS.split(", ")):
        yield f"hyp {key}: {value}", Case("hyp", text_of("hyp", **{key: value}), f"'{key}' + must be")
    for key in UNKNOWN:
        yield f"hyp unknown: {key[:20]}", Case("hyp", f"{text_of('hyp')}? {key}\n: 1\n", "unknown hyperparameter")


ROWS = r"""
row 2 | Did you mean 'Conv' | [-1, 1, Convv, [16, 3, 2]] ¦ [-1, 1, conv, [16, 3, 2]]
row 2 | Did you mean 'nn.Upsample' | [-1, 1, nn.Upsampel, [null, 2, nearest]]
row 2 | unknown block | [-1, 1, nn.functional, []] ¦ [-1, 1, os.system, [ls]] ¦ [-1, 1, nn.Tensor, [2]]
row 2 | only rows before it | [[0, 2], 1, Concat, [1]] ¦ [-3, 1, Conv, [16]] ¦ [2, 1, Conv, [16]] ¦ [3, 1, Conv, [16]]
row 2 | takes one source | [[0, 1], 1, Conv, [16, 3, 2]]
row 2 | at least one | [[], 1, Conv, [16, 3, 2]] ¦ [-1, -1, Conv, [16]] ¦ [-1, 0, Conv, [16]]
row 2 | at most 100 | [-1, 1000000000, Conv, [16, 3, 2]] ¦ [-1, 101, C3, [16]]
row 2 | [from, number | [-1, 1, Conv, [16, 3, 2], 1] ¦ [[null], 1, Conv, [16]] ¦ [[true], 1, Conv, [16]] ¦ [-1, 1, Conv]
  [-1, 1, Conv, {c: 16}] ¦ [[0.5], 1, Conv, [16]] ¦ [[[0]], 1, Conv, [16]] ¦ [-1, 1.5, Conv, [16]] ¦ [-1, Conv, 1, [16]]
  [[a], 1, Conv, [16]] ¦ [-1, 1, Conv, 16] ¦ {from: -1} ¦ Conv ¦ null ¦ []
row 2 | larger than any detector's | [-1, 1, nn.Upsample, [null, 1000000, nearest]] ¦ [-1, 1, Conv, [16, 1000000, 2]]
row | row | [-1, 1, nn.Upsample, [null, 0, nearest]] ¦ [-1, 1, nn.Upsample, [null, 2, nicest]] ¦ [-1, 1, nn.Flatten, []]
  [[-1, -1], 1, Concat, [axis]] ¦ [-1, 1, nn.Conv2d, [9, 9, 3]] ¦ [-1, 1, nn.Sequential, [1]] ¦ [[0, 1], 1, Concat, [1]]
  [[-1, -1], 1, Concat, [7]] ¦ [-1, 1, nn.Linear, [8, 8]] ¦ [-1, 1, SPP, [16, [-2]]] ¦ [-1, 1, SPPF, [16, a]]
  [-1, 1, Contract, [3]] ¦ [-1, 1, nn.Module, []] ¦ [-1, 1, Expand, [3]]
"""  # what torch finds is told with the row in which it shows
CONV = r"""
0, 2 ¦ -3, 2 ¦ 4, 2 ¦ [3, 3, 3], 2 ¦ [], 2 ¦ 310, 2 ¦ 1000000, 2 ¦ 3, 0 ¦ 3, 3 ¦ 3, -2 ¦ 3, 2, -1 ¦ 3, 2, 10000 ¦ 1.5, 2
3, 2, null, 3 ¦ 3, 2, null, 0 ¦ 3, 2, null, 1, nn.SiLUU() ¦ nc, 2, anchors ¦ 3, 2, 1, 1, true, 1 ¦ 3, 0.5 ¦ 3, 2, -100
"""
WIDTHS = ["0", "-8", "1.5", "1000000000", "wide", "null", "[16]", "true", ", ".join(["16"] * 20), ""]


def rows() -> Iterator[tuple[str, Case]]:
    for place, said, row in table(ROWS):
        yield f"model row: {row}", Case("model", model_with(row), f"{place} + {said}")
    yield "model backbone: 1001 rows", Case("model", text_of("model", backbone=str([0] * 1001)), "rows")
    for args in table(CONV):
        yield f"model Conv: {args[0]}", Case("model", model_with(f"[-1, 1, Conv, [16, {args[0]}]]"), "row ")
    for block, args in itertools.product(BLOCKS, WIDTHS):
        if args not in ("", "true") or block not in ("Contract", "Expand", "nn.BatchNorm2d"):  # need none, take it as 1
            row = f"[-1, 1, {block}, [null, {args}]]" if block == "nn.BatchNorm2d" else f"[-1, 1, {block}, [{args}]]"
            yield f"model {block}: {args}", Case("model", model_with(row), "row ")


CASES = dict(itertools.chain(crossed(), spoilt(), values(), hyperparameters(), rows()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with a data set, and things that are none; the repository's own data is not to be found."""
    folder = tmp_path_factory.mktemp("yaml")
    make_set(folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        for module in (spec, obtain):
            patch.setattr(module, "ROOT", folder / "repository")
        yield folder


def make_set(root: Path) -> None:
    for name in ("train/1.jpg", "val/1.jpg", "test/1.jpg", "none/words.txt"):
        (root / "images" / name).parent.mkdir(parents=True)
        (root / "images" / name).touch()
    (root / "images" / "link").symlink_to("gone")
    os.mkfifo(root / "images" / "pipe")
    contents = {
        "empty.txt": b"",
        "words.txt": b"none\n",
        "binary.txt": bytes(range(256)),
        "picture.jpg": b"\xff\xd8\xff",
    }
    for name, content in {**contents, "a.yaml": b"train: x\n"}.items():
        (root / name).write_bytes(content)


def read_data(path: Path) -> None:
    found = spec.load_spec(path, need=spec.SPLITS, download=False)
    for sources in (found.train, found.val, found.test):
        list_images(sources)


READERS = {"data": read_data, "hyp": Hyp.from_yaml, "model": Model}


def write(folder: Path, case: Case) -> Path:
    path = folder / f"{case.reader}.yaml"
    path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    return path


def refusal(folder: Path, case: Case) -> str | None:  # the message
    path, started = write(folder, case), time.process_time()
    try:
        READERS[case.reader](path)
    except UserError as error:
        return str(error)
    finally:
        assert time.process_time() - started < SECONDS
    return None


def problem_of(message: str | None, case: Case) -> str:
    if message is None:
        return "was taken"
    if message.count("\n") > 2 or len(message) > MAX_MESSAGE or spec.UNPRINTABLE.search(message.replace("\n", "")):
        return f"{len(message)} characters, not fit to be read: {message[:150]!r}"
    wanted = [f"{case.reader}.yaml" * case.named + r":\d+" * case.line, *map(re.escape, case.said.split(" + "))]
    return "".join(f"no {word!r} in: {message}\n" for word in wanted if not re.search(word, message))


@pytest.mark.parametrize("group", sorted({name.partition(":")[0] for name in CASES}))
def test_every_bad_file_is_refused_in_few_words_that_help(group, folder):
    cases = {name: case for name, case in CASES.items() if name.startswith(f"{group}:")}
    problems = {name: problem_of(refusal(folder, case), case) for name, case in cases.items()}
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    assert not wrong, "\n".join(wrong)


def test_there_are_cases_enough_of_every_key():
    assert len(CASES) >= MIN_CASES
    assert {*BASES["data"], *BASES["hyp"], "key_order"} == {*spec.KEYS, *Hyp.__dataclass_fields__}
    assert set(BASES["model"]) >= set(CONFIG_KEYS)
    assert all(any(re.fullmatch(rule, name) for name in TAKEN) for rule in LEGAL)


FORMS = [  # of the valid files
    str.encode,
    lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    lambda text: f"# 斑马\n%YAML 1.1\n---\n{text}# é\n...\n".encode(),
    lambda text: b"{" + text.strip().replace("\n", ", ").encode() + b"}",
]
TAKEN = dict(crossed(legal=True))
TAKEN |= {f"{name} {form}": Case(name, FORMS[form](text_of(name))) for name in BASES for form in range(len(FORMS))}


@pytest.mark.parametrize("name", TAKEN)
def test_valid_files_and_what_only_looks_wrong_are_taken(name, folder):
    assert refusal(folder, TAKEN[name]) is None


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=8))
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALARS, inner))
SCRIPT = settings(derandomize=True, max_examples=60, deadline=None, database=None)


@SCRIPT
@given(st.sampled_from([(reader, key) for reader, base in BASES.items() for key in base]), ANYTHING)
def test_any_value_of_any_key_is_taken_or_refused(folder, place, value):
    reader, key = place
    case = Case(reader, text_of(reader, **{key: None}) + yaml.safe_dump({key: value}, allow_unicode=True))
    message = refusal(folder, case)
    assert message is None or not problem_of(message, case)
    assert reader != "hyp" or message or isinstance(value, (int, float)) or (key, value) == ("anchors", None)


@SCRIPT
@given(st.sampled_from(list(READERS)), st.integers(0), st.integers(0, 12), st.text("[]{}:,-#&*!|>'\"%@`\t \n\0é0a"))
def test_text_spoilt_anywhere_is_taken_or_refused(folder, reader, start, length, put):
    text, start = text_of(reader), start % len(text_of(reader))
    case = Case(reader, text[:start] + put[:6] + text[start + length :])
    message = refusal(folder, case)
    assert message is None or not problem_of(message, case._replace(named="No images" not in message))


COMMANDS = "data added: 0 ¦ data val: images/nowhere ¦ hyp whole: 34 ¦ hyp lr0: fast ¦ hyp box: bx ¦ model whole: 32"
COMMANDS += " ¦ model anchors: fast ¦ model row: [-1, 1, Convv, [16, 3, 2]]"
OPTIONS = {"data": "--data", "hyp": "--hyp", "model": "--cfg"}


@pytest.mark.parametrize("name", COMMANDS.split(" ¦ "))
def test_train_refuses_them_in_the_same_words(name, folder, data, command, tmp_path):
    case = CASES[name]
    options = ["--device", "cpu", "--project", tmp_path / "runs", "--data", data]
    options += ["--cfg", write(folder, Case("model", text_of("model"))), OPTIONS[case.reader], write(tmp_path, case)]
    outcome = command(train, *options)
    outcome.assert_refused(*case.said.split(" + "))
    assert not problem_of(outcome.said.partition("train.py: error: ")[2].strip(), case)
    assert not (tmp_path / "runs").exists()
