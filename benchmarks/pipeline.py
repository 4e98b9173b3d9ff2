"""How much of bare inference speed detection keeps, end to end, for any weights files and their runtimes.

For a folder of images and for a video made of them: images per second of inference alone, and of reading,
letterboxing, inference, suppression, drawing and writing together as detect.py does them; the second as a share of the
first, and against the first checkpoint among the files. Beside the times stands the processor time of one image: two
cores do no more than two seconds of it in a second. Every measurement runs in a process of its own, since runtimes'
waiting threads slow each other down; rounds take turns, and the best of each counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.apart import machine, measured
from models.backends.base import thread_count
from utils.cli import find_weights, number, run_command
from utils.files import ROOT

WAYS = ("plain", "save-scale", "batch-size 8")
VIDEO_FPS = 25
VIDEO_WH = (640, 480)
WARM_UP_RUNS = 3
LEGEND = (
    "kept: end to end as a share of inference alone; at most: the same if all cores were always at work;",
    "CPU ms: processor time of one image, all together and inference's; gain: end to end against the checkpoint",
)


@dataclass
class Result:
    """What one file did on one source."""

    weights: str
    runtime: str
    source: str
    way: str
    images: int
    inference_s: float  # for all images
    end_to_end_s: float
    inference_cpu_s: float
    end_to_end_cpu_s: float

    @property
    def kept(self) -> float:
        """How much of the speed of inference alone is kept."""
        return self.inference_s / self.end_to_end_s

    @property
    def at_most(self) -> float:
        """How much could be kept if all cores were always at work."""
        return self.inference_s / max(self.inference_s, self.end_to_end_cpu_s / thread_count())

    def best(self, other: Result) -> Result:
        """Returns the better of each time of two measurements of the same."""
        times = {name: min(getattr(self, name), getattr(other, name)) for name in asdict(self) if name.endswith("_s")}
        return Result(**{**asdict(self), **times})


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = argparse.ArgumentParser("benchmarks/pipeline.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", nargs="+", default=[], help="checkpoints and exports; default: the newest checkpoint")
    add("--source", default=str(ROOT / "data" / "images"), help="folder of images")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), help="image size: h w; default as detect.py")
    add("--device", default="", help="as for detect.py")
    add("--ways", nargs="+", choices=WAYS, default=["plain"], help="detect.py's options, which take turns")
    add("--count", type=number(int, 1), default=128, help="at most so many images, and so many frames of the video")
    add("--rounds", type=number(int, 1), default=3, help="the best of so many counts")
    add("--json", default="", help="write the figures to this file")
    add("--way", default="plain", help=argparse.SUPPRESS)
    add("--measure", choices=["images", "video"], help=argparse.SUPPRESS)  # what a process of its own is to do
    return parser


def main(options: argparse.Namespace) -> None:
    """Measures every file in turn, or, in a process of its own, one."""
    if options.measure:
        print(json.dumps(asdict(measure(options.weights[0], options))))
        return
    weights = [str(path) for path in find_weights(options.weights)]
    results: dict[tuple[str, str, str], Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"images": options.source, "video": str(make_video(options.source, Path(folder), options.count))}
        for _ in range(options.rounds):
            for kind, source in sources.items():
                for file, way in itertools.product(weights, options.ways):
                    line = ["--weights", file, "--source", source, "--measure", kind, "--device", options.device]
                    line += ["--imgsz", *options.imgsz] if options.imgsz else []
                    found = Result(**measured(__file__, *line, "--way", way, "--count", options.count))
                    known = results.get((kind, file, way))
                    results[kind, file, way] = known.best(found) if known else found
    print(table(list(results.values())))
    if options.json:
        content = {"machine": machine(), "results": [asdict(result) for result in results.values()]}
        Path(options.json).write_text(json.dumps(content, indent=2), encoding="utf-8")


def make_video(source: str, folder: Path, frames: int) -> Path:
    """Writes a video of the images of a source, all brought to one size, again from the first when they run out."""
    import cv2

    from utils.media.sources import find_sources, read_frames

    images = [frame.image for frame in read_frames(find_sources(source)[:frames]) if frame.image is not None]
    path = folder / "video.mp4"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), VIDEO_FPS, VIDEO_WH)
    for index in range(frames):
        video.write(cv2.resize(images[index % len(images)], VIDEO_WH, interpolation=cv2.INTER_AREA))
    video.release()
    return path


def measure(weights: str, options: argparse.Namespace) -> Result:
    """Measures one file here: inference alone, then everything as detect.py does it."""
    from models.backends import load_backend
    from models.inference.predictor import Predictor
    from utils.images import inference_hw
    from utils.media.sources import find_sources, read_frames
    from utils.nms import NMSConfig

    backend = load_backend(weights, options.device)
    shape_hw = inference_hw(options.imgsz, backend.stride, None if backend.dynamic else backend.metadata.shape_hw)
    backend.warm_up(*shape_hw)
    predictor = Predictor(backend, NMSConfig(max_det=1000), shape_hw)
    paths = find_sources(options.source)[: options.count]
    images = [frame.image for frame in read_frames(paths) if frame.image is not None]
    inputs = [window.inputs[None] for image in images for window in predictor.prepare(image)]
    for images in inputs[:WARM_UP_RUNS]:
        backend.infer(backend.preprocess(images))
    alone_s, alone_cpu_s = timed(lambda: infer_all(backend, inputs))
    whole_s, whole_cpu_s = timed(lambda: detect_all(predictor, paths, backend.names, options.way))
    words = (options.measure, options.way, len(inputs), alone_s, whole_s, alone_cpu_s, whole_cpu_s)
    return Result(Path(weights).name, backend.device, *words)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Returns the seconds that something takes, by the clock and of all processors together."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def infer_all(backend: Any, inputs: Sequence[Any]) -> None:
    """Runs the model alone on letterboxed images that lie in memory, each uint8 (1, 3, h, w)."""
    for images in inputs:
        backend.infer(backend.preprocess(images))
    backend.synchronize()


def detect_all(predictor: Any, paths: Sequence[str], names: dict[int, str], way: str) -> None:
    """Reads, detects, draws and writes, as detect.py does: reading and writing in threads of their own."""
    from models.inference.pipeline import Pipeline
    from utils.media.sources import LoadImages
    from utils.media.writers import OutputOptions, ResultWriter
    from utils.process import Background

    batch_size, options = 8 if way == "batch-size 8" else 1, OutputOptions(save_scale=way == "save-scale")
    with tempfile.TemporaryDirectory() as folder:
        writer = ResultWriter(Path(folder), paths, names, options, predictor.shape)
        with writer, Background(writer.write) as sink:
            for result in Pipeline(LoadImages(paths), predictor, names, batch_size=batch_size):
                sink.put(result.frame, result.detections)


def table(results: Sequence[Result]) -> str:
    """Returns the figures as a Markdown table, with what they were taken on above it and a legend below."""
    heads = (
        "weights, runtime, source, way, inference /s, end to end /s, kept, at most, CPU ms, inference's, gain".split(
            ", "
        )
    )
    lines = [machine(), "", f"| {' | '.join(heads)} |", "|---|---|---|---" + "|---:" * (len(heads) - 4) + "|"]
    for result in results:
        base = next((one for one in results if one.source == result.source and one.weights.endswith(".pt")), None)
        speeds = (result.images / seconds for seconds in (result.inference_s, result.end_to_end_s))
        cpu_ms = (1000 * s / result.images for s in (result.end_to_end_cpu_s, result.inference_cpu_s))
        cells = [result.weights, result.runtime, result.source, result.way, *(f"{speed:.1f}" for speed in speeds)]
        cells += [f"{result.kept:.2f}", f"{result.at_most:.2f}", *(f"{milliseconds:.1f}" for milliseconds in cpu_ms)]
        cells.append(f"{base.end_to_end_s / result.end_to_end_s:.2f}" if base else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *LEGEND])


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
