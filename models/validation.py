"""What val.py, the check of int8 exports and the benchmarks share: a model of any format made ready for evaluation.

Opening happens in two steps, since a checkpoint's data can be read while its model is built. Not here: the evaluation
itself (`utils.eval.evaluate`), options and folders (`val.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.backends import Backend, load_backend, runtime_of, weight_files
from models.backends.metadata import Suppression
from models.backends.pytorch import PyTorchBackend, check_members, describe_model, ensemble_of
from models.load import Weights, find_weights, model_from, read_weights
from utils.checks import MIN_GRID_STRIDE, UserError, check_image_size, grid_stride
from utils.data.dataset import DetectionDataset
from utils.data.labels import load_labels
from utils.data.loader import DetectionLoader, create_loader
from utils.data.spec import DataSpec
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.log import LOGGER

DEFAULT_PX = 640
PAD_STRIDES = 0.5  # border that rectangular batches get, in strides
REDUCED = {torch.float16: "--half", torch.bfloat16: "--bf16"}

Shape = int | tuple[int, int]  # the long side of rectangles, or height and width of every image, px


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, as far as its data depend on it.

    Attributes:
        path: the file or folder.
        names: class names {number: name}.
        named: whether the file itself says these names; else they only count the classes.
        stride: what the sides of images must be multiples of, px.
        shape_hw: the only height and width that it takes; None for any.
        data: the data set YAML that it was trained on; empty when the file does not say.
        trained_px: the image size that it was trained at; None when the file does not say.
        nms: how detections are chosen inside; None for raw rows.
        build: makes it ready to run: a runtime of `models.backends`, or the model that was held.
    """

    path: Path
    names: dict[int, str]
    named: bool
    stride: int
    shape_hw: tuple[int, int] | None
    data: str
    trained_px: int | None
    nms: Suppression | None
    build: Callable[[], Any]


def open_subject(
    weights: str | Path | Sequence[str | Path],
    device: str = "",
    dtype: torch.dtype = torch.float32,
    dnn: bool = False,
) -> Subject:
    """Opens a checkpoint or an export; or several checkpoints, as one model.

    Args:
        weights: a file of any format, or a released checkpoint's name; several make an ensemble, which is known by the
            first one's path, data set and size.
        device: as `--device`; empty chooses.
        dtype: bfloat16 or float16 where the format leaves the choice: checkpoints, and OpenVINO by what it can.
        dnn: run an ONNX file in OpenCV.

    Raises:
        UserError: it cannot be loaded, the device or the precision is not for it, or the models of an ensemble do not
            have the same classes.
    """
    files = weight_files(weights)
    if dnn or runtime_of(files[0]) != "pytorch":
        return _open_export(files[0], device, dtype, dnn)
    chosen = select_device(device)
    prepare_cpu_memory(chosen)
    check_half(dtype, chosen)
    paths = [find_weights(file) for file in files]
    contents = [read_weights(path) for path in paths]
    check_members(paths, [content.names for content in contents])
    first = contents[0]
    trained_px = (first.meta.get("opt") or {}).get("imgsz")
    return Subject(
        paths[0],
        first.names,
        named=True,
        stride=max(grid_stride(content.stride) for content in contents),
        shape_hw=None,
        data=first.meta.get("data") or "" if first.source == "ours" else "",
        trained_px=trained_px if isinstance(trained_px, int) else None,
        nms=None,
        build=partial(_build, contents, paths, chosen, dtype),
    )


def held_subject(model: Any) -> Subject:
    """Describes a model that is in memory already.

    Args:
        model: a PyTorch module or a predictor; what it says of `names` and `stride` is taken.
    """
    names = getattr(model, "names", {})
    stride = getattr(model, "stride", MIN_GRID_STRIDE)
    said = getattr(model, "metadata", None)  # of a runtime
    return Subject(
        Path("model"),
        dict(names) if isinstance(names, Mapping) else dict(enumerate(names)),
        named=True,
        stride=grid_stride([stride] if isinstance(stride, int) else stride),
        shape_hw=said.shape_hw if said and not model.dynamic else None,
        data="",
        trained_px=None,
        nms=said.nms if said else None,
        build=lambda: model,
    )


def check_half(dtype: torch.dtype, device: torch.device) -> None:
    """Makes sure that a device computes in float16 where that is wanted.

    Raises:
        UserError: it does not.
    """
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError(f"--half (float16) needs a CUDA GPU, this is {device.type}: use --bf16, or neither.")


def _open_export(weights: str | Path, device: str, dtype: torch.dtype, dnn: bool) -> Subject:
    """Loads an exported model at once: only then is known what it takes."""
    if dtype in REDUCED and runtime_of(weights) != "openvino":
        raise UserError(
            f"{REDUCED[dtype]}: {weights} is computed in the precision that it was exported in. The option is for "
            "checkpoints (.pt) and OpenVINO; export.py --half makes smaller files."
        )
    backend = load_backend(weights, device, half=dtype in REDUCED, dnn=dnn)
    said = backend.metadata
    if not backend.dynamic:
        backend.warm_up(*said.shape_hw)
    return Subject(
        Path(weights),
        said.names,
        named=said.names != {number: f"class{number}" for number in range(len(said.names))},
        stride=said.stride,
        shape_hw=None if backend.dynamic else said.shape_hw,
        data=said.data,
        trained_px=None,
        nms=said.nms,
        build=lambda: backend,
    )


def _build(contents: Sequence[Weights], paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> Backend:
    """Builds the models of checkpoints, rewritten for inference; logs what they are and where they run."""
    LOGGER.info(device_line(device))
    members = []
    for content, path in zip(contents, paths, strict=True):
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away: leave no trace in the generator
            model = model_from(content).requires_grad_(False).fuse()
        LOGGER.info(f"{path}: {model.info(gflops=False)}")
        members.append(PyTorchBackend(model, device, dtype, describe_model(model, content, dtype)))
    return members[0] if len(members) == 1 else ensemble_of(paths, members)


def image_shape(subject: Subject, imgsz: int | Sequence[int] | None) -> Shape:
    """Returns how images are to be brought to size: rectangles of a long side, or all padded to one height and width.

    Args:
        subject: the model.
        imgsz: the long side; or height and width; None for the model's only one, else 640.

    Raises:
        UserError: more than two sides, or not the ones that the model takes.
    """
    sides = [] if imgsz is None else [imgsz] if isinstance(imgsz, int) else list(imgsz)
    if len(sides) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: one side, or height and width, are expected.")
    if subject.shape_hw:
        fixed = tuple(subject.shape_hw)
        if sides and (sides[0], sides[-1]) != fixed:
            wanted, only = "x".join(map(str, sides)), "x".join(map(str, fixed))
            raise UserError(
                f"--imgsz {wanted}: {subject.path} takes images of {only} px (height x width) only: leave --imgsz out, "
                "or export with --dynamic."
            )
        return fixed
    sides = sides or [DEFAULT_PX]
    if subject.trained_px and subject.trained_px != max(sides):
        LOGGER.info(f"Image size {max(sides)}; the checkpoint was trained at {subject.trained_px}")
    checked = check_image_size(sides if len(sides) == 2 else sides[0], subject.stride)
    return checked if isinstance(checked, int) else tuple(checked)


def check_classes(subject: Subject, spec: DataSpec, single_cls: bool = False) -> None:
    """Makes sure that model and data set speak of the same classes.

    Raises:
        UserError: their numbers differ.
    """
    if single_cls:
        return
    known = len(subject.names)
    if known != spec.nc:
        hint = " It tells one class only: add --single-cls if that is meant." if known == 1 else ""
        raise UserError(
            f"{subject.path} knows {known} classes, the data set {spec.source or spec.root} has {spec.nc}: "
            f"choose the data set that it was trained on.{hint}"
        )
    if not subject.named:
        LOGGER.warning(f"WARNING: {subject.path} does not name its classes: the data set's names are used")
        return
    differing = [class_id for class_id in spec.names if subject.names.get(class_id) != spec.names[class_id]]
    if differing:
        old, new = subject.names.get(differing[0]), spec.names[differing[0]]
        LOGGER.warning(f"WARNING: {len(differing)} class names are not the checkpoint's: '{new}' was '{old}', ...")


def make_loader(
    subject: Subject,
    spec: DataSpec,
    shape: Shape,
    *,
    task: str = "val",
    batch_size: int = 32,
    workers: int = 8,
    single_cls: bool = False,
    pad: float = PAD_STRIDES,
    need_labels: bool = True,
) -> DetectionLoader:
    """Makes the loader of a split: rectangular batches for a long side, else every image padded to height and width.

    `pad` is the border that rectangular batches get, in strides; `need_labels` is `load_labels`'.
    """
    table = load_labels(getattr(spec, task), spec, single_cls, workers, f"{task}: ", need_labels)
    rect = isinstance(shape, int)
    dataset = DetectionDataset(
        table, shape, augment=None, rect=rect, batch_size=batch_size, stride=subject.stride, pad=pad
    )
    return create_loader(dataset, batch_size, workers=workers, shuffle=False)
