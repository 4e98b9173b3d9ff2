"""Validate a trained detector in any format: precision, recall and mAP on a data set, with curves and pictures.

Examples:
    python val.py                                                     # the newest run, on its own data set
    python val.py --weights runs/train/exp/weights/best.pt --img 320
    python val.py --weights yolov5s.pt --data coco128.yaml --coco-metrics
    python val.py --weights best.onnx --data coco128.yaml             # an export, at the size it was made for
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checks import UserError
from utils.cli import echo_options, newest_weights, number, options_from, run_command
from utils.files import ROOT, increment_path
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    import torch

    from models.validation import Subject
    from utils.eval.evaluate import EvalResult

SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
IMGSZ_HELP = "long side of the images, or height and width that all are padded to; default: 640, or an export's own"
PASSED_ON = "conf_thres iou_thres max_det single_cls verbose plots save_txt save_conf coco_metrics".split()


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = argparse.ArgumentParser("val.py", description="Validate a trained detector.")
    add = parser.add_argument
    add("--data", default="", help="data set YAML; default: the one that the model was trained on")
    add("--weights", default="", help="checkpoint or export; default: the newest runs/train/*/weights/best.pt")
    add("--batch-size", type=number(int, 1), default=32, help="images per batch")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), help=IMGSZ_HELP)
    add("--conf-thres", type=number(float, 0, 1), default=0.001, help="confidence threshold")
    add("--iou-thres", type=number(float, 0, 1), default=0.6, help="IoU threshold of NMS")
    add("--max-det", type=number(int, 1), default=300, help="most detections per image")
    add("--task", choices=["train", "val", "test"], default="val", help="the split to validate on")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--verbose", action="store_true", help="list every class even when they are many")
    add("--save-txt", action="store_true", help="save detections as label files")
    add("--save-conf", action="store_true", help="with confidences in them")
    add("--save-json", action="store_true", help="save detections as COCO results")
    add("--coco-metrics", action="store_true", help="print COCO's twelve figures as well")
    add("--project", default=str(ROOT / "runs" / "val"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--half", action="store_true", help="float16 (CUDA), or what OpenVINO's device has of 16 bits")
    add("--bf16", action="store_true", help="bfloat16")
    add("--dnn", action="store_true", help="run an ONNX file in OpenCV")
    add("--noplots", dest="plots", action="store_false", help="draw no pictures")
    return parser


def parse_opt() -> argparse.Namespace:
    """Parses the command line."""
    return build_parser().parse_args()


def run(data: str | Path = "", **keywords: Any) -> tuple[tuple[float, ...], Any, tuple[float, float, float]]:
    """Validates from Python; takes the command line's options by name (`plots=False` for `--noplots`).

    Returns:
        (P, R, mAP50, mAP50-95, box, objectness and class loss (0 here)); the mAP50-95 (nc,) of each class;
        milliseconds per image of pre-processing, inference and NMS.

    Raises:
        UserError: an unknown option, or a mistake that it names.
    """
    result = validate(options_from(build_parser(), {"data": data, **keywords}))
    return result.as_tuple(), result.maps, result.speed_ms


def validate(options: argparse.Namespace) -> EvalResult:
    """Reads the model and the data, evaluates, and writes the results to a new run folder."""
    from models.validation import check_classes, image_shape, make_loader, open_subject
    from utils.data.spec import load_spec
    from utils.eval.coco import category_ids, require_coco_tools
    from utils.eval.evaluate import evaluate

    if options.coco_metrics:
        require_coco_tools()  # missed before the work, not after it
    if options.conf_thres > SOUND_CONFIDENCE:
        LOGGER.warning(f"WARNING: --conf-thres {options.conf_thres} is above {SOUND_CONFIDENCE}: mAP comes out too low")
    subject = open_subject(options.weights or newest_weights(ROOT), options.device, precision(options), options.dnn)
    warn_of_inner_nms(subject, options)
    spec = load_spec(options.data or training_data(subject), need=(options.task,))
    check_classes(subject, spec, options.single_cls)
    wanted = {name: getattr(options, name) for name in ("task", "batch_size", "workers", "single_cls")}
    loader = make_loader(subject, spec, image_shape(subject, options.imgsz), **wanted).start()
    try:
        model = subject.build()  # while the loader decodes
        save_dir = increment_path(Path(options.project) / options.name, options.exist_ok, mkdir=True)
        result = evaluate(
            model,
            loader,
            names=spec.names,
            save_dir=save_dir,
            save_json=options.save_json or Path(options.data).name == "coco.yaml",
            json_name=f"{subject.path.stem}_predictions.json",
            categories=category_ids(getattr(spec, options.task), spec.nc),
            annotations=spec.root / "annotations" / "instances_val2017.json",
            **{name: getattr(options, name) for name in PASSED_ON},
        )
    finally:
        loader.close()
    if options.save_txt:
        LOGGER.info(f"{len(list((save_dir / 'labels').glob('*.txt')))} labels saved to {save_dir / 'labels'}")
    LOGGER.info(f"Results saved to {colorstr(str(save_dir), 'bold')}")
    return result


def precision(options: argparse.Namespace) -> torch.dtype:
    """Returns the number format that was asked for.

    Raises:
        UserError: two were.
    """
    import torch

    if options.half and options.bf16:
        raise UserError("--half and --bf16: choose one of them.")
    return torch.float16 if options.half else torch.bfloat16 if options.bf16 else torch.float32


def warn_of_inner_nms(subject: Subject, options: argparse.Namespace) -> None:
    """Says what NMS inside the model does to the figures."""
    inside = subject.nms
    if inside is None:
        return
    LOGGER.warning(
        f"WARNING: NMS is inside {subject.path} (confidence above {inside.conf_thres}, IoU {inside.iou_thres}, at most "
        f"{inside.max_det} detections): mAP comes out lower than without it, and --iou-thres {options.iou_thres} and "
        f"--max-det {options.max_det} change nothing"
    )


def training_data(subject: Subject) -> str:
    """Returns the data set YAML that a model was trained on.

    Raises:
        UserError: its file does not say.
    """
    if not subject.data:
        raise UserError(f"{subject.path} does not say which data set it was trained on: give --data.")
    LOGGER.info(f"No --data given: validating on {subject.data}, which {subject.path.name} was trained on")
    return subject.data


def main(options: argparse.Namespace) -> EvalResult:
    """Validates as the parsed `options` say."""
    echo_options("val", options)
    return validate(options)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
