"""What the metrics share: reading a feature table, and ranks in which a tie is no success."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.metrics.features import Features

CHANCE = ".chance"  # what a metric appends to the name of a number for its level at chance
TIE = 1e-12  # cosines in float64 that differ by less are equal: only the order of summation tells them apart


def labelled(features: Features, attribute: str) -> tuple[Tensor, Tensor]:
    """Give the rows of a table that have a label.

    Args:
        features: a table of N rows.
        attribute: a key of ``features.labels``.

    Returns:
        The positions (M,) of the rows that are not labelled -1, and their labels (M,).

    Raises:
        ValueError: the table lacks the attribute, or none of its rows is labelled.
    """
    if attribute not in features.labels:
        raise ValueError(f"no labels named {attribute!r}; choose one of {sorted(features.labels)}")
    labels = features.labels[attribute]
    rows = (labels >= 0).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ValueError(f"no row has a label for {attribute!r}; leave this metric out or give labels")
    return rows, labels[rows]


def one_caption(table: Features) -> Features:
    """Make row i of ``text`` that of image i, the first of its captions; a table that is so already stays as it is.

    Args:
        table: with ``pairs``, those of an image in the order of its captions. Where an image has none, the result has
            no text.
    """
    if table.pairs is None or table.text is None:
        return table
    order = torch.arange(len(table.pairs), device=table.pairs.device)
    first = torch.full((len(table.image),), len(order), device=order.device)
    first.scatter_reduce_(0, table.pairs[:, 0], order, "amin")  # the first pair of each image
    if (first == len(order)).any():
        return replace(table, text=None, pairs=None)
    caption = table.pairs[first, 1]
    return replace(table, text=table.text[caption], caption=caption, pairs=None)


def rows_within(memory: float, num_columns: int, *, itemsize: int) -> int:
    """How many rows of a matrix fit a budget, at least one.

    Args:
        memory: gigabytes (1e9 bytes).
        num_columns: of the matrix.
        itemsize: bytes that an entry takes, with all that is held beside it.

    Raises:
        ValueError: the budget is not positive.
    """
    if memory <= 0:
        raise ValueError(f"memory={memory} gigabytes; set it above 0")
    return max(1, int(memory * 1e9 / (max(num_columns, 1) * itemsize)))


def finite(features: Tensor) -> Tensor:
    """Give the features back, if they are numbers.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if features.numel() and not torch.stack(features.aminmax()).isfinite().all():  # holds no second table
        rows = int((~features.isfinite().flatten(1).all(1)).sum())
        raise ValueError(
            f"{rows} of {len(features)} rows hold NaN or infinity: take a checkpoint from before it diverged"
        )
    return features


def accuracy(name: str, predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Give the share of right predictions and, as its chance level, the share of the largest class.

    Args:
        name: key of the accuracy.
        predicted: (M,) predicted labels.
        labels: (M,) true labels.

    Returns:
        ``name`` and ``name + CHANCE``, in [0, 1]. Whoever always names one class gets at most chance.
    """
    largest = labels.unique(return_counts=True)[1].max()
    return {name: (predicted == labels).double().mean().item(), name + CHANCE: largest.item() / len(labels)}


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
        (Q,) int64 in [0, C - 1]; 0 = the right one is strictly the nearest. A query is among the k
        nearest when its rank is below k.
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
