"""What the tests of runtimes share: a small checkpoint that finds things, and its exports, each made once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoint import TRAINING_STATE

SHAPE_HW = (64, 96)


@pytest.fixture(scope="session")
def weights(write_checkpoint) -> Path:
    """A checkpoint of three classes with GSConv, sure of itself, with all that only training needs."""
    state = {**dict.fromkeys(TRAINING_STATE), "date": "", "updates": 7}
    return write_checkpoint(sure=True, epoch=3, opt={"imgsz": 96}, **state)


@pytest.fixture(scope="session")
def exported(weights, tmp_path_factory):
    """A function that returns the export of a checkpoint to a format with options, made when first asked for."""
    import export
    from models.export.formats import FORMATS

    made: dict[tuple, Path] = {}

    def path_of(form: str, checkpoint: Path = weights, **options) -> Path:
        key = (form, checkpoint, *sorted(options.items()))
        if key not in made:
            for package in FORMATS[form].packages:
                pytest.importorskip(package)
            own = Path(shutil.copy(checkpoint, tmp_path_factory.mktemp(form) / "best.pt"))
            given = {"include": [form], "imgsz": list(SHAPE_HW), "device": "cpu", **options}
            (written,) = export.run(weights=[str(own)], **given)
            made[key] = Path(written)
        return made[key]

    return path_of


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Three smooth random images, uint8 (3, 3, 64, 96), unlike each other."""
    small = np.random.default_rng(0).integers(0, 255, (3, 3, 8, 12), np.uint8)
    return small.repeat(8, axis=2).repeat(8, axis=3)


@pytest.fixture(scope="session")
def rows(weights, images) -> np.ndarray:
    """What the checkpoint, not rewritten, makes of the images: rows (3, n, 8)."""
    from models.load import load_model

    with torch.no_grad():
        return load_model(weights)(torch.from_numpy(images).float() / 255)[0].numpy()
