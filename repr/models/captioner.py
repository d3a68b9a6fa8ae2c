"""The parts of a captioner: tokens of a picture, poolers of them, and the half of a text decoder that looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from open_clip.transformer import AttentionalPooler, MultimodalTransformer, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repr.losses.features import widened
from repr.losses.precision import full_precision

Pooling = Literal["cascade", "parallel", "shared"]


def as_tokens(features: Tensor, channels: int) -> Tensor:
    """What a timm model gives before it pools, as tokens (B, N, C): those of a ViT as they are, the cells of a map."""
    if features.ndim == 3:
        return features
    return features.flatten(2).mT if features.shape[1] == channels else features.flatten(1, 2)


def reader(text: Any, *, embeds: bool) -> Any:
    """A text tower whose words a decoder can read, with an embedding of whole texts where it ``embeds`` them.

    Raises:
        ValueError: it is another.
    """
    if not isinstance(text, TextTransformer):
        raise ValueError(f"text is {type(text).__name__}; a captioner reads words by open_clip's TextTransformer")
    if not text.output_tokens or text.attn_mask is None:
        raise ValueError(
            "a decoder reads each word and those before it: set text=coca_small, or text.output_tokens=true and "
            "text.no_causal_mask=false"
        )
    if embeds and text.cls_emb is None:
        raise ValueError("weights.contrast needs an embedding of texts: set text=coca_small, or text.embed_cls=true")
    if not embeds and (text.cls_emb is not None or text.text_projection is not None):
        raise ValueError(
            "weights.contrast=0 leaves the embedding of texts untrained: set text=cappa_small, or text.embed_cls=false "
            "and text.output_dim=null"
        )
    return text


class Pooler(nn.Module):
    """Attention of learned queries to the tokens of a picture: an embedding, and tokens for a decoder.

    Queries and keys are normalised; there is no residual and no MLP (Yu et al., 2022, arXiv 2205.01917, section 3.2).

    Args:
        width: C, of the tokens.
        dim: D, of the embedding and of the decoder's tokens.
        kind: ``cascade``: ``num_queries`` queries give the decoder's tokens, and one more looks at these for the
            embedding, as in the paper; ``parallel``: it looks at the picture; ``shared``: the first of the queries
            gives the embedding and the others the tokens, all normalised, as in open_clip.
        num_queries: Q.
        num_heads: heads of the attention.

    Raises:
        ValueError: there is no such kind, there are too few queries, or the heads do not divide ``dim``.
    """

    def __init__(self, width: int, dim: int, *, kind: Pooling, num_queries: int, num_heads: int) -> None:
        super().__init__()
        if kind not in get_args(Pooling):
            raise ValueError(f"pooler={kind}; set it to cascade, parallel, shared or null")
        if num_queries < (least := 2 if kind == "shared" else 1):
            raise ValueError(f"num_queries={num_queries}; set it to {least} or more, such as 256")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"pooler_heads={num_heads} do not divide text.width={dim}: set another number")
        self.kind = kind
        self.attn_pool = AttentionalPooler(dim, width, num_heads, num_queries)
        if kind == "shared":
            self.norm = nn.LayerNorm(dim)
        else:
            self.attn_pool_contrastive = AttentionalPooler(dim, dim if kind == "cascade" else width, num_heads, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) to the embedding (B, D) and the tokens for the decoder (B, Q, D), or one fewer if shared."""
        pooled = self.attn_pool(tokens)
        if self.kind == "shared":
            pooled = self.norm(pooled)
            return pooled[:, 0], pooled[:, 1:]
        return self.attn_pool_contrastive(pooled if self.kind == "cascade" else tokens)[:, 0], pooled


class CaptionDecoder(MultimodalTransformer):
    """open_clip's blocks of self- and cross-attention, initialised as its text tower, without the head.

    open_clip never initialises these blocks and leaves the head as it is found in memory.

    Args:
        width: of its tokens, those of the picture too.
        num_layers: pairs of a block of self-attention and one of cross-attention.
        num_heads: heads of each.
        context_length: L, words of a caption at most.
        act_layer: activation of the MLPs.
        parallel: whether some captions are predicted all at once (:meth:`forward`).
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        context_length: int,
        *,
        act_layer: type[nn.Module] = nn.GELU,
        parallel: bool = False,
    ) -> None:
        super().__init__(width, num_layers, num_heads, context_length=context_length, act_layer=act_layer, output_dim=1)
        self.text_projection: Any = None
        self.num_heads = num_heads
        self.blanks = nn.Parameter(0.01 * torch.randn(context_length, width)) if parallel else None
        deep = (2 * num_layers) ** -0.5
        for block in (*self.resblocks, *self.cross_attn):
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * deep)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * deep)

    def no_weight_decay(self) -> set[str]:
        """The blanks, which are positions."""
        return {"blanks"}

    def forward(self, image: Tensor, words: Tensor, parallel: Tensor | None = None) -> Tensor:
        """What is made of each word (B, L', D) and those before it, with the tokens of the picture (B, Q, D).

        Rows in which ``parallel`` (B,) is true see a blank with its position in the place of each word, and each blank
        sees all others, so that their words are predicted all at once (Tschannen et al., 2023, arXiv 2306.07915).
        """
        mask = self.attn_mask[: words.shape[1], : words.shape[1]]
        if parallel is not None:
            assert self.blanks is not None
            of_row = parallel[:, None, None]
            words = torch.where(of_row, self.blanks[: words.shape[1]].to(words.dtype), words)
            mask = mask.expand(len(words), -1, -1).masked_fill(of_row, 0).repeat_interleave(self.num_heads, 0)
        run: Callable[..., Tensor] = _checkpointed if self.grad_checkpointing else _plain
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            words = run(block, words, None, None, mask)
            words = run(cross, words, image, image, None)
        return self.ln_final(words)


def _plain(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


def _checkpointed(block: nn.Module, *inputs: Any) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False)


class Head(nn.Module):
    """A matrix from what a decoder makes of a place to the logits of all words.

    Args:
        width: D.
        num_words: V.
    """

    def __init__(self, width: int, num_words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, num_words) * width**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), at least float32."""
        with full_precision(hidden):
            hidden, weight = widened(hidden, self.weight)
            return hidden @ weight

    def forward_loss(self, loss: Callable[..., Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
        """``loss(hidden, matrix, targets)``, of a function of :mod:`repr.losses.captioning`."""
        return loss(hidden, self.weight, targets)
