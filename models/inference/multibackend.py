"""`DetectMultiBackend`: any weights file as one torch module, and `attempt_load` for checkpoints, under YOLOv5's names.

For programs that call models with tensors. A checkpoint stays the module that was trained, so that `.half()`, `.to()`
and hooks work on it; an exported model runs on its runtime (`models.backends`), which this class only feeds. The
commands use the runtimes directly. Not here: images of other kinds, NMS (`models.inference.autoshape`).
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backends import Backend, load_backend
from models.backends.pytorch import check_members
from models.load import load_model
from models.yolo import INPLACE_ACTIVATIONS, Detect, Model
from utils.cli import find_weights
from utils.dataloaders.config import load_spec
from utils.devices import device_line, prepare_cpu_memory, select_device
from utils.errors import UserError, grid_stride
from utils.log import LOGGER
from utils.plots.boxes import feature_visualization

DEFAULT_SHAPE = (1, 3, 640, 640)


# format -> what its files' and folders' names end in; of two that fit the longer one holds
SUFFIXES = {
    "pt": (".pt",),
    "jit": (".torchscript",),
    "onnx": (".onnx",),
    "xml": ("_openvino_model", ".xml"),
    "engine": (".engine",),
    "coreml": (".mlmodel", ".mlpackage"),
    "saved_model": ("_saved_model",),
    "pb": (".pb",),
    "tflite": (".tflite",),
    "edgetpu": ("_edgetpu.tflite",),
    "tfjs": ("_web_model",),
}
ModelType = namedtuple("ModelType", SUFFIXES)  # which format a weights file has; at most one is true


class DetectMultiBackend(nn.Module):
    """A model in any format, called with tensors.

    Attributes:
        pt, jit, onnx, xml, engine, coreml, saved_model, pb, tflite, edgetpu, tfjs: which format it has.
        model: the checkpoint's `models.yolo.Model` or `Ensemble`; an empty module for an exported model.
        backend: the exported model's runtime; None for a checkpoint.
        names: class names {number: name}.
        nc: number of classes.
        stride: what sides of images must be multiples of, px.
        fixed_hw: height and width of the only images that it takes, px; None where it takes any.
        batch_size: images at a time that it was made for; any other number will do as well.
        has_nms: whether it chooses detections itself (`export.py --nms`).
    """

    def __init__(
        self,
        weights: str | Path | Sequence[str | Path] = "yolov5s.pt",
        device: str | torch.device | None = None,
        dnn: bool = False,
        data: str | Path | None = None,
        fp16: bool = False,
        fuse: bool = True,
    ) -> None:
        """Loads a model.

        Args:
            weights: a checkpoint, a released name (`yolov5s.pt`), an exported model, or several checkpoints.
            device: as `--device`, or torch's own; None chooses a GPU where there is one.
            dnn: run an ONNX file in OpenCV.
            data: data set YAML that names the classes where the model's file does not, as exports of other programs.
            fp16: compute in 16 bits where the device can.
            fuse: fold a checkpoint's batch norm into its convolutions, which is faster; such a model only infers.

        Raises:
            UserError: no such file, a format that cannot be run here, an unknown device, or a data set whose class
                names are wanted and do not fit the model.
        """
        super().__init__()
        files = find_weights(weights)
        for name, fits in self.model_type(files[0])._asdict().items():
            setattr(self, name, fits)
        self.dnn = dnn
        self.backend: Backend | None = None
        if self.pt:
            if dnn:
                raise UserError(f"dnn=True runs ONNX files in OpenCV, and {files[0]} is none: leave it out.")
            place = pick_device(device)
            prepare_cpu_memory(place)
            LOGGER.info(device_line(place))
            self.model = attempt_load(files, place, fuse=fuse).to(memory_format=torch.channels_last)
            if fp16 and place.type == "cuda":
                self.model.half()
            elif fp16:
                LOGGER.warning(f"WARNING: fp16 needs a CUDA device; computing in float32 on {place.type}.")
            self.names, self.stride = dict(self.model.names), grid_stride(self.model.stride)
            self.fixed_hw, self.batch_size, self.has_nms = None, 1, False
        else:
            self.backend = load_backend(files, _device_name(device), fp16, dnn)
            self.model = nn.Identity()  # scripts write `model.model.half()` for TorchScript files as well
            metadata = self.backend.metadata
            self.names, self.stride = dict(metadata.names), self.backend.stride
            self.fixed_hw = None if self.backend.dynamic else tuple(metadata.shape_hw)
            self.batch_size, self.has_nms = metadata.batch, self.backend.has_nms
        if data and all(name == f"class{number}" for number, name in self.names.items()):
            names = load_spec(data, need=()).names
            if len(names) != len(self.names):
                raise UserError(f"--data {data} names {len(names)} classes, but the model has {len(self.names)}.")
            self.names = names
        self.nc = len(self.names)

    @property
    def device(self) -> torch.device:
        """Where a checkpoint runs, and where results are returned; of an exported model always the CPU."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def fp16(self) -> bool:
        """Whether the model computes in 16 bits."""
        if self.backend is not None:
            return self.backend.metadata.precision == "float16"
        return next(self.parameters()).dtype == torch.float16

    @staticmethod
    def model_type(path: str | Path) -> ModelType:
        """Tells a file's format from the end of its name."""
        name = Path(path).name.lower()
        fitting = [(len(end), kind) for kind, ends in SUFFIXES.items() for end in ends if name.endswith(end)]
        found = max(fitting)[1] if fitting else None
        return ModelType(*(kind == found for kind in ModelType._fields))

    def forward(
        self, im: Tensor, augment: bool = False, visualize: str | Path | bool = False, val: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Predicts from images.

        Args:
            im: (b, 3, h, w), values 0 to 1, h and w multiples of the stride; of any type and on any device.
            augment: test-time augmentation (3 scales, flip; checkpoints alone).
            visualize: a folder that images of every layer's output are written into (one checkpoint alone).
            val: return the logits too.

        Returns:
            Rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities]; where `has_nms`, detections
            (b, max_det, 6) [x1, y1, x2, y2 in px, confidence, class], filled up with zeros. Float32, on the image's
            device. With `val` a tuple of them and the logits of each level, which only checkpoints give, else [].

        Raises:
            UserError: an option that the model's format does not offer, or images of a size that it does not take.
        """
        logits: list[Tensor] = []
        if self.pt and visualize:
            if augment or not isinstance(self.model, Model):
                raise UserError("visualize shows the layers of one checkpoint, without augment.")
            folder = Path(visualize)
            folder.mkdir(parents=True, exist_ok=True)

            def show(layer: nn.Module, output: Tensor) -> None:
                feature_visualization(output, layer.type, layer.i, save_dir=folder)

            rows, logits = self.model(_as_input(self.model, im), visualize=show)
        elif self.pt:
            rows, logits = predict(self.model, im, augment)
        elif visualize:
            raise UserError("visualize shows the layers of a checkpoint (.pt); an exported model hides its own.")
        else:
            rows = self.backend.infer(_runtime_input(self.backend, im), augment=augment)
            rows = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
        rows = rows.to(im.device)
        return (rows, logits) if val else rows

    def warmup(self, imgsz: Sequence[int] = DEFAULT_SHAPE, half: bool = False) -> None:
        """Runs once on empty images (b, 3, h, w) where a device's first run is slow; `half` makes them float16."""
        if self.backend is not None:
            self.backend.warm_up(*imgsz[2:])
        elif self.device.type == "cuda":
            self(torch.zeros(*imgsz, dtype=torch.float16 if half else torch.float32, device=self.device))


class Ensemble(nn.ModuleList):
    """Several detectors as one: their detections are put beside each other, for NMS to merge.

    `names` are the last member's; `stride` is that of the member with the largest one.
    """

    @property
    def names(self) -> dict[int, str]:
        """Class names of the last member."""
        return self[-1].names

    @property
    def stride(self) -> Tensor:
        """Strides (nl,) of the member whose largest stride is the largest."""
        return max((member.stride for member in self), key=lambda stride: float(stride.max()))

    def forward(self, x: Tensor, augment: bool = False) -> tuple[Tensor, None]:
        """Maps images (b, 3, h, w) to (detections of all members (b, rows, 5 + nc), None); `augment` as in `Model`."""
        return torch.cat([member(x, augment)[0] for member in self], dim=1), None


def attempt_load(
    weights: str | Path | Sequence[str | Path],
    map_location: str | torch.device | None = None,
    inplace: bool = True,
    fuse: bool = True,
    device: str | torch.device | None = None,
) -> Model | Ensemble:
    """Loads one checkpoint, or several as an ensemble: float32, in evaluation mode, without gradients.

    Args:
        weights: checkpoints of ours, original YOLOv5 ones, or released names.
        map_location: where to put the model; None for the CPU.
        inplace: let activations and the head write over their inputs.
        fuse: fold batch norm into the convolutions.
        device: another name of `map_location`, as in YOLOv5 7.0.

    Raises:
        UserError: see `models.load.read_weights`; or the models of an ensemble have different classes.
    """
    files = find_weights(weights)
    wished = device if map_location is None else map_location
    place = torch.device("cpu") if wished is None else pick_device(wished)
    members = [load_model(file, place, fuse) for file in files]
    for member in members:
        member.inplace = inplace
        for module in member.modules():
            if isinstance(module, (*INPLACE_ACTIVATIONS, Detect)):
                module.inplace = inplace
    if len(members) == 1:
        return members[0]
    check_members(files, [member.names for member in members])
    LOGGER.info(f"Ensemble created with {[str(file) for file in files]}")
    return Ensemble(members).eval()


def predict(model: Model | Ensemble, images: Tensor, augment: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Predicts with a checkpoint's model in evaluation mode.

    Args:
        model: one model or several.
        images: (b, ch, h, w), values 0 to 1, of any type and on any device.
        augment: test-time augmentation (3 scales, flip).

    Returns:
        Rows (b, n, 5 + nc) [x, y, w, h in px, objectness, class probabilities], on the model's device, and the logits
        of each level; [] for an ensemble and with `augment`.
    """
    rows, logits = model(_as_input(model, images), augment)
    return rows, logits or []


def _as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Returns images (b, ch, h, w) in the type and on the device of a model's weights, channels last."""
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype, memory_format=torch.channels_last)


def _runtime_input(backend: Backend, images: Tensor) -> np.ndarray | Tensor:
    """Returns images (b, 3, h, w), values 0 to 1, as a runtime's own `preprocess` would have made them.

    It makes them of empty images, since it alone knows type, layout and device; then the values are put in.
    """
    inputs = backend.preprocess(np.zeros(images.shape, np.uint8))
    if isinstance(inputs, Tensor):
        return inputs.copy_(images)
    values = images.detach().float().cpu().numpy()
    values = values if inputs.shape == values.shape else values.transpose(0, 2, 3, 1)
    if inputs.dtype == np.uint8:  # runtimes that take 8-bit images
        values = np.rint(values.clip(0, 1) * 255)
    np.copyto(inputs, values, casting="unsafe")
    return inputs


def pick_device(device: str | torch.device | None) -> torch.device:
    """Returns the device of a name or torch's own; for None a GPU where there is one.

    Raises:
        UserError: an unknown name, or one that is not there.
    """
    return select_device(_device_name(device))


def _device_name(device: str | torch.device | None) -> str:
    """Returns a device as `--device` names it; empty chooses."""
    name = "" if device is None else str(device)
    return "cuda:0" if name == "cuda" else name
