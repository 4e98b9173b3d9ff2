"""NCNN models on the CPU: one image at a time, made for ARM.

A folder `*_ncnn_model` holds the graph (.param), the weights (.bin) and `metadata.yaml`, in YOLOv5's layout.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from models.backends.base import ArrayBackend, cpu_only, find_part, require, thread_count
from models.backends.metadata import Graph, Metadata, texts_of_yaml
from models.backends.safety import check_ncnn
from utils.errors import UserError
from utils.log import LOGGER

METADATA_FILE = "metadata.yaml"


def read_texts(path: Path) -> dict[str, str]:
    """Returns what a folder says of its model."""
    return texts_of_yaml(find_part(path, METADATA_FILE, "file of names and stride"))


class NcnnBackend(ArrayBackend):
    """A network of a folder `*_ncnn_model`."""

    batch = 1

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a folder.

        Raises:
            UserError: ncnn is missing or cannot read it, it is no YOLOv5 detector, or another device than the CPU.
        """
        cpu_only(device, "NCNN")
        parameters, weights = (find_part(path, f"*{suffix}", f"NCNN {suffix} file") for suffix in (".param", ".bin"))
        check_ncnn(parameters)
        texts = read_texts(path)
        self._ncnn = require("ncnn", "ncnn", path)
        self._network = self._ncnn.Net()
        self._network.opt.num_threads = thread_count()
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):  # used where the CPU has it
            setattr(self._network.opt, option, half)
        if self._network.load_param(str(parameters)) != 0 or self._network.load_model(str(weights)) != 0:
            raise UserError(f"--weights {path}: NCNN cannot load it: the files are damaged, or of a newer NCNN.")
        precision = "float16" if half else "float32"
        self.device = f"NCNN {self._ncnn.__version__} CPU {precision} ({thread_count()} threads)"
        LOGGER.info(f"{path}: {self.device}")
        inputs, outputs = self._network.input_names(), self._network.output_names()
        if not inputs or not outputs:
            raise UserError(f"--weights {path}: the graph has no input or no output.")
        self._input, self._output = inputs[0], outputs[0]
        found = Metadata.from_texts(texts, path)
        if found is None:
            raise UserError(f"{path / METADATA_FILE}: says neither stride nor names: export the model again.")
        sides = [] if "metadata" in texts else [int(side) for side in re.findall(r"\d+", texts.get("imgsz", ""))]
        height, width = (sides[0], sides[-1]) if sides else found.shape_hw
        columns = 5 + len(found.names) if "metadata" in texts else None  # the graph tells no lengths
        self.take_description(texts, Graph(1, height, width, None, columns), path)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for an image (1, 3, h, w)."""
        extractor = self._network.create_extractor()
        image = np.ascontiguousarray(inputs[0])  # the Mat only points to it
        extractor.input(self._input, self._ncnn.Mat(image))
        status, output = extractor.extract(self._output)
        if status != 0:
            raise UserError(f"NCNN could not compute '{self._output}' (status {status}): export the model again.")
        return np.array(output)[None]


load = NcnnBackend
