"""Losses that tell the true pairs of a batch from all others."""

from __future__ import annotations

import torch
from torch import Tensor

from repr.losses.blockwise import full_precision, logsumexp, softplus_sum, unit


def clip(image: Tensor, text: Tensor, *, logit_scale: float | Tensor, chunk_size: int | None = None) -> Tensor:
    with full_precision(image):
        x, y = unit(image, text)
        row, column, positive = logsumexp(x, y, logit_scale, chunk_size=chunk_size)
        return ((row - positive) + (column - positive)).mean() / 2


def sigmoid(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    with full_precision(image):
        x, y = unit(image, text)
        return softplus_sum(x, y, logit_scale, logit_bias, chunk_size=chunk_size) / len(x)


def nt_xent(a: Tensor, b: Tensor, *, temperature: float | Tensor, chunk_size: int | None = None) -> Tensor:
    with full_precision(a):
        x, y = unit(a, b)
        scale = 1 / temperature
        row, column, positive = logsumexp(x, y, scale, chunk_size=chunk_size)
        x_row, x_column, _ = logsumexp(x, x, scale, pairs="upper", chunk_size=chunk_size)
        y_row, y_column, _ = logsumexp(y, y, scale, pairs="upper", chunk_size=chunk_size)
        all_a = torch.stack([row, x_row, x_column]).logsumexp(0)
        all_b = torch.stack([column, y_row, y_column]).logsumexp(0)
        return ((all_a - positive) + (all_b - positive)).mean() / 2
