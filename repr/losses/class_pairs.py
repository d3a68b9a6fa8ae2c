"""Contrast of samples of any two classes, in the dimensions that a gate opens for the pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from repr.losses.blockwise import NEVER
from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, normalise, widened
from repr.losses.precision import full_precision
from repr.seeds import uniform

Pairs = Literal["arbitrary", "identical", "distinct"]
Reduction = Literal["rows", "pairs"]


def draw_partners(labels: Tensor, seed: Tensor, *, pairs: Pairs, num_classes: int) -> Tensor:
    """Draw the class that each sample of the global batch is to find: (N,) int64, -1 where it finds none.

    ``arbitrary``: the classes of the labelled samples, in a random order; ``distinct``: any other class, which the
    batch may lack; ``identical``: its own. Who draws what does not depend on the order of the samples.

    Args:
        labels: (N,) int64, -1 of a sample without label.
        seed: (N,) int64, of the samples.
        pairs: as above.
        num_classes: of which ``distinct`` draws.

    Raises:
        ValueError: ``pairs`` is another.
    """
    if pairs not in ("arbitrary", "identical", "distinct"):
        raise ValueError(f"pairs={pairs}; set it to arbitrary, identical or distinct")
    if pairs == "identical":
        return labels
    draws = uniform(seed, 4).double()
    draws = draws[:, :2] + draws[:, 2:] * 2.0**-24  # (N, 2), with digits enough that no two are equal
    if pairs == "distinct":
        other = labels + 1 + (draws[:, 0] * (num_classes - 1)).long()
        return torch.where(labels < 0, labels, other % num_classes)
    ranked = (draws + 2 * (labels < 0).unsqueeze(1)).argsort(0)  # labelled ones first, so that they meet each other
    return torch.empty_like(labels).index_copy_(0, ranked[:, 0], labels[ranked[:, 1]])


def masked_contrast(logits: Tensor, positives: Tensor, excluded: Tensor, *, reduction: Reduction) -> Tensor:
    """Cross-entropy of telling each positive of a row from the row's negatives, and from no other positive.

    With ``P_i`` the positives of row i, and the negatives all columns that are not excluded::

        t_ij = log( exp l_ij + sum_{k not in X_i} exp l_ik ) - l_ij
        rows:  loss = 1/N sum_i 1/|P_i| sum_{j in P_i} t_ij     (a row without positives counts as 0)
        pairs: loss = sum_i sum_{j in P_i} t_ij / sum_i |P_i|

    Shapes: all (N, M); ``positives`` and ``excluded`` are bool.

    Range: [0, inf), in nats. At chance (equal logits): ln(1 + number of negatives).

    Source: Wu et al., 2024 (Hydra, later SimLAP), arXiv:2410.18200; rows as the authors' FastSSL, pairs as their
    vitookit.

    Departures: ``1/|P_i|`` is exact, where FastSSL has ``1/(|P_i| + 1e-6)``.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is another.
    """
    if not logits.shape == positives.shape == excluded.shape or logits.ndim != 2:
        shapes = [tuple(x.shape) for x in (logits, positives, excluded)]
        raise ValueError(f"logits, positives and excluded are (N, M); got {shapes}")
    with full_precision(logits):
        (logits,) = widened(logits)
        return _reduced(*_of_rows(logits, positives, excluded), reduction, ALONE)


def _of_rows(logits: Tensor, positives: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each row's cross-entropies, and the number of its positives: (N,) each."""
    negatives = logits.masked_fill(excluded, NEVER).logsumexp(1, keepdim=True)
    terms = torch.where(positives, F.softplus(negatives - logits, threshold=40), 0.0)
    return terms.sum(1), positives.sum(1).to(logits.dtype)


def _reduced(sums: Tensor, num: Tensor, reduction: Reduction, exchange: Exchange) -> Tensor:
    if reduction not in ("rows", "pairs"):
        raise ValueError(f"reduction={reduction}; set it to rows or pairs")
    if reduction == "pairs":
        return exchange.all_reduce(sums.sum()) / exchange.all_reduce(num.sum()).clamp(min=1)
    return exchange.mean((sums / num.clamp(min=1)).mean())


def class_pair_contrast(
    z1: Tensor,
    z2: Tensor,
    gate: Tensor,
    *,
    anchor: Tensor,
    partner: Tensor,
    labels: Tensor,
    scale: Scalar,
    renormalise: bool,
    reduction: Reduction,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Cross-entropy of finding the samples of a partner class among those of all but the own class, through a gate.

    With ``g_i`` the gate of row i for its two classes, and ``x``, ``y`` normalised ``z1``, ``z2``::

        l_ij = scale <g_i g_i x_i, y_j>,    or renormalised    scale cos(g_i x_i, g_i y_j)
        positives  { j : labels_j = partner_i },    excluded besides them  { j : labels_j = anchor_i }

    and the loss is :func:`masked_contrast`. The renormalised form takes two products of N x M x D.

    Shapes: ``z1`` and ``gate`` (N, D), ``anchor`` and ``partner`` (N,); ``z2`` (M, D), ``labels`` (M,), of the keys; of
    several processes, those of this one. A row or key of label -1 takes no part. ``chunk_size`` is how many rows are
    compared with the keys of all at a time.

    Range: [0, inf), in nats.

    Source: Wu et al., 2024 (Hydra, later SimLAP), arXiv:2410.18200. The plain form is that of the authors' present
    code, the renormalised one that of an earlier version.

    Raises:
        ValueError: the shapes do not match.
    """
    if z1.shape != gate.shape or z1.shape[1:] != z2.shape[1:] or len(labels) != len(z2):
        shapes = [tuple(x.shape) for x in (z1, gate, z2, labels)]
        raise ValueError(f"z1 and gate are (N, D), z2 (M, D) and labels (M,); got {shapes}")
    with full_precision(z1):
        x, y, gate = widened(z1, z2, gate)
        x, y, labels = normalise(x), exchange.rows(normalise(y)), exchange.rows(labels)

        def some(x: Tensor, gate: Tensor, anchor: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
            logits = (x * gate * gate) @ y.T
            if renormalise:
                own = torch.linalg.vector_norm(gate * x, dim=1, keepdim=True)
                others = (gate.square() @ y.square().T).sqrt()
                logits = logits / (own * others).clamp(min=1e-12)
            same, sought = labels == anchor.unsqueeze(1), labels == partner.unsqueeze(1)
            positives = sought & ((partner >= 0) & (anchor >= 0)).unsqueeze(1)
            return _of_rows(scale * logits, positives, sought | same | (labels < 0))

        rows = (x, gate, anchor, partner)
        if chunk_size is None:
            return _reduced(*some(*rows), reduction, exchange)
        blocks = row_blocks(len(x), chunk_size)
        parts = [checkpoint(some, *(part[block] for part in rows), use_reentrant=False) for block in blocks]
        sums, num = map(torch.cat, zip(*parts, strict=True))
        return _reduced(sums, num, reduction, exchange)
