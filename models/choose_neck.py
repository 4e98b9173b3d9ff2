"""The neck for a number of milliseconds: measured here, for a trained dense model, row by row.

What a row of the neck costs depends on the machine, the runtime and the precision, and on its neighbours: in int8
copies and changes of layout between layers take as long as the layers. So each candidate is measured in its place: the
whole graph with one row changed, in turns with the graph of the dense model. What it costs in accuracy is told by
fitting that row alone to the dense model, without labels: the error of the head's logits on images that the fit has not
seen. Both are added up over the rows, and the neck of the least error within the time is written as a model YAML.

    python -m models.choose_neck --weights best.pt --runtime openvino --int8 --ratio 0.95
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models import latency
from models.deploy import rewrite
from models.export.formats import install_hint, missing_packages
from models.load import load_model, read_weights
from models.transplant import FITS, HEADS, augmented_images, raw_maps, rows_read, run_row
from models.yolo import Model
from utils.cli import CommandParser, echo_options, find_weights, number, run_command
from utils.dataloaders.config import load_spec
from utils.dataloaders.labels import load_labels
from utils.devices import resolve_amp, select_device
from utils.errors import MAX_IMAGE_SIDE_PX, UserError, check_img_size
from utils.files import ROOT, increment_path, run_folder
from utils.images import DEFAULT_IMGSZ
from utils.log import LOGGER, colorstr, progress

IMAGES, BATCH_SIZE = 128, 16  # augmented training images, the first three quarters to fit rows on
RESULT = "neck"  # name of the YAML and of the JSON beside it
OPSET = 17
KEY = ("rows", "shape_hw", "nc")  # what a table belongs to
SLIM_C3 = ("VoVGSCSP", "VoVGSCSPC", "C3GS")
NARROW = "C3 half"  # of half the hidden channels


class Option(NamedTuple):
    """A way to build a row, by what it costs beside the dense one."""

    name: str
    ms: float
    error: float


def candidates(row: Sequence[Any]) -> dict[str, list[Any]]:
    """Returns what may stand in place of a YAML's row: rows by name; none for what is no Conv or C3 as in YOLOv5's."""
    source, repeats, block, args = row
    if block == "Conv" and repeats == 1 and len(args) <= 3:
        c2, k, s = [*args, *(1, 1)[len(args) - 1 :]]
        forms = {"GSConv 5x5": [c2, k, s], "GSConv 3x3": [c2, k, s, 1, True, 3]}
        return {name: [source, repeats, "GSConv", own] for name, own in forms.items()}
    if block == "C3" and len(args) <= 2:
        narrow = [source, repeats, "C3", [*args, *(True,)[len(args) - 1 :], 1, 0.25]]
        return {**{name: [source, repeats, name, args] for name in SLIM_C3}, NARROW: narrow}
    return {}


def with_rows(yaml: Mapping[str, Any], rows: Mapping[int, Sequence[Any]]) -> dict[str, Any]:
    """Returns a model YAML with other rows, by their numbers."""
    start = len(yaml["backbone"])
    return {**yaml, "head": [rows.get(start + place, row) for place, row in enumerate(yaml["head"])]}


def neck_rows(yaml: Mapping[str, Any]) -> dict[int, dict[str, list[Any]]]:
    """Returns the candidates of every row of a model's neck that has some."""
    rows = {len(yaml["backbone"]) + place: candidates(row) for place, row in enumerate(yaml["head"])}
    return {row: found for row, found in rows.items() if found}


# ------------------------------------------------------------------------------------------------------ milliseconds


def write_graphs(
    folder: Path, yaml: Mapping[str, Any], key: Mapping[str, Any], runtime: str, int8: bool, necks: Mapping[str, dict]
) -> None:
    """Writes the graphs of a dense model and of changed ones, and their list, for `models.latency`.

    Weights and, for int8, ranges are random: they change no latency.

    Args:
        folder: that is there.
        yaml: of the dense model.
        key: what the table will belong to.
        runtime: "onnxruntime" or "openvino".
        int8: quantise them as export.py does.
        necks: the changed rows of each further graph, by its name.

    Raises:
        UserError: a package is missing that this needs.
    """
    if missing := missing_packages(("onnx", runtime, *("nncf",) * (int8 and runtime == "openvino"))):
        extra = "openvino" if runtime == "openvino" else "onnx"
        raise UserError(f"--runtime {runtime} needs {', '.join(missing)}: {install_hint(extra)}")
    image = np.random.default_rng(0).integers(0, 256, (1, yaml["ch"], *key["shape_hw"]), dtype=np.uint8)
    graphs = []
    for place, (name, rows) in enumerate(progress([("dense", {}), *necks.items()], desc="Writing graphs")):
        file = folder / f"{place}.onnx"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = Model(with_rows(yaml, rows)).eval()
            module = rewrite(model)
            module.decoder = model.head.output(tuple(key["shape_hw"]))
            export_graph(module.eval(), torch.zeros(image.shape), file)
        graphs.append({"name": name, "file": finish_graph(file, image, runtime, int8).name})
    about = {**key, "channels": yaml["ch"], "runtime": runtime, "int8": int8, "graphs": graphs}
    (folder / latency.GRAPHS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def export_graph(module: torch.nn.Module, image: Tensor, file: Path) -> None:
    """Writes a module as ONNX for images of the shape of `image`."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are meant to be fixed
        names = {"input_names": ["images"], "output_names": ["output"]}
        torch.onnx.export(module, (image,), str(file), dynamo=False, opset_version=OPSET, **names)


def finish_graph(file: Path, image: np.ndarray, runtime: str, int8: bool) -> Path:
    """Makes of an ONNX file what the runtime is to run, in the same folder; returns its path."""
    from models.export.job import quietly, without_telemetry

    if not int8:  # both read ONNX
        return file
    if runtime == "onnxruntime":
        from models.export.onnx import quantize as quantize_onnx

        with quietly():
            quantize_onnx(file, file.with_suffix(".int8.onnx"), [image])
        return file.with_suffix(".int8.onnx")
    from models.export.openvino import quantize

    with quietly(), without_telemetry():
        import openvino

        openvino.save_model(quantize(openvino.Core().read_model(file), [image], batch=1), file.with_suffix(".xml"))
    return file.with_suffix(".xml")


def measure_here(
    yaml: Mapping[str, Any], key: Mapping[str, Any], necks: Mapping[str, dict], options: Namespace
) -> dict[str, Any]:
    """Writes graphs and returns their table, measured in a process of its own: PyTorch's threads would disturb it."""
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(Path(folder), yaml, key, options.runtime, options.int8, necks)
        line = [sys.executable, latency.__file__, folder, "--threads", str(options.threads)]
        line += ["--rounds", str(options.rounds), "--clock", options.clock]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"the graphs cannot be measured: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
        return json.loads(Path(folder, latency.TABLE).read_text(encoding="utf-8"))


def graph_name(row: int, name: str) -> str:
    """Returns what the graph with one row changed is called."""
    return f"row {row}: {name}"


# ---------------------------------------------------------------------------------------------------------- accuracy


@torch.no_grad()
def row_errors(teacher: Model, images: Sequence[Tensor], seed: int, dtype: torch.dtype | None) -> dict[str, float]:
    """Returns the error of the logits where one row is changed, fitted to its twin and nothing after it.

    Args:
        teacher: the dense model, in evaluation mode.
        images: batches, uint8 (b, 3, h, w) RGB of one shape; the last quarter is compared.
        seed: of the places that the fits see, and of what is not fitted.
        dtype: of autocast; None computes in float32.
    """
    device, head = next(teacher.parameters()).device, len(teacher.model) - 1
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    necks, read = neck_rows(teacher.yaml), rows_read(teacher, head)
    wanted = {source for row in range(min(necks), head + 1) for source in rows_read(teacher, row)}
    record, logits, errors = [], [], {}
    with autocast:
        for batch in images:
            pixels = batch.to(device, memory_format=torch.channels_last).float() / 255
            maps = {-1: pixels.to(dtype or torch.float32)}
            for row in range(head):
                maps[row] = run_row(teacher, row, maps)
            record.append({row: maps[row] for row in wanted})
    fitted = len(record) - max(1, len(record) // 4)
    for maps in record[fitted:]:
        logits.append(raw_maps(teacher.head, [maps[row].float() for row in read], autocast))
    loss = HEADS[type(teacher.head)].logit_loss
    for row, name, changed in progress(
        [(row, name, changed) for row, forms in necks.items() for name, changed in forms.items()], desc="Fitting rows"
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Model(with_rows(teacher.yaml, {row: changed})).to(device, memory_format=torch.channels_last).eval()
        block, twin, (source,) = model.model[row], teacher.model[row], rows_read(teacher, row)
        inputs = [maps[source] for maps in record[:fitted]]
        generator = torch.Generator().manual_seed(seed)
        with autocast:
            channels = torch.arange(inputs[0].shape[1])
            order = torch.argsort(FITS[type(block), type(twin)](block, twin, inputs, inputs, channels, generator))
        total = 0.0
        for recorded, expected in zip(record[fitted:], logits, strict=True):
            with autocast:
                maps = {**recorded, row: block(recorded[source])[:, order]}
                for later in range(row + 1, head):
                    maps[later] = run_row(teacher, later, maps)
            given = raw_maps(teacher.head, [maps[one].float() for one in read], autocast)
            total += sum(loss(*pair, teacher.head).item() for pair in zip(given, expected, strict=True))
        errors[graph_name(row, name)] = total / len(logits)
    return errors


# ------------------------------------------------------------------------------------------------------------ choice


def fronts(rows: Sequence[Sequence[Option]]) -> list[tuple[float, float, tuple[str, ...]]]:
    """Returns the necks that no other one beats in both: (ms, error, the option of each row), slowest first.

    Args:
        rows: the options of each row; their milliseconds and errors add up.
    """
    front: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    for options in rows:
        grown = sorted(
            (error + one.error, ms + one.ms, (*names, one.name)) for ms, error, names in front for one in options
        )
        front = []
        for error, ms, names in grown:
            if not front or ms < front[-1][0]:
                front.append((ms, error, names))
    return front


def options_of(table: Mapping[str, Any], errors: Mapping[str, float], necks: Mapping[int, dict]) -> list[list[Option]]:
    """Returns the options of each row: the dense one, and what is faster each time it was loaded."""
    graphs = {one["name"]: one for one in table["graphs"]}
    found = []
    for row, forms in necks.items():
        found.append([Option("dense", 0.0, 0.0)])
        for name in forms:
            one = graphs.get(graph_name(row, name))  # of an older table there may be none
            if one and one["range_ms"][1] < 0:
                found[-1].append(Option(name, one["difference_ms"], errors[one["name"]]))
    return found


def write_neck(file: Path, yaml: Mapping[str, Any], comment: Sequence[str]) -> None:
    """Writes a model YAML with comments above it, a row a line."""
    lines = [f"# {line}" for line in comment] + [""]
    for key, value in yaml.items():
        if key in ("backbone", "head", "anchors") and isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(row)}" for row in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the command


def build_parser() -> CommandParser:
    """Declares the options."""
    parser = CommandParser("models.choose_neck", description="Choose a neck for a number of milliseconds on a machine.")
    add = parser.add_argument
    add("--weights", default="", help="trained dense model; default: the newest runs/train/*/weights/best.pt")
    add("--ms", type=number(float, 0), help="milliseconds that the model may take, as the table has them")
    add("--ratio", type=number(float, 0, 1), help="the same as a share of the dense model's (0.95)")
    add("--runtime", choices=tuple(latency.RUNTIMES), default="onnxruntime", help="where the model will run")
    add("--int8", action="store_true", help="it will run in int8")
    add("--threads", type=number(int, 1), default=1, help="threads of the runtime")
    add("--rounds", type=number(int, 6), default=30, help="how often each graph is run, over six loads")
    add("--clock", choices=tuple(latency.CLOCKS), default="wall", help="cpu: CPU time, for busy machines")
    add("--table", default="", metavar="FILE", help="a table that was measured before, here or on another device")
    add("--graphs", default="", metavar="FOLDER", help="write there what another device measures, and end")
    add("--data", default="", help="data set YAML; default: the one that the model was trained on")
    add(
        "--imgsz", "--img", "--img-size", nargs="+", type=number(int, 32, MAX_IMAGE_SIDE_PX), help="side, or h w, in px"
    )
    add("--images", type=number(int, 4 * BATCH_SIZE), default=IMAGES, help="augmented training images to fit rows on")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0; of the fits")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="mixed precision of the fits")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed")
    add("--project", default=str(ROOT / "runs" / "neck"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    return parser


def main(options: Namespace) -> Path | None:
    """Measures, fits, chooses and writes; returns the YAML, or None where only graphs are asked for.

    Raises:
        UserError: no neck is as fast as asked, the table is another model's, or a file is missing or unsound.
    """
    if not options.graphs and (options.ms is None) == (options.ratio is None):
        raise UserError("say how fast the model is to be: either --ms or --ratio, for example --ratio 0.95")
    echo_options("choose_neck", options)
    folder = run_folder(options.project, options.name)  # refused, if at all, before anything is read
    (path,) = find_weights(options.weights)
    meta, device = read_weights(path).meta, select_device(options.device)
    teacher = load_model(path, device).to(memory_format=torch.channels_last)
    necks, stride = neck_rows(teacher.yaml), int(max(teacher.stride))
    if not necks or type(teacher.head) not in HEADS:
        raise UserError(f"{path}: nothing in its neck can be replaced: Conv and C3 can, before Detect or DetectAF.")
    trained = (meta["opt"] or {}).get("imgsz")
    sides = options.imgsz or [trained if isinstance(trained, int) else DEFAULT_IMGSZ]
    if len(sides) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: give one number, or height and width.")
    shape_hw = [check_img_size(side, stride) for side in (sides * 2)[:2]]
    key = {"rows": [*teacher.yaml["backbone"], *teacher.yaml["head"]], "shape_hw": shape_hw, "nc": teacher.nc}
    changed = {graph_name(row, name): {row: own} for row, forms in necks.items() for name, own in forms.items()}
    if options.graphs:
        target = Path(options.graphs)
        target.mkdir(parents=True, exist_ok=True)
        write_graphs(target, teacher.yaml, key, options.runtime, options.int8, changed)
        shutil.copy(latency.__file__, target)
        LOGGER.info(
            f"{len(changed) + 1} graphs are in {target}. On the device, with {options.runtime} and numpy, run 'python "
            f"latency.py' in that folder; then give its {latency.TABLE} here as --table."
        )
        return None
    if options.table:
        table = read_table(options.table, key)
    else:
        table = measure_here(teacher.yaml, key, changed, options)
    dense_ms = table["graphs"][0]["ms"]
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    data = str(options.data or meta["data"])
    fits = {"weights": weights, "data": data, "images": options.images, "seed": options.seed}
    if table.get("fits") != fits:
        table |= {"fits": fits, "errors": errors_of(teacher, options, meta, max(shape_hw), path)}
    front = fronts(options_of(table, table["errors"], necks))
    budget_ms = (options.ms if options.ms is not None else options.ratio * dense_ms) - dense_ms
    within = [neck for neck in front if neck[0] <= budget_ms]
    LOGGER.info(f"\n{table['runtime']} {table['version']}{' int8' * table['int8']}, {table['processor']}")
    LOGGER.info(f"{'ms':>8}{'share':>8}{'error':>10}  {'  '.join(f'row {row}' for row in necks)}")
    for one in front:
        mark = " <-" * (bool(within) and one == within[0])
        LOGGER.info(f"{dense_ms + one[0]:8.2f}{1 + one[0] / dense_ms:8.3f}{one[1]:10.4f}  {', '.join(one[2])}{mark}")
    if not within:
        raise UserError(
            f"no neck takes {dense_ms + budget_ms:.2f} ms: the fastest takes {dense_ms + front[-1][0]:.2f}, the dense "
            f"one {dense_ms:.2f}. Allow more, or take a smaller model."
        )
    ms, error, names = within[0]
    rows = {row: necks[row][name] for row, name in zip(necks, names, strict=True) if name != "dense"}
    chosen = {"ms": round(dense_ms + ms, 4), "share": round(1 + ms / dense_ms, 4), "error": error, "rows": names}
    if not options.table and rows:  # the sum of what each row saves is an estimate
        found = measure_here(teacher.yaml, key, {"chosen": rows}, options)["graphs"]
        chosen["measured_share"] = round(1 + found[1]["difference_ms"] / found[0]["ms"], 4)
        LOGGER.info(f"Measured as a whole: {chosen['measured_share']:.3f} of the dense model's time")
    folder = increment_path(folder, exist_ok=options.exist_ok, mkdir=True)
    file = folder / f"{RESULT}.yaml"
    about = [
        f"Chosen for {table['runtime']} {table['version']}{' in int8' * table['int8']}, {table['threads']} threads, on",
        f"{table['processor']}: {chosen['share']:.3f} of the dense neck's time at {shape_hw[0]} x {shape_hw[1]} px.",
        f"Measurements: {RESULT}.json.",
    ]
    write_neck(file, with_rows(teacher.yaml, rows), about)
    content = json.dumps({**table, "chosen": chosen}, indent=1)
    file.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    LOGGER.info(
        f"Results saved to {colorstr('bold', file)}\n"
        f"Convert the model: python -m models.transplant --weights {path} --cfg {file}"
    )
    return file


def read_table(file: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a table of `models.latency`, or one that this program has written.

    Raises:
        UserError: no such file, no table, or another model's.
    """
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8"))
        other = [name for name in KEY if table[name] != key[name]]
        if not all(len(one["range_ms"]) == 2 and one["ms"] > 0 for one in table["graphs"]):
            raise ValueError("its graphs have no times")
    except OSError as error:
        raise UserError(f"--table {file}: cannot be read ({error.strerror or error}).") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--table {file}: is no table of this program or of latency.py ({error}).") from error
    if other:
        raise UserError(f"--table {file}: was measured for another model or image size ({', '.join(other)} differ).")
    return table


def errors_of(teacher: Model, options: Namespace, meta: Mapping[str, Any], imgsz: int, path: Path) -> dict[str, float]:
    """Returns `row_errors` on augmented training images of the data set."""
    if not (options.data or meta["data"]):
        raise UserError(f"{path} does not say which data set it was trained on: give --data.")
    spec = load_spec(options.data or meta["data"])
    labels = load_labels(spec.train, spec, False, options.workers, "train: ", need_labels=False)
    images = augmented_images(labels, imgsz, BATCH_SIZE, options.images, options.workers, options.seed)
    return row_errors(teacher, list(images), options.seed, resolve_amp(options.amp, select_device(options.device)))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
