"""Which samples of a batch are negatives of each other: none that show or say the same, and hard ones by a draw."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from repr.batch import Batch
from repr.distributed import gather, rank
from repr.losses.features import normalise
from repr.seeds import uniform

FALSE_NEGATIVES = (
    "Share of samples that have picture or caption (or labels, where these count) in common with another one of their "
    "batch, whose pairs are left out; lower is better, since less is left out."
)
_COMPARED = {"keep": (), "mask": ("picture", "text"), "mask_labels": ("picture", "text", "label")}  # keys of a batch
_FACTOR = 0x5851F42D4C957F2D  # odd, of Knuth's MMIX generator


def compared_keys(kind: str, losses: Mapping[str, Any], weights: Collection[str]) -> Sequence[str]:
    """By what in a batch a contrast tells negatives that are none, as the option ``false_negatives`` wants it.

    Args:
        kind: ``keep``: by nothing; ``mask``: by picture and caption; ``mask_labels``: by labels, too.
        losses: term -> loss of an objective.
        weights: its terms that count.

    Raises:
        ValueError: the option has another value, or no weighted contrast has a loss that takes ``keys``.
    """
    if kind not in _COMPARED:
        raise ValueError(f"false_negatives={kind}; set it to {', '.join(_COMPARED)}")
    if kind != "keep" and "contrast" not in weights:
        raise ValueError(f"false_negatives={kind}: contrast, the term with negatives, has no weight; set it to keep")
    if kind != "keep" and "keys" not in signature(losses["contrast"]).parameters:
        raise ValueError(f"false_negatives={kind}: the loss of contrast takes no keys; set it to keep")
    return _COMPARED[kind]


def sample_keys(batch: Batch, compared: Sequence[str] = _COMPARED["mask"]) -> Tensor:
    """Numbers of what each sample shows and says: (B, K) int64, equal ones where that is the same.

    There is a column for each key of ``compared`` (``picture``, ``text``, ``label``) that the batch has. Labels are the
    same if all of a sample's are; a sample that lacks one has a number of its own.
    """
    columns = []
    if "picture" in compared and "picture" in batch:
        columns.append(batch["picture"])
    if "text" in compared and "text" in batch:
        columns.append(_hash(batch["text"]))
    if "label" in compared and "label" in batch:
        itself = _hash(-1 - batch["index"].unsqueeze(1))
        columns.append(_hash(batch["label"]).where((batch["label"] >= 0).all(1), itself))
    return torch.stack(columns, 1) if columns else batch["index"].unsqueeze(1)


def hard_caption_keys(batch: Batch, compared: Sequence[str]) -> Tensor:
    """Numbers of the wrong captions, (B * their number, K) int64: what they say, and in the other columns their own."""
    texts, index = batch["hard_text"], batch["index"]
    place = torch.arange(texts.shape[1], device=texts.device).repeat(len(texts))
    itself = _hash(torch.stack([-2 - index.repeat_interleave(texts.shape[1]), place], 1))
    columns = {"picture": itself, "text": _hash(texts.flatten(0, 1)), "label": itself}
    return torch.stack([keys for name, keys in columns.items() if name in compared and name in batch], 1)


def told_keys(
    batch: Batch, compared: Sequence[str], logs: dict[str, Tensor | float], *, hard_captions: bool = False
) -> dict[str, Any]:
    """The argument of a loss that masks, ``keys``, or none where nothing is ``compared``.

    In ``logs`` comes the share of samples that it concerns. With ``hard_captions`` the keys of the wrong captions
    follow, as a loss takes them with ``extra_text``.
    """
    if not compared:
        return {}
    keys = sample_keys(batch, compared)
    logs["false_negatives"] = share_in_common(keys)
    return {"keys": torch.cat([keys, hard_caption_keys(batch, compared)]) if hard_captions else keys}


def share_in_common(keys: Tensor) -> Tensor:
    """Share of the samples of all processes that have a key (B, K) of theirs in common with another one."""
    keys = gather(keys)
    found = keys.new_zeros(len(keys), dtype=torch.bool)
    for column in keys.T:
        ordered, rows = column.sort()
        equal = ordered[1:] == ordered[:-1]
        found[rows[1:]] |= equal
        found[rows[:-1]] |= equal
    return found.float().mean()


@torch.no_grad()
def negative_logits(query: Tensor, keys: Tensor, *, temperature: Tensor | float) -> Tensor:
    """Cosines of own queries (B, D) with the keys (B, D) of all processes, over the temperature: (B, N) float64."""
    return normalise(query.double()) @ gather(normalise(keys.double())).T / temperature


@torch.no_grad()
def draw_negatives(logits: Tensor, same: Tensor, seed: Tensor, *, stream: int) -> Tensor:
    """For each own row another row of the global batch, with the probability ``softmax(logits)`` of the others: (B,).

    Where ``same`` (B, N) says that two samples show or say the same, neither is drawn for the other; where all are the
    same, any other is. The draw is by the inverse of the distribution, at a number that is a function of ``seed`` (B,).

    Raises:
        ValueError: there is no other row.
    """
    num, total = logits.shape
    if total < 2:
        raise ValueError("matching needs a wrong caption of another sample: set the global batch to 2 or more")
    own = torch.arange(num, device=logits.device) + rank() * num
    itself = own.unsqueeze(1) == torch.arange(total, device=logits.device)
    alone = same.all(1, keepdim=True)
    left = logits.masked_fill(alone, 0).masked_fill(torch.where(alone, itself, same), -math.inf)
    rising = left.softmax(1).cumsum(1)
    point = uniform(seed, 1, stream=stream).double() * rising[:, -1:]
    return torch.searchsorted(rising, point, right=True).squeeze(1).clamp(max=total - 1)  # NaN is for the guard to tell


def _hash(values: Tensor) -> Tensor:
    """A number of each row of (B, L) int64: a polynomial modulo 2^64."""
    powers = torch.full((values.shape[1],), _FACTOR, device=values.device).cumprod(0)
    return (values * powers).sum(1)
