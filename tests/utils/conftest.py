"""A few images of different shapes with labels, as a table; GPUs that are not there."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.dataloaders.labels import scan_images

SIZES_WH = [(128, 96), (96, 128), (64, 64), (200, 50), (50, 200), (300, 200), (96, 96), (40, 30), (128, 128), (90, 120)]
COUNT = 21


@pytest.fixture
def label_table(tmp_path: Path):
    """A LabelTable of 21 JPEGs, 30 to 300 px; every third one has a polygon, every fifth no label."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    generator = np.random.default_rng(0)
    paths = []
    for number in range(COUNT):
        width, height = SIZES_WH[number % len(SIZES_WH)]
        image = cv2.resize(generator.integers(0, 256, (8, 8, 3)).astype(np.uint8), (width, height))
        path = tmp_path / "images" / f"{number:02}.jpg"
        cv2.imwrite(str(path), image)
        lines = [] if number % 5 == 4 else [f"{number % 3} 0.5 0.5 0.4 0.6", "1 0.25 0.7 0.3 0.2"]
        if number % 3 == 0 and lines:
            lines.append("2 0.1 0.1 0.6 0.2 0.5 0.8 0.2 0.7")
        (tmp_path / "labels" / f"{number:02}.txt").write_text("\n".join(lines))
        paths.append(str(path))
    return scan_images(paths, workers=0)


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that makes PyTorch see a number of GPUs, and returns a list of those made the current one."""
    chosen = []

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see
