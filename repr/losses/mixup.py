"""Mixed samples and their contrast: M3CoL."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from repr.losses.blockwise import logsumexp, true_logits
from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, normalise, paired, unit, with_gradient
from repr.losses.precision import Precision, full_precision
from repr.seeds import uniform

QUANTILES = 1 << 14  # of the Beta distribution, all equally likely


def mix(x: Tensor, partner: Tensor, *, lam: Tensor) -> Tensor:
    """Combine each sample with its partner, ``lam_i x_i + (1 - lam_i) partner_i``.

    Shapes: ``x``, ``partner`` and the result (N, ...), ``lam`` (N,) in [0, 1].
    """
    weight = lam.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return weight * x + (1 - weight) * partner


def draw_mix(seed: Tensor, *, beta: float = 0.15, fraction: float = 0.5, stream: int = 0) -> tuple[Tensor, Tensor]:
    """Draw for each sample its partner, ``perm`` (N,) int64, and its own share, ``lam`` (N,) float32, from seeds alone.

    The permutation is uniform: the k-th sample by one hash of its seed gets the k-th by another as its partner, so
    another order of the rows leads to the same partners. Fixed points occur. ``lam`` is a quantile of
    Beta(beta, beta), chosen by bits of the seed from a table that is made once on the CPU; no rejection, no
    transcendental function on the device, so all devices and ranks draw the same bits.

    Args:
        seed: (N,) int64, the ``seed`` of the global batch.
        beta: both parameters of the distribution, positive; the defaults are M3CoL's (arXiv:2409.17777).
        fraction: share of the samples that are mixed; the others get ``lam`` 1.
        stream: draws of different streams are independent: one for each modality.

    Raises:
        ValueError: ``beta`` is not positive or ``fraction`` not a share.
    """
    if not (beta > 0 and 0 <= fraction <= 1):
        raise ValueError(f"mixing draws with beta={beta}, fraction={fraction}; set beta above 0, fraction from 0 to 1")
    draws = uniform(seed, 6, stream=stream)  # (N, 6) multiples of 2^-24
    high, low = ((draws[:, columns] * 2.0**24).long() for columns in (slice(0, 2), slice(2, 4)))
    giver, taker = ((high << 24) | low).unbind(1)  # 48 bits each, so that ties hardly occur
    perm = torch.empty_like(giver)
    perm[taker.argsort(stable=True)] = giver.argsort(stable=True)
    quantiles = torch.as_tensor(_quantiles(beta), device=seed.device)
    lam = quantiles[(draws[:, 4] * QUANTILES).long()]
    return perm, lam.masked_fill(draws[:, 5] >= fraction, 1.0)


@lru_cache(maxsize=8)
def _quantiles(beta: float) -> NDArray[np.float32]:
    """The quantiles of Beta(beta, beta) in the middle of equal parts of [0, 1]: (QUANTILES,).

    An array, since a tensor of whatever mode is on at the first call would be kept for all later ones.
    """
    return betaincinv(beta, beta, (np.arange(QUANTILES) + 0.5) / QUANTILES).astype(np.float32)


def mixed_contrast(
    mixed: Tensor,
    other: Tensor,
    *,
    perm: Tensor,
    lam: Tensor,
    temperature: Scalar = 0.1,
    bidirectional: bool = True,
    overwrite: bool = False,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Cross-entropy of finding, for a mixed sample, both samples that are in it, in proportion to their shares.

    With ``m`` and ``y`` the normalised features, ``s_ij = <m_i, y_j> / temperature``, and targets ``P`` that are zero
    but for ``P_ii += lam_i`` and ``P_i,perm(i) += 1 - lam_i``::

        loss = -1/(2N) sum_ij P_ij [ log(exp s_ij / sum_k exp s_ik) + log(exp s_ij / sum_k exp s_kj) ]

    Rows of ``P`` sum to 1, its columns do not: the second half is a weighted sum. Without ``bidirectional`` it is
    left out, and 1/N takes the place of 1/(2N).

    Shapes: ``mixed`` (n, D) is of one modality, made with ``perm`` and ``lam``, both (N,), of all processes; ``other``
    (n, D) are the unmixed samples of another one.

    Range: [0, 2 / temperature + ln N], in nats. At chance (all similarities equal): ln N.

    Source: M3CoL, arXiv:2409.17777; BiMixCo of MindEye, arXiv:2305.18274.

    Departures: a fixed point of ``perm`` has the whole target 1. The authors' code writes 1 - lam over lam there;
    ``overwrite`` does so too, to reproduce its numbers.
    """
    with full_precision(mixed, precision):
        x, y = paired(mixed, other)
        scale, lam = 1 / temperature, lam.to(x.dtype)
        itself = perm == torch.arange(len(perm), device=perm.device)
        own = lam.masked_fill(itself, 0.0) if overwrite else lam
        own, rest, partners = map(exchange.own, (own, 1 - lam, perm))  # (n,) each
        shift = true_logits(x, y, scale)
        rows, columns, positives = logsumexp(
            x, y, scale, shift, chunk_size=chunk_size, exchange=exchange, precision=precision
        )
        partner = scale * (normalise(x) * exchange.take(normalise(y), partners)).sum(1)
        loss = (own * (rows - positives) + rest * (rows - (partner - shift))).mean()
        if bidirectional:
            of_partner = exchange.take(columns, partners) - (partner - exchange.take(shift, partners))
            back = own * (columns - positives) + rest * of_partner
            loss = (loss + back.mean()) / 2
        return exchange.mean(loss)


def soft_clip(
    a: Tensor,
    b: Tensor,
    *,
    temperature: Scalar = 0.125,
    detach_targets: bool = False,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """CLIP's two cross-entropies with targets that are the similarities within ``b``.

    With ``x`` and ``y`` the normalised ``a`` and ``b``, and the softmax of rows::

        Q = softmax(y y^T / temperature)
        loss = -1/(2N) sum_ij Q_ij [ log softmax(x y^T / temperature)_ij + log softmax(y x^T / temperature)_ij ]

    ``detach_targets`` keeps gradients out of ``Q``.

    Range: [0, 2 / temperature + ln N], in nats. At chance (all similarities of ``a`` with ``b`` equal): ln N.

    Source: M3CoL, arXiv:2409.17777, whose code keeps gradients in ``Q``; SoftCLIP of MindEye, arXiv:2305.18274, has
    frozen ``b``.
    """
    with full_precision(a):
        x, y = map(exchange.rows, unit(a, b))  # (N, D), the own n first
        inputs = x, y, torch.as_tensor(1 / temperature, dtype=x.dtype, device=x.device)
        # Value and gradient row block by row block, so that nothing of N x N is kept for backward.
        x, y, scale = leaves = [value.detach().requires_grad_() for value in inputs]
        total, grads = x.new_zeros(()), [torch.zeros_like(leaf) for leaf in leaves]
        for rows in row_blocks(len(a), chunk_size):
            with torch.enable_grad():
                part = _soft_rows(x, y, scale, rows, detach_targets) / (2 * len(a))
            for grad, more in zip(grads, torch.autograd.grad(part, leaves), strict=True):
                grad += more
            total += part.detach()
        return exchange.mean(with_gradient(total, inputs, grads))


def _soft_rows(x: Tensor, y: Tensor, scale: Tensor, rows: slice, detach: bool) -> Tensor:
    """Both cross-entropies of some rows, summed."""
    target = (scale * (y[rows] @ y.T)).softmax(1)
    log_probs = (scale * (x[rows] @ y.T)).log_softmax(1) + (scale * (y[rows] @ x.T)).log_softmax(1)
    return -((target.detach() if detach else target) * log_probs).sum()
