"""Heads between a backbone and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from repr.models.batchnorm import SyncBatchNorm

Norm = Literal["affine", "plain"]


def mlp(widths: Sequence[int], *, last_norm: Norm | None = None, last_bias: bool = True) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them.

    A layer that BatchNorm follows has no bias, since the norm would take it out again. Statistics are those of all
    ranks.

    Args:
        widths: of the input, of every hidden layer, of the output.
        last_norm: BatchNorm after the last layer, with gain and bias (``affine``) or without (``plain``).
        last_bias: whether the last layer has a bias where no norm follows.

    Returns:
        (N, widths[0]) -> (N, widths[-1]).
    """
    if last_norm not in (None, "affine", "plain"):
        raise ValueError(f"last_norm is '{last_norm}'; set it to affine, plain or null")
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths[:-1]):
        layers += [nn.Linear(wide, narrow, bias=False), SyncBatchNorm(narrow), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias and last_norm is None))
    if last_norm is not None:
        layers.append(SyncBatchNorm(widths[-1], affine=last_norm == "affine"))
    return nn.Sequential(*layers)


def plain_mlp(widths: Sequence[int], *, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU and dropout between them, and no norm; Xavier-normal weights, biases of zero.

    Args:
        widths: of the input, of every hidden layer, of the output.
        dropout: probability of a hidden unit to be left out in training.

    Returns:
        (N, widths[0]) -> (N, widths[-1]).

    Raises:
        ValueError: fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"widths={list(widths)}; set at least the one of the input and the one of the output")
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        linear = nn.Linear(wide, narrow)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True), *([nn.Dropout(dropout)] if dropout else [])]
    while not isinstance(layers[-1], nn.Linear):
        layers.pop()
    return nn.Sequential(*layers)
