"""How much of bare inference speed detection keeps: reading, drawing and writing beside it, and one after the other.

Prints pictures per second for inference alone, for everything in one thread, and for detect.py's three threads, and
the last two as shares of the first. All in one run, alternating, the best of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import newest_weights, number, run_command
from utils.files import ROOT


def build_parser() -> argparse.ArgumentParser:
    """Declares the options."""
    parser = argparse.ArgumentParser("benchmarks/detect.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", default="", help="checkpoint; default: the newest runs/train/*/weights/best.pt")
    add("--source", default=str(ROOT / "data" / "images"), help="as for detect.py: images or a video")
    add("--imgsz", "--img", "--img-size", type=number(int, 32), default=640, help="image side in pixels")
    add("--device", default="", help="as for detect.py")
    add("--repeats", type=number(int, 1), default=3, help="rounds; the best time of each counts")
    return parser


def main(options: argparse.Namespace) -> None:
    """Times the three ways and prints a table."""
    from models.backends import load_backend
    from models.detector import Detector
    from utils.data.sources import find_sources, read_frames

    paths = find_sources(options.source)
    backend = load_backend(options.weights or newest_weights(ROOT), options.device)
    detector = Detector(backend, [options.imgsz, options.imgsz])
    inputs = [images for _, images in detector.letterboxed(read_frames(paths)) if images is not None]
    ways: dict[str, Callable[[], None]] = {
        "inference alone": lambda: infer_all(backend, inputs),
        "one thread": lambda: detect_in_turn(detector, paths, backend.names),
        "three threads": lambda: detect_beside(detector, paths, backend.names),
    }
    best_s = dict.fromkeys(ways, float("inf"))
    infer_all(backend, inputs[:4])
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best_s[name] = min(best_s[name], time.perf_counter() - start)
    print(f"{len(inputs)} pictures at {options.imgsz} px, the best of {options.repeats}")
    for name, seconds in best_s.items():
        share = best_s["inference alone"] / seconds
        print(f"{name:16} {len(inputs) / seconds:8.1f} pictures/s {share:8.1%}")


def infer_all(backend, inputs: Sequence) -> None:
    """Runs the model alone on letterboxed images that lie in memory, each uint8 (1, 3, h, w)."""
    for images in inputs:
        backend.infer(backend.preprocess(images))
    backend.synchronize()


def detect_in_turn(detector, paths: Sequence[str], names: dict[int, str]) -> None:
    """Reads, detects, draws and writes one picture after the other."""
    from utils.data.sinks import OutputOptions, ResultWriter
    from utils.data.sources import read_frames

    with tempfile.TemporaryDirectory() as folder, ResultWriter(Path(folder), paths, names, OutputOptions()) as writer:
        for frame, images in detector.letterboxed(read_frames(paths)):
            if images is not None:
                writer.write(frame, detector(images, frame.image.shape[:2]))


def detect_beside(detector, paths: Sequence[str], names: dict[int, str]) -> None:
    """Does the same as detect.py does it: reading and writing in threads of their own."""
    from utils.background import Background, ReadAhead
    from utils.data.sinks import OutputOptions, ResultWriter
    from utils.data.sources import read_frames

    with tempfile.TemporaryDirectory() as folder, ResultWriter(Path(folder), paths, names, OutputOptions()) as writer:
        pictures = detector.letterboxed(read_frames(paths))
        with Background(writer.write) as sink, ReadAhead(pictures) as reader:
            for frame, images in reader:
                if images is not None:
                    sink.put(frame, detector(images, frame.image.shape[:2]))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
