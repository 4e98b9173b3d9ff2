"""Detect objects in images, videos and streams with a trained model.

Examples:
    python detect.py --weights runs/train/exp/weights/best.pt --source photos/          # a folder
    python detect.py --source clip.mp4 --conf 0.4 --save-txt                            # the newest model, a video
    python detect.py --weights best.onnx --source photos/                               # an export; needs no PyTorch
    python detect.py --source 0 --view-img                                              # a camera, in a window
    python detect.py --source rtsp://10.0.0.7/gate --track --count "0,400,1280,400"     # who crosses a line
    python detect.py --source clip.mp4 --stream-json --nosave | jq .detections          # for other programs
    python detect.py --source aerial.png --tile 640                                     # small objects, large images
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import CommandParser, ReportedError, echo_options, number, options_from, run_command
from utils.errors import UserError, explain_resource_errors
from utils.files import ROOT, increment_path, run_folder
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    from models.inference.pipeline import DetectConfig, Pipeline, Result
    from utils.media.display import Window

IMGSZ_HELP = "image size: h w; default: 640, or the one size that an export takes"
NEWEST = "default: the newest runs/train/*/weights/best.pt"
SOURCE_HELP = "image, video, folder, glob, list of paths or streams (.txt), URL, camera number, or screen"
COUNT_HELP = (
    'count tracks that cross the line "x1,y1,x2,y2" or enter the zone of three or more points, in pixels; '
    'several, as "gate=x1,y1,x2,y2" "hall=..."'
)
LIVE_HELP = "show annotated frames live: http://HOST:PORT/NAME (MJPEG), rtsp://, rtmp://, udp:// or NAME.m3u8 (HLS)"
SEGMENT_HELP = "write videos in pieces of so many minutes (default: 5 for live inputs; a file's video stays whole)"
TIMEOUT_HELP = "give a live input up, with status 1, that sends nothing for so long (default: 300; 0: never)"
# options that say what is written or shown, and mean nothing where results are handed to a caller
WRITING = frozenset(
    "view_img save_txt save_conf save_crop save_csv save_json stream_json nosave save_scale live_out segment "
    "visualize update project name exist_ok line_thickness hide_labels hide_conf".split()
)


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = CommandParser("detect.py", description="Detect objects in images, videos and streams.")
    add = parser.add_argument
    add("--weights", nargs="+", default=[], help=f"checkpoint or export ({NEWEST}); several checkpoints: an ensemble")
    add("--source", default=str(ROOT / "data" / "images"), help=SOURCE_HELP)
    add("--data", default="", help="data set YAML whose class names are shown instead of the model's own")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), help=IMGSZ_HELP)
    add("--conf-thres", type=number(float, 0, 1), default=0.25, help="confidence threshold")
    add("--iou-thres", type=number(float, 0, 1), default=0.45, help="NMS IoU threshold")
    add("--max-det", type=number(int, 1), default=1000, help="maximum detections per image")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--view-img", action="store_true", help="show the results in a window; q ends")
    add("--save-txt", action="store_true", help="write label files: labels/*.txt")
    add("--save-conf", action="store_true", help="write confidences into the label files as well")
    add("--save-crop", action="store_true", help="write cropped detections to crops/<class>/")
    add("--save-csv", action="store_true", help="write predictions.csv")
    add("--save-json", action="store_true", help="write predictions.json: COCO results, classes by number")
    add("--stream-json", action="store_true", help="print each image's results on stdout as a line of JSON")
    add("--nosave", action="store_true", help="write no annotated images and videos")
    add("--save-scale", action="store_true", help="draw and write annotated images at the model's scale: faster")
    add("--live-out", default="", metavar="URL", help=LIVE_HELP)
    add("--segment", type=number(float, 0.01, 1440), metavar="MINUTES", help=SEGMENT_HELP)
    add("--classes", nargs="+", type=number(int, 0), default=None, help="keep these class numbers only")
    add("--agnostic-nms", action="store_true", help="class-agnostic NMS")
    add("--augment", action="store_true", help="test-time augmentation (3 scales, flip)")
    add("--tile", type=number(int, 32), help="cut images into tiles of so many pixels, for small objects")
    add("--tile-overlap", type=number(float, 0, 0.9), default=0.2, help="tile overlap (0-0.9)")
    add("--track", action="store_true", help="track objects through videos and streams: each gets a number")
    add("--count", nargs="+", default=[], metavar="POINTS", help=COUNT_HELP)
    anchors = ["center", "top", "bottom", "left", "right"]
    add("--count-anchor", choices=anchors, default="center", help="the point of a box that crosses or enters")
    add("--visualize", action="store_true", help="write every layer's feature maps")
    add("--update", action="store_true", help="strip the optimizer from the checkpoints after the run")
    add("--project", default=str(ROOT / "runs" / "detect"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--line-thickness", type=number(int, 1, 1000), default=3, help="line width of the boxes in pixels")
    add("--hide-labels", action="store_true", help="draw no class names")
    add("--hide-conf", action="store_true", help="draw no confidences")
    add("--batch-size", type=number(int, 1, 1024), default=1, help="detect in so many images of files at a time")
    add("--half", action="store_true", help="half precision (float16) where the device can")
    add("--dnn", action="store_true", help="run an ONNX file in OpenCV")
    add("--stream-timeout", type=number(float, 0), default=300.0, metavar="SECONDS", help=TIMEOUT_HELP)
    add("--vid-stride", type=number(int, 1), default=1, help="take every n-th frame of videos and streams")
    return parser


def parse_opt() -> argparse.Namespace:
    """Parses the command line."""
    return build_parser().parse_args()


def run(stream: bool = False, **keywords: Any) -> Iterator[Result] | None:
    """Detects from Python: `run(weights="best.pt", source="photos")`; the options' names as keywords.

    Args:
        stream: hand over the results (`models.inference.pipeline.Result`), one for every image as it comes, and write
            nothing.
        **keywords: the options.

    Returns:
        With `stream` an iterator of results; closing it ends the run. Else None.

    Raises:
        UserError: what the command line would have refused; `ReportedError` at the end of a run that had to skip
            damaged inputs or lost live ones.
    """
    options = options_from(build_parser(), keywords)
    if not stream:
        return main(options)
    needless = sorted(WRITING & set(keywords))
    if needless:
        raise UserError(f"detect.run(stream=True) writes and shows nothing: leave {', '.join(needless)} out.")
    from models.inference.pipeline import DetectConfig, open_pipeline

    return _handed_over(open_pipeline(DetectConfig(**vars(options))))


def _handed_over(pipeline: Pipeline) -> Iterator[Result]:
    """Yields the results of a run that writes nothing, then reports what was damaged."""
    yield from pipeline
    _report_damaged(pipeline)


def main(options: argparse.Namespace) -> None:
    """Runs the detector over all sources and writes what was asked for."""
    from models.inference.pipeline import DetectConfig, open_pipeline

    echo_options("detect", options)
    folder = run_folder(options.project, options.name)  # refused, if at all, before anything is opened
    config = DetectConfig(**vars(options))
    pipeline = open_pipeline(config)
    window = _open_window(config.view_img, pipeline.source.live)
    folder = increment_path(folder, exist_ok=config.exist_ok, mkdir=True)
    try:
        with explain_resource_errors({"--imgsz": config.imgsz}):
            failed = write_all(pipeline, folder, config, window)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"Results so far are in {folder}") from interrupt
    if config.update:
        _strip(config.weights)
    _report_damaged(pipeline, failed)


def write_all(pipeline: Pipeline, folder: Path, config: DetectConfig, window: Window | None = None) -> list[str]:
    """Writes all results in a thread of its own, logs a line for each and shows them, until the window is closed.

    Returns:
        A line for every input of which not everything could be written.
    """
    from utils.media.writers import OutputOptions, ResultWriter
    from utils.process import Background

    inputs, options = pipeline.source.inputs, OutputOptions.from_options(config)
    writer = ResultWriter(folder, inputs, pipeline.names, options, pipeline.shape_hw)
    feature_sink = writer.write_features if config.visualize else None
    try:
        with writer, Background(writer.write) as sink, closing(window) if window else nullcontext():
            for result in pipeline.results(feature_sink):
                outputs = result.frame, result.detections, result.counts
                shown = writer.drawn(*outputs) if window else None  # then it is drawn into
                sink.put(*outputs)  # first: what is told is in the outputs
                if config.stream_json:
                    _print_json(result)
                height, width = result.input_hw
                found = f"{result.summary()}, " if len(result.detections) else ""
                took = f"Done. ({result.inference_s:.3f}s)"
                LOGGER.info(f"{result.frame.label}: {height}x{width} {found}{took}")
                if window and not window.show(result.path if result.frame.live else "detect.py", shown):
                    break
    finally:
        for line in pipeline.summary():
            LOGGER.info(line)
    LOGGER.info(f"Results saved to {colorstr('bold', folder)}")
    if config.save_txt:
        LOGGER.info(f"{writer.labels_written} labels saved to {folder / 'labels'}")
    return list(writer.failed.values())


def _print_json(result: Result) -> None:
    """Prints a result as a line of JSON on stdout, at once.

    Raises:
        UserError: whoever read it has gone.
    """
    try:
        print(json.dumps(result.as_dict()), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would try again as it ends
        raise UserError("--stream-json: stdout was closed by what reads it.") from None


def _open_window(asked: bool, live: bool) -> Window | None:
    """Returns a window where one was asked for, or the source is live, and there is a display; says if there is none.

    Watching is what live inputs are mostly for, so they are shown without being asked where they can be.
    """
    from utils.media.display import Window, display_problem

    if not asked and not live:
        return None
    problem = display_problem()
    if problem and asked:
        LOGGER.warning(f"WARNING: --view-img: {problem}; going on without a window")
    return None if problem else Window()


def _strip(weights: Sequence[Path]) -> None:
    """Strips checkpoints of what only training needs, and says so."""
    from utils.checkpoint import strip_checkpoint

    for path in weights:
        strip_checkpoint(path)
        LOGGER.info(f"Optimizer stripped from {path}, {path.stat().st_size / 1e6:.1f}MB")


def _report_damaged(pipeline: Pipeline, failed: Sequence[str] = ()) -> None:
    """Ends a run that had to skip something, could not write it, or lost a live input, with an error that names it."""
    summary = "\n".join(
        f"{len(lines)} {thing}{' was' if len(lines) == 1 else 's were'} {outcome}:\n  " + "\n  ".join(lines)
        for lines, thing, outcome in (
            (pipeline.damaged, "damaged input", "skipped, all others are done"),
            (failed, "input", "not written whole"),
            (pipeline.ended, "live input", "lost"),
        )
        if lines
    )
    if summary:
        LOGGER.error(summary)
        raise ReportedError(summary)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
