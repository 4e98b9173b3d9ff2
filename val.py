"""Validate a trained detector: precision, recall and mAP on a data set, with curves and pictures.

Examples:
    python val.py                                                     # the newest run, on its own data set
    python val.py --weights runs/train/exp/weights/best.pt --img 320
    python val.py --weights yolov5s.pt --data coco128.yaml --coco-metrics
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checks import UserError, check_image_size, grid_stride
from utils.cli import echo_options, newest_weights, number, options_from, run_command
from utils.files import ROOT, increment_path
from utils.log import LOGGER, colorstr

if TYPE_CHECKING:
    import torch

    from models.load import Weights
    from utils.data.loader import DetectionLoader
    from utils.data.spec import DataSpec
    from utils.eval.evaluate import EvalResult

PAD_STRIDES = 0.5  # border that rectangular batches get, in strides
SOUND_CONFIDENCE = 0.001  # thresholds above this cut the curves that mAP is the area of
PASSED_ON = "conf_thres iou_thres max_det single_cls verbose plots save_txt save_conf coco_metrics".split()


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = argparse.ArgumentParser("val.py", description="Validate a trained detector.")
    add = parser.add_argument
    add("--data", default="", help="data set YAML; default: the one that the checkpoint was trained on")
    add("--weights", default="", help="checkpoint; default: the newest runs/train/*/weights/best.pt")
    add("--batch-size", type=number(int, 1), default=32, help="images per batch")
    add("--imgsz", "--img", "--img-size", type=number(int, 1), default=640, help="image side in pixels")
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
    add("--half", action="store_true", help="float16 (CUDA)")
    add("--bf16", action="store_true", help="bfloat16")
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
    """Reads the checkpoint and the data, evaluates, and writes the results to a new run folder."""
    import torch

    from models.load import model_from, read_weights
    from utils.data.spec import load_spec
    from utils.devices import device_line, prepare_cpu_memory, select_device
    from utils.eval.coco import category_ids, require_coco_tools
    from utils.eval.evaluate import evaluate

    prepare_cpu_memory(device := select_device(options.device, options.batch_size))
    dtype = precision(options, device)
    if options.coco_metrics:
        require_coco_tools()  # missed before the work, not after it
    if options.conf_thres > SOUND_CONFIDENCE:
        LOGGER.warning(f"WARNING: --conf-thres {options.conf_thres} is above {SOUND_CONFIDENCE}: mAP comes out too low")
    path = Path(options.weights or newest_weights(ROOT))
    weights = read_weights(path)
    spec = load_spec(options.data or training_data(weights, path), need=(options.task,))
    check_classes(weights, spec, options.single_cls, path)
    loader = make_loader(options, weights, spec).start()  # it decodes while the model is built
    model = model_from(weights).fuse()
    LOGGER.info(f"{device_line(device)}\n{path}: {model.info(gflops=False)}")
    save_dir = increment_path(Path(options.project) / options.name, options.exist_ok, mkdir=True)
    try:
        result = evaluate(
            model.to(device, memory_format=torch.channels_last),
            loader,
            names=spec.names,
            device=device,
            dtype=dtype,
            save_dir=save_dir,
            save_json=options.save_json or Path(options.data).name == "coco.yaml",
            json_name=f"{path.stem}_predictions.json",
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


def precision(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Returns the number format to compute in.

    Raises:
        UserError: both were asked for, or float16 without CUDA.
    """
    import torch

    if options.half and options.bf16:
        raise UserError("--half and --bf16: choose one of them.")
    if options.half and device.type != "cuda":
        raise UserError(f"--half (float16) needs a CUDA GPU, this is {device.type}: use --bf16, or neither.")
    return torch.float16 if options.half else torch.bfloat16 if options.bf16 else torch.float32


def training_data(weights: Weights, path: Path) -> str:
    """Returns the data set YAML that a checkpoint was trained on.

    Raises:
        UserError: the checkpoint does not say.
    """
    data = weights.meta.get("data") if weights.source == "ours" else None
    if not data:
        raise UserError(f"{path} does not say which data set it was trained on: give --data.")
    LOGGER.info(f"No --data given: validating on {data}, which {path.name} was trained on")
    return data


def check_classes(weights: Weights, spec: DataSpec, single_cls: bool, path: Path) -> None:
    """Makes sure that model and data set speak of the same classes.

    Raises:
        UserError: their numbers differ.
    """
    if weights.nc != spec.nc and not single_cls:
        hint = " It tells one class only: add --single-cls if that is meant." if weights.nc == 1 else ""
        raise UserError(
            f"{path} knows {weights.nc} classes, the data set {spec.source or spec.root} has {spec.nc}: "
            f"choose the data set that it was trained on.{hint}"
        )
    differing = [class_id for class_id in spec.names if weights.names.get(class_id) != spec.names[class_id]]
    if differing and not single_cls:
        known, shown = weights.names.get(differing[0]), spec.names[differing[0]]
        LOGGER.warning(f"WARNING: {len(differing)} class names are not the checkpoint's: '{shown}' was '{known}', ...")


def make_loader(options: argparse.Namespace, weights: Weights, spec: DataSpec) -> DetectionLoader:
    """Makes the loader of the split in rectangular batches."""
    from utils.data.dataset import DetectionDataset
    from utils.data.labels import load_labels
    from utils.data.loader import create_loader

    stride = grid_stride(weights.stride)
    imgsz = check_image_size(options.imgsz, stride)
    trained = (weights.meta.get("opt") or {}).get("imgsz")
    if trained and trained != imgsz:
        LOGGER.info(f"Image size {imgsz}; the checkpoint was trained at {trained} (--img {trained})")
    sources, prefix = getattr(spec, options.task), f"{options.task}: "
    table = load_labels(sources, spec, options.single_cls, options.workers, prefix)
    dataset = DetectionDataset(
        table, imgsz, augment=None, rect=True, batch_size=options.batch_size, stride=stride, pad=PAD_STRIDES
    )
    return create_loader(dataset, options.batch_size, workers=options.workers, shuffle=False)


def main(options: argparse.Namespace) -> EvalResult:
    """Validates as the parsed `options` say."""
    echo_options("val", options)
    return validate(options)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
