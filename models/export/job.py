"""What an exporter is given: one rewritten model, its metadata, and where files go.

Also how exporters behave: folders are written whole or not at all, what converters print is kept off the terminal (its
end is shown when they fail), and OpenVINO's and NNCF's tools are kept from reporting over the network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backends.metadata import Metadata
from models.deploy import InferenceModel
from models.export.calibrate import calibration_images
from models.export.formats import ExportConfig, Format
from models.heads import RawOutputs
from utils.errors import UserError
from utils.log import LOGGER


@dataclass(frozen=True)
class ExportJob:
    """One checkpoint to be exported to one format.

    Attributes:
        format: the line of the table of formats; tells apart those that one module writes.
        weights: the checkpoint; exports are written beside it.
        source: the trained `models.yolo.Model` as loaded, float32, on the CPU, its batch norm not folded.
        model: the same rewritten for inference, float32, on the CPU, with the decoder for raw rows of any image size;
            with --raw its trunk ends in the head's `score_maps`.
        metadata: what goes into the file.
        config: checked.
        device: where formats that are made on a device are made: TorchScript and TensorRT.
        closing: what must end once the result has been checked.
    """

    format: Format
    weights: Path
    source: nn.Module
    model: InferenceModel
    metadata: Metadata
    config: ExportConfig
    device: torch.device
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, channels, height, width of the example input."""
        return (self.metadata.batch, self.source.yaml["ch"], *self.metadata.shape_hw)

    @property
    def run_device(self) -> str:
        """The device to run the result on, as `--device` names it."""
        return str(self.device) if self.format.gpu else "cpu"

    @property
    def output_names(self) -> list[str]:
        """What the outputs are called: `output`, and where there are maps of levels `output_1` and so on behind it."""
        raw = self.metadata.raw
        count = self.source.head.nl if self.config.train else len(raw.strides) * len(raw.widths) if raw else 1
        return ["output", *(f"output_{number}" for number in range(1, count))]

    def path(self, suffix: str) -> Path:
        """Returns the file or folder beside the checkpoint with this suffix."""
        return self.weights.with_name(self.weights.stem + "-raw" * (self.config.raw and not self.format.raw) + suffix)

    def calibration(self, count: int) -> list[np.ndarray]:
        """Returns up to `count` letterboxed training images of --data, each uint8 (1, 3, h, w) RGB, for --int8."""
        return calibration_images(self.config.data, self.metadata.shape_hw, count)

    def example(self) -> Tensor:
        """Returns a blank input, float32 `shape`."""
        return torch.zeros(self.shape)

    def head(self, normalised: bool = False) -> nn.Module:
        """Returns what follows the trunk as the options ask: maps, rows, or detections chosen in the graph.

        Args:
            normalised: boxes as fractions of the image's sides.
        """
        head, metadata = self.source.head, self.metadata
        if self.config.raw:
            return nn.Identity()
        if self.config.train:
            return RawOutputs(head)
        shape_hw = None if metadata.dynamic else metadata.shape_hw
        return head.output(shape_hw, metadata.nms, self.config.topk_per_class, normalised)

    def with_head(self, head: nn.Module) -> InferenceModel:
        """Returns the rewritten model with another head, in evaluation mode; the trunk is shared."""
        return InferenceModel(self.model.trunk, head, self.model.names, self.model.stride).eval()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes its place once the block has ended well.

    Raises:
        UserError: it cannot be written, or `path` is a file; what was there is intact.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a folder of that name is to be written. Move it away.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as parent:
            new, former = Path(parent, "new"), Path(parent, "former")
            new.mkdir()
            yield new
            if path.exists():  # systems do not rename onto a folder that holds files
                os.replace(path, former)
            try:
                os.replace(new, path)
            except OSError:
                if former.exists():
                    os.replace(former, path)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from error


SHOWN_LINES = 15


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Turns the process's output aside while the block runs; logs its last lines when the block fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as record:
        try:
            with _streams_to(record.fileno()), contextlib.redirect_stdout(record), contextlib.redirect_stderr(record):
                yield
        except Exception:
            record.flush()
            record.seek(0)
            LOGGER.error(last_lines(record.read()))
            raise


@contextlib.contextmanager
def _streams_to(target: int) -> Iterator[None]:
    """Points the descriptors of standard output and error, where they are open, at another one for a while."""
    with contextlib.ExitStack() as restoring:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            if stream is None:
                continue
            stream.flush()
            kept = os.dup(descriptor)
            restoring.callback(os.close, kept)
            restoring.callback(os.dup2, kept, descriptor)
            os.dup2(target, descriptor)
        yield


def find_program(variable: str, places: Sequence[str | Path], what: str, how: str) -> str:
    """Returns a program of an environment of its own: the one that a variable names, else the first that there is.

    Args:
        variable: of the environment.
        places: names to look up on the PATH, and paths.
        what: it is, in the message.
        how: to get it, in the message, which goes on with "in the environment variable ...".

    Raises:
        UserError: there is none.
    """
    named = os.environ.get(variable)
    found = next(filter(None, map(shutil.which, [named] if named else map(str, places))), None)
    if found is None:
        where = f" ({variable}={named} is no program)" if named else ""
        raise UserError(
            f"needs {what}{where}, which wants an environment of its own: {how} in the environment variable {variable}."
        )
    return found


def run_tool(command: Sequence[str], folder: Path) -> str:
    """Runs a program without a word, in a folder of its own; returns what it printed.

    Args:
        command: program and arguments.
        folder: its working folder.

    Raises:
        UserError: it cannot be started or fails; the message holds the last lines that it printed.
    """
    try:
        done = subprocess.run(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror}).") from error
    if done.returncode:
        raise UserError(f"{command[0]} failed with status {done.returncode}:\n{last_lines(done.stdout)}")
    return done.stdout


def last_lines(text: str) -> str:
    """Returns the end of what a tool printed."""
    return "\n".join(text.strip().splitlines()[-SHOWN_LINES:])


# Both tools stay silent in automatic tests, which they know by these variables.
_SILENT = {"CI": "true", "NNCF_CI": "1"}


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Sets what silences the reports while the block runs: NNCF looks when it is imported, OpenVINO at every call."""
    former = {name: os.environ.get(name) for name in _SILENT}
    os.environ.update(_SILENT)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
