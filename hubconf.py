"""Models for `torch.hub.load`: `torch.hub.load("path/of/this/repository", "custom", path="best.pt", source="local")`.

Entries: `custom` for any weights file, `yolov5n` to `yolov5x`, `yolov5n6` to `yolov5x6`, those with a slim neck
(`yolov5n_slimneck`, `yolov5n_slimneck_c`, `yolov5n_gsneck`, `yolov5n_gsconv` and so on) and with the anchor-free head
(`yolov5n_af`, `yolov5n_slimneck_af`). They return a model for images of any kind (`models.inference.autoshape`). As a
script this file tries that out on those in data/images.
"""

from __future__ import annotations

import pathlib
import sys
import typing

if typing.TYPE_CHECKING:
    import torch
    from torch import nn

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml", "tqdm"]  # torch.hub names those that are missing

_ROOT = pathlib.Path(__file__).resolve().parent
_SIZES = "nsmlx"
_RELEASED = [f"yolov5{size}{level}" for level in ("", "6") for size in _SIZES]
_VARIANTS = ("slimneck", "slimneck-c", "slimneck-q", "gsneck", "gsconv", "af", "slimneck-af")
_OURS = [f"yolov5{size}-{variant}" for variant in _VARIANTS for size in _SIZES]


def custom(
    path: str | pathlib.Path = "path/to/model.pt",
    autoshape: bool = True,
    verbose: bool = True,
    device: str | torch.device | None = None,
    _verbose: bool = True,
) -> nn.Module:
    """Loads a checkpoint or an exported model.

    Args:
        path: the file or folder; several checkpoints make an ensemble.
        autoshape: take images of any kind and return `Detections`; else take tensors and return rows.
        verbose: tell what is loaded.
        device: where to run: cpu, cuda:0, ...; None takes a GPU where there is one.
        _verbose: the same as `verbose`, which `torch.hub.load` takes for itself when it is given by name.

    Raises:
        UserError: no such file, or it cannot be loaded.
    """
    return _create(path, autoshape=autoshape, verbose=verbose and _verbose, device=device)


def _create(
    name: str | pathlib.Path,
    pretrained: bool = True,
    channels: int = 3,
    classes: int = 80,
    autoshape: bool = True,
    verbose: bool = True,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Makes a model of the repository (`name`: its YAML's without the suffix), or loads a weights file; see `_entry`.

    Raises:
        UserError: no such model, no released weights for it, offline, or a file that cannot be loaded.
    """
    _check_packages()
    if str(_ROOT) not in sys.path[1:]:  # torch.hub puts it first, and takes it away again
        sys.path.append(str(_ROOT))  # for processes that are sent the model: they look where this one does
    import logging

    from models.inference.autoshape import AutoShape
    from models.inference.multibackend import DetectMultiBackend
    from utils.errors import UserError
    from utils.log import logging_from, setup_logging

    setup_logging()
    with logging_from(logging.NOTSET if verbose else logging.WARNING):
        if pretrained and name in _OURS:
            raise UserError(
                f"There are no released weights for {name}: train it and load your own with custom(path=...), or take "
                "it untrained with pretrained=False."
            )
        if pretrained and (channels, classes) == (3, 80):
            model = DetectMultiBackend(f"{name}.pt" if name in _RELEASED else name, device, fuse=autoshape)
        else:
            model = _build(str(name), pretrained, channels, classes, device)
        return AutoShape(model) if autoshape else model


def _build(name: str, pretrained: bool, channels: int, classes: int, device: str | torch.device | None) -> nn.Module:
    """Builds a model from its YAML, with those of the released weights that fit it; see `_create`."""
    from models.inference.multibackend import pick_device
    from models.load import read_weights, transfer
    from models.yolo import Model
    from utils.log import LOGGER

    stem = name.removesuffix(".pt").removesuffix(".yaml")
    model = Model(f"{stem}.yaml", ch=channels, nc=classes)
    if pretrained:
        weights = read_weights(f"{stem}.pt")
        LOGGER.info(transfer(model, weights, exclude=("anchors",)).told(f"{stem}.pt"))
        if weights.nc == classes:
            model.names = dict(weights.names)
    return model.to(pick_device(device))


def _check_packages() -> None:
    """Makes sure that `models` and `utils` are this repository's.

    Raises:
        ImportError: the caller has imported others of these names.
    """
    for name in ("models", "utils"):
        found = [pathlib.Path(place).resolve() for place in getattr(sys.modules.get(name), "__path__", [])]
        if name in sys.modules and _ROOT / name not in found:
            where = getattr(sys.modules[name], "__file__", None) or found
            raise ImportError(
                f"A module '{name}' is loaded already, from {where}, and {_ROOT} needs its own: load the model before "
                "that one is imported, or rename it."
            )


def _entry(name: str) -> typing.Callable[..., nn.Module]:
    """Returns the entry of one of the repository's models."""

    def entry(
        pretrained: bool = True,
        channels: int = 3,
        classes: int = 80,
        autoshape: bool = True,
        verbose: bool = True,
        device: str | torch.device | None = None,
        _verbose: bool = True,
    ) -> nn.Module:
        """Args:
            pretrained: take the released weights, as far as they fit another number of channels or classes.
            channels: of the images; with another number than 3 the model takes tensors alone.
            classes: number of classes.
            autoshape: take images of any kind and return `Detections`; else return a model to train, its batch norm
                not folded.
            verbose: tell what is loaded.
            device: where to run: cpu, cuda:0, ...; None takes a GPU where there is one.
            _verbose: the same as `verbose`, which `torch.hub.load` takes for itself when it is given by name.

        Raises:
            UserError: no released weights, or offline.
        """
        return _create(name, pretrained, channels, classes, autoshape, verbose and _verbose, device)

    weights = "with COCO weights" if name in _RELEASED else "with pretrained=False: no weights are released"
    entry.__name__ = entry.__qualname__ = name.replace("-", "_")
    entry.__doc__ = f"{name}, {weights}.\n\n        {entry.__doc__}"
    return entry


for _name in (*_RELEASED, *_OURS):
    globals()[_name.replace("-", "_")] = _entry(_name)


def _main() -> None:
    """Detects in data/images, given in every way, and saves the results."""
    import numpy
    from PIL import Image

    weights = next((path for path in (pathlib.Path("yolov5n.pt"), _ROOT / "yolov5n.pt") if path.is_file()), None)
    model = custom(weights) if weights else _create("yolov5n", pretrained=False)
    print(f"yolov5n {f'from {weights}' if weights else 'with random weights: yolov5n.pt is not here'}")
    files = sorted((_ROOT / "data" / "images").glob("*.jpg"))
    images = [str(files[0]), files[1], Image.open(files[2]), numpy.asarray(Image.open(files[0]))]
    results = model(images)
    results.print()
    results.save()


if __name__ == "__main__":
    _main()
