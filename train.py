"""Train a detector on your own images.

Examples:
    python train.py --cfg yolov5s-slimneck.yaml                          # from scratch, on the embedded data set
    python train.py --data coco128.yaml --weights yolov5s.pt --img 640   # fine-tune
    python train.py --resume                                             # go on with the newest interrupted run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from utils.checks import UserError
from utils.cli import echo_options, number, options_from, run_command
from utils.files import ROOT, find_file, increment_path, write_yaml
from utils.log import LOGGER


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = argparse.ArgumentParser("train.py", description="Train a detector on your own images.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint to start from; none trains from scratch")
    add("--cfg", default="", help="model YAML, such as yolov5s-slimneck.yaml; default: the checkpoint's own")
    add("--data", default=str(ROOT / "data" / "shapes.yaml"), help="data set YAML")
    add("--hyp", default=str(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"), help="hyperparameter YAML")
    add("--epochs", type=number(int, 1), default=300, help="epochs in all")
    add("--batch-size", type=number(int, 1), default=16, help="images per batch")
    add("--imgsz", "--img", "--img-size", type=number(int, 1), default=640, help="image side in pixels")
    add("--rect", action="store_true", help="rectangular batches, without shuffling and mosaic")
    add("--resume", nargs="?", const=True, default=False, help="go on with the newest run, or with this last.pt")
    add("--nosave", action="store_true", help="save checkpoints after the last epoch only")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--noautoanchor", action="store_true", help="keep the model's anchors without checking them")
    add("--noplots", action="store_true", help="draw no pictures")
    add("--cache", nargs="?", const="ram", choices=["ram", "disk", "val"], help="cache images (val: only those)")
    add("--image-weights", action="store_true", help="draw images of badly learnt classes more often")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0")
    add("--multi-scale", action="store_true", help="vary the image size by up to 50%% from batch to batch")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--optimizer", choices=["SGD", "Adam", "AdamW"], default="SGD", help="optimizer")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="mixed precision")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--project", default=str(ROOT / "runs" / "train"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--quad", action="store_true", help="collate four images into one of twice the size")
    add("--cos-lr", action="store_true", help="cosine instead of linear learning rate")
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help="label smoothing epsilon")
    add("--patience", type=number(int, 0), default=100, help="stop after this many epochs without gain; 0: never")
    add("--freeze", nargs="+", type=number(int, 0), default=[0], help="n: layers below n; several: exactly those")
    add("--save-period", type=number(int, -1), default=-1, help="keep epochN.pt every so many epochs")
    add("--seed", type=number(int, 0), default=0, help="seed of all randomness")
    add("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)  # launchers pass it
    return parser


def parse_opt(known: bool = False) -> argparse.Namespace:
    """Parses the command line; `known` passes over unknown options."""
    parser = build_parser()
    return parser.parse_known_args()[0] if known else parser.parse_args()


def run(callbacks: Any = None, **keywords: Any) -> argparse.Namespace:
    """Trains from Python: `run(cfg="yolov5n.yaml", imgsz=320)`; the options' names as keywords.

    Returns:
        The options used, with `save_dir`.

    Raises:
        UserError: what the command line would have refused.
    """
    options = options_from(build_parser(), keywords)
    main(options, callbacks, given=set(keywords))
    return options


def main(options: argparse.Namespace, callbacks: Any = None, given: set[str] | None = None) -> Any:
    """Prepares the run that `options` describe, or the interrupted one to be resumed, and trains.

    Returns:
        The final `EvalResult`, or None where a callback stopped the run.
    """
    _check_options(options)
    from utils.train.callbacks import Callbacks
    from utils.train.hyp import Hyp
    from utils.train.resume import resume_options

    if options.resume:
        given = _given_options() if given is None else given
        checkpoint = resume_options(options, given, vars(build_parser().parse_args([])))
        hyp = Hyp.from_dict(checkpoint["hyp"])
    else:
        checkpoint = None
        hyp = Hyp.from_yaml(find_file(options.hyp, (".yaml", ".yml"), "--hyp"))
    echo_options("train", options)
    return train(hyp, options, callbacks or Callbacks(), checkpoint)


def train(hyp: Any, options: argparse.Namespace, callbacks: Any, checkpoint: dict | None = None) -> Any:
    """Builds data, model and trainer, and trains.

    Args:
        hyp: `utils.train.hyp.Hyp`, unscaled.
        options: the parsed options; `save_dir` is added to them.
        callbacks: `utils.train.callbacks.Callbacks`.
        checkpoint: of the run to be resumed.
    """
    from utils.data.spec import load_spec
    from utils.devices import device_line, prepare_cpu_memory, select_device
    from utils.train import setup
    from utils.train.engine import Trainer

    device = select_device(options.device, options.batch_size)
    prepare_cpu_memory(device)
    LOGGER.info(device_line(device) + "\n")
    spec = load_spec(options.data)
    names = {0: "item"} if options.single_cls and spec.nc != 1 else spec.names
    model = _build_model(options, hyp, names, checkpoint)
    if not checkpoint:
        folder = increment_path(Path(options.project) / options.name, exist_ok=options.exist_ok, mkdir=True)
        options.save_dir = str(folder)
        write_yaml(folder / "hyp.yaml", hyp.to_dict())
        write_yaml(folder / "opt.yaml", vars(options))
    tables = setup.load_tables(spec, options.single_cls, options.workers)
    if not checkpoint:
        setup.settle_weights(model, tables.train, hyp, options)
        if not options.noplots:
            from utils.train.plots import plot_labels

            plot_labels(tables.train.rows, names, Path(options.save_dir))
    loaders = setup.build_loaders(tables, spec, model, hyp, options)
    callbacks.run("on_pretrain_routine_end")
    trainer = Trainer(model.to(device), hyp, options, loaders, device, callbacks, checkpoint)
    try:
        return trainer.train()
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(trainer.how_to_resume()) from interrupt
    finally:
        trainer.close()


def _build_model(options: argparse.Namespace, hyp: Any, names: dict[int, str], checkpoint: dict | None) -> Any:
    """Builds the architecture of `--cfg`, or of the checkpoint, with the data's classes; takes what weights fit."""
    import torch

    from models.load import read_weights, transfer
    from models.yolo import Model

    weights = read_weights(options.weights) if options.weights and not checkpoint else None
    if checkpoint:
        cfg = checkpoint["yaml"]
    else:
        cfg = find_file(options.cfg, (".yaml", ".yml"), "--cfg") if options.cfg else weights.yaml
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        anchors = None if checkpoint else hyp.anchors
        model = Model(cfg, nc=len(names), anchors=anchors, verbose=not checkpoint)
    model.names = names
    if weights:
        exclude = ("anchor",) if options.cfg or hyp.anchors else ()
        moved = transfer(model, weights.state_dict, exclude)
        LOGGER.info(f"Transferred {moved.loaded}/{moved.total} items from {options.weights}")
    return model


def _check_options(options: argparse.Namespace) -> None:
    """Refuses combinations that no run can satisfy."""
    if not options.cfg and not options.weights and not options.resume:
        raise UserError("neither --cfg nor --weights is given: name a model, for example --cfg yolov5s-slimneck.yaml.")
    if options.weights and not options.weights.endswith(".pt"):
        raise UserError(f"--weights {options.weights}: a checkpoint ending in .pt is expected here.")
    if options.quad and options.batch_size % 4:
        raise UserError(f"--quad collates images by fours: --batch-size {options.batch_size} is not a multiple of 4.")


def _given_options() -> set[str]:
    """Returns the names of the options that stand on the command line, whatever their values."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args()[0]))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
