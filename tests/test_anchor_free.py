"""Anchor-free models where boxes are used: tracked through a video, in the hub's results, behind the service."""

import cv2
import numpy as np
import pytest
import torch

import detect
from models.backends import load_backend
from models.inference.predictor import Predictor
from utils.files import ROOT
from utils.nms import NMSConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(more_weights, tmp_path_factory):
    return more_weights(tmp_path_factory.mktemp("af") / "af.pt", {0: "cat", 1: "dog"}, cfg="yolov5n-af.yaml")


@pytest.fixture(scope="module")
def image():
    return cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8), (64, 48))


@pytest.fixture(scope="module")
def expected(weights, image):
    backend = load_backend(weights, "cpu")
    return Predictor(backend, NMSConfig(max_det=5), (64, 64)).detect(image).rounded().rows


def test_objects_keep_their_numbers_through_a_video(weights, image, tmp_path):
    pytest.importorskip("trackers")
    video = cv2.VideoWriter(str(tmp_path / "still.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(4):
        video.write(image)
    video.release()
    options = {"weights": str(weights), "source": str(tmp_path / "still.mp4"), "imgsz": [64], "device": "cpu"}
    results = list(detect.run(stream=True, track=True, max_det=5, count=["0,0,1,0,1,1,0,1"], **options))
    numbers = [set(result.track_ids.tolist()) - {-1} for result in results]
    assert numbers[1] and numbers[1] == numbers[2] == numbers[3]
    (zone,) = results[-1].counts
    assert sum(tally.second for tally in zone.tallies) == len(numbers[3])


def test_the_hub_gives_the_detector_s_boxes(weights, image, expected):
    model = torch.hub.load(str(ROOT), "custom", path=str(weights), source="local")
    model.max_det = 5
    (rows,) = model(image[..., ::-1], size=(64, 64)).xyxy
    assert len(rows) and model.names == {0: "cat", 1: "dog"}
    np.testing.assert_allclose(rows.numpy().round(), expected.round(), atol=1)


def test_the_service_answers_with_the_detector_s_boxes(weights, image, expected):
    testclient = pytest.importorskip("starlette.testclient")
    pytest.importorskip("prometheus_client")
    import serve
    from service.app import ServeConfig
    from service.guard import TrustedHosts
    from utils.cli import options_from

    asked = {"weights": str(weights), "imgsz": [64, 64], "device": "cpu", "max_det": 5}
    app = serve.build_app(ServeConfig(**vars(options_from(serve.build_parser(), asked))), TrustedHosts())
    with testclient.TestClient(app, "http://localhost") as client:
        files = {"image": ("a.png", cv2.imencode(".png", image)[1].tobytes())}
        answer = client.post("/v1/detect", files=files)
        assert answer.status_code == 200, answer.text
        assert client.get("/health").json()["classes"] == 2
    boxes = [[one[key] for key in ("xmin", "ymin", "xmax", "ymax")] for one in answer.json()]
    np.testing.assert_allclose(boxes, expected[:, :4], atol=1)
    assert {one["name"] for one in answer.json()} <= {"cat", "dog"}
