"""Detections worked out by hand: lines, formats, tables, files; the caller's images stay as they are."""

import builtins
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from models.inference.autoshape import Detections
from utils.boxes import Detections as Found
from utils.errors import UserError
from utils.plots.boxes import draw_detections

NAMES = {0: "person", 1: "a/b", 2: "tie"}


def detections(**changes):
    """Two images: 200 x 400 px (height x width) with two persons and a tie, and 300 x 250 px with nothing."""
    found = torch.tensor([[40.0, 20, 120, 100, 0.9, 0], [200, 50, 400, 150, 0.8, 0], [0, 0, 50, 50, 0.5, 2]])
    given = {
        "imgs": [np.full((200, 400, 3), (200, 100, 50), np.uint8), np.zeros((300, 250, 3), np.uint8)],
        "pred": [found, torch.zeros(0, 6)],
        "files": ["bus.jpg", "zidane.jpg"],
        "times": (1.0, 1.002, 1.012, 1.013),
        "names": NAMES,
        "shape": (2, 3, 64, 96),
    }
    return Detections(**given | changes)


def test_prints_a_line_for_each_image_and_the_times(capsys):
    results = detections()
    expected = (
        "image 1/2: 200x400 2 persons, 1 tie\n"
        "image 2/2: 300x250 (no detections)\n"
        "Speed: 1.0ms pre-process, 5.0ms inference, 0.5ms NMS per image at shape (2, 3, 64, 96)"
    )
    assert str(results) == expected
    results.print()
    assert capsys.readouterr().out == expected + "\n"


def test_formats_agree_with_numbers_worked_out_by_hand():
    results = detections()
    assert results.xyxy[0] is results.pred[0]
    assert results.xywh[0][0].tolist() == pytest.approx([80, 60, 80, 80, 0.9, 0])
    assert results.xyxyn[0][0].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.9, 0])
    assert results.xywhn[0][1].tolist() == pytest.approx([0.75, 0.5, 0.5, 0.5, 0.8, 0])
    assert all(rows[1].shape == (0, 6) for rows in (results.xyxy, results.xywh, results.xyxyn, results.xywhn))


def test_tables_have_the_known_columns():
    pytest.importorskip("pandas")
    results = detections()
    tables = results.pandas()
    for attribute in ("xyxy", "xyxyn"):
        columns = list(getattr(tables, attribute)[0].columns)
        assert columns == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    for attribute in ("xywh", "xywhn"):
        columns = list(getattr(tables, attribute)[1].columns)
        assert columns == ["xcenter", "ycenter", "width", "height", "confidence", "class", "name"]
    table = tables.xyxy[0]
    assert table["name"].tolist() == ["person", "person", "tie"] and table["class"].tolist() == [0, 0, 2]
    assert table["xmax"].tolist() == [120, 400, 50] and len(tables.xyxy[1]) == 0
    assert isinstance(results.xyxy[0], torch.Tensor), "the original keeps its tensors"


def test_supervision_gets_boxes_and_names_of_each_image():
    supervision = pytest.importorskip("supervision")
    results = detections()
    converted = results.to_supervision()
    assert len(converted) == len(results) and all(isinstance(one, supervision.Detections) for one in converted)
    for one, rows in zip(converted, results.xyxy, strict=True):
        np.testing.assert_array_equal(one.xyxy, rows[:, :4].numpy())
        np.testing.assert_array_equal(one.confidence, rows[:, 4].numpy())
        assert one.class_id.tolist() == rows[:, 5].int().tolist() and one.class_id.dtype == int
        assert one["class_name"].tolist() == [results.names[class_id] for class_id in one.class_id.tolist()]
    merged = supervision.Detections.merge(converted)  # those without any take part as well
    assert len(merged) == sum(map(len, results.xyxy))


def test_says_when_supervision_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        detections().to_supervision()


def test_says_when_pandas_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        detections().pandas()


def test_indexing_and_iterating_give_single_images():
    results = detections()
    assert len(results) == 2 and len(results.tolist()) == 2
    single = results[-1]
    assert len(single) == 1 and single.files == ["zidane.jpg"]
    assert str(single).startswith("image 1/1: 300x250 (no detections)\n")
    assert [part.files for part in results] == [["bus.jpg"], ["zidane.jpg"]]
    assert results[0].t == results.t, "times stay those of an image"
    assert results[:1].xyxy[0].shape == (3, 6)
    with pytest.raises(IndexError):
        results[2]


def test_render_draws_into_copies():
    image = np.full((200, 400, 3), (200, 100, 50), np.uint8)
    results = detections(imgs=[image, np.zeros((300, 250, 3), np.uint8)])
    drawn = results.render()
    assert (image == (200, 100, 50)).all(), "the caller's array is untouched"
    assert results.imgs[0] is drawn[0] and results.ims is results.imgs
    assert drawn[0][80, 40].tolist() == [0xFF, 0x38, 0x38], "the palette's first colour, in RGB, on the box's left side"
    assert drawn[0][190, 300].tolist() == [200, 100, 50] and not drawn[1].any()
    assert np.array_equal(results.render()[0], drawn[0]), "nothing is drawn twice"
    assert np.array_equal(results[0].imgs[0], drawn[0])


def test_save_never_overwrites_a_picture_of_the_same_name(tmp_path):
    images = [np.full((20, 20, 3), level, np.uint8) for level in (0, 80, 160)]
    results = detections(imgs=images, pred=[torch.zeros(0, 6)] * 3, files=["bus.jpg", "bus.jpg", "bus-2.jpg"])
    assert len(set(results.files)) == 3 and results.files[0] == "bus.jpg"
    for _ in range(2):  # a folder of the user's own is used again
        results.save(tmp_path / "out")
    saved = {path.name: cv2.imread(str(path))[10, 10, 0] for path in (tmp_path / "out").iterdir()}
    assert sorted(saved) == sorted(results.files)
    assert [saved[file] for file in results.files] == [0, 80, 160]


def test_labels_are_left_out_on_demand_of_what_is_drawn_saved_and_shown_in_a_notebook(tmp_path, monkeypatch):
    boxes_alone = np.full((200, 400, 3), (50, 100, 200), np.uint8)
    draw_detections(boxes_alone, Found.from_rows(detections().pred[0]), NAMES, hide_labels=True)
    boxes_alone = boxes_alone[..., ::-1]
    results, shown = detections(), []
    assert not np.array_equal(results.render()[0], boxes_alone)
    assert np.array_equal(results.render(labels=False)[0], boxes_alone)
    results.save(labels=False, save_dir=tmp_path)
    saved = cv2.imread(str(tmp_path / "bus.jpg"))[..., ::-1].astype(int)
    assert np.abs(saved - boxes_alone).mean() < 2 < np.abs(saved - results.render()[0]).mean()
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=lambda *images: shown.extend(images)))
    results.show(labels=False)
    assert np.array_equal(np.asarray(shown[0]), boxes_alone) and shown[1].size == (250, 300)
    assert results.display(render=True, labels=False) is None and np.array_equal(results.imgs[0], boxes_alone)


@pytest.mark.parametrize("call", ["save", "crop"])
def test_folder_is_used_again_or_numbered_on_as_said(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    save = getattr(detections(), call)
    for exist_ok in (None, True, False, None):
        save(save_dir="out", exist_ok=exist_ok)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2"]
    for exist_ok, count in ((None, 1), (None, 2), (True, 2), (False, 3)):
        save(exist_ok=exist_ok)
        assert len(list((tmp_path / "runs" / "detect").iterdir())) == count


def test_crops_are_dicts_and_files(tmp_path):
    rows = torch.tensor([[10.0, 10, 30, 30, 0.9, 1], [0, 0, 10, 10, 0.5, 1]])
    results = detections(pred=[rows, torch.zeros(0, 6)])
    crops = results.crop(save_dir=tmp_path)
    assert list(crops[0]) == ["box", "conf", "cls", "label", "im"]
    assert [float(side) for side in crops[0]["box"]] == [10, 10, 30, 30]
    assert float(crops[0]["conf"]) == pytest.approx(0.9) and int(crops[0]["cls"]) == 1
    assert crops[0]["label"] == "a/b 0.90"
    # sides 20 * 1.02 + 10 = 30.4 around (20, 20): 4.8 to 35.2, cut to whole pixels
    assert crops[0]["im"].shape == (31, 31, 3) and crops[0]["im"][0, 0].tolist() == [50, 100, 200]
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg"))
    assert written == ["crops/a_b/bus.jpg", "crops/a_b/bus2.jpg"]
    assert results.crop(save=False)[1]["im"].shape == (15, 15, 3), "-5.1 to 15.1, clipped to the image"


def test_display_does_what_is_asked_for(tmp_path, capsys):
    results = detections()
    assert results.display(pprint=True, save=True, render=True, save_dir=tmp_path / "all") is None
    assert "2 persons" in capsys.readouterr().out and (tmp_path / "all" / "bus.jpg").is_file()
    assert results.imgs[0][80, 40].tolist() == [0xFF, 0x38, 0x38]
    crops = results.display(crop=True, save=True, save_dir=tmp_path / "all")
    assert len(crops) == 3 and (tmp_path / "all/crops/tie/bus.jpg").is_file()


def test_show_says_when_there_is_no_display(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="no display"):
        detections().show()


def test_names_may_be_a_list_and_lack_some():
    results = detections(names=["person"])
    assert "2 persons, 1 2\n" in str(results)


def test_pandas_is_loaded_for_tables_only(monkeypatch, tmp_path):
    real = builtins.__import__

    def guarded(name, *arguments):
        assert name.split(".")[0] != "pandas"
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", guarded)
    results = detections()
    results.save(tmp_path)
    results.render()
    results.print()
