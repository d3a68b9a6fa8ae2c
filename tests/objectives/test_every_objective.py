"""What holds for every file of conf/objective."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.objectives.base import Objective
from tests.objectives.conftest import OBJECTIVES, build, config, make_batch


def train(objective: Objective, optimizer: Optimizer, batch: Batch) -> dict[str, Tensor]:
    """A step of training by hand; gives the terms."""
    terms = objective.step(batch).terms
    optimizer.zero_grad()
    objective.total(terms).backward()
    optimizer.step()
    objective.finish_step()
    return {name: term.detach() for name, term in terms.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_finite_and_reaches_every_parameter(name: str, batch: Batch) -> None:
    config(name)  # the check finds no fault
    objective = build(name)
    output = objective.step(batch)
    assert output.terms.keys() == objective.weights.keys()
    sentences = [objective.meanings[f"train/{term}"] for term in objective.weights]
    assert not [sentence for sentence in sentences if "partial" in sentence]  # that is what Hydra says of its own
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
    optimizer, _ = objective.optim.build(objective, 30)
    losses = [objective.total(train(objective, optimizer, batch)).item() for _ in range(30)]
    # At the first step the center of DINO and iBOT is empty; as long as MoCo's queue fills, its task becomes harder.
    centred, fills = name in ("dino", "ibot"), name in ("mocov2", "densecl")
    first = losses[1] if centred else objective.chance(8)["contrast"] if fills else losses[0]
    squares = {"lejepa": 0.05, "ijepa": 0.1}  # which are small from the start
    assert losses[-1] < first - squares.get(name, 0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_checkpoint_holds_is_all_that_training_goes_on_from(name: str, batch: Batch) -> None:
    """Teachers, queues, centers, words and schedules included; tests/test_kills.py kills runs."""
    options = ("optim.lr=1e-3", "optim.schedule=constant")
    objective = build(name, *options)
    optimizer, _ = objective.optim.build(objective, 30)
    for _ in range(2):
        train(objective, optimizer, batch)
    other = build(name, *options, seed=1)
    other.load_state_dict(objective.state_dict())
    other.step_number = objective.step_number  # as at the start of training, from the Trainer's count
    others, _ = other.optim.build(other, 30)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        terms = [train(objective, optimizer, batch), train(other, others, batch)]
        assert all(torch.equal(terms[0][term], terms[1][term]) for term in terms[0])
    state = other.state_dict()
    assert [key for key, value in objective.state_dict().items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_inputs_of_a_half_precision_model_stay_finite(name: str, batch: Batch) -> None:
    objective = build(name).bfloat16()
    batch["views"] = [view.bfloat16() for view in batch["views"]]
    objective.total(objective.step(batch).terms).backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def numbers() -> list[tuple[str, str]]:
    """Each numeric option of each flow, with a file of conf/objective that has it."""
    found: dict[tuple[str, str], str] = {}
    for name in OBJECTIVES:
        node = compose([f"objective={name}"]).objective
        for option in node:
            if isinstance(node[option], int | float) and not isinstance(node[option], bool):
                found.setdefault((node["_target_"], option), name)
    return [(name, option) for (_, option), name in found.items()]


@pytest.mark.slow
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_below_its_range_is_refused_by_the_check_or_trains(value: int) -> None:
    for name, option in numbers():
        override = f"objective.{option}={value}"
        told = faults(name, override)
        if told:
            assert option in "".join(told), override
            continue
        objective = build(name, override)
        loss = objective.total(objective.step(make_batch(objective=name)).terms)
        loss.backward()
        assert loss.isfinite(), (name, override)


def faults(name: str, override: str) -> list[str]:
    try:
        config(name, override)
    except ConfigError as error:
        return error.faults
    return []
