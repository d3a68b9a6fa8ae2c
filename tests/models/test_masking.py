"""Masks, positions, decoder, and a timm ViT on kept patches: the numbers of MAE's code, and laws."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from repr.losses.reconstruction import masked_mse, normalize_patches, patchify
from repr.models.backbone import backbone
from repr.models.decoder import Decoder, sincos_positions
from repr.models.masking import (
    Masking,
    TokenMasking,
    block_scores,
    encode_hidden,
    encode_kept,
    mask_from_scores,
    num_kept,
    patch_similarity,
    random_scores,
    take,
    text_scores,
    vit_fault,
)
from repr.objectives.masked import make_decoder
from tests.golden import golden

MASKING, POSITIONS, FULL = golden("mae_masking"), golden("mae_posembed"), golden("mae_full")
VIT = {"name": "vit_tiny_patch16_224", "image_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2}


def stored(data: dict, case: str) -> dict[str, Tensor]:
    return {key.split("/")[1]: torch.as_tensor(value) for key, value in data.items() if key.startswith(f"{case}/")}


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in MASKING} - {"len_keep_table"}))
def test_masks_equal_the_authors(case: str) -> None:
    data = stored(MASKING, case)
    keep = num_kept(data["noise"].shape[1], data["mask_ratio"].double().round(decimals=6).item())
    assert keep == data["len_keep"]
    mask = mask_from_scores(data["noise"], keep)
    assert torch.equal(mask.ids_keep, data["ids_keep"])
    assert torch.equal(mask.ids_keep, data["ids_shuffle"][:, :keep])
    assert torch.equal(mask.ids_restore, data["ids_restore"])
    assert torch.equal(mask.removed, data["mask"])
    assert torch.equal(mask.ids_remove, data["ids_shuffle"][:, keep:])
    x = data["x"].requires_grad_()
    kept = take(x, mask.ids_keep)
    assert torch.equal(kept, data["x_masked"])
    kept.backward(data["cotangent"])
    assert torch.equal(x.grad, data["grad_x"])


def test_the_number_kept_is_the_authors_but_never_zero() -> None:
    table = stored(MASKING, "len_keep_table")
    rows = zip(table["L"].tolist(), table["mask_ratio_f64"].tolist(), table["len_keep"].tolist(), strict=True)
    for num, ratio, theirs in rows:
        assert num_kept(num, ratio) == max(theirs, 1), (num, ratio)
    assert num_kept(10, 0.9) == 1


@pytest.mark.parametrize("case", ["a_d8_g3", "b_d16_g4_cls", "d_d768_g14_cls_rows"])
def test_positions_equal_the_authors(case: str) -> None:
    data = stored(POSITIONS, case)
    side = int(data["grid_size"])
    table = sincos_positions(int(data["embed_dim"]), (side, side), num_prefix_tokens=int(data["cls_token"]))
    expected = data["pos_embed_rows_f64"] if "rows" in data else data["pos_embed_f64"]
    torch.testing.assert_close(table[data["rows"]] if "rows" in data else table, expected, rtol=0, atol=1e-12)


def test_positions_of_one_axis_equal_the_authors() -> None:
    data = stored(POSITIONS, "e_1d")
    width, positions = int(data["embed_dim"]), data["pos"].long()
    table = sincos_positions(2 * width, (1, int(positions.max()) + 1))  # the first half is that of the columns
    torch.testing.assert_close(table[positions, :width], data["emb_f64"], rtol=0, atol=1e-12)


def authors_network(data: dict[str, Tensor]) -> tuple[nn.Module, Decoder]:
    """timm's ViT and our decoder with the stored weights, mapped by name."""
    cfg = {key.removeprefix("cfg."): value.item() for key, value in data.items() if key.startswith("cfg.")}
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=cfg["img_size"], patch_size=cfg["patch_size"], embed_dim=cfg["embed_dim"],
        depth=cfg["depth"], num_heads=cfg["num_heads"], mlp_ratio=cfg["mlp_ratio"], num_classes=0,
    )  # fmt: skip
    grid = vit.patch_embed.grid_size
    decoder = Decoder(
        cfg["embed_dim"], grid, 3 * cfg["patch_size"] ** 2, dim=cfg["decoder_embed_dim"], depth=cfg["decoder_depth"],
        num_heads=cfg["decoder_num_heads"], mlp_ratio=cfg["mlp_ratio"],
    )  # fmt: skip
    weights = {key.removeprefix("weight."): value for key, value in data.items() if key.startswith("weight.")}
    positions = weights.pop("decoder_pos_embed")
    torch.testing.assert_close(decoder.positions, positions[0], rtol=0, atol=1e-6)
    of_decoder = {key.removeprefix("decoder_"): weights.pop(key) for key in list(weights) if "decoder" in key}
    of_decoder["mask_token"] = weights.pop("mask_token")
    decoder.load_state_dict({key.replace("pred.", "predict."): value for key, value in of_decoder.items()})
    vit.load_state_dict(weights)
    return vit, decoder


@pytest.mark.parametrize("case", sorted({key.split("/")[0] for key in FULL}))
def test_the_whole_network_equals_the_authors(case: str) -> None:
    data = stored(FULL, case)
    vit, decoder = authors_network(data)
    size = int(data["cfg.patch_size"])
    mask = mask_from_scores(data["noise"], num_kept(data["noise"].shape[1], data["cfg.mask_ratio"].item()))
    latent = encode_kept(vit, data["images"], mask.ids_keep)
    pred = decoder(latent, mask.ids_restore)
    target = patchify(data["images"], patch_size=size)
    loss = masked_mse(pred, normalize_patches(target) if data["cfg.norm_pix"] else target, mask.removed)
    assert torch.equal(mask.ids_restore, data["ids_restore"])
    assert torch.equal(mask.removed, data["mask"])
    torch.testing.assert_close(latent, data["latent"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pred, data["pred"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-6)
    part = decoder(latent, mask.ids_restore, mask.ids_remove)
    torch.testing.assert_close(part, take(data["pred"], mask.ids_remove), rtol=1e-4, atol=1e-5)
    loss.backward()
    ours = {
        "cls_token": vit.cls_token, "patch_embed.proj.weight": vit.patch_embed.proj.weight,
        "norm.weight": vit.norm.weight, "mask_token": decoder.mask_token,
        "decoder_embed.weight": decoder.embed.weight, "decoder_pred.bias": decoder.predict.bias,
    }  # fmt: skip
    theirs = {key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].grad, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"dynamic_img_size": True}, {"class_token": False}])
def test_a_vit_on_all_its_patches_is_the_vit(options: dict) -> None:
    if options.get("class_token") is False:
        options = options | {"global_pool": "avg", "fc_norm": False}
    model = backbone(**VIT, **options)
    names = list(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    every = torch.arange(16).expand(2, -1)
    whole = model.forward_features(images)
    torch.testing.assert_close(encode_kept(model, images, every), whole)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    prefix = model.num_prefix_tokens
    shuffled = encode_kept(model, images, order)
    torch.testing.assert_close(shuffled[:, :prefix], whole[:, :prefix])
    torch.testing.assert_close(shuffled[:, prefix:], take(whole[:, prefix:], order))
    assert list(model.state_dict()) == names
    assert len(model.patch_drop._forward_hooks) == 0


def test_only_the_kept_patches_pass_the_blocks_and_only_they_matter() -> None:
    model, seen = backbone(**VIT), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    images = torch.randn(2, 3, 64, 64)
    keep = torch.tensor([[0, 5, 10], [1, 2, 15]])
    tokens = encode_kept(model, images, keep)
    assert seen == [1 + 3]
    other = torch.randn(2, 3, 64, 64)
    for b in range(2):
        for i in keep[b].tolist():
            part = (b, slice(None), slice(16 * (i // 4), 16 * (i // 4) + 16), slice(16 * (i % 4), 16 * (i % 4) + 16))
            other[part] = images[part]
    torch.testing.assert_close(encode_kept(model, other, keep), tokens)


def test_masks_are_a_function_of_the_seed() -> None:
    seed = torch.tensor([3, 4, 5])
    for make in (lambda s, v: random_scores(s, 16, view=v), lambda s, v: block_scores(s, (4, 4), view=v)):
        scores = make(seed, 0)
        assert torch.equal(scores[1:], make(seed[1:], 0))
        assert not torch.equal(scores, make(seed, 1))
        assert not torch.equal(scores[0], scores[1])


def test_random_masks_remove_every_patch_equally_often() -> None:
    mask = mask_from_scores(random_scores(torch.arange(4000), 16), 4)
    assert (mask.removed.sum(1) == 12).all()
    torch.testing.assert_close(mask.removed.mean(0), torch.full((16,), 0.75), rtol=0, atol=0.04)


def test_a_block_is_one_piece() -> None:
    removed = mask_from_scores(block_scores(torch.arange(200), (8, 8)), 48).removed.view(-1, 8, 8)  # 16 of 64
    assert (removed.sum((1, 2)) == 16).all()
    box = removed.amax(2).sum(1) * removed.amax(1).sum(1)  # rows by columns that the block touches
    scattered = mask_from_scores(random_scores(torch.arange(200), 64), 48).removed.view(-1, 8, 8)
    assert box.mean() < 26
    assert (scattered.amax(2).sum(1) * scattered.amax(1).sum(1)).mean() > 50
    assert box.max() <= 40


def test_text_guided_masks_remove_what_is_most_like_the_caption() -> None:
    text = torch.randn(2, 6)
    features = torch.randn(2, 6, 4, 4)
    features[0, :, 1, 2] = 5 * text[0]
    features[1, :, 3, 0] = text[1]
    scores = text_scores(patch_similarity(features, text, (4, 4)), torch.arange(2))
    mask = mask_from_scores(scores, 15)
    assert mask.removed.argmax(1).tolist() == [6, 12]
    flat = text_scores(torch.ones(2, 16, requires_grad=True), torch.arange(2))
    assert not flat.requires_grad
    keeps = mask_from_scores(flat, 8).ids_keep
    assert sorted(keeps[0].tolist()) != sorted(keeps[1].tolist())  # noise decides among equals


def test_a_coarser_map_of_similarity_is_interpolated() -> None:
    text = torch.randn(1, 6)
    features = torch.randn(1, 6, 2, 2)
    coarse = patch_similarity(features, text, (2, 2)).view(2, 2)
    fine = patch_similarity(features, text, (4, 4)).view(4, 4)
    torch.testing.assert_close(fine[::3, ::3], coarse)  # the corners
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would round to three digits
        assert torch.equal(patch_similarity(features, text, (4, 4)).view(4, 4), fine)
    assert coarse.min() <= fine.min() <= fine.max() <= coarse.max()


def test_the_decoder_puts_tokens_back_where_they_were() -> None:
    decoder = Decoder(8, (2, 2), 12, dim=8, depth=0, num_heads=2, num_prefix_tokens=1)
    nn.init.eye_(decoder.embed.weight)
    tokens = torch.randn(1, 3, 8)
    mask = mask_from_scores(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 2)  # keeps 1, then 3
    seen = []
    decoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert decoder(tokens, mask.ids_restore).shape == (1, 4, 12)
    x = seen[0] - decoder.positions
    blank = decoder.mask_token[0, 0]
    for place, expected in enumerate([tokens[0, 0], blank, tokens[0, 1], blank, tokens[0, 2]]):
        torch.testing.assert_close(x[0, place], expected)


def test_half_precision_and_copies() -> None:
    decoder = Decoder(24, (4, 4), 12, dim=8, depth=1, num_heads=2)
    model = copy.deepcopy(backbone(**VIT)).bfloat16()
    mask = mask_from_scores(random_scores(torch.arange(2), 16), 4)
    tokens = encode_kept(model, torch.randn(2, 3, 64, 64).bfloat16(), mask.ids_keep)
    assert decoder.bfloat16()(tokens, mask.ids_restore).dtype == torch.bfloat16


def test_what_cannot_be_masked_is_told() -> None:
    assert vit_fault(backbone(**VIT)) is None
    assert "patches of 16 pixels do not fill an image of 72" in str(vit_fault(backbone(**VIT | {"image_size": 72})))
    assert "leave patch_drop_rate out" in str(vit_fault(backbone(**VIT, patch_drop_rate=0.5)))
    assert "ResNet has no patch tokens" in str(vit_fault(backbone("test_resnet")))
    assert make_decoder(backbone(**VIT), Masking(ratio=0.75), "learned", Decoder) is not None
    assert make_decoder(backbone(**VIT), Masking(ratio=0.0), "learned", None) is None
    with pytest.raises(ValueError, match="keeps all 16 patches"):
        make_decoder(backbone(**VIT), Masking(ratio=0.0), "learned", Decoder)
    for ratio in (1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="set it from 0 to below 1"):
            Masking(ratio=ratio)
    for dim, heads in ((10, 2), (12, 5)):
        with pytest.raises(ValueError, match=r"set it to a multiple of 4 and of decoder\.num_heads"):
            Decoder(8, (2, 2), 12, dim=dim, depth=1, num_heads=heads)
    with pytest.raises(ValueError, match="a multiple of 4, not 6"):
        sincos_positions(6, (2, 2))


# Mask tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block", "rand"])
def test_as_much_is_hidden_as_the_authors_hide(kind: str) -> None:
    theirs = torch.tensor(golden("ibot")[f"mask_{kind}/masks"]).flatten(1)
    ours = TokenMasking(kind="block" if kind == "block" else "random").draw(torch.arange(2000), (14, 14))
    for masks, tolerance in ((ours, 0.03), (theirs, 0.15)):  # of 80 masks a tenth more or less
        assert masks.any(1).float().mean().item() == pytest.approx(0.5, abs=tolerance)
        shares = masks[masks.any(1)].float().mean(1)
        assert shares.mean().item() == pytest.approx(0.3, abs=tolerance)
        assert 0.05 < shares.min() <= shares.max() <= 0.5
    assert not torch.equal(ours, TokenMasking().draw(torch.arange(2000), (14, 14), num_views=2)[2000:])


def test_a_block_is_hidden_and_at_least_one_patch() -> None:
    masks = TokenMasking(share=1.0).draw(torch.arange(300), (8, 8)).view(-1, 8, 8)
    box = masks.any(2).sum(1) * masks.any(1).sum(1)  # rows by columns that the block touches
    num = masks.sum((1, 2))
    assert (box <= 2.5 * num).all()
    assert box.sum() < 1.6 * num.sum()
    assert TokenMasking(ratio=(0.01, 0.01), share=1.0).draw(torch.arange(9), (2, 2)).sum(1).tolist() == [1] * 9


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"dynamic_img_size": True}, {"no_embed_class": True}])
def test_a_token_stands_for_what_is_hidden(options: dict) -> None:
    model, images, token = backbone(**VIT, **options), torch.randn(2, 3, 64, 64), torch.randn(24)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(encode_hidden(model, images, hidden, token), model.forward_features(images))
    hidden[0, 5] = True
    other = images.clone()
    other[0, :, 16:32, 16:32] = torch.randn(3, 16, 16)  # the sixth patch
    seen = encode_hidden(model, images, hidden, token)
    torch.testing.assert_close(encode_hidden(model, other, hidden, token), seen)
    assert not torch.allclose(
        encode_hidden(model, other, ~hidden, token)[0], encode_hidden(model, images, ~hidden, token)[0]
    )
    assert not torch.allclose(encode_hidden(model, images, hidden, -token)[0], seen[0])
    every = encode_hidden(model, images, torch.ones_like(hidden), token)
    torch.testing.assert_close(every[0], every[1])  # places alone are told
    assert len(model.patch_embed._forward_hooks) == 0
