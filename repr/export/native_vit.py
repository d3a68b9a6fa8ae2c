"""A timm ViT under the names of open_clip's own.

open_clip builds a timm tower by its name alone. A ViT of another image size, depth, width or pooling than its name says
is the same function as an open_clip ``VisionTransformer`` with the tensors renamed.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_BLOCK = {  # of a block: timm's name -> open_clip's
    "norm1": "ln_1",
    "attn.proj": "attn.out_proj",
    "ls1": "ls_1",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "ls2": "ls_2",
}


def vision_cfg(vit: nn.Module, image_size: int, *, pooler: Any = None) -> dict[str, Any] | None:
    """What open_clip must be told to build the same ViT, or None where it has no such ViT.

    Whether it is the same function is for the caller to find out; activations are not looked at. A ``pooler`` (the
    shared one of :class:`repr.models.captioner.Pooler`) norms what it gives, and the ViT before it nothing.
    """
    if not isinstance(vit, VisionTransformer) or not vit.has_class_token or vit.num_reg_tokens or vit.attn_pool:
        return None
    block: Any = vit.blocks[0]
    last: Any = vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm
    pool = {"token": "tok", "avg": "avg"}.get(vit.global_pool)
    if pooler is not None:
        last, pool = block.norm1 if isinstance(last, nn.Identity) else None, "tok"
    if pool is None or not isinstance(last, nn.LayerNorm) or not hasattr(block.mlp, "fc1"):
        return None
    config = {
        "image_size": image_size,
        "patch_size": vit.patch_embed.patch_size[0],
        "width": vit.embed_dim,
        "layers": len(vit.blocks),
        "head_width": vit.embed_dim // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "no_ln_pre": isinstance(vit.norm_pre, nn.Identity),
        "pool_type": pool,
        "final_ln_after_pool": last is vit.fc_norm,
        "norm_kwargs": {"eps": last.eps},
    }
    if pooler is not None:
        queries, heads = len(pooler.attn_pool.query), pooler.attn_pool.attn.num_heads
        config |= {"attentional_pool": True, "attn_pooler_queries": queries, "attn_pooler_heads": heads}
    if hasattr(block.ls1, "gamma"):
        config["ls_init_value"] = 1.0  # of an untrained model
    return config


def visual_tensors(vit: Any, projection: Tensor | None, pooler: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors of a ViT, and its pooler, for which :func:`vision_cfg` has an answer, under open_clip's names.

    ``projection`` (D, width) leads from the pooled features to the embedding; None: open_clip's is the identity.
    """
    width, own, num_patches = vit.embed_dim, vit.state_dict(), vit.patch_embed.num_patches
    table = own["pos_embed"][0] if "pos_embed" in own else own["cls_token"].new_zeros(num_patches, width)
    if len(table) == num_patches:  # the class token has no place of its own
        table = torch.cat([torch.zeros_like(table[:1]), table])
    table = table.clone()
    if "patch_embed.proj.bias" in own:  # open_clip has none there; added to every patch, as the table is
        table[1:] += own["patch_embed.proj.bias"]
    tensors = {
        "class_embedding": own["cls_token"].flatten(),
        "positional_embedding": table,
        "conv1.weight": own["patch_embed.proj.weight"],
        "proj": torch.eye(width) if projection is None else projection.T,
    }
    norms = {"norm_pre": "ln_pre", "norm": "ln_post", "fc_norm": "ln_post"}
    for name, tensor in own.items():
        first, _, rest = name.partition(".")
        if first in norms:
            tensors[f"{norms[first]}.{rest}"] = tensor
        elif first == "blocks":
            index, _, rest = rest.partition(".")
            module, _, leaf = rest.rpartition(".")
            renamed = f"attn.in_proj_{leaf}" if module == "attn.qkv" else f"{_BLOCK.get(module, module)}.{leaf}"
            tensors[f"transformer.resblocks.{index}.{renamed}"] = tensor
    for index in range(len(vit.blocks)):
        tensors.setdefault(f"transformer.resblocks.{index}.attn.in_proj_bias", torch.zeros(3 * width))
    for name, tensor in ({} if pooler is None else pooler.state_dict()).items():
        tensors[f"ln_post.{name[5:]}" if name.startswith("norm.") else name] = tensor
    return tensors
