"""Train a detector on your own images.

Examples:
    python train.py --cfg yolov5s-slimneck.yaml                          # from scratch, on the embedded data set
    python train.py --data coco128.yaml --weights yolov5s.pt --img 640   # fine-tune
    python train.py --resume                                             # go on with the newest interrupted run
    python -m torch.distributed.run --nproc_per_node 2 train.py ...      # on two GPUs; --batch-size is of both together
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from utils.cli import CommandParser, echo_options, number, options_from, run_command, with_hint
from utils.errors import MAX_IMAGE_SIDE_PX, UserError, explain_resource_errors
from utils.files import ROOT, find_file, increment_path, run_folder, write_yaml
from utils.log import LOGGER


def _batch_size(text: str) -> int:
    """Parses `--batch-size`: at least 1, or -1 for what the GPU's memory holds."""
    return -1 if text.strip() == "-1" else number(int, 1)(text)


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = CommandParser("train.py", description="Train a detector on your own images.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint to start from; none trains from scratch")
    add("--cfg", default="", help="model YAML, such as yolov5s-slimneck.yaml; default: the checkpoint's own")
    add("--data", default=str(ROOT / "data" / "shapes.yaml"), help="data set YAML")
    add("--hyp", default=str(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"), help="hyperparameter YAML")
    add("--epochs", type=number(int, 1), default=300, help="epochs in all")
    add("--batch-size", type=_batch_size, default=16, help="images per batch, over all GPUs; -1: what fits")
    add("--imgsz", "--img", "--img-size", type=number(int, 1, MAX_IMAGE_SIDE_PX), default=640, help="image side in px")
    add("--rect", action="store_true", help="rectangular batches, without shuffling and mosaic")
    add("--resume", nargs="?", const=True, default=False, help="go on with the newest run, or with this last.pt")
    add("--nosave", action="store_true", help="save checkpoints after the last epoch only")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--noautoanchor", action="store_true", help="keep the model's anchors without checking them")
    add("--noplots", action="store_true", help="draw no pictures")
    add("--cache", nargs="?", const="ram", choices=["ram", "disk", "val"], help="cache images (val: only those)")
    add("--image-weights", action="store_true", help="draw images of badly learnt classes more often")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0; several with torch.distributed.run: 0,1")
    add("--multi-scale", action="store_true", help="vary the image size by up to 50%% from batch to batch")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--optimizer", choices=["SGD", "Adam", "AdamW"], default="SGD", help="optimizer")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="mixed precision")
    add("--sync-bn", action="store_true", help="batch statistics over all GPUs, when there are several")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--project", default=str(ROOT / "runs" / "train"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--quad", action="store_true", help="collate four images into one of twice the size")
    add("--cos-lr", action="store_true", help="cosine instead of linear learning rate")
    add("--label-smoothing", type=number(float, 0, 1), help="label smoothing epsilon, in place of --hyp's")
    add("--patience", type=number(int, 0), default=100, help="stop after this many epochs without gain; 0: never")
    add("--freeze", nargs="+", type=number(int, 0), default=[0], help="n: layers below n; several: exactly those")
    add("--save-period", type=number(int, -1), default=-1, help="keep epochN.pt every so many epochs")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all randomness")
    add("--deterministic", action="store_true", help="on CUDA: the same result every time, slower (CPU: always)")
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

    Under torch.distributed.run this is one of several processes that train together.

    Returns:
        The final `EvalResult`, or None where a callback stopped the run, and on other processes than the first.
    """
    from utils.callbacks import Callbacks
    from utils.train.distributed import World, explained, process_group
    from utils.train.hyp import Hyp
    from utils.train.prepare import check_options
    from utils.train.resume import check_resume, resume_options

    processes = World.from_environment(options.local_rank)
    with process_group(processes) as world, explained(world, _not_begun), explain_resource_errors(_sizes(options)):
        check_resume(options.resume)
        check_options(options, world)
        if options.resume:
            given = _given_options() if given is None else given
            checkpoint = resume_options(options, given, vars(build_parser().parse_args([])))
            check_options(options, world)
            hyp = Hyp.from_dict(checkpoint["hyp"], source=options.resume)
        else:
            checkpoint = None
            hyp = Hyp.from_yaml(find_file(options.hyp, (".yaml", ".yml"), "--hyp"))
            run_folder(options.project, options.name)  # refused, if at all, before anything is read
        echo_options("train", options)
        return train(hyp, options, callbacks or Callbacks(), checkpoint, world)


def train(
    hyp: Any, options: argparse.Namespace, callbacks: Any, checkpoint: dict | None = None, world: Any = None
) -> Any:
    """Builds data, model and trainer, and trains.

    Args:
        hyp: `utils.train.hyp.Hyp`, unscaled.
        options: the parsed options; `save_dir` is added to them.
        callbacks: `utils.callbacks.Callbacks`, called in the first process alone.
        checkpoint: of the run to be resumed.
        world: `utils.train.distributed.World`, connected; None for this process alone.
    """
    from utils.callbacks import Callbacks
    from utils.devices import device_line, prepare_cpu_memory, resolve_amp
    from utils.train import fingerprint
    from utils.train.distributed import ALONE, check_sync_bn, own_device
    from utils.train.engine import Trainer
    from utils.train.prepare import prepare_determinism

    world = world or ALONE
    callbacks = callbacks if world.is_main else Callbacks()
    with contextlib.ExitStack() as ends:
        ends.callback(callbacks.run, "teardown")
        callbacks.run("on_pretrain_routine_start")
        hyp = _with_smoothing(hyp, options.label_smoothing)
        device = own_device(options.device, world)
        resolve_amp(options.amp, device)  # refused, if at all, before anything is written
        prepare_cpu_memory(device)
        LOGGER.info(device_line(device) + "\n")
        if options.sync_bn:
            check_sync_bn(device, world)
        if options.deterministic:
            prepare_determinism(device)
        asked = options.batch_size
        with world.rank_zero_logging():
            model, loaders = _prepare(hyp, options, device, checkpoint, world)
        if options.batch_size != asked:
            callbacks.run("on_params_update", {"batch_size": options.batch_size})
        callbacks.run("on_pretrain_routine_end")
        trainer = Trainer(model, hyp, options, loaders, device, callbacks, checkpoint, world)
        with with_hint(trainer.how_to_resume), explain_resource_errors(_sizes(options)), contextlib.closing(trainer):
            result = trainer.train()
        if result is not None:
            LOGGER.info(fingerprint.summary(options.save_dir))
        return result


def _prepare(hyp: Any, options: argparse.Namespace, device: Any, checkpoint: dict | None, world: Any) -> tuple:
    """Makes the model, the loaders and then the run's folder; returns the first two.

    What can be refused is so before the folder is there. The first process settles and writes.
    """
    from models.load import build_for_training
    from utils.dataloaders.config import load_spec
    from utils.train import prepare as setup
    from utils.train.resume import check_dataset, check_names, checkpoint_errors

    with world.rank_zero_first():  # the first may have to download
        spec = load_spec(options.data)
        options.data = setup.settled_data(options.data, spec)
        names = {0: "item"} if options.single_cls and spec.nc != 1 else spec.names
        if checkpoint:
            with checkpoint_errors(options.resume):
                check_names(checkpoint, names, options)
        model = build_for_training(options, names, hyp.anchors, checkpoint).to(device)
    if len(names) == 1 and hyp.label_smoothing:
        LOGGER.warning("WARNING: --label-smoothing has no effect: one class (as of --single-cls) has no class loss")
    setup.freeze_layers(model, options.freeze)
    options.imgsz = setup.image_side(model, options)
    if options.batch_size == -1:
        options.batch_size = setup.fitting_batch_size(model, options, device)
    tables = setup.load_tables(spec, options.single_cls, options.workers, world)
    loaders = setup.build_loaders(tables, spec, model, hyp, options, world)
    if world.is_main and not checkpoint:
        setup.init_anchors_and_weights(model, loaders.train.dataset, hyp, options)
    if checkpoint:
        if world.is_main:
            with checkpoint_errors(options.resume):
                check_dataset(checkpoint, loaders.dataset, options)
        return model, loaders
    folder = run_folder(options.project, options.name)
    folder = increment_path(folder, exist_ok=options.exist_ok, mkdir=True) if world.is_main else folder
    options.save_dir = world.broadcast_str(str(folder))
    if world.is_main:
        write_yaml(Path(options.save_dir) / "hyp.yaml", hyp.to_dict())
        write_yaml(Path(options.save_dir) / "opt.yaml", vars(options))
        if not options.noplots:
            from utils.plots.training import plot_labels

            plot_labels(tables.train.rows, names, Path(options.save_dir))
    return model, loaders


def _with_smoothing(hyp: Any, label_smoothing: float | None) -> Any:
    """Returns hyperparameters in which the option `--label-smoothing`, where it is given, has replaced the file's."""
    if label_smoothing is None:
        return hyp
    try:
        return dataclasses.replace(hyp, label_smoothing=label_smoothing)
    except UserError as error:
        raise UserError(f"--label-smoothing: {error}") from error


def _not_begun() -> str:
    """Says what an interruption has cost before the first epoch."""
    return "Training had not begun."


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that decide how much memory a run takes."""
    return {"--batch-size": options.batch_size, "--imgsz": options.imgsz, "--workers": options.workers}


def _given_options() -> set[str]:
    """Returns the names of the options that stand on the command line, whatever their values."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args()[0]))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
