"""Contrast of samples of any two classes, in the dimensions that a gate opens for the pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from repr.losses.blockwise import NEVER, Scalar, normalise, widened
from repr.losses.precision import full_precision

Reduction = Literal["rows", "pairs"]


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

    Departures: 1/|P_i| is exact, where FastSSL has 1/(|P_i| + 1e-6).

    Raises:
        ValueError: the shapes differ, or ``reduction`` is another.
    """
    if not logits.shape == positives.shape == excluded.shape or logits.ndim != 2:
        shapes = [tuple(x.shape) for x in (logits, positives, excluded)]
        raise ValueError(f"logits, positives and excluded are (N, M); got {shapes}")
    if reduction not in ("rows", "pairs"):
        raise ValueError(f"reduction={reduction}; set it to rows or pairs")
    with full_precision(logits):
        (logits,) = widened(logits)
        negatives = logits.masked_fill(excluded, NEVER).logsumexp(1, keepdim=True)
        terms = torch.where(positives, torch.nn.functional.softplus(negatives - logits, threshold=40), 0.0)
        num = positives.sum(1).to(logits.dtype)
        if reduction == "pairs":
            return terms.sum() / num.sum().clamp(min=1)
        return (terms.sum(1) / num.clamp(min=1)).mean()


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
) -> Tensor:
    """Cross-entropy of finding the samples of a partner class among those of all but the own class, through a gate.

    With ``g_i`` the gate of row i for its two classes, and ``x``, ``y`` normalised ``z1``, ``z2``::

        l_ij = scale <g_i g_i x_i, y_j>,    or renormalised    scale cos(g_i x_i, g_i y_j)
        positives  { j : labels_j = partner_i },    excluded besides them  { j : labels_j = anchor_i }

    and the loss is :func:`masked_contrast`. The renormalised form takes two products of N x M x D.

    Shapes: ``z1`` and ``gate`` (N, D), ``anchor`` and ``partner`` (N,); ``z2`` (M, D), ``labels`` (M,), of the keys. A
    row or key of label -1 takes no part.

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
        x, y = normalise(x), normalise(y)
        logits = (x * gate * gate) @ y.T
        if renormalise:
            own = torch.linalg.vector_norm(gate * x, dim=1, keepdim=True)
            others = (gate.square() @ y.square().T).sqrt()
            logits = logits / (own * others).clamp(min=1e-12)
        columns = labels.unsqueeze(0)
        positives = (columns == partner.unsqueeze(1)) & (partner >= 0).unsqueeze(1) & (anchor >= 0).unsqueeze(1)
        excluded = (columns == partner.unsqueeze(1)) | (columns == anchor.unsqueeze(1)) | (columns < 0)
        return masked_contrast(scale * logits, positives, excluded, reduction=reduction)
