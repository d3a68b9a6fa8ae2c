"""Image-text retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repr.metrics.features import Features, distinct_captions
from repr.metrics.scores import CHANCE, ranks


@torch.no_grad()
def retrieval(query: Features, *, ks: Sequence[int] = (1, 5, 10), memory: float = 1.0) -> dict[str, float]:
    r"""Recall at k between the images and the captions of one table, both ways.

    .. math::
        i2t\_R@k = \frac{1}{N} \sum_i [r_i < k], \qquad t2i\_R@k = \frac{1}{C} \sum_c [r_c < k]

    The N images look for their caption among the C distinct captions; every distinct caption (the text of its first
    row stands for it) looks once among the N images and is right when any of its images is among the k nearest. The
    rank :math:`r` counts wrong candidates that are at least as near as the nearest right one, so ties count against the
    query: collapsed features get 0, not 1. Ranks are exact, and the N x C matrix is never held.

    Where images have several captions (``pairs``), the nearest of an image's counts. Captions that differ are right for
    their image alone, as in the published protocols.

    Args:
        query: ``image`` (N, D) and ``text`` (N, D), normalised inside; ``caption`` (N,), without which
            every row's caption is its own. Or ``text`` (C, D) and ``pairs`` (P, 2), at least one an image and text.
        ks: the k; a k of at least the number of candidates gives 1 by definition (unless features are NaN).
        memory: gigabytes (1e9 bytes) that the comparison may take.

    Returns:
        ``i2t_R@k`` and ``t2i_R@k`` in [0, 1], each with the expectation under a random order as its
        ``.chance``: :math:`k/C` for images, the mean over captions of
        :math:`1 - \binom{N-m}{k} / \binom{N}{k}` for captions with m images.

    Raises:
        ValueError: the table has no text, or not of every image; the memory is not positive.

    Source: Karpathy & Fei-Fei, 2015, arXiv 1412.2306 (recall at k, where any right one of several is a success).
    """
    if query.text is None:
        raise ValueError("retrieval needs text features: evaluate an image-text objective or leave this metric out")
    if memory <= 0:
        raise ValueError(f"memory={memory} gigabytes; set it above 0")
    text, pairs = query.text, query.pairs
    if pairs is None:
        first, caption = distinct_captions(query)
        text, pairs = text[first], torch.stack([torch.arange(len(caption), device=caption.device), caption], 1)
    num_images, num_texts = len(query.image), len(text)
    num_right, num_right_of_text = pairs[:, 0].bincount(minlength=num_images), pairs[:, 1].bincount(minlength=num_texts)
    if not (num_right > 0).all() or not (num_right_of_text > 0).all():
        missing = int((num_right == 0).sum())
        raise ValueError(f"{missing} of {num_images} images have no caption, or captions no image: leave them out")
    num_bytes = 32 * max(num_images, num_texts)  # of a query: cosines, masked ones, and masks
    chunk_size = max(1, int(memory * 1e9 / num_bytes))
    directions = {
        "i2t": (ranks(query.image, text, pairs, chunk_size=chunk_size), num_right, num_texts),
        "t2i": (ranks(text, query.image, pairs.flip(1), chunk_size=chunk_size), num_right_of_text, num_images),
    }
    values = {}
    for direction, (rank, num_right, num_candidates) in directions.items():
        for k in ks:
            values[f"{direction}_R@{k}"] = (rank < k).double().mean().item()
            values[f"{direction}_R@{k}{CHANCE}"] = chance(num_right, num_candidates, k)
    return values


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    r"""Give the mean probability that k of N candidates drawn without replacement hold one of m right ones.

    :math:`1 - \binom{N-m}{k} / \binom{N}{k} = 1 - \prod_{j<k} (1 - \frac{m}{N-j})`, by the product's
    logarithm, which is exact also where N is large and k/N tiny. The mean is over the queries, whose m >= 1 are
    ``num_right`` (Q,).
    """
    left = torch.arange(num_candidates, num_candidates - min(k, num_candidates), -1, device=num_right.device)
    share, multiplicity = num_right.unique(return_counts=True)
    missed = torch.log1p(-(share[:, None] / left.double()).clamp(max=1)).sum(1)  # log P(none of the k is right)
    return (-missed.expm1() * multiplicity).sum().item() / len(num_right)
