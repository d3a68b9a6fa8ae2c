"""The geometry of features on the unit sphere: true pairs close together, all else spread out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repr.losses.blockwise import Pairs, logsumexp
from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import paired, unit
from repr.losses.precision import Precision, full_precision, product


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, exchange: Exchange = ALONE) -> Tensor:
    """Mean distance of the true pairs on the unit sphere, to the power ``alpha``.

    With ``x`` and ``y`` normalised::

        loss = 1/N sum_i ||x_i - y_i||^alpha

    Range: [0, 2^alpha], without unit. At chance (orthogonal pairs): 2^(alpha/2), which is 2 by default.

    Source: Wang and Isola, 2020, arXiv:2005.10242, section 4.1; alpha = 2 is the authors'.

    Departures: the authors' code expects normalised features. The gradient of a pair that coincides is zero,
    also for alpha <= 1 where it does not exist.
    """
    with full_precision(x):
        x, y = unit(x, y)
        square = (x - y).square().sum(1)
        same = square == 0  # kept out of the power: its slope at 0 is infinite for alpha < 2
        return exchange.mean(square.masked_fill(same, 1).pow(alpha / 2).masked_fill(same, 0).mean())


def uniformity(
    x: Tensor,
    *,
    t: float = 2.0,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Logarithm of the mean Gaussian potential of all unordered pairs of samples: low if they are spread out.

    With ``x`` normalised, N at least 2::

        loss = log( 2/(N(N-1)) sum_{i<j} exp(-t ||x_i - x_j||^2) )

    Range: [-4t, 0], in nats; 0 if all samples coincide. At chance (independent directions, D large): about
    -2t, which is -4 by default.

    Source: Wang and Isola, 2020, arXiv:2005.10242, section 4.1; for two modalities Fahim et al., 2024,
    arXiv:2405.18570, take half the sum of both.

    Departures: the authors' code expects normalised features and takes the logarithm of a mean of exponentials;
    here it is a log-sum-exp of ``2t cos - 2t``, which neither underflows at large t nor has a root to
    differentiate where samples coincide.
    """
    with full_precision(x, precision):
        (x,) = paired(x, num_min=2, exchange=exchange)
        num = len(x) * exchange.size
        return _potential(x, x, t, "upper", chunk_size, exchange, precision) - math.log(num * (num - 1) / 2)


def cross_uniformity(
    x: Tensor,
    y: Tensor,
    *,
    t: float = 2.0,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Logarithm of the mean Gaussian potential of the false pairs of two modalities: low if these are far apart.

    With ``x`` and ``y`` normalised, N at least 2::

        loss = log( 1/(N(N-1)) sum_{i != j} exp(-t ||x_i - y_j||^2) )

    Range: [-4t, 0], in nats. At chance (independent directions, D large): about -2t, which is -4 by default.

    Source: Fahim et al., 2024, arXiv:2405.18570, as in the authors' code (t = 2, weight 1).

    Departures: a log-sum-exp as in :func:`uniformity`.
    """
    with full_precision(x, precision):
        x, y = paired(x, y, num_min=2, exchange=exchange)
        num = len(x) * exchange.size
        return _potential(x, y, t, "unequal", chunk_size, exchange, precision) - math.log(num * (num - 1))


def koleo(
    x: Tensor, *, chunk_size: int | None = None, exchange: Exchange = ALONE, precision: Precision = "float32"
) -> Tensor:
    """An estimate of how little the samples' directions spread: that of their entropy by the distance of neighbours.

    With ``x`` normalised and j(i) the nearest other sample of i, N at least 2::

        loss = -1/N sum_i log sqrt( ||x_i - x_j(i)||^2 + 1e-16 )

    Range: [-ln 2, 18.5], in nats; low if samples are spread out, 8 ln 10 if all coincide. The value at chance depends
    on N and D.

    Source: Sablayrolles et al., 2019, arXiv:1806.03198, equation 2, as Oquab et al., 2023 (DINOv2), arXiv:2304.07193.

    Departures: DINOv2's neighbours are those of a GPU, whatever its number of rows; with an ``exchange`` those of the
    global batch. They add 1e-8 to the distance, whose slope at zero is infinite.
    """
    with full_precision(x, precision):
        (x,) = unit(x, num_min=2, exchange=exchange)
        rows = exchange.rows(x)  # (N, D), own ones first
        nearest = _nearest(x.detach(), rows.detach(), chunk_size, precision)
        square = (x - rows[nearest]).square().sum(1)
        return exchange.mean(-0.5 * (square + 1e-16).log().mean())


def _nearest(x: Tensor, rows: Tensor, chunk_size: int | None, precision: Precision) -> Tensor:
    """Which of the rows (N, D), of which the first are ``x`` (n, D) themselves, is the nearest other one: (n,)."""
    best = x.new_full((len(x),), -torch.inf)
    nearest = torch.zeros_like(best, dtype=torch.int64)
    for block in row_blocks(len(rows), chunk_size):
        cosine = product(x, rows[block].T, precision)  # (n, C)
        cosine.diagonal(-block.start).fill_(-torch.inf)
        value, index = cosine.max(1)
        nearest = torch.where(value > best, index + block.start, nearest)
        best = torch.maximum(best, value)
    return nearest


def _potential(
    x: Tensor, y: Tensor, t: float, pairs: Pairs, chunk_size: int | None, exchange: Exchange, precision: Precision
) -> Tensor:
    """Logarithm of the sum over pairs of all processes of ``exp(-t ||x_i - y_j||^2)``, of directions."""
    shift = x.new_full((len(x),), 2 * t)  # -t ||x - y||^2 = 2t <x, y> - 2t
    rows, _, _ = logsumexp(
        x, y, 2 * t, shift, pairs=pairs, chunk_size=chunk_size, exchange=exchange, precision=precision
    )
    return exchange.rows(rows.logsumexp(0, keepdim=True)).logsumexp(0)
