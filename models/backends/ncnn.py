"""NCNN models on the CPU: one image at a time, made for ARM.

A folder `*_ncnn_model` holds the graph (.param), the weights (.bin) and `metadata.yaml`, in YOLOv5's layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.backends.base import (
    UNKNOWN_SHAPE_HW,
    ArrayBackend,
    Graph,
    cpu_only,
    describe,
    find_export,
    find_part,
    require,
    texts_of_yaml,
    thread_count,
)
from models.backends.metadata import Metadata
from utils.errors import UserError
from utils.log import LOGGER

METADATA_FILE = "metadata.yaml"
MAGIC = "7767517"  # first line of a graph in text


class NcnnBackend(ArrayBackend):
    """A network."""

    batch = 1

    def __init__(self, ncnn: Any, network: Any, texts: Mapping[str, str], where: Path, device: str) -> None:
        """Takes a loaded network.

        Args:
            ncnn: the library.
            network: `ncnn.Net`.
            texts: what the folder says of it.
            where: the folder, for messages.
            device: where it runs, in words.

        Raises:
            UserError: it has no input or output, or is no YOLOv5 detector.
        """
        self._ncnn, self._network, self.device, self.dynamic = ncnn, network, device, False
        if not network.input_names() or not network.output_names():
            raise UserError(f"--weights {where}: the graph has no input or no output.")
        self._input, self._output = network.input_names()[0], network.output_names()[0]
        found = Metadata.from_texts(texts, str(where))
        if found is None:
            raise UserError(f"{where / METADATA_FILE}: says neither stride nor names: export the model again.")
        height, width = found.shape_hw if "metadata" in texts else _sides(texts.get("imgsz", ""))
        columns = 5 + len(found.names)
        if "metadata" not in texts:
            shape = self.run(np.zeros((1, 3, height, width), np.float32)).shape
            columns = shape[2] if len(shape) == 3 else None
        self.metadata = describe(texts, Graph(1, height, width, None, columns), where)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the first output for an image (1, 3, h, w)."""
        extractor = self._network.create_extractor()
        picture = np.ascontiguousarray(inputs[0])  # the Mat only points to it
        extractor.input(self._input, self._ncnn.Mat(picture))
        status, output = extractor.extract(self._output)
        if status != 0:
            raise UserError(f"NCNN could not compute '{self._output}' (status {status}): export the model again.")
        return np.array(output)[None]


def load(weights: str | Path, device: str = "", half: bool = False) -> NcnnBackend:
    """Loads a folder `*_ncnn_model`.

    Raises:
        UserError: nothing there, ncnn is missing or cannot read it, or another device than the CPU.
    """
    cpu_only(device, "NCNN")
    path = find_export(weights)
    graph, parameters = (find_part(path, f"*{suffix}", f"NCNN {suffix} file") for suffix in (".param", ".bin"))
    _check_graph(graph)
    texts = texts_of_yaml(find_part(path, METADATA_FILE, "file of names and stride"))
    ncnn = require("ncnn", "ncnn", path)
    network = ncnn.Net()
    network.opt.num_threads = thread_count()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):  # used where the CPU has it
        setattr(network.opt, option, half)
    if network.load_param(str(graph)) != 0 or network.load_model(str(parameters)) != 0:
        raise UserError(f"--weights {path}: NCNN cannot load it: the files are damaged, or of a newer NCNN.")
    words = f"NCNN {ncnn.__version__} CPU {'float16' if half else 'float32'} ({thread_count()} threads)"
    LOGGER.info(f"{path}: {words}")
    return NcnnBackend(ncnn, network, texts, path, words)


def _check_graph(path: Path) -> None:
    """Makes sure that a graph has as many layers and blobs as it says: NCNN takes memory for them before it reads on.

    Each line after the first two is: type, name, numbers of inputs and outputs, their names, parameters.

    Raises:
        UserError: it has not, or it is no graph.
    """
    try:
        magic, counts, *lines = path.read_text(encoding="ascii").split("\n")
        layers, blobs = map(int, counts.split())
        rows = [line.split() for line in lines if line.strip()]
        ends = [(int(row[2]), int(row[3])) for row in rows]
        fits = all(0 <= min(pair) and 4 + sum(pair) <= len(row) for pair, row in zip(ends, rows, strict=True))
        whole = layers == len(rows) and 0 < blobs <= sum(outputs for _, outputs in ends)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read ({error.strerror}).") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"--weights {path}: is not an NCNN graph, or is damaged ({error}).") from error
    if magic != MAGIC or not (fits and whole):
        raise UserError(f"--weights {path}: is not an NCNN graph, or is damaged (its counts are wrong).")


def _sides(imgsz: str) -> tuple[int, int]:
    """Returns height and width as later YOLO versions note them, `[640, 640]`."""
    sides = [int(side) for side in re.findall(r"\d+", imgsz)]
    return (sides[0], sides[-1]) if sides else UNKNOWN_SHAPE_HW
