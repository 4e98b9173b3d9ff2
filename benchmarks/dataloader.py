"""Milliseconds per image of the training data pipeline on one core, beside what decoding alone costs.

The yardstick is what OpenCV needs to decode four of the images, since a mosaic is made of four. Three figures: a first
epoch, with nothing in memory; a later epoch; and a first epoch in which partners come from a window of 64 and no more
than such a window is kept in memory, which is how a data set that memory does not hold behaves. Times are processor
time, and of several runs the fastest counts, so that other work on the machine disturbs little.

    python benchmarks/dataloader.py --set ../datasets/coco128/images/train2017:640
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WINDOW = 64
# the default hyperparameters, hyp.scratch-low.yaml
PARAMS = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "mosaic": 1.0}
DEFAULT_SETS = ("coco128/images/train2017:640", "bccd/images/train:320")


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    datasets = Path(os.environ.get("DATASETS_DIR", ROOT / "../shared/datasets"))
    default = [str(datasets / name) for name in DEFAULT_SETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", nargs="+", default=default, metavar="FOLDER:SIZE", help="image folders ($DATASETS_DIR's by default)"
    )
    parser.add_argument("--albumentations", action="store_true", help="with its transforms, where it is installed")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="epochs per figure; the fastest counts")
    return parser.parse_args()


def decode_four_ms(paths: list[str]) -> float:
    """Milliseconds to decode four images of average size."""
    import cv2

    start = time.process_time()
    for path in paths:
        cv2.imread(path)
    return (time.process_time() - start) * 1000 / len(paths) * 4


def epoch_ms(dataset, epoch: int) -> tuple[float, float]:
    """Makes every item of an epoch; returns milliseconds and decoded images per item."""
    from utils.dataloaders.sampling import SampleKey

    recent = dataset.recent_images()
    decoded_before = recent.misses
    order = dataset.order(epoch).tolist()
    start = time.process_time()
    for position, index in enumerate(order):
        dataset[SampleKey(epoch, position, index)]
    elapsed = time.process_time() - start
    return elapsed * 1000 / len(order), (recent.misses - decoded_before) / len(order)


def measure(folder: str, size: int, batch_size: int, repeats: int, albumentations: bool) -> None:
    """Prints one data set's figures."""
    from utils.dataloaders.dataset import LoadImagesAndLabels
    from utils.dataloaders.labels import scan_images
    from utils.dataloaders.paths import list_images
    from utils.dataloaders.sampling import MosaicSampler

    paths = list_images([Path(folder)])
    table = scan_images(paths)

    def fresh(plan: MosaicSampler | None = None) -> LoadImagesAndLabels:
        dataset = LoadImagesAndLabels(table, size, batch_size, augment=True, hyp=PARAMS, plan=plan)
        dataset.albumentations = dataset.albumentations and albumentations
        return dataset

    windowed = MosaicSampler(len(table), batch_size, lanes=1, window=min(WINDOW, len(table)))
    warm = fresh()
    epoch_ms(warm, 0)
    decode_four_ms(paths)  # brings the files into the system's memory
    figures: dict[str, list[tuple[float, float]]] = {"first epoch": [], "later epochs": [], f"window of {WINDOW}": []}
    yardsticks = []
    for epoch in range(1, repeats + 1):
        yardsticks.append(decode_four_ms(paths))
        for name, dataset in zip(figures, (fresh(), warm, fresh(windowed)), strict=True):
            figures[name].append(epoch_ms(dataset, epoch))
    yardstick = min(yardsticks)
    print(f"\n{folder}: {len(table)} images at {size} px; decoding four takes {yardstick:.2f} ms")
    print(f"Albumentations' transforms: {'part of it' if warm.albumentations else 'none'}")
    print(f"{'':16}{'ms/image':>10}{'/ yardstick':>13}{'decoded/image':>15}")
    for name, runs in figures.items():
        milliseconds, decoded = min(runs)
        print(f"{name:16}{milliseconds:10.2f}{milliseconds / yardstick:13.2f}{decoded:15.2f}")


def main() -> None:
    """Measures all data sets."""
    options = parse_args()
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for entry in options.set:
        folder, _, size = entry.rpartition(":")
        measure(folder, int(size), options.batch_size, options.repeats, options.albumentations)


if __name__ == "__main__":
    main()
