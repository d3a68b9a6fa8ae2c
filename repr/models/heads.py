"""Heads between a backbone and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from repr.models.batchnorm import SyncBatchNorm

Norm = Literal["affine", "plain"]


def mlp(widths: Sequence[int], *, last_norm: Norm | None = None, last_bias: bool = True) -> nn.Sequential:
    """Linear layers with BatchNorm over all ranks and ReLU between them: (N, widths[0]) -> (N, widths[-1]).

    A layer that BatchNorm follows has no bias, since the norm would take it out again. With ``last_norm`` BatchNorm
    follows the last layer too, with gain and bias (``affine``) or without (``plain``); else ``last_bias`` says whether
    that layer has a bias.

    Raises:
        ValueError: there is no such norm.
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
    """Linear layers with ReLU and dropout between them: (N, widths[0]) -> (N, widths[-1]).

    There is no norm; weights start Xavier-normal, biases at zero.

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
        between = [nn.ReLU(inplace=True), *([nn.Dropout(dropout)] if dropout else [])] if layers else []
        layers += [*between, linear]
    return nn.Sequential(*layers)
