"""Train a detector on your own images.

Examples:
    python train.py --cfg yolov5s-slimneck.yaml                          # from scratch, on the embedded data set
    python train.py --data coco128.yaml --weights yolov5s.pt --img 640   # fine-tune
    python train.py --resume                                             # resume the newest run
    python -m torch.distributed.run --nproc_per_node 2 train.py ...      # on two GPUs; --batch-size is of both together
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import CommandParser, echo_options, find_weights, number, options_from, run_command, with_hint
from utils.errors import MAX_IMAGE_SIDE_PX, UserError, check_img_size, explain_resource_errors, grid_stride
from utils.files import ROOT, find_file, increment_path, run_folder, write_yaml
from utils.log import LOGGER, logging_from

if TYPE_CHECKING:
    from utils.train.prepare import TrainConfig


def _batch_size(text: str) -> int:
    """Parses `--batch-size`: at least 1, or -1 for what the GPU's memory holds."""
    return -1 if text.strip() == "-1" else number(int, 1)(text)


def build_parser() -> argparse.ArgumentParser:
    """Declares the options: YOLOv5 6.1's names and meanings, and the defaults' only home."""
    parser = CommandParser("train.py", description="Train a detector on your own images.")
    add = parser.add_argument
    add("--weights", default="", help="checkpoint to start from; none trains from scratch")
    add("--cfg", default="", help="model YAML, such as yolov5s-slimneck.yaml; default: the checkpoint's own")
    act_help = "activation of the blocks: relu, hardswish, 'nn.LeakyReLU(0.1)' ...; default: --cfg's, else --weights'"
    add("--act", help=f"{act_help}, else silu")
    add("--no-inherit", action="store_true", help="fit nothing to --weights: take over only what is the same in --cfg")
    add("--teacher", default="", help="checkpoint of this size whose maps are learned, with the hyperparameter distill")
    add("--data", default=str(ROOT / "data" / "shapes.yaml"), help="data set YAML")
    add("--hyp", default=str(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"), help="hyperparameter YAML")
    recipe_help = "hyperparameters without --hyp: YOLOv5's, hyp.small.yaml, or (auto) that for runs of few steps"
    add("--recipe", choices=["auto", "yolov5", "small"], default="auto", help=recipe_help)
    add("--epochs", type=number(int, 1), default=300, help="number of epochs")
    add("--hours", type=number(float, 0), help="hours of training at most: fewer epochs, by how long the first takes")
    add("--batch-size", type=_batch_size, default=16, help="images per batch, over all GPUs; -1: what fits")
    add("--imgsz", "--img", "--img-size", type=number(int, 1, MAX_IMAGE_SIDE_PX), default=640, help="image side in px")
    # --rec was short for it before there was --recipe
    add("--rect", "--rec", action="store_true", help="rectangular batches, without shuffling and mosaic")
    add("--resume", nargs="?", const=True, default=False, help="resume the newest run, or this last.pt")
    add("--nosave", action="store_true", help="save checkpoints after the last epoch only")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--noautoanchor", action="store_true", help="keep the model's anchors unchecked")
    add("--noplots", action="store_true", help="draw no plots")
    add("--cache", nargs="?", const="ram", choices=["ram", "disk", "val"], help="cache images (val: only those)")
    add("--image-weights", action="store_true", help="sample images by class weight")
    add("--device", default="", help="cpu, mps, or a CUDA device such as 0; several with torch.distributed.run: 0,1")
    add("--multi-scale", action="store_true", help="vary the image size by up to 50%% per batch")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--optimizer", choices=["SGD", "Adam", "AdamW"], help="optimizer, in place of --hyp's (SGD)")
    add("--amp", choices=["auto", "off", "fp16", "bf16"], default="auto", help="mixed precision")
    add("--sync-bn", action="store_true", help="synchronise batch norm over all GPUs")
    add("--workers", type=number(int, 0), default=8, help="data loader processes (at most one per core)")
    add("--project", default=str(ROOT / "runs" / "train"), help="folder of the runs")
    add("--name", default="exp", help="the run's folder in it")
    add("--exist-ok", action="store_true", help="write into an existing folder")
    add("--quad", action="store_true", help="quad loader: collate four images into one of twice the size")
    add("--cos-lr", action="store_true", help="cosine instead of linear learning-rate schedule")
    add("--label-smoothing", type=number(float, 0, 1), help="label smoothing epsilon, in place of --hyp's")
    add("--box-loss", help="box loss by its name in utils/loss/iou.py, such as wiou, in place of --hyp's (ciou)")
    add("--patience", type=number(int, 0), default=100, help="epochs without improvement before stopping; 0: never")
    add("--freeze", nargs="+", type=number(int, 0), default=[0], help="freeze layers below n, or exactly several")
    add("--save-period", type=number(int, -1), default=-1, help="save epochN.pt every so many epochs")
    loggers_help = "experiment trackers, offline unless set up otherwise: mlflow, wandb, clearml, comet"
    add("--logger", nargs="+", action="extend", default=[], help=loggers_help)
    add("--seeds", type=number(int, 1), default=1, help="train so many times, with seeds from --seed on, and compare")
    add("--evolve", type=number(int, 1), nargs="?", const=300, help="search hyperparameters in so many trainings")
    add("--storage", default="", help="database URL by which searches share trials; default: a file in the folder")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed")
    add("--deterministic", action="store_true", help="on CUDA: the same result every time, slower (CPU: always)")
    add("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)  # launchers pass it
    return parser


def parse_opt(known: bool = False) -> argparse.Namespace:
    """Parses the command line; `known` passes over unknown options."""
    parser = build_parser()
    return parser.parse_known_args()[0] if known else parser.parse_args()


def run(callbacks: Any = None, **keywords: Any) -> TrainConfig:
    """Trains from Python: `run(cfg="yolov5n.yaml", imgsz=320)`; the options' names as keywords.

    Returns:
        The options used, with `save_dir`, and as `result` what `main` returns.

    Raises:
        UserError: what the command line would have refused.
    """
    from utils.train.prepare import TrainConfig

    config = TrainConfig(**vars(options_from(build_parser(), keywords)))
    config.result = main(config, callbacks, given=set(keywords))
    return config


def main(options: argparse.Namespace | TrainConfig, callbacks: Any = None, given: set[str] | None = None) -> Any:
    """Prepares the run that `options` describe, or the interrupted one to be resumed, and trains.

    Under torch.distributed.run this is one of several processes that train together.

    Returns:
        The final `EvalResult`, of `--seeds` the figures of each run, of `--evolve` the best hyperparameters; None where
        a callback stopped it, and on other processes than the first.
    """
    from utils.callbacks import Callbacks
    from utils.train.distributed import World, process_group
    from utils.train.prepare import TrainConfig, check_options
    from utils.train.seeds import run_seeds

    config = options if isinstance(options, TrainConfig) else TrainConfig(**vars(options))
    processes = World.from_environment(config.local_rank)
    with process_group(processes) as world, explain_resource_errors(_sizes(config)):
        check_options(config, world.size)
        if given is None and (config.resume or config.recipe != "yolov5"):
            given = _given_options()
        callbacks = callbacks or Callbacks()
        if config.seeds == 1:
            return _train_once(config, callbacks, given, world)
        if config.evolve or isinstance(config.resume, str):
            raise UserError("--seeds goes with neither --evolve nor a file to --resume: leave one out.")
        with with_hint(lambda: "Finished runs are kept. Go on with the same command and --resume."):
            return run_seeds(config, callbacks, lambda own: _train_once(own, callbacks, given, world))


def _train_once(config: TrainConfig, callbacks: Any, given: set[str] | None, world: Any) -> Any:
    """Reads the hyperparameters or the checkpoint that `config` names, and trains, or searches."""
    from utils.train.evolve import masked
    from utils.train.hyp import Hyp
    from utils.train.prepare import check_options
    from utils.train.resume import CHANGEABLE, resume_options

    if config.evolve and config.project == build_parser().get_default("project"):
        config.project = str(ROOT / "runs" / "evolve")
    if config.resume and not config.evolve:
        given = given & CHANGEABLE if config.seeds > 1 else given  # their other options were compared
        checkpoint = resume_options(config, given, vars(build_parser().parse_args([])))
        check_options(config, world.size)
        hyp = Hyp.from_dict(checkpoint["hyp"], source=config.resume)
    else:
        checkpoint = None
        if config.recipe != "yolov5" and "hyp" in given:
            LOGGER.info(f"--hyp {config.hyp} holds, --recipe {config.recipe} chooses nothing")
            config.recipe = "yolov5"
        hyp = Hyp.from_yaml(find_file(config.hyp, (".yaml", ".yml"), "--hyp"))
        run_folder(config.project, config.name)  # refused, if at all, before anything is read
    echo_options("train", dataclasses.replace(config, storage=masked(config.storage)))
    if config.evolve:
        return _evolve(hyp, config, callbacks, world)
    return train(hyp, config, callbacks, checkpoint, world)


def _evolve(hyp: Any, config: TrainConfig, callbacks: Any, world: Any) -> Any:
    """Searches hyperparameters: reads the data once, then trains again and again; returns the best."""
    from utils.train.distributed import own_device
    from utils.train.evolve import evolve, import_optuna, search_space
    from utils.train.fingerprint import tensors_digest
    from utils.train.prepare import Shared, prepare_device, with_options

    import_optuna()  # refused before anything is read
    folder = run_folder(config.project, config.name)
    if config.resume and not config.storage and not (folder / "evolve.db").exists():
        raise UserError(f"--evolve --resume: no search in {folder}. Name its folder with --project and --name.")
    device, shared = own_device(config.device, world), Shared()
    prepare_device(config, device)
    hyp, model, loaders, _ = _prepare(with_options(hyp, config), config, device, None, world, shared)
    config.save_dir = str(increment_path(folder, exist_ok=config.exist_ok or config.resume, mkdir=True))
    space, data = search_space(hyp, model.head, config.noautoanchor), tensors_digest(loaders.dataset)
    advice = f"Finished trials are kept. Go on with the same command{'' if config.storage else ' and --resume'}."

    def train_once(own: Any) -> Any:
        return train(own, dataclasses.replace(config), callbacks, None, world, shared)

    with with_hint(lambda: advice):
        return evolve(hyp, config, space, data, train_once, callbacks)


def train(
    hyp: Any,
    config: TrainConfig,
    callbacks: Any,
    checkpoint: dict[str, Any] | None = None,
    world: Any = None,
    shared: Any = None,
) -> Any:
    """Builds data, model and trainer, and trains.

    Args:
        hyp: `utils.train.hyp.Hyp`, unscaled.
        config: the options, sound; what depends on model and data is settled in it.
        callbacks: `utils.callbacks.Callbacks`, called in the first process alone.
        checkpoint: of the run to be resumed.
        world: `utils.train.distributed.World`, connected; None for this process alone.
        shared: `utils.train.prepare.Shared`, where it is one of a search's trainings.
    """
    from models.backends.pytorch import compare_with_cpu
    from models.inference.evaluation import module_predictor
    from utils.callbacks import Callbacks
    from utils.devices import device_line, prepare_cpu_memory
    from utils.train import fingerprint
    from utils.train.distributed import ALONE, lost_processes, own_device
    from utils.train.engine import Trainer
    from utils.train.prepare import Shared, prepare_device, with_options

    world = world or ALONE
    callbacks = callbacks if world.is_main else Callbacks()
    try:
        callbacks.run("on_pretrain_routine_start")
        hyp = with_options(hyp, config)
        device = own_device(config.device, world)
        prepare_device(config, device, world.size)  # refused, if at all, before anything is written
        prepare_cpu_memory(device)
        asked = config.batch_size
        with logging_from(logging.ERROR) if shared else world.rank_zero_logging():
            LOGGER.info(device_line(device) + "\n")
            hyp, model, loaders, teacher = _prepare(hyp, config, device, checkpoint, world, shared or Shared())
        if config.batch_size != asked:
            callbacks.run("on_params_update", {"batch_size": config.batch_size})
        callbacks.run("on_pretrain_routine_end")
        if device.type == "mps":
            compare_with_cpu(model, device)
        trainer = Trainer(model, hyp, config, loaders, device, callbacks, module_predictor, checkpoint, world, teacher)
        with (
            with_hint(trainer.how_to_resume),
            lost_processes(world),
            explain_resource_errors(_sizes(config)),
            contextlib.closing(trainer),
        ):
            result = trainer.train()
        if result is not None and not config.evolve:
            LOGGER.info(fingerprint.summary(config.save_dir))
        return result
    finally:
        callbacks.run("teardown")
        callbacks.trainer = None


def _prepare(
    hyp: Any, config: TrainConfig, device: Any, checkpoint: dict[str, Any] | None, world: Any, shared: Any
) -> tuple:
    """Makes the model, the loaders and then the run's folder; returns hyperparameters, model, loaders and the teacher.

    Here `config` is settled. What can be refused is so before the folder is there. The first process settles and
    writes. What `shared` holds already is not read again.
    """
    from models.load import build_for_training, read_weights
    from utils.autoanchor import check_anchors
    from utils.dataloaders.config import load_spec
    from utils.train.prepare import (
        absolute_data,
        build_loaders,
        choose_recipe,
        fitting_batch_size,
        freeze_layers,
        load_tables,
        warn_of_large,
        warn_of_unread,
    )
    from utils.train.resume import check_dataset, check_names, checkpoint_errors

    settled = shared.spec is not None
    with world.rank_zero_first():  # the first may have to download
        spec = shared.spec = shared.spec or load_spec(config.data)
        config.data = absolute_data(config.data, spec)
        names = {0: "item"} if config.single_cls and spec.nc != 1 else spec.names
        if checkpoint:
            with checkpoint_errors(config.resume):
                check_names(checkpoint, names, config.resume, config.data)
            model = build_for_training(checkpoint["yaml"], names, config.seed, source=config.resume, verbose=False)
        else:
            given = shared.weights or (read_weights(config.weights) if config.weights else None)
            model = _new_model(given, names, hyp, config)
    warn_of_unread(hyp, model.head)
    freeze_layers(model, config.freeze)
    model, stride = model.to(device), grid_stride(model.stride)
    teacher = _load_teacher(model, config, checkpoint, world) if config.teacher else None
    config.imgsz = check_img_size(config.imgsz, stride, floor=2 * stride)
    if config.batch_size == -1:
        config.batch_size = fitting_batch_size(model, config, stride)
    tables = shared.tables = shared.tables or load_tables(spec, config, world)
    if not checkpoint and not settled:
        hyp = choose_recipe(hyp, config, len(tables["train"]))
    config.optimizer = hyp.optimizer
    loaders = build_loaders(spec, tables, stride, hyp, config, world, shared.images)
    if checkpoint:
        if world.is_main:
            with checkpoint_errors(config.resume):
                check_dataset(checkpoint, loaders.dataset, config.resume, config.data)
        return hyp, model, loaders, teacher
    if world.is_main:  # whose weights the others are given
        warn_of_large(tables["train"], model.head, config.imgsz)
        if given:
            shared.weights = _start_from(given, model, tables["train"], hyp, config, fitted=bool(shared.weights))
        if model.head.has_anchors and not config.noautoanchor:
            check_anchors(loaders.train.dataset, model, hyp.anchor_t, config.imgsz, config.seed)
        model.half().float()  # as YOLOv5 does: what is trained and what is saved (float16) agree on the anchors
    if not config.evolve:
        _open_folder(hyp, config, loaders.train.dataset.table.rows, names, world)
    return hyp, model, loaders, teacher


def _load_teacher(model: Any, config: TrainConfig, checkpoint: dict[str, Any] | None, world: Any) -> Any:
    """Opens `--teacher` for a model, on its device; a resumed run's must be the one that it was begun with."""
    from models.load import load_model
    from utils.loss.distill import Teacher
    from utils.train.fingerprint import tensors_digest

    with world.rank_zero_first():  # the first may have to download
        (path,) = find_weights(config.teacher, "--teacher")
        loaded = load_model(path)
    config.teacher = str(path.absolute())
    digest = tensors_digest(loaded.state_dict())
    if checkpoint and digest != checkpoint.get("teacher"):
        raise UserError(
            f"--resume {config.resume}: its teacher, {path}, has other weights than when the run was begun. Put that "
            f"file back, or start a new run with --weights {config.resume}."
        )
    return Teacher(loaded.to(next(model.parameters()).device).fuse(), model, digest, config.teacher)


def _new_model(weights: Any, names: dict[int, str], hyp: Any, config: TrainConfig) -> Any:
    """Builds `--cfg`, or what `models.load.Weights` are of, with initial weights and the activation of `--act`."""
    from models.common import activation_key
    from models.load import build_for_training

    cfg, source = (config.cfg, "") if config.cfg else (weights.yaml, weights.path)
    learned, activation = weights.yaml.get("activation") if weights else None, None
    if config.act is not None:
        try:
            activation = activation_key(config.act)
        except ValueError as error:
            raise UserError(f"--act {error}") from error
    elif config.cfg and learned and not _read_cfg(cfg).get("activation"):
        activation = learned
        LOGGER.info(f"{cfg} says no activation: it is that of {config.weights}, {learned} (--act says another)")
    if activation is not None:
        cfg, source = {**(cfg if source else _read_cfg(cfg)), "activation": activation}, source or cfg
    model = build_for_training(cfg, names, config.seed, hyp.anchors, source)
    if config.noautoanchor and isinstance(model.yaml.get("anchors"), int):
        raise UserError("--noautoanchor: this model's YAML has no anchors of its own (`anchors: 3`). Leave it out.")
    return model


def _read_cfg(cfg: str) -> dict[str, Any]:
    """Reads the model YAML that `--cfg` names."""
    from models.config import read_config

    return read_config(find_file(cfg, (".yaml", ".yml"), "--cfg"))[0]


def _start_from(weights: Any, model: Any, table: Any, hyp: Any, config: TrainConfig, fitted: bool = False) -> Any:
    """Gives a new model what `models.load.Weights` hold, and says what.

    Where `--cfg` is a slim twin of their model, that is first fitted to it, as a model of the file's own classes.
    Returns such weights, which may be given again as `fitted`; None where there are none.
    """
    import torch

    from models import transplant
    from models.load import model_from, transfer, with_classes_of
    from utils.devices import resolve_amp

    exclude = ("anchor",) if config.cfg and not fitted or hyp.anchors else ()
    rows = [[*yaml["backbone"], *yaml["head"]] for yaml in (model.yaml, weights.yaml)]
    if config.cfg and not config.no_inherit and rows[0] != rows[1]:
        device = next(model.parameters()).device
        teacher = model_from(weights).for_inference().to(device, memory_format=torch.channels_last)
        try:
            cfg = {**_read_cfg(config.cfg), "activation": model.yaml.get("activation")}
            student = transplant.make_student(teacher, cfg, config.seed)
            if len(table) < transplant.MIN_IMAGES:
                raise UserError(
                    f"{len(table)} training images are too few, at least {transplant.MIN_IMAGES} are needed."
                )
        except UserError as error:
            LOGGER.info(f"{config.cfg} is not fitted to {config.weights}: {error}")
        else:
            LOGGER.info(f"Fitting {config.cfg} to {config.weights} (--no-inherit leaves that out) ...")
            images = transplant.augmented_images(
                table, config.imgsz, transplant.BATCH_SIZE, transplant.IMAGES, config.workers, config.seed
            )
            transplant.log_fits(
                transplant.inherit(student, teacher, images, seed=config.seed, dtype=resolve_amp(config.amp, device))
            )
            state = {key: tensor.cpu() for key, tensor in student.state_dict().items()}
            if not transplant.same_heads(student, teacher):  # the student's is as new as the model's
                head = f"model.{len(student.model) - 1}."
                state = {key: tensor for key, tensor in state.items() if not key.startswith(head)}
            weights = dataclasses.replace(weights, yaml=student.yaml, state_dict=state)
            fitted = True
            exclude = ("anchor",) if hyp.anchors else ()
    source = weights
    if config.recipe == "small":  # with few images what a head knows of boxes is much
        source = with_classes_of(model, weights)
    LOGGER.info(transfer(model, source, exclude).told(config.weights))
    return weights if fitted else None


def _open_folder(hyp: Any, config: TrainConfig, rows: Any, names: dict[int, str], world: Any) -> None:
    """Settles the run's folder; the first process makes it, with hyp.yaml, opt.yaml and plots of the labels' rows."""
    folder = run_folder(config.project, config.name)
    folder = increment_path(folder, exist_ok=config.exist_ok, mkdir=True) if world.is_main else folder
    config.save_dir = world.broadcast_str(str(folder))
    if world.is_main:
        write_yaml(Path(config.save_dir) / "hyp.yaml", hyp.to_dict())
        write_yaml(Path(config.save_dir) / "opt.yaml", vars(config))
        if not config.noplots:
            from utils.plots.training import plot_labels

            plot_labels(rows, names, Path(config.save_dir))


def _sizes(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that decide how much memory a run takes."""
    return {"--batch-size": config.batch_size, "--imgsz": config.imgsz, "--workers": config.workers}


def _given_options() -> set[str]:
    """Returns the names of the options that stand on the command line, whatever their values."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_known_args()[0]))


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
