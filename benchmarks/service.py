"""How many requests serve.py answers, how fast, and how well it batches, under a growing number of clients.

Starts a server for every batch size and lets clients post images over HTTP, each its next as soon as the last is
answered. Times are what a client sees: sending, waiting and reading. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import find_weights, number, run_command
from utils.errors import UserError
from utils.files import ROOT

ROUTE = "/v1/detect"
SIZE_METRIC = "yolov5_batch_size"
START_S = 120
HEADING = "batch size  clients  requests/s  p50 ms  p95 ms  p99 ms  mean batch  refused  failed"
ROW = (
    "{batch_size:10} {clients:8} {requests_per_s:11.1f} {p50_ms:7.0f} {p95_ms:7.0f} {p99_ms:7.0f} {mean_batch:11.2f} "
    "{refused:8} {failed:7}"
)


@dataclass
class Row:
    """What one number of clients saw of one server."""

    batch_size: int
    clients: int
    requests_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_batch: float
    refused: int
    failed: int


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = argparse.ArgumentParser("benchmarks/service.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="", help="as for serve.py; default: the newest runs/train/*/weights/best.pt")
    add("--source", default=str(ROOT / "data" / "images"), help="folder of the images to send")
    add("--imgsz", "--img", "--img-size", type=number(int, 32), default=640, help="image side in pixels")
    add("--device", default="", help="as for serve.py")
    add("--batch-sizes", nargs="+", type=number(int, 1), default=[1, 8], help="a server for each")
    add("--clients", nargs="+", type=number(int, 1), default=[1, 4, 16], help="clients at once")
    add("--seconds", type=number(float, 0.1), default=10, help="how long each number of clients sends")
    add("--json", default="", help="file for the figures")
    return parser


def main(options: argparse.Namespace) -> None:
    """Measures every combination and prints a table."""
    images = [path.read_bytes() for path in sorted(Path(options.source).iterdir()) if path.suffix.lower() == ".jpg"]
    if not images:
        raise UserError(f"--source {options.source}: no .jpg files there.")
    rows, where = [], {}
    print(HEADING)
    for batch_size in options.batch_sizes:
        with running_server(options, batch_size) as url:
            where = where or asyncio.run(about(url))
            asyncio.run(load(url, images, 1, min(options.seconds, 2)))  # the first of each shape is slow
            for clients in options.clients:
                row = measure(url, images, batch_size, clients, options.seconds)
                rows.append(row)
                print(ROW.format(**asdict(row)), flush=True)
    print(f"{len(images)} images of {options.source} at {options.imgsz} px; {where['model']} on {where['device']}")
    if options.json:
        Path(options.json).write_text(json.dumps({**where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


@contextmanager
def running_server(options: argparse.Namespace, batch_size: int) -> Iterator[str]:
    """Runs serve.py for the time of the block, on a free port; yields its address.

    Raises:
        UserError: it does not start; its own words are shown.
    """
    weights = str(*find_weights(options.weights))
    command = [sys.executable, str(ROOT / "serve.py"), "--weights", weights, "--imgsz", str(options.imgsz)]
    command += ["--port", "0", "--batch-size", str(batch_size), "--queue", "1000", "--device", options.device]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Serving on (http://\S+)", line):
                yield found[1]
                return
        raise UserError("serve.py did not start:\n" + "".join(lines[-5:]))
    finally:
        process.terminate()
        process.communicate()


def measure(url: str, images: Sequence[bytes], batch_size: int, clients: int, seconds: float) -> Row:
    """Puts a server under load and sums up what its clients and its counters saw."""
    before = asyncio.run(batches(url))
    start_s = time.perf_counter()
    answers = asyncio.run(load(url, images, clients, seconds))
    took_s = time.perf_counter() - start_s
    count, total = (now - then for now, then in zip(asyncio.run(batches(url)), before, strict=True))
    statuses = Counter(status for status, _ in answers)
    good_s = sorted(taken_s for status, taken_s in answers if status == 200) or [float("nan")]
    p50, p95, p99 = (1000 * good_s[min(int(share * len(good_s)), len(good_s) - 1)] for share in (0.5, 0.95, 0.99))
    failed = len(answers) - statuses[200] - statuses[503]
    return Row(batch_size, clients, statuses[200] / took_s, p50, p95, p99, total / max(count, 1), statuses[503], failed)


async def load(url: str, images: Sequence[bytes], clients: int, seconds: float) -> list[tuple[int, float]]:
    """Lets clients send for a while; returns (status, seconds) of every request."""
    import httpx

    end_s = time.perf_counter() + seconds
    answers = []

    async def send(client: httpx.AsyncClient, first: int) -> None:
        index = first
        while time.perf_counter() < end_s:
            start_s = time.perf_counter()
            answer = await client.post(
                ROUTE, content=images[index % len(images)], headers={"Content-Type": "image/jpeg"}
            )
            answers.append((answer.status_code, time.perf_counter() - start_s))
            index += clients

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=START_S, limits=limits) as client:
        await asyncio.gather(*(send(client, first) for first in range(clients)))
    return answers


async def batches(url: str) -> tuple[float, float]:
    """Returns how many batches a server has run, and how many images in all."""
    import httpx

    async with httpx.AsyncClient(base_url=url) as client:
        text = (await client.get("/metrics")).text
    count, total = (float(re.search(rf"^{SIZE_METRIC}_{part} (\S+)$", text, re.M)[1]) for part in ("count", "sum"))
    return count, total


async def about(url: str) -> dict[str, str]:
    """Returns what a server says of itself."""
    import httpx

    async with httpx.AsyncClient(base_url=url) as client:
        return (await client.get("/health")).json()


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
