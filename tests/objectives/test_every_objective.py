"""What holds for every file of conf/objective."""

import math

import pytest
import torch

from repr.batch import Batch
from tests.objectives.conftest import OBJECTIVES, build


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_finite_and_reaches_every_parameter(name: str, batch: Batch) -> None:
    objective = build(name)
    output = objective.step(batch)
    assert output.terms.keys() == objective.weights.keys()
    assert all(term.shape == () and term.dtype == torch.float32 for term in output.terms.values())
    loss = objective.total(output.terms)
    assert loss.isfinite()
    torch.testing.assert_close(loss, sum(objective.weights[k] * v for k, v in output.terms.items()))
    loss.backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None for p in objective.parameters() if not p.requires_grad)
    levels = {name: float(level) for name, level in objective.chance(8).items() if level is not None}
    levels |= {key.removesuffix(".chance"): float(v) for key, v in output.logs.items() if key.endswith(".chance")}
    assert levels.keys() <= set(objective.TERMS)
    assert all(map(math.isfinite, levels.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_thirty_steps_lower_the_loss(name: str, batch: Batch) -> None:
    objective = build(name, "optim.lr=1e-3", "optim.schedule=constant")
    optimizer, schedule = objective.optim.build(objective, 30)
    losses = []
    for _ in range(30):
        loss = objective.total(objective.step(batch).terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        objective.finish_step()
        losses.append(loss.item())
    # At the first step the center of DINO and iBOT is empty; as long as MoCo's queue fills, its task becomes harder.
    centred, fills = name in ("dino", "ibot"), name in ("mocov2", "densecl")
    first = losses[1] if centred else objective.chance(8)["contrast"] if fills else losses[0]
    squares = {"lejepa": 0.05, "ijepa": 0.1}  # which are small from the start
    assert losses[-1] < first - squares.get(name, 0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_state_dict_restores_the_objective(name: str, batch: Batch) -> None:
    first, second = build(name, seed=0), build(name, seed=1)
    second.load_state_dict(first.state_dict())
    a, b = first.step(batch), second.step(batch)
    assert all(torch.equal(a.terms[k], b.terms[k]) for k in a.terms)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_inputs_of_a_half_precision_model_stay_finite(name: str, batch: Batch) -> None:
    objective = build(name).bfloat16()
    batch["views"] = [view.bfloat16() for view in batch["views"]]
    objective.total(objective.step(batch).terms).backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
