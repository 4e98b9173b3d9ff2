"""The batch that fits: the line worked out by hand, the measuring with a memory of a known size on the CPU."""

import copy

import pytest
import torch
from torch import nn

from models.yolo import Model
from utils.errors import UserError
from utils.train.autobatch import Measured, Reading, choose, choose_batch_size, fit_to_memory, measure, train_step

CPU = torch.device("cpu")


class Meter:
    """A memory of `free` bytes: a batch takes what its images hold, times `per_byte`, beside `fixed` bytes."""

    def __init__(self, free: int, fixed: int = 0, per_byte: float = 1.0):
        self.free, self.fixed, self.per_byte = free, fixed, per_byte
        self.held = 0

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, work) -> int:
        self.held = 0
        with torch.autograd.graph.saved_tensors_hooks(self.take, lambda kept: kept):
            work()
        return round(self.fixed + self.held * self.per_byte)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[1:] == (3, 32, 32):  # the batch, which the convolution keeps for its gradient
            self.held = tensor.nbytes
            if self.fixed + self.held * self.per_byte > self.free:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return tensor

    def release(self) -> None:
        self.held = 0


class Network(nn.Module):
    """A layer with batch norm and dropout whose output is a list, as a detector's is."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.yaml = {"ch": 3}

    def forward(self, x):
        return [nn.functional.dropout(self.bn(self.conv(x)), 0.5, self.training)]


IMAGE_BYTES = 3 * 32 * 32 * 4
WEIGHT_BYTES = (3 * 4 + 2 * 4) * 4


@pytest.mark.parametrize(
    ("used", "too_large", "budget", "expected"),
    [
        ((110, 120, 140, 180, 260), None, 1000, 90),  # 100 + 10 a image: (1000 - 100) / 10
        ((110, 120, 140, 180, 260), None, 1009, 90),  # whole images only
        ((110, 120, 140, 180, 260), None, 155, 5),  # fewer than were measured
        ((110, 120, 140, 180, 260), None, 50, 1),  # at least one
        ((110, 120, 140), 8, 1000, 7),  # the line would say 90, but 8 did not fit
        ((110,), 2, 1000, 1),
        ((100, 100, 100, 100, 100), None, 1000, 16),  # no line: what is known to fit
        ((1, 2, 4, 8, 16), None, 1e9, 1024),
    ],
)
def test_the_line_meets_the_budget(used, too_large, budget, expected):
    readings = [Reading(images, value) for images, value in zip((1, 2, 4, 8, 16), used, strict=False)]
    assert choose(Measured(readings, too_large), budget) == expected


def test_readings_that_scatter_are_fitted_by_least_squares():
    """Slope 11, intercept 88 for (1, 100), (2, 110), (4, 130), (5, 144): at 220, 12 images."""
    readings = [Reading(1, 100), Reading(2, 110), Reading(4, 130), Reading(5, 144)]
    mean_x, mean_y = 3, 121
    slope = (2 * 21 + 1 * 11 + 1 * 9 + 2 * 23) / 10
    assert slope == pytest.approx(10.8)
    assert choose(Measured(readings, None), 220) == int((220 - (mean_y - slope * mean_x)) / slope) == 12


def test_measuring_stops_at_the_first_size_that_runs_out_of_memory():
    tried = []

    class Plain:
        def peak_bytes(self, work):
            return work()

    def run_batch(images):
        tried.append(images)
        if images > 4:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return 10 * images

    measured = measure(run_batch, Plain())
    assert tried == [1, 2, 4, 8]
    assert measured == Measured([Reading(1, 10), Reading(2, 20), Reading(4, 40)], 8)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Plain:
        def peak_bytes(self, work):
            return work()

    def run_batch(images):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        measure(run_batch, Plain())


def test_a_memory_of_a_hundred_images_takes_what_the_fraction_leaves():
    """0.9 of 100 images less the three copies of the weights (240 bytes, so one image less) and the fixed 10."""
    meter = Meter(100 * IMAGE_BYTES, fixed=10 * IMAGE_BYTES)
    assert 0 < 3 * WEIGHT_BYTES < IMAGE_BYTES
    assert fit_to_memory(Network(), 32, CPU, None, meter) == 79
    assert fit_to_memory(Network(), 32, CPU, None, meter, fraction=0.5) == 39
    assert meter.held == 0


def test_mixed_precision_is_measured_as_it_is_trained():
    """In bfloat16 the convolution keeps half the bytes: twice the images fit."""
    meter = Meter(100 * IMAGE_BYTES)
    assert fit_to_memory(Network(), 32, CPU, torch.bfloat16, meter) == 179


class Saved(Meter):
    """Measures all that is kept for the gradients."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        self.held += tensor.nbytes
        return tensor


def test_a_detector_of_the_size_chosen_stays_within_the_budget():
    model, meter = Model("yolov5n-slimneck.yaml", nc=2), Saved(10**9)
    chosen = fit_to_memory(model, 64, CPU, None, meter)

    def taken(images: int) -> int:
        return meter.peak_bytes(lambda: train_step(copy.deepcopy(model), (3, 64, 64), CPU, None, images))

    resident = 3 * sum(parameter.nbytes for parameter in model.parameters())
    assert 16 < chosen < 1024
    assert taken(chosen) + resident <= 0.9 * meter.free < taken(chosen + 1) + resident


def test_what_ran_out_of_memory_bounds_the_choice():
    meter = Meter(12 * IMAGE_BYTES, fixed=1 * IMAGE_BYTES)  # 11 images fit, 16 do not
    assert fit_to_memory(Network(), 32, CPU, None, meter) == 9
    assert fit_to_memory(Network(), 32, CPU, None, Meter(int(2.5 * IMAGE_BYTES))) == 2


def test_a_gpu_too_small_for_one_image_is_told():
    with pytest.raises(UserError, match=r"--batch-size -1: not even one image of 32 px fits .* smaller --img-size"):
        fit_to_memory(Network(), 32, CPU, None, Meter(IMAGE_BYTES // 2))


def test_the_model_is_left_as_it_was():
    model = Network().eval()
    model(torch.rand(2, 3, 8, 8))[0].sum().backward()
    model.conv.weight.requires_grad_(False)
    before, gradient = copy.deepcopy(model.state_dict()), model.conv.weight.grad.clone()
    fit_to_memory(model, 32, CPU, None, Meter(100 * IMAGE_BYTES))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model.conv.weight.grad, gradient) and not model.conv.weight.requires_grad
    assert not model.training and model.bn.num_batches_tracked == 0


def test_on_a_cpu_the_user_is_asked_for_a_number():
    with pytest.raises(UserError, match=r"CUDA GPU; this run computes on cpu. Name a number, .*--batch-size 16"):
        choose_batch_size(Network(), 32, CPU, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_is_kept_and_the_generators_stand_still():
    device = torch.device("cuda", 0)
    model = Network().to(device)
    state, held = torch.cuda.get_rng_state(device), torch.cuda.memory_allocated(device)
    small = choose_batch_size(model, 512, device, torch.float16, fraction=1e-3)
    assert 1 <= small <= choose_batch_size(model, 512, device, torch.float16)
    assert torch.cuda.memory_allocated(device) == held
    assert torch.equal(torch.cuda.get_rng_state(device), state)
