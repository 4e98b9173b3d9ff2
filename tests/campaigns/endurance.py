"""Whether long work takes ever more memory or open files: training, images, videos, streams, openings, the service.

Every part runs in a process of its own and is sampled all along (`usage.py` says what is sampled and what counts as
flat). Damaged images, refused requests and clients that leave are among the items, since errors leak most. Without
--weights a small model is trained on the embedded data set first. Needs Linux.

    python -m tests.campaigns.endurance  # all parts in full: about an hour on two cores
    python -m tests.campaigns.endurance --scale 0.1 --parts video stream  # a tenth of two of them
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.campaigns.usage import HEADING, UNITS, Watch, complaints, require_linux, row
from utils.cli import ReportedError, number, run_command
from utils.errors import UserError
from utils.files import ROOT
from utils.log import LOGGER

if TYPE_CHECKING:
    import numpy as np

    from utils.media.sources import Frame, Source

CFG, TRAINING_EPOCHS = "yolov5n-slimneck.yaml", 20  # of the model that detects
CONF_THRES = 0.05  # finds much with little training
IMAGE_WH = (160, 128)
SCENES, FRAMES_A_SCENE, STEP_PX = 24, 25, 2
DAMAGED_EVERY = 20  # images
AT_ONCE = 8  # requests
START_S = 120
LINE = f"{IMAGE_WH[0] // 2},0,{IMAGE_WH[0] // 2},{IMAGE_WH[1]}"


class Part(NamedTuple):
    """A kind of work."""

    run: Callable[[argparse.Namespace, int, Path], Watch]  # options, items, an empty folder
    items: int
    detects: bool  # so it is run on the checkpoint and on its export


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("endurance", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="kinds of work; default: all")
    add("--scale", type=number(float, 0.001), default=1.0, help="share of the items of each part")
    add("--weights", nargs="+", default=[], help="checkpoints and exports that detect; default: a small model of both")
    add("--imgsz", "--img", "--img-size", type=number(int, 32), default=128, help="image side in pixels")
    add("--measure", choices=list(PARTS), help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser


def main(options: argparse.Namespace) -> None:
    """Runs every part in a process of its own and prints a table; in such a process, one part."""
    require_linux()
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        if options.measure:
            LOGGER.setLevel(logging.ERROR)
            part = PARTS[options.measure]
            watch = part.run(options, max(round(part.items * options.scale), 1), Path(folder))
            kind = f" {Path(options.weights[0]).suffix}" if part.detects else ""
            print(row(options.measure + kind, watch), flush=True)
            if complaints(watch.samples):
                raise ReportedError(options.measure)
            return
        weights = options.weights or make_weights(Path(folder), options)
        print(f"{HEADING}\n{UNITS}", flush=True)
        failed = []
        for part in options.parts:
            for path in weights if PARTS[part].detects else weights[:1]:
                line = [sys.executable, "-m", "tests.campaigns.endurance", "--measure", part, "--weights", path]
                line += ["--scale", str(options.scale), "--imgsz", str(options.imgsz)]
                if subprocess.run(line).returncode:
                    failed.append(f"{part} ({Path(path).suffix})")
    if failed:
        LOGGER.error(f"Not flat: {', '.join(failed)}.")
        raise ReportedError("memory or open files grew")


def make_weights(folder: Path, options: argparse.Namespace) -> list[str]:
    """Trains a small model and exports it; returns the checkpoint and the export."""
    size = ["--imgsz", str(options.imgsz)]
    train = ["train.py", "--cfg", CFG, "--epochs", str(TRAINING_EPOCHS), "--noval", "--noplots", *size]
    run_script([*train, "--project", str(folder), "--name", "model"])
    best = folder / "model" / "weights" / "best.pt"
    run_script(["export.py", "--weights", str(best), "--include", "onnx", "--dynamic", *size])
    return [str(best), str(best.with_suffix(".onnx"))]


def run_script(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{arguments[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


# ------------------------------------------------------------------------------------------------------------ training


def train_epochs(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    """Trains on the embedded data set; epochs are counted, worker processes' memory with the main one's."""
    import train
    from utils.callbacks import Callbacks

    watch, callbacks = Watch(items), Callbacks()

    def after_epoch(*_results: Any) -> None:
        watch.passed(children=[process.pid for process in multiprocessing.active_children()])

    callbacks.register_action("on_fit_epoch_end", "watch", after_epoch)
    train.run(callbacks, cfg=CFG, epochs=items, imgsz=options.imgsz, workers=2, patience=0, project=str(folder))
    return watch


# ----------------------------------------------------------------------------------------------------------- detection


def moving_images() -> Iterator[np.ndarray]:
    """Yields without end images (h, w, 3) of shapes that move to the right and make room for others."""
    import numpy as np

    from utils.tools.shapes import render_scene

    scenes = [render_scene(np.random.default_rng(seed), *IMAGE_WH).image for seed in range(SCENES)]
    while True:
        for scene in scenes:
            for step in range(FRAMES_A_SCENE):
                yield np.roll(scene, step * STEP_PX, axis=1)


def write_images(folder: Path, count: int) -> Path:
    """Writes images of several sizes, every DAMAGED_EVERY-th cut short; returns their folder."""
    import cv2

    folder.mkdir()
    for index, image in zip(range(count), moving_images(), strict=False):
        height = IMAGE_WH[1] - 16 * (index % 3)
        data = cv2.imencode(".jpg", image[:height])[1].tobytes()
        cut = len(data) // 2 if index % DAMAGED_EVERY == DAMAGED_EVERY - 1 else len(data)
        (folder / f"{index:06}.jpg").write_bytes(data[:cut])
    return folder


def write_video(path: Path, count: int) -> Path:
    import cv2

    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, IMAGE_WH)
    for _, image in zip(range(count), moving_images(), strict=False):
        video.write(image)
    video.release()
    return path


class WatchedSource:
    """A `Source` whose frames are counted as they are read."""

    def __init__(self, source: Source, watch: Watch) -> None:
        self.inputs, self.live, self.close, self.report = source.inputs, source.live, source.close, source.report
        self._source, self._watch = source, watch

    def read(self) -> Iterator[list[Frame]]:
        for frames in self._source.read():
            yield frames
            self._watch.passed(len(frames))


class EndlessCapture:
    """A stand-in for a camera (`utils.media.capture.Capture`) that waits for its reader and ends after some frames."""

    fps, is_recording = 25.0, True

    def __init__(self, frames: int) -> None:
        self.frame_count = self._left = frames
        self._images = moving_images()

    def grab(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def retrieve(self) -> np.ndarray:
        return next(self._images)

    def release(self) -> None:
        self._images.close()


def detect_all(options: argparse.Namespace, items: int, folder: Path, source: Path, **more: Any) -> Watch:
    """Detects in files, or with `live` in a stand-in for a camera, writing images or video and a table."""
    import detect
    from models.inference.pipeline import open_pipeline
    from utils.cli import options_from
    from utils.media.streams import LiveInput, LiveSource

    live = more.pop("live", False)
    chosen = {"weights": options.weights, "imgsz": options.imgsz, "conf_thres": CONF_THRES, "save_csv": True}
    wanted = options_from(detect.build_parser(), {**chosen, **more, "source": str(source)})
    pipeline = open_pipeline(wanted)
    if live:
        pipeline.source = LiveSource([LiveInput("camera", partial(EndlessCapture, items), reconnects=False)])
    watch = Watch(items)
    pipeline.source = WatchedSource(pipeline.source, watch)
    out = folder / "out"
    out.mkdir()
    detect.write_all(pipeline, out, wanted)
    if len((out / "predictions.csv").read_text().splitlines()) < 2:
        raise UserError(f"{options.weights[0]} finds nothing in the images made here: give other --weights.")
    return watch


def detect_images(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    source = write_images(folder / "images", items)
    return detect_all(options, items, folder, source, save_txt=True, save_crop=True)


def detect_video(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    return detect_all(options, items, folder, write_video(folder / "clip.mp4", items))


def detect_stream(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    """Detects in a live input, with tracks and counts."""
    source = write_video(folder / "clip.mp4", FRAMES_A_SCENE)
    return detect_all(options, items, folder, source, live=True, track=True, count=LINE)


def open_again(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    """Calls `detect.run` again and again in one process: the model is loaded, used for three frames and dropped."""
    import detect

    video = write_video(folder / "clip.mp4", 3)
    watch = Watch(items)
    for _ in range(items):
        found = list(detect.run(stream=True, weights=options.weights, imgsz=options.imgsz, source=str(video)))
        if len(found) != 3:
            raise UserError(f"{len(found)} of 3 frames came out of {video}.")
        watch.passed()
    return watch


# ------------------------------------------------------------------------------------------------------------- service


def serve_requests(options: argparse.Namespace, items: int, folder: Path) -> Watch:
    log = folder / "serve.log"
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--imgsz", str(options.imgsz)]
    with open(log, "w") as errors:
        process = subprocess.Popen([*command, "--weights", options.weights[0]], stderr=errors)
    try:
        watch = Watch(items, process.pid)
        statuses = asyncio.run(send_all(wait_for_address(process, log), items, watch))
    finally:
        process.terminate()
        process.wait()
    unexpected = set(statuses) - {"200", "400", "415", "left"}
    if unexpected or statuses["200"] < items / 2:
        raise UserError(f"the service did not answer as it should: {dict(statuses)}.")
    return watch


def wait_for_address(process: subprocess.Popen, log: Path) -> str:
    """Returns the address that a server tells in its log."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if found := re.search(r"Serving on (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise UserError(f"serve.py did not start: {log.read_text()[-500:]}")


async def send_all(url: str, items: int, watch: Watch) -> Counter[str]:
    """Sends requests, AT_ONCE together, over lasting and new connections; returns how often each status came."""
    import cv2
    import httpx

    image = cv2.imencode(".jpg", next(moving_images()))[1].tobytes()
    whole = {"content": image, "headers": {"Content-Type": "image/jpeg"}}
    requests = [
        whole,
        {"files": {"image": ("image.jpg", image)}},
        {**whole, "params": {"annotated": 1}},
        {**whole, "params": {"conf": 0.01}},
        whole,
        {**whole, "content": image[:200]},
        {**whole, "headers": {"Content-Type": "text/plain"}},
        {**whole, "timeout": 0.005},  # a client that leaves
    ]
    statuses: Counter[str] = Counter()

    async def send(client: httpx.AsyncClient, request: dict[str, Any]) -> None:
        try:
            statuses[str((await client.post("/v1/detect", **request)).status_code)] += 1
        except httpx.TimeoutException:
            statuses["left"] += 1

    for _ in range(-(-items // (AT_ONCE * 10))):
        async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
            for _ in range(10):
                await asyncio.gather(*(send(client, request) for request in requests))
                watch.passed(AT_ONCE)
    return statuses


PARTS = {
    "training": Part(train_epochs, 50, False),
    "images": Part(detect_images, 5000, True),
    "video": Part(detect_video, 20_000, True),
    "stream": Part(detect_stream, 5000, True),
    "openings": Part(open_again, 100, True),
    "service": Part(serve_requests, 2000, True),
}


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
