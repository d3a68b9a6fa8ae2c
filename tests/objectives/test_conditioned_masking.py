"""Voltron: the authors' numbers, with their blocks in the place of timm's; what is seen, and what is refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.losses.reconstruction import masked_mse, normalize_patches, patchify
from repr.models.decoder import Decoder
from repr.models.fusion import TextReader
from repr.models.masking import Masking, encode_conditioned, mask_from_scores, num_kept, take
from repr.objectives.conditioned_masking import ConditionedMasking
from tests.golden import golden

VOLTRON = golden("voltron") | golden("voltron_dual")


def make(text: nn.Module | None = None, **options: Any) -> ConditionedMasking:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1}
    vit = timm.models.VisionTransformer(**size, num_classes=0, global_pool="avg", fc_norm=False)
    text = text or TextReader(context_length=12, vocab_size=49409, width=32, layers=1, output_dim=16)
    return ConditionedMasking(vit, text, decoder=partial(Decoder, dim=16, depth=1, num_heads=2), **options)


class Norm(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5).clamp(min=1e-8) * self.gain


class Block(nn.Module):
    """Theirs, whose mask leaves padding as keys and makes its queries even."""

    def __init__(self, weights: dict[str, Tensor], num_heads: int, seen: Tensor | None = None) -> None:
        super().__init__()
        self.w, self.num_heads, self.seen = weights, num_heads, seen

    def forward(self, x: Tensor, attn_mask: object = None, is_causal: bool = False) -> Tensor:
        w = self.w
        qkv = F.linear(Norm(w["pre_norm_attn.g"])(x), w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.seen is not None:
            blank = torch.cat([self.seen.new_ones(len(x), x.shape[1] - self.seen.shape[1]), self.seen], 1) == 0
            scores = scores.masked_fill(blank[:, None, :, None], 0)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + w["layer_scale_attn.gamma"] * F.linear(heads, w["attn.proj.weight"], w["attn.proj.bias"])
        hidden = F.linear(Norm(w["pre_norm_mlp.g"])(x), w["mlp.0.project.weight"], w["mlp.0.project.bias"])
        value, gate = hidden.chunk(2, -1)
        return x + w["layer_scale_mlp.gamma"] * F.linear(value * F.silu(gate), w["mlp.2.weight"], w["mlp.2.bias"])


def blocks(w: dict[str, Tensor], kind: str, num_heads: int, seen: Tensor | None = None) -> nn.Sequential:
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith(f"{kind}_blocks."))
    parts = (
        {key.split(".", 2)[2]: x for key, x in w.items() if key.startswith(f"{kind}_blocks.{i}.")} for i in range(depth)
    )
    return nn.Sequential(*(Block(part, num_heads, seen) for part in parts))


def linear(w: dict[str, Tensor], name: str) -> nn.Linear:
    layer = nn.Linear(*w[f"{name}.weight"].shape[::-1], dtype=torch.float64)
    layer.weight.data, layer.bias.data = w[f"{name}.weight"], w[f"{name}.bias"]
    return layer


@pytest.mark.parametrize("case", ["vcond_a", "vcond_b_cls", "vdual_a", "vdual_b"])
def test_the_authors_numbers(case: str) -> None:
    file = {key.removeprefix(f"{case}/"): VOLTRON[key] for key in VOLTRON if key.startswith(f"{case}/")}
    official = {key.removeprefix("weight."): x for key, x in file.items() if key.startswith("weight.")}
    w = {key: torch.tensor(x, dtype=torch.float64) for key, x in official.items()}
    images = torch.tensor(file["images"], dtype=torch.float64)
    views = images if images.ndim == 5 else images[:, None]
    num_views, size, patch = views.shape[1], views.shape[-1], w["patch2embed.proj.weight"].shape[-1]
    prefix, seen = int("cls_token" in w), torch.tensor(file["lang_mask"])
    mask = mask_from_scores(torch.tensor(file["noise"]), num_kept(file["noise"].shape[1], float(file["mask_ratio"])))
    assert np.array_equal(mask.removed.numpy(), file["mask"])

    options = {"embed_dim": 16, "num_heads": 2, "depth": 1, "global_pool": "avg", "fc_norm": False}
    vit = timm.models.VisionTransformer(size, patch, num_classes=0, class_token=bool(prefix), **options).double()
    vit.patch_embed.proj.weight.data = w["patch2embed.proj.weight"]
    vit.patch_embed.proj.bias.data = w["patch2embed.proj.bias"]
    vit.pos_embed.data = w["encoder_pe"]
    if prefix:
        vit.cls_token.data = w["cls_token"]
    vit.blocks, vit.norm = blocks(w, "encoder", 2, seen), Norm(w["encoder_norm.g"])
    roles = w["img_token"].view(1, 1, -1) + (w["ctx_enc_pe"][0] if num_views > 1 else 0)
    words = linear(w, "lang2encoder")(torch.tensor(file["lm_hidden"], dtype=torch.float64)) + w["lang_token"]
    tokens = encode_conditioned(vit, views, mask.ids_keep, words, seen > 0, roles)
    if "visible" in file:
        torch.testing.assert_close(tokens.flatten(1, 2), torch.tensor(file["visible"]).double(), rtol=0, atol=1e-5)

    grid = (size // patch, size // patch)
    decoder = Decoder(
        16, grid, 3 * patch**2, dim=12, depth=1, num_heads=2, num_prefix_tokens=prefix, num_views=num_views
    )
    decoder.embed, decoder.predict = linear(w, "encoder2decoder"), linear(w, "decoder_prediction")
    num_heads = 3 if num_views == 1 else 2
    decoder.blocks, decoder.norm = blocks(w, "decoder", num_heads), Norm(w["decoder_norm.g"])
    decoder.mask_token.data, decoder.positions = w["mask_token"].view(1, 1, -1), w["decoder_pe"][0]
    if num_views > 1:
        decoder.roles.data = w["ctx_dec_pe"][0]
    every = torch.arange(len(mask.removed[0])).expand(len(views), -1)
    pred = decoder.forward_views(tokens, mask.ids_restore, every)
    theirs = torch.tensor(file["reconstructions"]).double()
    torch.testing.assert_close(pred.flatten(0, 1), theirs.view_as(pred).flatten(0, 1), rtol=0, atol=1e-5)
    target = normalize_patches(patchify(views.flatten(0, 1), patch_size=patch))
    ids = mask.ids_remove.repeat_interleave(num_views, 0)
    value = masked_mse(take(pred.flatten(0, 1), ids), take(target, ids), torch.ones(ids.shape))
    assert value.item() == pytest.approx(float(file["loss"]), rel=1e-5)


def test_the_caption_is_read_and_padding_and_removed_patches_are_not(batch: Batch) -> None:
    objective = make(num_views=2).eval()
    value = objective.step(batch).terms["reconstruction"]
    with torch.no_grad():
        mask = objective.masking.draw(batch["seed"], (4, 4))
        objective.text.token_embedding.weight[0] += 100  # padding
        torch.testing.assert_close(objective.step(batch).terms["reconstruction"], value)
        holes = mask.removed.view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        before = seen(objective, batch)
        for view in batch["views"][:2]:  # both have one mask
            view += 100 * holes
        torch.testing.assert_close(seen(objective, batch), before)
        batch["text"] = batch["text"].roll(1, 0)
        assert (seen(objective, batch) - before).abs().max() > 1e-3


def seen(objective: nn.Module, batch: Batch) -> Tensor:
    """What the backbone makes of the kept patches."""
    found: list[Tensor] = []
    hook = objective.decoder.embed.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    objective.step(batch)
    hook.remove()
    return found[0]


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        check(compose(["objective=voltron_dual", "views=clip_small", "tokenizer=none", "micro_batch=1"]))
    for told in (
        "[48]: set views=pair",
        "tokenizer is null: set it, or another objective",
        "micro_batch=1 has no place",
    ):
        assert told in str(error.value)
    with pytest.raises(ValueError, match="needs the tokens of captions: set text=reader_small or reader_base"):
        make(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"masking\.kind=text would hide what the caption tells"):
        make(masking=Masking("text"))
    with pytest.raises(ValueError, match="num_views=0; set it to 1 or more"):
        make(num_views=0)
