"""What the slim-neck saves: costs and latency of YOLOv5 with its C3 neck and with the GSConv family.

For each model as trained (batch norm folded, as YOLOv5 runs it) and rewritten for inference: parameters, GFLOPs, nodes
of the ONNX graph, and the median latency in PyTorch (float32), ONNX Runtime (float32, int8) and OpenVINO (float32,
bfloat16, int8). A model YAML's name may have an activation behind it: yolov5s:relu. Weights are random: they change no
latency. Each runtime has a process of its own, since spinning threads of one slow the other; in it the models take
turns, each loaded six times (`models.latency.run_in_turns`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import measured
from models.backends.base import processor_name
from models.latency import CLOCKS, LOADS, run_in_turns, run_onnxruntime, run_openvino
from utils.cli import number, run_command
from utils.errors import UserError

NECKS = ("", "-gsneck", "-gsconv", "-slimneck", "-slimneck-c", "-slimneck-q")
FORMS = ("as trained", "rewritten")
LIST = "models.json"  # of the graphs in the folder
Run = Callable[[], Any]
OF_FILES: dict[str, tuple[str, Callable[..., Run], bool]] = {  # package, what loads a file, whether it is of int8
    "onnxruntime": ("onnxruntime", run_onnxruntime, False),
    "onnxruntime-int8": ("onnxruntime", run_onnxruntime, True),
    "openvino": ("openvino", run_openvino, False),
    "openvino-bf16": ("openvino", functools.partial(run_openvino, precision="bf16"), False),
    "openvino-int8": ("openvino", run_openvino, True),
}
RUNTIMES = ("torch", *OF_FILES)


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
    add("--repeats", type=number(int, 1), default=30, help=f"how often each is run, over {LOADS} loads")
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

    from models.choose_neck import export_graph

    entries = []
    image = torch.zeros(1, 3, options.imgsz, options.imgsz)
    for name in options.models or [f"yolov5{options.size}{neck}" for neck in NECKS]:
        for form, module in both_forms(name, options.imgsz).items():
            if form not in options.forms:
                continue
            file = folder / f"{name.replace(':', ' ')} {form}.onnx"
            export_graph(module, image, file)
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


def count_gflops(module, image) -> float:
    """Returns the floating point operations of one run, two a multiply-add, in 1e9."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops() / 1e9


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all models in one runtime.

    Returns:
        Its name and version, and in the list's order of each model: `ms`, the median of the loads, and `loads_ms`, a
        list for each load.
    """
    import numpy as np

    entries = [Entry(**values) for values in json.loads(Path(options.folder, LIST).read_text())]
    image = np.random.default_rng(0).random((1, 3, options.imgsz, options.imgsz), dtype=np.float32)
    if options.measure == "torch":
        package, loaders = "torch", torch_loaders(entries, image, options.threads)
    else:
        package, load, int8 = OF_FILES[options.measure]
        files = files_of(entries, image, package, int8)
        loaders = [functools.partial(load, file, image, options.threads) for file in files]
    ms = run_in_turns(loaders, options.repeats, options.clock)
    about = {"runtime": options.measure, "version": importlib.metadata.version(package)}
    return {**about, "ms": np.median(ms, axis=0).tolist(), "loads_ms": ms.tolist()}


def torch_loaders(entries: Sequence[Entry], image, threads: int) -> list[Callable[[], Run]]:
    """Returns for each model what loads it into PyTorch."""
    import torch

    torch.set_num_threads(threads)
    inputs = torch.from_numpy(image).contiguous(memory_format=torch.channels_last)
    names = list(dict.fromkeys(entry.model for entry in entries))
    forms = {name: both_forms(name, image.shape[2]) for name in names}

    def load(entry: Entry) -> Run:
        module = copy.deepcopy(forms[entry.model][entry.form]).to(memory_format=torch.channels_last)
        return torch.inference_mode()(lambda: module(inputs))

    return [functools.partial(load, entry) for entry in entries]


def files_of(entries: Sequence[Entry], image, package: str, int8: bool) -> list[str]:
    """Returns the models' files for a runtime, for int8 quantised as export.py does it."""
    from models.choose_neck import finish_graph

    pixels = (255 * image).astype("uint8")  # ranges change no latency
    return [str(finish_graph(Path(entry.file), pixels, package, int8)) for entry in entries]


def print_table(entries: Sequence[Entry], results: Sequence[dict[str, Any]]) -> None:
    """Prints a line for each model and form: costs, and for each runtime its time and share of the first model's."""
    for result in results:
        print(f"{result['runtime']} {result['version']}")
    print("ms; in brackets the share of the first model's time in the same form, ± half the range of the loads")
    forms = len({entry.form for entry in entries})
    header = f"{'model':23} {'form':11} {'parameters':>10} {'GFLOPs':>6} {'nodes':>5}"
    print(header + "".join(f"{result['runtime']:>22}" for result in results))
    for place, entry in enumerate(entries):
        costs = f"{entry.model:23} {entry.form:11} {entry.parameters:10} {entry.gflops:6.2f} {entry.nodes:5}"
        print(costs + "".join(f"{cell(result, place, place % forms):>22}" for result in results))


def cell(result: dict[str, Any], place: int, baseline: int) -> str:
    """Returns a model's time and its share of another's, which is of the same loads: both change from load to load."""
    share, spread = share_of(result, place, baseline)
    return f"{result['ms'][place]:.1f} ({share:.3f} ±{spread:.3f})"


def share_of(result: dict[str, Any], place: int, baseline: int) -> tuple[float, float]:
    """Returns which share of a model's time another takes: the median of the loads, and half of what they differ by."""
    shares = [times[place] / times[baseline] for times in result["loads_ms"]]
    return statistics.median(shares), (max(shares) - min(shares)) / 2


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
