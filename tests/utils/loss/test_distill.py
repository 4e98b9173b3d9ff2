"""The distillation term: by hand and by torch, its gradient, its parts; and whose maps it compares."""

import copy
import threading

import pytest
import torch

from models.yolo import Model
from utils.errors import UserError
from utils.loss.base import BatchReduction, LossResult
from utils.loss.distill import Teacher, head_inputs, pearson_loss, with_distillation

YAML = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[6, 8, 12, 10, 16, 20], [20, 28, 32, 24, 40, 44]],
    "backbone": [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]]],
    "head": [[-1, 1, "Conv", [32, 3, 2]], [[2, 3], 1, "Detect", ["nc", "anchors"]]],
}


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def built(**changes) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(copy.deepcopy({**YAML, **changes}))


def test_by_hand():
    """Of 1 2 3 4 and 1 2 4 3, two images of two places, r is 4 / 5; of 1 2 3 4 and 4 3 2 1 it is -1; another level."""
    student = torch.tensor([[[[1.0, 2.0]], [[1.0, 2.0]]], [[[3.0, 4.0]], [[3.0, 4.0]]]])
    teacher = torch.tensor([[[[1.0, 2.0]], [[4.0, 3.0]]], [[[4.0, 3.0]], [[2.0, 1.0]]]])
    assert pearson_loss([student], [teacher]).item() == pytest.approx((0.2 + 2) / 2, abs=1e-5)
    assert pearson_loss([student, student[:, :1]], [teacher, teacher[:, :1]]).item() == pytest.approx(1.3, abs=1e-5)
    result = LossResult(torch.tensor(3.0), torch.tensor([0.5, 0.25]), labels=7, images=2)
    found = with_distillation(result, [student], [teacher], 0.5, None)
    assert found.total.item() == pytest.approx(3 + 0.5 * 1.1 * 2) and found[2:] == (7, 2)
    assert found.items.tolist() == pytest.approx([0.5, 0.25, 0.55])


def test_means_and_scales_of_channels_do_not_count():
    student, teacher = drawn(0, (2, 3, 5, 4), (2, 3, 5, 4))
    value = pearson_loss([student], [teacher]).item()
    scale, shift = torch.tensor([0.5, 3.0, 100.0])[:, None, None], torch.tensor([-7.0, 0.0, 50.0])[:, None, None]
    assert pearson_loss([student * scale + shift], [teacher]).item() == pytest.approx(value, rel=1e-4)
    assert pearson_loss([student], [teacher * scale + shift]).item() == pytest.approx(value, rel=1e-4)
    assert pearson_loss([student], [student * scale + shift]).item() == pytest.approx(0, abs=1e-5)


def test_the_gradient_is_pearsons_and_the_students_alone():
    student, teacher = drawn(1, (2, 3, 4, 5), (2, 3, 4, 5))
    student.requires_grad_(), teacher.requires_grad_(False)
    pearson_loss([student], [teacher]).backward()
    own = student.detach().double().requires_grad_()
    pairs = zip(own.transpose(0, 1).flatten(1), teacher.double().transpose(0, 1).flatten(1), strict=True)
    torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean().backward()
    torch.testing.assert_close(student.grad, own.grad.float(), rtol=1e-4, atol=1e-6)


def test_channels_without_a_pattern_cost_nothing_where_both_are_so_and_break_nothing():
    (student,), (teacher,) = drawn(2, (2, 2, 3, 3)), drawn(3, (2, 2, 3, 3))
    flat = student.clone()
    flat[:, 0] = 0.3
    assert pearson_loss([flat], [flat]).item() == pytest.approx(0, abs=1e-6)
    flat.requires_grad_()
    pearson_loss([flat], [teacher]).backward()
    assert flat.grad.isfinite().all()


def test_parts_of_a_batch_come_to_the_whole_and_its_gradient():
    """Three images as parts of two processes; a third one has a copy that another answers for."""
    shapes = [(3, 4, 6, 5), (3, 2, 3, 3)]
    student, teacher = drawn(4, *shapes), drawn(5, *shapes)
    for maps in student:
        maps.requires_grad_()
    whole = pearson_loss(student, teacher)
    wanted = torch.autograd.grad(whole, student)
    parts, meeting, figures, found = [(0, 2), (2, 3), (0, 1)], threading.Barrier(3), {}, {}

    def process(rank: int) -> None:
        def all_reduce_sum(own):
            figures[rank] = own
            meeting.wait(10)
            total = sum(figures[other] for other in sorted(figures))
            meeting.wait(10)
            return total

        cut = slice(*parts[rank])
        own = [maps.detach()[cut].requires_grad_() for maps in student]
        reduction = BatchReduction(all_reduce_sum, 3, weight=float(rank < 2))
        term = pearson_loss(own, [maps[cut] for maps in teacher], reduction)
        found[rank] = term.item(), torch.autograd.grad(term, own)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [found[rank][0] for rank in range(3)] == pytest.approx([whole.item()] * 3, rel=1e-5)
    for level, gradient in enumerate(wanted):
        assembled = torch.cat([found[rank][1][level] for rank in (0, 1)])
        torch.testing.assert_close(assembled, gradient, rtol=1e-4, atol=1e-7)
        assert (found[2][1][level] == 0).all()
    result = LossResult(torch.zeros(()), torch.zeros(1), labels=0, images=3)
    same = BatchReduction(lambda own: own, processes=3)
    assert with_distillation(result, student, teacher, 1.0, same).total.item() == pytest.approx(9 * whole.item())


def test_the_maps_are_those_that_the_heads_read_and_the_teachers_head_is_not_run(monkeypatch):
    student = built().train()
    teacher = built(nc=7).eval().requires_grad_(False)  # another head
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with head_inputs(teacher) as wanted:
        teacher(images)
    monkeypatch.setattr(type(teacher.head), "forward", lambda *_: pytest.fail("the head is run"))
    found = Teacher(teacher, student, "", "t.pt").maps(images)
    monkeypatch.undo()
    assert student.training and len(wanted) == len(found) == 2
    torch.testing.assert_close(found, wanted)
    with head_inputs(student) as maps:
        outputs = student(images)
    torch.testing.assert_close(student.head(maps), outputs)
    student(images)
    assert len(maps) == 2  # is over
    pearson_loss(maps, found).backward()
    assert all(parameter.grad is not None for layer in student.model[:-1] for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in student.head.parameters())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width_multiple": 2.0}, "64 at stride 8, 64 at stride 16, not 32 at stride 8, 32 at stride 16"),
        ({"head": [[[2], 1, "Detect", ["nc", [[6, 8]]]]]}, "32 at stride 8, not 32 at stride 8, 32 at stride 16"),
        ({"head": [*YAML["head"][:1], [[1, 3], 1, "Detect", ["nc", "anchors"]]]}, "16 at stride 4, 32 at stride 16"),
    ],
    ids=["width", "levels", "strides"],
)
def test_a_teacher_of_other_maps_is_refused(changes, told):
    with pytest.raises(UserError, match=f"--teacher t.pt: .*{told}"):
        Teacher(built(**changes).eval(), built(), "", "t.pt")
