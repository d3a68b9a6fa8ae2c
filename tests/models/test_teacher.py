"""The teacher: what follows, what does not, and its schedule."""

import copy

import pytest
import timm
import torch
from torch import nn

from repr.models.batchnorm import SyncBatchNorm
from repr.models.teacher import Teacher
from repr.objectives.base import Objective


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4))
        self.head = nn.Linear(4, 2)
        self.predictor = nn.Linear(2, 2)
        self.teacher = Teacher(momentum=0.9, trunk=self.trunk, head=self.head)


def test_parameters_follow_and_buffers_do_not() -> None:
    owner = Owner()
    before = copy.deepcopy(owner.teacher.state_dict())
    with torch.no_grad():
        for parameter in owner.trunk.parameters():
            parameter.add_(1)
        owner.head.weight.mul_(3)
    owner.trunk(torch.randn(8, 3, 2, 2))  # the student's statistics move
    owner.teacher.update(owner, 0.9)
    students = {
        f"{name}.{key}": t for name in ("trunk", "head") for key, t in getattr(owner, name).state_dict().items()
    }
    for name, tensor in owner.teacher.state_dict().items():
        is_buffer = "running" in name or "num_batches" in name
        expected = before[name] if is_buffer else 0.9 * before[name] + 0.1 * students[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    after = copy.deepcopy(owner.teacher.state_dict())
    owner.teacher.update(owner, 1.0)
    assert all(torch.equal(after[name], tensor) for name, tensor in owner.teacher.state_dict().items())
    owner.teacher.update(owner, 0.0)
    assert torch.equal(owner.teacher.head.weight, owner.head.weight)


def test_the_teacher_normalises_by_the_batch_and_keeps_its_own_statistics() -> None:
    owner = Owner()
    x = 5 + torch.randn(64, 3, 2, 2)
    with torch.no_grad():
        y = owner.teacher.trunk(x)
    assert y.mean((0, 2, 3)).abs().max() < 1e-5
    assert owner.teacher.trunk[1].num_batches_tracked == 1
    assert owner.trunk[1].num_batches_tracked == 0
    owner.teacher.restart(owner)
    assert owner.teacher.trunk[1].num_batches_tracked == 0
    assert torch.equal(owner.teacher.trunk[1].running_mean, owner.trunk[1].running_mean)


def test_a_teacher_shares_nothing_and_trains_nothing() -> None:
    owner = Owner()
    assert not any(p.requires_grad for p in owner.teacher.parameters())
    assert all(p.requires_grad for name, p in owner.named_parameters() if not name.startswith("teacher."))
    places = [tensor.data_ptr() for tensor in (*owner.parameters(), *owner.buffers())]
    assert len(set(places)) == len(places)
    names = {name for name in owner.state_dict() if name.startswith("teacher.")}
    assert names == {f"teacher.{name}" for name in owner.state_dict() if name.startswith(("trunk.", "head."))}


@pytest.mark.parametrize(
    ("before_step", "final_momentum", "step"), [(False, 1.0, 3), (True, 1.0, 4), (True, None, 0), (False, 0.2, 3)]
)
def test_it_follows_a_step_that_was_made(before_step: bool, final_momentum: float | None, step: int) -> None:
    """After the fourth of ten steps; one that is skipped is counted and no more."""

    class Flow(Objective):
        TERMS = ("some",)

    flow = Flow(nn.Linear(2, 2), weights={"some": 1})
    options = {"momentum": 0.6, "final_momentum": final_momentum, "before_step": before_step}
    flow.teacher = Teacher(**options, backbone=flow.backbone)
    before = flow.teacher.backbone.weight.clone()
    flow.step_number, flow.total_steps = 2, 10
    with torch.no_grad():
        flow.backbone.weight.add_(1)
    flow.finish_step(skipped=True)
    assert torch.equal(flow.teacher.backbone.weight, before)
    flow.finish_step()
    assert flow.step_number == 4
    final_momentum = 0.6 if final_momentum is None else final_momentum
    momentum = Teacher(momentum=0.6, final_momentum=final_momentum).momentum_at(step, 10)
    torch.testing.assert_close(flow.teacher.backbone.weight, torch.lerp(flow.backbone.weight, before, momentum))


@pytest.mark.parametrize(
    ("step", "total", "expected"), [(0, 10, 0.9), (5, 10, 0.95), (10, 10, 1.0), (12, 10, 1.0), (7, None, 0.9)]
)
def test_the_momentum_rises_to_one_and_stays_there(step: int, total: int | None, expected: float) -> None:
    assert Teacher(momentum=0.9, final_momentum=1.0).momentum_at(step, total) == pytest.approx(expected)


def test_it_drops_nothing_out() -> None:
    student = timm.create_model("test_vit", num_classes=0, drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5)
    teacher, images = Teacher(momentum=0.9, backbone=student), torch.randn(2, 3, 160, 160)
    assert teacher.training
    assert torch.equal(teacher.backbone(images), teacher.backbone(images))
    assert not torch.equal(student(images), student(images))
