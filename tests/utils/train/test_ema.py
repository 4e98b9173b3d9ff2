"""The averaged model against its formula; when early stopping ends a run."""

import math

import pytest
import torch
from torch import nn

from utils.train.ema import EarlyStopping, ModelEMA


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()


def disturb(model, seed):
    """Moves weights and statistics as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    model(torch.randn(2, 3, 5, 5, generator=generator))


def test_update_is_the_formula_and_integer_buffers_follow():
    model = network()
    average = ModelEMA(model, decay=0.99, tau=10)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 6):
        disturb(model, update)
        average.update(model)
        decay = 0.99 * (1 - math.exp(-update / 10))
        for name, value in model.state_dict().items():
            kept = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            expected[name] = kept
    assert average.updates == 5
    for name, value in average.ema.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert average.ema[1].num_batches_tracked == 5


def test_copy_is_apart_in_eval_mode_and_without_gradients_and_follows_exchanged_tensors():
    model = network()
    average = ModelEMA(model, decay=0)
    before = model[0].weight.clone()
    disturb(model, 1)
    assert torch.equal(average.ema[0].weight, before)
    assert not average.ema.training and model.training
    assert not any(parameter.requires_grad for parameter in average.ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    average.update(model)
    model[1].running_mean = torch.full((4,), 5.0)
    model[0].weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    average.update(model)
    assert average.ema[1].running_mean.tolist() == [5] * 4 and not average.ema[0].weight.any()


def test_equal_values_stay_to_the_bit():
    """Anchors are a buffer that does not train: averaging must not move them."""
    model = network()
    average = ModelEMA(model)
    for _ in range(100):
        average.update(model)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in average.ema.state_dict().items())


def test_memory_format_is_kept():
    model = network().to(memory_format=torch.channels_last)
    average = ModelEMA(model)
    disturb(model, 1)
    average.update(model)
    assert average.ema[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_resumed_average_continues_to_the_bit():
    model = network()
    average = ModelEMA(model)
    for seed in range(3):
        disturb(model, seed)
        average.update(model)
    resumed = ModelEMA(network())
    resumed.load({name: value.clone() for name, value in average.ema.state_dict().items()}, average.updates)
    disturb(model, 7)
    average.update(model)
    resumed.update(model)
    for name, value in average.ema.state_dict().items():
        assert torch.equal(value, resumed.ema.state_dict()[name]), name


def test_half_model_has_a_float32_average():
    average = ModelEMA(network().half())
    average.update(network().half())
    assert {value.dtype for value in average.ema.state_dict().values()} == {torch.float32, torch.int64}


def test_state_of_another_model_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        ModelEMA(network()).load(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).state_dict(), 3)


@pytest.mark.parametrize(
    ("patience", "fitnesses", "end"),
    [
        (3, [0.1, 0.5, 0.4, 0.4, 0.4, 0.4], 4),  # the best is epoch 1: 2, 3 and 4 may be worse, and 4 is the last
        (2, [0.5, 0.4, 0.5, 0.4, 0.5, 0.4], None),  # an equal fitness is an improvement
        (2, [0.5, math.nan, math.nan], 2),  # and NaN is none
        (0, [1.0] + [0.0] * 500, None),
    ],
)
def test_a_run_ends_after_so_many_epochs_without_improvement_also_one_that_was_resumed(patience, fitnesses, end):
    """The epoch before the end is told that the next may be it."""
    stopper, announced = EarlyStopping(patience), []
    for epoch, fitness in enumerate(fitnesses):
        state, stopper = stopper.state_dict(), EarlyStopping(patience)
        stopper.load_state_dict(state)
        if stopper(epoch, fitness):
            assert epoch == end and announced[-1]
            return
        announced.append(stopper.possible_stop)
    assert end is None
