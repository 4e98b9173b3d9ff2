"""Fixtures that the whole suite shares: the folders of golden numbers and of real images."""

import logging
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _folder(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set ${variable} to the folder")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return _folder("GOLDEN_DIR", "../shared/golden")


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    return _folder("DATASETS_DIR", "../shared/datasets")


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set YAML: 24 training and 8 validation pictures of the embedded data set."""
    from utils.data.shapes import SPLITS, label_text, scene_of

    root = tmp_path_factory.mktemp("shapes")
    for split, count in zip(SPLITS, (24, 8), strict=True):
        write_scenes(root, split.name, [scene_of(split, index) for index in range(count)], label_text)
    yaml = root / "tiny.yaml"
    yaml.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n")
    return yaml


def write_scenes(root: Path, split: str, scenes: list, label_text) -> None:
    import cv2

    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True)
    for index, scene in enumerate(scenes):
        cv2.imwrite(str(root / "images" / split / f"{index}.jpg"), scene.image)
        (root / "labels" / split / f"{index}.txt").write_text(label_text(scene))


@pytest.fixture(autouse=True)
def logger_as_before():
    """Gives the program's logger back as it was: a script run inside a test must not silence the next test."""
    logger = logging.getLogger("yolov5")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
