"""Run by the Python that has rknn-toolkit2, never imported: compiles an ONNX file, then answers with its simulator.

    python -I rknn_compiler.py model.onnx model.rknn CHIP [IMAGES]

IMAGES is a text file that names images to calibrate int8 on; without it the model computes in float16. The simulator
runs what this process has compiled, and no .rknn file, so it is asked here: each line of standard input names a .npy
file, an image uint8 (1, h, w, 3) RGB, beside which the outputs are written as .npz. Every step is answered by a line of
JSON, {"said": text} or {"error": reason}, after which nothing follows: the first tells the toolkit's version once
the model is compiled, the second that the simulator runs. What the toolkit prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence


def session(source: str, target: str, chip: str, calibration: Sequence[str]) -> Iterator[str]:
    """Compiles `source` to `target`, then runs the simulator for every line of standard input; yields after each step.

    Raises:
        Exception: whatever the toolkit raises.
    """
    from importlib.metadata import version

    import numpy as np
    from rknn.api import RKNN

    rknn = RKNN(verbose=False)
    done("config", rknn.config(mean_values=[[0, 0, 0]], std_values=[[255, 255, 255]], target_platform=chip))
    done("load_onnx", rknn.load_onnx(model=source))
    done("build", rknn.build(do_quantization=bool(calibration), dataset=calibration[0] if calibration else None))
    done("export_rknn", rknn.export_rknn(target))
    yield version("rknn-toolkit2")
    done("init_runtime", rknn.init_runtime())
    yield "simulator"
    for line in sys.stdin:
        path = line.rstrip("\n")
        outputs = rknn.inference(inputs=[np.load(path)], data_format=["nhwc"])
        np.savez(os.path.splitext(path)[0], *outputs)
        yield "done"


def done(step: str, status: int | None) -> None:
    """Ends the process where the toolkit tells a failure by its status; it has printed why."""
    if status:
        sys.exit(f"{step} failed with status {status}")


def main() -> None:
    """Answers on what was standard output; nothing else may print there."""
    source, target, chip, *calibration = sys.argv[1:]
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            for said in session(source, target, chip, calibration):
                print(json.dumps({"said": said}), file=answers)
        except ImportError as error:
            print(json.dumps({"error": f"it is not there, or not all that it needs ({error})"}), file=answers)
        except Exception as error:  # the toolkit puts its whole traceback into the message; the reason comes last
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            print(json.dumps({"error": re.sub(r"^\w+Error: ", "", reason)}), file=answers)


if __name__ == "__main__":
    main()
