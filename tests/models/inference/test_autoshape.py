"""Images of every kind give the same boxes, which equal golden ones and those made by hand."""

import http.server
import json
import threading
from io import BytesIO

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.inference.autoshape import AutoShape, read_images
from models.inference.multibackend import DetectMultiBackend
from models.load import load_model
from models.yolo import Model
from utils.boxes import scale_boxes
from utils.errors import UserError
from utils.images import letterbox
from utils.nms import non_max_suppression


@pytest.fixture(scope="module")
def weights(golden_dir):
    return golden_dir / "yolov5n-v6-coco.pt"


@pytest.fixture(scope="module")
def backend(weights):
    return DetectMultiBackend(weights, device="cpu")


@pytest.fixture
def model(backend):
    """With attributes as new."""
    return AutoShape(backend)


@pytest.fixture(scope="module")
def bus(golden_dir):
    return golden_dir / "images" / "bus.jpg"


@pytest.fixture(scope="module")
def small():
    """An untrained model of two classes that takes everything for an object."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = Model("yolov5n.yaml", nc=2).eval()
    for conv in detector.head.m:
        conv.bias.data.view(3, -1)[:, 4:] += 6
    return detector


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_):
        """Drops the line."""


@pytest.fixture
def address(bus):
    """The folder of the golden images, over HTTP."""

    def handler(*arguments):
        return QuietHandler(*arguments, directory=bus.parent)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["bus.jpg", "zidane.jpg"])
def test_boxes_are_the_golden_ones(model, golden_dir, name):
    expected = json.loads((golden_dir / "detections.json").read_text())["images"][name]
    results = model(golden_dir / "images" / name)
    golden = np.array(expected["detections_x1y1x2y2_conf_cls"])
    found = results.xyxy[0].numpy()
    assert list(results.s) == expected["input_shape"]
    assert np.abs(found[:, :4] - golden[:, :4]).max() <= 1
    assert np.abs(found[:, 4] - golden[:, 4]).max() <= 1e-3
    assert found[:, 5].tolist() == golden[:, 5].tolist()


def test_every_kind_of_image_gives_the_same_boxes(model, bus, address):
    opened, array = Image.open(bus), np.asarray(Image.open(bus))
    floats = torch.from_numpy(array.transpose(2, 0, 1) / np.float32(255))
    kinds = [str(bus), bus, f"{address}/bus.jpg?size=1", opened, array, cv2.imread(str(bus))[..., ::-1]]
    kinds += [array.transpose(2, 0, 1), array.astype(np.float32), floats, (floats * 255).round().byte()]
    kinds += [floats * 255, floats.numpy(), floats.double(), array.astype(np.int64), array.astype(np.uint16) * 257]
    results = model(kinds, size=320)
    assert results.files[:6] == ["bus.jpg", "bus-2.jpg", "bus-3.jpg", "bus-4.jpg", "image4.jpg", "image5.jpg"]
    assert len(results.xyxy[0]) >= 4
    for rows, image in zip(results.xyxy, results.imgs, strict=True):
        assert np.array_equal(image, array)
        assert torch.allclose(rows, results.xyxy[0], atol=0.05)
    alone = model(array, size=320)
    assert torch.allclose(alone.xyxy[0], results.xyxy[0], atol=0.05), "a batch and a image alone agree"


def test_results_are_those_of_letterbox_model_and_suppression(model, weights, golden_dir):
    """1080 x 810 and 720 x 1280 at 320 px: both scaled to fit 320 x 320."""
    files = [golden_dir / "images" / name for name in ("bus.jpg", "zidane.jpg")]
    images = [np.asarray(Image.open(file)) for file in files]
    boxed = np.stack([letterbox(image, (320, 320), auto=False).image.transpose(2, 0, 1) for image in images])
    with torch.no_grad():
        rows = load_model(weights, fuse=True)(torch.from_numpy(boxed).float() / 255)[0]
    expected = non_max_suppression(rows, 0.3, 0.5, max_det=1000)
    model.conf, model.iou = 0.3, 0.5
    results = model(files, size=320)
    assert results.s == (2, 3, 320, 320)
    for found, wanted, image in zip(results.xyxy, expected, images, strict=True):
        assert len(wanted) and torch.equal(found[:, 5], wanted[:, 5])
        assert torch.allclose(found[:, :4], scale_boxes((320, 320), wanted[:, :4], image.shape), atol=0.05)
        assert torch.allclose(found[:, 4], wanted[:, 4], atol=1e-4)


@pytest.mark.parametrize(
    ("shapes_hw", "size", "expected"),
    [
        ([(1080, 810)], 640, [640, 480]),
        ([(720, 1280)], 640, [384, 640]),  # 360 rounds up
        ([(1080, 810), (720, 1280)], 640, [640, 640]),
        ([(1000, 331)], 640, [640, 224]),  # 211.84
        ([(49, 98)], 98, [64, 128]),
        ([(720, 1280)], (320, 500), [320, 512]),
        ([(720, 1280)], None, [384, 640]),
    ],
)
def test_shapes_are_the_smallest_that_hold_all(small, shapes_hw, size, expected):
    results = AutoShape(small)([np.zeros((*shape_hw, 3), np.uint8) for shape_hw in shapes_hw], size=size)
    assert results.s == (len(shapes_hw), 3, *expected)


@pytest.mark.parametrize("size", [0, "640", (640, 640, 3), 12.5, []])
def test_nonsense_sizes_are_refused(small, size):
    with pytest.raises(UserError, match="size="):
        AutoShape(small)(np.zeros((64, 64, 3), np.uint8), size=size)


def test_attributes_take_effect(model, bus):
    plain = model(bus).xyxy[0]
    model.conf = 0.7
    assert torch.equal(model(bus).xyxy[0], plain[plain[:, 4] > 0.7])
    model.conf, model.classes = 0.25, [5]
    assert model(bus).xyxy[0][:, 5].tolist() == [5]
    model.classes, model.max_det = None, 2
    assert torch.equal(model(bus).xyxy[0], plain[:2])
    model.max_det, model.conf = 1000, 0.01
    low = len(model(bus).xyxy[0])
    model.iou = 0.9
    crowded = len(model(bus).xyxy[0])
    model.iou, model.multi_label = 0.45, True
    several = len(model(bus).xyxy[0])
    model.multi_label, model.agnostic = False, True
    assert len(model(bus).xyxy[0]) < low < min(crowded, several)


def test_amp_computes_in_16_bits(model, bus, monkeypatch):
    monkeypatch.setattr("models.inference.autoshape.resolve_amp", lambda mode, device: torch.bfloat16)
    plain = model(bus, size=320).xyxy[0]
    model.amp = True
    mixed = model(bus, size=320).xyxy[0]
    assert mixed.dtype == torch.float32 and torch.equal(mixed[:2, 5], plain[:2, 5])
    assert 0 < (mixed[:2, :4] - plain[:2, :4]).abs().max() < 30


def test_half_and_back(small):
    model = AutoShape(small)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    plain = model(image, size=64).xyxy[0]
    half = model.half()(image, size=64).xyxy[0]
    again = model.float().cpu().to("cpu").eval()(image, size=64).xyxy[0]
    assert len(plain) and half.dtype == torch.float32
    assert torch.allclose(half[0], plain[0], atol=2) and torch.allclose(again[0], plain[0], atol=2)
    assert not torch.equal(half, plain)


def test_tensors_go_straight_to_the_model(small, backend, weights):
    images = torch.rand(2, 3, 64, 64)
    rows, logits = AutoShape(small)(images)
    assert torch.allclose(rows, small(images)[0], atol=1e-4) and len(logits) == 3
    rows = AutoShape(backend)(images)
    assert isinstance(rows, torch.Tensor) and rows.shape == (2, 252, 85)
    assert torch.allclose(rows, load_model(weights)(images)[0], rtol=1e-3, atol=1e-3)


def test_augment_looks_three_times(small, bus):
    """Of 64 px: 252 rows less the coarsest 4 cells x 3, the same again, and less the finest 64 x 3: 240 + 252 + 60."""
    model = AutoShape(small)
    assert model(torch.zeros(1, 3, 64, 64), augment=True)[0].shape == (1, 552, 7)
    assert len(model(bus, size=64, augment=True).xyxy[0])


def test_profile_logs_the_layers(small, caplog):
    with caplog.at_level("INFO", "yolov5"):
        AutoShape(small)(np.zeros((64, 64, 3), np.uint8), size=64, profile=True)
    assert "time (ms)" in caplog.text and caplog.text.count("models.common.Conv") >= 7


def test_training_mode_is_refused(small):
    model = AutoShape(small).train()
    with pytest.raises(UserError, match="eval"):
        model(np.zeros((64, 64, 3), np.uint8))
    model.eval()


def test_the_wrapper_has_the_models_attributes(model, small):
    assert model.names[27] == "tie" and model.nc == 80 and model.stride == 32 and model.yaml["depth_multiple"] == 0.33
    assert model.dmb and model.pt
    wrapped = AutoShape(small)
    assert wrapped.stride.tolist() == [8, 16, 32] and not wrapped.dmb
    wrapped.names = {0: "left", 1: "right"}
    assert "left" in str(wrapped(np.full((64, 64, 3), 90, np.uint8), size=64))


def test_the_callers_image_stays_as_it_is(small):
    image = np.full((96, 96, 3), 100, np.uint8)
    results = AutoShape(small)(image, size=96)
    results.render()
    assert len(results.xyxy[0]) and (image == 100).all() and not (results.imgs[0] == 100).all()


def read(item):
    ((image,), _) = read_images([item])
    return image


def test_grey_alpha_palette_and_16_bits_become_rgb():
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    eight = (grey >> 8).astype(np.uint8)
    rgb = eight[..., None].repeat(3, 2)
    for item in (eight, eight[..., None], eight[None], rgb, np.dstack([rgb, eight]), Image.fromarray(eight)):
        assert np.array_equal(read(item), rgb)
    for item in (
        grey,
        Image.fromarray(grey),
        Image.fromarray(eight).convert("LA"),
        Image.fromarray(eight).convert("P"),
    ):
        assert np.array_equal(read(item), rgb)


def test_tensors_of_another_range_than_the_model_s_are_warned_of_once(small, caplog):
    model, images = AutoShape(small), torch.rand(1, 3, 64, 64)
    model(images)
    assert not caplog.records
    for _ in range(2):
        model(images * 255)
    (record,) = caplog.records
    assert "but the model was trained on 0 to 1: divide by 255" in record.message
    AutoShape(small)((images - 0.5) / 0.25)
    assert len(caplog.records) == 2


def test_orientation_is_heeded_in_files_and_images(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    assert read(tmp_path / "turned.png").shape == (60, 40, 3)
    assert np.array_equal(read(tmp_path / "turned.png"), read(Image.open(tmp_path / "turned.png")))


def test_images_from_memory_have_no_file_name():
    content = BytesIO()
    Image.new("RGB", (64, 48)).save(content, "PNG")
    _, files = read_images([Image.open(content), Image.new("RGB", (64, 48))])
    assert files == ["image0.jpg", "image1.jpg"]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("nowhere.jpg", "nowhere.jpg: cannot be read"),
        (__file__, "not a readable image"),
        (np.random.default_rng(0).normal(0, 1, (48, 64, 3)), "Image 0: has values from -[34]"),
        (torch.full((3, 48, 64), torch.nan), "has values from nan to nan"),
        (np.full((48, 64, 3), 70_000), "has values from 70000 to 70000; 0 to 1 .floats., 0 to 255, or 0 to 4095 or"),
        (np.zeros((2, 48, 64, 3), np.uint8), r"Image 0: is an array \(2, 48, 64, 3\)"),
        (np.zeros((0, 64, 3), np.uint8), "is an array"),
        (7, "is a int"),
        ("http://127.0.0.1:9/image.jpg", "cannot be reached"),
    ],
)
def test_what_is_no_image_is_named(item, words):
    with pytest.raises(UserError, match=words):
        read_images([item])


def test_an_empty_list_is_refused(small):
    with pytest.raises(UserError, match="empty"):
        AutoShape(small)([])
