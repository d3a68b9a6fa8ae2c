"""Text towers that read in both directions, what fuses their tokens with those of pictures, and hidden words."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repr.seeds import uniform

WORD_STREAM = 64  # of the batch's seed; the next two draw what stands in the place of a hidden word


class TextReader(TextTransformer):
    """open_clip's text tower, where each token sees all but padding, and the first stands for the text.

    It is called as ``text(ids) -> (B, output_dim), (B, L, width)``. The last id of the vocabulary is that of the mask,
    so ``vocab_size`` is one above the tokenizer's.

    Args:
        heads: of the attention; None: one for every 64 channels.
        eos_id: the last token of a text, which is never hidden; by default that of CLIP's tokenizer.
        options: further arguments of ``TextTransformer``.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        layers: int,
        output_dim: int,
        heads: int | None = None,
        eos_id: int = 49407,
        **options: Any,
    ) -> None:
        heads = heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"text.width={width} is no multiple of text.heads={heads}: set one of them to fit")
        super().__init__(
            context_length,
            vocab_size,
            width,
            heads,
            layers,
            output_dim=output_dim,
            eos_id=eos_id,
            no_causal_mask=True,
            use_pad_mask=True,
            pool_type="first",
            output_tokens=True,
            **options,
        )

    def forward_vocabulary(self) -> Tensor:
        """The vectors of all words, (V, width), with gradient; a copy, since FSDP2 frees its parameters."""
        return self.token_embedding.weight.clone()


class FusionEncoder(nn.Module):
    """Tokens of texts that look at tokens of pictures.

    A layer is a block of open_clip's in which each token sees its text, then one in which it sees the picture; norms
    come first, and one at the end. Initial weights are as in CLIP's text tower.

    Args:
        width: of the tokens of texts.
        image_width: of those of pictures; where it is another one, a linear layer comes first.
        num_heads: of the attention.
        num_layers: how many, of two blocks each.
    """

    def __init__(self, width: int, image_width: int, *, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.num_heads, self.grad_checkpointing = num_heads, False
        self.project = nn.Identity() if image_width == width else nn.Linear(image_width, width)
        self.read = nn.ModuleList(ResidualAttentionBlock(width, num_heads) for _ in range(num_layers))
        self.look = nn.ModuleList(
            ResidualAttentionBlock(width, num_heads, is_cross_attention=True) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        for block in (*self.read, *self.look):
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (4 * num_layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (4 * num_layers) ** -0.5)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let blocks keep their inputs alone."""
        self.grad_checkpointing = enable

    def forward(self, words: Tensor, seen: Tensor, picture: Tensor) -> Tensor:
        """Give the words (B, L, width) that have seen a picture (B, P, image_width); ``seen`` (B, L) are no padding."""
        hidden = torch.zeros_like(seen, dtype=words.dtype).masked_fill(~seen, -torch.inf)  # (B, L)
        hidden = hidden[:, None].expand(-1, seen.shape[1], -1).repeat_interleave(self.num_heads, 0)  # (B * heads, L, L)
        picture = self.project(picture)
        for read, look in zip(self.read, self.look, strict=True):
            words = self._run(read, words, None, None, hidden)
            words = self._run(look, words, picture, picture)
        return self.norm(words)

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class WordHead(nn.Module):
    """What goes with the vectors of the vocabulary: (M, D) -> features (M, D), and a bias of each word (V,)."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Give a copy of the bias, since FSDP2 frees its parameters."""
        return self.transform(hidden), self.bias.clone()


def image_tokens(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a timm ViT, or the cells of another timm model's last map, (B, P, C), and what it pools, (B, D)."""
    features = backbone.forward_features(images)
    if features.ndim == 3:
        tokens = features
    elif getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        tokens = features.flatten(1, 2)
    else:
        tokens = features.flatten(2).mT
    return tokens, backbone.forward_head(features)


def hide_words(
    ids: Tensor, seed: Tensor, *, share: float, pad_id: int, eos_id: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Hide some words of texts: ids (B, L) to what is read instead, and which words are hidden, (B, L) bool.

    Each but the first token, padding and the end is hidden with the probability ``share``, and at least one of a text
    that has any. Of hidden words 80 % become ``mask_id``, 10 % any word and 10 % stay, as in BERT (Devlin et
    al., 2019, arXiv 1810.04805). Draws are functions of ``seed`` (B,) alone.
    """
    words = (ids != pad_id) & (ids != eos_id)
    words[:, 0] = False
    chosen, kind, other = (uniform(seed, ids.shape[1], stream=WORD_STREAM + i) for i in range(3))
    chosen = chosen.masked_fill(~words, 2)
    hidden = words & ((chosen < share) | (chosen == chosen.amin(1, keepdim=True)))
    random = (other * (mask_id - 1)).long()  # any id below that of the mask but padding
    random += random >= pad_id
    read = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, random, ids))
    return torch.where(hidden, read, ids), hidden
