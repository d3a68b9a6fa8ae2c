"""Which caption is true of a picture, by how likely a captioner finds each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repr.metrics.compositional import scores_of
from repr.metrics.features import Features


@torch.no_grad()
def likelihood(
    query: Features,
    *,
    texts: Tensor,
    values: Tensor,
    candidates: Tensor,
    items: Tensor,
    attribute: str,
    names: Sequence[str],
) -> dict[str, float]:
    """The scores of :func:`repr.metrics.compositional.compositional` with log p(caption | picture) for the cosine.

    Args:
        query: ``index``, the rows' positions in the source, and labels.
        texts: (N, P) int64 of all rows of the source: captions whose likelihood is known, different ones; -1: none.
        values: (N, P), their log-likelihoods given the row's picture, in nats; NaN where it could not be read.
        candidates: as there, with the numbers of captions that ``texts`` has.
        items: as there.
        attribute: as there.
        names: as there.

    Returns:
        ``likelihood_<score>`` for each score there, with its level at chance.
    """
    device = query.image.device
    texts, values = texts.to(device), values.to(device).double()

    def score(rows: Tensor, wanted: Tensor) -> Tensor:
        source = query.index[rows]
        same = texts[source].unsqueeze(2) == wanted.unsqueeze(3)  # (I, G, K, P)
        return torch.where(same, values[source].unsqueeze(2), torch.nan).nan_to_num(-torch.inf).amax(3)

    scores = scores_of(query, score, candidates=candidates, items=items, attribute=attribute, names=names)
    return {f"likelihood_{name}": value for name, value in scores.items() if name != "num_items"}
