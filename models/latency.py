"""What model files cost in milliseconds, run in turns: of each the time, and the difference from the first.

Of this repository it needs nothing, so that a folder that `python -m models.choose_neck --graphs FOLDER` has written
can be measured on another device: numpy and ONNX Runtime (or OpenVINO) are enough there.

    python latency.py --threads 4        # in that folder; writes table.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GRAPHS, TABLE = "graphs.json", "table.json"  # what a folder holds, and what comes of it
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LOADS, COPIES = 6, 3  # what is the same in all of 6 loads is chance in one case of 64
WARM_UP = 2  # the first runs lay out memory


def run_onnxruntime(file: str, image: np.ndarray, threads: int) -> Callable[[], Any]:
    """Returns a function that runs an ONNX file on an image."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # else one graph's threads slow the next
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {session.get_inputs()[0].name: image})


def run_openvino(file: str, image: np.ndarray, threads: int, precision: str = "f32") -> Callable[[], Any]:
    """Returns a function that runs an OpenVINO or ONNX file on an image; `precision` is of what is not int8."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(file, "CPU", config).create_infer_request()
    return lambda: request.infer({0: image}, share_inputs=True, share_outputs=True)


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def run_in_turns(loaders: Sequence[Callable[[], Callable[[], Any]]], rounds: int, clock: str) -> np.ndarray:
    """Times models, each loaded several times.

    Where a runtime happens to put a model in memory changes its time by some percent as long as it is loaded. So all
    are loaded LOADS times anew, in another order each time, the first in COPIES copies, as all are compared with it.
    Each round then runs every model once, forwards and backwards in turns, so that whatever else the machine does meets
    all alike.

    Args:
        loaders: each loads a model and returns what runs it.
        rounds: how often each is run at least, all loads together.
        clock: one of CLOCKS.

    Returns:
        Milliseconds (LOADS, models): medians of a load's runs, float64.
    """
    now, generator = CLOCKS[clock], np.random.default_rng(0)
    ms = np.empty((LOADS, len(loaders)))
    for load in range(LOADS):
        places = generator.permutation([0] * (COPIES - 1) + list(range(len(loaders))))
        runs = [loaders[place]() for place in places]
        for run in runs * WARM_UP:
            run()
        spent = np.empty((-(-rounds // LOADS), len(runs)))
        for number, times in enumerate(spent):
            for one in range(len(runs)) if number % 2 else reversed(range(len(runs))):
                start = now()
                runs[one]()
                times[one] = 1000 * (now() - start)
        medians = np.median(spent, axis=0)
        ms[load] = [medians[places == place].mean() for place in range(len(loaders))]
    return ms


def measure(folder: str | Path, threads: int = 1, rounds: int = 30, clock: str = "wall") -> dict[str, Any]:
    """Measures the files that a folder's graphs.json lists, as `run_in_turns` does.

    Args:
        folder: of the files.
        threads: of the runtime.
        rounds: how often each is run at least, all loads together.
        clock: "wall", or "cpu": CPU time of this process, for busy machines.

    Returns:
        What graphs.json says, each file with `ms` and `difference_ms`, medians of the loads', and `range_ms`, the
        smallest and the largest difference of a load.
    """
    table = json.loads(Path(folder, GRAPHS).read_text(encoding="utf-8"))
    module, load = __import__(table["runtime"]), RUNTIMES[table["runtime"]]
    shape = (1, table["channels"], *table["shape_hw"])
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    files = [str(Path(folder, one["file"])) for one in table["graphs"]]
    ms = run_in_turns([functools.partial(load, file, image, threads) for file in files], rounds, clock)
    differences = ms - ms[:, :1]
    for place, one in enumerate(table["graphs"]):
        one["ms"] = round(float(np.median(ms[:, place])), 4)
        one["difference_ms"] = round(float(np.median(differences[:, place])), 4)
        one["range_ms"] = [
            round(float(value), 4) for value in (differences[:, place].min(), differences[:, place].max())
        ]
    measured = {"version": module.__version__, "processor": processor(), "machine": platform.machine()}
    return table | measured | {"threads": threads, "rounds": rounds, "clock": clock}


def processor() -> str:
    """Returns what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(iter(names), "") or platform.processor() or platform.machine()


def main() -> int:
    """Measures a folder and writes the table into it."""
    parser = argparse.ArgumentParser("latency.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(Path(__file__).parent), help="default: where this file is")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the runtime")
    parser.add_argument("--rounds", type=int, default=30, help="how often each file is run, over six loads")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: CPU time, for busy machines")
    options = parser.parse_args()
    table = measure(options.folder, options.threads, options.rounds, options.clock)
    file = Path(options.folder, TABLE)
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{table['graphs'][0]['ms']:.2f} ms, {len(table['graphs']) - 1} changes measured: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
