"""Choosing between two pictures by a statement: the scoring of MMVP-VLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.batch import Features
from repr.metrics.tables import TIE, labelled

CHANCE = 0.25  # both statements of a pair must find their picture


@torch.no_grad()
def paired_choice(bank: Features, query: Features, *, attribute: str, names: Sequence[str]) -> dict[str, float]:
    r"""Share of pairs of pictures of which both statements pick their own.

    A statement picks the picture with the larger softmax over the two, :math:`\cos(t_i, x_i) > \cos(t_i, x_j)`,
    whatever the temperature; a tie picks none. A pair counts if both do. The result is the mean over patterns, so
    that each weighs the same.

    Args:
        bank: not used.
        query: ``image`` and ``text`` (N, D), normalised inside; rows of index 2i and 2i + 1 are a pair. A row
            whose other half is missing, since it could not be read, is left out.
        attribute: the labels that name the pattern of a pair; both rows have the same.
        names: class names of the attribute.

    Returns:
        ``pairs``, ``pairs_<pattern>`` in [0, 1], all 1/4 at chance, and ``num_pairs``.

    Raises:
        ValueError: no text, no labels, no whole pair, or a pair of two patterns.

    Source: Tong et al., 2024, arXiv 2401.06209, section 3; the authors' ``evaluate_vlm.py``, which gives percentages
    and counts the pairs of a pattern by their position in the file.
    """
    if query.text is None:
        raise ValueError("paired_choice needs the statements' embeddings: set data.tokenizer")
    rows, labels = labelled(query, attribute)
    first, second = _pairs(query.index[rows])
    if len(first) == 0:
        raise ValueError("no pair of rows 2i and 2i + 1: evaluate the whole set")
    pattern = labels[first]
    if (pattern != labels[second]).any():
        raise ValueError(f"the two rows of a pair differ in {attribute!r}")
    image, text = (F.normalize(x[rows].double(), dim=1) for x in (query.image, query.text))
    right = _picks(text[first], image[first], image[second]) & _picks(text[second], image[second], image[first])
    values, shares = {"num_pairs": float(len(right))}, []
    for label in pattern.unique().tolist():
        share = right[pattern == label].double().mean().item()
        shares.append(share)
        values |= {f"pairs_{names[label]}": share, f"pairs_{names[label]}.chance": CHANCE}
    return {"pairs": sum(shares) / len(shares), "pairs.chance": CHANCE, **values}


def _pairs(index: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (P,) in ``index`` of the even halves of whole pairs, and of their odd halves."""
    order = index.argsort()
    ordered = index[order]
    whole = ((ordered[:-1] % 2 == 0) & (ordered[1:] == ordered[:-1] + 1)).nonzero().squeeze(1)
    return order[whole], order[whole + 1]


def _picks(text: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Whether a statement is strictly nearer to its own picture; all (P, D) of unit length."""
    return (text * own).sum(1) > (text * other).sum(1) + TIE
