"""The batch that fits: the line worked out by hand, the measuring with a memory of a known size on the CPU."""

import copy

import pytest
import torch
from torch import nn

from models.yolo import Model
from utils.autobatch import autobatch, check_train_batch_size, choose, fit_to_memory, measure, train_step
from utils.errors import UserError


class Memory:
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


class AllSaved(Memory):
    """Measures all that is kept for the gradients."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        self.held += tensor.nbytes
        return tensor


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
        ((100, 115, 135, 170), None, 300, 21),  # by least squares: (300 - 93.478) / 9.739
    ],
)
def test_the_line_meets_the_budget(used, too_large, budget, expected):
    assert choose(dict(zip((1, 2, 4, 8, 16), used, strict=False)), too_large, budget) == expected


@pytest.mark.parametrize("words", ["cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "mat1 and mat2 cannot be multiplied"])
def test_measuring_stops_where_memory_runs_out_and_other_errors_are_not_taken_for_that(words):
    class Plain:
        def peak_bytes(self, work):
            return work()

    def run_batch(images):
        if images > 4:
            raise RuntimeError(words)
        return 10 * images

    if "ALLOC" in words:
        assert measure(run_batch, Plain()) == ({1: 10, 2: 20, 4: 40}, 8)
    else:
        with pytest.raises(RuntimeError, match="mat1"):
            measure(run_batch, Plain())


@pytest.mark.parametrize(
    ("images", "fixed", "options", "expected"),
    [
        (100, 10, {}, 79),  # 0.9 of 100, less the fixed 10, and the three copies of the weights: one image less
        (100, 10, {"fraction": 0.5}, 39),
        (100, 0, {"amp_dtype": torch.bfloat16}, 179),  # measured as it is trained: half the bytes, twice the images
        (12, 1, {}, 9),  # 11 images fit, 16 do not
        (2.5, 0, {}, 2),  # bounded by the 4 that ran out of memory, whatever the line says
    ],
)
def test_a_memory_of_so_many_images_takes_what_the_fraction_leaves(images, fixed, options, expected):
    assert 0 < 3 * WEIGHT_BYTES < IMAGE_BYTES
    memory = Memory(int(images * IMAGE_BYTES), fixed=fixed * IMAGE_BYTES)
    assert fit_to_memory(Network(), 32, **{"amp_dtype": None, "memory": memory, **options}) == expected


def test_a_detector_of_the_size_chosen_stays_within_the_budget():
    model, memory = Model("yolov5n-slimneck.yaml", nc=2), AllSaved(10**9)
    chosen = fit_to_memory(model, 64, None, memory)

    def taken(images: int) -> int:
        return memory.peak_bytes(lambda: train_step(copy.deepcopy(model), 64, None, images))

    resident = 3 * sum(parameter.nbytes for parameter in model.parameters())
    assert 16 < chosen < 1024
    assert taken(chosen) + resident <= 0.9 * memory.free < taken(chosen + 1) + resident


def test_a_gpu_too_small_for_one_image_is_told():
    with pytest.raises(UserError, match=r"--batch-size -1: not even one image of 32 px fits .* smaller --img-size"):
        fit_to_memory(Network(), 32, None, Memory(IMAGE_BYTES // 2))


def test_the_model_is_left_as_it_was():
    model = Network().eval()
    model(torch.rand(2, 3, 8, 8))[0].sum().backward()
    model.conv.weight.requires_grad_(False)
    before, gradient = copy.deepcopy(model.state_dict()), model.conv.weight.grad.clone()
    fit_to_memory(model, 32, None, Memory(100 * IMAGE_BYTES))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model.conv.weight.grad, gradient) and not model.conv.weight.requires_grad
    assert not model.training and model.bn.num_batches_tracked == 0


def test_on_a_cpu_a_number_is_given():
    assert check_train_batch_size(Network(), 32) == 16 and autobatch(Network(), batch_size=4) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_is_kept_and_the_generators_stand_still():
    device = torch.device("cuda", 0)
    model = Network().to(device)
    state, held = torch.cuda.get_rng_state(device), torch.cuda.memory_allocated(device)
    assert 1 <= autobatch(model, 512, fraction=1e-3) <= check_train_batch_size(model, 512)
    assert torch.cuda.memory_allocated(device) == held
    assert torch.equal(torch.cuda.get_rng_state(device), state)
