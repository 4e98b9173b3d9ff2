"""The command line of `models/yolo.py`: builds a model, shows and times its layers, or builds every YAML there is.

python models/yolo.py --cfg yolov5s-slimneck.yaml --profile
"""

from __future__ import annotations

import argparse

import torch

from models.summary import profile_layers
from models.yolo import Model
from utils.checks import UserError
from utils.cli import ReportedError, run_command
from utils.devices import select_device
from utils.files import ROOT
from utils.log import LOGGER, progress

PROFILE_PX = 640
PROFILE_BATCH = {"cuda": 8}  # images; one on other devices


def build_all() -> None:
    """Builds every model YAML of the repository.

    Raises:
        ReportedError: some do not build; they have been logged.
    """
    failures = 0
    for path in progress(sorted((ROOT / "models").rglob("yolo*.yaml")), desc="building"):
        try:
            with torch.device("meta"):
                Model(path)
        except UserError as error:
            failures += 1
            LOGGER.error(f"{path}: {error}")
    if failures:
        raise ReportedError(f"{failures} model YAMLs do not build")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the script's options."""
    parser = argparse.ArgumentParser(prog="yolo.py", description="Build a model and show its layers.")
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model YAML")
    parser.add_argument("--device", default="", help="cuda device (0), mps or cpu; empty chooses")
    parser.add_argument("--profile", action="store_true", help=f"time every layer on random images of {PROFILE_PX} px")
    parser.add_argument("--test", action="store_true", help="build every models/**/yolo*.yaml")
    return parser


def main(options: argparse.Namespace) -> None:
    """Builds the model that the options name; times its layers, builds all others, as they say."""
    device = select_device(options.device)
    model = Model(options.cfg, verbose=True).to(device)
    if options.profile:
        shape = PROFILE_BATCH.get(device.type, 1), model.yaml["ch"], PROFILE_PX, PROFILE_PX
        image = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
        with torch.no_grad():
            profile_layers(model.eval(), image)
    if options.test:
        build_all()


def run() -> int:
    """Parses the command line, does what it says and returns the exit status."""
    return run_command(main, build_parser())
