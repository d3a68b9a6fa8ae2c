"""Schedules against the authors' numbers; parameter groups."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from repr.config import compose
from repr.models.teacher import Teacher
from repr.optim import Optim
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
        "mcl_const_cooldown_p1": {"schedule": "constant", "cooldown_steps": cooldown},
        # the second cooldown case ends at 1e-5 instead of 0
        "mcl_const_cooldown_p2": {
            "schedule": "constant", "cooldown_steps": cooldown, "cooldown_power": 2.0, "final_lr": 1e-5
        },
    }  # fmt: skip
    assert keys == {*options, "base_lr", "warmup", "total_steps", "cooldown_steps"}
    for name, kwargs in options.items():
        optim = Optim(lr=base, warmup_steps=warmup, **kwargs)
        ours = [base * optim.lr_factor(step, total) for step in range(total)]
        np.testing.assert_allclose(ours, data[f"{case}.{name}"], rtol=1e-12, atol=1e-18, err_msg=name)


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in golden("slip_schedule")}))
def test_a_warm_up_from_a_given_rate_equals_the_authors_numbers(case: str) -> None:
    """The formula of SwAV's script too, which reaches the peak at the last warm-up step."""
    data = {key.split("/")[1]: value for key, value in golden("slip_schedule").items() if key.startswith(f"{case}/")}
    per_epoch, total = int(data["iters_per_epoch"]), int(data["epochs"] * data["iters_per_epoch"])
    base = float(data["base_f64"])
    options = {"warmup_lr": float(data["start_f64"]), "final_lr": float(data["final_f64"])}
    optim = Optim(lr=base, warmup_steps=per_epoch * int(data["warmup_epochs"]), **options)
    ours = [base * optim.lr_factor(step, total) for step in range(total)]
    np.testing.assert_allclose(ours, data["lr_f64"], rtol=1e-12)


@pytest.mark.parametrize("case", ["a", "b"])
def test_a_warm_up_from_zero_to_the_step_after_it_equals_maes_numbers(case: str) -> None:
    data = {k.split("/")[1]: v for k, v in golden("mae_schedule_lars").items() if k.startswith(f"{case}/")}
    base, per_epoch = float(data["lr"]), int(data["iters_per_epoch"])
    options = {"warmup_steps": per_epoch * int(data["warmup_epochs"]), "warmup_lr": 0.0, "peak_after_warmup": True}
    total = per_epoch * int(data["epochs"])
    optim = Optim(lr=base, final_lr=float(data["min_lr"]), **options)
    ours = [base * optim.lr_factor(step, total) for step in range(total)]
    np.testing.assert_allclose(ours, data["lr_f64"], rtol=1e-6, atol=1e-12)  # their peak is a float32 here


@pytest.mark.parametrize("case", ["lars0", "lars1"])
def test_lars_equals_the_one_of_maes_probe(case: str) -> None:
    """Biases neither scaled nor decayed; with a decay, inside the norm, it is ours, and without, timm's."""
    stored = golden("mae_schedule_lars").items()
    data = {k.split("/")[1]: torch.as_tensor(v) for k, v in stored if k.startswith(f"{case}/")}
    module = nn.ParameterDict({name: nn.Parameter(data[f"init.{name}"].clone()) for name in ("weight", "bias")})
    options = {"momentum": data["momentum"].item(), "trust_coeff": data["trust"].item(), "eps": 0.0}
    lr, decay = data["lr"].item(), data["weight_decay"].item()
    if decay:
        optim = Optim(name="lars_l2", lr=lr, weight_decay=decay, schedule="constant", options=options)
        optimizer, _ = optim.build(module, 3)
    else:
        groups = [{"params": [module["weight"]], "always_adapt": True}, {"params": [module["bias"]]}]
        optimizer = timm.optim.Lars(groups, lr=lr, **options)
    for step in range(3):
        for name in module:
            module[name].grad = data[f"step{step}.grad.{name}"]
        optimizer.step()
        for name in module:
            ours, theirs = module[name].data, data[f"step{step}.param.{name}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_swavs_schedule_runs_from_its_start_over_the_peak_to_its_end() -> None:
    recipe = compose(["experiment=swav_rn50"]).optim
    optim = instantiate(recipe)
    optimizer, schedule = optim.build(nn.Linear(2, 2), 5000)
    rates = []
    for _ in range(5001):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.3)
    assert rates[3119] == pytest.approx(4.8)
    assert rates[3120] == pytest.approx(4.8)
    assert rates[-1] == pytest.approx(0.0048)


@pytest.mark.parametrize("case", ["larc0", "larc1"])
def test_timms_lars_under_our_config_equals_apex_larc(case: str) -> None:
    data = {key.split("/")[1]: torch.as_tensor(v) for key, v in golden("swav_larc").items() if key.startswith(case)}
    names = [key.removeprefix("init.") for key in data if key.startswith("init.")]
    module = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(data[f"init.{name}"].clone()) for name in names})
    # lr 1 and the schedule constant: the steps' own rates are put in below
    optim = instantiate(compose(["optim=lars"]).optim, lr=1.0, weight_decay=data["weight_decay"].item(), warmup_steps=0)
    assert {key: data[key].item() for key in ("momentum", "eps")} == pytest.approx(
        {key: optim.options[key] for key in ("momentum", "eps")}
    )
    assert data["trust"].item() == pytest.approx(optim.options["trust_coeff"])
    optimizer, _ = optim.build(module, 3)
    assert len(optimizer.param_groups) == 1  # biases and gains too
    for step in range(3):
        optimizer.param_groups[0]["lr"] = data["lr"][step].item()
        frozen = step < data["prototypes_grad_none_for_steps"]
        for name in names:
            without = frozen and name == "prototypes.weight"
            module[name.replace(".", "/")].grad = None if without else data[f"step{step}.grad.{name}"]
        optimizer.step()
        for name in names:
            ours, theirs = module[name.replace(".", "/")].data, data[f"step{step}.param.{name}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


PIXPRO = golden("pixpro_schedule_lars")


def test_pixpros_schedule_equals_the_authors_numbers() -> None:
    data = {key.split("/")[1]: v.item() for key, v in PIXPRO.items() if key.startswith("lr_warmup") and v.size == 1}
    per_epoch, base = data["iters_per_epoch"], data["base_lr"]
    optim = Optim(
        lr=base, warmup_steps=data["warmup_epochs"] * per_epoch, warmup_lr=base / data["warmup_multiplier"],
        peak_after_warmup=True, final_lr=data["eta_min"],
    )  # fmt: skip
    optimizer, schedule = optim.build(nn.Linear(2, 2), data["epochs"] * per_epoch)
    rates = []
    for _ in range(data["epochs"] * per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, PIXPRO["lr_warmup_cosine/lr_f64"], rtol=1e-7)


def test_pixpros_momentum_equals_the_authors_numbers() -> None:
    data = {key.split("/")[1]: value for key, value in PIXPRO.items() if key.startswith("momentum/")}
    teacher = Teacher(momentum=0.99, final_momentum=1.0)
    ours = [teacher.momentum_at(k, int(data["K"])) for k in data["k"].tolist()]
    np.testing.assert_allclose(ours, data["m_f64"], rtol=1e-12)


@pytest.mark.parametrize("case", ["lars0", "lars1"])
def test_lars_l2_equals_the_authors_lars(case: str) -> None:
    """Three steps; biases and gains neither decayed nor scaled."""
    data = {key.split("/")[1]: torch.as_tensor(v) for key, v in PIXPRO.items() if key.startswith(f"{case}/")}
    names = [key.removeprefix("init.") for key in data if key.startswith("init.")]
    module = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(data[f"init.{name}"].clone()) for name in names})
    recipe = instantiate(compose(["experiment=pixpro_rn50"]).optim)
    assert (recipe.name, recipe.decay_1d) == ("lars_l2", False)
    assert {key: data[key].item() for key in ("momentum", "eps")} == pytest.approx(
        {key: recipe.options[key] for key in ("momentum", "eps")}
    )
    assert data["trust"].item() == pytest.approx(recipe.options["trust_coeff"])
    decay = data["weight_decay"].item()
    optim = replace(recipe, lr=data["lr"].item(), weight_decay=decay, schedule="constant", warmup_steps=0)
    optimizer, _ = optim.build(module, 3)
    for step in range(3):
        if step == 2:  # as after a resume
            state, (optimizer, _) = optimizer.state_dict(), optim.build(module, 3)
            optimizer.load_state_dict(state)
        for name in names:
            module[name.replace(".", "/")].grad = data[f"step{step}.grad.{name}"]
        optimizer.step()
        for name in names:
            ours, theirs = module[name.replace(".", "/")].data, data[f"step{step}.param.{name}"]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


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


@pytest.mark.parametrize("total", [12, 126, 1000])
def test_phases_may_be_shares_of_the_run(total: int) -> None:
    share, steps = (
        Optim(schedule="constant", warmup_steps=warmup, cooldown_steps=cooldown)
        for warmup, cooldown in ((0.16, 0.5), (round(0.16 * total), round(0.5 * total)))
    )
    factors = [optim.lr_factor(step, total) for optim in (share, steps) for step in range(total)]
    assert factors[:total] == factors[total:]
    share.build(nn.Linear(2, 2), 1)  # never longer than the run
    with pytest.raises(ValueError, match="exceed the 1 steps"):
        steps.build(nn.Linear(2, 2), 1)


def test_decay_goes_to_parameters_of_two_dimensions_and_more() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.scale = nn.Parameter(torch.zeros(()))
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    by_decay: dict[float, set[int]] = {0.0: set(), 0.3: set()}
    for group in Optim(weight_decay=0.3).param_groups(model):
        by_decay[group["weight_decay"]] |= {id(p) for p in group["params"]}
    assert by_decay[0.3] == {id(model[0].weight)}
    assert by_decay[0.0] == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model.scale)}
    for group in Optim(weight_decay=0.3, decay_1d=True).param_groups(model):
        assert group["weight_decay"] == (0.0 if group["params"] == [model.scale] else 0.3)


def test_what_a_module_lists_is_not_decayed() -> None:
    model = nn.Module()
    model.backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    for decay_1d in (False, True):
        groups = Optim(weight_decay=0.3, decay_1d=decay_1d).param_groups(model)
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decay[id(model.backbone.pos_embed)] == decay[id(model.backbone.cls_token)] == 0
        assert decay[id(model.backbone.patch_embed.proj.weight)] == 0.3


def test_options_of_a_config_are_plain_values_in_the_state() -> None:
    optim = Optim(name="adan", options=OmegaConf.create({"betas": [0.98, 0.92, 0.99]}))
    (group,) = optim.build(nn.Linear(2, 2, bias=False), 1)[0].param_groups
    assert type(group["betas"]) in (list, tuple)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adahessian", {}, "adahessian makes no step"),
        ("adan", {"betas": [0.9, 0.98]}, "it takes another number of betas, such as three"),
        ("lars_l2", {"betas": [0.9, 0.98]}, "unexpected keyword argument 'betas'"),
    ],
)
def test_an_optimizer_that_makes_no_step_is_refused_at_once(name: str, options: dict, words: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=words):  # as the check of a config builds it
        Optim(name=name, options=options)
    assert Optim(name="adan", options={"betas": [0.98, 0.92, 0.99]}).name == "adan"


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
        ({"warmup_steps": 1.5}, "a number of steps, or to a share of the run below 1"),
        ({"warmup_steps": None}, "optim.warmup_steps is None"),
        ({"warmup_steps": -0.1}, "optim.warmup_steps is -0.1"),
        ({"warmup_steps": 0.6, "cooldown_steps": 0.6, "schedule": "constant"}, "exceed the 5 steps"),
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


def test_adam_is_fused_where_nothing_else_was_asked_for() -> None:
    modules = {device: nn.Module() for device in ("cpu", "cuda", "meta")}
    with FakeTensorMode():
        for device, module in modules.items():
            module.weight = nn.Parameter(torch.empty(2, 2, device=device))
    for device, name, options, expected in (
        ("cuda", "adamw", {}, True),
        ("cuda", "adam", {}, True),
        ("cuda", "adamw", {"foreach": True}, None),
        ("cuda", "adamw", {"fused": False}, False),
        ("cpu", "adamw", {}, True),
        ("cpu", "adamw", {"foreach": False}, None),
        ("meta", "adamw", {}, None),
    ):
        optimizer, _ = Optim(name=name, options=options).build(modules[device], 3)
        assert {group["fused"] for group in optimizer.param_groups} == {expected}
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)  # it would unscale after clipping


@pytest.mark.parametrize("name", ["adamw", "lars", "momentum"])
def test_a_state_that_is_laid_out_otherwise_goes_on_alike(name: str) -> None:
    def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, numbers: range) -> torch.Tensor:
        for number in numbers:
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            weight.grad = torch.empty_like(weight).copy_(drawn)  # laid out as autograd does
            optimizer.step()
        return weight.detach()

    def convolution(memory_format: torch.memory_format) -> tuple[torch.optim.Optimizer, nn.Parameter]:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=memory_format)
        return Optim(name=name).build(module, 9)[0], module.weight

    whole = steps(*convolution(torch.channels_last), range(6))
    first, weight = convolution(torch.contiguous_format)  # as FSDP2 has it
    steps(first, weight, range(3))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        optimizer, other = convolution(memory_format)
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
        other.data.copy_(weight.detach())
        torch.testing.assert_close(steps(optimizer, other, range(3, 6)), whole)
