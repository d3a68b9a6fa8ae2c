"""Towers that are aligned first and fused then: ALBEF."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings, StepOutput
from repr.distributed import all_reduce, gather, means
from repr.losses.captioning import masked_language
from repr.losses.contrastive import clip
from repr.losses.distillation import soft_contrast
from repr.losses.exchange import exchange_of
from repr.losses.features import normalise
from repr.losses.precision import precision_of
from repr.models.backbone import every_token
from repr.models.embedding_queue import Queue, length_fault
from repr.models.fusion import FusionEncoder, TextReader, WordHead, hide_words, image_tokens
from repr.models.teacher import Teacher
from repr.models.unreached import freeze_unreached
from repr.objectives.negatives import draw_negatives, negative_logits, sample_keys
from repr.objectives.towers import TwoTowers, captions, text_faults
from repr.optim import Optim

NEGATIVE_STREAM = 80  # of the batch's seed: the caption of a picture; the next one, the picture of a caption


class Seen(NamedTuple):
    """What towers make of B pictures and captions."""

    tokens: Tensor  # (B, P, C) of pictures
    words: Tensor  # (B, L, W) of captions
    image: Tensor  # (B, D) float32, not normalised
    text: Tensor  # (B, D) likewise


class Fusion(TwoTowers):
    """Pictures and captions are aligned by a contrast, then their tokens are fused to tell whether they match.

    Method: ALBEF (Li et al., 2021, arXiv 2107.07651).

    Flow: ``views[0] -> backbone``: tokens, and what it pools -> ``image_projection``; text -> text tower: tokens and
    embedding; a teacher's towers give the keys of the contrast. Tokens of both go through the fusion encoder three
    times: with each other, captions with the picture of another caption, and pictures with the caption of another
    picture; its first token tells which match. Captions with hidden words go through the text tower and, with their
    own picture, the fusion encoder, and the hidden words are named by the vectors of the vocabulary.

    The wrong pictures and captions are drawn from the global batch, as often as the contrast takes them for right ones,
    by ``seed``; where two samples have picture or caption in common, neither is the other's. Gathered: embeddings and
    keys. Of the tokens those that were drawn travel, and their gradients. The losses are those of the global batch.

    Terms: ``contrast``; ``matching``; ``masked_language``. Logs: ``temperature``; ``alpha``; ``match_accuracy``.

    Args:
        backbone: a timm model.
        text: such as :class:`repr.models.fusion.TextReader`, ``text(ids) -> (B, output_dim), (B, L, width)``.
        num_layers: of the fusion encoder, which is as wide as the text tower.
        temperature: initial temperature, a parameter; the logits are cosines divided by it.
        temperature_range: bounds to which it is clamped after every step.
        alpha: share of the teacher in the targets of ``contrast`` and ``masked_language``. With 0 and without queue
            there is no teacher: the contrast is CLIP's.
        alpha_steps: optimizer steps in which that share rises from 0; an epoch in the paper.
        momentum: of the teacher.
        queue_length: keys of earlier batches with which the contrast compares too, of all ranks together; a multiple of
            the global batch, 0: none.
        hard_negatives: whether wrong pairs are drawn by their likeness; else all others are as likely.
        mask_share: share of the words of a caption that are hidden; at least one is.
        weights: weight of each term; all 1 by default, as in the paper.
    """

    TERMS = ("contrast", "matching", "masked_language")
    PAIRWISE = ("contrast", "matching")
    ENCODERS = ("backbone", "text", "fusion")
    EMBEDDINGS = ("image", "trunk", "text")
    MEANINGS: ClassVar[dict[str, str]] = TwoTowers.MEANINGS | {
        "contrast": "Cross-entropy of finding what the teacher makes of the other half of a pair; lower is better.",
        "matching": "Cross-entropy of telling pairs from pictures with another caption; lower is better.",
        "masked_language": "Cross-entropy of naming hidden words of a caption; lower is better.",
        "alpha": "Share of the teacher in the targets.",
        "match_accuracy": "Share of pairs, of which a third is right, that are told right; higher is better.",
    }
    text: TextReader

    def __init__(
        self,
        backbone: nn.Module,
        text: TextReader,
        *,
        num_layers: int = 6,
        temperature: float = 0.07,
        temperature_range: tuple[float, float] = (0.001, 0.5),
        alpha: float = 0.4,
        alpha_steps: int = 0,
        momentum: float = 0.995,
        queue_length: int = 65536,
        hard_negatives: bool = True,
        mask_share: float = 0.15,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=dict.fromkeys(self.TERMS, 1.0) if weights is None else weights, optim=optim)
        for name, share in (("alpha", alpha), ("mask_share", mask_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}; set it from 0 to 1")
        if mask_share == 0:
            raise ValueError("mask_share=0 hides no word: set it above 0, or weights.masked_language to 0")
        if not isinstance(text, TextReader):
            raise ValueError(
                f"{type(self).__name__} needs the tokens of captions: set text=reader_small or reader_base"
            )
        if not hasattr(backbone, "forward_head"):
            raise ValueError(f"backbone {type(backbone).__name__} gives no tokens: set backbone.name to one of timm's")
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}; set it to 1 or more")
        has_contrast = "contrast" in self.weights
        self.exchange = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        self.how: dict[str, Any] = {"chunk_size": chunk_size, "precision": precision_of(loss_precision)}
        self.alpha, self.alpha_steps = alpha, alpha_steps
        self.hard_negatives, self.mask_share = hard_negatives, mask_share
        self.add_text_tower(text, temperature, temperature_range, learned=has_contrast)
        if not has_contrast:  # nothing is learned of what is pooled
            freeze_unreached(backbone, type(self).__name__, every_token)
            self.image_projection.requires_grad_(False)
            text.text_projection.requires_grad_(False)
        self.queue_length = queue_length if has_contrast else 0
        self.queue = Queue(2, queue_length, text.output_dim) if self.queue_length else None
        self.num_kept = 0  # keys of earlier batches that the last step has compared with
        followed: dict[str, nn.Module] = {"backbone": backbone, "text": text, "image_projection": self.image_projection}
        if self.weights.keys() & {"matching", "masked_language"}:
            widths: Any = text.width, backbone.num_features
            self.fusion = FusionEncoder(*widths, num_heads=text.heads, num_layers=num_layers)
        if "matching" in self.weights:
            self.match_head = nn.Linear(text.width, 2)
        if "masked_language" in self.weights:
            self.word_head = WordHead(text.width, text.vocab_size)
            followed |= {"fusion": self.fusion, "word_head": self.word_head}
        if self.queue_length or (alpha and self.weights.keys() & {"contrast", "masked_language"}):
            self.teacher = Teacher(
                momentum=momentum, final_momentum=None, schedule="cosine", before_step=True, **followed
            )

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions, words that have no vector or no place, and a queue that batches do not fill."""
        text = self.text
        yield from text_faults(type(self).__name__, text, cfg, num_more=1)  # one that hides others
        if "masked_language" in self.weights and text.context_length < 3:
            yield f"text.context_length={text.context_length} has no place for a word to hide: set it to 3 or more"
        if self.queue_length % cfg.data.batch_size:
            yield f"objective.{length_fault(self.queue_length, cfg.data.batch_size)}"
        yield from super().config_faults(cfg)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return self.text(tokens)[0]

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch: ``trunk`` (B, T), ``image`` and, with captions, ``text`` (B, D)."""
        trunk = self.backbone(batch["image"])
        text = self.encode_text(batch["text"]) if "text" in batch else None
        return Embeddings(image=self.image_projection(trunk), trunk=trunk, text=text)

    def encode_tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, C), what :meth:`match` takes of pictures."""
        return image_tokens(self.backbone, images)[0]

    def match(self, pictures: Tensor, ids: Tensor) -> Tensor:
        """Tokens of pictures (B, P, C) and captions (B, L) -> logits (B, 2) of no match and of a match."""
        return self._match(self.text(ids)[1], ids, pictures)

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        ids, alpha = captions(batch), self.alpha_at(self.step_number)
        if "seed" not in batch and self.weights.keys() - {"contrast"}:
            raise ValueError('draws are made from batch["seed"]: give (B,) int64, other numbers in every epoch')
        seen = keys = self._see(self, batch["views"][0], ids)
        if self.teacher is not None:
            with torch.no_grad():
                keys = self._see(self.teacher, batch["views"][0], ids)
        logs: dict[str, Tensor | float] = {"temperature": self.temperature.detach()}
        logs |= {"alpha": alpha} if self.alpha else {}
        terms: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "contrast":
                terms[name] = self._contrast(seen, keys, alpha)
            elif name == "matching":
                terms[name], logs["match_accuracy"] = self._matching(batch, seen, keys)
            else:
                terms[name] = self._masked_language(batch, seen, keys, alpha)
        self.num_kept = 0 if self.queue is None else len(self.queue.filled()[0])
        if self.queue is not None and self.training:
            self.queue.push(torch.stack([normalise(keys.image), normalise(keys.text)], 1))
        return StepOutput(terms, {"image": seen.image, "text": seen.text}, logs=logs)

    def _see(self, towers: Any, images: Tensor, ids: Tensor) -> Seen:
        tokens, pooled = image_tokens(towers.backbone, images)
        text, words = towers.text(ids)
        return Seen(tokens, words, towers.image_projection(pooled).float(), text.float())

    @property
    def temperature(self) -> Tensor:
        """By which the cosines of the contrast are divided."""
        return (-self.logit_scale).exp()

    def alpha_at(self, step: int) -> float:
        """The share of the teacher in the targets at an optimizer step."""
        return self.alpha if step >= self.alpha_steps else self.alpha * step / self.alpha_steps

    def _contrast(self, seen: Seen, keys: Seen, alpha: float) -> Tensor:
        if self.teacher is None:
            return clip(seen.image, seen.text, logit_scale=self.logit_scale.exp(), exchange=self.exchange, **self.how)
        images, texts = (None, None) if self.queue is None else self.queue.filled()
        how: dict[str, Any] = {**self.how, "temperature": self.temperature, "alpha": alpha, "exchange": self.exchange}
        of_images = soft_contrast(seen.image, keys.text, keys.image, queue=texts, **how)
        return (of_images + soft_contrast(seen.text, keys.image, keys.text, queue=images, **how)) / 2

    def _matching(self, batch: Batch, seen: Seen, keys: Seen) -> tuple[Tensor, Tensor]:
        """The loss of pairs, of captions with wrong pictures and of pictures with wrong captions; and the accuracy."""
        ids = batch["text"]
        own = sample_keys(batch)
        same = (own.unsqueeze(1) == gather(own)).any(2)  # (B, N)
        rows: list[Tensor] = []
        for stream, (query, key) in enumerate(((seen.image, keys.text), (seen.text, keys.image))):
            logits = negative_logits(query, key, temperature=self.temperature)
            logits = logits if self.hard_negatives else torch.zeros_like(logits)
            rows.append(draw_negatives(logits, same, batch["seed"], stream=NEGATIVE_STREAM + stream))
        text_of_image, image_of_text = rows
        words = torch.cat([seen.words, seen.words, self.exchange.take(seen.words, text_of_image)])
        pictures = torch.cat([seen.tokens, self.exchange.take(seen.tokens, image_of_text), seen.tokens])
        ids = torch.cat([ids, ids, gather(ids)[text_of_image]])
        logits = self._match(words, ids, pictures)
        right = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        right[: len(ids) // 3] = 1
        accuracy = (logits.detach().argmax(1) == right).float().mean()
        both = means({"loss": F.cross_entropy(logits, right), "accuracy": accuracy})
        return both["loss"], both["accuracy"].detach()

    def _match(self, words: Tensor, ids: Tensor, pictures: Tensor) -> Tensor:
        return self.match_head(self.fusion(words, ids != self.text.pad_id, pictures)[:, 0]).float()

    def _masked_language(self, batch: Batch, seen: Seen, keys: Seen, alpha: float) -> Tensor:
        ids, text = batch["text"], self.text
        options = {"share": self.mask_share, "pad_id": text.pad_id, "eos_id": text.eos_id}
        read, hidden = hide_words(ids, batch["seed"], mask_id=text.vocab_size - 1, **options)
        rows = hidden.flatten().nonzero()[:, 0]  # (M,)

        def named(towers: Any, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Features of the hidden words, vectors and biases of the vocabulary."""
            words = towers.fusion(towers.text(read)[1], ids != text.pad_id, pictures)
            features, bias = towers.word_head(words.flatten(0, 1)[rows])
            return features, towers.text.forward_vocabulary().T, bias

        teacher = None
        if self.teacher is not None and self.alpha:
            with torch.no_grad():
                teacher = named(self.teacher, keys.tokens)
        features, head, bias = named(self, seen.tokens)
        how: dict[str, Any] = {**self.how, "all_reduce": all_reduce}
        return masked_language(features, head, ids.flatten()[rows], bias=bias, teacher=teacher, alpha=alpha, **how)

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of matching, of a head that knows that one pair in three matches."""
        prior = math.log(3) - 2 / 3 * math.log(2)
        contrast = math.log(num_rows + self.num_kept)
        return {"contrast": contrast, "matching": prior, "masked_language": math.log(self.text.vocab_size)}
