"""VICReg and Barlow Twins: formulas written out, chance, collapse, precision."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from repr.losses.decorrelation import centred_invariance, covariance, cross_correlation, invariance, variance


def naive_vicreg(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Equations 1 to 5 of the paper, element by element (the invariance over N D, as in the authors' code)."""
    num, dim = a.shape
    same = sum((a[i, d] - b[i, d]) ** 2 for i in range(num) for d in range(dim)) / (num * dim)
    mean = [sum(a[i, d] for i in range(num)) / num for d in range(dim)]

    def cov(d: int, e: int) -> Tensor:
        return sum((a[i, d] - mean[d]) * (a[i, e] - mean[e]) for i in range(num)) / (num - 1)

    spread = sum(max(0.0, 1 - (cov(d, d) + 1e-4) ** 0.5) for d in range(dim)) / dim
    apart = sum(cov(d, e) ** 2 for d in range(dim) for e in range(dim) if d != e) / dim
    return float(same), float(spread), float(apart)


def naive_barlow(a: Tensor, b: Tensor, weight: float) -> float:
    num, dim = a.shape
    a, b = ((x - x.mean(0)) / (((x - x.mean(0)) ** 2).mean(0) + 1e-5).sqrt() for x in (a, b))
    total = 0.0
    for d in range(dim):
        for e in range(dim):
            c = sum(a[i, d] * b[i, e] for i in range(num)) / num
            total += (1 - c) ** 2 if d == e else weight * c**2
    return float(total)


LOSSES = {
    "invariance": invariance,
    "variance": lambda a, b: variance(a),
    "covariance": lambda a, b: covariance(a),
    "cross_correlation": lambda a, b: cross_correlation(a, b, off_diagonal_weight=0.1),
}


DIMS = (4, 16)  # fewer than the seven rows, and more than twice as many


def pairs(num: int = 7, dim: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, noise = (torch.randn(num, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return (0.8 * a).to(dtype).requires_grad_(), (a + noise).to(dtype).requires_grad_()


@pytest.mark.parametrize("dim", DIMS)
def test_they_are_their_formulas(dim: int) -> None:
    a, b = (x.detach() for x in pairs(dim=dim))
    ours = [invariance(a, b).item(), variance(a).item(), covariance(a).item()]
    assert ours == pytest.approx(naive_vicreg(a, b), rel=1e-10)
    assert cross_correlation(a, b, off_diagonal_weight=0.3).item() == pytest.approx(naive_barlow(a, b, 0.3), rel=1e-10)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name: str, dim: int) -> None:
    torch.autograd.gradcheck(LOSSES[name], pairs(dim=dim))


def test_chance_is_as_documented() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4000, 16, generator=generator) for _ in range(2))
    assert invariance(a, b).item() == pytest.approx(2, abs=0.05)
    assert covariance(a).item() == pytest.approx(15 / 3999, rel=0.3)
    assert cross_correlation(a, b, off_diagonal_weight=0.5).item() == pytest.approx(16 + 0.5 * 16 * 15 / 4000, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_rows_give_the_value_of_collapse_and_finite_gradients(dtype: torch.dtype) -> None:
    a, b = (torch.ones(6, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    values = {name: loss(a, b) for name, loss in LOSSES.items()}
    assert {name: round(value.item(), 4) for name, value in values.items()} == {
        "invariance": 0, "variance": 0.99, "covariance": 0, "cross_correlation": 5,
    }  # fmt: skip
    sum(values.values()).backward()
    assert a.grad.isfinite().all()
    assert a.grad.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(name: str, dtype: torch.dtype) -> None:
    a, b = (x.detach() for x in pairs(dtype=dtype))
    single = LOSSES[name](a.float(), b.float())
    assert single.dtype == torch.float32
    assert torch.equal(LOSSES[name](a, b), single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](a.float(), b.float()), single)


def test_shapes_that_do_not_fit() -> None:
    a = torch.zeros(4, 3)
    for loss in (invariance, LOSSES["cross_correlation"]):
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            loss(a, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least 2"):
        variance(a[:1])


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_invariance_around_the_mean_is_that_of_pairs_by_a_factor(num_views: int) -> None:
    views = torch.randn(num_views, 6, 4, dtype=torch.float64)
    pairs = torch.stack([invariance(a, b) for a, b in combinations(views, 2)]).mean()
    torch.testing.assert_close(centred_invariance(views), pairs * (num_views - 1) / (2 * num_views))
    with pytest.raises(ValueError, match=r"views are \(V, N, D\)"):
        centred_invariance(views[0])
