"""`Detections`: what `AutoShape` found in pictures, and what can be done with it.

Printing, drawing, saving, cutting out, tables. Drawings and crops are made from the pictures as they were given, which
stay as they are. pandas is imported only for tables.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageShow
from torch import Tensor

from models.backends.runtime import require
from models.detector import in_words
from utils.boxes import xyxy2xywh
from utils.checks import UserError, printable
from utils.data.sinks import OutputStems, folder_names
from utils.draw import class_name, crop_box, detection_labels, draw_detections, save_image
from utils.files import increment_path
from utils.log import LOGGER

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
        found = in_words(self.pred[number][:, 5].int().tolist(), self.names)
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
                cut = np.ascontiguousarray(crop_box(image, values[:4])[..., ::-1])
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
