"""Stands in for Rockchip's libraries where they are not: a compiled model is its ONNX file, and ONNX Runtime runs it.

The fixture `rockchip` copies this file to where the toolkit's and the board's library are imported from. The variable
STAND_IN, in words, spoils what they do.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

FAULTS = os.environ.get("STAND_IN", "").split(",")


def compute(model, images):
    """What the model gives for images uint8 (1, h, w, 3) RGB, as an NPU computes it: it divides by 255 itself."""
    assert images.dtype == np.uint8 and images.shape[0] == 1 and images.shape[3] == 3
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    pixels = images[..., ::-1] if "colours" in FAULTS else images
    return session.run(None, {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 255})


class RKNN:
    """The toolkit: prints where it likes, tells failures by its status or by an exception that ends in the reason."""

    def __init__(self, verbose):
        print("I rknn-toolkit2 version: 9.8.7")
        tempfile.mkdtemp()  # is left behind

    def config(self, mean_values, std_values, target_platform):
        assert (mean_values, std_values) == ([[0, 0, 0]], [[255, 255, 255]])
        if target_platform not in ("rk3588", "rk3566"):
            raise ValueError(f"Traceback (most recent call last):\nValueError: Invalid '{target_platform}'!\n")
        return 0

    def load_onnx(self, model):
        self.content = Path(model).read_bytes()
        return 0

    def build(self, do_quantization, dataset):
        if "unable" in FAULTS:
            print("I Building: 100%\r\n\x1b[1;31mE\x1b[0m \x1b[1;31mbuild: no such operator!\x1b[0m\nI bye")
            return -1
        assert do_quantization == bool(dataset)
        if dataset:
            notes = Path(os.environ["STAND_IN_NOTES"])
            for line in Path(dataset).read_text().splitlines():
                shutil.copy(line, notes)
        return None

    def export_rknn(self, path):
        Path(path).write_bytes(self.content)
        return 0

    def init_runtime(self):
        if "no simulator" in FAULTS:
            raise RuntimeError("librknnc.so has no simulator")
        return 0

    def inference(self, inputs, data_format):
        assert data_format == ["nhwc"]
        if "death" in FAULTS:
            os._exit(3)
        if "illness" in FAULTS:
            raise ValueError("out of memory")
        return compute(self.content, inputs[0])


class RKNNLite:
    """The board's library: prints its reasons and tells failures by its status, or None."""

    def load_rknn(self, path):
        self.content = Path(path).read_bytes()
        return 0 if len(self.content) > 1000 else -1

    def init_runtime(self):
        return -1 if "other chip" in FAULTS else 0

    def inference(self, inputs):
        return None if "illness" in FAULTS else compute(self.content, inputs[0])
