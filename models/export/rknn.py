"""RKNN, for the NPUs of Rockchip's chips (rk3588 and others): a folder of the compiled model and metadata.yaml.

Made from ONNX by rknn-toolkit2, in an environment of its own since it pins old versions. Always as with --raw: an NPU
computes in float16 or int8 throughout, which is too coarse for boxes in pixels, so the model gives maps of scores and
the host decodes them (`models.raw`). Input: pixels, uint8 (1, h, w, 3) RGB, which the model divides by 255 itself. No
NPU is needed to check the result: the toolkit's simulator runs what it has just compiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from models.backends import ModelFile
from models.backends.rknn import METADATA_FILE, RknnBackend
from models.export import rknn_compiler
from models.export.formats import DEFAULT_CHIP, missing_packages
from models.export.job import ExportJob, atomic_folder, find_program, last_lines
from models.export.onnx import write_onnx
from utils.errors import UserError
from utils.files import write_yaml
from utils.log import LOGGER

TOOLKIT = "rknn-toolkit2"
PYTHON_VARIABLE = "RKNN_PYTHON"  # environment variable that names the Python with the toolkit
FOLDER = ".venv-rknn"  # beside the environment of this program
INT8_SUFFIX = "-int8_rknn_model"
MODEL = "model.rknn"
CALIBRATION_IMAGES = 64


def export(job: ExportJob) -> Path | ModelFile:
    """Writes `<stem>_rknn_model/`, or `<stem>-int8_rknn_model/`.

    Returns:
        The folder as a `ModelFile` that runs on the simulator until the job's `closing` is closed; the folder's path
        where the simulator does not run, which is logged.

    Raises:
        UserError: the toolkit is missing or does not take the model or the chip, --batch-size above 1, or a head that
            nothing decodes on the host.
    """
    python = find_python()
    if job.metadata.raw is None:
        raise UserError(
            f"an NPU leaves decoding to the host, and nothing here decodes {type(job.source.head).__name__}."
        )
    if job.metadata.batch != 1:
        raise UserError(f"--batch-size {job.metadata.batch}: RKNN takes one image at a time here: leave it at 1.")
    chip, path = job.config.chip or DEFAULT_CHIP, job.path(INT8_SUFFIX if job.config.int8 else job.format.suffix)
    scratch = Path(job.closing.enter_context(tempfile.TemporaryDirectory()))
    write_onnx(job, scratch / "model.onnx")
    calibration = [_write_images(scratch, job.calibration(CALIBRATION_IMAGES))] if job.config.int8 else []
    toolkit = Toolkit(python, scratch, ["model.onnx", MODEL, chip, *calibration])
    job.closing.callback(toolkit.close)
    try:
        version = toolkit.answer()
    except UserError as error:
        raise UserError(f"cannot be compiled for {chip} (--chip). {error}") from error
    metadata = replace(job.metadata, versions={**job.metadata.versions, TOOLKIT: version})
    with atomic_folder(path) as folder:
        shutil.copy(scratch / MODEL, folder)
        write_yaml(folder / METADATA_FILE, {**metadata.texts(), "chip": chip})
    try:
        toolkit.answer()
    except UserError as error:
        LOGGER.warning(f"WARNING: RKNN: compiled only, as the simulator does not run here. {error}")
        return path
    return ModelFile(path, metadata, None, lambda: RknnBackend(path, toolkit, f"{TOOLKIT}'s simulator of {chip}"))


def find_python() -> str:
    """Returns the Python that has the toolkit: as RKNN_PYTHON says, this one, or that of .venv-rknn beside it.

    Raises:
        UserError: there is none.
    """
    own = Path(sys.prefix).parent / FOLDER
    here = [] if missing_packages(("rknn",)) else [sys.executable]
    how = f"`make rknn` installs it into {FOLDER} (Linux, Python 3.10 to 3.12), or name a Python that has it"
    places = [*here, own / "bin" / "python", own / "Scripts" / "python.exe"]
    return find_program(PYTHON_VARIABLE, places, f"Rockchip's {TOOLKIT}", how)


def _write_images(folder: Path, images: Sequence[np.ndarray]) -> str:
    """Writes calibration images, uint8 (1, 3, h, w) RGB, and a list of their names, which is returned."""
    names = [f"{number}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        cv2.imwrite(str(folder / name), image[0, ::-1].transpose(1, 2, 0))
    (folder / "images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return "images.txt"


class Toolkit:
    """The process of `rknn_compiler`; once it has answered twice it has the interface of a board's `RKNNLite`."""

    def __init__(self, python: str, folder: Path, arguments: Sequence[str]) -> None:
        """Starts it.

        Args:
            python: the Python that has the toolkit.
            folder: its working folder, which the toolkit too writes to.
            arguments: of `rknn_compiler`.

        Raises:
            UserError: it cannot be started.
        """
        self._python, self._image, self._log = python, folder / "image.npy", open(folder / "log.txt", "w+b")
        # -I: the modules beside the script have names that the toolkit imports
        command = [python, "-I", os.path.abspath(rknn_compiler.__file__), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        pipes["env"] = {**os.environ, "TMPDIR": str(folder)}  # what it leaves behind goes with the folder
        try:
            self._process = subprocess.Popen(command, cwd=folder, text=True, encoding="utf-8", **pipes)
        except OSError as error:
            self._log.close()
            raise UserError(f"{python}: cannot be started ({error.strerror}).") from error

    def answer(self) -> str:
        """Waits for a step and returns what it said.

        Raises:
            UserError: it failed; says why.
        """
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            printed = re.sub(r"\x1b\[[\d;]*m", "", self._log.read().decode("utf-8", "replace"))
            errors = re.findall(r"^E (\w+: .+)$", printed, re.M)  # between progress bars
            ended = f"it ended with status {status}\n{last_lines(printed)}"
            raise UserError(f"{TOOLKIT} ({self._python}): {errors[-1] if errors else ended.rstrip()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"{TOOLKIT} ({self._python}): {answer['error']}")
        return answer["said"]

    def inference(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of the simulator, float32, for one image uint8 (1, h, w, 3) RGB.

        Raises:
            UserError: it failed; says why.
        """
        np.save(self._image, inputs[0])
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer tells why
            print(self._image, file=self._process.stdin, flush=True)
        self.answer()
        with np.load(self._image.with_suffix(".npz")) as outputs:
            return [outputs[name] for name in outputs.files]

    def close(self) -> None:
        """Ends the process."""
        with self._log:
            self._process.kill()
            self._process.communicate()
