"""DINO: head, center and schedules of the authors' code; what follows a step, and what is refused."""

import math

import pytest
import torch
from torch import nn

from repr.config import check, compose
from repr.losses.distillation import moved_center
from repr.models.heads import PrototypeHead
from repr.optim import Optim, clip_each
from tests.golden import golden
from tests.objectives.conftest import build, make_batch

DINO = golden("dino")
SMALL = ["objective.num_prototypes=12"]


@pytest.mark.parametrize("case", ["head_norm_last", "head_free_last"])
def test_the_head_is_that_of_the_authors(case):
    file = {key.removeprefix(f"{case}/"): torch.tensor(DINO[key]) for key in DINO if key.startswith(f"{case}/")}
    layers = sorted({int(key.split(".")[2]) for key in file if key.startswith("init.mlp.")})
    weights = [file[f"init.mlp.{layer}.weight"] for layer in layers]
    widths = [weights[0].shape[1], *map(len, weights)]
    head = PrototypeHead(widths, len(file["init.last_layer.weight_v"]), learn_length=case == "head_free_last")
    state = {key.removeprefix("init."): value for key, value in file.items() if key.startswith("init.mlp.")}
    state |= {"prototypes.weight": file["init.last_layer.weight_v"], "length": file["init.last_layer.weight_g"][:, 0]}
    head.load_state_dict(state)
    x = file["x"].clone().requires_grad_()
    out = head(x)
    torch.testing.assert_close(out, file["y"], rtol=1e-5, atol=1e-6)
    out.backward(file["cotangent"])
    torch.testing.assert_close(x.grad, file["grad.x"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.prototypes.weight.grad, file["grad.last_layer.weight_v"], rtol=1e-4, atol=1e-6)
    assert (head.length.grad is not None) == (case == "head_free_last")


@pytest.mark.parametrize("case", ["loss_2global", "loss_2plus3"])
def test_the_center_follows_all_rows_of_the_teacher(case):
    center = torch.zeros(DINO[f"{case}/teacher"].shape[2])
    for teacher, after in zip(DINO[f"{case}/teacher"], DINO[f"{case}/center_after"], strict=True):
        center = moved_center(center, torch.tensor(teacher).view(2, -1, len(center)), momentum=0.9)
        torch.testing.assert_close(center, torch.tensor(after[0]), rtol=1e-5, atol=1e-6)


def test_the_decay_rises_as_the_authors_does():
    base, final, epochs, steps, *_ = DINO["schedule_wd/cfg.base_final_epochs_iters_warmup_start_f64"].tolist()
    total = int(epochs * steps)
    optim = Optim(lr=1e-3, weight_decay=base, final_weight_decay=final)
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer, schedule = optim.build(model, total)
    for expected in DINO["schedule_wd/value_f64"][:total]:
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([expected, 0.0])
        optimizer.step()
        schedule.step()
    kept = schedule.state_dict()
    optimizer, schedule = optim.build(model, total)
    schedule.load_state_dict(kept)
    schedule.step()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(final)


def test_each_gradient_is_clipped_by_itself():
    names = ("a", "b", "last_layer.weight", "last_layer.bias")
    parameters = [nn.Parameter(torch.tensor(DINO[f"clip/before.{name}"])) for name in names]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    clip_each(parameters, 3.0)
    for parameter, name in zip(parameters, names, strict=True):
        torch.testing.assert_close(parameter.grad, torch.tensor(DINO[f"clip/after.{name}"]), rtol=1e-5, atol=1e-6)


def test_a_step_of_dino():
    objective = build("dino", *SMALL, "objective.freeze_steps=1", "objective.temperature_steps=4",
                      "objective.teacher_temperature=0.08")  # fmt: skip
    output = objective.step(make_batch(8))
    assert output.terms["views"].item() == pytest.approx(math.log(12), abs=2)
    assert 0 < output.logs["teacher_entropy"] < math.log(12)
    assert objective.center.abs().max() > 0
    output.terms["views"].backward()
    objective.on_before_optimizer_step(None)
    assert objective.head.prototypes.weight.grad is None
    assert objective.head.mlp[0].weight.grad is not None
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert [objective.teacher_temperature_at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.04, 0.06, 0.08, 0.08])
    objective.finish_step()
    center = objective.center.clone()
    objective.eval()
    objective.step(make_batch(8))
    assert torch.equal(objective.center, center)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["objective=dino", "views=clip"], "num_large=2 of 1 views"),
        (["objective=dino", "small_size=300"], "others are larger"),
        (["objective=dino", "objective.teacher_temperature=0"], "teacher_temperature=0; set it above 0"),
        (["objective=dino", "objective.center_momentum=2"], "center_momentum=2; set it from 0 to 1"),
        (["objective=dino", "+optim.clip_each=0"], "optim.clip_each is 0; set it above 0"),
        (["objective=dino", "optim=lars", "optim.name=lars_l2", "+optim.final_weight_decay=0.1"], "other than lars_l2"),
    ],
)
def test_what_does_not_fit_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        check(compose(options))
