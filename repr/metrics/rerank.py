"""Retrieval in two steps: cosines choose candidates, and scores of pairs put these in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.metrics.retrieval import chance
from repr.metrics.scores import CHANCE, ranks


@torch.no_grad()
def shortlist(queries: Tensor, candidates: Tensor, k: int, *, chunk_size: int = 1024) -> Tensor:
    """The k candidates (C, D) nearest to each query (Q, D) by cosine, the nearest first: (Q, min(k, C)) int64."""
    candidates, k = F.normalize(candidates.double(), dim=1), min(k, len(candidates))
    return torch.cat(
        [(F.normalize(x.double(), dim=1) @ candidates.T).topk(k).indices for x in queries.split(chunk_size)]
    )


@torch.no_grad()
def reranked(
    queries: Tensor,
    candidates: Tensor,
    right: Tensor,
    listed: Tensor,
    scores: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Give recall at each k, where listed candidates come first, the highest score first, and then others by cosine.

    A wrong candidate with the score of the best right one, or one that is no number, counts as before it.

    Args:
        queries: (Q, D), not normalised.
        candidates: (C, D), not normalised.
        right: (P, 2) int64, rows of a query and of a candidate that is right for it; one at least for each query.
        listed: (Q, K) int64, as :func:`shortlist` gives them.
        scores: (Q, K) of these pairs, higher is nearer.
        ks: the k of the recall.

    Returns:
        ``R@k`` in [0, 1], each with the expectation under a random order as its ``.chance``.

    Source: Li et al., 2021 (ALBEF), arXiv 2107.07651, section 4.
    """
    own = torch.isin(_number(torch.arange(len(queries), device=listed.device)[:, None], listed), _number(*right.T))
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    before = (~(scores < best) & ~own).sum(1)
    rank = torch.where(own.any(1), before, ranks(queries, candidates, right, chunk_size=1024))
    num_right, values = right[:, 0].bincount(minlength=len(queries)), {}
    for k in ks:
        values[f"R@{k}"] = (rank < k).double().mean().item()
        values[f"R@{k}{CHANCE}"] = chance(num_right, len(candidates), k)
    return values


def _number(query: Tensor, candidate: Tensor) -> Tensor:
    """One number of a pair."""
    return (query << 32) + candidate
