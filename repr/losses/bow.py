"""Visual words: a picture as a bag of the words that its cells are nearest to, and the prediction of such bags."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.losses.features import widened
from repr.losses.precision import full_precision

Pool = Literal["max", "mean"]


def distances(features: Tensor, words: Tensor) -> Tensor:
    """Squared distance of every cell of a map to every word: ``||f_bhw - v_k||^2``.

    Shapes: ``features`` (B, C, H, W), ``words`` (K, C); the result is (B, K, H, W), in float32 at least.

    Raises:
        ValueError: the shapes do not match.
    """
    if features.ndim != 4 or words.ndim != 2 or features.shape[1] != words.shape[1]:
        raise ValueError(f"features are (B, C, H, W), words (K, C); got {tuple(features.shape)}, {tuple(words.shape)}")
    with full_precision(features):
        features, words = widened(features, words)
        products = words @ features.flatten(2)  # (B, K, H * W)
        squares = features.square().sum(1).flatten(1).unsqueeze(1) + words.square().sum(1).unsqueeze(1)
        return (squares - 2 * products).clamp_(min=0).unflatten(2, features.shape[2:])


def codes(distances: Tensor, *, inverse_delta: float | None, mean_distance: float | Tensor) -> Tensor:
    """Assign cells to words: ``softmax_k(-inverse_delta / mean_distance * d_k)``, softly, or to the nearest word alone.

    ``mean_distance`` is a running mean of the distance of cells to their nearest word, so that the softness follows the
    scale of the features. Where ``inverse_delta`` is None, the nearest word has the whole.

    Shapes: ``distances`` (B, K, H, W), and so the result.

    Source: Gidaris et al., 2021 (OBoW), arXiv:2012.11552, section 3.2.
    """
    if inverse_delta is None:
        return F.one_hot(distances.argmin(1), distances.shape[1]).movedim(-1, 1).to(distances.dtype)
    return (-inverse_delta / mean_distance * distances).softmax(1)


def bag(codes: Tensor, *, pool: Pool = "max") -> Tensor:
    """How much of each word a picture has: the maximum, or mean, over its cells, divided by the sum over words.

    Shapes: ``codes`` (B, K, H, W); the result is (B, K), whose rows sum to 1.

    Raises:
        ValueError: ``pool`` is neither.
    """
    if pool not in ("max", "mean"):
        raise ValueError(f"pool={pool}; set it to max or mean")
    cells = codes.flatten(2)
    pooled = cells.amax(2) if pool == "max" else cells.mean(2)
    return pooled / pooled.sum(1, keepdim=True).clamp(min=1e-12)


def bag_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of predicted bags from the true ones, which get no gradient.

    ::

        loss = 1/B sum_b sum_k target_bk [ log target_bk - log softmax(logits_b)_k ]

    Shapes: both (B, K); rows of ``target`` sum to 1. It takes no exchange.

    Range: [0, inf), in nats. At chance (equal logits): ln K minus the mean entropy of the bags.

    Source: Gidaris et al., 2021 (OBoW), arXiv:2012.11552, and the authors' code.

    Departures: the paper has the cross-entropy, of which the gradient is the same.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.ndim != 2 or logits.shape != target.shape:
        raise ValueError(f"logits and target are (B, K); got {tuple(logits.shape)} and {tuple(target.shape)}")
    with full_precision(logits):
        logits, target = widened(logits, target.detach())
        return (torch.xlogy(target, target) - target * logits.log_softmax(1)).sum(1).mean()
