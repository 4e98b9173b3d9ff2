"""TensorFlow's SavedModel and frozen GraphDef, and TensorFlow.js, by way of ONNX.

The converters are programs of other people's, in environments of their own, because they need old versions of what
this one needs new: onnx2tf, and for the browser tensorflowjs_converter. All formats read images (1, h, w, 3) of values
0 to 1 and give rows (1, n, 5 + nc), boxes as fractions of the image's width and height. Names: SavedModel `images` ->
`output_0` (signature `serving_default`), GraphDef `x` -> `Identity`, as YOLOv5 has them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.backends.base import before_tensorflow
from models.backends.metadata import Metadata
from models.export.job import ExportJob, atomic_folder, find_program, quietly, run_tool
from models.export.onnx import INPUT as ONNX_INPUT
from models.export.onnx import write_onnx
from utils.errors import UserError
from utils.files import ROOT, atomic_write, write_yaml
from utils.images import letterbox, read_image
from utils.log import LOGGER

if TYPE_CHECKING:
    from tensorflow.core.framework.graph_pb2 import GraphDef

CONVERTER = "onnx2tf"
CONVERTER_VARIABLE = "ONNX2TF"  # environment variable that names the program
CONVERTER_FOLDER = ".venv-onnx2tf"  # where `make` puts it, beside the environment of this program
SAVED_MODEL, SIGNATURES, FROZEN = "saved_model.pb", "--output_signaturedefs", "--output_tfv1_pb"
# Versions 2.x build TFLite files by themselves; only their older way goes through TensorFlow.
FLAGS_SINCE_2 = ("--tflite_backend", "tf_converter")
SAMPLES_FILE, SAMPLES_SHAPE = "calibration_image_sample_data_20x128x128x3_float32.npy", (20, 128, 128, 3)
WEB_CONVERTER = "tensorflowjs_converter"
GRAPH_INPUT, GRAPH_OUTPUT, METADATA_NODE = "x", "Identity", "metadata"


def export(job: ExportJob) -> Path:
    """Writes `<stem>_saved_model/`, `<stem>.pb` or `<stem>_web_model/`; returns its path.

    Raises:
        UserError: a converter is missing or fails.
    """
    web = shutil.which(WEB_CONVERTER) if job.format.argument == "tfjs" else ""
    if web is None:
        raise UserError(
            f"needs the program {WEB_CONVERTER} on the PATH, which wants an environment of its own: "
            "pipx install tensorflowjs."
        )
    if web:
        LOGGER.warning(
            "WARNING: tfjs is deprecated, since its converter has had no release since 2024: --include web writes a "
            "page that runs the model."
        )
    program = find_converter()
    path = job.path(job.format.suffix)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = converter_version(program, folder)
        metadata = replace(job.metadata, boxes_normalised=True, versions={**job.metadata.versions, CONVERTER: version})
        converted = convert(job, program, version, folder)
        if job.format.argument == "saved_model":
            write_saved_model(path, converted, metadata)
            return path
        graphs = list(converted.glob("*_float32.pb"))
        if len(graphs) != 1:
            raise UserError(f"{CONVERTER} wrote {len(graphs)} files *_float32.pb; one was expected.")
        frozen = folder / "frozen.pb" if web else path
        write_frozen(frozen, graphs[0], metadata.texts())
        if web:
            write_web_model(path, frozen, metadata, web)
    return path


def find_converter() -> str:
    """Returns onnx2tf: as the variable ONNX2TF says, on the PATH, beside this Python, or where `make` installs it.

    Raises:
        UserError: it is nowhere.
    """
    beside = Path(sys.executable).parent
    folders = (beside, *(Path(sys.prefix).parent / CONVERTER_FOLDER / scripts for scripts in ("bin", "Scripts")))
    places = [CONVERTER, *(folder / CONVERTER for folder in folders)]
    return find_program(CONVERTER_VARIABLE, places, f"the program {CONVERTER}", f"pipx install {CONVERTER}, or name it")


def converter_version(program: str, folder: Path) -> str:
    """Returns the version that onnx2tf says it is of.

    Raises:
        UserError: it does not run, or says something else.
    """
    said = run_tool([program, "-V"], folder)
    found = re.findall(r"^\D{0,12}(\d+\.\d+[\w.]*)\s*$", said, flags=re.MULTILINE)
    if not found:
        raise UserError(f"{program} -V does not tell its version: {said.strip()[-200:]!r}.")
    return found[-1]


def convert(job: ExportJob, program: str, version: str, folder: Path) -> Path:
    """Runs onnx2tf on the model of a job.

    Args:
        job: the job.
        program: onnx2tf.
        version: of it.
        folder: an empty one to work in; nothing is fetched, since what onnx2tf compares its results on lies there.

    Returns:
        The folder of its results: a SavedModel, with the frozen graph beside it where that is wanted.

    Raises:
        UserError: it fails.
    """
    model, results = folder / "model.onnx", folder / "results"
    write_onnx(job, model, job.head(normalised=True))
    np.save(folder / SAMPLES_FILE, _samples(), allow_pickle=False)
    frozen = () if job.format.argument == "saved_model" else (FROZEN,)
    flags = FLAGS_SINCE_2 if int(version.partition(".")[0]) >= 2 else ()
    options = ["--non_verbose", SIGNATURES, *frozen, *flags]
    said = run_tool([program, "-i", model.name, "-o", results.name, *options], folder)
    if not (results / SAVED_MODEL).is_file():
        raise UserError(f"{program} {version} wrote no SavedModel:\n{said.strip()[-1000:]}")
    return results


def _samples() -> np.ndarray:
    """Returns the sample images, letterboxed, float32 SAMPLES_SHAPE of values 0 to 1."""
    count, height, width, _ = SAMPLES_SHAPE
    paths = sorted((ROOT / "data" / "images").glob("*.jpg"))
    images = np.stack([letterbox(read_image(path), (height, width), auto=False).image for path in paths])
    return np.resize(images.astype(np.float32) / 255, SAMPLES_SHAPE) if len(images) < count else images[:count]


def write_saved_model(path: Path, converted: Path, metadata: Metadata) -> None:
    """Writes the SavedModel among onnx2tf's results as a folder, with metadata.yaml in it."""
    with atomic_folder(path) as folder:
        for part in ("variables", "assets"):
            if (converted / part).is_dir():
                shutil.copytree(converted / part, folder / part)
        for part in (SAVED_MODEL, "fingerprint.pb"):
            if (converted / part).is_file():
                shutil.copy(converted / part, folder)
        write_yaml(folder / "metadata.yaml", metadata.texts())


def write_frozen(path: Path, source: Path, texts: Mapping[str, str]) -> None:
    """Writes a frozen graph with YOLOv5's names, and a constant that holds the metadata as JSON.

    Args:
        path: the file.
        source: onnx2tf's frozen graph.
        texts: of the metadata.

    Raises:
        UserError: the graph has not one input and an output `Identity`.
    """
    before_tensorflow()
    with quietly():
        from tensorflow import make_tensor_proto
        from tensorflow.core.framework.graph_pb2 import GraphDef

        graph = GraphDef.FromString(source.read_bytes())
        _rename_input(graph)
        note = graph.node.add(name=METADATA_NODE, op="Const")
        value = make_tensor_proto(json.dumps(texts))
        note.attr["dtype"].type = value.dtype
        note.attr["value"].tensor.CopyFrom(value)
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())


def _rename_input(graph: GraphDef) -> None:
    """Gives the input of a frozen graph YOLOv5's name; the output has it already."""
    inputs = [node for node in graph.node if node.op == "Placeholder"]
    names = {node.name for node in graph.node}
    if [node.name for node in inputs] != [ONNX_INPUT] or GRAPH_OUTPUT not in names or GRAPH_INPUT in names:
        raise UserError(f"{CONVERTER} gave the graph other names than {ONNX_INPUT} and {GRAPH_OUTPUT}.")
    inputs[0].name = GRAPH_INPUT
    for node in graph.node:
        for place, source in enumerate(node.input):
            name, colon, output = source.partition(":")
            if name.lstrip("^") == ONNX_INPUT:
                node.input[place] = f"{name.replace(ONNX_INPUT, GRAPH_INPUT)}{colon}{output}"


def write_web_model(path: Path, frozen: Path, metadata: Metadata, program: str) -> None:
    """Writes a model for the browser: `model.json` with its weights, and `metadata.json`.

    Args:
        path: the folder.
        frozen: the frozen graph.
        metadata: what is said of it.
        program: tensorflowjs_converter.

    Raises:
        UserError: the converter fails.
    """
    with atomic_folder(path) as folder:
        options = ["--input_format=tf_frozen_model", f"--output_node_names={GRAPH_OUTPUT}"]
        run_tool([program, *options, str(frozen), str(folder.resolve())], frozen.parent)
        if not (folder / "model.json").is_file():
            raise UserError(f"{WEB_CONVERTER} wrote no model.json.")
        (folder / "metadata.json").write_text(json.dumps(metadata.texts()), encoding="utf-8")
