"""Which caption belongs to a picture, and which picture to a caption, where candidates differ in composition alone.

One form for ARO, SugarCrepe, Winoground, MMVP-VLM and :class:`repr.data.drawn.composition.DrawnComposition`: a row is a
picture with its caption and wrong ones, and an item is a row, or several whose captions are wrong for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.metrics.features import Features, labels_of
from repr.metrics.scores import CHANCE, TIE

Score = Callable[[Tensor, Tensor], Tensor]  # rows of a table (I, G), captions for each (I, G, K) -> scores (I, G, K)
GROUP_CHANCE = 1 / 6  # of the 4! orders of four scores, 2! 2! have both right ones before both wrong ones


@torch.no_grad()
def compositional(
    query: Features,
    *,
    captions: Tensor,
    candidates: Tensor,
    items: Tensor,
    attribute: str,
    names: Sequence[str],
    chunk_size: int = 1024,
) -> dict[str, float]:
    r"""Share of items whose pictures pick their captions, whose captions pick their pictures, and both.

    With s the cosine of a picture and a caption, an item of G rows with the right captions :math:`c_i` is right in

    =============== ====================================================================== ===========================
    ``text_score``  :math:`s(x_i, c_i) > s(x_i, w)` for every row and its wrong captions w chance: product of 1/(1+W)
    ``image_score`` :math:`s(x_i, c_i) > s(x_j, c_i)` for every row and all other rows j   chance: :math:`(1/G)^G`
    ``group_score`` both, of items with two pictures and their two captions                chance: 1/6
    =============== ====================================================================== ===========================

    with W wrong captions of a row. An item of one row has no image score, and one whose rows have no wrong captions no
    text score. A tie is no success, nor is a comparison with NaN: an encoder that maps everything to one point gets
    0. An item of which a row could not be read is left out.

    Args:
        query: ``image`` (N, D), normalised inside; ``index``, the rows' positions in the source; labels.
        captions: (T, D), embeddings of all different captions, normalised inside.
        candidates: (M, K) int64 of all rows of the source: positions in ``captions``, the right one first, -1: none.
        items: (I, G) int64: the rows of each item, in the source; -1 where it has fewer.
        attribute: the labels that name the split of an item.
        names: class names of the attribute.
        chunk_size: items compared at a time; memory is chunk_size x G x K x D float64.

    Returns:
        Of each score that there is: ``<score>``, the share of items; ``<score>_<split>``; and, of two splits or more,
        ``macro_<score>``, the mean over splits; all with their ``.chance``. And ``num_items``.

    Raises:
        ValueError: no such labels, no whole item, or an item of two splits.

    Source: Thrush et al., 2022, arXiv 2204.03162 (Winoground: the three scores); Hsieh et al., 2023, arXiv 2306.14610
    (SugarCrepe) and Yuksekgonul et al., 2023, arXiv 2210.01936 (ARO): the text score of one picture, for relations and
    attributes as the mean over splits; Tong et al., 2024, arXiv 2401.06209 (MMVP-VLM): the image score. ARO's code
    takes the first of equal captions, so that in its sets of order a tie is a success.
    """
    image, text = F.normalize(query.image.double(), dim=1), F.normalize(captions.double(), dim=1)

    def cosine(rows: Tensor, wanted: Tensor) -> Tensor:
        return torch.einsum("igd,igkd->igk", image[rows], text[wanted])

    asked: Any = {"candidates": candidates, "items": items, "attribute": attribute, "names": names}
    return scores_of(query, cosine, **asked, chunk_size=chunk_size)


def scores_of(
    query: Features,
    score: Score,
    *,
    candidates: Tensor,
    items: Tensor,
    attribute: str,
    names: Sequence[str],
    chunk_size: int = 1024,
) -> dict[str, float]:
    """As :func:`compositional`, with any score of a picture and a caption."""
    row_labels, device = labels_of(query, attribute), query.image.device
    place = torch.full((len(candidates) + 1,), -1, device=device)  # row of the source -> row of the table
    place[query.index] = torch.arange(len(query.index), device=device)
    items, candidates = items.to(device), candidates.to(device)
    rows = place[items]  # (I, G); -1 finds the last entry, which is none
    whole = ((rows >= 0) == (items >= 0)).all(1)
    items, rows = items[whole], rows[whole]
    if len(rows) == 0:
        raise ValueError("no item has all its rows: evaluate the whole set")
    labels = row_labels[rows]  # (I, G)
    if ((labels != labels[:, :1]) & (rows >= 0)).any():
        raise ValueError(f"the rows of an item differ in {attribute!r}")
    parts = [
        _right(score, part, candidates[of])
        for part, of in zip(rows.split(chunk_size), items.split(chunk_size), strict=True)
    ]
    by_text, by_image = (torch.cat(part) for part in zip(*parts, strict=True))
    values = {"num_items": float(len(rows))}
    for name, right, chance in _scores(by_text, by_image, rows >= 0, candidates[items]):
        has = chance > 0
        values |= _shares(name, right[has].double(), chance[has], labels[has, 0], names)
    return values


def _right(score: Score, rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all pictures (I, G) of an item pick their captions, and all captions their pictures: (I,) each."""
    there, scores = rows >= 0, score(rows, candidates)
    wrong = (candidates[..., 1:] >= 0) & there[..., None]
    by_text = ((scores[..., :1] > scores[..., 1:] + TIE) | ~wrong).all(2).all(1)
    own = candidates[..., 0].unsqueeze(1)
    across = score(rows, own.expand(-1, rows.shape[1], -1)).mT  # (I, G, G), each caption with each picture
    right = across.diagonal(dim1=1, dim2=2)[..., None]
    others = there[:, None] & there[..., None] & ~torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    return by_text, ((right > across + TIE) | ~others).all(2).all(1)


def _scores(by_text: Tensor, by_image: Tensor, there: Tensor, candidates: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Each score's name, who is right, and the chance (I,) of each item, 0 where it has no such score."""
    num_wrong = (candidates[..., 1:] >= 0).sum(2)  # (I, G)
    text_chance = torch.where(there, 1 / (1 + num_wrong.double()), 1).prod(1) * ((num_wrong > 0) | ~there).all(1)
    size = there.sum(1)
    image_chance = (1 / size.double()) ** size * (size > 1)
    crossed = torch.zeros_like(by_text)
    if there.shape[1] == 2 and candidates.shape[2] > 1:  # each one's only wrong caption is the other's right one
        others = (candidates[..., 1] == candidates[..., 0].flip(1)).all(1)
        crossed = there.all(1) & (num_wrong == 1).all(1) & others
    return [
        ("text_score", by_text, text_chance),
        ("image_score", by_image, image_chance),
        ("group_score", by_text & by_image, crossed.double() * GROUP_CHANCE),
    ]


def _shares(name: str, right: Tensor, chance: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The share of right items, of all and of each split, beside chance; nothing where no item has the score."""
    if len(right) == 0:
        return {}
    values: dict[str, float] = {}
    splits = labels[labels >= 0].unique().tolist()
    for ending, of_item in (("", right), (CHANCE, chance)):
        values[f"{name}{ending}"] = of_item.mean().item()
        shares = {names[label]: of_item[labels == label].mean().item() for label in splits}
        values |= {f"{name}_{split}{ending}": share for split, share in shares.items()}
        if len(shares) > 1:
            values[f"macro_{name}{ending}"] = sum(shares.values()) / len(shares)
    return values
