"""Contrast of pictures and captions beside the prediction of the captions, word by word: CoCa; and CapPa."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings, StepOutput
from repr.drawing import Show, enlarge, grid
from repr.losses.captioning import caption, log_likelihood
from repr.losses.chance import at_chance
from repr.losses.contrastive import clip
from repr.losses.exchange import exchange_of
from repr.losses.precision import precision_of
from repr.models.backbone import every_token
from repr.models.captioner import CaptionDecoder, Head, Pooler, Pooling, as_tokens, reader
from repr.models.generation import beam_search
from repr.models.unreached import freeze_unreached
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.masked_pictures import write
from repr.objectives.negatives import compared_keys, told_keys
from repr.objectives.towers import TwoTowers, captions, text_faults
from repr.optim import Optim
from repr.seeds import uniform

NO_WORD = -1  # the target of a place that is not predicted


class Captioner(TwoTowers):
    """Two towers on one sphere, and a decoder that says the caption of a picture.

    Methods: CoCa (Yu et al., 2022, arXiv 2205.01917); without ``contrast`` CapPa (Tschannen et al., 2023, arXiv
    2306.07915), which has ``parallel_fraction`` 0.75 and no pooler. With the loss of SigLIP the contrast is that of
    SigLIP 2 (Tschannen et al., 2025, arXiv 2502.14786).

    Flow: ``views[0] -> backbone -> pooler``: an embedding -> ``image_projection``, and tokens; ``text -> text tower``:
    the embedding of a class token that comes last, and one of each word, which sees those before it. The tokens and the
    words -> decoder -> ``head``: the word that follows. One view, so BatchNorm sees one batch of it. The contrast
    exchanges rows; the mean of the caption loss is over the words of all processes, which reduce two numbers.

    Terms: ``contrast``, ``caption``. Padding ends a text; its id within a text is a word (of CLIP's "!").

    Args:
        backbone: a timm model. Without pooler the embedding is what it pools, and the tokens are its patches or cells.
        text: open_clip's ``TextTransformer`` with ``output_tokens``, and with ``embed_cls`` where there is a contrast;
            ``correct_cls_mask`` lets the class token see the words and itself, and no padding.
        decoder_layers: pairs of self- and cross-attention of the decoder; None: as many as ``text`` has layers.
        pooler: ``cascade``, ``parallel``, ``shared`` (:class:`repr.models.captioner.Pooler`); None: there is none.
        num_queries: of the pooler.
        pooler_heads: heads of the pooler.
        parallel_fraction: share of the captions, drawn from their ``seed``, whose words are predicted all at once.
        weights: weight of each term; 1 of the contrast and 2 of the caption by default, as in the paper.
        losses: function of each term where it is not the default; ``contrast`` as for
            :class:`repr.objectives.image_text.ImageText`, like all that concerns the temperature; ``caption`` is called
            as :func:`repr.losses.captioning.caption` with ``pad_id``.
    """

    TERMS = ("contrast", "caption")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "pooler", "text", "words", "decoder")
    EMBEDDINGS: tuple[str, ...] = ("image", "trunk", "text")

    def __init__(
        self,
        backbone: nn.Module,
        text: nn.Module,
        *,
        decoder_layers: int | None = None,
        pooler: Pooling | None = "cascade",
        num_queries: int = 256,
        pooler_heads: int = 8,
        parallel_fraction: float = 0.0,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        logit_bias: float | None = None,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        false_negatives: str = "keep",
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        optim: Optim | None = None,
    ) -> None:
        weights = {"contrast": 1.0, "caption": 2.0} if weights is None else weights
        super().__init__(backbone, weights=weights, optim=optim)
        if "caption" not in self.weights:
            raise ValueError("weights.caption=0 leaves the decoder untrained: set it above 0, or take objective=clip")
        if not 0 <= parallel_fraction <= 1:
            raise ValueError(f"parallel_fraction={parallel_fraction}; set it between 0 and 1")
        contrasts, precision = "contrast" in self.weights, precision_of(loss_precision)
        tower = reader(text, embeds=contrasts)
        if pooler is not None and not contrasts:
            raise ValueError("weights.contrast=0 leaves the embedding of the pooler untrained: set pooler=null")
        passing = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        defaults: Losses = {"contrast": clip, "caption": partial(caption, precision=precision)}
        self.losses = chosen(
            defaults, losses, pairwise=self.PAIRWISE, chunk_size=chunk_size, exchange=passing, precision=precision
        )
        self.compared = compared_keys(false_negatives, self.losses, self.weights)
        self.parallel_fraction = parallel_fraction
        self._add_image_side(tower.width, pooler, num_queries, pooler_heads)
        # Without a contrast no tower embeds texts: what reads words is then no `text`.
        self.text = tower if contrasts else None
        self.words: Any = None if contrasts else tower
        self.EMBEDDINGS = self.EMBEDDINGS if contrasts else ("image", "trunk")
        self.logit_bias = None
        if contrasts:
            width = None if pooler is None else tower.width
            self.add_text_tower(tower, temperature, temperature_range, learned=learn_temperature, width=width)
            self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        layers = len(tower.transformer.resblocks) if decoder_layers is None else decoder_layers
        if layers < 1:
            raise ValueError(f"decoder_layers={layers}; set it to 1 or more")
        self.decoder = CaptionDecoder(
            tower.width,
            layers,
            tower.heads,
            tower.context_length,
            act_layer=type(tower.transformer.resblocks[0].mlp.gelu),
            parallel=parallel_fraction > 0,
        )
        self.head = Head(tower.width, tower.vocab_size)

    def _add_image_side(self, dim: int, pooler: Pooling | None, num_queries: int, num_heads: int) -> None:
        if not hasattr(self.backbone, "forward_features"):
            name = type(self.backbone).__name__
            raise ValueError(f"backbone {name} gives no tokens: set backbone.name to a timm ViT, ConvNeXt or ResNet")
        channels: int = cast(Any, self.backbone).num_features
        if pooler is not None or "contrast" not in self.weights:
            freeze_unreached(self.backbone, type(self).__name__, every_token)
        if pooler is None:
            self.pooler = None
            self.image_map: nn.Module = nn.Identity() if channels == dim else nn.Linear(channels, dim)
        else:
            self.pooler = Pooler(channels, dim, kind=pooler, num_queries=num_queries, num_heads=num_heads)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions, and words that the tower does not know."""
        yield from text_faults(type(self).__name__, self._reader, cfg)
        yield from super().config_faults(cfg)

    @property
    def _reader(self) -> Any:
        """What reads words, with an embedding of texts or without."""
        return self.words if self.text is None else self.text

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding of texts (B, D), which means nothing without contrast, and of their words (B, L, W)."""
        return self._reader(tokens)

    def see(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of pictures: what the backbone pools (B, T), the embedding before its projection, tokens (B, Q, W)."""
        vit: Any = self.backbone
        features = vit.forward_features(images)
        trunk, tokens = vit.forward_head(features), as_tokens(features, vit.num_features)
        if self.pooler is not None:
            return trunk, *self.pooler(tokens)
        return trunk, trunk, self.image_map(tokens[:, getattr(vit, "num_prefix_tokens", 0) :])

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled if self.text is None else self.image_projection(pooled)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised; without contrast what the backbone pools."""
        return self._project(self.see(images)[1])

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return self.read(tokens)[0]

    def embed(self, batch: Batch) -> Embeddings:
        """``trunk`` (B, T), ``image`` and, with a contrast and captions, ``text`` (B, D)."""
        trunk, pooled, _ = self.see(batch["image"])
        text = self.encode_text(batch["text"]) if "text" in batch and self.text is not None else None
        return Embeddings(image=self._project(pooled), trunk=trunk, text=text)

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        tokens = captions(batch)
        _, pooled, seen = self.see(batch["views"][0])
        read, words = self.read(tokens)
        hidden = self.decoder(seen, words[:, :-1], self._draw_parallel(batch))  # (B, L - 1, W)
        loss = partial(self.losses["caption"], pad_id=NO_WORD)
        terms = {"caption": self.head.forward_loss(loss, hidden, self.targets(tokens))}
        if self.text is None:
            return StepOutput(terms, {"trunk": pooled.detach()})
        image, text = self.image_projection(pooled).float(), read.float()  # (B, D) each
        logs: dict[str, Tensor | float] = {"temperature": (-self.logit_scale.detach()).exp()}
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        keys = told_keys(batch, self.compared, logs)
        terms["contrast"] = self.losses["contrast"](image, text, logit_scale=self.logit_scale.exp(), **bias, **keys)
        return StepOutput(terms, {"image": image, "text": text}, logs=logs)

    def _draw_parallel(self, batch: Batch) -> Tensor | None:
        if not self.parallel_fraction:
            return None
        if "seed" not in batch:
            raise ValueError(
                'parallel_fraction draws from batch["seed"]: give (B,) int64, other numbers in every epoch'
            )
        return uniform(batch["seed"], 1)[:, 0] < self.parallel_fraction

    def targets(self, tokens: Tensor) -> Tensor:
        """The word that follows each (..., L): (..., L - 1), ``NO_WORD`` where that is padding."""
        follows = tokens[..., 1:]
        left = (follows != self._reader.pad_id).flip(-1).cumsum(-1).flip(-1)  # other words from here on
        return follows.masked_fill(left == 0, NO_WORD)

    def log_likelihood(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The logarithm of the probability of captions (B, P, L) given their picture: (B, P), in nats."""
        *_, seen = self.see(images)
        loss, columns = partial(log_likelihood, pad_id=NO_WORD), []
        for text in tokens.unbind(1):
            hidden = self.decoder(seen, self.read(text)[1][:, :-1])
            columns.append(self.head.forward_loss(loss, hidden, self.targets(text)))
        return torch.stack(columns, 1)

    @torch.no_grad()
    def generate(
        self, images: Tensor, *, start_id: int, end_id: int, max_length: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Captions (B, L) of pictures, and their log-probabilities (B,), by :func:`repr.models.generation.beam_search`.

        Args:
            images: (B, 3, H, W).
            start_id: with which every text of the tokenizer begins, as ``sot_token_id`` of open_clip's.
            end_id: with which it ends, as ``eot_token_id``.
            max_length: words at most, L; None: as many as the tower reads.
            options: ``num_beams``, of which 1 is greedy, and ``min_length``. Of several processes all call it.
        """
        longest, pad_id = self._reader.context_length, self._reader.pad_id
        seen = self.see(images)[2].repeat_interleave(options.get("num_beams", 1), 0)

        def next_words(texts: Tensor) -> Tensor:
            num = texts.shape[1]
            words = self.read(F.pad(texts, (0, longest - num), value=pad_id))[1]  # a tower may read whole texts alone
            return self.head(self.decoder(seen, words[:, :num])[:, -1]).log_softmax(1)

        ids = {"start_id": start_id, "end_id": end_id, "pad_id": pad_id}
        length = min(max_length or longest, longest)
        return beam_search(next_words, len(images), max_length=length, device=images.device, **ids, **options)

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``captions``: pictures, their captions, and those that the decoder says, if the tokenizer has ``decode``."""
        decode = getattr(getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None), "decode", None)
        if decode is None:
            return {}
        images, texts = batch["views"][0], captions(batch)
        ends = (self.targets(texts) != NO_WORD).sum(1)  # the place of each
        start, end = int(texts[0, 0]), int(texts[0, ends[0]])
        said, _ = self.generate(images, start_id=start, end_id=end)
        cells = [[write("image"), *map(enlarge, show(images))]]
        for name, some in (("caption", texts), ("says", said)):
            words = (decode([*takewhile(lambda word: word != end, row[1:])]).strip() for row in some.tolist())
            cells.append([write(name), *map(write, words)])
        return {"captions": grid(cells)}

    def update_targets(self) -> None:
        """Clamp the temperature, where there is a contrast."""
        if self.text is not None:
            super().update_targets()

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of the contrast as for :class:`repr.objectives.image_text.ImageText`; ln V for V words."""
        bias: Any = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        levels = {"contrast": at_chance(self.losses["contrast"], num_rows=num_rows, **bias)}
        return levels | {"caption": math.log(self._reader.vocab_size)}
