"""Times one training step as this program takes it against the plain one: float32, contiguous tensors.

Both in one process, by turns, so that a busy machine slows both alike; what is printed last is the ratio of the
medians. A step is forward, loss, backward, clipping, optimizer and EMA, on one synthetic batch.

    python benchmarks/train_step.py --cfg yolov5s.yaml --img 640 --batch-size 4
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.yolo import Model  # noqa: E402 - the path above comes first
from utils.devices import device_line, resolve_amp, select_device  # noqa: E402
from utils.files import find_file  # noqa: E402
from utils.loss import ComputeLoss  # noqa: E402
from utils.train.ema import ModelEMA  # noqa: E402
from utils.train.hyp import Hyp  # noqa: E402
from utils.train.optim import build_optimizer  # noqa: E402


class Step:
    """A model with all that one training step needs, in one memory format and precision."""

    def __init__(self, cfg: str, imgsz: int, device: torch.device, channels_last: bool, dtype: torch.dtype | None):
        """Builds the model in its memory format; `dtype` None is float32 throughout."""
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = Model(find_file(cfg, (".yaml",))).to(device).to(memory_format=self.layout).train()
        hyp = ComputeLoss.scaled(Hyp.from_yaml(find_file("hyp.scratch-low.yaml")), self.model.head, imgsz)
        self.model.hyp = hyp.to_dict()
        self.loss = ComputeLoss(self.model)
        self.optimizer = build_optimizer(self.model, "SGD", hyp.lr0, hyp.momentum, hyp.weight_decay)
        self.ema = ModelEMA(self.model)

    def __call__(self, images: Tensor, targets: Tensor) -> float:
        """Takes a step on uint8 (B, 3, H, W) and targets (M, 6); returns its seconds."""
        start = time.perf_counter()
        inputs = images.to(self.device).to(dtype=torch.float32, memory_format=self.layout) / 255
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            outputs = self.model(inputs)
        self.loss(outputs, targets)[0].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def batch(size: int, imgsz: int) -> tuple[Tensor, Tensor]:
    """Makes random images and eight boxes in each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, imgsz, imgsz), dtype=torch.uint8, generator=generator)
    targets = torch.rand(size * 8, 6, generator=generator) * 0.5 + 0.2
    targets[:, 0] = torch.arange(size).repeat_interleave(8)
    targets[:, 1] = torch.arange(size * 8) % 80
    return images, targets


def main() -> None:
    """Times both steps by turns and prints medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", default="yolov5s.yaml")
    parser.add_argument("--img", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="")
    options = parser.parse_args()
    device = select_device(options.device)
    dtype = resolve_amp("auto", device)
    steps = {
        "float32, contiguous": Step(options.cfg, options.img, device, channels_last=False, dtype=None),
        "float32, channels_last": Step(options.cfg, options.img, device, channels_last=True, dtype=None),
        f"--amp auto ({dtype or 'float32'}), channels_last": Step(options.cfg, options.img, device, True, dtype),
    }
    data = batch(options.batch_size, options.img)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            seconds = step(*data)
            if turn:  # the first turn warms up
                times[name].append(seconds)
    setting = f"{options.cfg}, {options.img} px, batch {options.batch_size}, {options.rounds} rounds"
    print(f"{device_line(device)}; {setting}")
    plain = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:45s} {median * 1000:8.1f} ms a step, {median / plain:.2f} of the plain step")


if __name__ == "__main__":
    main()
