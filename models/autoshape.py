"""`AutoShape`: a model that takes pictures of any kind and gives `Detections`; what `torch.hub.load` returns.

Covers reading the pictures, their shape for the model, inference and suppression. Not here: what can be done with the
result (`models.hub_results`), loading weights (`models.multibackend`), streams and videos (detect.py).
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from models.detector import Limits
from models.experimental import Ensemble
from models.hub_results import Detections
from models.multibackend import DetectMultiBackend, predict
from models.summary import profile_layers
from models.yolo import Model
from utils.boxes import scale_boxes
from utils.checks import UserError, grid_stride, round_up
from utils.devices import resolve_amp
from utils.download import download_file
from utils.images import SLACK, ImageError, decode_image, letterbox, read_image, to_8_bits
from utils.log import LOGGER
from utils.nms import non_max_suppression

COPIED = ("yaml", "nc", "hyp", "names", "stride")  # attributes of the model that the wrapper has too
DEFAULT_PX = 640
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L")  # Pillow's with more than 8 bits a channel
MOST_CHANNELS = 4  # a first axis up to this long holds channels


class Picture(NamedTuple):
    """A picture and the name that its results are filed under."""

    image: np.ndarray  # uint8 (h, w, 3) RGB
    file: str


class AutoShape(nn.Module):
    """A model for pictures as they come: files, addresses, Pillow images, arrays, tensors, and lists of them.

    The attributes may be changed at any time. Exported models that choose detections themselves (`export.py --nms`)
    keep the thresholds that they were exported with; `conf`, `classes` and `max_det` can only narrow those down.

    Attributes:
        conf: confidences must exceed it.
        iou: boxes of a class that overlap a more confident one by more are dropped.
        agnostic: suppress across classes.
        multi_label: every class above `conf` makes a detection, not only a box's best.
        classes: class numbers to keep; None keeps all.
        max_det: most detections in a picture.
        amp: compute in 16 bits where the device does so in hardware (checkpoints alone).
        model: the model that was given.
        names: class names {number: name}.
    """

    conf = 0.25
    iou = 0.45
    agnostic = False
    multi_label = False
    classes: Sequence[int] | None = None
    max_det = 1000
    amp = False
    _range_told = False

    def __init__(self, model: Model | Ensemble | DetectMultiBackend) -> None:
        """Takes a model, and puts it into evaluation mode."""
        super().__init__()
        self.dmb = isinstance(model, DetectMultiBackend)
        self.pt = not self.dmb or model.pt
        for source in (model.model, model) if self.dmb else (model,):
            for name in COPIED:
                if hasattr(source, name):
                    setattr(self, name, getattr(source, name))
        self.model = model
        self.eval()

    @torch.no_grad()
    def forward(
        self, imgs: Any, size: int | Sequence[int] | None = None, augment: bool = False, profile: bool = False
    ) -> Detections | Any:
        """Detects in pictures.

        Args:
            imgs: a picture or a list of them, of one kind or several: a file; an http or https address; a Pillow
                image; an array or a tensor (h, w, 3), (h, w), (h, w, 1) or (3, h, w) in RGB order (of OpenCV's
                pictures give `image[..., ::-1]`), 0 to 255, 0 to 1 or of 12 or 16 bits (`utils.images.to_8_bits`).
                EXIF orientation is heeded, alpha left out. A tensor (b, 3, h, w) of values 0 to 1 goes straight to
                the model; one of other values is warned of.
            size: the long side, px, that pictures are scaled to, or exactly (height, width); both are rounded up to
                the model's stride. None is 640, or what the model was exported for.
            augment: look at every picture in three sizes, once mirrored (checkpoints alone).
            profile: log the time of every layer as well (one checkpoint alone).

        Returns:
            Detections; for a tensor (b, 3, h, w) what the model returns.

        Raises:
            UserError: a picture that cannot be read or fetched, a size that the model does not take, or an option
                that it does not offer.
        """
        if self.training:
            raise UserError("The model is in training mode, in which it detects nothing: call .eval() first.")
        if isinstance(imgs, Tensor) and imgs.dim() == 4:
            self._warn_of_range(imgs)
            return self._run(imgs, augment, profile)
        times = [self._now()]
        pictures = read_pictures(imgs if isinstance(imgs, (list, tuple)) else [imgs])
        shape_hw = self._shape_for([picture.image.shape[:2] for picture in pictures], size)
        inputs = self._letterboxed(pictures, shape_hw)
        times.append(self._now())
        output = self._run(inputs, augment, profile)
        times.append(self._now())
        found = self._suppressed(output if isinstance(output, Tensor) else output[0])
        for detections, picture in zip(found, pictures, strict=True):
            detections[:, :4] = scale_boxes(shape_hw, detections[:, :4], picture.image.shape[:2])
        times.append(self._now())
        images, files = zip(*pictures, strict=True)
        return Detections(list(images), found, list(files), times, self.names, tuple(inputs.shape))

    def _warn_of_range(self, images: Tensor) -> None:
        """Says, once, if images (b, 3, h, w) are not of the values that the model was trained on."""
        if self._range_told or not images.numel():
            return
        low, high = (value.item() for value in images.aminmax())
        if low < -SLACK or high > 1 + SLACK:
            LOGGER.warning(
                f"WARNING: the tensor has values from {low:g} to {high:g}, but the model was trained on 0 to 1: divide "
                "by 255, and leave normalisation by mean and deviation out."
            )
            self._range_told = True

    def _shape_for(self, shapes_hw: Sequence[Sequence[int]], size: int | Sequence[int] | None) -> list[int]:
        """Returns height and width that pictures of these heights and widths are letterboxed to.

        Raises:
            UserError: `size` is no size, or not the one that the model takes.
        """
        fixed_hw = self.model.fixed_hw if self.dmb else None
        if fixed_hw and size is None:
            return list(fixed_hw)
        size = DEFAULT_PX if size is None else size
        numbers = list(size) if isinstance(size, (list, tuple)) else [size]
        if len(numbers) not in (1, 2) or not all(isinstance(side, Integral) and side > 0 for side in numbers):
            raise UserError(f"size={size}: the long side in pixels, or (height, width), is expected.")
        if fixed_hw and tuple(numbers * 2)[:2] != fixed_hw:
            raise UserError(f"size={size}: the model was exported for {fixed_hw} (height, width): leave size out.")
        if len(numbers) == 1 and not fixed_hw:
            long_px = numbers[0]
            numbers = [max(hw[axis] * long_px / max(hw) for hw in shapes_hw) for axis in (0, 1)]
        stride = self.model.stride if self.dmb else grid_stride(self.model.stride)
        return [round_up(side, stride) for side in (numbers * 2)[:2]]

    def _letterboxed(self, pictures: Sequence[Picture], shape_hw: Sequence[int]) -> Tensor:
        """Returns the model's input (b, 3, h, w), values 0 to 1."""
        boxed = [letterbox(picture.image, shape_hw, auto=False).image.transpose(2, 0, 1) for picture in pictures]
        weight = next(self.parameters(), torch.empty(0))
        return torch.from_numpy(np.stack(boxed)).to(weight.device).to(weight.dtype).div_(255)

    def _run(self, images: Tensor, augment: bool, profile: bool) -> Any:
        """Returns what the model makes of images (b, 3, h, w): rows, with logits where it is no DetectMultiBackend."""
        device = next(self.parameters(), images).device
        dtype = resolve_amp("auto", device) if self.amp and self.pt else None
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if profile:
                self._profile(images)
            return self.model(images, augment) if self.dmb else predict(self.model, images, augment)

    def _profile(self, images: Tensor) -> None:
        """Logs the time of every layer.

        Raises:
            UserError: the model hides its layers.
        """
        model = self.model.model if self.dmb else self.model
        if not isinstance(model, Model):
            raise UserError("profile=True shows the layers of one checkpoint (.pt), and this is no such model.")
        weight = next(model.parameters())
        profile_layers(model, images.to(weight.device, weight.dtype))

    def _suppressed(self, output: Tensor) -> list[Tensor]:
        """Returns the detections (k, 6) of each image, in px of the model's input."""
        if self.dmb and self.model.chosen:
            limits = Limits(self.conf, self.iou, self.classes, self.agnostic, self.max_det)
            return [torch.from_numpy(limits.narrow(found)) for found in output]
        return non_max_suppression(
            output, self.conf, self.iou, self.classes, self.agnostic, self.multi_label, max_det=self.max_det
        )

    def _now(self) -> float:
        """Returns the time in seconds once the device has done its work."""
        device = next(self.parameters(), torch.empty(0)).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif not self.pt:
            self.model.backend.synchronize()
        return time.perf_counter()


def read_pictures(items: Sequence[Any]) -> list[Picture]:
    """Reads what `AutoShape` takes, each item with a name: `STEM.jpg` of its file, or `image<number>.jpg`.

    Raises:
        UserError: none, or one that cannot be read; says which.
    """
    if not items:
        raise UserError("There are no pictures to look at: the list is empty.")
    pictures = []
    for number, item in enumerate(items):
        try:
            image, name = _read(item)
        except ImageError as error:
            where = str(item) if isinstance(item, (str, Path)) else f"Picture {number}"
            raise UserError(f"{where}: {error}.") from error
        pictures.append(Picture(np.ascontiguousarray(image), f"{name or f'image{number}'}.jpg"))
    return pictures


def _read(item: Any) -> tuple[np.ndarray, str]:
    """Returns a picture, uint8 (h, w, 3) RGB, and its file's stem; an empty one where it comes from no file.

    Raises:
        ImageError: it cannot be used.
        UserError: an address that cannot be fetched.
    """
    if isinstance(item, (str, Path)):
        address = str(item)
        if not address.startswith(("http://", "https://")):
            return read_image(item)[..., ::-1], Path(item).stem
        with tempfile.TemporaryDirectory() as folder:
            image = read_image(download_file(address, Path(folder) / "picture"))
        return image[..., ::-1], re.sub(r"[^\w.-]+", "_", Path(urlsplit(address).path).stem)
    if isinstance(item, Image.Image):
        return _from_pillow(item), Path(str(getattr(item, "filename", ""))).stem
    if isinstance(item, Tensor):
        return _from_tensor(item), ""
    if isinstance(item, np.ndarray):
        return _from_array(item), ""
    raise ImageError(
        f"is a {type(item).__name__}; a file, an address, a Pillow image, an array or a tensor is expected"
    )


def _from_pillow(image: Image.Image) -> np.ndarray:
    """Returns a Pillow image, upright, as uint8 (h, w, 3) RGB; one of more than 8 bits as if read from a file."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in DEEP_MODES:
        return np.asarray(image.convert("RGB"))
    content = BytesIO()
    image.save(content, "TIFF")
    return decode_image(content.getvalue())[..., ::-1]


def _from_tensor(tensor: Tensor) -> np.ndarray:
    """Returns a tensor (c, h, w) or (h, w, c) as uint8 (h, w, 3) RGB."""
    values = tensor.detach().cpu()
    return _from_array((values.float() if values.is_floating_point() else values).numpy())


def _from_array(array: np.ndarray) -> np.ndarray:
    """Returns an array (h, w), (h, w, c) or (c, h, w), of a range that `to_8_bits` knows, as uint8 (h, w, 3) RGB."""
    if array.ndim == 3 and array.shape[0] <= MOST_CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size:
        raise ImageError(f"is an array {array.shape}; (h, w), (h, w, 3) or (3, h, w) is expected")
    array = array[..., None] if array.ndim == 2 else array
    colours = to_8_bits(array[..., : 3 if array.shape[2] > 2 else 1])
    return colours if colours.shape[2] == 3 else np.repeat(colours, 3, axis=2)
