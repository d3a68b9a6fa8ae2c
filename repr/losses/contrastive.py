"""Losses that tell the true pairs of a batch from all its other pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from repr.losses.blockwise import full_precision, logsumexp, softplus_sum, unit


def clip(image: Tensor, text: Tensor, *, logit_scale: float | Tensor, chunk_size: int | None = None) -> Tensor:
    """Cross-entropy of finding the text of an image among all texts, and the image of a text among all images.

    With ``x`` and ``y`` the normalised image and text features and ``l_ij = logit_scale * <x_i, y_j>``::

        loss = -1/(2N) sum_i [ log(exp l_ii / sum_j exp l_ij) + log(exp l_ii / sum_j exp l_ji) ]

    Shapes: ``image`` and ``text`` (N, D), not normalised: that happens inside; row i of one belongs to
    row i of the other. ``logit_scale`` is the multiplier itself, not its logarithm: a number or a 0-dim
    tensor, which gets its gradient. With ``chunk_size`` no more than so many rows of the N x N logits exist
    at a time; value and gradient are the same.

    Range: [0, 2 * logit_scale + ln N], in nats. At chance (all logits equal): ln N.

    Source: Radford et al., 2021, arXiv:2103.00020, figure 3.

    Departures: none. A number added to all logits would change nothing, so there is no bias. Always
    float32 (float64 if an input is), also under autocast; half-precision features get a gradient of their type.

    Several processes: give the features of all of them, gathered with gradient; value and gradient are then
    those of the global batch.
    """
    with full_precision(image):
        x, y = unit(image, text)
        rows, columns, positives = logsumexp(x, y, logit_scale, _similarity(x, y, logit_scale), chunk_size=chunk_size)
        return ((rows - positives) + (columns - positives)).mean() / 2


def sigmoid(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of telling for every image and every text, each pair by itself, whether they belong together.

    With ``x`` and ``y`` the normalised image and text features, ``l_ij = logit_scale * <x_i, y_j> + logit_bias``
    and ``z_ij`` 1 for i = j, else -1::

        loss = -1/N sum_ij log sigmoid(z_ij l_ij)

    Shapes: ``image`` and ``text`` (N, D), not normalised: that happens inside; row i of one belongs to
    row i of the other. ``logit_scale`` is the multiplier itself, not its logarithm; it and ``logit_bias`` are
    numbers or 0-dim tensors, which get their gradients. With ``chunk_size`` no more than so many rows of the
    N x N logits exist at a time; value and gradient are the same.

    Range: [0, inf), in nats per image, summed over the N texts. At chance (all cosines 0):
    softplus(-logit_bias) + (N - 1) softplus(logit_bias), which is N ln 2 without a bias, and 10 + N e^-10 at the
    usual start of -10.

    Source: Zhai et al., 2023, arXiv:2303.15343, algorithm 1.

    Departures: none; the sum over all pairs is divided by N, not by N * N, as in the paper and open_clip. Always
    float32 (float64 if an input is), also under autocast; half-precision features get a gradient of their type.

    Several processes: give the features of all of them, gathered with gradient; value and gradient are then
    those of the global batch. (open_clip passes texts from process to process instead, to the same end.)
    """
    with full_precision(image):
        x, y = unit(image, text)
        return softplus_sum(x, y, logit_scale, logit_bias, chunk_size=chunk_size) / len(x)


def nt_xent(a: Tensor, b: Tensor, *, temperature: float | Tensor, chunk_size: int | None = None) -> Tensor:
    """Cross-entropy of finding, for each of 2N views, the other view of its sample among the 2N - 1 other views.

    With ``z`` the 2N normalised rows of ``a`` and ``b``, ``s_kl = <z_k, z_l> / temperature`` and ``p(k)`` the
    partner of k::

        loss = -1/(2N) sum_k log( exp s_k,p(k) / sum_{l != k} exp s_kl )

    Shapes: ``a`` and ``b`` (N, D), the two views, not normalised: that happens inside; row i of one belongs to
    row i of the other. With ``chunk_size`` no more than so many rows of the similarities exist at a time;
    value and gradient are the same.

    Range: [0, 2 / temperature + ln(2N - 1)], in nats. At chance (all similarities equal): ln(2N - 1).

    Source: Chen et al., 2020 (SimCLR), arXiv:2002.05709, equation 1.

    Departures: none from the paper. The view itself is left out exactly, where known code subtracts 1e9 from
    its logit. Always float32 (float64 if an input is), also under autocast; half-precision features get a
    gradient of their type.

    Several processes: give the features of all of them, gathered with gradient; value and gradient are then
    those of the global batch.
    """
    with full_precision(a):
        x, y = unit(a, b)
        scale = 1 / temperature
        shift = _similarity(x, y, scale)
        rows, columns, positives = logsumexp(x, y, scale, shift, chunk_size=chunk_size)
        # Within a view the similarities are symmetric: one half of them, read by rows and by columns, is all.
        x_rows, x_columns, _ = logsumexp(x, x, scale, shift, pairs="upper", chunk_size=chunk_size)
        y_rows, y_columns, _ = logsumexp(y, y, scale, shift, pairs="upper", chunk_size=chunk_size)
        all_of_a = torch.stack([rows, x_rows, x_columns]).logsumexp(0)
        all_of_b = torch.stack([columns, y_rows, y_columns]).logsumexp(0)
        return ((all_of_a - positives) + (all_of_b - positives)).mean() / 2


@torch.no_grad()
def _similarity(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Logits of the true pairs: as a shift they cancel in the loss and keep the digits of small losses."""
    return (scale * (x * y).sum(1)).to(x.dtype)
