"""Losses that keep the features of views equal and their dimensions apart: VICReg, Barlow Twins, LeJEPA's one half.

Features are taken as they are, N at least 2; only the cross-correlation standardises them, unless it is told not to.
"""

from __future__ import annotations

from torch import Tensor

from repr.losses.exchange import ALONE, Exchange
from repr.losses.features import paired, widened
from repr.losses.precision import full_precision


def invariance(a: Tensor, b: Tensor, *, exchange: Exchange = ALONE) -> Tensor:
    """Mean squared difference of the two views of a sample.

    With ``a_i`` and ``b_i`` the features of sample i::

        loss = 1/(N D) sum_i ||a_i - b_i||^2

    Range: [0, inf), without unit. At chance (independent features of variance 1): 2.

    Source: Bardes et al., 2021 (VICReg), arXiv:2105.04906, equation 5.

    Departures: the paper divides by N alone; the authors' code, whose weight of 25 is the known one, by N D.
    """
    a, b = paired(a, b, num_min=2, exchange=exchange)
    return exchange.mean((a - b).square().mean())


def centred_invariance(views: Tensor, *, exchange: Exchange = ALONE) -> Tensor:
    """Mean squared difference of the views of a sample from their mean.

    With ``z_vi`` the features of view v of sample i, of V views::

        loss = 1/(V N D) sum_v sum_i ||z_vi - 1/V sum_u z_ui||^2

    which is (V - 1)/(2V) times the mean of :func:`invariance` over pairs of views.

    Shapes: ``views`` (V, n, D).

    Range: [0, inf), without unit. At chance (independent features of variance 1): (V - 1)/V.

    Source: Balestriero and LeCun, 2025 (LeJEPA), arXiv:2511.08544, as in the authors' code.

    Departures: the paper takes the mean of the large views alone for the centre.

    Raises:
        ValueError: ``views`` is not (V, n, D).
    """
    if views.ndim != 3:
        raise ValueError(f"views are (V, N, D); got {tuple(views.shape)}")
    (views,) = widened(views)
    return exchange.mean((views - views.mean(0)).square().mean())


def variance(x: Tensor, *, eps: float = 1e-4, exchange: Exchange = ALONE) -> Tensor:
    """Mean amount by which the standard deviation of a feature falls below 1.

    With ``std_d`` the deviation of feature d over the batch, of divisor N - 1::

        loss = 1/D sum_d max(0, 1 - sqrt(std_d^2 + eps))

    Range: [0, 1 - sqrt(eps)], without unit. At collapse (all rows equal): 1 - sqrt(eps), which is 0.99.

    Source: Bardes et al., 2021 (VICReg), arXiv:2105.04906, equations 1 and 2.
    """
    (x,) = paired(x, num_min=2, exchange=exchange)
    _, square = _moments(x, 1, exchange)
    return (1 - (square + eps).sqrt()).relu().mean()


def covariance(x: Tensor, *, exchange: Exchange = ALONE) -> Tensor:
    """Sum of the squared covariances of different features, per feature.

    With C the covariance matrix of the batch, of divisor N - 1::

        loss = 1/D sum_{d != e} C_de^2

    Range: [0, inf), without unit. At chance (independent features of variance 1): (D - 1) / (N - 1).

    Source: Bardes et al., 2021 (VICReg), arXiv:2105.04906, equations 3 and 4.
    """
    (x,) = paired(x, num_min=2, exchange=exchange)
    with full_precision(x):
        x = x - _mean(x, exchange)
        diagonal, squares = _products(x, x, 1, exchange)
        return (squares - diagonal.square().sum()) / x.shape[1]


def cross_correlation(
    a: Tensor,
    b: Tensor,
    *,
    off_diagonal_weight: float = 0.0051,
    eps: float = 1e-5,
    standardise: bool = True,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Squared distance of the correlations between the features of two views from the identity matrix.

    With C_de the correlation of feature d of one view and feature e of the other over the batch (divisor N, ``eps``
    added to the variance)::

        loss = sum_d (1 - C_dd)^2 + off_diagonal_weight sum_{d != e} C_de^2

    Without ``standardise`` C is the mean of products as they are, for features that BatchNorm made last (BarLIP: Fini
    et al., 2023, arXiv:2305.08675).

    Range: [0, inf), without unit. At collapse (all rows equal, C = 0): D. At chance (independent features):
    D + off_diagonal_weight D (D - 1) / N, about.

    Source: Zbontar et al., 2021 (Barlow Twins), arXiv:2103.03230, equations 1 and 2.

    Departures: with several processes the authors' code sums C over them without telling autograd, and so trains with
    1/W of the gradient.
    """
    a, b = paired(a, b, num_min=2, exchange=exchange)
    with full_precision(a):
        if standardise:
            moments = [_moments(x, 0, exchange) for x in (a, b)]
            a, b = ((x - mean) / (square + eps).sqrt() for x, (mean, square) in zip((a, b), moments, strict=True))
        diagonal, squares = _products(a, b, 0, exchange)
        off_diagonal = squares - diagonal.square().sum()
        return (1 - diagonal).square().sum() + off_diagonal_weight * off_diagonal


def _products(a: Tensor, b: Tensor, correction: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Diagonal (D,) of the mean over rows of the products of features, a^T b, and the sum of its D x D squares.

    The squares of a^T b add up to the products of a a^T and b b^T, entry by entry, which are N x N, two matrices of
    two views: they are taken where they are less work than the one of features. The divisor is N - correction.
    """
    num_rows = len(a) * exchange.size
    num = num_rows - correction
    if num_rows * (1 if a is b else 2) >= a.shape[1]:
        matrix = exchange.mean(a.T @ b * (exchange.size / num))  # (D, D)
        return matrix.diagonal(), matrix.square().sum()
    of_a = a @ exchange.rows(a).T  # (n, N)
    of_b = of_a if b is a else b @ exchange.rows(b).T
    share = exchange.size / num
    return exchange.mean((a * b).sum(0) * share), exchange.mean((of_a * of_b).sum() * (share / num))


def _mean(x: Tensor, exchange: Exchange) -> Tensor:
    return exchange.all_reduce(x.mean(0)) / exchange.size  # (D,)


def _moments(x: Tensor, correction: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Mean and variance of each feature over the rows of all processes: (D,) each; the divisor is N - correction."""
    mean = _mean(x, exchange)
    if exchange.size == 1:
        return mean, x.var(0, correction=correction)
    return mean, exchange.all_reduce((x - mean).square().sum(0)) / (len(x) * exchange.size - correction)
