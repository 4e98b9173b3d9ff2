"""What to detect in, by YOLOv5's loaders: files for real, live inputs from a source of the test's own."""

import cv2
import numpy as np
import pytest

from utils import dataloaders, datasets
from utils.errors import UserError
from utils.media import loaders
from utils.media.sources import Frame


@pytest.fixture
def folder(tmp_path):
    cv2.imwrite(str(tmp_path / "b.png"), np.full((60, 120, 3), (10, 20, 200), np.uint8))
    video = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for level in (0, 80, 160, 240):
        video.write(np.full((48, 64, 3), level, np.uint8))
    video.release()
    return tmp_path


def test_formats_are_lists():
    assert isinstance(datasets.IMG_FORMATS, list) and "jpg" in datasets.IMG_FORMATS and "mp4" in datasets.VID_FORMATS
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


def test_damaged_and_missing_files_are_told(folder):
    (folder / "c.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image 2/3 .*c\.jpg"):
        list(datasets.LoadImages(folder))
    with pytest.raises(UserError, match="nothing here"):
        datasets.LoadImages(folder / "nothing here")


class TwoCameras:
    """A live source: the second camera skips a turn, the first one has a damaged frame."""

    live = True
    inputs = ["left", "right"]

    def __init__(self, sizes=((48, 64), (48, 64))):
        self.sizes, self.closed = sizes, False

    def __iter__(self):
        yield [self.frame(0, 10), self.frame(1, 20)]
        yield [self.frame(0, 30)]
        yield [Frame("left", 1, 2, None, "cannot be decoded", 3, live=True), self.frame(1, 50)]
        yield [self.frame(0, 60)]

    def frame(self, number, level):
        image = np.full((*self.sizes[number], 3), level, np.uint8)
        image[:, 0] = 255
        return Frame(self.inputs[number], number + 1, 2, image, number=1, live=True)

    def close(self):
        self.closed = True

    def report(self):
        return ["left: 1 frame dropped"]


def test_streams_come_as_batches_in_fixed_order(monkeypatch, caplog):
    cameras = TwoCameras()
    monkeypatch.setattr(loaders, "open_source", lambda source, vid_stride: cameras)
    dataset = datasets.LoadStreams("streams.txt", img_size=64)
    with caplog.at_level("INFO", "yolov5"):
        batches = list(dataset)
    assert (len(dataset), dataset.mode, dataset.count, cameras.closed) == (2, "stream", 2, True)
    names, images, originals, cap, s = batches[0]
    assert (names, cap, s) == (["left", "right"], None, "") and images.shape == (2, 3, 64, 64)
    assert [[int(image[5, 5, 0]) for image in batch[2]] for batch in batches] == [[10, 20], [30, 50]]
    assert caplog.messages == ["left: 1 frame dropped"]


def test_streams_of_different_shapes_are_padded_to_squares(monkeypatch):
    monkeypatch.setattr(loaders, "open_source", lambda source, vid_stride: TwoCameras(((32, 64), (64, 32))))
    images = next(iter(datasets.LoadStreams("streams.txt", img_size=64)))[1]
    assert images.shape == (2, 3, 64, 64)


class OneCamera(TwoCameras):
    inputs = ["0"]

    def __iter__(self):
        yield [self.frame(0, 10)]


def test_webcam_is_mirrored(monkeypatch):
    monkeypatch.setattr(loaders, "open_source", lambda source, vid_stride: OneCamera())
    ((path, im, im0, cap, s),) = datasets.LoadWebcam("0", img_size=64)
    assert (path, cap, s) == ("webcam.jpg", None, "webcam 1: ") and im.shape == (3, 64, 64)
    assert im0[0, -1, 0] == 255 and im0[0, 0, 0] == 10
    ((path, im, im0, *_),) = dataloaders.LoadScreenshots("screen", img_size=64)
    assert path == "0" and im0[0, 0, 0] == 255 and im.shape == (3, 64, 64)


def test_files_are_not_streams(folder):
    with pytest.raises(UserError, match="LoadImages"):
        datasets.LoadStreams(str(folder / "b.png"))
