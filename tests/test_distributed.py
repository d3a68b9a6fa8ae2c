"""Two real processes (gloo) against one: collectives, and the gradient of every objective under DDP."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from repr.batch import Batch
from repr.distributed import gather, rank, world_size
from repr.losses.contrastive import clip, sigmoid
from tests.golden import golden
from tests.objectives.conftest import OBJECTIVES, build, make_batch

WORLD = 2
CASES = sorted({key.split(".")[0] for key in golden("open_clip_dist2")})


def train(name: str, batch: Batch) -> dict[str, Tensor]:
    """Loss, gradients, and parameters after three optimizer steps; under DDP where there is a process group."""
    torch.manual_seed(0)
    objective = build(name, "optim.lr=1e-2")
    optimizer, _ = objective.optim.build(objective, 3)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.objective = objective

        def forward(self) -> Tensor:
            return objective.total(objective.step(batch).terms)

    step = Step()
    model = DistributedDataParallel(step) if dist.is_initialized() else step
    record: dict[str, Tensor] = {}
    for i in range(3):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        if i == 0:
            record["loss"] = loss.detach()
            record |= {f"grad.{n}": p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
        optimizer.step()
        objective.update_targets()
    return record | {f"after.{n}": p.detach().clone() for n, p in objective.named_parameters()}


def worker(index: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["REPR_TEST_PORT"]}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=index, world_size=WORLD)
    whole = make_batch(8)
    mine = slice(4 * index, 4 * index + 4)
    batch = Batch(views=[view[mine] for view in whole["views"]], text=whole["text"][mine])
    record: dict = {name: train(name, batch) for name in OBJECTIVES}

    x = torch.full((2, 3), float(index), requires_grad=True)
    weight = torch.arange(12.0).reshape(4, 3)
    out = gather(x)
    (out * weight).sum().backward()
    record["gather"] = {"out": out.detach(), "grad": x.grad, "ints": gather(torch.tensor([index, 7]))}
    record |= gathered_losses(index)
    record["where"] = (rank(), world_size())
    torch.save(record, Path(folder, f"{index}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes has computed."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["REPR_TEST_PORT"] = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{i}.pt", weights_only=True) for i in range(WORLD)]


@pytest.fixture(scope="module")
def one() -> Iterator[dict]:
    return {name: train(name, make_batch(8)) for name in OBJECTIVES}


def test_ranks(two: list[dict]) -> None:
    assert [record["where"] for record in two] == [(0, 2), (1, 2)]
    assert (rank(), world_size()) == (0, 1)


def test_gather_joins_rows_in_rank_order_and_sums_gradients(two: list[dict]) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    for index, record in enumerate(two):
        assert record["gather"]["out"][:, 0].tolist() == [0, 0, 1, 1]
        assert record["gather"]["ints"].tolist() == [0, 7, 1, 7]
        torch.testing.assert_close(record["gather"]["grad"], WORLD * weight[2 * index : 2 * index + 2])
    x = torch.ones(2, 3)
    assert gather(x) is x


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_give_the_gradient_of_one(name: str, one: dict, two: list[dict]) -> None:
    for record in two:
        torch.testing.assert_close(record[name]["loss"], one[name]["loss"], rtol=1e-5, atol=0)
        flat = [
            torch.cat([r[name][key].flatten() for key in one[name] if key.startswith("grad.")]).double()
            for r in (record, one)
        ]
        assert record[name].keys() == one[name].keys()
        assert (flat[0].norm() / flat[1].norm()).item() == pytest.approx(1, abs=1e-4)
        assert torch.cosine_similarity(flat[0], flat[1], dim=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_give_the_parameters_of_one_after_three_steps(name: str, one: dict, two: list[dict]) -> None:
    # Adam divides by the root of squared gradients, so the rounding of a vanishing gradient moves a weight by up to
    # the learning rate; the update as a whole is compared.
    start = dict(build(name).named_parameters())
    flat = [
        torch.cat([(r[name][f"after.{key}"] - start[key]).detach().flatten() for key in start]).double()
        for r in (one, two[0], two[1])
    ]
    assert torch.equal(flat[1], flat[2])
    assert torch.cosine_similarity(flat[0], flat[1], dim=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["clip", "sigmoid"])
def test_gathered_losses_equal_open_clips_on_two_processes(case: str, loss: str, two: list[dict]) -> None:
    """open_clip's exact forms give W times the gradient before DDP's mean."""
    data = golden("open_clip_dist2")
    variant = "clip_local0_grad1" if loss == "clip" else "siglip_bidir"
    losses = [float(data[f"{case}.{variant}.f64_r{r}"]) for r in range(WORLD)]
    for r, record in enumerate(two):
        ours = record[f"{case}.{loss}"]
        # SigLIP's ranks hold their own rows, ours the global value: the means over ranks agree.
        assert ours["loss"].item() == pytest.approx(
            sum(losses) / WORLD, rel=1e-6
        )  # the stored x have unit length to 1e-7 only
        for key in ("img", "txt"):
            theirs = torch.as_tensor(data[f"{case}.{variant}.grad_{key}_r{r}"])
            x = torch.as_tensor(data[f"{case}.{key}_r{r}"]).double()
            tangent = (
                theirs - (theirs * x).sum(1, keepdim=True) * x
            )  # ours normalises inside, theirs takes unit vectors
            torch.testing.assert_close(ours[f"grad_{key}"], tangent, rtol=1e-5, atol=1e-6)


def gathered_losses(index: int) -> dict[str, dict[str, Tensor]]:
    """Value and gradient of our losses on gathered features of the stored two-process cases."""
    record = {}
    data = golden("open_clip_dist2")
    for case in CASES:
        scale, bias = (float(data[f"{case}.{key}"]) for key in ("logit_scale", "logit_bias"))
        for name, loss in (
            ("clip", partial(clip, logit_scale=scale)),
            ("sigmoid", partial(sigmoid, logit_scale=scale, logit_bias=bias)),
        ):
            image, text = (
                torch.as_tensor(data[f"{case}.{key}_r{index}"]).double().requires_grad_() for key in ("img", "txt")
            )
            value = loss(gather(image), gather(text))
            value.backward()
            record[f"{case}.{name}"] = {"loss": value.detach(), "grad_img": image.grad, "grad_txt": text.grad}
    return record
