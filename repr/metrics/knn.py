"""Weighted nearest-neighbour classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from repr.batch import Features
from repr.metrics.tables import accuracy, finite, labelled


@torch.no_grad()
def knn(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 256,
) -> dict[str, float]:
    r"""Accuracy of the weighted vote of the k bank rows nearest to a query.

    .. math::
        \hat y_q = \arg\max_c \sum_{b \in kNN(q)} [y_b = c]\, e^{\cos(q, b) / T}

    Args:
        bank: ``trunk`` (N, T), normalised inside, and labels; unlabelled rows are left out. It must not
            hold the query's own samples, which would vote for themselves.
        query: the same; unlabelled rows are left out, a label that the bank lacks counts as wrong.
        attribute: which labels.
        k: neighbours, clipped to the rows of the bank.
        temperature: T.
        chunk_size: queries compared at a time; memory is chunk_size x N.

    Returns:
        ``knn_<attribute>`` in [0, 1]; chance is the share of the query's largest class.

    Raises:
        ValueError: a table lacks the attribute or has no labelled row; features are not finite; k or temperature is
            not positive.

    Source: Wu, Xiong, Yu & Lin, 2018, arXiv 1805.01978, section 3.4.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"set k >= 1 and temperature > 0, not k={k}, temperature={temperature}")
    bank_rows, bank_labels = labelled(bank, attribute)
    rows, labels = labelled(query, attribute)
    classes, target = bank_labels.unique(return_inverse=True)
    keys = F.normalize(finite(bank.trunk[bank_rows]), dim=1)
    predicted = []
    for chunk in finite(query.trunk[rows]).split(chunk_size):
        cosine, neighbour = (F.normalize(chunk, dim=1) @ keys.T).topk(min(k, len(keys)))  # (chunk, k)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()  # a factor a query: the same vote, no overflow
        votes = weight.new_zeros(len(chunk), len(classes)).scatter_add_(1, target[neighbour], weight)
        predicted.append(classes[votes.argmax(1)])
    return accuracy(f"knn_{attribute}", torch.cat(predicted), labels)
