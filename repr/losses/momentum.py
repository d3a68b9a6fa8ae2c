"""What a network predicts of the embeddings, the keys, that its slow copy gives of other views."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repr.losses.contrastive import cross_nt_xent
from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, inverse_length, normalise, unit, widened, with_gradient
from repr.losses.hypersphere import alignment
from repr.losses.precision import Precision, full_precision


def regression(query: Tensor, key: Tensor, *, exchange: Exchange = ALONE) -> Tensor:
    """Mean squared distance of the directions of queries from those of their keys, which get no gradient.

    With ``q`` and ``k`` normalised::

        loss = 1/N sum_i ||q_i - k_i||^2 = 2 - 2/N sum_i <q_i, k_i>

    Shapes: both (n, D) of this process.

    Range: [0, 4]. At chance (independent directions, D large): 2.

    Source: Grill et al., 2020 (BYOL), arXiv:2006.07733, equation 2, which a flow takes in both directions.
    """
    return alignment(query, key.detach(), exchange=exchange)


def key_contrast(
    query: Tensor,
    keys: Tensor,
    *,
    temperature: Scalar,
    queue: Tensor | None = None,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Cross-entropy of finding the key of a query among other keys, which get no gradient.

    With ``q`` and ``k`` normalised and ``s_ij = <q_i, k_j> / temperature``::

        loss = -1/N sum_i log( exp s_ii / sum_j exp s_ij )

    where j runs over the N keys of the batch or, with a ``queue``, over the own key and the K of the queue.

    Shapes: ``query`` and ``keys`` (n, D) of this process, ``queue`` (K, D), the same on all. ``chunk_size`` is how many
    keys of the batch (of each process), or queries beside a queue, are compared at a time.

    Range: [0, 2 / temperature + ln N], in nats. At chance (all similarities equal): ln N, with a queue ln(K + 1).

    Source: He et al., 2020 (MoCo), arXiv:1911.05722, equation 1, with a queue; Chen et al., 2021 (MoCo v3),
    arXiv:2104.02057, without.

    Departures: MoCo v3's code multiplies by twice the temperature, which is for a flow to do.

    Raises:
        ValueError: the shapes do not match.
    """
    if queue is not None and (queue.ndim != 2 or queue.shape[1:] != query.shape[1:]):
        raise ValueError(f"queue is (K, D) as wide as query; got {tuple(queue.shape)} and {tuple(query.shape)}")
    if queue is None:
        options: Any = {"chunk_size": chunk_size, "exchange": exchange, "precision": precision}
        return cross_nt_xent(query, keys.detach(), temperature=temperature, **options)
    with full_precision(query, precision):
        q, k = unit(query, keys.detach(), exchange=exchange)
        return exchange.mean(_beside_queue(q, k, queue.detach().to(q.dtype), 1 / temperature, chunk_size))


def _beside_queue(q: Tensor, k: Tensor, queue: Tensor, scale: Scalar, chunk_size: int | None) -> Tensor:
    """Mean cross-entropy of finding each query's key beside all of the queue, whose rows count by their directions.

    The gradient is computed at once: then the queue is not kept for backward, before which it may get new rows.
    """
    inputs = [q, scale] if isinstance(scale, Tensor) else [q]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    blocks = row_blocks(len(q), chunk_size)
    with torch.no_grad():
        inverse = inverse_length(queue)
        parts = [_share_of_queue(q[rows], k[rows], queue, inverse, scale, learns=learns) for rows in blocks]
        value = torch.cat([each for each, _ in parts]).mean()
        if not learns:
            return value
        slopes = torch.cat([slope for _, slope in parts]).div_(len(q))  # of the value, by scale * q
        grads = [scale * slopes, (q * slopes).sum()][: len(inputs)]
    return with_gradient(value, inputs, grads)


def _share_of_queue(
    q: Tensor, k: Tensor, queue: Tensor, inverse: Tensor, scale: Scalar, *, learns: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropies (n,) and, if anything learns, their slopes (n, D) by ``scale * q``."""
    true, logits = scale * (q * k).sum(1), (scale * q) @ queue.T
    top = torch.maximum(logits.mul_(inverse).amax(1), true)
    weights, own = logits.sub_(top.unsqueeze(1)).exp_(), (true - top).exp_()
    total = weights.sum(1).add_(own)
    entropy = (top - true).add_(total.log())
    if not learns:
        return entropy, q
    drawn = (weights.mul_(inverse) @ queue).div_(total.unsqueeze(1))
    return entropy, drawn.addcmul_((own / total - 1).unsqueeze(1), k)


def dense_keys(query_map: Tensor, key_map: Tensor, keys: Tensor) -> Tensor:
    """For each cell of a picture, the projected cell of its other view that lies nearest to it in features.

    Cell s of ``query_map`` gets the cell t of ``keys`` for which the cosine of ``query_map_s`` and ``key_map_t`` is
    largest.

    Shapes: ``query_map`` (B, C, S) and ``key_map`` (B, C, T) are features of the backbone, ``keys`` (B, D, T) the
    projections of the cells of ``key_map``; the result is (B, D, S). There is no gradient.

    Source: Wang et al., 2021 (DenseCL), arXiv:2011.09157, section 3.3.
    """
    with torch.no_grad(), full_precision(query_map):
        a, b = map(normalise, widened(query_map, key_map))
        nearest = (a.transpose(1, 2) @ b).argmax(2)  # (B, S)
        return keys.gather(2, nearest.unsqueeze(1).expand(-1, keys.shape[1], -1))
