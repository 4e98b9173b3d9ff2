"""Hooks into training and validation for code that wants to follow a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.errors import UserError, did_you_mean

HOOKS = (  # with YOLOv5's arguments; those without a note have none
    "on_pretrain_routine_start",
    "on_pretrain_routine_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "optimizer_step",  # after it
    "on_before_zero_grad",
    "on_train_batch_end",  # iteration, model, images, targets, paths, whether to plot, --sync-bn
    "on_train_epoch_end",  # epoch=
    "on_val_start",
    "on_val_batch_start",
    "on_val_image_end",  # detections in the padded and in the image's own pixels, path, names, the batch's images
    "on_val_batch_end",
    "on_val_end",
    "on_fit_epoch_end",  # the row of results.csv, epoch, best fitness, fitness
    "on_model_save",  # last.pt, epoch, whether it was the last, best fitness, fitness
    "on_train_end",  # last.pt, best.pt, whether to plot, epoch, the final validation's seven figures
    "on_params_update",  # {"batch_size": what --batch-size -1 came to}, before on_pretrain_routine_end
    "teardown",  # however the run ends
)


class Action(NamedTuple):
    """A function that was registered for a hook."""

    name: str
    callback: Callable[..., Any]

    @property
    def wants_trainer(self) -> bool:
        """Whether it has a parameter for the run."""
        try:
            return "trainer" in inspect.signature(self.callback).parameters
        except ValueError:  # some functions of compiled modules tell no parameters
            return False


class Callbacks:
    """Calls the functions registered for a hook; an unknown hook is a `UserError`.

    `stop_training` set to True by one of them ends the run after the batch that is being trained, without validating or
    saving the unfinished epoch, or after the epoch whose end it is. A function that has a parameter of the name
    `trainer` is given the run by it, beside the hook's own arguments: the `utils.train.engine.Trainer` with `options`,
    `hyp`, `save_dir`, `epoch` (the last finished one), `losses` of the batch, `figures` of the epoch and
    `best_fitness`; None before there is one.
    """

    def __init__(self) -> None:
        self._actions: dict[str, list[Action]] = {hook: [] for hook in HOOKS}
        self.stop_training = False
        self.trainer: Any = None

    def register_action(self, hook: str, name: str = "", callback: Callable[..., Any] | None = None) -> None:
        """Adds a function to a hook, after those already there."""
        self._check(hook)
        if not callable(callback):
            raise UserError(f"callback for '{hook}': a function is expected, got {callback!r}.")
        self._actions[hook].append(Action(name, callback))

    def get_registered_actions(self, hook: str | None = None) -> Any:
        """Returns the list of actions of a hook, or {hook: list} of all."""
        if hook is None:
            return {known: list(actions) for known, actions in self._actions.items()}
        self._check(hook)
        return list(self._actions[hook])

    def run(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Calls a hook's functions in the order they were registered; what they raise is not caught."""
        self._check(hook)
        for action in self._actions[hook]:
            run = {"trainer": self.trainer} if action.wants_trainer else {}
            action.callback(*args, **kwargs, **run)

    def _check(self, hook: str) -> None:
        if hook not in self._actions:
            raise UserError(f"unknown hook '{hook}'.{did_you_mean(hook, HOOKS)} All hooks: {', '.join(HOOKS)}.")
