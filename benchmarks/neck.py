"""What the slim-neck saves: costs and latency of YOLOv5 with its C3 neck and with the GSConv family.

For each model as trained (batch norm folded, as YOLOv5 runs it) and rewritten for inference: parameters, GFLOPs, nodes
of the ONNX graph, and the median latency in PyTorch (float32), ONNX Runtime (float32, int8) and OpenVINO (float32,
bfloat16, int8). A model YAML's name may have an activation behind it: yolov5s:relu. Weights are random: they change no
latency. Each runtime has a process of its own, since spinning threads of one slow the other; in it the
models take turns, so that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import measured
from models.backends.base import processor_name
from models.latency import run_onnxruntime
from utils.cli import number, run_command
from utils.errors import UserError

NECKS = ("", "-gsneck", "-gsconv", "-slimneck", "-slimneck-c", "-slimneck-q")
FORMS = ("as trained", "rewritten")
LIST = "models.json"  # of the graphs in the folder
RUNTIMES = ("torch", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
CALIBRATION_IMAGES = 4  # ranges change no latency
OPSET = 17

Run = Callable[[], Any]


@dataclass(frozen=True)
class Entry:
    """One model in one form.

    Attributes:
        model: name of the model YAML.
        form: one of FORMS.
        parameters: number of weights.
        gflops: for one image.
        nodes: of the ONNX graph.
        file: the ONNX graph.
    """

    model: str
    form: str
    parameters: int
    gflops: float
    nodes: int
    file: str


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = argparse.ArgumentParser("benchmarks/neck.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="s", choices=tuple("nsmlx"), help="size of the models")
    add("--models", nargs="+", help="names of model YAMLs; the first is compared with; default: all necks of --size")
    add("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="in which forms")
    add("--imgsz", "--img", "--img-size", type=number(int, 32), default=640, help="image side in pixels")
    add("--repeats", type=number(int, 1), default=30, help="rounds; the median counts")
    add("--threads", type=number(int, 1), default=os.cpu_count(), help="threads of each runtime")
    add("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES, help="where to run")
    add("--clock", default="wall", choices=tuple(CLOCKS), help="cpu: CPU time, for busy machines; with --threads 1")
    add("--json", default="", metavar="FILE", help="write the results there as well")
    add("--measure", default="", choices=RUNTIMES, help=argparse.SUPPRESS)  # this process measures one runtime
    add("--folder", default="", help=argparse.SUPPRESS)  # of the graphs and their list
    return parser


def main(options: argparse.Namespace) -> None:
    """Builds the models, measures each runtime in a process of its own and prints the table."""
    if options.imgsz % 32:
        raise UserError(f"--imgsz {options.imgsz}: a multiple of 32 is needed")
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        entries = write_graphs(Path(folder), options)
        line = ["--folder", folder, "--clock", options.clock]
        line += ["--imgsz", options.imgsz, "--repeats", options.repeats, "--threads", options.threads]
        results = [measured(__file__, *line, "--measure", runtime) for runtime in options.runtimes]
    how = f"{options.imgsz} px, batch 1, median of {options.repeats} ({options.clock} time)"
    print(f"{processor_name()}, {options.threads} threads, {how}, Python {platform.python_version()}")
    print_table(entries, results)
    if options.json:
        rows = [asdict(entry) | {"file": Path(entry.file).name} for entry in entries]
        report = {"processor": processor_name(), "options": vars(options), "models": rows, "runtimes": results}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def write_graphs(folder: Path, options: argparse.Namespace) -> list[Entry]:
    """Writes every model in both forms as ONNX, and their list as JSON; returns the list."""
    import onnx
    import torch

    entries = []
    image = torch.zeros(1, 3, options.imgsz, options.imgsz)
    for name in options.models or [f"yolov5{options.size}{neck}" for neck in NECKS]:
        for form, module in both_forms(name, options.imgsz).items():
            if form not in options.forms:
                continue
            file = folder / f"{name.replace(':', ' ')} {form}.onnx"
            export(module, image, file)
            parameters = sum(parameter.numel() for parameter in module.parameters())
            nodes = len(onnx.load(str(file)).graph.node)
            entries.append(Entry(name, form, parameters, count_gflops(module, image), nodes, str(file)))
    (folder / LIST).write_text(json.dumps([asdict(entry) for entry in entries]))
    return entries


def both_forms(name: str, imgsz: int) -> dict[str, Any]:
    """Builds a model as trained, giving rows alone, and rewritten for images of side `imgsz`; by FORMS."""
    import torch
    from torch import nn

    from models.common import activation_key
    from models.config import read_config
    from models.deploy import rewrite
    from models.yolo import Model

    class Rows(nn.Module):
        def __init__(self, detector: nn.Module):
            super().__init__()
            self.detector = detector

        def forward(self, x):
            return self.detector(x)[0]

    torch.manual_seed(0)
    name, _, activation = name.partition(":")
    config, _ = read_config(f"{name}.yaml")
    model = Model({**config, "activation": activation_key(activation)} if activation else config).eval()
    rewritten = rewrite(model)
    rewritten.decoder = model.head.output((imgsz, imgsz))
    return dict(zip(FORMS, (Rows(model.fuse()).eval(), rewritten.eval()), strict=True))


def export(module, image, file: Path) -> None:
    """Writes a module as ONNX for images of the shape of `image`."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter torch recommends needs onnxscript
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are meant to be fixed
        names = {"input_names": ["images"], "output_names": ["output"]}
        torch.onnx.export(module, (image,), str(file), dynamo=False, opset_version=OPSET, **names)


def count_gflops(module, image) -> float:
    """Returns the floating point operations of one run, two a multiply-add, in 1e9."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops() / 1e9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all models in one runtime: its name, its version, and each model's median in ms, in the list's order."""
    import numpy as np

    entries = [Entry(**values) for values in json.loads(Path(options.folder, LIST).read_text())]
    image = np.random.default_rng(0).random((1, 3, options.imgsz, options.imgsz), dtype=np.float32)
    runs, version = LOADERS[options.measure](entries, image, options.threads)
    clock = CLOCKS[options.clock]
    for run in runs * 2:  # the first runs lay out memory
        run()
    seconds = np.empty((options.repeats, len(runs)))
    for repeat in range(options.repeats):
        order = range(len(runs)) if repeat % 2 else reversed(range(len(runs)))
        for place in order:
            start = clock()
            runs[place]()
            seconds[repeat, place] = clock() - start
    medians_ms = (1000 * np.median(seconds, 0)).tolist()
    return {"runtime": options.measure, "version": version, "ms": medians_ms}


def load_torch(entries: Sequence[Entry], image, threads: int) -> tuple[list[Run], str]:
    """Returns a function for each model that runs it in PyTorch, and the version."""
    import torch

    torch.set_num_threads(threads)
    inputs = torch.from_numpy(image).contiguous(memory_format=torch.channels_last)

    def loaded(module) -> Run:
        module = module.to(memory_format=torch.channels_last)
        return torch.inference_mode()(lambda: module(inputs))

    names = list(dict.fromkeys(entry.model for entry in entries))
    forms = {name: both_forms(name, image.shape[2]) for name in names}
    return [loaded(forms[entry.model][entry.form]) for entry in entries], torch.__version__


def load_onnxruntime(entries: Sequence[Entry], image, threads: int) -> tuple[list[Run], str]:
    """Returns a function for each model that runs it in ONNX Runtime, and the version."""
    import onnxruntime

    return [run_onnxruntime(entry.file, image, threads) for entry in entries], onnxruntime.__version__


def load_onnxruntime_int8(entries: Sequence[Entry], image, threads: int) -> tuple[list[Run], str]:
    """Does the same for the models quantised as export.py does it."""
    from models.export.onnx import quantize

    quantised = [replace(entry, file=entry.file.replace(".onnx", "-int8.onnx")) for entry in entries]
    for entry, made in zip(entries, quantised, strict=True):
        quantize(Path(entry.file), Path(made.file), calibration(image))
    return load_onnxruntime(quantised, image, threads)


def calibration(image) -> list[Any]:
    """Returns images to quantise with, uint8 of the shape of `image`."""
    import numpy as np

    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, image.shape, dtype=np.uint8) for _ in range(CALIBRATION_IMAGES)]


def load_openvino(
    entries: Sequence[Entry],
    image,
    threads: int,
    change: Callable[[Any], Any] = lambda model: model,
    precision: str = "f32",
) -> tuple[list[Run], str]:
    """Returns a function for each model that runs it in OpenVINO, after a `change`, and the version."""
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}

    def loaded(file: str) -> Run:
        request = core.compile_model(change(core.read_model(file)), "CPU", config).create_infer_request()
        return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)

    return [loaded(entry.file) for entry in entries], openvino.__version__.split("-")[0]


def load_openvino_int8(entries: Sequence[Entry], image, threads: int) -> tuple[list[Run], str]:
    """Does the same for the models quantised as export.py does it."""
    from models.export.openvino import quantize

    return load_openvino(entries, image, threads, lambda model: quantize(model, calibration(image), batch=1))


LOADERS: dict[str, Callable[[Sequence[Entry], Any, int], tuple[list[Run], str]]] = {
    "torch": load_torch,
    "onnxruntime": load_onnxruntime,
    "onnxruntime-int8": load_onnxruntime_int8,
    "openvino": load_openvino,
    "openvino-bf16": functools.partial(load_openvino, precision="bf16"),
    "openvino-int8": load_openvino_int8,
}


def print_table(entries: Sequence[Entry], results: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each model and form: costs, and for each runtime ms and two shares of the first one's."""
    for result in results:
        print(f"{result['runtime']} {result['version']}")
    print("ms; in brackets the share of the first model's time, of the same form's and of its first form's")
    forms = len({entry.form for entry in entries})
    header = f"{'model':20} {'form':11} {'parameters':>10} {'GFLOPs':>6} {'nodes':>5}"
    print(header + "".join(f"{result['runtime']:>23}" for result in results))
    for place, entry in enumerate(entries):
        costs = f"{entry.model:20} {entry.form:11} {entry.parameters:10} {entry.gflops:6.2f} {entry.nodes:5}"
        print(costs + "".join(f"{cell(result['ms'], place, forms):>23}" for result in results))


def cell(medians_ms: Sequence[float], place: int, forms: int) -> str:
    """Returns a time with its share of the first model's in the same form, and of the first model's first form."""
    baseline = place % forms
    spent_ms = medians_ms[place]
    return f"{spent_ms:.1f} ({spent_ms / medians_ms[baseline]:.3f} {spent_ms / medians_ms[0]:.3f})"


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
