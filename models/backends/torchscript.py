"""TorchScript files on PyTorch.

Such a file is a program: its modules' code is text in TorchScript, which torch compiles and interprets without Python.
It has no access to Python, the shell or the network, but some of torch's operators read and write files, and code may
run while the file is loaded. A file whose code names such an operator, or operators of an extension, or writes names in
a way that hides them, is refused before torch runs it. Bugs in torch's interpreter remain possible: open files of
strangers as ONNX.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backends.base import ArrayBackend, Graph, describe, find_export, plain_texts, without_half
from models.backends.metadata import PARSING_ERRORS
from utils.checkpoint import open_records
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.errors import UserError
from utils.log import LOGGER

FILE_OPERATORS = re.compile(r"\b(?:from_file|load|save|save_to_file|open|fork|import_ir_module|print|classes)\b")
EXTENSIONS = re.compile(r"\bops\b(?!\.(?:aten|prim|quantized)\.|\.torchvision\.nms\b)[\w.]*")
TEXTS = re.compile(r""""(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'""")
CODED_TEXT = re.compile(r"""\\(?!["'\\nrt])""")  # character codes, and lines that go on
DEFAULT_SHAPE = (1, 3, 640, 640)  # of files that do not say
PROBE_PX = 64  # side of the image that shows the columns of a file that takes any size
EXTRA_FILES = ("config.txt", "metadata")  # YOLOv5's, and ours


class TorchScriptBackend(ArrayBackend):
    """A TorchScript module; tensors go in and come out."""

    def __init__(self, module: Any, device: torch.device, texts: Mapping[str, str], graph: Graph, where: Path) -> None:
        """Takes a loaded module.

        Args:
            module: `torch.jit.ScriptModule` on `device`.
            device: where to run.
            texts: what the file says of itself.
            graph: the sizes that it was traced with, `rows` and `columns` open.
            where: the file, for messages.

        Raises:
            UserError: not a YOLOv5 detector.
        """
        self._module, self._device, self.device = module, device, device_line(device)
        tensors = (*module.parameters(), *module.buffers())
        self._dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
        graph = graph._replace(columns=self._probe(graph))
        self.metadata = describe(texts, graph, where)
        self.dynamic, self.batch = self.metadata.dynamic, graph.batch

    def preprocess(self, images: np.ndarray) -> Tensor:
        """Turns images, uint8 (b, 3, h, w) RGB, into a tensor of values 0 to 1 on the device."""
        inputs = torch.from_numpy(images).to(self._device, memory_format=torch.contiguous_format)
        return inputs.to(self._dtype).div_(255)

    def run(self, inputs: Tensor) -> Tensor:
        """Returns the first output for images (b, 3, h, w)."""
        with torch.inference_mode():
            output = self._module(inputs)
        return (output if isinstance(output, Tensor) else output[0]).float()

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Returns the outputs of several runs as one."""
        return torch.cat(tuple(parts))

    def filled(self, part: Tensor, missing: int) -> Tensor:
        """Returns inputs with `missing` empty images behind them."""
        return torch.cat((part, part.new_zeros((missing, *part.shape[1:]))))

    def warm_up(self, height: int, width: int) -> None:
        """Runs twice on CUDA, where torch watches the first run and compiles in the second."""
        for _ in range(2 * (self._device.type == "cuda")):
            self.predict(np.zeros((1, 3, height, width), np.uint8))

    def synchronize(self) -> None:
        """Waits for CUDA's queue; elsewhere there is none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _probe(self, graph: Graph) -> int | None:
        """Returns the last length of the output for an empty image; None where it is not (b, n, columns)."""
        shape = (graph.batch or 1, 3, graph.height or PROBE_PX, graph.width or PROBE_PX)
        output = self.run(torch.zeros(shape, dtype=self._dtype, device=self._device))
        return output.shape[2] if output.dim() == 3 else None


def load(weights: str | Path, device: str = "", half: bool = False) -> TorchScriptBackend:
    """Loads a TorchScript file.

    Raises:
        UserError: no such file, not TorchScript, its code names what it has no business with, or an unknown device.
    """
    path = find_export(weights)
    chosen = select_device(device)
    prepare_cpu_memory(chosen)
    _check_code(path)
    extra: dict[str, Any] = dict.fromkeys(EXTRA_FILES, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.jit.load(str(path), map_location=chosen, _extra_files=extra).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--weights {path}: torch cannot load it ({str(error).strip().splitlines()[0]}).") from error
    texts, shape = _texts(extra, path)
    LOGGER.info(f"{path}: TorchScript, {device_line(chosen)}")
    sizes = Graph(None, None, None, None, None) if shape is None else Graph(shape[0], shape[2], shape[3], None, None)
    try:
        backend = TorchScriptBackend(module, chosen, texts, sizes, path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--weights {path}: does not run on images {shape or ''} ({reason}).") from error
    without_half(half and next(module.parameters(), torch.zeros(0)).dtype != torch.float16, "TorchScript")
    return backend


def _check_code(path: Path) -> None:
    """Reads the code in a file, as torch will, and refuses what reaches files, extensions, and what hides names.

    Raises:
        UserError: one of them is there, or the file is no archive of torch's.
    """
    try:
        records = open_records(path)
        for name in records.get_all_records():
            if name.lower().endswith(".py"):
                found = suspicious(records.get_record(name).decode("utf-8", "replace"))
                if found:
                    raise UserError(f"--weights {path}: its code has {found}: refused.")
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--weights {path}: is not a TorchScript file, or is damaged ({error}).") from error


def suspicious(code: str) -> str:
    """Returns what in TorchScript code no detector needs, in words; empty where there is nothing.

    Names count wherever they stand, for a function may be given another name, or be fetched by its name's text.
    """
    found = FILE_OPERATORS.search(code) or EXTENSIONS.search(code)
    if found:
        return f"the name '{found[0]}'"
    if CODED_TEXT.search(code):
        return "a text in character codes"
    ends = [(match.start(), match.end()) for match in TEXTS.finditer(code)]
    if any(not code[end:start].strip() for (_, end), (start, _) in pairwise(ends)):
        return "a text in pieces"
    return ""


def _texts(extra: Mapping[str, Any], path: Path) -> tuple[dict[str, str], list[int] | None]:
    """Returns what the extra files say, and the shape (b, 3, h, w) that the file was traced with; None if any will do.

    Raises:
        UserError: they are damaged.
    """
    found = {name: text.decode() if isinstance(text, bytes) else text for name, text in extra.items()}
    try:
        config = json.loads(found["config.txt"] or "{}")
        described = json.loads(found["metadata"] or "{}")
        shape = [int(length) for length in config.get("shape", DEFAULT_SHAPE)]
        dynamic = bool(described.get("dynamic"))
    except PARSING_ERRORS as error:
        raise UserError(f"{path}: what the file says of itself is damaged ({error}): export it again.") from error
    if len(shape) != len(DEFAULT_SHAPE):
        raise UserError(f"{path}: was traced with {shape}, not with images (b, 3, h, w).")
    texts = plain_texts(config) | ({"metadata": found["metadata"]} if described else {})
    return texts, None if dynamic else shape
