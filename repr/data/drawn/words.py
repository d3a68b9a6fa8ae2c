"""A tokenizer of the few words of drawn captions: a decoder that says them needs no 49,408 words of CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repr.data.drawn.composition import NUMBERS, RELATIONS, SHAPES
from repr.data.drawn.trifeature import COLOURS


class DrawnWords:
    """The words of :class:`repr.data.drawn.composition.DrawnComposition`, each a number.

    Texts are a start, words, an end, and padding of 0; 1 is any other word. The end has the highest number, as in
    CLIP's tokenizer.

    Args:
        context_length: L; what is longer is cut before the end.
    """

    def __init__(self, context_length: int) -> None:
        relations = " ".join(RELATIONS).split()
        shapes = [*SHAPES, *(f"{name}es" if name == "cross" else f"{name}s" for name in SHAPES)]
        words = dict.fromkeys(["a", "an", "and", *NUMBERS.values(), *relations, *COLOURS, *shapes])
        self.context_length, self.words = context_length, ["", "?", *words]
        self.sot_token_id, self.eot_token_id = len(self.words), len(self.words) + 1
        self.vocab_size = len(self.words) + 2
        self._ids = {word: number for number, word in enumerate(self.words)}

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """B texts -> (B, L) int64."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [self._ids.get(word, 1) for word in text.split()][: self.context_length - 2]
            ids = [self.sot_token_id, *ids, self.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The words of a text, without start, end and padding."""
        return " ".join(self.words[number] for number in ids if 0 < number < len(self.words))
