"""A regulariser that makes embeddings Gaussian: distances between characteristic functions along random directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from repr.losses.features import normalise, widened
from repr.losses.precision import full_precision
from repr.seeds import sample_seed, uniform

Sum = Callable[[Tensor], Tensor]  # over all processes, with gradient


def sigreg(
    z: Tensor, *, directions: Tensor, num_knots: int = 17, bound: float = 3.0, all_reduce: Sum | None = None
) -> Tensor:
    """Distance of embeddings from the standard normal distribution along directions: low if they are spread like it.

    With ``x = z @ A``, of N samples and M directions, and ``phi(t) = exp(-t^2 / 2)``, for each direction::

        T = N integral_-b^b phi(t) [ (mean_n cos(t x_n) - phi(t))^2 + (mean_n sin(t x_n))^2 ] dt

    by the trapezoid rule on ``num_knots`` knots of [0, b], since the integrand is even. The loss is the mean of T over
    directions and leading dimensions.

    Shapes: ``z`` (..., N, D), not normalised inside; ``directions`` (D, M), columns of length 1, the same on all
    processes. Memory is O(N M), whatever the number of knots.

    Range: [0, about 2.5 N]. Samples of the normal distribution give about 1.05 whatever N, all samples 0 about .402 N.

    Source: Balestriero and LeCun, 2025 (LeJEPA), arXiv:2511.08544; Epps and Pulley, 1983.

    Several processes: give each its own rows and ``repr.distributed.all_reduce``, which is called once.

    Raises:
        ValueError: the shapes do not match, or there are fewer than two knots.
    """
    if z.ndim < 2 or directions.ndim != 2 or z.shape[-1] != len(directions):
        raise ValueError(f"z is (..., N, D) and directions (D, M); got {tuple(z.shape)} and {tuple(directions.shape)}")
    if num_knots < 2 or bound <= 0:
        raise ValueError(f"num_knots={num_knots}, bound={bound}; set at least 2 knots and a bound above 0")
    with full_precision(z):
        z, directions = widened(z, directions)
        knots = torch.linspace(0, bound, num_knots, dtype=z.dtype, device=z.device)
        normal = (-knots.square() / 2).exp()
        weights = 2 * normal * bound / (num_knots - 1)
        weights[[0, -1]] /= 2
        sums = torch.stack(_Waves.apply(z @ directions, knots))  # (2, ..., T, M)
        num = z.new_tensor(float(z.shape[-2]))
        if all_reduce is not None:
            sums, num = all_reduce(sums), all_reduce(num)
        cos, sin = sums / num
        distance = (cos - normal[:, None]).square() + sin.square()
        return num * (weights @ distance).mean()


def random_directions(dim: int, num: int, seed: int, step: int, device: torch.device | None = None) -> Tensor:
    """Directions that are evenly spread over the sphere, the same on every process: (dim, num), columns of length 1.

    They are a function of ``seed`` and ``step`` alone, which takes them anew at each step of the optimizer.
    """
    row = torch.zeros(1, dtype=torch.int64, device=device)
    numbers = uniform(sample_seed(seed, step, row), dim * num).double().view(dim, num)
    return normalise((2 * numbers - 1).clamp(min=2.0**-24 - 1).erfinv().T.float()).T


class _Waves(Function):
    """Sums over rows of cos(t x) and sin(t x) of (..., N, M) at knots t: (..., T, M) each.

    Backward computes the waves again, so nothing of N x M x T is held.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, knots)
        angles = (x * knot for knot in knots)
        pairs = [(angle.cos().sum(-2), angle.sin().sum(-2)) for angle in angles]
        cos, sin = (torch.stack(part, dim=-2) for part in zip(*pairs, strict=True))
        return cos, sin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cos: Tensor, grad_sin: Tensor) -> tuple[Tensor, None]:
        x, knots = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for index, knot in enumerate(knots):
            angle, at = x * knot, (..., slice(index, index + 1), slice(None))
            grad.addcmul_(angle.cos(), knot * grad_sin[at]).addcmul_(angle.sin_(), -knot * grad_cos[at])
        return grad, None
