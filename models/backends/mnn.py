"""MNN files on the CPU: Alibaba's runtime for phones, also for x86. The file's metadata is its business code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from models.backends.base import ArrayBackend, cannot_load, cpu_only, require, thread_count
from models.backends.metadata import Graph, Metadata
from utils.errors import UserError
from utils.log import LOGGER


class MnnBackend(ArrayBackend):
    """A module of MNN's."""

    def __init__(self, path: Path, device: str = "", half: bool = False) -> None:
        """Loads a file.

        Raises:
            UserError: MNN is missing or cannot read it, it is none of export.py's, or another device than the CPU.
        """
        cpu_only(device, "MNN")
        mnn = require("MNN", "MNN", path)
        self._expr = mnn.expr
        precision = mnn.expr.PrecisionMode.Low if half else mnn.expr.PrecisionMode.High
        try:
            self._module = mnn.nn.load_module_from_file(
                str(path), [], [], thread_num=thread_count(), precision_mode=precision
            )
            texts = {"metadata": self._module.get_info()["bizCode"]}
            json.loads(texts["metadata"])
        except (KeyError, RuntimeError, SystemError) as error:
            raise cannot_load(path, "MNN", "it is damaged, or of a newer MNN") from error
        except ValueError as error:
            raise UserError(
                f"--weights {path}: says nothing of its classes and size: export it with export.py."
            ) from error
        self.device = f"MNN {mnn.version()} CPU {'16 bit' if half else 'float32'} ({thread_count()} threads)"
        LOGGER.info(f"{path}: {self.device}")
        said = Metadata.from_texts(texts, path)
        height, width = (None, None) if said.dynamic else said.shape_hw
        batch = None if said.dynamic else said.batch
        self.take_description(texts, Graph(batch, height, width, None, 5 + len(said.names)), path)

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the rows of images (b, 3, h, w)."""
        images = self._expr.const(np.ascontiguousarray(inputs), list(inputs.shape), self._expr.NCHW)
        outputs = self._module.onForward([images])
        return self.rows([np.array(self._expr.convert(output, self._expr.NCHW).read()) for output in outputs])


load = MnnBackend
