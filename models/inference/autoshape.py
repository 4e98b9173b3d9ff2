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
from itertools import accumulate, pairwise
from numbers import Integral
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps, ImageShow
from torch import Tensor, nn

from models.backends.base import require
from models.backends.pytorch import ModuleBackend
from models.inference.multibackend import DetectMultiBackend, Ensemble, predict
from models.inference.predictor import STAGES, Predictor, Window, class_summary
from models.yolo import Model, profile_layers
from utils import boxes
from utils.boxes import xyxy2xywh
from utils.devices import resolve_amp
from utils.downloads import download_file
from utils.errors import UserError, grid_stride, make_divisible, printable
from utils.files import increment_path
from utils.images import DEFAULT_IMGSZ, SLACK, ImageError, decode_image, letterbox, read_image, to_8_bits
from utils.log import LOGGER
from utils.media.writers import OutputStems, folder_names
from utils.nms import NMSConfig
from utils.plots.boxes import as_mapping, class_name, detection_labels, draw_detections, save_image, save_one_box

COPIED = ("yaml", "nc", "hyp", "names", "stride")  # attributes of the model that the wrapper has too
DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L")  # Pillow's with more than 8 bits a channel
MOST_CHANNELS = 4  # a first axis up to this long holds channels


class AutoShape(nn.Module):
    """A model for images as they come: files, addresses, Pillow images, arrays, tensors, and lists of them.

    The attributes may be changed at any time. Exported models that choose detections themselves (`export.py --nms`)
    keep the thresholds that they were exported with; `conf`, `classes` and `max_det` can only narrow those down.

    Attributes:
        conf: confidences must exceed it.
        iou: boxes of a class that overlap a more confident one by more are dropped.
        agnostic: class-agnostic NMS: boxes suppress each other whatever their classes.
        multi_label: every class above `conf` makes a detection, not only a box's best.
        classes: class numbers to keep; None keeps all.
        max_det: maximum detections per image.
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
    _range_warned = False

    def __init__(self, model: Model | Ensemble | DetectMultiBackend) -> None:
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
        """Detects in images.

        Args:
            imgs: an image or a list of them, of one kind or several: a file; an http or https address; a Pillow
                image; an array or a tensor (h, w, 3), (h, w), (h, w, 1) or (3, h, w) in RGB order (of OpenCV's
                images give `image[..., ::-1]`), 0 to 255, 0 to 1 or of 12 or 16 bits (`utils.images.to_8_bits`).
                EXIF orientation is heeded, alpha left out. A tensor (b, 3, h, w) of values 0 to 1 goes straight to
                the model; one of other values is warned of.
            size: the long side, px, that images are scaled to, or exactly (height, width); both are rounded up to
                the model's stride. None is 640, or what the model was exported for.
            augment: test-time augmentation (3 scales, flip; checkpoints alone).
            profile: log the time of every layer as well (one checkpoint alone).

        Returns:
            Detections; for a tensor (b, 3, h, w) what the model returns: rows, with logits where it is no
            DetectMultiBackend.

        Raises:
            UserError: an image that cannot be read or fetched, a size that the model does not take, or an option that
                it does not offer.
        """
        if self.training:
            raise UserError("The model is in training mode, in which it detects nothing: call .eval() first.")
        device = next(self.parameters(), torch.empty(0)).device
        dtype = resolve_amp("auto", device) if self.amp and self.pt else None
        if isinstance(imgs, Tensor) and imgs.dim() == 4:
            self._warn_of_range(imgs)
            device = next(self.parameters(), imgs).device
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                if profile:
                    self._profile(imgs)
                return self.model(imgs, augment) if self.dmb else predict(self.model, imgs, augment)
        start_s = time.perf_counter()
        images, files = read_images(imgs if isinstance(imgs, (list, tuple)) else [imgs])
        shape_hw = self._shape_for([image.shape[:2] for image in images], size)
        windows = []
        for image in images:
            boxed = letterbox(image, shape_hw, auto=False).image
            windows.append([Window(boxed.transpose(2, 0, 1), (0, 0, *image.shape[1::-1]), None)])
        read_s = time.perf_counter() - start_s
        checkpoint = self.model.model if self.dmb else self.model
        backend = ModuleBackend(checkpoint, dtype) if self.pt else self.model.backend
        if profile:
            self._profile(backend.preprocess(np.stack([window.inputs for (window,) in windows])))
        nms = NMSConfig(self.conf, self.iou, self.max_det, self.agnostic, self.classes, self.multi_label)
        predictor = Predictor(backend, nms, shape_hw, augment=augment, max_batch=len(images))
        found = [torch.from_numpy(detections.rows).to(device) for detections in predictor(windows)]
        pre_s, *others_s = predictor.last_s.values()
        times = list(accumulate([start_s, read_s + pre_s, *others_s]))
        return Detections(images, found, files, times, self.names, (len(images), 3, *shape_hw))

    def _warn_of_range(self, images: Tensor) -> None:
        """Says, once, if images (b, 3, h, w) are not of the values that the model was trained on."""
        if self._range_warned or not images.numel():
            return
        low, high = (value.item() for value in images.aminmax())
        if low < -SLACK or high > 1 + SLACK:
            LOGGER.warning(
                f"WARNING: the tensor has values from {low:g} to {high:g}, but the model was trained on 0 to 1: divide "
                "by 255, and leave normalisation by mean and deviation out."
            )
            self._range_warned = True

    def _shape_for(self, shapes_hw: Sequence[Sequence[int]], size: int | Sequence[int] | None) -> list[int]:
        """Returns height and width that images of these heights and widths are letterboxed to."""
        fixed_hw = self.model.fixed_hw if self.dmb else None
        if fixed_hw and size is None:
            return list(fixed_hw)
        size = DEFAULT_IMGSZ if size is None else size
        numbers = list(size) if isinstance(size, (list, tuple)) else [size]
        if len(numbers) not in (1, 2) or not all(isinstance(side, Integral) and side > 0 for side in numbers):
            raise UserError(f"size={size}: the long side in pixels, or (height, width), is expected.")
        if fixed_hw and tuple(numbers * 2)[:2] != fixed_hw:
            raise UserError(f"size={size}: the model was exported for {fixed_hw} (height, width): leave size out.")
        if len(numbers) == 1 and not fixed_hw:
            long_px = numbers[0]
            numbers = [max(hw[axis] * long_px / max(hw) for hw in shapes_hw) for axis in (0, 1)]
        stride = self.model.stride if self.dmb else grid_stride(self.model.stride)
        return [make_divisible(side, stride) for side in (numbers * 2)[:2]]

    def _profile(self, images: Tensor) -> None:
        """Logs the time of every layer on images (b, 3, h, w)."""
        model = self.model.model if self.dmb else self.model
        if not isinstance(model, Model):
            raise UserError("profile=True shows the layers of one checkpoint (.pt), and this is no such model.")
        weight = next(model.parameters())
        profile_layers(model, images.to(weight.device, weight.dtype))


def read_images(items: Sequence[Any]) -> tuple[list[np.ndarray], list[str]]:
    """Reads what `AutoShape` takes: images, uint8 (h, w, 3) RGB, and a name for each.

    The name is `STEM.jpg` of an image's file, or `image<number>.jpg`.

    Raises:
        UserError: none, or one that cannot be read; says which.
    """
    if not items:
        raise UserError("There are no images to look at: the list is empty.")
    images, files = [], []
    for number, item in enumerate(items):
        try:
            image, name = _read(item)
        except ImageError as error:
            where = str(item) if isinstance(item, (str, Path)) else f"Image {number}"
            raise UserError(f"{where}: {error}.") from error
        images.append(np.ascontiguousarray(image))
        files.append(f"{name or f'image{number}'}.jpg")
    return images, files


def _read(item: Any) -> tuple[np.ndarray, str]:
    """Returns an image, uint8 (h, w, 3) RGB, and its file's stem, empty without a file; raises ImageError if unfit."""
    if isinstance(item, (str, Path)):
        address = str(item)
        if not address.startswith(("http://", "https://")):
            return read_image(item)[..., ::-1], Path(item).stem
        with tempfile.TemporaryDirectory() as folder:
            image = read_image(download_file(address, Path(folder) / "image"))
        return image[..., ::-1], re.sub(r"[^\w.-]+", "_", Path(urlsplit(address).path).stem)
    if isinstance(item, Image.Image):
        return _from_pillow(item), Path(str(getattr(item, "filename", ""))).stem
    if isinstance(item, Tensor):
        values = item.detach().cpu()
        return _from_array((values.float() if values.is_floating_point() else values).numpy()), ""
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
COLUMNS = {  # of tables, by the attribute that they are made of
    **dict.fromkeys(("xyxy", "xyxyn"), ("xmin", "ymin", "xmax", "ymax", "confidence", "class", "name")),
    **dict.fromkeys(("xywh", "xywhn"), ("xcenter", "ycenter", "width", "height", "confidence", "class", "name")),
}


class Detections:
    """What was found in one image or several; indexing and iterating give that of each image.

    Attributes:
        imgs: the images, uint8 (h, w, 3) RGB; after `render` with what was found drawn in. `ims` is the same.
        files: a file name for each, no two alike.
        names: class names {number: name}.
        pred, xyxy: for each image a tensor (k, 6) [x1, y1, x2, y2 in px, confidence, class], most confident first.
        xywh: likewise [x centre, y centre, width, height in px, confidence, class].
        xyxyn, xywhn: likewise, as fractions of the image's width and height.
        n: number of images.
        times: seconds at the start and after each of STAGES.
        t: milliseconds that each of STAGES took an image.
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
        """Takes images and what was found in them; the arguments are the attributes of the same names, s as shape."""
        self.imgs, self.pred, self.n = list(imgs), list(pred), len(pred)
        self.names = as_mapping(names)
        numbered = OutputStems(f"{number}/{file}" for number, file in enumerate(files))  # no two alike
        self.files = [stem + Path(file).suffix for stem, file in zip(numbered.values(), files, strict=True)]
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
        """The images, by the name that they have since YOLOv5 6.2."""
        return self.imgs

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice) -> Detections:
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
        return (self[number] for number in range(self.n))

    def __str__(self) -> str:
        lines = []
        for number, (image, rows) in enumerate(zip(self._given, self.pred, strict=True), start=1):
            height, width = image.shape[:2]
            found = class_summary(rows[:, 5].int().tolist(), self.names) or "(no detections)"
            lines.append(printable(f"image {number}/{self.n}: {height}x{width} {found}"))
        spent = ", ".join(f"{milliseconds:.1f}ms {stage}" for milliseconds, stage in zip(self.t, STAGES, strict=True))
        return "\n".join([*lines, f"Speed: {spent} per image at shape {self.s}"])

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.n} images\n{self}"

    def tolist(self) -> list[Detections]:
        """Returns what was found in each image."""
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
        """Prints what was found, a line for each image, and the times."""
        print(self)

    def show(self, labels: bool = True) -> None:
        """Shows the images with what was found: in the notebook, else in the system's image viewer.

        Args:
            labels: draw class names and confidences, not boxes alone.

        Raises:
            UserError: there is none here.
        """
        images = [Image.fromarray(image) for image in self._drawn(labels)]
        if "ipykernel" in sys.modules:
            notebook = importlib.import_module("IPython.display")
            notebook.display(*images)
            return
        screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        for image, file in zip(images, self.files, strict=True):
            if not screen or not ImageShow.show(image, title=file):
                raise UserError("show(): there is no display or no image viewer here; use save() or render().")

    def save(self, save_dir: str | Path = SAVE_DIR, labels: bool = True, exist_ok: bool | None = None) -> None:
        """Saves the images with what was found drawn in.

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
        """Cuts the detections out of the images.

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
        """Draws what was found into copies of the images, which take their places in `imgs`, and returns them.

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

    def to_supervision(self) -> list[Any]:
        """Returns a `supervision.Detections` for each image, with the class names as data "class_name".

        Raises:
            UserError: supervision is not installed.
        """
        supervision = require("supervision", "supervision", "Detections.to_supervision()")
        converted = []
        for rows in self.pred:
            values = rows.cpu().numpy().astype(np.float32)
            classes = values[:, 5].astype(int)
            named = np.array([class_name(self.names, class_id) for class_id in classes.tolist()], dtype=str)
            converted.append(
                supervision.Detections(
                    xyxy=values[:, :4], confidence=values[:, 4], class_id=classes, data={"class_name": named}
                )
            )
        return converted

    def _drawn(self, labels: bool) -> list[np.ndarray]:
        """Returns copies of the images, RGB, with what was found drawn in."""
        drawn = []
        for image, rows in zip(self._given, self.pred, strict=True):
            bgr = np.ascontiguousarray(image[..., ::-1])
            draw_detections(bgr, boxes.Detections.from_rows(rows), self.names, hide_labels=not labels)
            drawn.append(np.ascontiguousarray(bgr[..., ::-1]))
        return drawn

    def _save(self, folder: Path, labels: bool) -> None:
        """Saves the drawn images into a folder."""
        for image, file in zip(self._drawn(labels), self.files, strict=True):
            save_image(folder / file, image[..., ::-1])
        LOGGER.info(f"Saved {self.n} image{'s' * (self.n > 1)} to {folder}")

    def _crops(self, folder: Path | None) -> list[dict[str, Any]]:
        """Cuts the detections out; saves them below a folder where one is given."""
        class_folders = folder_names(self.names)
        crops = []
        for image, file, rows in zip(self._given, self.files, self.pred, strict=True):
            for row, label in zip(rows, detection_labels(boxes.Detections.from_rows(rows), self.names), strict=True):
                cut = save_one_box(row[:4], image, save=False)
                crops.append({"box": list(row[:4]), "conf": row[4], "cls": row[5], "label": label, "im": cut})
                if folder:
                    class_id = int(row[5])
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
