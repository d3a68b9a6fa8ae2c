"""Image-text retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repr.batch import Features
from repr.metrics.tables import ranks, rows_within


@torch.no_grad()
def retrieval(
    bank: Features,
    query: Features,
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 512,
    memory: float | None = None,
) -> dict[str, float]:
    r"""Recall at k between the images and the captions of one table, both ways.

    .. math::
        i2t\_R@k = \frac{1}{N} \sum_i [r_i < k], \qquad t2i\_R@k = \frac{1}{C} \sum_c [r_c < k]

    The N images look for their caption among the C distinct captions; every distinct caption (the text
    of its first row stands for it) looks once among the N images and is right when any of its images is
    among the k nearest. The rank :math:`r` counts wrong candidates that are at least as near as the
    nearest right one, so ties count against the query: collapsed features get 0, not 1. Ranks are
    exact, and the N x C matrix is never held.

    Where images have several captions (``text_row``), each of the C captions is one of its own, as in the published
    protocols: right for its image alone, whose nearest caption counts; equal ones of two images are not joined.

    Args:
        bank: not used.
        query: ``image`` (N, D) and ``text`` (N, D), normalised inside; ``caption`` (N,), without which
            every row's caption is its own. Or ``text`` (C, D) and ``text_row`` (C,), at least one an image.
        ks: the k; a k of at least the number of candidates gives 1 by definition (unless features are NaN).
        chunk_size: queries compared at a time; memory is chunk_size x N float64.
        memory: gigabytes that the comparison may take; None: what the chunk size takes.

    Returns:
        ``i2t_R@k`` and ``t2i_R@k`` in [0, 1], each with the expectation under a random order as its
        ``.chance``: :math:`k/C` for images, the mean over captions of
        :math:`1 - \binom{N-m}{k} / \binom{N}{k}` for captions with m images.

    Raises:
        ValueError: the table has no text, or no caption of some image.

    Source: Karpathy & Fei-Fei, 2015, arXiv 1412.2306 (recall at k; they, too, count any right one of
    several as a success).
    """
    if query.text is None:
        raise ValueError("retrieval needs text features: evaluate an image-text objective or leave this metric out")
    num_images = len(query.image)
    rows = torch.arange(num_images, device=query.image.device)
    text, image_id, text_id = (query.text, rows, query.text_row) if query.text_row is not None else _distinct(query)
    num_texts = text_id.bincount(minlength=int(image_id.max()) + 1)[image_id]  # right captions of an image
    num_images_each = image_id.bincount()[text_id] if len(text_id) else text_id  # right images of a caption
    if not (num_texts > 0).all():
        raise ValueError(f"{int((num_texts == 0).sum())} of {num_images} images have no caption: leave them out")
    if memory is not None:
        chunk_size = rows_within(memory, max(num_images, len(text)), itemsize=32)  # cosines twice, right, and wrong
    directions = {
        "i2t": (ranks(query.image, text, image_id, text_id, chunk_size=chunk_size), num_texts, len(text)),
        "t2i": (ranks(text, query.image, text_id, image_id, chunk_size=chunk_size), num_images_each, num_images),
    }
    values = {}
    for direction, (rank, num_right, num_candidates) in directions.items():
        for k in ks:
            values[f"{direction}_R@{k}"] = (rank < k).double().mean().item()
            values[f"{direction}_R@{k}.chance"] = chance(num_right, num_candidates, k)
    return values


def _distinct(query: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Text (C, D) of the distinct captions, and which caption an image (N,) and a text (C,) have."""
    assert query.text is not None
    num_images = len(query.image)
    rows = torch.arange(num_images, device=query.image.device)
    captions, caption = (rows if query.caption is None else query.caption).unique(return_inverse=True)
    first = torch.full_like(captions, num_images).scatter_reduce(0, caption, rows, "amin")  # (C,)
    return query.text[first], caption, caption[first]


def chance(num_right: Tensor, num_candidates: int, k: int) -> float:
    r"""Give the mean probability that k of N candidates drawn without replacement hold one of m right ones.

    :math:`1 - \binom{N-m}{k} / \binom{N}{k} = 1 - \prod_{j<k} (1 - \frac{m}{N-j})`, by the product's
    logarithm, which is exact also where N is large and k/N tiny.

    Args:
        num_right: (Q,) the m of every query, at least 1.
        num_candidates: N.
        k: how many are drawn; more than N are N.

    Returns:
        The mean over queries, in (0, 1].
    """
    left = torch.arange(num_candidates, num_candidates - min(k, num_candidates), -1, device=num_right.device)
    share, multiplicity = num_right.unique(return_counts=True)
    missed = torch.log1p(-(share[:, None] / left.double()).clamp(max=1)).sum(1)  # log P(none of the k is right)
    return (-missed.expm1() * multiplicity).sum().item() / len(num_right)
