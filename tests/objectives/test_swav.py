"""The SwAV flow: the authors' trajectories, queue, freeze, precision, and what it refuses."""

import csv
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.fit import main
from repr.objectives.swav import SwAV
from repr.runs.initial_weights import load_weights
from tests.conftest import RunGroup
from tests.golden import golden
from tests.objectives.conftest import build, make_batch

LOSS = golden("swav_loss")


class Tower(nn.Module):
    """Passes embeddings on, so that the flow can be fed with the authors' numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def flow_of(data: dict[str, Tensor], queue_length: int) -> SwAV:
    num_prototypes, dim = data["prototypes_init"].shape
    flow = SwAV(
        Tower(dim),
        dim=dim,
        num_prototypes=num_prototypes,
        assign_views=data["crops_for_assign"].tolist(),
        temperature=data["temperature"].item(),
        epsilon=data["epsilon"].item(),
        num_iters=data["sinkhorn_iterations"].item(),
        freeze_steps=int(data["freeze_prototypes_niters"]),
        queue_length=queue_length,
    )
    flow.head = nn.Identity()
    with torch.no_grad():
        flow.prototypes.weight.copy_(data["prototypes_init"])
    return flow


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in LOSS}))
def test_the_flow_equals_the_authors_loop(case: str) -> None:
    """Several steps with SGD on the prototypes: loss, gradients, renormalisation, queue, freeze."""
    data = {key.split("/")[1]: torch.as_tensor(value) for key, value in LOSS.items() if key.startswith(f"{case}/")}
    flow = flow_of(data, int(data["queue_length"]))
    options = {"lr": "sgd_lr", "momentum": "sgd_momentum", "weight_decay": "sgd_weight_decay"}
    optimizer = torch.optim.SGD(flow.prototypes.parameters(), **{k: data[v].item() for k, v in options.items()})
    close = {"rtol": 1e-4, "atol": 1e-6}
    for step, raw in enumerate(data["raw_embeddings"]):
        raw = raw.clone().requires_grad_()
        optimizer.zero_grad()
        output = flow.step(Batch(views=list(raw.split(int(data["batch_size"])))))
        loss = flow.total(output.terms)
        torch.testing.assert_close(flow.prototypes.weight.data, data["prototypes_used"][step], **close)
        loss.backward()
        torch.testing.assert_close(loss, data["loss"][step], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(raw.grad, data["grad_raw_embeddings"][step], **close)
        flow.on_before_optimizer_step(optimizer)
        if step < flow.freeze_steps:
            assert flow.prototypes.weight.grad is None
        else:
            torch.testing.assert_close(flow.prototypes.weight.grad, data["grad_prototypes"][step], **close)
        optimizer.step()
        flow.finish_step()
        torch.testing.assert_close(flow.prototypes.weight.data, data["prototypes_after"][step], **close)
    if flow.queue is not None:
        torch.testing.assert_close(flow.queue.rows, data["queue_final"], **close)


def test_the_queue_acts_only_once_it_is_full_and_starts_when_told() -> None:
    with_queue = build("swav", "objective.queue_length=16", "objective.queue_start_step=1", "data.batch_size=8")
    without = build("swav")
    for step in range(5):
        batch = make_batch(8, seed=step)
        a, b = (flow.step(batch).terms["swapped_prediction"].item() for flow in (with_queue, without))
        assert (a == b) == (step < 3), step
        with_queue.finish_step()
    assert with_queue.queue is not None
    assert with_queue.queue.is_full


def test_the_queue_is_in_the_state_dict(tmp_path: Path) -> None:
    first, second = (build("swav", "objective.queue_length=8", "data.batch_size=8", seed=seed) for seed in (0, 1))
    first.step(make_batch(8))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.queue.is_full
    assert torch.equal(second.queue.rows, first.queue.rows)
    values = [flow.step(make_batch(8)).terms["swapped_prediction"] for flow in (first, second)]
    assert torch.equal(*values)


def test_prototypes_and_queue_of_another_shape_start_afresh(tmp_path: Path) -> None:
    old = build("swav", "objective.queue_length=8", "data.batch_size=8")
    torch.save({"state_dict": old.state_dict()}, tmp_path / "old.ckpt")
    new = build("swav", "objective.num_prototypes=5", seed=1)
    report = load_weights(new, str(tmp_path / "old.ckpt"))
    assert report.missing == ["prototypes.weight"]
    assert report.unused == ["queue.num_filled", "queue.rows"]
    assert torch.equal(new.head[0].weight, old.head[0].weight)
    assert new.step_number == 0


def test_steps_are_counted_on_after_a_resume() -> None:
    flow = build("swav", "objective.freeze_steps=5")
    flow.step_number = 4
    for frozen in (True, False):
        flow.step(make_batch(8)).terms["swapped_prediction"].backward()
        flow.on_before_optimizer_step(torch.optim.SGD(flow.parameters()))
        assert (flow.prototypes.weight.grad is None) == frozen
        flow.finish_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_inputs_stay_finite_at_the_chance_value(dtype: torch.dtype) -> None:
    """NT-Xent: ln(2N - 1). SwAV: assignments of 1/K, and ln K once all prototypes are equally near."""
    batch = Batch(views=[torch.ones(8, 3, 32, 32, dtype=dtype) for _ in range(2)])
    simclr, swav = build("simclr").to(dtype), build("swav").to(dtype)
    contrast = simclr.step(batch).terms["contrast"]
    assert contrast.item() == pytest.approx(math.log(15), rel=1e-6)
    contrast.backward()
    far = swav.step(batch)
    torch.testing.assert_close(far.assignments, torch.full((8, 12), 1 / 12))
    far.terms["swapped_prediction"].backward()
    with torch.no_grad():
        swav.prototypes.weight.copy_(swav.prototypes.weight[:1].expand(12, -1))
    near = swav.step(batch).terms["swapped_prediction"]
    assert near.item() == pytest.approx(math.log(12), rel=1e-6)
    near.backward()
    for flow in (simclr, swav):
        assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["swav", "simclr", "vicreg", "barlow_twins", "align_uniform"])
def test_autocast_stays_finite_and_close(name: str) -> None:
    plain, cast = build(name), build(name)
    expected = plain.total(plain.step(make_batch(8)).terms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cast.total(cast.step(make_batch(8)).terms)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=0.1)
    assert all(p.grad.isfinite().all() for p in cast.parameters() if p.grad is not None)


def test_views_pass_the_backbone_once_a_resolution_and_the_head_once() -> None:
    flow, seen = build("swav"), []
    flow.backbone.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    flow.head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    flow.step(make_batch(8))
    assert seen == [(16, 3, 32, 32), (16, 3, 16, 16), (32, 32)]


@pytest.mark.parametrize("name", ["swav", "simclr"])
def test_batches_that_do_not_fit(name: str) -> None:
    flow, batch = build(name), make_batch(8)
    with pytest.raises(ValueError, match="hold 8, 7 samples"):
        flow.step(Batch(views=[batch["views"][0], batch["views"][1][:7]]))
    with pytest.raises(ValueError, match="two views or more"):
        flow.step(Batch(views=batch["views"][:1]))


def test_a_queue_that_the_batch_does_not_divide_is_refused_in_the_step_too() -> None:
    flow = build("swav", "objective.queue_length=16", "data.batch_size=8")
    with pytest.raises(
        ValueError, match=r"queue_length=16 is not a multiple of the global batch of 6: set it to 12 or 18"
    ):
        flow.step(make_batch(6))


SMALL = ["image_size=64", "small_size=32", "run_folder=x"]


@pytest.mark.filterwarnings("ignore:objective.num_prototypes")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=swav", "objective.assign_views=[0,8]"], "names view 8, but the 8 views are 0 to 7"),
        (["objective=swav", "views=clip"], "needs two views or more"),
        (["objective=simclr", "views=clip"], "compares views of a sample, and views has 1"),
        (["objective=swav", "objective.queue_length=1000"], "is not a multiple of the global batch of 256"),
        (["objective=swav", "backbone.name=vit_tiny_patch16_224"], "cannot take pictures of 32 x 32"),
        (
            ["objective=simclr", "views=multicrop", "backbone=vit_s16", "small_size=24"],
            "cannot take pictures of 24 x 24",
        ),
        (["experiment=swav_emoji", "views=simclr"], "views.small.size has no value"),
        (["objective=swav", "eval=emoji"], "encodes images only: set eval=images"),
    ],
)
def test_what_can_be_known_is_refused_by_the_check(overrides: list[str], words: str) -> None:
    given = {override.split("=")[0] for override in overrides}
    cfg = compose([*(override for override in SMALL if override.split("=")[0] not in given), *overrides])
    with pytest.raises(ConfigError) as refused:
        check(cfg)
    assert words in str(refused.value)


@pytest.mark.filterwarnings("error:objective.num_prototypes")
def test_prototypes_that_nothing_can_fill_are_warned_of() -> None:
    few = [*SMALL, "objective=swav", "objective.num_prototypes=600"]
    check(compose([*few, "objective.queue_length=512"]))
    with pytest.raises(UserWarning, match="num_prototypes=600 are more than the 256 samples"):
        check(compose(few))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_as_one_with_its_queue(run_group: RunGroup, tmp_path: Path) -> None:
    """Stopped at step 5, when the queue acts already; the checkpoint holds all of it."""
    small = [
        "experiment=swav_emoji", "smoke=true", "objective.queue_length=16", "objective.queue_start_step=1",
        "objective.freeze_steps=4", "objective.num_prototypes=12", "trainer.limit_train_batches=8", "optim.lr=1e-3",
        "data.eval=null", "trainer.accelerator=cpu",
    ]  # fmt: skip
    main([*small, f"run_folder={tmp_path}/whole"])
    kill = ["_target_=tests.signals.SignalAt", "step=4", f"number={int(signal.SIGTERM)}"]
    two = ["trainer=ddp", "trainer.devices=2", *(f"+callbacks.kill.{option}" for option in kill)]
    stopped = run_group(2, *small, f"run_folder={tmp_path}/two", *two)
    assert [status for status, _ in stopped] == [128 + signal.SIGTERM, 0], stopped
    (checkpoint,) = (tmp_path / "two/checkpoints").iterdir()
    assert checkpoint.name == "step=5.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["queue.rows"].shape == (2, 16, 128)
    assert state["queue.num_filled"] == 16
    main(
        [f"resume={tmp_path}/two", "trust=true", "callbacks.kill.step=-1", "trainer.devices=1", "trainer.strategy=auto"]
    )
    losses = []
    for name in ("whole", "two"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
