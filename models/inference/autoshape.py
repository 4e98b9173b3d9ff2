"""`AutoShape`: a model that takes images of any kind and gives `Detections`; what `torch.hub.load` returns.

Drawings and crops are made from the images as they were given, which stay as they are. pandas is imported only for
tables.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps, ImageShow
from torch import Tensor, nn

from models.backends.base import require
from models.inference.multibackend import DetectMultiBackend, Ensemble, predict
from models.inference.predictor import class_summary
from models.yolo import Model, profile_layers
from utils.boxes import scale_boxes, xyxy2xywh
from utils.devices import resolve_amp
from utils.downloads import download_file
from utils.errors import UserError, grid_stride, printable, round_up
from utils.files import increment_path
from utils.images import SLACK, ImageError, decode_image, letterbox, read_image, to_8_bits
from utils.log import LOGGER
from utils.media.writers import OutputStems, folder_names
from utils.nms import NMSConfig
from utils.plots.boxes import class_name, detection_labels, draw_detections, save_image, save_one_box

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
        nms = NMSConfig(self.conf, self.iou, self.max_det, self.agnostic, self.classes, self.multi_label)
        return [nms.narrow(found) for found in output] if self.dmb and self.model.has_nms else nms.suppress(output)

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


SAVE_DIR = "runs/detect/exp"
STAGES = ("pre-process", "inference", "NMS")
COLUMNS = {  # of tables, by the attribute that they are made of
    **dict.fromkeys(("xyxy", "xyxyn"), ("xmin", "ymin", "xmax", "ymax", "confidence", "class", "name")),
    **dict.fromkeys(("xywh", "xywhn"), ("xcenter", "ycenter", "width", "height", "confidence", "class", "name")),
}


class Detections:
    """What was found in one picture or several; indexing and iterating give that of each picture.

    Attributes:
        imgs: the pictures, uint8 (h, w, 3) RGB; after `render` with what was found drawn in. `ims` is the same.
        files: a file name for each, no two alike.
        names: class names {number: name}.
        pred, xyxy: for each picture a tensor (k, 6) [x1, y1, x2, y2 in px, confidence, class], most confident first.
        xywh: likewise [x centre, y centre, width, height in px, confidence, class].
        xyxyn, xywhn: likewise, as fractions of the picture's width and height.
        n: number of pictures.
        times: seconds at the start and after each of STAGES.
        t: milliseconds that each of STAGES took a picture.
        s: shape (b, 3, h, w) of the model's input.
    """

    def __init__(
        self,
        imgs: Sequence[np.ndarray],
        pred: Sequence[Tensor],
        files: Sequence[str],
        times: Sequence[float] = (0, 0, 0, 0),
        names: Mapping[int, str] | Sequence[str] = (),
        shape: Sequence[int] | None = None,
    ) -> None:
        """Takes pictures and what was found in them; the arguments are the attributes of the same names, s as shape."""
        self.imgs, self.pred, self.n = list(imgs), list(pred), len(pred)
        self.names = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        self.files = _distinct(files)
        self.times, self.s = tuple(times), shape and tuple(shape)
        self.t = tuple((end - start) * 1000 / max(self.n, 1) for start, end in pairwise(self.times))
        self.xyxy = self.pred
        self.xywh = [torch.cat((xyxy2xywh(rows[:, :4]), rows[:, 4:]), 1) for rows in self.pred]
        sides = [rows.new_tensor([*image.shape[1::-1] * 2, 1, 1]) for rows, image in zip(self.pred, imgs, strict=True)]
        self.xyxyn = [rows / by for rows, by in zip(self.xyxy, sides, strict=True)]
        self.xywhn = [rows / by for rows, by in zip(self.xywh, sides, strict=True)]
        self._given = list(imgs)

    @property
    def ims(self) -> list[np.ndarray]:
        """The pictures, by the name that they have since YOLOv5 6.2."""
        return self.imgs

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return self.n

    def __getitem__(self, index: int | slice) -> Detections:
        """Returns what was found in one picture, or in several."""
        chosen = range(self.n)[index]
        chosen = [chosen] if isinstance(chosen, int) else chosen
        part = Detections(
            [self._given[number] for number in chosen],
            [self.pred[number] for number in chosen],
            [self.files[number] for number in chosen],
            self.times,
            self.names,
            self.s,
        )
        part.imgs, part.t = [self.imgs[number] for number in chosen], self.t
        return part

    def __iter__(self) -> Iterator[Detections]:
        """Yields what was found in each picture."""
        return (self[number] for number in range(self.n))

    def __str__(self) -> str:
        """Returns what `print` shows."""
        return "\n".join([*(printable(self._line(number)) for number in range(self.n)), self._speed()])

    def __repr__(self) -> str:
        """Returns the class and the number of pictures, with what `print` shows."""
        return f"{type(self).__name__} of {self.n} pictures\n{self}"

    def tolist(self) -> list[Detections]:
        """Returns what was found in each picture."""
        return list(self)

    def display(
        self,
        pprint: bool = False,
        show: bool = False,
        save: bool = False,
        crop: bool = False,
        render: bool = False,
        save_dir: str | Path = SAVE_DIR,
        labels: bool = True,
        exist_ok: bool | None = None,
    ) -> list[dict[str, Any]] | None:
        """Does what is asked for, as the methods of these names do.

        Args:
            pprint: print.
            show: show.
            save: save to `save_dir`; together with `crop` the crops too.
            crop: cut the detections out.
            render: draw.
            save_dir, labels, exist_ok: as in `save`.

        Returns:
            The crops, with `crop`.
        """
        if pprint:
            self.print()
        if show:
            self.show(labels)
        folder = _output_folder(save_dir, exist_ok) if save else None
        if folder:
            self._save(folder, labels)
        if render:
            self.render(labels)
        return self._crops(folder) if crop else None

    def print(self) -> None:
        """Prints what was found, a line for each picture, and the times."""
        print(self)

    def show(self, labels: bool = True) -> None:
        """Shows the pictures with what was found: in the notebook, else in the system's picture viewer.

        Args:
            labels: draw class names and confidences, not boxes alone.

        Raises:
            UserError: there is none here.
        """
        pictures = [Image.fromarray(image) for image in self._drawn(labels)]
        if "ipykernel" in sys.modules:
            notebook = importlib.import_module("IPython.display")
            notebook.display(*pictures)
            return
        screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        for picture, file in zip(pictures, self.files, strict=True):
            if not screen or not ImageShow.show(picture, title=file):
                raise UserError("show(): there is no display or no picture viewer here; use save() or render().")

    def save(self, save_dir: str | Path = SAVE_DIR, labels: bool = True, exist_ok: bool | None = None) -> None:
        """Saves the pictures with what was found drawn in.

        Args:
            save_dir: the folder.
            labels: draw class names and confidences, not boxes alone.
            exist_ok: whether a folder that is there already is used again, or numbered on; None numbers the default
                folder on and uses any other again.

        Raises:
            UserError: the folder or a file cannot be written.
        """
        self._save(_output_folder(save_dir, exist_ok), labels)

    def crop(
        self, save: bool = True, save_dir: str | Path = SAVE_DIR, exist_ok: bool | None = None
    ) -> list[dict[str, Any]]:
        """Cuts the detections out of the pictures.

        Args:
            save: write each to `crops/CLASS/FILE` in the folder, numbered on where that is there already.
            save_dir, exist_ok: the folder, as in `save`.

        Returns:
            For each detection a dict: box (four tensors x1, y1, x2, y2 in px), conf and cls (tensors), label, and the
            crop im, uint8 (h, w, 3) BGR.

        Raises:
            UserError: the folder or a file cannot be written.
        """
        return self._crops(_output_folder(save_dir, exist_ok) if save else None)

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """Draws what was found into copies of the pictures, which take their places in `imgs`, and returns them.

        Args:
            labels: draw class names and confidences, not boxes alone.
        """
        self.imgs = self._drawn(labels)
        return self.imgs

    def pandas(self) -> Detections:
        """Returns a copy whose xyxy, xyxyn, xywh and xywhn are lists of pandas tables, with the columns of COLUMNS.

        Raises:
            UserError: pandas is not installed.
        """
        pandas = require("pandas", "pandas", "Detections.pandas()")
        tables = copy.copy(self)
        for attribute, columns in COLUMNS.items():
            frames = []
            for rows in getattr(self, attribute):
                named = [[*row[:5], int(row[5]), class_name(self.names, int(row[5]))] for row in rows.tolist()]
                frames.append(pandas.DataFrame(named, columns=columns))
            setattr(tables, attribute, frames)
        return tables

    def _line(self, number: int) -> str:
        """Returns `image 1/2: 720x1280 2 persons, 1 tie` of one picture."""
        height, width = self._given[number].shape[:2]
        found = class_summary(self.pred[number][:, 5].int().tolist(), self.names)
        return f"image {number + 1}/{self.n}: {height}x{width} {found or '(no detections)'}"

    def _speed(self) -> str:
        """Returns the line about the times."""
        spent = ", ".join(f"{milliseconds:.1f}ms {stage}" for milliseconds, stage in zip(self.t, STAGES, strict=True))
        return f"Speed: {spent} per image at shape {self.s}"

    def _rows(self) -> list[np.ndarray]:
        """Returns the detections (k, 6) of each picture as arrays."""
        return [rows.cpu().numpy() for rows in self.pred]

    def _drawn(self, labels: bool) -> list[np.ndarray]:
        """Returns copies of the pictures, RGB, with what was found drawn in."""
        bgr = [np.ascontiguousarray(image[..., ::-1]) for image in self._given]
        drawn = [
            draw_detections(image, rows, self.names, hide_labels=not labels)
            for image, rows in zip(bgr, self._rows(), strict=True)
        ]
        return [np.ascontiguousarray(image[..., ::-1]) for image in drawn]

    def _save(self, folder: Path, labels: bool) -> None:
        """Saves the drawn pictures into a folder."""
        for image, file in zip(self._drawn(labels), self.files, strict=True):
            save_image(folder / file, image[..., ::-1])
        LOGGER.info(f"Saved {self.n} image{'s' * (self.n > 1)} to {folder}")

    def _crops(self, folder: Path | None) -> list[dict[str, Any]]:
        """Cuts the detections out; saves them below a folder where one is given."""
        class_folders = folder_names(self.names)
        crops = []
        for image, file, rows, array in zip(self._given, self.files, self.pred, self._rows(), strict=True):
            for row, values, label in zip(rows, array, detection_labels(array, self.names), strict=True):
                cut = save_one_box(values[:4], image, save=False)
                crops.append({"box": list(row[:4]), "conf": row[4], "cls": row[5], "label": label, "im": cut})
                if folder:
                    class_id = int(values[5])
                    place = folder / "crops" / class_folders.get(class_id, str(class_id))
                    place.mkdir(parents=True, exist_ok=True)
                    save_image(increment_path(place / file), cut)
        if folder:
            LOGGER.info(f"Saved {len(crops)} crops to {folder / 'crops'}")
        return crops


def _output_folder(save_dir: str | Path, exist_ok: bool | None) -> Path:
    """Makes the folder that is saved to; see `Detections.save`."""
    exist_ok = Path(save_dir) != Path(SAVE_DIR) if exist_ok is None else exist_ok
    return increment_path(save_dir, exist_ok=exist_ok, mkdir=True)


def _distinct(files: Sequence[str]) -> list[str]:
    """Returns file names of which no two are alike: later ones of a name are numbered."""
    places = [f"{number}/{file}" for number, file in enumerate(files)]
    return [stem + Path(place).suffix for place, stem in OutputStems(places).items()]
