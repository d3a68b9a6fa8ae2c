"""From encoded visible patches to others: MAE's decoder to their pixels, I-JEPA's predictor to features of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from repr.losses.reconstruction import normalize_patches
from repr.models.masking import take

_NORM: Any = partial(nn.LayerNorm, eps=1e-6)


def sincos_positions(dim: int, grid: tuple[int, int], *, num_prefix_tokens: int = 0) -> Tensor:
    """Fixed positions of patches: (P + L, dim) float64, row-major, zero for the P tokens before the patches.

    The first half of the channels tells the column, the second the row; each half holds the sines of the position times
    10000^(-k / (dim / 4)), k = 0, 1, ..., then their cosines (He et al., 2021, arXiv 2111.06377, and their code).
    ``grid`` counts rows and columns of patches.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def table(num: int) -> Tensor:
        angles = torch.arange(num, dtype=torch.float64)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (num, dim / 2)

    rows, columns = grid
    down, across = table(rows), table(columns)
    both = torch.cat([across.expand(rows, -1, -1), down[:, None].expand(-1, columns, -1)], dim=2).flatten(0, 1)
    return torch.cat([both.new_zeros(num_prefix_tokens, dim), both])


def fix_positions(vit: Any) -> None:
    """Replace a timm ViT's positions by fixed sines and cosines; they stay in the state dict under timm's name."""
    _, num_tokens, dim = vit.pos_embed.shape
    prefix = num_tokens - vit.patch_embed.num_patches
    table = sincos_positions(dim, vit.patch_embed.grid_size, num_prefix_tokens=prefix)
    with torch.no_grad():
        vit.pos_embed.copy_(table[None])
    vit.pos_embed.requires_grad_(False)


class _Block(Block):
    """timm's, which may give the tokens from the ``first`` on alone: the MLP, most of the work, skips the others."""

    def forward(self, x: Tensor, first: int = 0) -> Tensor:  # type: ignore[override]
        x = (x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))))[:, first:]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Decoder(nn.Module):
    """Blanks for the removed patches, positions, transformer blocks, pixels (He et al., 2021, arXiv 2111.06377).

    I-JEPA predicts features of patches in the place of pixels (:meth:`forward_from`): ``patch_dim`` is their width.

    Linear layers start Xavier-uniform, biases at 0, the mask token with deviation 0.02, as in the authors' code.

    Args:
        width: of the encoder's tokens.
        grid: rows and columns of patches.
        patch_dim: values a patch, patch_size^2 * channels.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: heads of each block.
        mlp_ratio: hidden width of each block's MLP over ``dim``.
        normalize_target: whether each patch is brought to mean 0 and variance 1 before it is predicted.
        num_prefix_tokens: class token and registers, which pass the decoder with the patches.
        num_views: of a sample, which pass it together, each with a learned role (:meth:`forward_views`); 1: no roles.

    Raises:
        ValueError: ``dim`` is not a multiple of 4 and of ``num_heads``.
    """

    positions: Tensor  # (P + L, dim)

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        patch_dim: int,
        *,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        normalize_target: bool = True,
        num_prefix_tokens: int = 1,
        num_views: int = 1,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(f"decoder.dim={dim}; set it to a multiple of 4 and of decoder.num_heads={num_heads}")
        self.num_prefix_tokens, self.normalize_target = num_prefix_tokens, normalize_target
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, grid, num_prefix_tokens=num_prefix_tokens).float()
        self.register_buffer("positions", positions, persistent=False)  # a function of the widths
        layers = (_Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=_NORM) for _ in range(depth))
        self.blocks = nn.Sequential(*layers)
        self.norm = _NORM(dim)
        self.predict = nn.Linear(dim, patch_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        self.roles = nn.Parameter(0.02 * torch.randn(num_views, 1, dim)) if num_views > 1 else None
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, ids_restore: Tensor, ids_predict: Tensor | None = None) -> Tensor:
        """Predict the R patches ``ids_predict`` (B, R), or all L of them: (B, R, patch_dim).

        ``tokens`` (B, P + K, width) come from :func:`repr.models.masking.encode_kept`, ``ids_restore`` (B, L) from the
        mask.
        """
        patches = self.norm(self.blocks(self._filled(tokens, ids_restore)))[:, self.num_prefix_tokens :]
        return self.predict(patches if ids_predict is None else take(patches, ids_predict))

    def forward_views(self, tokens: Tensor, ids_restore: Tensor, ids_predict: Tensor) -> Tensor:
        """Predict the same patches of V views of each sample, which see each other: (B, V, R, patch_dim).

        ``tokens`` (B, V, P + K, width); all views have the mask of ``ids_restore`` (B, L), and ``ids_predict`` (B, R).
        """
        num = tokens.shape[1]
        x = self._filled(tokens.flatten(0, 1), ids_restore.repeat_interleave(num, 0)).unflatten(0, (-1, num))
        x = x if self.roles is None else x + self.roles
        x = self.norm(self.blocks(x.flatten(1, 2))).unflatten(1, (num, -1))[:, :, self.num_prefix_tokens :]
        return self.predict(take(x.flatten(0, 1), ids_predict.repeat_interleave(num, 0))).unflatten(0, (-1, num))

    def _filled(self, tokens: Tensor, ids_restore: Tensor) -> Tensor:
        """All tokens (B, P + L, dim) in their order and with positions, blanks for the removed ones."""
        x = self.embed(tokens)
        num_blanks = len(self.positions) - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), num_blanks, -1)], dim=1)
        return take(x, ids_restore, num_prefix_tokens=self.num_prefix_tokens) + self.positions

    def forward_from(self, tokens: Tensor, ids_keep: Tensor, ids_predict: Tensor) -> Tensor:
        """Predict the R patches ``ids_predict`` (B, R) from K others alone: (B, R, patch_dim).

        There are no blanks for the rest. ``tokens`` (B, K, width) are those at ``ids_keep`` (B, K), without class token
        and registers.
        """
        positions = self.positions[self.num_prefix_tokens :]
        blanks = self.mask_token + positions[ids_predict]
        x = torch.cat([self.embed(tokens) + positions[ids_keep], blanks], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.predict(self.norm(last(x, first=ids_keep.shape[1])))

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder is to predict for patches (B, R, patch_dim), of the same shape."""
        return normalize_patches(patches) if self.normalize_target else patches

    def pixels(self, pred: Tensor, patches: Tensor) -> Tensor:
        """Predicted patches (B, L, patch_dim) as pixels, with the true mean and variance if none were predicted."""
        if not self.normalize_target:
            return pred
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return pred * (variance + 1e-6).sqrt() + mean
