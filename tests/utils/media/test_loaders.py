"""YOLOv5's loaders as scripts use them: files for real, live inputs that a test plays."""

import cv2
import numpy as np
import pytest

from utils import dataloaders, datasets
from utils.errors import UserError
from utils.media.capture import Frame
from utils.media.streams import LiveSource


@pytest.fixture
def folder(tmp_path):
    cv2.imwrite(str(tmp_path / "b.png"), np.full((60, 120, 3), (10, 20, 200), np.uint8))
    video = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for level in (0, 80, 160, 240):
        video.write(np.full((48, 64, 3), level, np.uint8))
    video.release()
    return tmp_path


def test_formats_can_be_joined_as_in_yolov5_s_detect():
    assert {"jpg", "mp4"} <= set(datasets.IMG_FORMATS + datasets.VID_FORMATS)
    assert datasets.LoadImages is dataloaders.LoadImages


def test_images_come_first_and_are_letterboxed(folder):
    dataset = datasets.LoadImages(folder, img_size=64, stride=32)
    assert (len(dataset), dataset.nf, dataset.video_flag) == (2, 2, [False, True])
    path, im, im0, cap, s = next(iter(dataset))
    assert path == str(folder / "b.png") and s == f"image 1/2 {path}: " and cap is None
    assert im0.shape == (60, 120, 3) and im0[0, 0].tolist() == [10, 20, 200]
    assert im.shape == (3, 32, 64) and im.flags.c_contiguous and im[:, 16, 32].tolist() == [200, 20, 10]
    assert (dataset.mode, dataset.count, dataset.frame) == ("image", 1, 0)
    square = next(iter(datasets.LoadImages(folder / "b.png", img_size=[64, 64], auto=False)))[1]
    assert square.shape == (3, 64, 64) and square[:, 0, 0].tolist() == [114] * 3


def test_videos_come_with_their_capture(folder):
    dataset = datasets.LoadImages(str(folder / "*.mp4"), img_size=64)
    seen = []
    for path, im, im0, cap, s in dataset:
        seen.append((dataset.mode, dataset.frame, dataset.frames, s))
        assert cap.get(cv2.CAP_PROP_FPS) == 10 and cap.get(cv2.CAP_PROP_FRAME_WIDTH) == 64
        assert im0.shape == (48, 64, 3) and im.shape == (3, 64, 64) and path.endswith("a.mp4")
    assert [frame for _, frame, _, _ in seen] == [1, 2, 3, 4]
    assert seen[0] == ("video", 1, 4, f"video 1/1 (1/4) {folder / 'a.mp4'}: ")
    assert len(list(datasets.LoadImages(folder / "a.mp4", vid_stride=2))) == 2


def test_damaged_missing_and_live_ones_are_told(folder):
    (folder / "c.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image 2/3 .*c\.jpg"):
        list(datasets.LoadImages(folder))
    with pytest.raises(UserError, match="nothing here"):
        datasets.LoadImages(folder / "nothing here")
    with pytest.raises(UserError, match="LoadImages"):
        datasets.LoadStreams(str(folder / "b.png"))


@pytest.fixture
def cameras(monkeypatch):
    """Plays two cameras, or as many as are opened, of such sizes: the second skips a turn, the first has an error."""

    def play(*sizes: tuple[int, int]) -> None:
        def images(*levels: int | None) -> list[Frame]:
            frames = []
            for number, level in enumerate(levels[: len(sizes)], start=1):
                if level is not None:
                    image = np.full((*sizes[number - 1], 3), level, np.uint8)
                    image[:, 0] = 255
                    frames.append(Frame(str(number), number, 2, image if level else None, number=1, live=True))
            return frames

        turns = [images(10, 20), images(30, None), images(0, 50), images(60, None)]
        monkeypatch.setattr(LiveSource, "__init__", lambda self, inputs, *_: setattr(self, "inputs", inputs))
        monkeypatch.setattr(LiveSource, "read", lambda self: iter(turns[: 4 if len(sizes) > 1 else 1]))
        monkeypatch.setattr(LiveSource, "close", lambda self: turns.clear())
        monkeypatch.setattr(LiveSource, "report", lambda self: ["left: 1 frame dropped"])
        monkeypatch.setattr("utils.media.sources.live_inputs", list)

    return play


def test_streams_come_as_batches_in_fixed_order(cameras, tmp_path, caplog):
    cameras((48, 64), (48, 64))
    (tmp_path / "streams.txt").write_text("0\n1\n")
    dataset = datasets.LoadStreams(str(tmp_path / "streams.txt"), img_size=64)
    with caplog.at_level("INFO", "yolov5"):
        batches = list(dataset)
    assert (len(dataset), dataset.mode, dataset.count, list(dataset.read())) == (2, "stream", 2, [])
    names, images, originals, cap, s = batches[0]
    assert (names, cap, s) == (["0", "1"], None, "") and images.shape == (2, 3, 64, 64)
    assert [[int(image[5, 5, 0]) for image in batch[2]] for batch in batches] == [[10, 20], [30, 50]]
    assert caplog.messages == ["left: 1 frame dropped"]


def test_streams_of_different_shapes_are_padded_to_squares(cameras):
    cameras((32, 64), (64, 32))
    assert next(iter(datasets.LoadStreams(["0", "1"], img_size=64)))[1].shape == (2, 3, 64, 64)


def test_webcam_is_mirrored_and_the_screen_is_not(cameras):
    cameras((48, 64))
    ((path, im, im0, cap, s),) = datasets.LoadWebcam("0", img_size=64)
    assert (path, cap, s) == ("webcam.jpg", None, "webcam 1: ") and im.shape == (3, 64, 64)
    assert im0[0, -1, 0] == 255 and im0[0, 0, 0] == 10
    cameras((48, 64))
    ((path, im, im0, *_),) = dataloaders.LoadScreenshots("screen", img_size=64)
    assert path == "screen" and im0[0, 0, 0] == 255 and im.shape == (3, 64, 64)
