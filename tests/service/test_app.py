"""The routes of a running service: answers, refusals, health, metrics, headers."""

import asyncio
import contextlib
import gc
import io
import re
import socket
import struct
import threading
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from models.backends.base import ArrayBackend
from models.backends.metadata import Metadata
from models.inference.predictor import Predictor
from utils.errors import UserError
from utils.nms import NMSConfig

httpx = pytest.importorskip("httpx")
YOLOV5_ROUTE, ROUTE = "/v1/object-detection/yolov5s", "/v1/detect"


def post(client, data, **keywords):
    headers = {"Content-Type": "image/png", **keywords.pop("headers", {})}
    return client.post(keywords.pop("route", ROUTE), content=data, headers=headers, **keywords)


def metric(client, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def png_header(width, height):
    """A PNG that promises so many pixels and holds one row's worth of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_form_on_the_route_of_yolov5_gives_the_records_of_its_hub(client, encoded, draw, expected, agrees):
    answer = client.post(YOLOV5_ROUTE, files={"image": ("../../etc/passwd", encoded(1), "image/png")})
    assert answer.status_code == 200, answer.text
    records = answer.json()
    assert list(records[0]) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert {record["name"] for record in records} <= {"cat", "红绿灯"}
    assert agrees(records, expected(draw(1)))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 33), (300, 20), (1, 90)])
def test_body_that_is_the_image_gives_what_the_detector_finds(client, encoded, draw, expected, agrees, height, width):
    found = expected(draw(2, height, width))
    answer = post(client, encoded(2, height, width))
    assert agrees(answer.json(), found)
    assert len(found) or (height, width) == (1, 90)


@pytest.mark.parametrize("annotated", [0, 1])
def test_nothing_of_an_image_is_kept_once_it_was_answered(in_process, encoded, annotated):
    """For six requests and one that fails."""
    references = []

    class Noting(Predictor):
        def prepare(self, image):
            windows = super().prepare(image)
            references.extend((weakref.ref(image), weakref.ref(windows[0].inputs)))
            return windows

    with in_process(Noting) as client:
        for seed in range(6):
            assert post(client, encoded(seed), params={"annotated": annotated}).status_code == 200
        assert post(client, b"no image").status_code == 400
        gc.collect()
        alive = sum(reference() is not None for reference in references)
    assert len(references) == 12 and alive <= 2, alive  # a thread may hold the last one until its next


@pytest.mark.parametrize("annotated", [0, 1])
def test_images_of_all_requests_share_a_budget_of_decoded_pixels(in_process, encoded, monkeypatch, annotated):
    """Of a service that has room for two of ten images at once."""
    import service.app

    decoded, alive, peak = [], lambda: sum(reference() is not None for reference in decoded), [0]
    decode = service.app.decode_upload

    def noting(data):
        image = decode(data)
        decoded.append(weakref.ref(image))
        peak.append(alive())
        return image

    class Slow(Predictor):
        def __call__(self, *batch):
            time.sleep(0.05)  # the others have time to be decoded
            peak.append(alive())
            return super().__call__(*batch)

    monkeypatch.setattr(service.app, "decode_upload", noting)
    monkeypatch.setattr(service.app, "DECODED_PIXELS", 2 * 48 * 64)
    with in_process(Slow, max_pixels=48 * 64) as client, ThreadPoolExecutor(10) as pool:
        params = {"annotated": annotated}
        answers = list(pool.map(lambda seed: post(client, encoded(seed), params=params), range(10)))
        assert post(client, encoded(1, 49, 64)).status_code == 413
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 10
    assert max(peak) <= 2 + 2, "threads may hold on to what they have done"


def test_health_and_readiness_are_told_while_the_model_and_the_queue_are_stuck(in_process, encoded):
    """Of a service that takes two requests and whose model never returns until it is let go."""
    entered, free = threading.Event(), threading.Event()

    class Stuck(Predictor):
        def __call__(self, *batch):
            entered.set()
            assert free.wait(20)
            return super().__call__(*batch)

    with in_process(Stuck, queue=2) as client, ThreadPoolExecutor(2) as pool:
        assert client.get("/ready").json() == {"ready": True}
        try:
            waiting = [pool.submit(post, client, encoded(seed)) for seed in range(2)]
            assert entered.wait(20)
            while metric(client, "yolov5_requests_in_progress") < 2:
                time.sleep(0.005)
            assert post(client, encoded()).status_code == 503
            answer = client.get("/ready")
            assert answer.status_code == 503 and answer.json()["reason"] == "2 requests are in progress"
            assert client.get("/health").status_code == 200
        finally:
            free.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
        assert client.get("/ready").status_code == 200


class ChoosingBackend(ArrayBackend):
    """Stands in for an export with NMS inside: the same three boxes in every image, then zeros."""

    dynamic, device, batch = False, "here", None
    metadata = Metadata({0: "cat"}, 32, (64, 64), nms=NMSConfig(conf_thres=0.2, iou_thres=0.5, max_det=4))

    def run(self, inputs):
        rows = [[0, 16, 48, 48, 0.9, 0], [10, 20, 30, 40, 0.5, 0], [1, 17, 9, 25, 0.3, 0], [0, 0, 0, 0, 0, 0]]
        return np.array([rows] * len(inputs), np.float32)


def test_boxes_chosen_inside_the_model_are_thinned_out_and_other_thresholds_refused(in_process, encoded):
    with in_process(backend=ChoosingBackend()) as client:
        image = encoded(0, 32, 64)  # padded by 16 px above and below
        _, second = post(client, image, params={"conf": 0.4, "iou": 0.5}).json()
        weak, other_iou = (post(client, image, params=asked) for asked in ({"conf": 0.1}, {"iou": 0.6}))
        assert '"lowestConf": 0.2' in client.get("/").text
    box = {"xmin": 10.0, "ymin": 4.0, "xmax": 30.0, "ymax": 24.0}
    assert second == {**box, "confidence": 0.5, "class": 0, "name": "cat"}
    assert weak.status_code == 422 and "drops boxes below 0.2" in weak.json()["detail"]
    assert other_iou.status_code == 422 and "inside this model, with IoU 0.5" in other_iou.json()["detail"]


def test_budget_is_shared_in_the_order_of_asking_and_by_those_who_wait():
    pytest.importorskip("fastapi")
    from service.app import Budget

    async def scene():
        budget, order = Budget(10), []

        async def take(amount):
            await budget.take(amount)
            order.append(amount)

        await take(6)
        large, gone, small = (asyncio.ensure_future(take(amount)) for amount in (10, 9, 1))
        await asyncio.sleep(0)
        gone.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == [6], "the small one would fit, but was not the first to ask"
        budget.give_back(6)
        await large
        budget.give_back(10)
        await small
        return order

    assert asyncio.run(asyncio.wait_for(scene(), 5)) == [6, 10, 1]


def test_no_more_than_four_images_are_decoded_at_once_however_many_cores_there_are(monkeypatch):
    pytest.importorskip("fastapi")
    from service.app import Service

    monkeypatch.setattr("os.cpu_count", lambda: 64)
    service = Service(None, SimpleNamespace(batch_size=1, batch_wait_ms=0, max_pixels=1))
    four, fifth = threading.Barrier(4, timeout=5), threading.Barrier(5, timeout=0.2)

    async def at_once(barrier, count):
        met = await asyncio.gather(*(service._in_pool(barrier.wait) for _ in range(count)), return_exceptions=True)
        return sum(isinstance(one, int) for one in met)

    assert asyncio.run(at_once(four, 4)) == 4
    assert asyncio.run(at_once(fifth, 5)) == 0, "a fifth came while four were at it"


def test_an_error_of_the_program_is_answered_without_its_words_and_with_the_headers(in_process, encoded, monkeypatch):
    import service.app
    from service.guard import HEADERS

    def broken(*_arguments):
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(service.app, "records", broken)
    with in_process() as client:
        answer = post(client, encoded(1))
        assert client.get("/health").status_code == 200
    assert answer.status_code == 500 and answer.json() == {"detail": "the service failed: its log says why"}
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


def test_query_sets_the_thresholds_of_one_request(client, encoded, draw, expected, agrees):
    few, many = (post(client, encoded(3), params={"conf": conf, "iou": 0.9}).json() for conf in (0.5, 0.1))
    assert agrees(few, expected(draw(3), 0.5, 0.9)) and agrees(many, expected(draw(3), 0.1, 0.9))
    assert len(few) < len(many)


def test_turned_photograph_is_read_upright(client, draw, expected, agrees):
    upright = draw(4, 40, 64)
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise"
    Image.fromarray(cv2.rotate(upright, cv2.ROTATE_90_COUNTERCLOCKWISE)[..., ::-1]).save(stored, "PNG", exif=exif)
    assert agrees(post(client, stored.getvalue()).json(), expected(upright))


@pytest.mark.parametrize("how", [{"params": {"annotated": 1}}, {"headers": {"Accept": "image/jpeg"}}])
def test_annotated_image_comes_as_jpeg_of_the_same_size(client, encoded, draw, how):
    answer = post(client, encoded(5, 96, 128), **how)
    assert answer.headers["content-type"] == "image/jpeg"
    drawn = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape == (96, 128, 3)
    assert np.abs(drawn.astype(int) - draw(5, 96, 128)).max() > 100, "nothing was drawn"


def test_answer_tells_the_time_of_every_stage(client, encoded):
    stages = re.findall(r"(\w+);dur=[\d.]+", post(client, encoded()).headers["Server-Timing"])
    assert stages == ["read", "decode", "queue", "inference", "encode"]


REFUSALS = {
    "no image": (b"<!doctype html><p>hello", 400, "not a readable image"),
    "nothing": (b"", 400, "empty"),
    "too many pixels": (png_header(1001, 1000), 413, "1001x1000 px; at most 1 million"),
    "a bomb": (png_header(30000, 30000), 413, "too many pixels"),
    "too many bytes": (bytes(600_000), 413, "larger than 0.5 MB"),
    "damaged": (png_header(100, 100), 400, "the image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 415, "format eps"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unfit_image_is_refused_in_words(client, case):
    data, status, words = REFUSALS[case]
    answer = post(client, data)
    assert (answer.status_code, list(answer.json())) == (status, ["detail"]), answer.text
    assert words in answer.json()["detail"]


def test_truncated_jpeg_is_refused(client, encoded):
    answer = post(client, encoded(0, 200, 200, ".jpg")[:-300])
    assert answer.status_code == 400 and "truncated JPEG" in answer.json()["detail"]


def test_jpeg_of_a_thousand_scans_is_refused(client, encoded):
    data = encoded(0, 20, 20, ".jpg")
    answer = post(client, data[:-2] + b"\xff\xda" * 1000 + data[-2:])
    assert answer.status_code == 400 and "scans" in answer.json()["detail"]


def test_body_of_unknown_length_is_given_up_once_it_is_too_long(client):
    def pieces():
        for _ in range(20):
            yield bytes(50_000)

    assert post(client, pieces()).status_code == 413


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"json": {"image": "x"}}, 415, "application/json is not taken"),
        ({"files": {"file": ("a.png", b"x")}}, 422, "its fields: 'file'"),
        ({"files": {"other": ("", b"x")}, "data": {"image": "text"}}, 422, "no file in a field 'image'"),
        ({"files": [("image", ("a", b"x")), ("image", ("b", b"x"))]}, 400, "form cannot be read"),
        ({"content": b"--", "headers": {"Content-Type": "multipart/form-data"}}, 400, "form cannot be read"),
        ({"files": {"image": ("a.png", bytes(700_000))}}, 413, "larger"),
        ({"content": b"x", "params": {"conf": 1.5}}, 422, "conf: "),
        ({"content": b"x", "params": {"conf": "nan"}}, 422, "conf: "),
        ({"content": b"x", "params": {"annotated": "perhaps"}}, 422, "annotated: "),
    ],
)
def test_unfit_request_is_refused_in_words(client, request_, status, words):
    answer = client.post(ROUTE, **request_)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]


def test_other_paths_and_methods_do_not_exist(client):
    assert client.get(ROUTE).status_code == 405
    for path in ("/redoc", "/service/page.html", "/..%2f..%2fserve.py"):
        assert client.get(path).status_code == 404


def send_many(client, *contents, **keywords):
    return client.post(ROUTE + "/batch", files=[("image", content) for content in contents], **keywords)


def test_several_images_are_answered_in_their_order_and_a_fault_in_its_place(client, encoded, draw, expected, agrees):
    images = [(f"{seed}.png", encoded(seed)) for seed in (1, 2, 3)]
    bad = [("bad.png", b"<!doctype html>"), ("empty.png", b""), ("wide.png", png_header(1001, 1000))]
    answer = send_many(client, images[0], *bad, *images[1:], params={"conf": 0.1})
    assert answer.status_code == 200, answer.text
    found = answer.json()["images"]
    assert [one["name"] for one in found] == ["1.png", "bad.png", "empty.png", "wide.png", "2.png", "3.png"]
    for one, seed in zip((found[0], found[4], found[5]), (1, 2, 3), strict=True):
        assert agrees(one["objects"], expected(draw(seed), 0.1)) and "error" not in one
    faults = ("not a readable image", "empty (0 bytes)", "at most 1 million pixels")
    assert all(words in one["error"] and "objects" not in one for one, words in zip(found[1:4], faults, strict=True))


def test_too_many_images_too_large_ones_and_other_bodies_are_refused(in_process, encoded):
    with in_process(max_images=2, max_image_mb=0.001, max_pixels=1e6) as client:
        small, large = ("a.png", png_header(10, 10)), ("b.png", encoded(1, 64, 64))
        assert len(large[1]) > 1050
        assert send_many(client, small, small).status_code == 200
        assert "larger than 0.001 MB" in send_many(client, small, large).json()["images"][1]["error"]
        assert send_many(client, small, small, small).status_code == 400
        assert send_many(client, ("c.png", bytes(100_000))).status_code == 413
        plain = client.post(ROUTE + "/batch", content=b"x", headers={"Content-Type": "image/png"})
        assert plain.status_code == 415 and "multipart/form-data" in plain.json()["detail"]


KEYS = ("a-key-of-enough-letters", "another-key-of-enough-letters")


def test_with_keys_nothing_of_the_model_is_answered_without_one(in_process, encoded, tmp_path):
    (tmp_path / "keys").write_text("# of the gate\n" + "\n\n".join(KEYS) + "\n")
    with in_process(api_keys=str(tmp_path / "keys")) as client:
        for headers in (
            {},
            {"X-API-Key": KEYS[0][:-1]},
            {"Authorization": f"Basic {KEYS[0]}"},
            {"X-API-Key": "# of the gate"},
        ):
            refused = post(client, encoded(1), headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer", headers
            assert refused.headers["x-frame-options"] == "DENY" and "X-API-Key" in refused.json()["detail"]
            assert client.get("/metrics", headers=headers).status_code == 401
        for headers in ({"X-API-Key": KEYS[1]}, {"Authorization": f"Bearer {KEYS[0]}"}):
            assert post(client, encoded(1), headers=headers).status_code == 200
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert "X-API-Key" in client.get("/docs").text


def test_files_of_keys_that_are_none_are_refused(tmp_path):
    pytest.importorskip("fastapi")
    from service.app import read_keys

    for content, message in (
        (None, "not found"),
        ("", "16 characters"),
        ("schlüssel-mit-umlauten", "cannot be read"),
        ("short\n", "16 characters"),
    ):
        if content is not None:
            (tmp_path / "keys").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_keys(str(tmp_path / "keys"))


def test_the_documentation_is_one_page_about_every_route(client):
    answer = client.get("/docs")
    for route in ("POST /v1/detect", "POST /v1/detect/batch", "GET /health", "GET /ready", "GET /metrics"):
        assert f"<h2>{route}</h2>" in answer.text
    assert "number 0 to 1" in answer.text and "multipart/form-data" in answer.text and "X-API-Key" not in answer.text
    assert not re.search(r'src="(?!data:)|<script|http://(?!HOST)|https://', answer.text)
    assert "style-src 'sha256-" in answer.headers["content-security-policy"]


def test_health_names_the_model(client):
    answer = client.get("/health").json()
    assert (answer["status"], answer["model"], answer["runtime"]) == ("ok", "tiny.onnx", "onnxruntime")
    assert (answer["classes"], answer["imgsz"]) == (2, [64, 64])


@pytest.mark.parametrize("path", ["/", "/health", "/metrics"])
def test_head_gives_the_headers_of_what_can_be_got(client, path):
    head, got = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"] and int(head.headers["content-length"])


def test_metrics_count_requests_images_and_stages(client, encoded):
    names = ['yolov5_requests_total{path="/v1/detect",status="200"}', "yolov5_images_total", "yolov5_batch_size_count"]
    names += ['yolov5_stage_seconds_count{stage="inference"}', 'yolov5_request_seconds_count{path="/v1/detect"}']
    before = [metric(client, name) for name in names]
    for _ in range(2):
        assert post(client, encoded()).status_code == 200
    assert [metric(client, name) - count for name, count in zip(names, before, strict=True)] == [2] * len(names)
    refused = 'yolov5_requests_total{path="/v1/detect",status="415"}'
    count = metric(client, refused)
    post(client, b"x", headers={"Content-Type": "text/plain"})
    assert metric(client, refused) == count + 1
    assert "yolov5_queue_length 0.0" in client.get("/metrics").text


def test_every_answer_carries_security_headers_and_none_opens_it_to_other_sites(client, encoded):
    for answer in (client.get("/"), client.get("/health"), client.get("/no"), post(client, b"")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "script-src 'sha256-" in client.get("/").headers["content-security-policy"]


def test_requests_for_other_names_are_refused_on_every_route(client, encoded):
    """A page of evil.example, whose name leads here after a while, sends that name as the host."""
    for host in ("evil.example", "evil.example:5000", "localhost.evil.example", "10.0.0.7"):
        for answer in (
            client.get("/", headers={"Host": host}),
            client.get("/health", headers={"Host": host}),
            post(client, encoded(), headers={"Host": host}),
            post(client, bytes(10_000_000), headers={"Host": host}),  # it gets to see the answer
        ):
            assert answer.status_code == 400 and host in answer.json()["detail"]
            assert "--trusted-hosts" in answer.json()["detail"] and answer.headers["x-frame-options"] == "DENY"
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1234", "[::1]:5000", "[::1]", "localhost."):
        assert client.get("/health", headers={"Host": host}).status_code == 200


def test_health_is_told_however_many_clients_send_half_a_request(client, server):
    host, port = server.url.removeprefix("http://").split(":")
    connections = []
    try:
        for _ in range(600):
            connections.append(socket.create_connection((host, int(port))))
            connections[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        begun_s = time.monotonic()
        assert httpx.get(server.url + "/health", timeout=5).json()["status"] == "ok"
        assert time.monotonic() - begun_s < 5
        connections[-1].sendall(b"b\r\n\r\n")  # the newest are still served
        assert connections[-1].recv(15) == b"HTTP/1.1 200 OK"
        connections[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert connections[0].recv(1) == b""
    finally:
        for connection in connections:
            connection.close()


def test_schema_describes_the_upload(client):
    operation = client.get("/openapi.json").json()["paths"][ROUTE]["post"]
    assert {"multipart/form-data", "image/*"} == set(operation["requestBody"]["content"])
    assert {"conf", "iou", "annotated"} == {parameter["name"] for parameter in operation["parameters"]}
