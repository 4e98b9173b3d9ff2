"""Boxes on pictures, crops and plots by YOLOv5's signatures."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from utils import plots
from utils import plots as compat_plots
from utils.errors import UserError


@pytest.fixture
def picture():
    return np.full((100, 120, 3), 50, np.uint8)


def test_palette():
    assert plots.colors(0) == (0xFF, 0x38, 0x38) and plots.colors(torch.tensor(21.0), True) == (0x97, 0x9D, 0xFF)
    assert plots.Colors.hex2rgb("#48F90A") == (72, 249, 10) and plots.colors.n == len(plots.colors.palette) == 20


def test_annotator_draws_in_place(picture):
    annotator = plots.Annotator(picture, line_width=2, example="cat")
    annotator.box_label([torch.tensor(value) for value in (20.0, 40, 80, 90)], "cat 0.50", color=(0, 0, 255))
    assert annotator.result() is picture and picture[65, 20].tolist() == [0, 0, 255]
    assert (picture[20:38, 20:60] == (0, 0, 255)).all(axis=2).any()  # the label's ground, above the box
    assert picture[65, 50].tolist() == [50, 50, 50]


def test_annotator_honours_the_colour_of_text(picture):
    plots.Annotator(picture, 2, 12).box_label((20, 40, 80, 90), "cat", (0, 0, 255), txt_color=(0, 255, 0))
    assert (picture[20:40, 20:60, 1] > 200).any()
    high = np.full((100, 120, 3), 50, np.uint8)
    plots.Annotator(high, 2, 12).box_label((20, 4, 80, 90), "cat", (0, 0, 255), txt_color=(0, 255, 0))
    assert (high[6:25, 22:60, 1] > 200).any()  # no room above: inside


def test_annotator_draws_shapes_and_text(picture):
    annotator = plots.Annotator(Image.fromarray(picture))
    annotator.rectangle((10, 10, 20, 20), fill=(1, 2, 3))
    annotator.rectangle((40, 40, 60, 60), outline=(9, 9, 9), width=1)
    annotator.text((70, 70), "文字 text", txt_color=(255, 255, 255))
    drawn = annotator.result()
    assert drawn[15, 15].tolist() == [1, 2, 3] and drawn[40, 50].tolist() == [9, 9, 9] and drawn[50, 50, 0] == 50
    assert (drawn[70:95, 70:] > 150).any() and (picture == 50).all()
    with pytest.raises(UserError, match="ascontiguousarray"):
        plots.Annotator(picture[..., ::-1])


def test_crops_are_enlarged_numbered_and_turned_to_bgr(picture, tmp_path):
    """A box of 20 x 10 px grows to 30.4 x 20.2 px about its centre (50, 45): from (34, 34) to (65, 55)."""
    picture[..., 0] = 200
    box = torch.tensor([[40.0, 40, 60, 50]])
    for _ in range(2):
        crop = plots.save_one_box(box, picture, file=tmp_path / "crops" / "cat" / "a.png")
    assert crop.shape == (21, 31, 3) and crop[0, 0].tolist() == [50, 50, 200]
    assert sorted(path.name for path in (tmp_path / "crops" / "cat").iterdir()) == ["a.jpg", "a2.jpg"]
    assert cv2.imread(str(tmp_path / "crops" / "cat" / "a.jpg"))[5, 5, 2] > 190
    square = plots.save_one_box([40, 40, 60, 50], picture, gain=1, pad=0, square=True, BGR=True, save=False)
    assert square.shape == (20, 20, 3) and square[0, 0].tolist() == [200, 50, 50]


def test_detections_become_targets_and_are_drawn(tmp_path):
    found = [torch.tensor([[10.0, 10, 30, 50, 0.9, 1]]), torch.zeros(0, 6), torch.tensor([[0.0, 0, 4, 4, 0.1, 0]])]
    rows = plots.output_to_target(found)
    assert np.allclose(rows, [[0, 1, 20, 30, 20, 40, 0.9], [2, 0, 2, 2, 4, 4, 0.1]])
    images = torch.zeros(3, 3, 64, 64)
    plots.plot_images(images, rows, ["a.jpg", "b.jpg", "c.jpg"], tmp_path / "pred.png", names=["cat", "dog"])
    labels = torch.tensor([[0, 1, 20 / 64, 30 / 64, 20 / 64, 40 / 64]])
    plots.plot_images(images, labels, None, tmp_path / "labels.png")
    for name in ("pred.png", "labels.png"):
        mosaic = cv2.imread(str(tmp_path / name))
        assert mosaic.shape == (128, 128, 3)
        edge = mosaic[30, 10]  # of the first image's box: class 1
        assert edge.tolist() == list(plots.colors(1, True))


def test_features_are_saved(tmp_path):
    maps = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    plots.feature_visualization(maps, "models.common.C3", 4, n=3, save_dir=tmp_path)
    plots.feature_visualization(maps, "models.yolo.Detect", 24, save_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage4_C3_features.npy", "stage4_C3_features.png"]
    assert np.array_equal(np.load(tmp_path / "stage4_C3_features.npy"), maps.numpy())


def test_plots_of_training_are_made_of_what_scripts_hand_in(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compat_plots.plots, "plot_labels", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(compat_plots.plots, "plot_results", lambda *arguments: asked.append(arguments))
    labels = np.zeros((3, 5), np.float32)
    plots.plot_labels(labels, ["cat"], str(tmp_path))
    assert asked[0][0] is labels and asked[0][1:] == ({0: "cat"}, tmp_path)
    (tmp_path / "results.csv").touch()
    plots.plot_results(str(tmp_path / "results.csv"))
    plots.plot_results(dir=str(tmp_path))
    assert asked[1] == asked[2] == (tmp_path / "results.csv", tmp_path / "results.png")
    with pytest.raises(UserError, match="holds no results"):
        plots.plot_results(dir=tmp_path / "none")
