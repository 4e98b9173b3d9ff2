"""What a slim neck saves in time: each neck as trained and rewritten for inference, in each runtime.

Weights are random, for speed does not depend on them. "As trained" has its batch norm folded and is otherwise what
training left; "rewritten" is what `models.deploy.rewrite` makes of it. Timed is one image from pixels to decoded rows.
In a runtime all models take turns, round after round, and the median of each counts; every runtime has a process of
its own, since ONNX Runtime's waiting threads slow the others. The last column is the share of the C3 neck's time,
rewritten.

    python benchmarks/neck.py --size s --imgsz 640 --json neck.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import number, run_command
from utils.files import ROOT

NECKS = {"C3": "", "gsneck": "-gsneck", "gsconv": "-gsconv", "slimneck": "-slimneck", "slimneck-c": "-slimneck-c"}
FORMS = ("as trained", "rewritten")
RUNTIMES = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino", "openvino int8": "openvino"}
WARM_UP_ROUNDS = 2
Inference = Callable[[], Any]


class Subject(NamedTuple):
    """A model that is timed: a neck in one of its forms."""

    neck: str
    form: str

    def file(self, folder: Path, suffix: str) -> Path:
        """Returns where the exported model is."""
        return folder / f"{self.neck}-{self.form.replace(' ', '-')}{suffix}"


SUBJECTS = [Subject(neck, form) for neck in NECKS for form in FORMS]


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = argparse.ArgumentParser("benchmarks/neck.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=["n", "s", "m", "l"], default="s", help="size of the models")
    add("--imgsz", "--img", type=number(int, 32), default=640, help="image side in pixels")
    add("--repeats", type=number(int, 1), default=20, help="rounds")
    every = list(RUNTIMES)
    add("--runtimes", nargs="+", choices=every, default=every, metavar="RUNTIME", help=f"of {every}")
    add("--json", type=Path, help="write the figures to this file")
    add("--measure", nargs=2, help=argparse.SUPPRESS)  # runtime and folder: one runtime in this process, JSON
    return parser


def main(options: argparse.Namespace) -> None:
    """Prints the table, or with --measure one runtime's times as JSON."""
    if options.measure:
        runtime, folder = options.measure
        print(json.dumps(measure(runtime, Path(folder), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = write_models(Path(folder), options)
        times = {runtime: measure_apart(runtime, folder, options) for runtime in options.runtimes}
    about = f"yolov5{options.size}, {options.imgsz} px, median of {options.repeats} rounds, {cpu_name()}"
    versions = {package: version(package) for package in dict.fromkeys(RUNTIMES[name] for name in options.runtimes)}
    print(f"{about}; {', '.join(f'{name} {number_}' for name, number_ in versions.items())}")
    print_table(facts, times)
    if options.json:
        rows = [
            {**subject._asdict(), **facts[i], **{name: times[name][i] for name in times}}
            for i, subject in enumerate(SUBJECTS)
        ]
        options.json.write_text(json.dumps({"about": about, "versions": versions, "rows": rows}, indent=1))


def cpu_name() -> str:
    """Returns what the CPU calls itself, and the cores that this process may use."""
    from models.backends.runtime import thread_count

    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {thread_count()} threads"


def forms_of(neck: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a neck's model in its forms, as modules that return decoded rows."""
    import copy

    import torch

    from models.decode import Decoder
    from models.deploy import InferenceModel, fold_model, rewrite
    from models.yolo import Model

    torch.manual_seed(0)
    trained = Model(f"yolov5{options.size}{NECKS[neck]}.yaml").eval().requires_grad_(False)
    rewritten = rewrite(trained)
    head = Decoder.of(trained.detect, (options.imgsz, options.imgsz))
    rewritten = InferenceModel(rewritten.trunk, head, rewritten.names, rewritten.stride).eval()
    folded = fold_model(copy.deepcopy(trained))
    folded.detect.inplace = False  # exporters cannot follow it
    return {"as trained": folded, "rewritten": rewritten}


def write_models(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Exports every model to every runtime; returns parameters, GFLOPs and nodes of each."""
    import torch

    facts = []
    image = torch.zeros(1, 3, options.imgsz, options.imgsz)
    for neck in NECKS:
        for form, model in forms_of(neck, options).items():
            subject = Subject(neck, form)
            print(f"preparing {neck} {form} ...", file=sys.stderr)
            nodes = write_onnx(model, image, subject.file(folder, ".onnx"))
            write_openvino(subject, folder, options)
            facts.append(
                {
                    "params": sum(parameter.numel() for parameter in model.parameters()),
                    "gflops": count_gflops(model, image),
                    "nodes": nodes,
                }
            )
    return facts


def count_gflops(model: Any, image: Any) -> float:
    """Returns the floating-point operations, 1e9, of a module's convolutions and products on an image (1, 3, h, w)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 1e9


def write_onnx(model: Any, image: Any, path: Path) -> int:
    """Writes a module, (b, 3, h, w) to rows, as ONNX; returns the number of its nodes."""
    import onnx
    import torch

    class Rows(torch.nn.Module):
        """The module's rows alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Maps images to rows."""
            output = self.model(x)
            return output[0] if isinstance(output, tuple) else output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Rows().eval(), (image,), path, dynamo=False, opset_version=17, input_names=["images"])
    return len(onnx.load(path).graph.node)


def write_openvino(subject: Subject, folder: Path, options: argparse.Namespace) -> None:
    """Writes a model for OpenVINO in float32 and, calibrated on the sample pictures, in int8, where they are wanted."""
    if not any(RUNTIMES[runtime] == "openvino" for runtime in options.runtimes):
        return
    import numpy as np
    import openvino

    from models.export.openvino_int8 import quantize
    from models.export.telemetry import without_telemetry
    from utils.images import letterbox, read_image

    with without_telemetry():
        model = openvino.convert_model(subject.file(folder, ".onnx"))
    openvino.save_model(model, subject.file(folder, ".xml"), compress_to_fp16=False)
    if "openvino int8" in options.runtimes:
        paths = sorted((ROOT / "data" / "images").glob("*.jpg"))[:8]
        boxed = [letterbox(read_image(path), options.imgsz, auto=False).image for path in paths]
        images = [np.ascontiguousarray(image[None, :, :, ::-1].transpose(0, 3, 1, 2)) for image in boxed]
        openvino.save_model(quantize(model, images, 1), subject.file(folder, "-int8.xml"), compress_to_fp16=False)


def measure_apart(runtime: str, folder: str, options: argparse.Namespace) -> list[float]:
    """Returns the median milliseconds of each model in a runtime, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", runtime, folder, "--size", options.size]
    command += ["--imgsz", str(options.imgsz), "--repeats", str(options.repeats)]
    print(f"timing {runtime} ...", file=sys.stderr)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(runtime: str, folder: Path, options: argparse.Namespace) -> list[float]:
    """Times all models of a runtime by turns; returns the median milliseconds of each."""
    import numpy as np

    load = {"torch": load_torch, "onnxruntime": load_onnxruntime}.get(runtime, load_openvino)
    image = np.random.default_rng(0).random((1, 3, options.imgsz, options.imgsz), np.float32)
    inferences = load(folder, image, options, "-int8.xml" if runtime == "openvino int8" else ".xml")
    seconds: list[list[float]] = [[] for _ in inferences]
    for _ in range(WARM_UP_ROUNDS + options.repeats):
        for taken, inference in zip(seconds, inferences, strict=True):
            start = time.perf_counter()
            inference()
            taken.append(time.perf_counter() - start)
    return [1e3 * float(np.median(taken[WARM_UP_ROUNDS:])) for taken in seconds]


def load_torch(_folder: Path, image: Any, options: argparse.Namespace, _suffix: str) -> list[Inference]:
    """Builds the models anew."""
    import torch

    from utils.devices import prepare_cpu_memory

    prepare_cpu_memory(torch.device("cpu"))
    inputs = torch.from_numpy(image).to(memory_format=torch.channels_last)

    def inference_of(model: torch.nn.Module) -> Inference:
        model = model.to(memory_format=torch.channels_last)
        return torch.inference_mode()(lambda: model(inputs))

    return [inference_of(model) for neck in NECKS for model in forms_of(neck, options).values()]


def load_onnxruntime(folder: Path, image: Any, _options: argparse.Namespace, _suffix: str) -> list[Inference]:
    """Loads the ONNX files."""
    import onnxruntime

    from models.backends.runtime import thread_count

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = thread_count()

    def inference_of(path: Path) -> Inference:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"images": image})

    return [inference_of(subject.file(folder, ".onnx")) for subject in SUBJECTS]


def load_openvino(folder: Path, image: Any, _options: argparse.Namespace, suffix: str) -> list[Inference]:
    """Loads the files of this suffix, to be computed in float32 where they are not quantised."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}

    def inference_of(path: Path) -> Inference:
        request = core.compile_model(path, "CPU", settings).create_infer_request()
        return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)

    return [inference_of(subject.file(folder, suffix)) for subject in SUBJECTS]


def print_table(facts: list[dict[str, Any]], times: dict[str, list[float]]) -> None:
    """Prints a line for each model as a Markdown table: milliseconds, and the share of the rewritten C3 neck's."""
    print(f"| neck | form | params | GFLOPs | nodes | {' | '.join(f'{name}, ms' for name in times)} |")
    print("| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(times))
    first = SUBJECTS.index(Subject("C3", "rewritten"))
    for i, (neck, form) in enumerate(SUBJECTS):
        figures = " | ".join(f"{taken[i]:.1f} ({taken[i] / taken[first]:.3f})" for taken in times.values())
        fact = facts[i]
        print(f"| {neck} | {form} | {fact['params']} | {fact['gflops']:.1f} | {fact['nodes']} | {figures} |")


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
