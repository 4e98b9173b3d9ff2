"""What `fuzz.py` starts from: valid files of every kind, and the words of each format.

The files are as small as they can be and made on the spot.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.campaigns.fuzz_mutators import NUMBERS, write_zip
from utils.dataloaders.labels import Counts, LabelTable, PathList, write_cache
from utils.files import ROOT

CACHE_KEY = "0123456789abcdef"
TINY_MODEL = """nc: 2
depth_multiple: 1.0
width_multiple: 1.0
anchors: [[8,8, 16,9]]
backbone: [[-1, 1, Conv, [8, 3, 2]]]
head: [[[0], 1, Detect, [nc, anchors]]]
"""
BRANCHED_MODEL = """nc: 1
depth_multiple: 0.33
width_multiple: 0.5
anchors: 2
activation: nn.LeakyReLU(0.1)
backbone:
- [-1, 1, GSConv, [8, 3, 2]]
- [-1, 1, Conv, [16, 3, 2]]
- [-1, 2, C3, [16]]
head:
- [-1, 1, nn.Upsample, [None, 2, nearest]]
- [[-1, 0], 1, Concat, [1]]
- [[4, 2], 1, Detect, [nc, anchors]]
"""


def words(text: str) -> tuple[bytes, ...]:
    """Returns the words of a text, and extreme numbers."""
    return (*(word.encode() for word in text.split()), *NUMBERS)


SPACES = (b"\n", b"\r", b"\t", b" ", b"\0", b"\x0b", b"\xa0", b"\xff", "\u0663".encode(), "\u2028".encode())
YAML_WORDS = (
    *words(
        ": - [ ] { } , ? | > ' \" & * ! # << = ~ null true --- ... %YAML !!float !!int !!timestamp !!binary !!set "
        "!!omap !!pairs !!merge !!python/object/apply:os.system !!bool yes 1:30:00 2001-01-01"
    ),
    *(b"\n? [a]\n: b\n", b"\nx: !!python/name:os.system\n", b"!!map ", b"!!float [1]", b"0x" + b"f" * 90),
)
DATA_WORDS = (
    *words("path: train: val: test: names: nc: download: convert: generate: url: dir: sha256: voc shapes ../ ~ ~x \\"),
    *(b"\nnc: 1000000000\n", b"\nconvert: [voc]\n", b"\npath: ~x\n", b"\ntrain: [train, ~x/y]\n", b"\nnames: {1: a}\n"),
)
MODEL_WORDS = words(
    "Conv GSConv C3 C3TR Detect Concat Contract Expand Focus SPPF MixConv2d nn.Upsample nn.Identity nn.Linear "
    "nn.Module nn.PReLU nn.ReLU(inplace=True) Sum Classify [-1,1,Conv,[8]] nc anchors activation: ch: inplace: "
    "channel_multiple: depth_multiple: width_multiple: None"
)
PICKLE_WORDS = (
    *(b"(", b")", b"}", b"]", b"R", b"b", b"Q", b".", b"0", b"2", b"N", b"s", b"u", b"t", b"e", b"a", b"\x88", b"\x85"),
    *(b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"G\x7f\xf0\0\0\0\0\0\0", b"h\0", b"q\0"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cmodels.common\nConv\n", b"cmodels.yolo\nDetect\n", b"cnumpy\ndtype\n"),
    *(b"cpathlib\nPosixPath\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ccollections\nOrderedDict\n", b"cnumpy._core.multiarray\nscalar\n", b"X\2\0\0\0nc", b"X\5\0\0\0names"),
)
IMAGE_WORDS = (
    *(b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xe1", b"Exif\0\0", b"MM\0*"),
    *(b"II*\0", b"\x01\x12", b"\x12\x01", b"IHDR", b"IDAT", b"IEND", b"PLTE", b"RIFF", b"WEBP", b"VP8 ", b"VP8L"),
    *(b"ALPH", b"VP8X", b"BM", b"GIF89a", b"P6\n", b"\0\0\0\x0cjP  ", b"\xff" * 4, b"\0" * 4, b"\x7f\xff", b"\x80\0"),
)
MEMBER_WORDS = (
    *(b"a", b"set", b"a.txt", b"..", b".", b"", b"/etc/x", b"C:", b"C:\\x", b"\\\\host\\x", b"a\\b", b"\0", b"a\0b"),
    *(b" ", b"x" * 300, b"x/" * 30 + b"x", b"-", b"CON", "\u202e".encode(), b"\n", b"~", b".unpack-x", b"\xff"),
)
XML_WORDS = words(
    "<object> </object> <name> </name> <size> <width> <bndbox> <xmin> <!ENTITY <!DOCTYPE <?xml encoding= utf-16 "
    "<![CDATA[ ]]> &amp; &x; ; < > / <difficult>1</difficult> cat"
)


def labels() -> list[bytes]:
    return [
        b"0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.2\n",
        b"\xef\xbb\xbf2 .5 .5 1 1\r\n\r\n2 .5 .5 1 1\r\n",
        b"0 0.1 0.1 0.9 0.1 0.5 0.9\n0 0 0 1 0 1 1 0 1\n",
        b"79 1.00005 0.5 1e-3 1E-2\n",
        b"",
    ]


def yamls() -> list[bytes]:
    return [
        b"a: 1\nb: [1, 2.5, 1e-3, x]\nc: {d: null, e: true}\n",
        b"- - 1\n  - 'q'\n- \"\\x41\"\n- |\n  text\n",
        b"x: !!float 1\ny: !!set {a, b}\nz: 2001-12-14t21:59:43.10-05:00\n",
        b"%YAML 1.1\n---\n? k\n: v\n...\n",
        b"a: !!binary aGk=\nb: !!omap [x: 1]\nc: 0o17\nd: 1:30:00\n",
    ]


def data_yamls() -> list[bytes]:
    return [
        b"path: .\ntrain: train\nval: train\nnames: [cat, dog]\n",
        b"train: train\nval: [train, a.txt]\nnc: 2\nnames: {0: cat, 1: dog}\n",
        b"path: none\ntrain: images\nval: images\nnc: 1\ndownload: https://host.example/a.zip\n",
        b"train: ../train\nval: x\nnames: [a]\nconvert: voc\n"
        b"download:\n- {url: https://h.example/a.zip, dir: a, file: b.zip}\n",
        b"path: x\ntrain: y\nval: y\nnames: [a]\ngenerate: shapes\n",
    ]


def model_yamls() -> list[bytes]:
    return [TINY_MODEL.encode(), BRANCHED_MODEL.encode()]


def hyp_yamls() -> list[bytes]:
    """The hyperparameters that come with the program, without comments, on one line and on many."""
    from utils.train.hyp import Hyp

    values = Hyp.from_yaml(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml").to_dict()
    pairs = [f"{name}: {value:g}" for name, value in values.items()]
    return ["\n".join(pairs).encode(), f"{{{', '.join([*pairs, 'anchors: 3'])}}}".encode(), b"lr0: 0.01\nlrf: 0.1\n"]


def checkpoints() -> list[bytes]:
    """Checkpoints of ours and original ones (a pickled module), of a model of one convolution and Detect."""
    import torch
    import yaml

    from models.yolo import Model
    from utils.checkpoint import FORMAT, FORMAT_VERSION

    content = yaml.safe_load(TINY_MODEL)
    with torch.random.fork_rng(devices=[]):
        model = Model(content)
    ours = {"format": FORMAT, "format_version": FORMAT_VERSION, "epoch": -1, "ema": None, "model": model.state_dict()}
    ours |= {"yaml": content, "names": {0: "cat", 1: "dog"}, "nc": 2, "stride": [2], "hyp": {"lr0": 0.01}, "opt": {}}
    original = {"epoch": -1, "model": model.half(), "ema": None, "opt": {"data": Path("a/b.yaml")}, "date": None}
    original |= {"best_fitness": np.float64(0.5), "hyp": {"lr0": 0.01}}
    files = []
    for item in (ours, original, {"a": torch.zeros(2), "b": [1, 2.5, None, "c"]}):
        target = io.BytesIO()
        torch.save(item, target)
        files.append(target.getvalue())
    return files


def caches() -> list[bytes]:
    table = LabelTable(
        PathList.from_strings(["/a/images/1.jpg", "/a/images/2.jpg"]),
        np.array([[10, 20], [30, 40]], np.int32),
        np.array([[0, 0.5, 0.5, 0.1, 0.1], [1, 0.5, 0.5, 1, 1]], np.float32),
        np.array([0, 2, 2], np.int64),
        np.array([[0, 0], [1, 0], [1, 1]], np.float32),
        np.array([0, 0, 3], np.int64),
        Counts(1, 1, 0, 0, 2),
        ("a word",),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.cache.npz"
        write_cache(path, CACHE_KEY, table)
        return [path.read_bytes()]


def image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Returns a small image in one of Pillow's formats."""
    values = np.arange(12 * 12 * 4, dtype=np.uint8).reshape(12, 12, 4)
    pixels = Image.fromarray(values if mode == "RGBA" else values[:, :, :3].copy())
    target = io.BytesIO()
    pixels.convert(mode).save(target, kind, **options)
    return target.getvalue()


def images() -> list[bytes]:
    """Images of every format that is read, in several modes, some turned by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    second = Image.new("RGB", (12, 12))
    found = [
        *(image(kind) for kind in ("jpeg", "png", "bmp", "webp", "tiff", "gif")),
        *(image("png", mode=mode) for mode in ("RGBA", "L", "P", "1", "I;16", "LA")),
        *(image("tiff", mode=mode) for mode in ("L", "I", "F", "CMYK", "RGBA")),
        image("jpeg", exif=exif),
        image("jpeg", progressive=True, mode="L"),
        image("png", exif=exif),
        image("webp", lossless=True, exif=exif),
        image("tiff", exif=exif),
        image("tiff", compression="tiff_lzw"),
        image("mpo", save_all=True, append_images=[second]),
        image("ppm"),
    ]
    deep = cv2.imencode(".png", np.full((12, 12, 3), 40000, np.uint16))[1].tobytes()
    return [*found, deep]


def archives() -> list[bytes]:
    found = [
        write_zip([("set/a.txt", b"hello"), ("set/b/", b"")], kind)
        for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ]
    for mode in ("w", "w:gz", "w:xz", "w:bz2"):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode=mode) as archive:
            for name in ("set/a.txt", "set/b.txt"):
                entry = tarfile.TarInfo(name)
                entry.size = 5
                archive.addfile(entry, io.BytesIO(b"hello"))
        found.append(target.getvalue())
    return found


def cocos() -> list[bytes]:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 12, "height": 12}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "bird"}],
    }
    return [json.dumps(content).encode(), json.dumps(content, indent=1).encode()]


def vocs() -> list[bytes]:
    """A Pascal VOC annotation, and one whose size must be read from the image."""
    text = """<annotation><size><width>{side}</width><height>{side}</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>
</object></annotation>"""
    return [text.format(side=12).encode(), text.format(side=0).encode()]


def visdrones() -> list[bytes]:
    return [b"1,2,3,4,1,1,0,0\n5,5,4,4,0,0,0,0\n", b"0,0,12,12,1,2,0,0,\n"]


def options() -> list[bytes]:
    return [b"count 0.1,0.5,0.9,0.5", b"count 0,0,10,0,10,10", b"imgsz 640 320", b"tile 64 0.2", b"tile 640"]


def lists() -> list[bytes]:
    return [
        b"images/a.jpg\n./b.png\n# a word\n\n/abs/c.mp4\n",
        b"rtsp://user:pw@host.example/live\n0\nscreen 1 0 0 100 100\nhttps://www.youtube.com/watch?v=x\n",
        b"\xef\xbb\xbfC:\\images\\a.jpg\r\nhttp://h.example/a.jpg?x=1\r\n~/a.jpg\r\n",
    ]
