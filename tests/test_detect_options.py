"""detect.py's ways of looking and of handing over: tiles, ensembles, augmentation, tracks, counts, windows, Python."""

import csv
import logging

import cv2
import numpy as np
import pytest

import detect
from models.inference.predictor import Predictor
from utils.cli import ReportedError
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def random_image(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def labels_of(folder, name: str) -> np.ndarray:
    return np.loadtxt(folder / "labels" / f"{name}.txt", ndmin=2)


def frames_of(folder, name: str, count: int) -> list[np.ndarray]:
    return [labels_of(folder, f"{name}_{number}") for number in range(1, count + 1)]


@pytest.fixture
def common(weights, tmp_path) -> dict:
    """Options of a quick run on one image."""
    cv2.imwrite(str(tmp_path / "b.png"), random_image(1))
    options = {"weights": str(weights), "source": str(tmp_path / "b.png"), "project": str(tmp_path / "runs")}
    return options | {"imgsz": [64], "device": "cpu", "save_txt": True, "save_conf": True, "nosave": True}


@pytest.fixture
def street(golden_dir, datasets_dir, tmp_path):
    """A video of a real image that glides to the left by 12 px a frame, with options of a run on it."""
    image = cv2.imread(str(datasets_dir / "coco128" / "images" / "train2017" / "000000000036.jpg"))
    assert image is not None
    height, width = image.shape[:2]
    writer = cv2.VideoWriter(str(tmp_path / "street.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (width, height))
    for index in range(16):
        writer.write(np.roll(image, -12 * index, axis=1))
    writer.release()
    options = {"weights": str(golden_dir / "yolov5n-v6-coco.pt"), "source": str(tmp_path / "street.mp4")}
    options |= {"project": str(tmp_path / "runs"), "imgsz": [320], "device": "cpu", "classes": [0]}
    return options, (height, width)


def test_small_objects_that_the_plain_run_misses_are_found_in_tiles(golden_dir, tmp_path):
    """A wall of 6 x 6 golden images, each of which the plain run sees at a sixth of its side."""
    small = cv2.resize(cv2.imread(str(golden_dir / "images" / "bus.jpg")), (320, 320), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tmp_path / "wall.png"), np.tile(small, (6, 6, 1)))
    found = {}
    for name, options in {"plain": {}, "tiled": {"tile": 320, "tile_overlap": 0.0}}.items():
        detect.run(
            weights=str(golden_dir / "yolov5n-v6-coco.pt"), source=str(tmp_path / "wall.png"), device="cpu", name=name,
            imgsz=[320], project=str(tmp_path / "runs"), save_txt=True, nosave=True, **options,
        )  # fmt: skip
        rows = labels_of(tmp_path / "runs" / name, "wall")
        found[name] = rows[rows[:, 0] == 5]  # buses
    assert len(found["tiled"]) == 36 > 2 * len(found["plain"])
    cells = np.floor(found["tiled"][:, 1:3] * 6).astype(int)
    assert {tuple(cell) for cell in cells.tolist()} == {(x, y) for x in range(6) for y in range(6)}


def test_augmentation_looks_at_more_and_exports_refuse_it(common, tmp_path):
    for name, augment in (("plain", False), ("augmented", True)):
        detect.run(**common, name=name, augment=augment, conf_thres=0.01)
    plain, augmented = (labels_of(tmp_path / "runs" / name, "b") for name in ("plain", "augmented"))
    assert not np.array_equal(plain, augmented)


def test_an_ensemble_finds_what_its_members_find(common, more_weights, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    other = str(more_weights(tmp_path / "other.pt", {0: "cat", 1: "红绿灯"}, seed=1))
    loose = {"iou_thres": 1.0, "max_det": 10_000}  # nothing is suppressed, so that every row of a member shows
    files = {"one": [common["weights"]], "two": [other], "both": [common["weights"], other]}
    for name, members in files.items():
        detect.run(**{**common, "weights": members}, **loose, name=name)
    rows = {name: {tuple(row) for row in labels_of(tmp_path / "runs" / name, "b")} for name in files}
    assert rows["both"] == rows["one"] | rows["two"]
    assert "Ensemble created with [" in caplog.text
    stranger = str(more_weights(tmp_path / "stranger.pt", {0: "dog", 1: "fox", 2: "owl"}))
    with pytest.raises(UserError, match=r"stranger\.pt"):
        detect.run(**{**common, "weights": [common["weights"], stranger]})


def test_tracks_keep_their_numbers_in_label_files_table_and_video(street, tmp_path):
    options, (height, width) = street
    detect.run(**options, track=True, save_txt=True, save_csv=True)
    folder = tmp_path / "runs" / "exp"
    frames = frames_of(folder, "street", 16)
    ids = [set(rows[:, -1].astype(int)) - {-1} for rows in frames]
    steady = set.intersection(*ids[4:])
    assert steady, "an object that is in every frame keeps its number"
    for track in steady:  # it glides by 12 px a frame, so no number can have changed hands
        x_px = [rows[rows[:, -1] == track][0, 1] * width for rows in frames[4:]]
        assert -16 < np.diff(x_px).mean() < -8
    table = list(csv.DictReader(open(folder / "predictions.csv", encoding="utf-8")))
    assert {int(row["Track"]) for row in table} == set.union(*[set(rows[:, -1].astype(int)) for rows in frames])
    assert (folder / "street.mp4").stat().st_size > 10_000


def test_who_crosses_a_line_is_counted_once(street, tmp_path, caplog):
    caplog.set_level(logging.INFO, "yolov5")
    options, (height, width) = street
    detect.run(**options, save_txt=True, track=True, nosave=True)
    before_px = frames_of(tmp_path / "runs" / "exp", "street", 16)[0][0, 1] * width
    line_px = round(before_px) - 30  # the person glides 180 px to the left
    detect.run(**options, track=True, count=f"{line_px},0,{line_px},{height}", name="down")
    detect.run(**options, track=True, count=f"{line_px},{height},{line_px},0", name="up")
    for name, row in (("down", ["street.mp4", "person", "1", "0"]), ("up", ["street.mp4", "person", "0", "1"])):
        table = list(csv.reader(open(tmp_path / "runs" / name / "counts.csv", encoding="utf-8")))
        assert table == [["Input", "Class", "In", "Out"], row]
    assert f"Counted in {options['source']}: in 1 (1 person), out 0" in caplog.text


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"count": "0,0,10,10"}, "--count counts tracks: add --track"),
        ({"track": True}, "--track"),
        ({"tile": 64, "visualize": True}, "--visualize .* leave --tile out"),
        ({"augment": True, "visualize": True}, "--visualize .* leave --augment out"),
        ({"stream": True, "save_txt": True}, r"writes and shows nothing: leave save_txt out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(common, tmp_path, keywords, message):
    given = {key: value for key, value in common.items() if not key.startswith(("save", "nosave"))}
    if "stream" in keywords:
        del given["project"]
    with pytest.raises(UserError, match=message):
        detect.run(**given, **keywords)
    assert not (tmp_path / "runs").exists()


def test_stream_hands_results_over_as_they_come_and_writes_nothing(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.png", random_image(2, 90, 60))
    cv2.imwrite("b.png", random_image(1))
    cv2.imwrite("c.png", random_image(3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    before = sorted(tmp_path.rglob("*"))
    results = detect.run(weights=str(weights), source=str(tmp_path), imgsz=[64], device="cpu", max_det=3, stream=True)
    first = next(results)
    assert (first.path, first.image.shape) == (str(tmp_path / "a.png"), (90, 60, 3))
    assert first.boxes_xyxy.shape == (3, 4) and first.confidences.min() > 0.25 and first.track_ids is None
    assert {first.names[class_id] for class_id in first.classes} <= {"cat", "红绿灯"}
    assert next(results).path == str(tmp_path / "b.png")
    assert next(results).path == str(tmp_path / "c.png")
    with pytest.raises(ReportedError, match=r"1 damaged input was skipped(.|\n)*cut\.png"):
        next(results)
    assert sorted(tmp_path.rglob("*")) == before


class FakeWindow:
    """Notes what is shown; the user presses q at the second image."""

    shown: list = []
    closed = False

    def show(self, title, image):
        self.shown.append((title, image.copy()))
        return len(self.shown) < 2

    def close(self):
        type(self).closed = True


def test_window_shows_what_is_written_until_q_is_pressed(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.media.display.display_problem", lambda: "")
    monkeypatch.setattr("utils.media.display.Window", FakeWindow)
    monkeypatch.setattr(FakeWindow, "shown", [])
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), random_image(index))
    options = {"weights": str(weights), "source": str(tmp_path), "project": str(tmp_path / "runs"), "imgsz": [64]}
    detect.run(**options, max_det=3, view_img=True, device="cpu")
    assert FakeWindow.closed
    for index, (title, image) in enumerate(FakeWindow.shown):
        assert title == "detect.py"  # one window for all files
        assert (image != random_image(index)).any()
        np.testing.assert_array_equal(image, cv2.imread(str(tmp_path / "runs" / "exp" / f"{index}.png")))
    assert sorted(path.name for path in (tmp_path / "runs" / "exp").iterdir()) == ["0.png", "1.png"]


def test_without_a_display_the_run_says_so_and_goes_on(common, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("utils.media.display.display_problem", lambda: "there is no display")
    detect.run(**common, view_img=True)
    assert "WARNING: --view-img: there is no display; going on without a window" in caplog.text
    assert (tmp_path / "runs" / "exp" / "labels" / "b.txt").exists()


def test_batches_and_the_models_scale_change_images_alone(common, tmp_path, monkeypatch):
    """Five images, three at a time, of which the large ones are written as the model sees them."""
    folder, batches = tmp_path / "photos", []
    folder.mkdir()
    for number, (height, width) in enumerate([(96, 128), (48, 64), (96, 128), (40, 40), (96, 128)]):
        cv2.imwrite(str(folder / f"{number}.png"), random_image(number, height, width))
    predict = Predictor.__call__
    monkeypatch.setattr(
        Predictor, "__call__", lambda own, images, **how: batches.append(len(images)) or predict(own, images, **how)
    )
    common |= {"source": str(folder), "nosave": False}
    for name, options in (("plain", {}), ("other", {"batch_size": 3, "save_scale": True})):
        detect.run(**common, name=name, **options)
    assert batches == [1] * 5 + [3, 2]
    plain, other = (tmp_path / "runs" / name for name in ("plain", "other"))
    for number in range(5):
        np.testing.assert_allclose(labels_of(plain, str(number)), labels_of(other, str(number)), atol=0.02)
    full, small = ([cv2.imread(str(run / f"{number}.png")).shape[:2] for number in range(5)] for run in (plain, other))
    assert full == [(96, 128), (48, 64), (96, 128), (40, 40), (96, 128)]
    assert small == [(48, 64), (48, 64), (48, 64), (40, 40), (48, 64)]
