"""BYOL and MoCo against trajectories of the authors' code, queue, ways, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.objectives.momentum import Momentum
from tests.golden import golden
from tests.objectives.conftest import build, make_batch

BYOL, MOCO, DENSE = golden("byol"), golden("mocov3"), golden("densecl")


class Tiny(nn.Module):
    """The encoder of the golden runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.conv, self.bn = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu().mean((2, 3))


def load(file: dict[str, np.ndarray], case: str, stage: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Golden weights under our names; ``names`` is theirs -> ours, by the beginning."""
    found = {}
    for key, value in file.items():
        name = key.removeprefix(f"{case}/{stage}.")
        for theirs, ours in names.items():
            if name != key and name.startswith(f"{theirs}."):
                found[name.replace(theirs, ours, 1)] = torch.tensor(value)
    return found


def trained(objective: Momentum, views: Tensor, rate: float, momenta: list[float], *, before: bool) -> list[float]:
    """Losses of steps of plain SGD, with the teacher following before or after each."""
    losses, teacher = [], objective.teacher
    for step, momentum in enumerate(momenta):
        if before:
            teacher.update(objective, momentum)
        loss = objective.total(objective.step(Batch(views=list(views[step]))).terms)
        objective.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        if not before:
            teacher.update(objective, momentum)
    return losses


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert expected
    for name, value in expected.items():
        if name in state and value.is_floating_point():
            bound = tolerance * max(1.0, value.abs().max().item())
            torch.testing.assert_close(state[name].float(), value.float(), rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("case", ["resnet_form", "vit_form"])
def test_moco_v3(case):
    is_vit, head = case == "vit_form", "head" if case == "vit_form" else "fc"
    width, hidden, dim = (len(MOCO[f"{case}/init.{name}"]) for name in (
        "base_encoder.conv.weight", f"base_encoder.{head}.0.weight", f"base_encoder.{head}.{6 if is_vit else 3}.weight",
    ))  # fmt: skip
    objective = Momentum(
        Tiny(width), hidden_dim=hidden, dim=dim, num_layers=3 if is_vit else 2, last_norm="plain",
        predictor_last_norm="plain" if is_vit else None, weights={"contrast": 1},
        temperature=float(MOCO[f"{case}/temperature"]), before_step=True,
    ).double()  # fmt: skip
    names = {
        f"base_encoder.{head}": "projector", "base_encoder": "backbone", "predictor": "predictor",
        f"momentum_encoder.{head}": "teacher.projector", "momentum_encoder": "teacher.backbone",
    }  # fmt: skip
    theirs = load(MOCO, case, "init", names)
    objective.load_state_dict({k: v for k, v in theirs.items() if k in objective.state_dict()}, strict=True)
    momenta = MOCO[f"{case}/momentum_f64"].tolist()
    views = torch.tensor(MOCO[f"{case}/views"], dtype=torch.float64)
    losses = trained(objective, views, float(MOCO[f"{case}/sgd_lr"]), momenta, before=True)
    assert losses == pytest.approx(MOCO[f"{case}/loss"].tolist(), rel=1e-5)
    assert_close(objective.state_dict(), load(MOCO, case, "final", names), 1e-4)


@pytest.mark.parametrize("case", ["full_a", "full_b"])
def test_byol(case):
    """The reference passes both views through BatchNorm at once: as if each were both, and they were compared one way.

    It has biases besides, which the norm takes out.
    """
    width, hidden, dim = (len(BYOL[f"{case}/init.online_encoder.{name}"]) for name in (
        "net.0.weight", "projector.0.weight", "projector.3.weight",
    ))  # fmt: skip
    objective = Momentum(
        Tiny(width), hidden_dim=hidden, dim=dim, last_bias=True, one_way=True, weights={"regression": 2}
    )
    objective = objective.double()
    names = {
        "online_encoder.net.0": "backbone.conv", "online_encoder.net.1": "backbone.bn",
        "online_encoder.projector": "projector", "online_predictor": "predictor",
        "target_encoder.net.0": "teacher.backbone.conv", "target_encoder.net.1": "teacher.backbone.bn",
        "target_encoder.projector": "teacher.projector",
    }  # fmt: skip
    theirs = load(BYOL, case, "init", names)
    objective.load_state_dict({k: v for k, v in theirs.items() if k in objective.state_dict()}, strict=True)
    first = torch.tensor(BYOL[f"{case}/view1"], dtype=torch.float64)
    second = first.flip(-1) * 0.8 + 0.1
    views = torch.stack([torch.cat([first, second], 1), torch.cat([second, first], 1)], dim=1)
    momentum = float(BYOL[f"{case}/cfg.tau_f64"])
    losses = trained(objective, views, float(BYOL[f"{case}/cfg.sgd_lr"]), [momentum] * 3, before=False)
    assert losses == pytest.approx(BYOL[f"{case}/loss"].tolist(), rel=1e-5)
    final = load(BYOL, case, "final", names)
    shifted = {
        name for name in final if name.endswith("projector.1.running_mean") or name == "predictor.1.running_mean"
    }
    assert_close(objective.state_dict(), {name: x for name, x in final.items() if name not in shifted}, 1e-4)


def slots(length: int, batch_size: int, num_steps: int) -> Tensor:
    """Where the ring of the authors' code has the rows of ours, newest first, after so many steps."""
    order = torch.arange(length).flip(0)  # theirs overwrite the first place first
    for step in range(num_steps):
        first = step * batch_size % length
        order = torch.cat([torch.arange(first, first + batch_size), order[:-batch_size]])
    return order


class TinyMap(Tiny):
    """The same with the part of timm's interface that cells need."""

    def forward_intermediates(self, x: Tensor, **_: object) -> tuple[Tensor, list[Tensor]]:
        features = self.bn(self.conv(x)).relu()
        return features, [features]

    def forward_head(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("case", ["full_a", "full_lambda03"])
def test_densecl(case):
    file = {key.removeprefix(f"{case}/"): DENSE[key] for key in DENSE if key.startswith(f"{case}/")}
    share, length = float(file["cfg.lambda"]), file["init.queue"].shape[1]
    objective = Momentum(
        TinyMap(6), hidden_dim=7, dim=5, last_bias=True, head_norm=False, predictor_layers=0, queue_length=length,
        one_way=True, before_step=True, temperature=float(file["cfg.temperature"]),
        weights={"contrast": 1 - share, "dense": share},
    )  # fmt: skip
    names = {
        f"encoder_{theirs}.{part}": f"{ours}{name}"
        for theirs, ours in (("q", ""), ("k", "teacher."))
        for part, name in (("0", "backbone"), ("1.mlp", "projector"), ("1.mlp2", "dense_projector"))
    }

    def named(stage: str) -> dict[str, Tensor]:  # convolutions of one cell are linear layers
        theirs = load(DENSE, case, stage, names)
        return {name: x.flatten(1) if "projector" in name and x.ndim == 4 else x for name, x in theirs.items()}

    for theirs, queue in (("queue", objective.queue), ("queue2", objective.dense_queue)):
        queue.rows.copy_(torch.tensor(file[f"init.{theirs}"]).T.flip(0))  # newest first
    objective = objective.double()
    unknown = objective.load_state_dict(named("init"), strict=False)
    assert unknown.unexpected_keys == []
    assert all("queue" in name for name in unknown.missing_keys)
    views = torch.tensor(file["views"], dtype=torch.float64).transpose(1, 2)
    momenta = [float(file["cfg.momentum_f64"])] * len(views)
    losses = trained(objective, views, float(file["cfg.sgd_lr"]), momenta, before=True)
    expected = file["loss_contra_single"] + file["loss_contra_dense"]
    assert losses == pytest.approx(expected.tolist(), rel=3e-5)
    assert_close(objective.state_dict(), named("final"), 1e-4)
    for theirs, queue in (("queue", objective.queue), ("queue2", objective.dense_queue)):
        rows = torch.tensor(file[f"final.{theirs}"]).T[slots(length, views.shape[2], len(views))]
        torch.testing.assert_close(queue.rows[0].float(), rows, rtol=0, atol=1e-4)


def test_a_queue_keeps_keys_of_earlier_batches() -> None:
    objective = build("mocov2", "objective.queue_length=16", "data.batch_size=8")
    first, second = make_batch(8, seed=1), make_batch(8, seed=2)
    value = objective.step(first).terms["contrast"]
    assert objective.queue.rows[0, 8:].abs().max() == 0  # half of it is filled now
    kept = objective.queue.rows[0, :8].clone()
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(8))
    assert 0 < value < math.log(17)
    objective.step(second)
    assert torch.equal(objective.queue.rows[0, 8:], kept)
    objective.eval()
    objective.step(first)
    assert torch.equal(objective.queue.rows[0, 8:], kept)  # evaluation changes nothing


def own_contrast(query: Tensor, keys: Tensor, *, temperature: float, queue: Tensor) -> Tensor:
    """A loss of one's own, whose graph keeps the queue until backward."""
    q, k = (nn.functional.normalize(rows, dim=1) for rows in (query, keys))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return nn.functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def test_a_loss_of_ones_own_may_keep_the_queue() -> None:
    heads = {"hidden_dim": 8, "dim": 4, "predictor_layers": 0, "queue_length": 16, "one_way": True}
    gradients = []
    for losses in (None, {"contrast": own_contrast}):
        torch.manual_seed(0)
        objective = Momentum(Tiny(6), weights={"contrast": 1}, losses=losses, **heads)
        for seed in range(3):  # the queue moves on between a step and its backward
            objective.zero_grad()
            objective.total(objective.step(make_batch(8, seed=seed)).terms).backward()
        gradients.append([parameter.grad for parameter in objective.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["byol", "mocov2", "mocov3"])
def test_the_teacher_gets_no_gradient_and_all_else_does(name: str) -> None:
    objective = build(name, "data.batch_size=8", *(["objective.queue_length=16"] if name == "mocov2" else []))
    objective.total(objective.step(make_batch(8)).terms).backward()
    for parameter_name, parameter in objective.named_parameters():
        assert (parameter.grad is None) == parameter_name.startswith("teacher."), parameter_name


def test_the_patch_embedding_can_stay_as_it_was() -> None:
    objective = build("mocov3", "objective.freeze_patches=true")
    assert not any(parameter.requires_grad for parameter in objective.backbone.patch_embed.parameters())
    with pytest.raises(ValueError, match="has no patch embedding"):
        Momentum(Tiny(4), freeze_patches=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["objective=byol", "views=multicrop"], "compares two views of a sample, and views has 8"),
        (
            ["objective=mocov2", "objective.queue_length=100", "data.batch_size=64"],
            "queue_length=100 is not a multiple",
        ),
        (["objective=byol", "objective.queue_length=128", "data.batch_size=64"], "queue_length has nothing to serve"),
        (["objective=mocov3", "objective.temperature=0"], "temperature=0; set it above 0"),
        (["objective=byol", "exchange=ring"], "no loss whose rows can be passed on"),
    ],
)
def test_what_does_not_fit_is_told(options: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(compose(options))


def test_what_does_not_fit_cells_is_told() -> None:
    small = ["image_size=32", "backbone.name=test_resnet", "objective.queue_length=100", "data.batch_size=64"]
    with pytest.raises(ConfigError) as refused:
        check(compose(["objective=densecl", *small]))
    told = "\n".join(refused.value.faults)
    assert "queue_length=100 is not a multiple" in told
    assert "makes one cell of a view of 32 x 32 pixels" in told
    for options, why in (
        ({"queue_length": 0}, "weights.dense compares cells with a queue"),
        ({"queue_length": 8, "weights": {"dense": 1}}, "weights.dense alone leaves the other projector"),
    ):
        with pytest.raises(ValueError, match=why):
            Momentum(TinyMap(4), **{"weights": {"contrast": 1, "dense": 1}, **options})
