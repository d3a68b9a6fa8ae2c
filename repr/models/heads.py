"""Heads between a backbone and a loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from repr.losses.features import normalise
from repr.losses.precision import full_precision
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


class PrototypeHead(nn.Module):
    """Scores of prototypes, as DINO's: linear layers with GELU to a narrow one, unit length, cosines with K prototypes.

    (N, widths[0]) -> (N, K). Weights of the linear layers start from a normal distribution of .02, cut at two
    deviations of 1, biases at zero; the prototypes have length 1, or one that is learned.

    Args:
        widths: of the input, of the layers, and last of the space of the prototypes.
        num_prototypes: K.
        learn_length: whether the prototypes may be longer or shorter than 1.
    """

    def __init__(self, widths: Sequence[int], num_prototypes: int, *, learn_length: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            linear = nn.Linear(wide, narrow)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [*([nn.GELU()] if layers else []), linear]
        self.mlp = nn.Sequential(*layers)
        self.prototypes = nn.Linear(widths[-1], num_prototypes, bias=False)
        self.length = nn.Parameter(torch.ones(num_prototypes), requires_grad=learn_length)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, in float32."""
        return self._scores(self._directions(x))

    def forward_some(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (M, K) of the ``rows`` (M,), and the mean of those of all N rows (K,), without those of the others."""
        directions = self._directions(x)
        scores = self._scores(torch.cat([directions[rows], directions.mean(0, keepdim=True)]))
        return scores[:-1], scores[-1]

    def _directions(self, x: Tensor) -> Tensor:
        return normalise(self.mlp(x).float())

    def _scores(self, directions: Tensor) -> Tensor:
        with full_precision(directions):
            weight = self.prototypes.weight.to(directions.dtype)
            return directions @ (normalise(weight) * self.length.to(directions.dtype).unsqueeze(1)).T


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


def project(head: nn.Module, features: Tensor) -> Tensor:
    """A head of rows, applied to every cell of a map: (N, C, H, W) -> (N, D, HW)."""
    rows = features.permute(0, 2, 3, 1)  # (N, H, W, C)
    return head(rows.flatten(0, 2)).unflatten(0, (len(rows), -1)).mT
