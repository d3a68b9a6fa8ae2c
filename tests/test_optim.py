"""Schedules against the authors' numbers; parameter groups."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from repr.optim import Optim, lr_factor
from tests.golden import golden


@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in golden("schedules")}))
def test_every_schedule_equals_the_authors_numbers(case: str) -> None:
    data = golden("schedules")
    keys = {key.removeprefix(f"{case}.") for key in data if key.startswith(case)}
    base, warmup, total, cooldown = (
        data[f"{case}.{k}"].item() for k in ("base_lr", "warmup", "total_steps", "cooldown_steps")
    )
    options = {
        "mcl_cosine": {"schedule": "cosine"},
        "gap_cosine": {"schedule": "cosine"},
        "mcl_const": {"schedule": "constant"},
        "mcl_const_cooldown_p1": {"schedule": "constant", "cooldown": cooldown},
        # the second cooldown case ends at 1e-5 instead of 0
        "mcl_const_cooldown_p2": {"schedule": "constant", "cooldown": cooldown, "power": 2.0, "final": 1e-5 / base},
    }
    assert keys == {*options, "base_lr", "warmup", "total_steps", "cooldown_steps"}
    for name, kwargs in options.items():
        ours = [base * lr_factor(step, total=total, warmup=warmup, **kwargs) for step in range(total)]
        np.testing.assert_allclose(ours, data[f"{case}.{name}"], rtol=1e-12, atol=1e-18, err_msg=name)


def test_the_optimizer_follows_the_schedule() -> None:
    model = nn.Linear(3, 2)
    optimizer, schedule = Optim(lr=0.1, warmup_steps=2, final_lr=0.01).build(model, 6)
    seen = []
    for _ in range(7):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert seen[-1] == pytest.approx(0.01)
    assert all(group["lr"] == pytest.approx(0.01) for group in optimizer.param_groups)


def test_decay_goes_to_parameters_of_two_dimensions_and_more() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.scale = nn.Parameter(torch.zeros(()))
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    by_decay = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in Optim(weight_decay=0.3).param_groups(model)
    }
    assert by_decay[0.3] == {id(model[0].weight)}
    assert by_decay[0.0] == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model.scale)}
    assert [g["weight_decay"] for g in Optim(weight_decay=0.3, decay_1d=True).param_groups(model)] == [0.3]


def test_layer_decay_falls_towards_the_input_and_spares_the_rest() -> None:
    model = nn.Module()
    model.backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0)
    model.head = nn.Linear(4, 4)
    lrs = {id(p): group["lr"] for group in Optim(lr=1.0, layer_decay=0.5).param_groups(model) for p in group["params"]}
    assert len(lrs) == len(list(model.parameters()))
    blocks = [lrs[id(block.attn.qkv.weight)] for block in model.backbone.blocks]
    assert blocks == pytest.approx([0.25, 0.5, 1.0])  # timm puts the last block and the final norm in one group
    assert lrs[id(model.backbone.patch_embed.proj.weight)] == pytest.approx(0.125)
    assert lrs[id(model.backbone.norm.weight)] == 1.0
    assert lrs[id(model.head.weight)] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamww"}, "optim.name"),
        ({"warmup_steps": 9}, "optim.warmup_steps=9"),
        ({"schedule": "linear"}, "cosine or constant"),
        ({"cooldown_steps": 2}, "optim.schedule=constant"),
        ({"layer_decay": 2.0}, "optim.layer_decay"),
    ],
)
def test_bad_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optim(**options).build(nn.Linear(2, 2), 5)


def test_layer_decay_needs_layers() -> None:
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="timm backbone"):
        Optim(layer_decay=0.5).build(model, 5)
