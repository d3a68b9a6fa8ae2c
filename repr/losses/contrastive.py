"""Losses that tell the true pairs of a batch from all its other pairs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from repr.losses.blockwise import logsumexp, softplus_sum, true_logits
from repr.losses.exchange import ALONE, Exchange
from repr.losses.features import Scalar, normalise, paired, unit
from repr.losses.precision import Precision, full_precision


def clip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    label_smoothing: float = 0.0,
    extra_text: Tensor | None = None,
    extra_valid: Tensor | None = None,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
    keys: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding the text of an image among all texts, and the image of a text among all images.

    With ``x`` and ``y`` the normalised image and text features and ``l_ij = logit_scale * <x_i, y_j>``::

        loss = -1/(2N) sum_i [ log(exp l_ii / sum_j exp l_ij) + log(exp l_ii / sum_j exp l_ji) ]

    The first sum over j has the M columns of ``extra_text`` besides, which no text is compared with.

    With ``label_smoothing`` e the target is 1 - e for the true pair and e / N for each of the N, which adds
    ``e * logit_scale * (mean_i <x_i, y_i> - <mean x, mean y>)``; it takes neither ``extra_text`` nor ``keys``.

    ``logit_scale`` is the multiplier itself, not its logarithm; a tensor gets its gradient. There is no bias, since a
    number added to all logits would change nothing.

    Range: [0, 2 * logit_scale + (ln(N + M) + ln N) / 2], in nats. At chance (all logits equal): (ln(N + M) + ln N) / 2,
    which is ln N without further texts.

    Source: Radford et al., 2021, arXiv:2103.00020, figure 3; with wrong captions as ``extra_text`` Yuksekgonul et al.,
    2023 (NegCLIP), arXiv:2210.01936, section 4.

    Departures: on several processes NegCLIP's code takes wrong captions of the first for the captions of the others.
    """
    with full_precision(image, precision):
        x, y = paired(image, text)
        shift = true_logits(x, y, logit_scale)
        rows, columns, positives = logsumexp(
            x,
            _with_further(y, extra_text, extra_valid, keys),
            logit_scale,
            shift,
            chunk_size=chunk_size,
            exchange=exchange,
            precision=precision,
            keys=keys,
            valid=extra_valid,
        )
        loss = exchange.mean(((rows - positives) + (columns - positives)).mean() / 2)
        if not label_smoothing:
            return loss
        if not 0 < label_smoothing < 1 or extra_text is not None or keys is not None:
            raise ValueError(
                f"label_smoothing={label_smoothing}; set a number from 0 to 1, without extra_text and keys "
                "(hard_captions=none, false_negatives=keep)"
            )
        x, y = normalise(x), normalise(y)
        centres = exchange.all_reduce(torch.stack([x.mean(0), y.mean(0)])) / exchange.size
        spread = exchange.mean((x * y).sum(1).mean()) - centres.prod(0).sum()
        return loss + label_smoothing * logit_scale * spread


def _with_further(text: Tensor, extra: Tensor | None, valid: Tensor | None, keys: Tensor | None) -> Tensor:
    """The texts (n, D), and behind them the further ones: (n + m, D).

    Raises:
        ValueError: the shapes do not fit.
    """
    if extra is None:
        extra = text[:0]
    if extra.ndim != 2 or extra.shape[1] != text.shape[1] or (valid is not None and valid.shape != extra.shape[:1]):
        told = None if valid is None else tuple(valid.shape)
        raise ValueError(f"extra_text is (M, {text.shape[1]}), extra_valid (M,); got {tuple(extra.shape)} and {told}")
    if keys is not None and len(keys) != len(text) + len(extra):
        raise ValueError(f"keys has {len(keys)} rows for {len(text)} texts and {len(extra)} of extra_text")
    return torch.cat([text, extra.to(text.dtype)]) if len(extra) else text


def sigmoid(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    logit_bias: Scalar,
    extra_text: Tensor | None = None,
    extra_valid: Tensor | None = None,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
    keys: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of telling for every image and every text, each pair by itself, whether they belong together.

    With ``x`` and ``y`` the normalised image and text features, ``l_ij = logit_scale * <x_i, y_j> + logit_bias``
    and ``z_ij`` 1 for i = j, else -1::

        loss = -1/N sum_ij log sigmoid(z_ij l_ij)

    z_ij is -1 for the M columns j of ``extra_text``, too.

    ``logit_scale`` is the multiplier itself, not its logarithm; it and ``logit_bias`` get their gradients if they are
    tensors.

    Range: [0, inf), in nats per image, summed over the N + M texts. At chance (all cosines 0):
    softplus(-logit_bias) + (N + M - 1) softplus(logit_bias), which is (N + M) ln 2 without a bias, and
    10 + (N + M) e^-10 at the usual start of -10.

    Source: Zhai et al., 2023, arXiv:2303.15343, algorithm 1. The sum over all pairs is divided by N, not by N * N, as
    there and in open_clip, which passes texts from process to process instead of gathering them.
    """
    with full_precision(image, precision):
        x, y = paired(image, text)
        total = softplus_sum(
            x,
            _with_further(y, extra_text, extra_valid, keys),
            logit_scale,
            logit_bias,
            chunk_size=chunk_size,
            exchange=exchange,
            precision=precision,
            keys=keys,
            valid=extra_valid,
        )
        return exchange.mean(total / len(x))


def pairs(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: Scalar,
    mated: Tensor | None = None,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Cross-entropy of telling, within each pair of samples, which text belongs to which image, and vice versa.

    Rows 2k and 2k + 1 are a pair. With ``l_ij`` as in :func:`clip`, i and j of one pair, and P pairs::

        loss = -1/(4P) sum_i [ log(exp l_ii / sum_j exp l_ij) + log(exp l_ii / sum_j exp l_ji) ]

    Args:
        image: (n, D).
        text: (n, D).
        logit_scale: the multiplier itself, not its logarithm.
        mated: (n,) bool; a pair counts if both of its rows are. None: all, and a last row without a second does not.
        exchange: counts the pairs of all processes; none has a row of another's.

    Range: [0, 2 * logit_scale + ln 2], in nats; 0 without a pair. At chance (all logits equal): ln 2.

    Source: the symmetric loss of minimal pairs of Wu et al., 2025 (S-VCO), arXiv:2502.13928, in the form of two towers,
    ours: it is :func:`clip` of the two samples. There a language model tells pictures apart, beside none at all.
    """
    with full_precision(image):
        x, y = (z[: len(z) // 2 * 2].unflatten(0, (-1, 2)) for z in unit(image, text))  # (P, 2, D)
        logits = logit_scale * x @ y.transpose(1, 2)
        both = logits.log_softmax(2) + logits.log_softmax(1)
        losses = -both.diagonal(dim1=1, dim2=2).sum(1) / 4  # (P,)
        counts = losses.new_ones(len(x)) if mated is None else mated[: 2 * len(x)].view(-1, 2).all(1).to(losses.dtype)
        num = exchange.all_reduce(counts.sum())
        return exchange.all_reduce((losses * counts).sum()) / num.clamp(min=1)


def cross_nt_xent(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: Scalar = 0.1,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Cross-entropy of finding, for each anchor, its candidate among all candidates; anchors are no candidates.

    With ``x`` and ``y`` the normalised anchors and candidates and ``s_ij = <x_i, y_j> / temperature``::

        loss = -1/N sum_i log( exp s_ii / sum_j exp s_ij )

    It is one half of :func:`clip`.

    Range: [0, 2 / temperature + ln N], in nats. At chance (all similarities equal): ln N.

    Source: van den Oord et al., 2018 (InfoNCE), arXiv:1807.03748, equation 4.
    """
    with full_precision(anchors, precision):
        x, y = paired(anchors, candidates)
        scale = 1 / temperature
        shift = true_logits(y, x, scale)
        # Candidates are the rows that travel, and each process compares those of all with its own anchors.
        _, sums, positives = logsumexp(
            y, x, scale, shift, chunk_size=chunk_size, exchange=exchange, precision=precision
        )
        return exchange.mean((sums - positives).mean())


def nt_xent(
    a: Tensor,
    b: Tensor,
    *,
    temperature: Scalar = 0.1,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
    keys: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding, for each of 2N views, the other view of its sample among the 2N - 1 other views.

    With ``z`` the 2N normalised rows of ``a`` and ``b``, ``s_kl = <z_k, z_l> / temperature`` and ``p(k)`` the
    partner of k::

        loss = -1/(2N) sum_k log( exp s_k,p(k) / sum_{l != k} exp s_kl )

    Range: [0, 2 / temperature + ln(2N - 1)], in nats. At chance (all similarities equal): ln(2N - 1).

    Source: Chen et al., 2020 (SimCLR), arXiv:2002.05709, equation 1.

    Departures: the view itself is left out exactly, where known code subtracts 1e9 from its logit.
    """
    with full_precision(a, precision):
        x, y = paired(a, b)
        scale = 1 / temperature
        shift = true_logits(x, y, scale)
        sums = partial(
            logsumexp,
            scale=scale,
            shift=shift,
            chunk_size=chunk_size,
            exchange=exchange,
            precision=precision,
            keys=keys,
        )
        rows, columns, positives = sums(x, y)
        # Within a view the similarities are symmetric: one half of them, read by rows and by columns, is all.
        x_rows, x_columns, _ = sums(x, x, pairs="upper")
        y_rows, y_columns, _ = sums(y, y, pairs="upper")
        all_of_a = torch.stack([rows, x_rows, x_columns]).logsumexp(0)
        all_of_b = torch.stack([columns, y_rows, y_columns]).logsumexp(0)
        return exchange.mean(((all_of_a - positives) + (all_of_b - positives)).mean() / 2)
