"""Texts from left to right: the likeliest by a model of the next word, found by beam search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.distributed import all_reduce

NextWords = Callable[[Tensor], Tensor]  # (N, t) int64 -> (N, V), log-probabilities of the word that follows


@torch.no_grad()
def beam_search(
    next_words: NextWords,
    num_rows: int,
    *,
    start_id: int,
    end_id: int,
    pad_id: int,
    max_length: int,
    min_length: int = 1,
    num_beams: int = 1,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The likeliest texts that are found: ids (B, L), padded after the end, and their log-probabilities (B,), in nats.

    After each word the ``num_beams`` likeliest beginnings of a text go on; with one it is greedy. Texts of different
    lengths are compared by the sum over their words. One that is too long ends with ``end_id`` all the same, which
    counts as certain.

    Args:
        next_words: called with N = ``num_rows`` x ``num_beams`` rows, those of a text one after the other.
        num_rows: B.
        start_id: the first word of every text.
        end_id: the last one.
        pad_id: what follows.
        max_length: L, with start and end.
        min_length: words that come before the end at least, with the start.
        num_beams: beginnings that are kept.
        device: of the texts.

    Raises:
        ValueError: there are no beams, or no place for a word.
    """
    if num_beams < 1 or max_length < 2:
        raise ValueError(f"num_beams={num_beams}, max_length={max_length}; set at least 1 and 2")
    texts = torch.full((num_rows, num_beams, 1), start_id, device=device)
    scores = torch.full((num_rows, num_beams), -torch.inf, device=device)
    scores[:, 0] = 0  # beams that are alike count once
    over = torch.zeros_like(scores, dtype=torch.bool)
    for length in range(2, max_length + 1):
        words = next_words(texts.flatten(0, 1)).view(num_rows, num_beams, -1).float()
        if length == max_length:
            words = _only(end_id, words)
        elif length <= min_length:
            words[..., end_id] = -torch.inf
        totals = (scores.unsqueeze(2) + torch.where(over.unsqueeze(2), _only(pad_id, words), words)).flatten(1)
        scores, best = totals.topk(num_beams, 1)
        beam, word = best // words.shape[2], best % words.shape[2]
        texts = torch.cat([texts.gather(1, beam.unsqueeze(2).expand_as(texts)), word.unsqueeze(2)], 2)
        over = over.gather(1, beam) | (word == end_id)
        if not all_reduce((~over).sum()):  # processes that share a sharded decoder go on together
            break
    return F.pad(texts[:, 0], (0, max_length - texts.shape[2]), value=pad_id), scores[:, 0]


def _only(word: int, words: Tensor) -> Tensor:
    """The log-probabilities where one word is certain."""
    return torch.full_like(words, -torch.inf).index_fill_(2, torch.tensor([word], device=words.device), 0)
