"""Two real processes (gloo) against one: collectives, and losses beside those of others. Objectives: test_parity.py."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.batch import Batch, Embeddings
from repr.distributed import all_reduce, gather, on_first, rank, take, world_size
from repr.evaluate.stored_features import TableWriter
from repr.losses.clustering import sinkhorn
from repr.losses.contrastive import clip, nt_xent, sigmoid
from repr.losses.exchange import GATHER, Gather, Ring
from repr.models.batchnorm import SyncBatchNorm
from repr.objectives.loss_choice import chosen
from tests.golden import golden
from tests.parity_cases import in_processes

WORLD = 2
CASES = sorted({key.split(".")[0] for key in golden("open_clip_dist2")})


def worker() -> dict[str, Any]:
    index = rank()
    x = torch.full((2, 3), float(index), requires_grad=True)
    weight = torch.arange(12.0).reshape(4, 3)
    out = gather(x)
    (out * weight).sum().backward()
    summands = [torch.ones(2, 3, requires_grad=True) for _ in range(2)]
    (sum(gather(summand) for summand in summands) * weight).sum().backward()  # autograd gives both the same gradient
    return {
        "gather": {"out": out.detach(), "grad": x.grad, "ints": gather(torch.tensor([index, 7]))},
        "summands": [summand.grad for summand in summands],
        "all_reduce": reductions(index),
        **pairwise_losses(index),
        **joint_losses(index),
        "where": (rank(), world_size()),
        "on_first": decided_by_the_first(),
        "features": collected(index),
        "norm": normalised(index),
        "uneven": uneven(index),
        "foreign": foreign(index),
        "take": taken(index),
    }


def taken(index: int) -> list[list[Tensor]]:
    """Rows of both, some of them several times and some by none, and their gradients: sent alone, and of all."""
    found = []
    for wanted in ([[3, 3, 0], [1, 3, 2]], [[0, 1, 0], [0, 1, 1]], [[2, 3, 3], [3, 2, 3]]):
        mine = torch.tensor(wanted[index])
        for way in (take, lambda x, rows: gather(x)[rows]):
            x = torch.arange(8.0, dtype=torch.float64).reshape(2, 2, 2) + 10 * index
            out = way(x.requires_grad_(), mine)
            (out * torch.arange(1.0, 4)[:, None, None] * (index + 1)).sum().backward()
            found.append([out.detach(), x.grad])
    return found


def foreign(index: int) -> float:
    """A loss of a user's own, which knows of no processes, of rows 0, 1 on the first and 2, 3 on the second."""
    losses = chosen({"spread": lambda x: x.amax() - x.amin()}, exchange=GATHER)
    return losses["spread"](torch.tensor([[0.0], [1.0]]) + 2 * index).item()


def uneven(index: int) -> list[str]:
    """What is said where the processes have two rows and three."""
    said = []
    for kind in (Gather, Ring):
        with pytest.raises(ValueError, match="as many rows on every process") as caught:
            clip(torch.ones(2 + index, 3), torch.ones(2 + index, 3), logit_scale=1.0, exchange=kind())
        said.append(str(caught.value))
    return said


def normalised(index: int) -> dict[str, Tensor]:
    """Three rows on the first process and five on the second."""
    norm = SyncBatchNorm(2).double()
    whole, weight = norm_inputs()
    x = whole.tensor_split([3])[index].clone().requires_grad_()
    out = norm(x)
    (out * weight.tensor_split([3])[index]).sum().backward()
    return {"out": out.detach(), "grad": x.grad, "mean": norm.running_mean, "var": norm.running_var}


def norm_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return 3 * x + 1, weight


def decided_by_the_first() -> list:
    """What it gives, and how it fails, on this rank."""

    def fail() -> None:
        raise ValueError(f"rank {rank()} cannot")

    try:
        on_first(fail)
    except ValueError as error:
        return [on_first(lambda: {"rank": rank()}), str(error)]
    return []


def collected(index: int) -> dict[str, Tensor]:
    """Rows 0 to 4, of which 3 could not be read; the last batch has one row, which pads the other rank's share."""
    table = TableWriter(torch.arange(5), select=lambda outputs: {"image": F.normalize(outputs.image)})
    for rows in ([[0, 1], [2, -1 - 3]], [[4], [4]]):
        mine = torch.tensor(rows[index])
        image = torch.stack([mine.abs() + 1.0, torch.ones(len(mine))], dim=1)
        table.on_predict_batch_end(None, None, Embeddings(image=image, trunk=image), Batch(index=mine), 0)
    return {name: torch.from_numpy(column) for name, column in table.columns.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes has computed."""
    return in_processes(worker, WORLD, tmp_path_factory.mktemp("ranks"))


def test_ranks(two: list[dict]) -> None:
    assert [record["where"] for record in two] == [(0, 2), (1, 2)]
    assert (rank(), world_size()) == (0, 1)


def test_the_first_process_decides_for_all_and_fails_for_all(two: list[dict]) -> None:
    assert [record["on_first"] for record in two] == [[{"rank": 0}, "rank 0 cannot"]] * WORLD
    assert on_first(lambda: 3) == 3


def test_features_of_all_ranks_go_to_their_rows(two: list[dict]) -> None:
    table = two[0]["features"]
    assert table["read"].tolist() == [1, 1, 1, 0, 1]
    expected = torch.tensor([[1.0, 1], [2, 1], [3, 1], [0, 0], [5, 1]])
    torch.testing.assert_close(table["image"], torch.nn.functional.normalize(expected, dim=1))
    assert two[1]["features"] == {}


def test_rows_that_are_asked_for_travel_alone_and_their_gradients_come_home(two: list[dict]) -> None:
    for record in two:
        for alone, of_all in zip(record["take"][::2], record["take"][1::2], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(alone, of_all, strict=True))
    assert any(not record["take"][2][1].any() for record in two)  # nobody asked for what it has


def test_processes_with_unequal_rows_are_told_so(two: list[dict]) -> None:
    assert all("and they have [2, 3]: give all" in said for record in two for said in record["uneven"])


def test_a_loss_that_takes_no_exchange_gets_the_rows_of_all(two: list[dict]) -> None:
    assert [record["foreign"] for record in two] == [3.0, 3.0]


def test_gather_joins_rows_in_rank_order_and_sums_gradients(two: list[dict]) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    for index, record in enumerate(two):
        assert record["gather"]["out"][:, 0].tolist() == [0, 0, 1, 1]
        assert record["gather"]["ints"].tolist() == [0, 7, 1, 7]
        for grad in (record["gather"]["grad"], *record["summands"]):
            torch.testing.assert_close(grad, WORLD * weight[2 * index : 2 * index + 2])
    x = torch.ones(2, 3)
    assert gather(x) is x


def test_batch_norm_over_uneven_processes_is_that_of_one(two: list[dict]) -> None:
    whole, weight = norm_inputs()
    norm = torch.nn.BatchNorm1d(2).double()
    x = whole.clone().requires_grad_()
    out = norm(x)
    (out * weight).sum().backward()
    for key, value in (("out", out.detach()), ("grad", x.grad)):
        torch.testing.assert_close(torch.cat([record["norm"][key] for record in two]), value, rtol=1e-10, atol=1e-10)
    for record in two:
        torch.testing.assert_close(record["norm"]["mean"], norm.running_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(record["norm"]["var"], norm.running_var, rtol=1e-10, atol=1e-10)


def test_all_reduce_keeps_gradients(two: list[dict]) -> None:
    for record in two:
        assert record["all_reduce"]["sum"].tolist() == [3, 30]
        assert record["all_reduce"]["max"].tolist() == [2, 20]
        assert record["all_reduce"]["grad"].tolist() == [3, 3]  # 1 from the first rank's loss and 2 from the other's


@pytest.mark.parametrize("case", ["sinkhorn_a", "sinkhorn_b"])
def test_sinkhorn_equals_the_authors_on_two_processes(case: str, two: list[dict]) -> None:
    data = golden("dist2")
    whole = sinkhorn(
        torch.as_tensor(data[f"{case}/scores_global"]), epsilon=float(data[f"{case}/epsilon"]), num_iters=3
    )
    for rank_, record in enumerate(two):
        theirs = torch.as_tensor(data[f"{case}/q.rank{rank_}"])
        torch.testing.assert_close(record[case], theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole.chunk(WORLD)[rank_], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["simclr_a", "simclr_b"])
def test_nt_xent_equals_the_authors_on_two_processes(case: str, two: list[dict]) -> None:
    """Each rank of theirs holds the loss of its rows, ours the global one; the gradients are the same."""
    data = golden("dist2")
    mean = sum(float(data[f"{case}/loss.rank{r}"]) for r in range(WORLD)) / WORLD
    for r, record in enumerate(two):
        assert record[case]["loss"].item() == pytest.approx(mean, rel=1e-5)
        for key in ("aug1", "aug2"):
            theirs = torch.as_tensor(data[f"{case}/grad.{key}.rank{r}"])
            torch.testing.assert_close(record[case][key], theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss", ["clip", "sigmoid"])
def test_losses_equal_open_clips_on_two_processes(case: str, loss: str, two: list[dict]) -> None:
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


def pairwise_losses(index: int) -> dict[str, dict[str, Tensor]]:
    """Value and gradient of our losses on this rank's rows of the stored two-process cases."""
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
            value = loss(image, text, exchange=GATHER)
            value.backward()
            record[f"{case}.{name}"] = {"loss": value.detach(), "grad_img": image.grad, "grad_txt": text.grad}
    return record


def reductions(index: int) -> dict[str, Tensor]:
    x = torch.tensor([1.0, 10.0]).mul(index + 1).requires_grad_()
    total = all_reduce(x)
    ((index + 1) * total).sum().backward()
    return {"sum": total.detach(), "grad": x.grad, "max": all_reduce(x, "max")}


def joint_losses(index: int) -> dict[str, Any]:
    """Our Sinkhorn and NT-Xent on this rank's rows of the stored two-process cases."""
    data, record = golden("dist2"), {}
    for case in ("sinkhorn_a", "sinkhorn_b"):
        mine = torch.as_tensor(data[f"{case}/scores_global"]).chunk(WORLD)[index]
        record[case] = sinkhorn(mine, epsilon=float(data[f"{case}/epsilon"]), num_iters=3, all_reduce=all_reduce)
    for case in ("simclr_a", "simclr_b"):
        views = {
            key: torch.as_tensor(data[f"{case}/global.{key}"]).chunk(WORLD)[index].clone().requires_grad_()
            for key in ("aug1", "aug2")
        }
        loss = nt_xent(*views.values(), temperature=float(data[f"{case}/temperature"]), exchange=GATHER)
        loss.backward()
        record[case] = {"loss": loss.detach()} | {key: view.grad for key, view in views.items()}
    return record
