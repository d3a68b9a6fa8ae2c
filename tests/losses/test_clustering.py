"""Sinkhorn and swapped prediction: the authors' numbers, and laws."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.clustering import near_rows, sinkhorn, soft_cross_entropy, swapped_prediction
from tests.golden import golden

SINKHORN, LOSS = golden("swav_sinkhorn"), golden("swav_loss")


def stored(data: dict, case: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: torch.as_tensor(value) for key, value in data.items() if key.startswith(f"{case}/")}


def cases(data: dict) -> list[str]:
    return sorted({key.split("/")[0] for key in data})


@pytest.mark.parametrize("case", cases(SINKHORN))
def test_sinkhorn_equals_the_authors(case: str) -> None:
    data = stored(SINKHORN, case)
    q = sinkhorn(data["scores"], epsilon=data["epsilon"].item(), num_iters=data["iterations"].item())
    torch.testing.assert_close(q, data["q"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in cases(LOSS) if c != "d_queue"])
def test_value_and_gradient_equal_the_authors(case: str) -> None:
    """Every step's scores by themselves; the whole loop, with queue and freeze, is tested with the flow."""
    data = stored(LOSS, case)
    size, views = data["batch_size"].item(), data["crops_for_assign"].tolist()
    for step, scores in enumerate(data["scores"]):
        scores = scores.clone().requires_grad_()
        crops = scores.split(size)
        options = {"epsilon": data["epsilon"].item(), "num_iters": data["sinkhorn_iterations"].item()}
        assignments = [sinkhorn(crops[a], **options) for a in views]
        loss = swapped_prediction(crops, assignments, assign_views=views, temperature=data["temperature"].item())
        loss.backward()
        torch.testing.assert_close(loss, data["loss"][step], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores.grad, data["grad_scores"][step], rtol=1e-4, atol=1e-6)


def formula(scores: Tensor, epsilon: float, num_iters: int) -> Tensor:
    """As the paper writes it, in float64."""
    q = (scores.double() / epsilon - scores.double().max() / epsilon).exp()
    for _ in range(num_iters):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.01, 1.0])
def test_sinkhorn_is_its_formula_also_where_float32_overflows(epsilon: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = F.normalize(torch.randn(24, 6, generator=generator)) @ F.normalize(torch.randn(9, 6)).T
    scores[0, 0] = 1.0
    q = sinkhorn(scores, epsilon=epsilon, num_iters=3)
    torch.testing.assert_close(q.double(), formula(scores, epsilon, 3), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(q.sum(1), torch.ones(24))


def test_samples_and_prototypes_may_come_in_any_order_and_with_any_offset() -> None:
    scores, rows, columns = torch.randn(10, 5), torch.randperm(10), torch.randperm(5)
    q = sinkhorn(scores, epsilon=0.5, num_iters=3)
    torch.testing.assert_close(sinkhorn(scores[rows][:, columns] + 7, epsilon=0.5, num_iters=3), q[rows][:, columns])
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.5, num_iters=200).sum(0), torch.full((5,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # at 100, exponents of some thousands
def test_sinkhorn_is_float32_and_finite_whatever_comes_in(dtype: torch.dtype, scale: float) -> None:
    scores = (scale * torch.randn(12, 7)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = sinkhorn(scores, epsilon=0.05, num_iters=3)
    assert q.dtype == torch.float32
    assert torch.equal(q, sinkhorn(scores.float(), epsilon=0.05, num_iters=3))
    torch.testing.assert_close(q.sum(1), torch.ones(12))
    assert not scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_identical_inputs_give_the_chance_value(dtype: torch.dtype) -> None:
    scores = [torch.full((6, 9), 0.3, dtype=dtype, requires_grad=True) for _ in range(3)]
    assignments = [sinkhorn(s, epsilon=0.05, num_iters=3) for s in scores[:2]]
    assert torch.equal(assignments[0], torch.full((6, 9), 1 / 9))
    loss = swapped_prediction(scores, assignments, assign_views=[0, 1], temperature=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(9), rel=1e-6)
    assert all(s.grad.isfinite().all() and s.grad.dtype == dtype for s in scores)


def test_swapped_prediction_is_its_double_sum() -> None:
    scores = [torch.randn(5, 4, dtype=torch.float64) for _ in range(4)]
    assignments = [torch.softmax(torch.randn(5, 4, dtype=torch.float64), 1) for _ in range(2)]
    expected = 0.0
    for a, q in zip((2, 0), assignments, strict=True):
        for v in range(4):
            if v != a:
                for b in range(5):
                    logits = scores[v][b] / 0.3
                    expected -= (q[b] * (logits - logits.exp().sum().log())).sum() / (2 * 3 * 5)
    loss = swapped_prediction(scores, assignments, assign_views=(2, 0), temperature=0.3)
    torch.testing.assert_close(loss, expected)
    leaves = [s.requires_grad_() for s in scores]
    torch.autograd.gradcheck(
        lambda *s: swapped_prediction(s, assignments, assign_views=(2, 0), temperature=0.3), leaves
    )


def test_assignments_get_no_gradient_and_autocast_changes_nothing() -> None:
    scores, q = torch.randn(2, 5, 4), torch.softmax(torch.randn(5, 4), 1).requires_grad_()
    leaf = scores.clone().requires_grad_()
    plain = swapped_prediction(leaf, [q], assign_views=[0], temperature=0.1)
    plain.backward()
    assert q.grad is None
    assert not leaf.grad[0].any()  # the assigned view does not predict itself
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(swapped_prediction(scores, [q], assign_views=[0], temperature=0.1), plain.detach())


@pytest.mark.parametrize(
    ("scores", "assignments", "assign_views", "words"),
    [
        ([(4, 3)], [(4, 3)], [0], "two views or more"),
        ([(4, 3)] * 2, [(4, 3)], [2], "names view 2, but the 2 views are 0 to 1"),
        ([(4, 3)] * 2, [(4, 3)], [-1], "names view -1"),
        ([(4, 3)] * 2, [(4, 3)] * 2, [0, 0], "none twice"),
        ([(4, 3)] * 2, [], [], "at least one view"),
        ([(4, 3), (5, 3)], [(4, 3)], [0], "of the same (B, K)"),
        ([(4, 3)] * 2, [(4, 2)], [0], "of the same (B, K)"),
        ([(4, 3)] * 2, [(4, 3)], [0, 1], "every assign view assignments"),
    ],
)
def test_views_that_do_not_fit(scores: list, assignments: list, assign_views: list, words: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the words are compared below
        swapped_prediction(
            [torch.zeros(s) for s in scores],
            [torch.zeros(s) for s in assignments],
            assign_views=assign_views,
            temperature=0.1,
        )
    assert words in str(refused.value)


def test_bad_options_of_sinkhorn() -> None:
    for options in ({"epsilon": 0.0, "num_iters": 3}, {"epsilon": 0.05, "num_iters": 0}):
        with pytest.raises(ValueError, match="set epsilon > 0 and num_iters >= 1"):
            sinkhorn(torch.zeros(3, 2), **options)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        sinkhorn(torch.zeros(3), epsilon=0.05, num_iters=3)


@pytest.mark.parametrize("shape", [(5, 7), (5, 2**18), (1, 2**19 + 1), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_soft_cross_entropy_is_torchs(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = 3 * torch.rand(shape, generator=generator, dtype=torch.float64)  # rows need not sum to 1
    scores = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    other = scores.detach().double().requires_grad_()
    weight = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    found = soft_cross_entropy(scores, targets.to(torch.promote_types(dtype, torch.float32)), temperature=0.1)
    expected = F.cross_entropy(other / 0.1, targets, reduction="none")
    precise = dict.fromkeys(("rtol", "atol"), {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype])
    torch.testing.assert_close(found.double(), expected, **precise)
    (found * weight.to(found.dtype)).sum().backward()
    (expected * weight).sum().backward()
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(scores.grad.double(), other.grad, **precise)


def test_a_learned_temperature_gets_its_gradient() -> None:
    scores, targets = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    leaves = scores.requires_grad_(), temperature.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: soft_cross_entropy(s, targets, temperature=t), leaves)


def test_rows_near_each_other_are_few_blocks_also_of_what_a_planner_traces() -> None:
    """DINOv2's patches of a large batch: each block costs the planner some operations."""
    assert [rows.stop - rows.start for rows in near_rows(torch.empty(20, 2**16, device="meta"))] == [8, 8, 4]
    large = near_rows(torch.empty(125_440, 2**17, device="meta"))
    assert len(large) == 256
    assert (large[0].start, large[-1].stop) == (0, 125_440)
