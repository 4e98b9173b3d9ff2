"""Export trained detectors to other runtimes: ONNX, OpenVINO, NCNN, TensorFlow Lite and others, and check the results.

Examples:
    python export.py                                               # the newest run, to TorchScript and ONNX
    python export.py --weights best.pt --include onnx openvino --img 320 480 --dynamic
    python export.py --weights best.pt --include openvino tflite --int8 --data data.yaml
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from models.export.formats import DEFAULT_CHIP, FORMATS, ORT_WEB_TARBALL, ExportConfig
from utils.cli import CommandParser, ReportedError, echo_options, number, options_from, run_command
from utils.log import LOGGER

if TYPE_CHECKING:
    import pandas

    from models.export.run import Report

INCLUDE_HELP = (
    f"of {', '.join(FORMATS)}; tfjs is deprecated in favour of web, since its converter has had no release since 2024"
)
ORT_WEB_HELP = f"web: npm's tarball of the page's runtime (default: {ORT_WEB_TARBALL}; fetched if it is not there)"


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and what int8 may cost."""
    parser = CommandParser("export.py", description="Export trained detectors and check the results.")
    add = parser.add_argument
    add("--data", default="", help="data set YAML: calibrates int8, and exports are compared on its validation images")
    add("--weights", nargs="+", default=[], help="checkpoints; default: the newest runs/train/*/weights/best.pt")
    add("--imgsz", "--img", "--img-size", nargs="+", type=number(int, 1), default=[640, 640], help="image size: h w")
    add("--batch-size", type=number(int, 1, 1024), default=1, help="images at a time")
    add("--device", default="cpu", help="cpu, or the CUDA device, such as 0, to build TorchScript and TensorRT for")
    add("--half", action="store_true", help="weights in half precision (float16)")
    add("--inplace", action="store_true", help="refused: exports decode boxes without in-place operations")
    add("--train", action="store_true", help="leave the outputs of the head undecoded")
    add("--raw", action="store_true", help="maps of scores, for NPU compilers: the host decodes boxes")
    add("--optimize", action="store_true", help="refused: PyTorch no longer builds TorchScript for mobile phones")
    add("--int8", action="store_true", help="weights and activations in int8, calibrated on --data")
    add("--int8-max-drop", type=number(float, 0), help="mAP50-95 that int8 may lose before it fails (default 0.01)")
    add("--dynamic", action="store_true", help="take images of any size and number")
    add("--simplify", action="store_true", help="ONNX: simplify the graph with onnxslim")
    add("--torch-export", action="store_true", help="ONNX: by PyTorch's newer exporter (dynamo); opset 18 and above")
    add("--opset", type=number(int, 7), help="ONNX: operator set (default 12; 13 for int8, 16 for DySample)")
    add("--verbose", action="store_true", help="TensorRT: log what it does")
    add("--workspace", type=number(float, 0), help="TensorRT: GiB that it may use while it builds (default 4)")
    add("--nms", action="store_true", help="non-maximum suppression inside the model")
    add("--agnostic-nms", action="store_true", default=None, help="with --nms: class-agnostic suppression")
    add("--topk-per-class", type=number(int, 1), help="with --nms: maximum detections per class (default 100)")
    add("--topk-all", type=number(int, 1), help="with --nms: maximum detections per image (default 100)")
    add("--iou-thres", type=number(float, 0, 1), help="with --nms: IoU threshold (default 0.45)")
    add("--conf-thres", type=number(float, 0, 1), help="with --nms: confidence threshold (default 0.25)")
    add("--ort-web", metavar="TARBALL", help=ORT_WEB_HELP)
    add("--chip", help=f"RKNN: Rockchip's chip, such as rk3566, rk3568, rk3576 (default {DEFAULT_CHIP})")
    add("--include", nargs="+", default=["torchscript", "onnx"], metavar="FORMAT", help=INCLUDE_HELP)
    return parser


def parse_opt() -> argparse.Namespace:
    """Parses the command line."""
    return build_parser().parse_args()


def run(**keywords: Any) -> list[str]:
    """Exports from Python; takes the command line's options by name.

    Returns:
        The files and folders that were written; a format that failed is logged and absent.

    Raises:
        UserError: an unknown option, or a mistake that it names.
    """
    return [str(path) for path in export(options_from(build_parser(), keywords)).paths]


def export(options: argparse.Namespace) -> Report:
    """Exports as the options say."""
    from models.export.run import export_all

    return export_all(ExportConfig(**vars(options)))


def export_formats() -> pandas.DataFrame:
    """Returns the formats as a table with the columns Format, Argument, Suffix."""
    import pandas

    rows = [("PyTorch", "-", ".pt"), *((entry.title, entry.argument, entry.suffix) for entry in FORMATS.values())]
    return pandas.DataFrame(rows, columns=["Format", "Argument", "Suffix"])


def main(options: argparse.Namespace) -> Report:
    """Exports as the parsed `options` say.

    Raises:
        ReportedError: a format could not be exported, or does not agree with the checkpoint; it has been logged.
    """
    echo_options("export", options)
    report = export(options)
    if report.failures:
        summary = "; ".join(report.failures)
        LOGGER.error(f"export.py: {summary}.")
        raise ReportedError(summary)
    return report


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
