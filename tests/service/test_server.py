"""The running server under load: right answers, batches, refusals when full, clients that leave, shutdown."""

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

httpx = pytest.importorskip("httpx")
ROUTE = "/v1/detect"
PNG = {"Content-Type": "image/png"}
LIMIT_S = 30


def fetch(url, data, **keywords):
    return httpx.post(url + ROUTE, content=data, headers=PNG, timeout=60, **keywords)


def metrics(url):
    lines = re.findall(r"^(yolov5_\S+) (\S+)$", httpx.get(url + "/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def wait_for(url, name, least):
    end_s = time.monotonic() + LIMIT_S
    while metrics(url).get(name, 0) < least:
        assert time.monotonic() < end_s, f"{name} never reached {least}"
        time.sleep(0.005)


def send_and_keep_open(url, data):
    """Sends a request and returns its connection, the answer unread."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_64_requests_at_once_all_get_their_own_answer_and_share_batches(start_server, encoded, draw, expected, agrees):
    shapes = [(48, 64), (64, 64), (64, 40)]
    cases = [(seed, *shapes[seed % 3]) for seed in range(64)]
    server = start_server("--batch-wait-ms", "20")
    data = [encoded(*case) for case in cases]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda content: fetch(server.url, content), data))
    assert {answer.status_code for answer in answers} == {200}
    wrong = [
        case for case, answer in zip(cases, answers, strict=True) if not agrees(answer.json(), expected(draw(*case)))
    ]
    assert not wrong
    assert len({answer.text for answer in answers}) == 64, "images are told apart"
    seen = metrics(server.url)
    assert seen["yolov5_images_total"] == 64
    assert seen["yolov5_batch_size_count"] < 50, "few shared a batch"
    assert seen["yolov5_requests_in_progress"] == 0


def test_full_service_says_when_to_come_back_and_recovers(start_server, encoded):
    server = start_server("--queue", "2", "--imgsz", "320", "--batch-size", "1")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda seed: fetch(server.url, encoded(seed, 640, 640)), range(24)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and len(refused) < 24 and {answer.status_code for answer in answers} == {200, 503}
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert "try again" in refused[0].json()["detail"]
    assert fetch(server.url, encoded()).status_code == 200


def test_image_of_a_client_that_leaves_is_dropped(start_server, encoded):
    server = start_server("--batch-size", "1", "--imgsz", "640")
    connections = [send_and_keep_open(server.url, encoded(seed, 640, 640)) for seed in range(16)]
    wait_for(server.url, "yolov5_queue_length", 2)
    for connection in connections:
        connection.close()
    wait_for(server.url, "yolov5_dropped_total", 1)
    assert fetch(server.url, encoded()).status_code == 200
    seen = metrics(server.url)
    assert seen["yolov5_images_total"] + seen["yolov5_dropped_total"] <= 17 and seen["yolov5_images_total"] < 17


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stopped_server_answers_what_it_has_taken(start_server, encoded, stop):
    server = start_server("--batch-size", "64", "--batch-wait-ms", "1000", "--imgsz", "320")  # they wait for others
    with ThreadPoolExecutor(12) as pool:
        for turn in range(1, 6):  # on a busy machine all may be answered before this process looks
            answers = [pool.submit(fetch, server.url, encoded(seed, 320, 320)) for seed in range(12)]
            wait_for(server.url, "yolov5_stage_seconds_count" + '{stage="read"}', 12 * turn)
            in_progress = metrics(server.url)["yolov5_requests_in_progress"]
            if in_progress:
                break
        assert in_progress, "nothing was left to finish"
        status = server.stop(stop)
        assert [answer.result().status_code for answer in answers] == [200] * 12
    assert status == 0
    assert server.lines[-1] == "Stopped.\n" and "Traceback" not in server.log()
