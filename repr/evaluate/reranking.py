"""Retrieval whose first candidates are put in order by an encoder that sees picture and caption together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from repr.data.eval_datasets import EvalDataset
from repr.data.fingerprint import captions_of
from repr.distributed import all_reduce, rank
from repr.evaluate.protocol import Parts, Protocol
from repr.evaluate.tables import NO_TEXT, Tables
from repr.metrics.rerank import reranked, shortlist


class Captioned(NamedTuple):
    """The pictures of a set that could be read and have captions."""

    row: Tensor  # (N,) int64, rising, in the source
    image: Tensor  # (N, D)
    text: Tensor  # (C, D), of distinct captions
    texts: list[str]  # C
    pairs: Tensor  # (P, 2) int64, of pictures and captions


@dataclass
class Reranking(Protocol):
    """Recall where the ``k`` nearest by cosine are ordered by match logit (:func:`repr.metrics.rerank.reranked`).

    Of every pair that is among the nearest of its picture or of its caption the encoder scores the tokens together: of
    N pictures and C captions up to ``k (N + C)`` passes through the fusion encoder.
    """

    k: int  # candidates of each query
    ks: Sequence[int]
    batch_size: int  # pairs that are scored at a time
    said: ClassVar = {
        "features": "image, text; tokens of both",
        "similarity": "cosine, then log-odds of a match",
        "ties": "count as failures",
        "chance": "a random order",
    }
    meanings: ClassVar = {
        r"reranked_i2t_R@(\d+)": r"As i2t_R@\1, where a look at both orders the nearest captions; higher is better.",
        r"reranked_t2i_R@(\d+)": r"As t2i_R@\1, where a look at both orders the nearest pictures; higher is better.",
    }
    silent = ("batch_size",)
    positive = ("k", "ks", "batch_size")

    def __post_init__(self) -> None:
        self._captions: dict[str, tuple[list[str], Tensor]] = {}
        self._found: dict[str, tuple[Captioned, list[tuple[Tensor, Tensor]]]] = {}

    def fault(self, tables: Tables) -> str | None:
        """Refuse an encoder that does not see both together."""
        if hasattr(tables.encoder.module, "match_head"):
            return None
        return "needs an encoder that scores pairs: set objective=albef with a weight of matching"

    def want(self, tables: Tables, name: str) -> str | None:
        """Ask for the embeddings of pictures and of all their captions."""
        if tables.encoder.tokenizer is None:
            return NO_TEXT
        if name not in self._captions:
            self._captions[name] = captions_of(*tables.data.evaluated(name))
        texts, _ = self._captions[name]
        if not texts:
            self._captions.pop(name)
            return f"{name} has no captions"
        tables.want_pictures(name)
        tables.want_texts(texts, f"captions of {name}")
        return None

    @torch.no_grad()
    def prepare(self, tables: Tables) -> None:
        """Score the pairs on all processes, each of its share of the pictures."""
        if self.fault(tables) is not None:
            return
        for name, (texts, pairs) in self._captions.items():
            of = _captioned(tables, name, texts, pairs)
            lists = shortlist(of.image, of.text, self.k), shortlist(of.text, of.image, self.k)
            (images, of_images), (captions, of_texts) = map(_pairs, lists)
            asked = torch.cat([torch.stack([images, of_images], 1), torch.stack([of_texts, captions], 1)])
            asked, where = asked.unique(dim=0, return_inverse=True)  # (P, 2), in the order of pictures
            scores = _scores(tables, name, of, asked, self.batch_size)[where].split([len(images), len(captions)])
            if not rank():  # which computes
                self._found[name] = of, [(ids, s.view_as(ids)) for ids, s in zip(lists, scores, strict=True)]

    def compute(self, tables: Tables, name: str) -> Parts:
        """Compute both directions."""
        of, (of_images, of_texts) = self._found.pop(name)
        values = reranked(of.image, of.text, of.pairs, *of_images, ks=self.ks)
        backward = reranked(of.text, of.image, of.pairs.flip(1), *of_texts, ks=self.ks)
        both = {"i2t": values, "t2i": backward}
        yield {f"reranked_{way}_{key}": value for way, v in both.items() for key, value in v.items()}, tables.tokens


def _pairs(listed: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K) candidates as pairs of a query and a candidate, (Q * K,) each."""
    queries = torch.arange(len(listed), device=listed.device).unsqueeze(1).expand_as(listed)
    return queries.flatten(), listed.flatten()


def _captioned(tables: Tables, name: str, texts: list[str], pairs: Tensor) -> Captioned:
    query, text = tables.pictures(name), tables.texts(texts)
    _, rows = tables.data.evaluated(name)
    index, pairs = query.index, pairs.to(query.index.device)
    row = rows.to(index.device)[pairs[:, 0]]
    place = torch.searchsorted(index, row).clamp(max=len(index) - 1)
    read = index[place] == row  # others could not be read, or were not asked for
    kept, image = place[read].unique(return_inverse=True)
    captions, caption = pairs[read, 1].unique(return_inverse=True)
    left = [texts[i] for i in captions.tolist()]
    return Captioned(index[kept], query.image[kept], text[captions], left, torch.stack([image, caption], 1))


def _scores(tables: Tables, name: str, of: Captioned, asked: Tensor, batch_size: int) -> Tensor:
    """The match scores of pairs of a picture and a caption (P, 2), which are in the order of pictures: (P,) float32."""
    module, tokenizer, device = tables.encoder.module, tables.encoder.tokenizer, asked.device
    assert tokenizer is not None
    encoder: Any = module.to(device)
    ids = torch.cat([tokenizer(of.texts[i : i + 1024]) for i in range(0, len(of.texts), 1024)]).to(device)
    source, _ = tables.data.evaluated(name)
    dtype, rows = next(encoder.parameters()).dtype, of.row.cpu()
    pictures = EvalDataset(source, rows, tables.encoder.transform, torch.zeros(len(source), 0), None)
    scores = torch.full((len(asked),), -torch.inf, device=device)
    for batch in tables.data.in_order(pictures):
        batch["image"] = batch["image"].to(device)
        tokens = encoder.encode_tokens(tables.data.on_after_batch_transfer(batch, 0)["image"].to(dtype))
        index = batch["index"].to(device)  # negative where the picture cannot be read any more
        numbers, order = torch.where(index < 0, -1, torch.searchsorted(of.row, index)).sort()  # rows of `of`
        mine = torch.isin(asked[:, 0], numbers).nonzero()[:, 0]
        picture = order[torch.searchsorted(numbers, asked[mine, 0])]
        # A sharded encoder is called as often on every process, if with the first pair once more.
        for start in range(0, int(all_reduce(torch.tensor(len(mine), device=device), "max")), batch_size):
            part = slice(start, start + batch_size)
            pairs = (tokens[picture[part]], ids[asked[mine[part], 1]]) if start < len(mine) else (tokens[:1], ids[:1])
            logits = encoder.match(*pairs).float()
            if start < len(mine):
                scores[mine[part]] = logits[:, 1] - logits[:, 0]
    return all_reduce(scores, "max")
