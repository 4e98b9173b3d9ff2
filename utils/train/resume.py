"""Resuming an interrupted run: which checkpoint, with which options, and on the data that it was begun on.

The run's own options hold; a few that do not change its result may be given anew, and where its data was moved to. The
checkpoint's state is taken over by `utils.train.engine.Trainer`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.log import LOGGER, colorstr
from utils.train.fingerprint import dataset_changes
from utils.train.prepare import TrainConfig

STATE_KINDS = {  # what a resumable checkpoint holds beside tensors
    **dict.fromkeys("model ema optimizer scaler schedule stopper generators opt hyp yaml".split(), dict),
    **dict.fromkeys(("updates", "epoch"), int),
    "best_fitness": (int, float),
}
NEEDED_OPTIONS = ("data", "epochs", "batch_size", "imgsz")  # without them another run would begin
CHANGEABLE = set("cache data device local_rank logger noplots patience resume save_period workers".split())


def find_resumable(resume: str | Path | bool) -> Path:
    """Returns the checkpoint that `--resume` names, or the newest `last*.pt` below the working folder.

    Raises:
        UserError: there is none.
    """
    if not isinstance(resume, bool):
        if not os.path.isfile(resume):  # unlike Path's it is just False for a name too long
            raise UserError(f"--resume {resume}: no such file. Give a run's weights/last.pt.")
        return Path(resume)
    found = sorted(Path().glob("**/last*.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: no last*.pt below {Path().resolve()}. Give its path.")
    return found[-1]


def load_resumable(path: Path) -> dict[str, Any]:
    """Loads a checkpoint that still holds its optimizer.

    Raises:
        UserError: the run is finished, or the file is no checkpoint of this program's or lacks something.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.get("optimizer") is None:
        epochs = (checkpoint.get("opt") or {}).get("epochs", "its")
        raise UserError(f"{path}: training has finished {epochs} epochs, nothing to resume. Start anew with --weights.")
    for key, kinds in STATE_KINDS.items():
        if not isinstance(checkpoint.get(key), kinds):
            raise UserError(f"{path}: the checkpoint is damaged: its '{key}' is {type(checkpoint.get(key)).__name__}.")
    missing = [name for name in NEEDED_OPTIONS if checkpoint["opt"].get(name) is None]
    if missing:
        raise UserError(f"{path}: the checkpoint is damaged: its options lack {', '.join(missing)}.")
    return checkpoint


@contextlib.contextmanager
def checkpoint_errors(path: str | Path) -> Iterator[None]:
    """Makes a `UserError` of what is raised where a checkpoint's state cannot be taken over."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: the checkpoint does not fit or is damaged ({reason}). Resume another one.") from error


def resume_options(config: TrainConfig, given: set[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the checkpoint that `config.resume` means and replaces the other options by that run's own.

    Args:
        config: changed in place.
        given: the options that the user named; those in CHANGEABLE stay as given.
        defaults: of all options, for those that the interrupted run did not know.

    Returns:
        The checkpoint.

    Raises:
        UserError: no such checkpoint, a finished run, or an option that would make it another run.
    """
    path = find_resumable(config.resume)
    checkpoint = load_resumable(path)
    stored = {name: checkpoint["opt"].get(name, default) for name, default in defaults.items()}
    for name in sorted(given - CHANGEABLE):
        if getattr(config, name) != stored[name]:
            raise UserError(
                f"--resume: --{name.replace('_', '-')} {getattr(config, name)} differs from the interrupted run's "
                f"{stored[name]}. Leave it out, or start a new run with --weights {shlex.quote(str(path))}."
            )
    for name in stored.keys() - (given & CHANGEABLE):
        setattr(config, name, stored[name])
    config.resume, config.save_dir = str(path), str(path.parent.parent)
    if "data" not in given and isinstance(config.data, str) and not os.path.isfile(config.data):
        raise UserError(
            f"--resume {path}: the interrupted run's data, {config.data}, is not there. Put it back, or say with "
            "--data where it is now."
        )
    LOGGER.info(f"Resuming training from {colorstr('bold', path)}")
    return checkpoint


def check_names(checkpoint: Mapping[str, Any], names: Mapping[int, str], resume: str, data: Any) -> None:
    """Refuses to resume where the data set's classes are not those that the interrupted run was trained on.

    Args:
        checkpoint: of the run.
        names: of the classes, as the run would train them.
        resume: the checkpoint's file.
        data: the data set as it is named now.

    Raises:
        UserError: their names differ; says which.
    """
    known = checkpoint["names"]
    if known == names:
        return
    both = sorted(known.keys() & names.keys())
    changes = [f"{known[label]} is {names[label]}" for label in both if known[label] != names[label]]
    changes += [f"{known[label]} is gone" for label in sorted(known.keys() - names)]
    changes += [f"{names[label]} is new" for label in sorted(names.keys() - known.keys())]
    more = f", and {len(changes) - 5} more" if len(changes) > 5 else ""
    raise UserError(
        f"--resume {resume}: was trained on {_data_name(checkpoint['data'])}, and {_data_name(data)} has other "
        f"classes: {', '.join(changes[:5])}{more}. Put the names back, or start a new run with --weights {resume}."
    )


def check_dataset(checkpoint: Mapping[str, Any], record: Mapping[str, Tensor], resume: str, data: Any) -> None:
    """Warns where the images or labels are not those that the interrupted run was begun on.

    Args:
        checkpoint: of the run.
        record: of the data as it is now; see `utils.train.fingerprint.dataset_record`.
        resume: the checkpoint's file.
        data: the data set as it is named now.
    """
    before = checkpoint.get("dataset")
    if not before:
        LOGGER.warning(
            f"WARNING: {resume} is of an earlier version and does not tell its data: whether {_data_name(data)} has "
            "changed is not known"
        )
        return
    changes = dataset_changes(before, record)
    if changes:
        was, now = (
            ", ".join(f"{split}: {len(rows)} images" for split, rows in one.items()) for one in (before, record)
        )
        LOGGER.warning(
            f"WARNING: images have changed since the run was begun: {changes}. It was on "
            f"{_data_name(checkpoint['data'])} ({was}) and is resumed with {_data_name(data)} ({now}): it will not end "
            "like one that was not interrupted"
        )


def _data_name(data: Any) -> str:
    return data if isinstance(data, str) else "the data set given as a dict"
