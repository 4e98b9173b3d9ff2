"""One checkpoint in every format and precision that runs here: accuracy, agreement, speed, size and memory.

Every row is validated in a process of its own on the same images, one at a time unless --batch-size says otherwise.
Timed are val.py's stages without reading and letterbox: pre-processing, inference, NMS. Memory is the process's peak
after loading the model and running one image, before anything that only validation needs is loaded.

    python benchmarks/runtimes.py --weights best.pt --data data.yaml --imgsz 320 --json runtimes.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import measured, run
from models.backends.base import processor_name
from utils.errors import UserError
from utils.files import ROOT

CONFIDENT = 0.25  # boxes of rows above this are compared
COLUMNS = ("mAP50", "mAP50-95", "diff", "raw px", "raw score", "pre ms", "infer ms", "NMS ms", "MB", "RAM MB")


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: for people, and for --formats.
        include: what export.py calls the format; empty for the checkpoint itself.
        suffix: what follows the checkpoint's stem in the file's name.
        flags: more options of export.py.
        dynamic: takes rectangles; else all images are padded to one square.
        half: compute in 16 bits.
        dnn: run in OpenCV.
    """

    name: str
    include: str = ""
    suffix: str = ".pt"
    flags: tuple[str, ...] = ()
    dynamic: bool = False
    half: bool = False
    dnn: bool = False

    @property
    def reference(self) -> str:
        """The row that this one is compared with: the checkpoint on the same shapes."""
        return RECTANGLES if self.dynamic else SQUARE


RECTANGLES, SQUARE = "checkpoint (rectangles)", "checkpoint (square)"
_OPENVINO, _OPENVINO_INT8 = "_openvino_model", "-int8_openvino_model"
ROWS = {
    row.name: row
    for row in (
        Row(RECTANGLES, dynamic=True),
        Row(SQUARE),
        Row("torchscript", "torchscript", ".torchscript"),
        Row("onnx", "onnx", ".onnx"),
        Row("onnx dynamic", "onnx", ".onnx", ("--dynamic",), dynamic=True),
        Row("onnx int8", "onnx", "-int8.onnx", ("--int8",)),
        Row("onnx raw int8", "onnx", "-raw-int8.onnx", ("--raw", "--int8")),
        Row("opencv dnn", "onnx", ".onnx", dnn=True),
        Row("openvino", "openvino", _OPENVINO),
        Row("openvino dynamic", "openvino", _OPENVINO, ("--dynamic",), dynamic=True),
        Row("openvino 16 bit", "openvino", _OPENVINO, half=True),
        Row("openvino int8", "openvino", _OPENVINO_INT8, ("--int8",)),
        Row("ncnn", "ncnn", "_ncnn_model"),
        Row("mnn", "mnn", ".mnn"),
        Row("executorch", "executorch", ".pte"),
        Row("tflite fp16", "tflite", "-fp16.tflite"),
        Row("tflite int8", "tflite", "-int8.tflite", ("--int8",)),
        Row("tflite raw int8", "tflite", "-raw-int8.tflite", ("--raw", "--int8")),
        Row("saved_model", "saved_model", "_saved_model"),
        Row("pb", "pb", ".pb"),
    )
}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="checkpoint")
    parser.add_argument("--data", required=True, help="data set YAML: validation, and calibration of int8")
    parser.add_argument("--imgsz", "--img", type=int, default=640, help="side of the squares, long side of rectangles")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time")
    parser.add_argument(
        "--formats", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=str([*ROWS])
    )
    parser.add_argument("--folder", type=Path, help="where exports are kept, and found again; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--measure", choices=list(ROWS), metavar="ROW", help="one row in this process; prints JSON")
    return parser.parse_args()


def file_of(row: Row, args: argparse.Namespace) -> Path:
    """Returns where a row's model is, or is to be: dynamic and fixed exports have the same names, so two folders."""
    folder = args.folder / ("dynamic" if row.dynamic else "fixed")
    return folder / (args.weights.stem + row.suffix)


def make_file(row: Row, args: argparse.Namespace) -> None:
    """Exports a row's model where it is missing."""
    path = file_of(row, args)
    checkpoint = path.with_name(args.weights.name)
    if not checkpoint.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.weights, checkpoint)
    if not path.exists():
        line = ["--weights", checkpoint, "--include", row.include, "--imgsz", args.imgsz, args.imgsz, *row.flags]
        try:
            run(ROOT / "export.py", *line, "--data", args.data)
        except UserError:
            if not path.exists():  # what lost accuracy is measured all the same
                raise


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Validates a row's model in this process and returns its figures."""
    path = file_of(row, args)
    figures = {"bytes": size_of(path), "peak_rss_bytes": peak_memory(row, path, args.imgsz)}

    from models.backends import open_model
    from models.inference.evaluation import check_classes, make_loader
    from models.inference.predictor import Predictor
    from utils.dataloaders.config import load_spec
    from utils.eval.evaluate import NMS, evaluate

    spec = load_spec(args.data, need=("val",))
    opened = open_model(path, "cpu", dnn=row.dnn, bf16=row.half)
    check_classes(opened, spec)
    shape = args.imgsz if row.dynamic else (args.imgsz, args.imgsz)
    model = opened.build()
    loader = make_loader(spec, shape, opened.metadata.stride, batch_size=args.batch_size, workers=0)
    result = evaluate(Predictor(model, NMS), loader, names=spec.names, quiet=True)
    difference = raw_difference(row, model, args, spec.val) if row.include else {}
    speed = dict(zip(("pre_ms", "inference_ms", "nms_ms"), result.speed_ms, strict=True))
    return {**figures, **speed, **difference, "map50": result.map50, "map": result.map, "runtime": model.device}


def peak_memory(row: Row, path: Path, side: int) -> int:
    """Returns the process's peak in bytes after running one grey image; nothing else may have been loaded before."""
    import numpy as np

    from models.backends import load_backend

    load_backend(path, "cpu", half=row.half, dnn=row.dnn).predict(np.full((1, 3, side, side), 114, np.uint8))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def raw_difference(row: Row, model: Any, args: argparse.Namespace, sources: Any) -> dict[str, float]:
    """Returns how far raw rows are from the checkpoint's on a few images: confident boxes in px, all scores."""
    import numpy as np

    from models.backends import load_backend
    from models.export.verify import sample_images
    from utils.dataloaders.paths import list_images
    from utils.images import letterbox

    checkpoint = load_backend(args.weights, "cpu")
    box_px = score = 0.0
    for image in sample_images(list_images(sources)):
        boxed = letterbox(image, (args.imgsz, args.imgsz), auto=row.dynamic, stride=model.stride).image
        images = np.ascontiguousarray(boxed[None, :, :, ::-1].transpose(0, 3, 1, 2))
        expected, found = (np.asarray(backend.predict(images)) for backend in (checkpoint, model))
        difference = np.abs(expected - found)
        sure = expected[..., 4] * expected[..., 5:].max(axis=2) > CONFIDENT
        box_px = max(box_px, float(difference[sure][:, :4].max(initial=0)))
        score = max(score, float(difference[..., 4:].max()))
    return {"raw_box_px": box_px, "raw_score": score}


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def line_of(row: Row, figures: dict[str, Any], table: dict[str, dict[str, Any]]) -> str:
    """Returns a row of the printed table; `table` holds the rows measured so far."""
    if "why" in figures:
        return f"{row.name:24} not measured: {figures['why']}"
    reference = table.get(row.reference, {}).get("map")
    figures["map_difference"] = None if reference is None else figures["map"] - reference
    keys = "map50 map map_difference raw_box_px raw_score pre_ms inference_ms nms_ms".split()
    forms = "{:.4f} {:.4f} {:+.4f} {:.2g} {:.2g} {:.1f} {:.1f} {:.1f}".split()
    values = [figures.get(key) for key in keys]
    cells = ["-" if value is None else form.format(value) for value, form in zip(values, forms, strict=True)]
    cells += [f"{figures[key] / 1e6:.1f}" for key in ("bytes", "peak_rss_bytes")]
    return f"{row.name:24}" + "".join(f"{cell:>10}" for cell in cells) + f"  {figures['runtime']}"


def compare(args: argparse.Namespace) -> None:
    """Measures all rows, prints the table and writes the JSON."""
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    about = {"cpu": processor_name(), "cores": os.cpu_count(), "threads": int(threads)}
    about["python"] = platform.python_version()
    about |= {"weights": args.weights.name, "data": args.data, "imgsz": args.imgsz, "batch_size": args.batch_size}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("timed: milliseconds per image of pre-processing, inference and NMS (from confidence 0.001)")
    print(f"{'':24}" + "".join(f"{column:>10}" for column in COLUMNS) + "  runtime")
    table: dict[str, dict[str, Any]] = {}
    for name in args.formats:
        line = ["--weights", args.weights, "--data", args.data, "--imgsz", args.imgsz, "--folder", args.folder]
        try:
            make_file(ROWS[name], args)
            figures = measured(__file__, *line, "--batch-size", args.batch_size, "--measure", name)
        except UserError as error:
            figures = {"why": str(error)}
        print(line_of(ROWS[name], figures, table), flush=True)
        table[name] = figures
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": table}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the comparison, or one row of it."""
    args = parse_args()
    if args.measure:
        print(json.dumps(measure(ROWS[args.measure], args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        compare(args)


if __name__ == "__main__":
    main()
