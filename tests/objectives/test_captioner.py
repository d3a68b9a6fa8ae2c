"""The captioner against open_clip's own CoCa, and what is its own: parallel prediction, generation, likelihood."""

import re
from functools import partial

import pytest
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.models.backbone import backbone
from repr.models.captioner import as_tokens
from repr.models.generation import beam_search
from repr.objectives.captioner import Captioner
from tests.golden import golden
from tests.objectives.conftest import SMALL, VIT

COCA = golden("coca")
CASES = {
    "a_shared_pooler_legacy_mask": "shared",
    "b_cascade_correct_mask": "cascade",
    "c_parallel_no_padding": "parallel",
    "d_no_pooler": None,
}
START, END = 37, 38
RENAMED = {
    r"^visual\.class_embedding$": "backbone.cls_token",
    r"^visual\.positional_embedding$": "backbone.pos_embed",
    r"^visual\.conv1\.": "backbone.patch_embed.proj.",
    r"^visual\.ln_pre\.": "backbone.norm_pre.",
    r"^visual\.proj$": "image_projection.weight",
    r"^visual\.attn_pool": "pooler.attn_pool",
    r"^visual\.transformer\.resblocks\.": "backbone.blocks.",
    r"^(backbone.*)\.ln_1\.": r"\1.norm1.",
    r"^(backbone.*)\.ln_2\.": r"\1.norm2.",
    r"^(backbone.*)\.in_proj_": r"\1.qkv.",
    r"^(backbone.*)\.out_proj\.": r"\1.proj.",
    r"^(backbone.*)\.c_fc\.": r"\1.fc1.",
    r"^(backbone.*)\.c_proj\.": r"\1.fc2.",
    r"^text_decoder\.text_projection$": "head.weight",
    r"^text_decoder\.": "decoder.",
}


def ours(name: str, pooler: str | None) -> str:
    """The name that we have for a tensor of open_clip's."""
    name = name.replace("visual.ln_post", "pooler.norm" if pooler == "shared" else "backbone.norm")
    for pattern, new in RENAMED.items():
        name = re.sub(pattern, new, name)
    return name


def tensors(case: str, kind: str) -> dict[str, Tensor]:
    """Weights, or what else there is for each, by our names, in our shapes."""
    start, pooler = f"{case}/{kind}.", CASES[case]
    found = {ours(key.removeprefix(start), pooler): torch.tensor(COCA[key]) for key in COCA if key.startswith(start)}
    for name in ("backbone.cls_token", "backbone.pos_embed"):
        if name in found:
            found[name] = found[name].reshape(1, -1, found[name].shape[-1])
    if "image_projection.weight" in found:
        found["image_projection.weight"] = found["image_projection.weight"].T
    return found


def coca(case: str) -> Captioner:
    """Our flow with the weights of a case, in double precision."""
    cfg = {key.removeprefix(f"{case}/cfg."): COCA[key] for key in COCA if key.startswith(f"{case}/cfg.")}
    act, layers = QuickGELU if cfg["quick_gelu"] else nn.GELU, int(cfg["layers"])
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=layers, num_heads=2, mlp_ratio=2, num_classes=0, pre_norm=True,
        final_norm=CASES[case] != "shared", norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer=act,
    )  # fmt: skip
    text = TextTransformer(
        context_length=9, vocab_size=39, width=16, heads=2, layers=layers, mlp_ratio=2, output_dim=16, embed_cls=True,
        output_tokens=True, correct_cls_mask=bool(cfg["correct_cls_mask"]), act_layer=act,
    )  # fmt: skip
    weights = {"contrast": max(float(cfg["contrastive_weight"]), 1e-12), "caption": float(cfg["caption_weight"])}
    queries = max(int(cfg["queries"]), 1)
    flow = Captioner(vit, text, pooler=CASES[case], num_queries=queries, pooler_heads=2, weights=weights)
    flow.load_state_dict(tensors(case, "weight"))
    return flow.double()


def batch_of(case: str) -> Batch:
    return Batch(views=[torch.tensor(COCA[f"{case}/in.images"]).double()], text=torch.tensor(COCA[f"{case}/in.text"]))


def small(
    pooler: str | None = "cascade", tower: dict | None = None, backbone: nn.Module | None = None, **options: object
) -> Captioner:
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    text: dict = {"context_length": 9, "vocab_size": 39, "width": 16, "heads": 2, "layers": 1, "output_dim": 16}
    text |= {"embed_cls": True, "output_tokens": True, "correct_cls_mask": True} | (tower or {})
    heads = options.pop("pooler_heads", 2)
    return Captioner(backbone or vit, TextTransformer(**text), pooler=pooler, pooler_heads=heads, **options).eval()


def small_batch(size: int) -> Batch:
    """Pictures, and captions of two to seven words between start and end."""
    text = torch.randint(1, 37, (size, 9))
    text[:, 0] = START
    for row in range(size):
        end = 3 + row % 6
        text[row, end], text[row, end + 1 :] = END, 0
    return Batch(views=[torch.randn(size, 3, 16, 16)], text=text, seed=torch.arange(size))


CAPTIONS_ALONE = {"weights": {"caption": 1}, "tower": {"embed_cls": False, "output_dim": None}}


@pytest.mark.parametrize("case", CASES)
def test_open_clip(case: str) -> None:
    flow, batch = coca(case), batch_of(case)
    output = flow.step(batch)
    told = {name: COCA[f"{case}/out.{name}_f64"] for name in ("contrastive_loss", "caption_loss")}
    assert flow.weights["caption"] * output.terms["caption"].item() == pytest.approx(told["caption_loss"], rel=1e-6)
    if told["contrastive_loss"]:
        value = flow.weights["contrast"] * output.terms["contrast"].item()
        assert value == pytest.approx(told["contrastive_loss"], rel=1e-6)
    flow.total(output.terms).backward()
    grads = {name: p.grad for name, p in flow.named_parameters()}
    for name, grad in tensors(case, "grad").items():
        torch.testing.assert_close(grads[name].float(), grad.float(), rtol=1e-4, atol=1e-6, msg=name)


def test_three_steps_of_open_clip() -> None:
    case = "a_shared_pooler_legacy_mask"
    flow, batch = coca(case), batch_of(case)
    decayed = {
        ours(key.partition("weight.")[2], "shared"): COCA[key].ndim > 1 for key in COCA if f"{case}/weight." in key
    }
    groups = [
        {"params": [p for name, p in flow.named_parameters() if decayed[name] == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    for expected in (*COCA[f"{case}/steps.loss_f64"], COCA[f"{case}/final_loss_f64"]):
        loss = flow.total(flow.step(batch).terms)
        assert loss.item() == pytest.approx(float(expected), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_greedy_captions_of_open_clip(case: str) -> None:
    """But for those in which it takes a padding for the end."""
    options = {"start_id": START, "end_id": END, "max_length": 8, "min_length": 3}
    said, scores = coca(case).eval().generate(batch_of(case)["views"][0], **options)
    theirs = torch.tensor(COCA[f"{case}/gen.greedy_fixed_length"])
    same = [
        row for row, words in enumerate(theirs.tolist()) if 0 not in words[: words.index(END) if END in words else 8]
    ]
    assert len(same) >= 2
    assert torch.equal(said[same], theirs[same])
    assert (scores < 0).all()


def test_beams_find_what_greed_misses() -> None:
    """Among all texts of three words the likeliest, with its probability."""
    rng = torch.Generator().manual_seed(0)
    first, second = torch.rand(5, generator=rng).log_softmax(0), 3 * torch.rand(5, 5, generator=rng)
    second = second.log_softmax(1)
    likely = [first[a] + (second[a, b] if a != 3 else 0) for a in range(5) for b in range(5)]

    def next_words(found: Tensor) -> Tensor:
        return first.expand(len(found), -1) if found.shape[1] == 1 else second[found[:, 1]]

    options = {"start_id": 4, "end_id": 3, "pad_id": 0, "max_length": 4}
    found, score = beam_search(next_words, 2, num_beams=5, **options)
    greedy, less = beam_search(next_words, 2, **options)
    assert score[0] == pytest.approx(max(likely).item())
    assert (less <= score).all()
    assert torch.equal(found[0], found[1])
    assert greedy.shape == (2, 4)


def test_words_predicted_at_once_see_no_words() -> None:
    """Those of the drawn share of captions, which two processes draw alike; the others see the words before them."""
    flow, batch = small(None, parallel_fraction=0.75, **CAPTIONS_ALONE), small_batch(24)
    parallel = flow._draw_parallel(batch)
    assert 0.5 < parallel.float().mean() < 1
    assert torch.equal(flow._draw_parallel(Batch(seed=batch["seed"][8:])), parallel[8:])
    *_, seen = flow.see(batch["views"][0])
    said, _ = flow.generate(batch["views"][0], start_id=START, end_id=END, num_beams=2)  # word by word all the same
    assert said.shape == (24, 9)

    def decoded(text: Tensor) -> Tensor:
        return flow.decoder(seen, flow.read(text)[1][:, :-1], parallel)

    text, other = batch["text"], batch["text"].clone()
    other[:, 2] = 7
    same = (decoded(text) - decoded(other)).abs().amax(2) == 0  # (B, L - 1)
    assert same[parallel].all()
    assert same[~parallel][:, :2].all()
    assert not same[~parallel][:, 2:].any()
    flow.decoder.blanks.data[-1] += 1  # the last word is seen by the first place
    assert not torch.equal(
        decoded(text)[parallel][:, 0], flow.decoder(seen, flow.read(text)[1][:, :-1])[parallel][:, 0]
    )


def test_likelihoods_are_those_of_each_word() -> None:
    flow, batch = small(), small_batch(3)
    candidates = batch["text"][torch.tensor([[0, 1], [1, 2], [2, 0]])]
    values = flow.log_likelihood(batch["views"][0], candidates)
    *_, seen = flow.see(batch["views"][0])
    for row, (texts, likely) in enumerate(zip(candidates, values, strict=True)):
        for text, value in zip(texts, likely, strict=True):
            words = text[: int((text != 0).sum())][None]
            logits = flow.head(flow.decoder(seen[row : row + 1], flow.read(words)[1][:, :-1]))
            one_by_one = logits.log_softmax(2)[0].gather(1, words[0, 1:, None]).sum()
            torch.testing.assert_close(value, one_by_one)


def test_the_first_word_of_the_vocabulary_is_no_padding_within_a_caption() -> None:
    """It is "!" of CLIP's."""
    assert small().targets(torch.tensor([[37, 0, 5, 38, 0, 0]])).tolist() == [[0, 5, 38, -1, -1]]


def test_tokens_of_maps() -> None:
    rows = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(as_tokens(rows, 3), as_tokens(rows.permute(0, 2, 3, 1), 3))
    for pooler in ("cascade", None):
        flow = small(pooler, backbone=backbone("test_resnet"), tower={"width": 24})
        assert all(term.isfinite() for term in flow.step(small_batch(4)).terms.values())
    assert flow.image_map.weight.shape == (24, flow.backbone.num_features)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": {"contrast": 1}}, "take objective=clip"),
        ({"weights": {"caption": 1}}, "set text=cappa_small"),
        ({"tower": {"embed_cls": False}}, "set text=coca_small"),
        ({"tower": {"output_tokens": False}}, "or text.output_tokens=true"),
        ({"tower": {"no_causal_mask": True}}, "text.no_causal_mask=false"),
        ({"pooler": "map"}, "set it to cascade, parallel, shared or null"),
        ({"pooler": "shared", "num_queries": 1}, "set it to 2 or more"),
        ({"pooler_heads": 5}, "do not divide text.width=16"),
        ({"parallel_fraction": 1.5}, "set it between 0 and 1"),
        ({"decoder_layers": 0}, "set it to 1 or more"),
        (CAPTIONS_ALONE, "set pooler=null"),
    ],
)
def test_what_does_not_fit_is_told_at_once(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        small(**options)
    with pytest.raises(ValueError, match="parallel_fraction draws from"):
        small(parallel_fraction=0.5)._draw_parallel(Batch())


def test_a_tokenizer_with_more_words_than_the_tower_is_told() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer has 49408 words, and text.vocab_size is 100: set it to 49408"):
        check(compose(["objective=coca", *SMALL, *VIT, "text.vocab_size=100"]))
