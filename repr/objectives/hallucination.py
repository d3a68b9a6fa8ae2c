"""The term of flows that hallucinate positives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.distributed import means
from repr.models.hallucinator import Hallucinator, extrapolated
from repr.seeds import uniform

STREAM = 6  # of the draws of :func:`hallucinate`
COSINES = {  # what is logged, and what it means
    "cos_pair": "Mean cosine of an embedding and that of the other view; higher is better.",
    "cos_extrapolated": "Mean cosine of what lies beyond an embedding and the other view's; below cos_pair.",
}


def hallucinate(
    hallucinator: Hallucinator,
    pairs: Sequence[tuple[Tensor, Tensor]],
    seed: Tensor,
    logs: dict[str, Tensor | float],
) -> list[Tensor]:
    """What is hallucinated of each pair of query and key (B, D), by a share drawn for each sample."""
    share = hallucinator.bound * uniform(seed, 1, stream=STREAM)
    with torch.no_grad():
        query, key = pairs[0]
        beyond = extrapolated(query, key, share)
        logs |= means(
            {
                "cos_pair": F.cosine_similarity(query, key).mean(),
                "cos_extrapolated": F.cosine_similarity(beyond, key).mean(),
            }
        )
    return [hallucinator(query, key, share).float() for query, key in pairs]
