"""Validate a trained detector in any format: precision, recall and mAP on a data set, with plots.

Examples:
    python val.py                                                     # the newest run, on its own data set
    python val.py --weights runs/train/exp/weights/best.pt --img 320
    python val.py --weights yolov5s.pt --data coco128.yaml --coco-metrics
    python val.py --weights best.onnx --data coco128.yaml             # an export, at the size it was made for
    python val.py --weights best.pt --data aerial.yaml --tile 640     # large images, in overlapping tiles
    python val.py --weights a.pt b.pt --augment                       # an ensemble, with test-time augmentation
    python val.py --weights a.pt b.pt --task study                    # which of them, at which size?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import CommandParser, echo_options, number, options_from, run_command
from utils.errors import explain_resource_errors
from utils.files import ROOT, run_folder

if TYPE_CHECKING:
    import torch

    from utils.eval.evaluate import EvalResult

WEIGHTS_HELP = "checkpoint or export; default: the newest runs/train/*/weights/best.pt; several: an ensemble"
IMGSZ_HELP = (
    "long side of the images, or height and width that all are padded to; default: 640, or an export's own; "
    "with --task study: all sides to go through, default: 256 to 1536"
)
TASK_HELP = "a split; or speed (each model as in use), or study (each model at many image sizes)"


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = CommandParser("val.py", description="Validate a trained detector.")
    add = parser.add_argument
    add("--data", default="", help="data set YAML; default: the one that the model was trained on")
    add("--weights", nargs="+", default=[], help=WEIGHTS_HELP)
    add("--batch-size", type=number(int, 1), default=32, help="images per batch")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), help=IMGSZ_HELP)
    add("--conf-thres", type=number(float, 0, 1), default=0.001, help="confidence threshold")
    add("--iou-thres", type=number(float, 0, 1), default=0.6, help="NMS IoU threshold")
    add("--max-det", type=number(int, 1), default=300, help="maximum detections per image")
    add("--tile", type=number(int, 32), help="cut images into tiles of so many pixels, for small objects")
    add("--tile-overlap", type=number(float, 0, 0.9), default=0.2, help="tile overlap (0-0.9)")
    add("--task", choices=["train", "val", "test", "speed", "study"], default="val", help=TASK_HELP)
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--augment", action="store_true", help="test-time augmentation (3 scales, flip)")
    add("--verbose", action="store_true", help="list every class even when there are many")
    add("--save-txt", action="store_true", help="write detections as label files: labels/*.txt")
    add(
        "--save-hybrid",
        action="store_true",
        help="add the labels before NMS (hybrid labels); the metrics then mean nothing",
    )
    add("--save-conf", action="store_true", help="write confidences into the label files as well")
    add("--save-json", action="store_true", help="write detections as COCO results (JSON)")
    add(
        "--annotations",
        default="",
        help="COCO annotation file (JSON) with the split's images: --save-json with its ids, and COCO's mAP by it",
    )
    add("--coco-metrics", action="store_true", help="print COCO's twelve metrics as well")
    add("--project", default=str(ROOT / "runs" / "val"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--half", action="store_true", help="half precision: float16 on CUDA, or what OpenVINO's device has")
    add("--bf16", action="store_true", help="bfloat16")
    add("--dnn", action="store_true", help="run an ONNX file in OpenCV")
    add("--noplots", dest="plots", action="store_false", help="draw no plots")
    return parser


def parse_opt() -> argparse.Namespace:
    """Parses the command line."""
    return build_parser().parse_args()


def run(
    data: Any = "",
    weights: Any = (),
    *,
    model: Any = None,
    dataloader: Any = None,
    save_dir: str | Path | None = None,
    callbacks: Any = None,
    compute_loss: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[tuple[float, ...], Any, tuple[float, float, float]]:
    """Validates from Python; takes the command line's options by name (`plots=False` for `--noplots`).

    Args:
        data: data set YAML, or its content; not needed with `dataloader` and a model that names its classes.
        weights: checkpoint or export, or several.
        model: a PyTorch module in place of `weights`; it stays where it is and as it is.
        dataloader: batches (`utils.dataloaders.loader.Batch`) in place of those of `data`.
        save_dir: the run's folder, in place of a new one in `project`.
        callbacks: its `run(hook, ...)` is called at the `on_val_*` hooks.
        compute_loss: called with the raw outputs of `model` and the targets.
        **options: the other options.

    Returns:
        (P, R, mAP50, mAP50-95, box, objectness and class loss (0 without `compute_loss`)); the mAP50-95 (nc,) of each
        class; milliseconds per image of pre-processing, inference and NMS. Without labels the first four and mAP50-95
        are NaN. Of a series (`task="speed"`, `"study"`) they are the last evaluation's.

    Raises:
        UserError: an unknown option, or a mistake that it names.
    """
    from models.inference.evaluation import ValConfig, run_validation

    parsed = options_from(build_parser(), {"data": data, "weights": weights, **options})
    config = ValConfig(**vars(parsed), model=model, dataloader=dataloader, save_dir=save_dir)
    result = run_validation(replace(config, callbacks=callbacks, compute_loss=compute_loss))
    return result.as_tuple(), result.maps, result.speed_ms


def process_batch(detections: torch.Tensor, labels: torch.Tensor, iouv: torch.Tensor) -> torch.Tensor:
    """Says which detections of one image are right, for each IoU threshold on its own.

    Args:
        detections: (n, 6) [x1, y1, x2, y2 in px, confidence, class], most confident first.
        labels: (m, 5) [class, x1, y1, x2, y2 in the same px].
        iouv: the thresholds (t,).

    Returns:
        bool (n, t), on the thresholds' device.
    """
    import torch

    from utils.metrics import match_detections

    right = match_detections(*(tensor.detach().cpu().numpy() for tensor in (detections, labels, iouv)))
    return torch.from_numpy(right).to(iouv.device)


def save_one_txt(predn: torch.Tensor, save_conf: bool, shape: Sequence[int], file: str | Path) -> None:
    """Appends one image's detections `predn` (n, 6) to a label file; `shape` is the image's height and width."""
    from utils.boxes import Detections
    from utils.media.writers import label_lines

    lines = label_lines(Detections.from_rows(predn.detach()), shape, save_conf)
    with open(file, "a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def save_one_json(predn: torch.Tensor, jdict: list[dict[str, Any]], path: Path, class_map: Sequence[int]) -> None:
    """Appends one image's detections `predn` (n, 6) to COCO results `jdict`; `class_map` gives classes' categories."""
    from utils.eval.coco import detection_rows, image_id

    jdict.extend(detection_rows(image_id(path), predn.detach().cpu().numpy(), class_map))


def main(options: argparse.Namespace) -> EvalResult:
    """Validates as the parsed `options` say."""
    from models.inference.evaluation import ValConfig, run_validation

    echo_options("val", options)
    run_folder(options.project, options.name)  # refused, if at all, before anything is opened
    sizes = {"--batch-size": options.batch_size, "--imgsz": options.imgsz, "--workers": options.workers}
    with explain_resource_errors(sizes):
        return run_validation(ValConfig(**vars(options)))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
