"""What val.py costs beside the network itself: the whole command against the plain forward passes of its batches.

The yardstick is the fused float32 model in contiguous (NCHW) layout over the same rectangular batches, already in
memory. The command is timed from its start to its end: interpreter, imports, label cache, NMS and plots included. All
run in turn, and the fastest of each counts; the aim is at most 1.4 times the yardstick. With `--other` the val.py of a
YOLOv5 checkout is measured beside it, in the same way.

    python benchmarks/val.py --weights yolov5n.pt --data coco128.yaml --other ../yolov5/val.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument("--data", required=True, help="data set YAML")
    parser.add_argument("--imgsz", "--img", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts")
    parser.add_argument("--other", type=Path, help="another program's val.py, of the same options")
    return parser.parse_args()


def load_batches(args: argparse.Namespace, stride: int) -> list[Any]:
    """Returns val.py's image batches, float32 (b, 3, h, w) in 0 to 1, contiguous."""
    from utils.dataloaders.config import load_spec
    from utils.dataloaders.loader import create_dataloader

    spec = load_spec(args.data, need=("val",))
    loader, _ = create_dataloader(spec.val, args.imgsz, args.batch_size, stride, pad=0.5, rect=True, workers=0)
    return [batch.images.float().div_(255) for batch in loader]


def time_forward(model: Any, batches: list[Any]) -> float:
    """Returns the seconds of one pass over the batches."""
    import torch

    with torch.no_grad():
        start = time.perf_counter()
        for images in batches:
            model(images)
        return time.perf_counter() - start


def time_command(args: argparse.Namespace, folder: str, script: Path = ROOT / "val.py") -> tuple[float, str]:
    """Runs a val.py once; returns its seconds and what it logged."""
    command = [sys.executable, str(script), "--weights", args.weights, "--data", args.data]
    command += ["--img", str(args.imgsz), "--batch-size", str(args.batch_size), "--project", folder]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, done.stderr


def main() -> None:
    """Measures and prints."""
    args = parse_args()
    from models.load import load_model

    model = load_model(args.weights, fuse=True)
    batches = load_batches(args, int(model.stride.max()))
    images = sum(len(batch) for batch in batches)
    time_forward(model, batches[:1])  # warm-up
    scripts = [ROOT / "val.py", *([args.other] if args.other else [])]
    forward, commands = [], {script: [] for script in scripts}
    with tempfile.TemporaryDirectory() as folder:
        for script in scripts:
            time_command(args, folder, script)  # makes the label cache
        for _ in range(args.repeats):
            forward.append(time_forward(model, batches))
            for script in scripts:
                commands[script].append(time_command(args, folder, script))
    yardstick = min(forward)
    print(f"{images} images at {args.imgsz}, batches of {args.batch_size}; the aim is a ratio of at most 1.40")
    print(f"forward passes alone   {yardstick:7.2f} s  {1e3 * yardstick / images:6.1f} ms per image")
    for script in scripts:
        fastest, log = min(commands[script])
        print(f"{script}, all of it")
        print(f"                       {fastest:7.2f} s  {1e3 * fastest / images:6.1f} ms per image")
        print(f"ratio                  {fastest / yardstick:7.2f}")
        print(*re.findall(r"^Speed: .*", log, re.MULTILINE)[-1:])


if __name__ == "__main__":
    main()
