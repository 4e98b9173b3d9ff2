"""Early stopping: when it ends a run, and that a resumed run remembers."""

import math

import pytest

from utils.train.ema import EarlyStopping


def epochs_until_stop(stopper, fitnesses):
    return next((epoch for epoch, fitness in enumerate(fitnesses) if stopper(epoch, fitness)), None)


def test_stops_after_patience_epochs_without_improvement():
    """Best at epoch 1; with a patience of 3 epochs 2, 3 and 4 may be worse, and 4 is the last."""
    assert epochs_until_stop(EarlyStopping(3), [0.1, 0.5, 0.4, 0.4, 0.4, 0.4]) == 4


def test_an_equal_fitness_counts_as_an_improvement():
    assert epochs_until_stop(EarlyStopping(2), [0.5, 0.4, 0.5, 0.4, 0.5, 0.4]) is None


def test_zero_patience_never_stops():
    assert epochs_until_stop(EarlyStopping(0), [1.0] + [0.0] * 500) is None


def test_nan_is_no_improvement():
    assert epochs_until_stop(EarlyStopping(2), [0.5, math.nan, math.nan]) == 2


def test_the_last_epoch_is_announced_one_epoch_before():
    stopper = EarlyStopping(2)
    announced = []
    for epoch, fitness in enumerate([0.5, 0.4, 0.4]):
        stopped = stopper(epoch, fitness)
        announced.append((stopper.possible_stop, stopped))
    assert announced == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_resumed_run_stops_at_the_same_epoch(cut):
    fitnesses = [0.1, 0.5, 0.4, 0.3, 0.2]
    stopper = EarlyStopping(3)
    for epoch in range(cut):
        stopper(epoch, fitnesses[epoch])
    resumed = EarlyStopping(3)
    resumed.load_state_dict(stopper.state_dict())
    stops = [resumed(epoch, fitnesses[epoch]) for epoch in range(cut, 5)]
    assert stops == [False] * (4 - cut) + [True]
