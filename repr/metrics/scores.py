"""Scores that several metrics share: accuracy beside chance, and ranks in which a tie is no success."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

CHANCE = ".chance"  # what a metric appends to the name of a number for its level at chance
MAJORITY = "share of the largest class"  # what the level at chance of every classifier is, in words
TIE = 1e-12  # cosines in float64 that differ by less are equal: only the order of summation tells them apart


def accuracy(name: str, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Give the share of right predictions (M,), under ``name``, and as its chance the share of the largest class."""
    return {name: (predicted == labels).double().mean().item(), name + CHANCE: majority(labels)}


def majority(labels: Tensor, k: int = 1) -> float:
    """Give the share of the k largest classes among labels (M,): whoever always names the same k gets at most that."""
    return labels.unique(return_counts=True)[1].sort(descending=True)[0][:k].sum().item() / len(labels)


def ranks(queries: Tensor, candidates: Tensor, right: Tensor, *, chunk_size: int) -> Tensor:
    r"""Count, for every query, the wrong candidates at least as near to it as its nearest right one.

    :math:`r_q = |\{c \notin R_q: \cos(q, c) \ge \max_{p \in R_q} \cos(q, p)\}|`

    A tie counts against the query, and so does a comparison with NaN: a model that maps everything to
    one point, or has diverged, ranks last and not first. Cosines are float64 (the order is then the
    features' own, also where TF32 or autocast is on); those within 1e-12 are tied.

    Args:
        queries: (Q, D), not normalised.
        candidates: (C, D), not normalised.
        right: (P, 2) int64, rows of a query and of a candidate that is right for it; one at least for each query.
        chunk_size: queries that are compared at a time; memory is chunk_size x C.

    Returns:
        (Q,) int64 in [0, C - 1]. A query has a right candidate among its k nearest where its rank is below k.
    """
    candidates = F.normalize(candidates.double(), dim=1)
    right = right[right[:, 0].argsort()]
    ranks = []
    for start in range(0, len(queries), chunk_size):
        cosine = F.normalize(queries[start : start + chunk_size].double(), dim=1) @ candidates.T  # (chunk, C)
        ends = right.new_tensor([start, start + len(cosine)])
        first, last = torch.searchsorted(right[:, 0].contiguous(), ends).tolist()
        own = torch.zeros_like(cosine, dtype=torch.bool)
        own[right[first:last, 0] - start, right[first:last, 1]] = True
        nearest = cosine.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append((~(cosine < nearest - TIE) & ~own).sum(1))
    return torch.cat(ranks)
