"""Hyperparameter search: `train.py --evolve`, on Optuna, which is imported when a search begins.

YOLOv5's search space and fitness. The first trial has the hyperparameters as they are, the next ones are mutations of
them as YOLOv5 makes them, and from then on TPE proposes. The study lies in a file of the search's folder, or in a
storage that several processes and machines share; whoever finishes a trial writes what is known of all. A trial that
was interrupted is repeated.
"""

from __future__ import annotations

import re
import shlex
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from utils.callbacks import Callbacks
from utils.errors import UserError
from utils.files import atomic_write
from utils.log import LOGGER, colorstr
from utils.loss import LOSSES
from utils.train.engine import NotFinite
from utils.train.fingerprint import NOT_COUNTED, json_digest
from utils.train.hyp import Hyp
from utils.train.prepare import TrainConfig

STARTUP_TRIALS = 10  # the first, and mutations of it
HEARTBEAT_S, GRACE_S = 15, 60  # how often a running trial gives a sign of life, and when it counts as dead
WAIT_S = 5  # between looks at trials of other processes


class _StoppedError(Exception):
    """A callback has stopped the training."""


class Gene(NamedTuple):
    """How a hyperparameter is searched."""

    low: float
    high: float
    gain: float = 1.0  # of YOLOv5's mutations
    whole: bool = False

    @property
    def log(self) -> bool:
        """Whether it is a matter of orders of magnitude."""
        return 0 < 10 * self.low <= self.high and not self.whole


GENES = {  # YOLOv5's, less those that it gives no gain
    "lr0": Gene(1e-5, 1e-1),
    "lrf": Gene(0.01, 1.0),
    "momentum": Gene(0.6, 0.98, 0.3),
    "weight_decay": Gene(0.0, 0.001),
    "warmup_epochs": Gene(0.0, 5.0),
    "warmup_momentum": Gene(0.0, 0.95),
    "warmup_bias_lr": Gene(0.0, 0.2),
    "box": Gene(0.02, 0.2),
    "cls": Gene(0.2, 4.0),
    "cls_pw": Gene(0.5, 2.0),
    "obj": Gene(0.2, 4.0),
    "obj_pw": Gene(0.5, 2.0),
    "anchor_t": Gene(2.0, 8.0),
    "anchors": Gene(2.0, 10.0, 2.0, whole=True),
    "hsv_h": Gene(0.0, 0.1),
    "hsv_s": Gene(0.0, 0.9),
    "hsv_v": Gene(0.0, 0.9),
    "degrees": Gene(0.0, 45.0),
    "translate": Gene(0.0, 0.9),
    "scale": Gene(0.0, 0.9),
    "shear": Gene(0.0, 10.0),
    "flipud": Gene(0.0, 1.0),
    "mosaic": Gene(0.0, 1.0),
    "mixup": Gene(0.0, 1.0),
    "copy_paste": Gene(0.0, 1.0),
    "af_box": Gene(2.0, 20.0),  # gains of the anchor-free head's loss: around their defaults
    "af_cls": Gene(0.1, 2.0),
    "af_dfl": Gene(0.3, 6.0),
}
OF_A_LOSS = {gain for loss in LOSSES.values() for gain in loss.gains}


def import_optuna() -> Any:
    """Returns Optuna, silenced.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError("--evolve needs Optuna, which is not installed: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def search_space(hyp: Hyp, head: Any, noautoanchor: bool) -> dict[str, Gene]:
    """Returns the hyperparameters that a search varies: those that have an effect on such a run."""
    gains = LOSSES[head.loss].gains
    space = {name: gene for name, gene in GENES.items() if name not in OF_A_LOSS or name in gains}
    if noautoanchor or not head.has_anchors:
        space.pop("anchors")
    if hyp.warmup_ratio:
        space.pop("warmup_epochs")
    return space


def evolve(
    hyp: Hyp,
    config: TrainConfig,
    space: Mapping[str, Gene],
    data: str,
    train: Callable[[Hyp], Any],
    callbacks: Callbacks,
) -> Hyp | None:
    """Searches until `config.evolve` trials are finished, in all processes together.

    Args:
        hyp: where it starts from.
        config: the options, settled; `save_dir` is there.
        space: what is varied.
        data: digest of the data set, which is the same for all.
        train: trains with hyperparameters and returns the `EvalResult`, or None where a callback stopped it.
        callbacks: of the trainings.

    Returns:
        The best hyperparameters; None where a callback stopped it.

    Raises:
        UserError: Optuna is missing, the storage cannot be used, the study is of another search, or no trial was
            completed; what a training raises, but for a loss that is not finite, which ends just that trial.
    """
    optuna = import_optuna()
    if "anchors" in space and hyp.anchors is None:
        hyp = replace(hyp, anchors=3.0)
    search = _Search(optuna, _open_study(optuna, hyp, config, space, data), hyp, config, space, train)
    callbacks.register_action("on_fit_epoch_end", "evolve", search.report)
    return search.run(callbacks)


class _Search:
    """The trials of this process."""

    def __init__(
        self, optuna: Any, study: Any, hyp: Hyp, config: TrainConfig, space: Mapping[str, Gene], train: Callable
    ) -> None:
        self.optuna, self.study, self.hyp = optuna, study, hyp
        self.config, self.space, self.train = config, space, train
        self.trial: Any = None  # that is being trained
        self.figures: dict[str, float] = {}  # of its last epoch

    def run(self, callbacks: Callbacks) -> Hyp | None:
        """Trains until enough trials are finished; see `evolve`."""
        optuna, study, config, folder = self.optuna, self.study, self.config, Path(self.config.save_dir)
        waited_for: set[int] = set()
        while (missing := config.evolve - len(_of_state(study, "COMPLETE", "PRUNED"))) > 0:
            running = {trial._trial_id for trial in _of_state(study, "RUNNING")}
            if len(running) >= missing:  # by others, or by those that have just been killed
                if not waited_for:
                    LOGGER.info(f"Waiting for other processes, which train the last {missing} ...")
                for trial in running - waited_for:
                    # Without it, one that was killed before its first sign of life counts as alive for ever
                    study._storage.record_heartbeat(trial)
                waited_for |= running
                time.sleep(WAIT_S)
                optuna.storages.fail_stale_trials(study)
                continue
            seed = _seed(config.seed, config.evolve - missing)
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)
            study.optimize(self.objective, n_trials=1, catch=(_StoppedError,))
            if callbacks.stop_training:
                return None
            _write(study, folder)
            LOGGER.info(f"{colorstr('evolve:')} {_standing(study)}")
        best = _write(study, folder)
        if best is None:
            raise UserError("each trial was pruned. Check the hyperparameters that the search starts from.")
        if not config.noplots:
            from utils.plots.training import plot_evolve

            plot_evolve(folder / "evolve.csv")
        LOGGER.info(
            f"\nSearch finished: {_standing(study)}\nResults saved to {colorstr('bold', folder)}\n"
            f"Usage: python train.py --hyp {shlex.quote(str(folder / 'hyp_evolve.yaml'))}"
        )
        return best

    def objective(self, trial: Any) -> float:
        """Trains with the hyperparameters of a trial; returns the last epoch's fitness."""
        self.trial = trial
        values = {name: _suggest(trial, name, gene) for name, gene in self.space.items()}
        hyp = self.hyp if "first" in trial.user_attrs else replace(self.hyp, **values)
        trial.set_user_attr("hyp", hyp.to_dict())
        shown = ", ".join(f"{name}={getattr(hyp, name):.5g}" for name in self.space)
        LOGGER.info(f"\n{colorstr('evolve:')} trial {trial.number}: {shown}")
        try:
            result = self.train(hyp)
            if result is None:
                raise _StoppedError
        except self.optuna.TrialPruned:
            raise
        except NotFinite as error:
            LOGGER.warning(f"WARNING: {error}")
            raise self.optuna.TrialPruned from error
        except BaseException:
            _repeat(self.study, self.study.trials[trial.number])
            raise
        trial.set_user_attr("figures", self.figures)
        return result.fitness

    def report(self, values: list[float], epoch: int, best_fitness: float, fitness: float, trainer: Any) -> None:
        """Takes an epoch's figures, and prunes a trial that does worse than most."""
        validated = [name for name in trainer.figures if name.startswith(("metrics/", "val/"))]
        self.figures = {name: trainer.figures[name] for name in validated}
        if not self.config.noval:
            self.trial.report(fitness, epoch)
            if self.trial.should_prune():
                raise self.optuna.TrialPruned


def _open_study(optuna: Any, hyp: Hyp, config: TrainConfig, space: Mapping[str, Gene], data: str) -> Any:
    """Opens the study, or begins it with the trials that come first."""
    file = Path(config.save_dir) / "evolve.db"
    url = config.storage or f"sqlite:///{file.absolute().as_posix()}"
    name = config.name if config.storage else "evolve"
    counted = {key: value for key, value in vars(config).items() if key not in {*NOT_COUNTED, "evolve", "storage"}}
    model = {key: Path(getattr(config, key)).name for key in ("cfg", "weights", "teacher")}
    about = {"data": data, "hyp": json_digest(hyp.to_dict()), "space": json_digest(space), **model, **counted}
    pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS // 2, n_warmup_steps=max(config.epochs // 4, 1))
    try:
        storage = _open_storage(optuna, url)
        try:
            study = optuna.create_study(storage=storage, study_name=name, pruner=pruner, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name, pruner=pruner)
        else:
            study.set_user_attr("search", about)
            for number in range(STARTUP_TRIALS):
                values = _mutation(hyp, space, config.seed, number)
                study.enqueue_trial(values, user_attrs={} if number else {"first": True})
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"--storage {masked(url)}: {reason}.") from error
    before = study.user_attrs.get("search", about)
    differing = [key for key in about if before.get(key) != about[key]]
    if differing:
        first = differing[0]
        raise UserError(
            f"the search '{name}' in {masked(url)} was begun with other {', '.join(differing)} "
            f"({before.get(first)!r:.60}, now {about[first]!r:.60}). Repeat its options, or begin another with --name."
        )
    return study


def _open_storage(optuna: Any, url: str) -> Any:
    """Opens a storage; of processes that begin in an empty one at once, one makes the tables and others try again."""
    for tries_left in (2, 1, 0):
        try:
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S, heartbeat_stale_trial_callback=_repeat
            )
        except Exception:
            if not tries_left:
                raise
            time.sleep(0.5)


def masked(url: str) -> str:
    """Returns a storage URL without its password."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", url)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _mutation(hyp: Hyp, space: Mapping[str, Gene], seed: int, number: int) -> dict[str, float]:
    """Returns mutation `number` of the searched hyperparameters within their limits, 0 being none."""
    generator = np.random.Generator(np.random.Philox(_seed(seed, number)))
    factors = np.ones(len(space))
    gains = np.array([gene.gain for gene in space.values()])
    while number and (factors == 1).all():
        chosen, size = generator.random(len(space)) < 0.8, generator.random()
        factors = (gains * chosen * generator.standard_normal(len(space)) * size * 0.2 + 1).clip(0.3, 3.0)
    values = {}
    for (name, gene), factor in zip(space.items(), factors.tolist(), strict=True):
        value = min(max(getattr(hyp, name) * factor, gene.low), gene.high)
        values[name] = round(value) if gene.whole else round(value, 5)
    return values


def _suggest(trial: Any, name: str, gene: Gene) -> float:
    """Asks for a value, rounded as YOLOv5 does."""
    if gene.whole:
        return float(trial.suggest_int(name, int(gene.low), int(gene.high)))
    return round(trial.suggest_float(name, gene.low, gene.high, log=gene.log), 5)


def _repeat(study: Any, trial: Any) -> None:
    """Puts an interrupted trial into the queue again, with the values that it had and those that it was to have."""
    values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(values, user_attrs={"first": True} if "first" in trial.user_attrs else {})


def _of_state(study: Any, *states: str) -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in states]


def _standing(study: Any) -> str:
    """Says how many trials are finished, and which is the best."""
    complete, pruned = _of_state(study, "COMPLETE"), _of_state(study, "PRUNED")
    counts = f"{len(complete)} trials complete, {len(pruned)} pruned"
    if not complete:
        return counts
    best = max(complete, key=lambda trial: trial.value)
    return f"{counts}; best fitness {best.value:.5g}, of trial {best.number}"


def _write(study: Any, folder: Path) -> Hyp | None:
    """Writes evolve.csv and hyp_evolve.yaml of the complete trials; returns the best's, if there are any.

    Raises:
        UserError: a file cannot be written.
    """
    complete = _of_state(study, "COMPLETE")
    if not complete:
        return None
    rows = [{**trial.user_attrs["figures"], **trial.user_attrs["hyp"]} for trial in complete]
    every = {
        name: value for row in rows for name, value in row.items()
    }  # files leave some out that are at their default
    names = [name for name, value in every.items() if isinstance(value, (int, float))]
    lines = [",".join(f"{name:>20}" for name in names)]
    lines += [",".join(f"{row.get(name, getattr(Hyp, name, None)):20.5g}" for name in names) for row in rows]
    with atomic_write(folder / "evolve.csv") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    best = max(complete, key=lambda trial: trial.value)
    figures = best.user_attrs["figures"]
    comments = (
        "# YOLOv5 hyperparameter evolution",
        f"# Best generation: {complete.index(best)}",
        f"# Last generation: {len(complete) - 1}",
        "# " + ", ".join(f"{name:>22}" for name in figures),
        "# " + ", ".join(f"{value:22.5g}" for value in figures.values()),
    )
    with atomic_write(folder / "hyp_evolve.yaml") as temporary:
        body = yaml.safe_dump(best.user_attrs["hyp"], sort_keys=False)
        temporary.write_text("\n".join((*comments, "", body)), encoding="utf-8")
    return Hyp.from_dict(best.user_attrs["hyp"], str(folder / "hyp_evolve.yaml"))
