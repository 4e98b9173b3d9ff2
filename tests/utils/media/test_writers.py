"""What a run of detection writes: names, contents, and nothing of one input in another's files."""

import csv
import errno
import json
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.boxes import Detections
from utils.errors import UserError
from utils.media import writers
from utils.media.counting import Counts, Tally
from utils.media.sources import Frame, read_frames
from utils.media.writers import OutputOptions, OutputStems, ResultWriter, folder_names
from utils.plots.boxes import draw_detections

ROOT = Path(__file__).resolve().parents[3]
NAMES = {0: "cat", 1: "a/b"}
FOUND = Detections.from_rows(
    np.array([[10, 20, 50, 60, 0.9, 0], [0, 0, 100, 50, 0.5, 1], [20, 20, 40, 40, 0.25, 0]], np.float32)
)
NOTHING, MANY = FOUND[:0], FOUND[np.zeros(40, int)]
TRACKED = replace(FOUND, track_ids=np.array([7, -1, 1234567]))
LINE = ((0.0, 50.0), (100.0, 50.0))


def frame(path: str = "/in/photo.jpg", **fields) -> Frame:
    return Frame(path, 1, 1, np.full((100, 100, 3), 60, np.uint8), **fields)


def write(folder: Path, results: list[tuple[Frame, Detections]], **options) -> ResultWriter:
    paths = list(dict.fromkeys(frame.path for frame, _ in results))
    with ResultWriter(folder, paths, NAMES, OutputOptions(**options)) as writer:
        for one, detections in results:
            writer.write(one, detections)
    return writer


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_label_lines_are_normalised_and_least_confident_first(tmp_path):
    writer = write(tmp_path, [(frame(), FOUND)], save_txt=True, nosave=True)
    assert (tmp_path / "labels/photo.txt").read_text() == "0 0.3 0.3 0.2 0.2\n1 0.5 0.25 1 0.5\n0 0.3 0.4 0.4 0.4\n"
    assert writer.labels_written == 1
    write(tmp_path, [(frame(), FOUND[:1])], save_txt=True, save_conf=True, nosave=True)
    assert (tmp_path / "labels/photo.txt").read_text() == "0 0.3 0.4 0.4 0.4 0.9\n"


def test_json_is_cocos_with_the_names_of_label_files(tmp_path):
    results = [(frame("/in/12.jpg"), FOUND), (frame("/in/none.jpg"), NOTHING), (frame("/in/a.avi", number=3), TRACKED)]
    write(tmp_path, results, save_json=True, nosave=True)
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [12] * 3 + ["a_3"] * 3
    assert rows[0] == {"image_id": 12, "category_id": 0, "bbox": [10, 20, 40, 40], "score": 0.9}
    assert [row.get("track_id") for row in rows] == [None] * 3 + [7, -1, 1234567]
    write(tmp_path, [(frame(), NOTHING)], save_json=True, nosave=True)
    assert json.loads((tmp_path / "predictions.json").read_text()) == []


def test_json_is_whole_after_every_image(tmp_path):
    counts = []
    with ResultWriter(tmp_path, ["/in/photo.jpg"], NAMES, OutputOptions(save_json=True, nosave=True)) as writer:
        for detections in (NOTHING, FOUND, NOTHING, FOUND):
            writer.write(frame(), detections)
            counts.append(len(json.loads((tmp_path / "predictions.json").read_text())))
    assert counts == [0, 3, 3, 6]


def test_second_run_into_the_folder_replaces_and_never_appends(tmp_path):
    everything = {"save_txt": True, "save_csv": True, "save_crop": True}
    write(tmp_path, [(frame(), FOUND)], **everything)
    first = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    write(tmp_path, [(frame(), FOUND)], **everything)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == first
    write(tmp_path, [(frame(), NOTHING)], save_txt=True)
    assert not (tmp_path / "labels/photo.txt").exists()


def test_image_without_detections_is_saved_unchanged_and_has_no_label_file(tmp_path):
    write(tmp_path, [(frame("/in/photo.png"), NOTHING)], save_txt=True, save_crop=True)
    assert files(tmp_path) == ["photo.png"]
    assert (cv2.imread(str(tmp_path / "photo.png")) == 60).all()


def test_crops_lie_in_folders_of_safe_names_numbered_and_without_drawing(tmp_path):
    write(tmp_path, [(frame(), FOUND)], save_crop=True)
    assert files(tmp_path) == ["crops/a_b/photo.jpg", "crops/cat/photo.jpg", "crops/cat/photo2.jpg", "photo.jpg"]
    crop = cv2.imread(str(tmp_path / "crops/cat/photo2.jpg"))  # the more confident: 40 * 1.02 + 10 = 50.8 a side
    assert crop.shape[0] in (50, 51)
    assert np.abs(crop.astype(int) - 60).max() <= 2


def test_csv_has_yolov5_s_columns_a_row_for_each_detection_and_a_video_s_frames(tmp_path):
    write(tmp_path, [(frame(), FOUND), (frame("/in/other.jpg"), NOTHING)], save_csv=True, nosave=True)
    assert (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines() == [
        "Image Name,Prediction,Confidence", "photo.jpg,cat,0.2500", "photo.jpg,a/b,0.5000", "photo.jpg,cat,0.9000",
    ]  # fmt: skip
    results = [(frame(), FOUND[:1]), *[(one, FOUND[:1]) for one, _ in video_frames("/in/a.avi", 2)]]
    write(tmp_path, results, save_csv=True, nosave=True)
    assert (tmp_path / "predictions.csv").read_text().splitlines() == [
        "Image Name,Prediction,Confidence,Frame", "photo.jpg,cat,0.9000,", "a.avi,cat,0.9000,1", "a.avi,cat,0.9000,2",
    ]  # fmt: skip


def test_equal_stems_get_numbers_and_the_first_keeps_its_name():
    paths = ["/a/bus.jpg", "/b/bus.jpg", "/b/bus.png", "/c/BUS.jpg", "/c/bus-2.jpg", "/d/only.jpg"]
    assert list(OutputStems(paths).values()) == ["bus", "bus-3", "bus-4", "BUS-5", "bus-2", "only"]


def test_video_gives_way_to_images_named_like_its_frames():
    assert OutputStems(["/a/clip_3.jpg", "/a/clip.mp4"]) == {"/a/clip_3.jpg": "clip_3", "/a/clip.mp4": "clip-2"}


def test_equal_names_of_different_folders_are_all_written(tmp_path):
    results = [(frame("/a/bus.jpg"), FOUND), (frame("/b/bus.jpg"), FOUND[:1])]
    write(tmp_path, results, save_txt=True, save_crop=True)
    assert files(tmp_path) == [
        "bus-2.jpg", "bus.jpg", "crops/a_b/bus.jpg", "crops/cat/bus-2.jpg", "crops/cat/bus.jpg", "crops/cat/bus2.jpg",
        "labels/bus-2.txt", "labels/bus.txt",
    ]  # fmt: skip


def test_no_two_inputs_write_crops_of_one_name(tmp_path):
    """The third of `bus1` would be the first of `bus13`, and the 12th of `bus` the first of `bus12`."""
    paths = ["/a/bus.jpg", "/a/bus1.jpg", "/a/BUS12.jpg", "/a/bus13.jpg", "/a/bus02.jpg"]
    write(tmp_path, [(frame(path), MANY) for path in paths], save_crop=True)
    assert len({name.casefold() for name in files(tmp_path / "crops/cat")}) == 40 * len(paths)


def test_class_folders_are_safe_and_distinct_on_every_system():
    names = {0: "a/b", 1: "a\\b", 2: "..", 3: "CON", 4: "汽车", 5: "", 6: "person.", 7: "Person"}
    folders = folder_names(names)
    assert folders[0] == "a_b"
    assert folders[4] == "汽车"
    assert len({folder.casefold() for folder in folders.values()}) == len(names)
    for folder in folders.values():
        assert folder.strip(" .") == folder != ""
        assert not set(folder) & set('<>:"/\\|?*')
        assert folder.casefold() != "con"


def test_format_that_opencv_cannot_write_becomes_jpg(tmp_path):
    write(tmp_path, [(frame("/in/photo.mpo"), NOTHING), (frame("/in/PHOTO2.TIF"), NOTHING)])
    assert files(tmp_path) == ["PHOTO2.TIF", "photo.jpg"]


def video_frames(path: str, count: int, step: int = 1) -> list[tuple[Frame, Detections]]:
    numbers = range(1, count + 1, step)
    return [(frame(path, number=n, count=count, fps=12.5, time=(n - 1) / 12.5), FOUND) for n in numbers]


def times(path: Path) -> list[float]:
    return [one.time for one in read_frames([str(path)])]


def seconds(path: Path) -> float:
    video = cv2.VideoCapture(str(path))
    return video.get(cv2.CAP_PROP_FRAME_COUNT) / video.get(cv2.CAP_PROP_FPS)


def test_videos_become_mp4_files_that_play_at_the_source_s_rate(tmp_path):
    write(tmp_path, [*video_frames("/in/a.avi", 5), *video_frames("/in/b.mov", 3)], save_txt=True)
    for name, count in (("a.mp4", 5), ("b.mp4", 3)):
        played = list(read_frames([str(tmp_path / name)]))
        assert len(played) == count
        assert played[0].fps == 12.5
        assert played[0].image.shape == (100, 100, 3)
    assert len(files(tmp_path / "labels")) == 8
    assert "a_5.txt" in files(tmp_path / "labels")


def test_video_read_with_a_stride_lasts_as_long_as_its_source(tmp_path):
    write(tmp_path, video_frames("/in/a.avi", 20, step=5), vid_stride=5)
    assert times(tmp_path / "a.mp4") == pytest.approx([0, 0.4, 0.8, 1.2])
    assert seconds(tmp_path / "a.mp4") == pytest.approx(1.6)


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "labels").write_text("a file where the folder must be")
    with pytest.raises(UserError, match="labels: cannot be written"):
        write(tmp_path, [(frame(), FOUND)], save_txt=True)
    with pytest.raises(UserError, match=r"photo\.jpg: cannot be written \(No such file"):
        write(tmp_path / "gone", [(frame(), FOUND)])


def test_what_cannot_be_written_of_one_file_is_told_once_and_the_others_go_on(tmp_path, caplog):
    for name in ("photo.jpg", "clip.mp4"):
        (tmp_path / name).mkdir()
    results = [(frame(), FOUND), *video_frames("/in/clip.avi", 3), (frame("/in/other.jpg"), FOUND)]
    writer = write(tmp_path, results)
    assert (tmp_path / "other.jpg").is_file()
    photo, clip = writer.failed.values()
    assert photo == f"image 1/1 /in/photo.jpg: {tmp_path / 'photo.jpg'}: cannot be written (Is a directory)."
    assert clip.startswith(f"video 1/1 (1/3) /in/clip.avi: {tmp_path / 'clip.mp4'}: OpenCV cannot write an mp4 video")
    assert caplog.text.count("The others go on.") == 2
    live = [(replace(one, live=True), found) for one, found in video_frames("/in/clip.avi", 1)]
    with pytest.raises(UserError, match="OpenCV cannot write"):
        write(tmp_path, live)


def test_full_disk_ends_the_run_at_the_first_file(tmp_path, monkeypatch):
    def full(path: Path, _image: np.ndarray) -> None:
        raise UserError(f"{path}: full") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers, "save_image", full)
    with pytest.raises(UserError, match=r"photo\.jpg: full"):
        write(tmp_path, [(frame(), FOUND)])


def test_names_that_leave_no_room_for_what_is_derived_from_them_are_cut_and_stay_apart(tmp_path):
    folder, long = tmp_path / "out", "あ" * 82  # 246 bytes
    folder.mkdir()
    paths = [f"/in/{long}{end}.{kind}" for end, kind in (("1", "jpg"), ("2", "jpg"), ("2", "png"), ("3", "avi"))]
    numbers = {path: 123456 if path.endswith("avi") else 0 for path in paths}
    results = [(frame(path, number=numbers[path], fps=25.0), MANY[:12]) for path in paths]
    write(folder, results, save_txt=True, save_crop=True, segment=0.1)
    names = files(folder)
    assert len(names) == len(paths) * (1 + 1 + 12)
    assert all(len(Path(name).name.encode()) <= 255 for name in names)
    assert OutputStems(["/in/" + "a" * 220 + ".jpg"])["/in/" + "a" * 220 + ".jpg"] == "a" * 220


def test_crops_of_a_stream_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "save_image", lambda path, _image: names.append(path.name))
    names, many = [], FOUND[np.zeros(100, int)]
    with ResultWriter(tmp_path, ["hall"], NAMES, OutputOptions(save_crop=True, nosave=True)) as writer:
        writer.write(frame("hall", number=1, live=True), many)
        names.clear()
        tracemalloc.start()
        for number in range(2, 6):
            writer.write(frame("hall", number=number, live=True), many)
            names.clear()
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert kept < 400 * 5
        for number in range(20):
            writer.write(frame("hall", number=number, live=True), FOUND[:1])
        assert names[-1] == "hall520.jpg"


def test_crops_of_files_are_not_remembered_beyond_their_file(tmp_path):
    paths = [f"/in/{number}.jpg" for number in range(5)]
    with ResultWriter(tmp_path, paths, NAMES, OutputOptions(save_crop=True, nosave=True)) as writer:
        for path in paths:
            writer.write(frame(path), FOUND)
        assert len(writer._crop_numbers) == 2


def test_feature_maps_are_written_for_each_image_and_frame(tmp_path):
    maps = np.random.default_rng(0).normal(size=(1, 16, 8, 8)).astype(np.float32)
    with ResultWriter(tmp_path, ["/in/photo.jpg", "/in/a.avi"], NAMES, OutputOptions()) as writer:
        writer.write_features(frame(), 3, "C3", maps)
        writer.write_features(frame("/in/a.avi", number=7), 3, "C3", maps)
    assert files(tmp_path) == [
        "a_7/stage3_C3_features.npy", "a_7/stage3_C3_features.png",
        "photo/stage3_C3_features.npy", "photo/stage3_C3_features.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.load(tmp_path / "photo/stage3_C3_features.npy"), maps)


def test_tracks_are_the_last_column_of_label_lines_and_of_the_table(tmp_path):
    results = [(frame("/in/a.mp4", number=3, fps=25.0), TRACKED)]
    write(tmp_path, results, save_txt=True, save_conf=True, save_csv=True, track=True, nosave=True)
    lines = (tmp_path / "labels/a_3.txt").read_text().splitlines()
    assert lines == ["0 0.3 0.3 0.2 0.2 0.25 1234567", "1 0.5 0.25 1 0.5 0.5 -1", "0 0.3 0.4 0.4 0.4 0.9 7"]
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Image Name", "Prediction", "Confidence", "Track", "Frame"]
    assert [(row["Prediction"], int(row["Track"])) for row in rows] == [("cat", 1234567), ("a/b", -1), ("cat", 7)]
    write(tmp_path, results, save_txt=True, nosave=True)
    assert (tmp_path / "labels/a_3.txt").read_text().splitlines()[2] == "0 0.3 0.4 0.4 0.4 7"


def live_frames(count: int, height: int = 100, first: int = 1) -> list[tuple[Frame, Detections]]:
    """Two cameras by turns; each image's brightness tells the camera and the frame."""
    results = []
    for number in range(first, first + count):
        for camera, fps in (("hall", 12.5), ("rtsp_gate_1", 30.0)):
            one = frame(camera, number=number, fps=fps, live=True, time=1e6 + number / fps)
            one.image = np.full((height, 100, 3), 20 * number + 100 * (camera == "hall"), np.uint8)
            results.append((one, NOTHING))
    return results


def brightness(path: Path) -> list[int]:
    return [round(float(np.median(one.image)) / 10) * 10 for one in read_frames([str(path)])]


def test_live_inputs_are_written_side_by_side_at_their_own_rates(tmp_path):
    write(tmp_path, [(one, FOUND) for one, _ in live_frames(2)], save_txt=True, nosave=True)
    assert files(tmp_path / "labels") == ["hall_1.txt", "hall_2.txt", "rtsp_gate_1_1.txt", "rtsp_gate_1_2.txt"]
    write(tmp_path, live_frames(4))
    assert files(tmp_path)[:1] + files(tmp_path)[-1:] == ["hall.mp4", "rtsp_gate_1.mp4"]
    assert brightness(tmp_path / "hall.mp4") == [120, 140, 160, 180]
    assert brightness(tmp_path / "rtsp_gate_1.mp4") == [20, 40, 60, 80]
    assert next(read_frames([str(tmp_path / "hall.mp4")])).fps == 12.5
    assert next(read_frames([str(tmp_path / "rtsp_gate_1.mp4")])).fps == 30


@pytest.mark.parametrize("ending", [KeyboardInterrupt, UserError])
def test_all_videos_play_after_an_interruption(tmp_path, ending):
    with pytest.raises(ending), ResultWriter(tmp_path, ["hall", "rtsp_gate_1"], NAMES, OutputOptions()) as writer:
        for one, detections in live_frames(3):
            writer.write(one, detections, [Counts(LINE, ())])
        raise ending
    assert brightness(tmp_path / "hall.mp4") == [120, 140, 160]
    assert brightness(tmp_path / "rtsp_gate_1.mp4") == [20, 40, 60]
    assert (tmp_path / "counts.csv").is_file()


def test_one_video_that_cannot_be_ended_leaves_the_others_whole(tmp_path):
    writer = ResultWriter(tmp_path, ["hall", "rtsp_gate_1"], NAMES, OutputOptions(save_csv=True))
    with pytest.raises(UserError, match=r"rtsp_gate_1\.mp4: the video could not be written"), writer:
        for one, detections in live_frames(3):
            writer.write(one, detections)
        (tmp_path / "rtsp_gate_1.mp4").unlink()
    assert brightness(tmp_path / "hall.mp4") == [120, 140, 160]
    assert writer._table_file.closed


def test_stream_whose_images_change_their_size_goes_on(tmp_path):
    write(tmp_path, live_frames(2) + live_frames(2, height=60, first=3))
    assert [one.image.shape for one in read_frames([str(tmp_path / "hall.mp4")])] == [(100, 100, 3)] * 4


def camera(*times_s: float) -> list[tuple[Frame, Detections]]:
    """A camera that declares 25 frames a second and gives them at these times; brightness tells them apart."""
    frames = [frame("hall", number=n, fps=25.0, live=True, time=5e5 + at) for n, at in enumerate(times_s, start=1)]
    for one in frames:
        one.image[:] = 20 * one.number
    return [(one, NOTHING) for one in frames]


def test_recording_of_a_live_input_lasts_as_long_as_what_it_shows(tmp_path):
    at = [0, 0.2, 0.45, 0.5, 4.5, 4.52]  # a slow model, and an outage
    write(tmp_path, camera(*at))
    assert times(tmp_path / "hall.mp4") == pytest.approx(at, abs=1e-3)
    assert brightness(tmp_path / "hall.mp4") == [20, 40, 60, 80, 100, 120]
    assert seconds(tmp_path / "hall.mp4") == pytest.approx(4.56, abs=1e-3)


def test_recording_is_cut_into_pieces_that_join_without_a_gap(tmp_path):
    results = camera(0, 2, 5, 6.5, 7, 30) + [(frame("hall_part2", number=1, fps=25.0, live=True), NOTHING)]
    write(tmp_path, results, segment=0.1)
    assert files(tmp_path) == ["hall.mp4", "hall_part2.mp4", "hall_part3.mp4", "hall_part4.mp4"]
    pieces = [tmp_path / f"hall{part}.mp4" for part in ("", "_part3", "_part4")]  # the second name is another input's
    assert [brightness(piece) for piece in pieces] == [[20, 40, 60], [80, 100], [120]]
    assert [times(piece) for piece in pieces] == [[0, 2, 5], [0, 0.5], [0]]
    assert [seconds(piece) for piece in pieces] == pytest.approx([6, 6, 0.04])


@pytest.mark.parametrize(
    ("live", "segment", "pieces"), [(True, None, 3), (False, None, 1), (False, 5.0, 3), (True, 30.0, 1)]
)
def test_live_inputs_are_recorded_in_pieces_of_five_minutes_and_files_whole(tmp_path, live, segment, pieces):
    results = [(frame("hall.avi", number=n, fps=25.0, live=live, time=100.0 * n), NOTHING) for n in range(1, 8)]
    write(tmp_path, results, segment=segment)
    assert len(files(tmp_path)) == pieces
    assert sum(len(times(tmp_path / name)) for name in files(tmp_path)) == 7


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from utils.boxes import Detections
from utils.media.counting import Counts, Tally
from utils.media.writers import OutputOptions, ResultWriter
from utils.media.sources import Frame

with ResultWriter(Path(sys.argv[1]), ["hall"], {0: "cat"}, OutputOptions(save_csv=True)) as writer:
    for n in range(1, 41):
        image = np.full((48, 64, 3), n, np.uint8)
        one = Frame("hall", 1, 1, image, number=n, fps=25.0, live=True, time=10.0 * n)
        found = Detections.from_rows(np.array([[1, 1, 9, 9, 0.9, 0]]))
        writer.write(one, found, [Counts(((0.0, 5.0), (9.0, 5.0)), (Tally(0, n, 0),))])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_run_that_is_killed_keeps_its_tables_and_all_but_the_last_piece_of_its_video(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 40
    assert (tmp_path / "counts.csv").read_text().splitlines()[0] == "Input,Class,In,Out"
    assert len(times(tmp_path / "hall.mp4")) == 30 and seconds(tmp_path / "hall.mp4") == pytest.approx(300)


def test_odd_sides_lose_no_row_and_no_column(tmp_path):
    for width, height in ((63, 47), (1, 1)):
        image = np.full((height, width, 3), 200, np.uint8)
        image[np.arange(height) // 8 % 2 == 1] = 50
        image[:, -1] = 120
        video = writers.Recording(iter([tmp_path / "odd.mp4"]), 25.0)
        video.write(image, 0.0)
        video.close()
        (played,) = read_frames([str(tmp_path / "odd.mp4")])
        assert played.image.shape == (height + 1, width + 1, 3)
        assert np.abs(played.image[:height, :width].astype(int) - image).mean() < 8


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_full_disk_is_told_when_a_video_is_closed(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.mp4: the video could not be written: it breaks off.*Is the disk full"):
            write(tmp_path, [(replace(one, image=noise.copy()), NOTHING) for one, _ in video_frames("/in/a.avi", 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_video_file_is_ended_when_the_next_begins(tmp_path):
    with ResultWriter(tmp_path, ["/in/a.avi", "/in/b.avi"], NAMES, OutputOptions()) as writer:
        for one, detections in [*video_frames("/in/a.avi", 3), *video_frames("/in/b.avi", 1)]:
            writer.write(one, detections)
        assert len(list(read_frames([str(tmp_path / "a.mp4")]))) == 3


def test_video_that_is_not_whole_when_the_next_begins_is_named_itself(tmp_path):
    writer = ResultWriter(tmp_path, ["/in/a.avi", "/in/b.avi"], NAMES, OutputOptions())
    (one, _), (other, _) = *video_frames("/in/a.avi", 1), *video_frames("/in/b.avi", 1)
    with pytest.raises(UserError, match=r"a\.mp4: the video could not be written"), writer:
        writer.write(one, FOUND)
        (tmp_path / "a.mp4").unlink()
        (tmp_path / "a.mp4").mkdir()
        writer.write(other, FOUND)
    assert not writer.failed


def test_what_was_counted_last_is_in_a_table(tmp_path):
    early, late = [Counts(LINE, (Tally(0, 1, 0),))], [Counts(LINE, (Tally(0, 2, 1), Tally(1, 0, 3)))]
    with ResultWriter(tmp_path, ["/in/a.avi", "hall"], NAMES, OutputOptions(nosave=True)) as writer:
        for number, counts in enumerate((early, late), start=1):
            writer.write(frame("/in/a.avi", number=number), NOTHING, counts)
        writer.write(frame("hall", number=1, live=True), NOTHING, early)
    assert (tmp_path / "counts.csv").read_text().splitlines() == [
        "Input,Class,In,Out", "a.avi,cat,2,1", "a.avi,a/b,0,3", "hall,cat,1,0",
    ]  # fmt: skip
    zone = Counts((*LINE, (50.0, 90.0)), (Tally(1, 4, 1, 6.0, 2.5),))
    with ResultWriter(tmp_path, ["/in/a.avi"], NAMES, OutputOptions(nosave=True)) as writer:
        writer.write(frame("/in/a.avi", number=1), NOTHING, [zone])
    assert (tmp_path / "counts.csv").read_text().splitlines() == [
        "Input,Class,Inside so far,Inside now,Mean stay s,Longest stay s",
        "a.avi,a/b,4,1,1.5,2.5",
    ]
    with ResultWriter(tmp_path, ["/in/a.avi"], NAMES, OutputOptions(nosave=True)) as writer:
        gate = Counts(LINE, (Tally(0, 2, 1),), "gate")
        writer.write(frame("/in/a.avi", number=1), NOTHING, [gate, zone._replace(name="hall")])
    assert (tmp_path / "counts.csv").read_text().splitlines() == [
        "Input,Counted,Class,In,Out,Inside so far,Inside now,Mean stay s,Longest stay s",
        "a.avi,gate,cat,2,1,,,,",
        "a.avi,hall,a/b,,,4,1,1.5,2.5",
    ]


def test_tables_are_on_the_disk_while_the_run_goes_on(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    options = OutputOptions(nosave=True, save_csv=True)
    with ResultWriter(tmp_path, ["hall"], NAMES, options) as writer:
        for number, now[0] in enumerate((100.0, 100.5, 101.1, 101.5), start=1):
            writer.write(frame("hall", number=number, live=True), FOUND[:1], [Counts(LINE, (Tally(0, number, 0),))])
            assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + number
            assert (tmp_path / "counts.csv").read_text().splitlines()[1] == f"hall,cat,{1 if number < 3 else 3},0"
    assert (tmp_path / "counts.csv").read_text().splitlines()[1] == "hall,cat,4,0"
    assert files(tmp_path) == ["counts.csv", "predictions.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_table_on_a_full_disk_is_told_in_words(tmp_path):
    for close in (False, True):
        writer = ResultWriter(tmp_path, ["hall"], NAMES, OutputOptions(nosave=True, save_csv=True))
        with pytest.raises(UserError, match=rf"{tmp_path}.*cannot be written \(No space left on device\)"), writer:
            writer._table_file.close()
            writer._table_file = open("/dev/full", "w")
            writer._table = csv.writer(writer._table_file)
            if close:
                writer._table.writerow(("hall",))
            else:
                writer.write(frame("hall", number=1, live=True), FOUND)


def test_table_of_counts_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "counts.csv").mkdir()
    writer = ResultWriter(tmp_path, ["/in/a.avi"], NAMES, OutputOptions())
    with pytest.raises(UserError, match=r"counts\.csv: cannot be written"), writer:
        writer.write(frame("/in/a.avi", number=1, fps=25.0), NOTHING, [Counts(LINE, ())])
    assert len(list(read_frames([str(tmp_path / "a.mp4")]))) == 1


def test_image_to_show_is_the_one_that_is_saved_and_leaves_the_frame_alone(tmp_path):
    one, counts = frame("/in/photo.png"), [Counts(LINE, (Tally(0, 2, 1),))]
    with ResultWriter(tmp_path, ["/in/photo.png"], NAMES, OutputOptions()) as writer:
        shown = writer.drawn(one, TRACKED, counts)
        assert (one.image == 60).all()
        writer.write(one, TRACKED, counts)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "photo.png")), shown)


def test_at_the_models_scale_images_are_shrunk_and_then_drawn_on_and_labels_stay_as_they_are(tmp_path):
    counts = [Counts(LINE, (Tally(0, 1, 2),))]
    options = OutputOptions(save_scale=True, save_txt=True)
    with ResultWriter(tmp_path, ["/in/large.png", "/in/small.png"], NAMES, options, (50, 80)) as writer:
        writer.write(frame("/in/large.png"), FOUND[:1], counts)
        writer.write(replace(frame("/in/small.png"), image=np.full((20, 30, 3), 60, np.uint8)), NOTHING)
    assert (tmp_path / "labels/large.txt").read_text() == "0 0.3 0.4 0.4 0.4\n"
    large, small = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("large", "small"))
    expected = cv2.resize(frame().image, (50, 50))
    half = replace(FOUND[:1], boxes_xyxy=FOUND.boxes_xyxy[:1] / 2)
    draw_detections(expected, half, NAMES, None, counts=[counts[0]._replace(points_xy=((0.0, 25.0), (50.0, 25.0)))])
    assert np.array_equal(large, expected)
    assert small.shape == (20, 30, 3)
