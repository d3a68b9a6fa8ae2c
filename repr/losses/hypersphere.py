"""Geometry of features on the unit sphere: true pairs close, everything else spread out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repr.losses.blockwise import full_precision, logsumexp, unit


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    with full_precision(x):
        x, y = unit(x, y)
        return torch.linalg.vector_norm(x - y, dim=1).pow(alpha).mean()


def uniformity(x: Tensor, *, t: float = 2.0, chunk_size: int | None = None) -> Tensor:
    with full_precision(x):
        (x,) = unit(x, num_min=2)
        num_pairs = len(x) * (len(x) - 1) / 2
        row, _, _ = logsumexp(x, x, 2 * t, pairs="upper", chunk_size=chunk_size)
        return row.logsumexp(0) - 2 * t - math.log(num_pairs)


def cross_uniformity(x: Tensor, y: Tensor, *, t: float = 2.0, chunk_size: int | None = None) -> Tensor:
    with full_precision(x):
        x, y = unit(x, y, num_min=2)
        num_pairs = len(x) * (len(x) - 1)
        row, _, _ = logsumexp(x, y, 2 * t, pairs="unequal", chunk_size=chunk_size)
        return row.logsumexp(0) - 2 * t - math.log(num_pairs)
