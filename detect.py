"""Find objects in images and videos with a trained model.

Examples:
    python detect.py --weights runs/train/exp/weights/best.pt --source photos/          # a folder
    python detect.py --source clip.mp4 --conf 0.4 --save-txt                            # the newest model, a video
    python detect.py --weights best.onnx --source photos/                               # an export; needs no PyTorch
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checks import UserError
from utils.cli import ReportedError, echo_options, newest_weights, number, options_from, run_command
from utils.files import ROOT, find_file, increment_path, read_yaml
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    import numpy as np

    from models.detector import Detector

DEFAULT_PX = 640


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = argparse.ArgumentParser("detect.py", description="Find objects in images and videos.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint or export; default: the newest runs/train/*/weights/best.pt")
    add("--source", default=str(ROOT / "data" / "images"), help="image, video, folder, glob, or .txt list of paths")
    add("--data", default="", help="data set YAML whose class names are shown instead of the model's own")
    add(
        *("--imgsz", "--img", "--img-size"),
        nargs="+",
        type=number(int, 1),
        help=f"image size: h w; default: {DEFAULT_PX}, or the one size that an export takes",
    )
    add("--conf-thres", type=number(float, 0, 1), default=0.25, help="confidence threshold")
    add("--iou-thres", type=number(float, 0, 1), default=0.45, help="IoU threshold of the suppression")
    add("--max-det", type=number(int, 1), default=1000, help="most detections per image")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--save-txt", action="store_true", help="write labels/*.txt")
    add("--save-conf", action="store_true", help="write confidences into the label files as well")
    add("--save-crop", action="store_true", help="cut the detections out into crops/<class>/")
    add("--save-csv", action="store_true", help="write predictions.csv")
    add("--nosave", action="store_true", help="write no annotated images and videos")
    add("--classes", nargs="+", type=number(int, 0), default=None, help="keep these class numbers only")
    add("--agnostic-nms", action="store_true", help="suppress across classes")
    add("--visualize", action="store_true", help="write every layer's feature maps")
    add("--update", action="store_true", help="strip the weights of what only training needs, after the run")
    add("--project", default=str(ROOT / "runs" / "detect"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--line-thickness", type=number(int, 1), default=3, help="width of the boxes' lines in pixels")
    add("--hide-labels", action="store_true", help="draw no class names")
    add("--hide-conf", action="store_true", help="draw no confidences")
    add("--half", action="store_true", help="compute in 16 bits where the device can")
    add("--dnn", action="store_true", help="run an ONNX file in OpenCV")
    add("--vid-stride", type=number(int, 1), default=1, help="read every so many frames of a video")
    return parser


def parse_opt() -> argparse.Namespace:
    """Parses the command line."""
    return build_parser().parse_args()


def run(**keywords: Any) -> None:
    """Detects from Python: `run(weights="best.pt", source="photos")`; the options' names as keywords.

    Raises:
        UserError: what the command line would have refused; `ReportedError` at the end of a run that had to skip
            damaged inputs.
    """
    main(options_from(build_parser(), keywords))


def main(options: argparse.Namespace) -> None:
    """Runs the detector over all sources and writes what was asked for."""
    from utils.data.sources import find_sources

    echo_options("detect", options)
    paths = find_sources(options.source)  # mistakes are told before a model is loaded
    if options.imgsz is not None and len(options.imgsz) not in (1, 2):
        sides = " ".join(map(str, options.imgsz))
        raise UserError(f"--img-size {sides}: one side, or height and width, are expected.")
    weights = options.weights or str(newest_weights(ROOT))

    from models.backends import load_backend, runtime_of
    from models.detector import Detector, shape_for

    for option in ("update", "visualize"):
        if getattr(options, option) and runtime_of(weights) != "pytorch":
            raise UserError(f"--{option} is for checkpoints (.pt); {weights} is an export. Leave it out.")
    backend = load_backend(weights, options.device, options.half, options.dnn)
    names = _names_of(options.data, backend.names)
    unknown = sorted(set(options.classes or ()) - set(names))
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the model has the classes 0 to {max(names)}.")
    limits = {name: getattr(options, name) for name in ("conf_thres", "iou_thres", "max_det", "classes")}
    detector = Detector(backend, shape_for(backend, options.imgsz, DEFAULT_PX), agnostic=options.agnostic_nms, **limits)
    folder = increment_path(Path(options.project) / options.name, exist_ok=options.exist_ok, mkdir=True)
    try:
        damaged = detect_all(detector, paths, folder, names, options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"Results so far are in {folder}") from interrupt
    if options.update:
        _strip(weights)
    if damaged:
        count = "1 damaged input was" if len(damaged) == 1 else f"{len(damaged)} damaged inputs were"
        summary = f"{count} skipped, all others are done:\n  " + "\n  ".join(damaged)
        LOGGER.error(summary)
        raise ReportedError(summary)


def detect_all(
    detector: Detector, paths: Sequence[str], folder: Path, names: dict[int, str], options: argparse.Namespace
) -> list[str]:
    """Reads, detects and writes, the first and the last in threads of their own; logs a line for every picture.

    Returns:
        What was damaged, one line each.
    """
    from utils.background import Background, ReadAhead
    from utils.data.sinks import OutputOptions, ResultWriter
    from utils.data.sources import read_frames

    damaged = []
    writer = ResultWriter(folder, paths, names, OutputOptions.from_options(options))
    pictures = detector.letterboxed(read_frames(paths, options.vid_stride))
    with writer, Background(writer.write) as sink, ReadAhead(pictures) as reader:
        for frame, images in reader:
            if images is None:
                damaged.append(f"{frame.where}: {frame.error}")
                LOGGER.warning(f"WARNING: {damaged[-1]}; skipped")
                continue
            visualize = functools.partial(writer.write_features, frame) if options.visualize else None
            detections = detector(images, frame.image.shape[:2], visualize)
            sink.put(frame, detections)
            size = f"{images.shape[2]}x{images.shape[3]}"
            took_s = detector.last_s["inference"]
            LOGGER.info(f"{frame.where}: {size} {_counts(detections, names)}Done. ({took_s:.3f}s)")
    LOGGER.info(f"{detector.speed()}Results saved to {colorstr(str(folder), 'bold')}")
    if options.save_txt:
        LOGGER.info(f"{writer.labels_written} labels saved to {folder / 'labels'}")
    return damaged


def _strip(weights: str) -> None:
    """Strips a checkpoint of what only training needs, and says so."""
    from models.load import find_weights
    from utils.checkpoint import strip_checkpoint

    path = find_weights(weights)
    strip_checkpoint(path)
    LOGGER.info(f"Optimizer stripped from {path}, {path.stat().st_size / 1e6:.1f}MB")


def _counts(detections: np.ndarray, names: dict[int, str]) -> str:
    """Returns `2 persons, 1 tie, ` for detections (k, 6), in the order of the classes; empty for none."""
    classes = detections[:, 5].astype(int).tolist()
    counts = [(classes.count(class_id), names[class_id]) for class_id in sorted(set(classes))]
    return "".join(f"{count} {name}{'s' * (count > 1 and name.isascii())}, " for count, name in counts)


def _names_of(data: str, model_names: dict[int, str]) -> dict[int, str]:
    """Returns the class names of a data set YAML where they fit the model's classes, else the model's own."""
    if not data:
        return model_names
    content = read_yaml(find_file(data, (".yaml", ".yml"), "--data"))
    names = content.get("names") if isinstance(content, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names if isinstance(names, dict) else {}
    if set(names) != set(model_names):
        counts = f"names {len(names)} classes, the model has {len(model_names)}"
        LOGGER.warning(f"WARNING: --data {data} {counts}: the model's own names are used")
        return model_names
    return {class_id: str(name) for class_id, name in names.items()}


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
