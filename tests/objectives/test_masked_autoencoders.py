"""The masked flow: what it encodes, its masks, scorers, evaluation, export, pictures, and what it refuses."""

import json
import math
import signal
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.drawing import GAP, shown
from repr.fit import fit, main
from repr.losses.contrastive import clip, nt_xent
from repr.losses.reconstruction import masked_mse, normalize_patches, patchify
from repr.models.backbone import feature_map
from repr.models.masking import (
    block_scores,
    encode_kept,
    mask_from_scores,
    patch_similarity,
    random_scores,
    text_scores,
)
from repr.objectives.masked import encode_visible
from repr.objectives.masked_autoencoders import MaskedImageText, MaskedViews
from repr.runs.folder import save_config
from repr.runs.scorer import PatchScorer, fit_length, scorer_facts
from tests.conftest import RunGroup
from tests.objectives.conftest import VIT, build, make_batch, tokenizer
from tests.test_fit import same, weights

SMALL_PATCHES = "+backbone.patch_size=8"  # 16 of them
AVERAGE = ["+backbone.global_pool=avg", "+backbone.fc_norm=false"]
MAE = ["mae", "mae_clip", "mae_clip_tgm", "cmae"]


def seen_by(flow: MaskedViews | MaskedImageText, batch: Batch) -> list[tuple[int, ...]]:
    """Shapes of what enters the first block in a step."""
    shapes: list[tuple[int, ...]] = []
    hook = flow.backbone.blocks[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    flow.step(batch)
    hook.remove()
    return shapes


@pytest.mark.parametrize(
    ("name", "shapes"),
    # one pass over the class token and the visible ones of 16 patches; the flow's own scores cost a whole one more
    [("mae", [(8, 5)]), ("mae_clip", [(8, 5)]), ("cmae", [(16, 9)]), ("mae_clip_tgm", [(8, 17), (8, 7)])],
)
def test_only_visible_patches_are_encoded_and_once(name: str, shapes: list) -> None:
    assert seen_by(build(name, SMALL_PATCHES), make_batch(8)) == shapes


def test_the_terms_are_what_they_say() -> None:
    batch = make_batch(8)
    flow = build("mae_clip", SMALL_PATCHES, *AVERAGE)
    terms = flow.step(batch).terms
    mask = mask_from_scores(random_scores(batch["seed"], 16), 4)
    tokens = encode_kept(flow.backbone, batch["views"][0], mask.ids_keep)
    target = normalize_patches(patchify(batch["views"][0], patch_size=8))
    torch.testing.assert_close(
        terms["reconstruction"], masked_mse(flow.decoder(tokens, mask.ids_restore), target, mask.removed)
    )
    image = flow.image_projection(tokens[:, 1:].mean(1))  # the class token left out
    torch.testing.assert_close(terms["contrast"], clip(image, flow.text(batch["text"]), logit_scale=1 / 0.07))


def test_two_views_have_masks_of_their_own() -> None:
    batch = make_batch(8)
    flow = build("cmae", SMALL_PATCHES)
    masks = [mask_from_scores(random_scores(batch["seed"], 16, view=view), 8) for view in (0, 1)]
    assert not torch.equal(masks[0].ids_keep, masks[1].ids_keep)
    keep, removed = (torch.cat(parts) for parts in ([m.ids_keep for m in masks], [m.removed for m in masks]))
    images = torch.cat(batch["views"][:2])
    output = flow.step(batch)
    tokens = encode_kept(flow.backbone, images, keep)
    a, b = flow.head(tokens[:, 0]).chunk(2)  # this backbone pools by its class token
    torch.testing.assert_close(output.terms["contrast"], nt_xent(a, b, temperature=0.1))
    pred = flow.decoder(tokens, torch.cat([m.ids_restore for m in masks]))
    target = normalize_patches(patchify(images, patch_size=8))
    torch.testing.assert_close(output.terms["reconstruction"], masked_mse(pred, target, removed))


def test_masks_come_from_the_seed_alone() -> None:
    """Whatever was run before, and in whatever order the rows come."""
    flow, batch = build("mae", SMALL_PATCHES), make_batch(8)
    first = flow.step(batch).terms["reconstruction"]
    torch.rand(100)
    order = torch.randperm(8)
    again = Batch(seed=batch["seed"][order], views=[view[order] for view in batch["views"]])
    torch.testing.assert_close(flow.step(again).terms["reconstruction"], first)
    batch["seed"] = batch["seed"] + 1
    assert not torch.isclose(flow.step(batch).terms["reconstruction"], first)


def test_blocks_are_an_option() -> None:
    flow, batch = build("mae", SMALL_PATCHES, "objective.masking.kind=block"), make_batch(8)
    mask = encode_visible(flow.backbone, flow.masking, batch).mask
    assert torch.equal(mask.ids_keep, mask_from_scores(block_scores(batch["seed"], (4, 4)), 4).ids_keep)


def test_the_flows_own_towers_score_without_a_gradient() -> None:
    flow, batch = build("mae_clip_tgm", SMALL_PATCHES, *AVERAGE), make_batch(8)
    text = flow.encode_text(batch["text"])
    _, mask, _, similarity, _ = flow._encode_visible(batch, text)
    assert not similarity.requires_grad
    with torch.no_grad():
        patches = feature_map(flow.backbone, batch["views"][0]).flatten(2).transpose(1, 2)
        cosine = F.cosine_similarity(flow.image_projection(patches), text[:, None], dim=2)
    torch.testing.assert_close(similarity, cosine)
    for row in range(8):
        removed = mask.removed[row] > 0
        assert removed.sum() == 10  # of 16 at ratio 0.6
        assert similarity[row][removed].min() > similarity[row][~removed].max() - 1e-5


# Frozen scorers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CLIP with a ResNet, whose patches and words are of other numbers than those of the flow."""
    folder = tmp_path_factory.mktemp("scorer")
    small = ["objective=clip", "backbone.name=test_resnet", "smoke=true", "embed_dim=24", "text.width=32"]
    fit(compose([*small, "text.layers=1", "data.eval=null", "eval=default", f"run_folder={folder}"]))
    return folder


def test_a_run_scores(image_text_run: Path) -> None:
    batch = make_batch(8)
    scorer = PatchScorer(str(image_text_run))
    features, text = scorer(batch["views"][0], batch["text"])
    assert features.shape == (8, 24, 1, 1)  # at 32 pixels
    run = scorer._towers[0]
    torch.testing.assert_close(features.mean((2, 3)), run.encode_image(batch["views"][0]))
    torch.testing.assert_close(text, run.encode_text(fit_length(batch["text"], 16)))
    flow = build("mae_clip_tgm", SMALL_PATCHES, f"scorer={image_text_run}")
    assert seen_by(flow, batch) == [(8, 7)]  # the flow's own towers are not asked
    expected = text_scores(patch_similarity(features, text, (4, 4)), batch["seed"])
    mask = encode_visible(flow.backbone, flow.masking, batch).mask
    assert torch.equal(mask.ids_keep, mask_from_scores(expected, 6).ids_keep)
    assert not [name for name in flow.state_dict() if "scorer" in name]
    assert not run.training


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model of open_clip's own classes with weights in a file."""
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg"}
    for name, changed in {"own": {}, "size": {"image_size": 64}, "map": {"attentional_pool": True}}.items():
        config = {"embed_dim": 24, "vision_cfg": {**vision, **changed}, "text_cfg": text}
        (folder / f"tiny-{name}.json").write_text(json.dumps(config))
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**text, "vocab_size": 32000}}
    (folder / "tiny-words.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.save(open_clip.create_model("tiny-own").state_dict(), folder / "tiny.pt")
    return f"open_clip:tiny-own/{folder}/tiny.pt"


def test_a_model_of_open_clip_scores(tiny_open_clip: str) -> None:
    batch = make_batch(8)
    scorer = PatchScorer(tiny_open_clip)
    features, text = scorer(batch["views"][0], batch["text"])
    assert features.shape == (8, 24, 4, 4)
    model = scorer._towers[0]
    torch.testing.assert_close(features.mean((2, 3)), model.encode_image(batch["views"][0]))  # it pools by the mean
    torch.testing.assert_close(text, model.encode_text(fit_length(batch["text"], 77)))
    assert scorer_facts(tiny_open_clip).image_size == 32
    assert seen_by(build("mae_clip_tgm", f"scorer={tiny_open_clip}"), batch) == [(8, 2)]


def test_a_text_that_is_cut_keeps_its_end() -> None:
    tokens = tokenizer()(["a red cat", "one two three four five six seven eight nine ten"])
    cut = fit_length(tokens, 6)
    assert cut[0].tolist() == tokens[0, :6].tolist()
    assert cut[1].tolist() == [*tokens[1, :5].tolist(), 49407]
    assert fit_length(tokens, 20)[:, 12:].eq(0).all()


# Evaluation, export, pictures, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAE)
def test_unmasked_pictures_are_embedded_with_both_poolings(name: str) -> None:
    batch = make_batch(4)
    images = Batch(image=batch["views"][0], text=batch["text"])
    for options in ([], AVERAGE):
        flow = build(name, SMALL_PATCHES, *options).eval()
        found = flow.embed(images)
        tokens = flow.backbone.forward_features(images["image"])
        cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
        torch.testing.assert_close(found.trunk, mean if options else cls)
        torch.testing.assert_close(found.trunk, flow.backbone(images["image"]))
        (other,) = found.poolings
        assert other == ("class_token" if options else "mean_pool")
        torch.testing.assert_close(found.poolings[other], cls if options else mean)
        assert (found.text is not None) == name.startswith("mae_clip")
        torch.testing.assert_close(flow.encode_image(images["image"]), found.image)


@pytest.mark.parametrize("options", [[], AVERAGE])
def test_the_encoder_is_a_plain_timm_vit(options: list[str]) -> None:
    flow = build("mae_clip", *options).eval()
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, num_classes=0,
        global_pool="avg" if options else "token", fc_norm=False,
    ).eval()  # fmt: skip
    plain.load_state_dict(flow.backbone.state_dict(), strict=True)
    images = make_batch(4)["views"][0]
    torch.testing.assert_close(plain(images), flow.backbone(images))


def test_positions_are_fixed_or_learned() -> None:
    fixed, learned = build("mae"), build("mae", "+objective.positions=learned")
    assert not fixed.backbone.pos_embed.requires_grad
    assert learned.backbone.pos_embed.requires_grad
    assert fixed.backbone.pos_embed[0, 0].eq(0).all()  # the class token has none
    table = fixed.backbone.pos_embed[0, 1:].view(2, 2, 32)
    assert torch.equal(table[0, 0, 16:], table[0, 1, 16:])  # the second half tells the row
    assert torch.equal(table[0, 1, :16], table[1, 1, :16])


@pytest.mark.parametrize("name", MAE)
def test_pictures_are_drawn(name: str) -> None:
    flow, batch = build(name, SMALL_PATCHES).eval(), make_batch(4)
    state, show = torch.get_rng_state(), partial(shown, mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.no_grad():
        (picture,) = flow.pictures(batch, show).values()
    assert torch.equal(state, torch.get_rng_state())
    assert picture.dtype == torch.uint8
    guided = name == "mae_clip_tgm"  # a map of similarity, and captions of three lines
    assert picture.shape == (3, (4 if guided else 3) * 164 + guided * 58 + GAP, 5 * 164 + GAP)
    image, visible = (picture[:, y : y + 160, 168:328] for y in (GAP, GAP + 164))  # the first sample
    holes = (visible == 128).all(0)[::5, ::5]  # 32 pixels, enlarged five times
    assert holes.sum() == (640 if guided else 512 if name == "cmae" else 768)
    assert torch.equal(visible[:, ::5, ::5][:, ~holes], image[:, ::5, ::5][:, ~holes])
    half = make_batch(4)
    half["views"] = [view.bfloat16() for view in half["views"]]
    assert build(name, SMALL_PATCHES).bfloat16().pictures(half, show)["masking"].shape == picture.shape
    flow.decoder = None  # no reconstruction: one row less
    assert flow.pictures(batch, show)["masking"].shape[1] == picture.shape[1] - 164


@pytest.mark.parametrize("name", MAE)
def test_autocast_stays_finite_and_close(name: str) -> None:
    plain, cast = build(name), build(name)
    expected = plain.total(plain.step(make_batch(8)).terms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cast.total(cast.step(make_batch(8)).terms)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=0.1)
    assert all(p.grad.isfinite().all() for p in cast.parameters() if p.grad is not None)


def test_contrast_alone_has_no_decoder_and_may_see_everything() -> None:
    flow = build("mae_clip", SMALL_PATCHES, "objective.weights.reconstruction=0", "objective.masking.ratio=0")
    assert flow.decoder is None
    assert seen_by(flow, make_batch(8)) == [(8, 17)]
    assert flow.step(make_batch(8)).terms.keys() == {"contrast"}


def test_the_temperature_is_clamped() -> None:
    flow = build("mae_clip")
    with torch.no_grad():
        flow.logit_scale.fill_(9.0)
    flow.update_targets()
    assert flow.logit_scale.item() == pytest.approx(math.log(100))
    assert not build("cmae").logit_scale.requires_grad


# What is refused -----------------------------------------------------------------------------------------------------

SMALL = ["run_folder=x", "image_size=32", *VIT]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["objective=mae", "backbone=resnet"],
            "ResNet has no patch tokens to mask: set backbone to a timm ViT",
        ),
        (["objective=mae", "image_size=40"], "patches of 16 pixels do not fill an image of 40"),
        (["objective=mae", "backbone.image_size=64"], "the views have 32 pixels and the backbone was made for 64"),
        (["objective=mae", "+backbone.global_pool=avg"], "normalises after pooling"),
        (["objective=mae", "+backbone.pretrained=true"], "objective.positions=sincos would replace"),
        (["objective=mae", "objective.masking.ratio=1.0"], "masking.ratio=1.0 would keep nothing"),
        (["objective=mae", "objective.masking.ratio=0.0"], "keeps all 4 patches, so nothing is left to reconstruct"),
        (["objective=mae", "image_size=16"], "keeps all 1 patches"),
        (["objective=mae", "objective.masking.kind=tube"], "set it to random, block or text"),
        (["objective=mae", "objective.masking.kind=text"], "has nothing that knows captions"),
        (["objective=mae_clip", "tokenizer=null"], "reads captions, and tokenizer is null"),
        (["objective=mae_clip_tgm", "tokenizer=null"], "reads captions, and tokenizer is null"),
        (["objective=mae_clip_tgm", "objective.weights.contrast=0"], "has nothing that knows captions"),
        (
            ["objective=mae_clip_tgm", "objective.masking.kind=random", "scorer=open_clip:ViT-B-32/openai"],
            "set one of the two",
        ),
        (
            ["objective=mae", "objective.masking.kind=text", "tokenizer=null", "scorer=open_clip:ViT-B-32/openai"],
            "reads captions here, and tokenizer is null",
        ),
        (["objective=cmae", "views=mae"], "between two views of one size, and views has [32]"),
        (["objective=mae", "eval=emoji"], "eval.zero_shot needs text"),
        (["objective=mae_clip_tgm", "scorer=open_clip:ViT-B-32/openai"], "takes pictures of 224 pixels"),
        (["objective=mae_clip_tgm", "scorer=open_clip:RN50/openai"], "gives no patch features"),
        (["objective=mae_clip_tgm", "scorer=open_clip:ViT-B-16-SigLIP/webli"], "gives no patch features"),
        (["objective=mae_clip_tgm", "scorer=open_clip:ViT-B-33/openai"], "open_clip has no model 'ViT-B-33'"),
        (["objective=mae_clip_tgm", "scorer=nowhere"], "neither open_clip:NAME/TAG nor a run folder"),
    ],
)
def test_what_can_be_known_is_refused_by_the_check(overrides: list[str], words: str) -> None:
    given = {override.split("=")[0] for override in overrides}
    small = [override for override in SMALL if "backbone=resnet" not in overrides or "backbone" not in override]
    cfg = compose([*(override for override in small if override.split("=")[0] not in given), *overrides])
    with pytest.raises(ConfigError) as refused:
        check(cfg)
    assert words in str(refused.value)


def test_scorers_that_do_not_fit_are_refused(tiny_open_clip: str, image_text_run: Path, tmp_path: Path) -> None:
    for name, words in {
        "size": "takes pictures of 64 pixels, and the views have 32: set image_size=64",
        "map": "gives no patch features",
        "words": "reads another vocabulary",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check(compose([*SMALL, "objective=mae_clip_tgm", f"scorer=open_clip:tiny-{name}/none"]))
    with pytest.raises(ConfigError, match=r"trained with data\.mean=\[0\.48"):
        check(compose([*SMALL, "objective=mae_clip_tgm", f"scorer={image_text_run}", "data.mean=[0.5,0.5,0.5]"]))
    save_config(compose(["objective=simclr"]), tmp_path)
    with pytest.raises(ConfigError, match="encodes images only"):
        check(compose([*SMALL, "objective=mae_clip_tgm", f"scorer={tmp_path}"]))
    with pytest.raises(ValueError, match="gives no patch features"):
        PatchScorer("open_clip:RN50/openai")


def test_what_a_notebook_gets_wrong_is_told() -> None:
    flow, batch = build("mae_clip_tgm"), make_batch(8)
    with pytest.raises(ValueError, match="set a tokenizer"):
        flow.step(Batch(views=batch["views"], seed=batch["seed"]))
    with pytest.raises(ValueError, match=r'masks are drawn from batch\["seed"\]'):
        flow.step(Batch(views=batch["views"], text=batch["text"]))
    with pytest.raises(ValueError, match=r"2 view\(s\) of \(32, 32\) pixels are masked, and the batch has"):
        build("cmae").step(Batch(views=batch["views"][1:], seed=batch["seed"]))
    assert not hasattr(build("mae"), "encode_text")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=40, depth=1, num_classes=0)
    for options, words in (
        ({}, "patches of 16 pixels do not fill an image of 40"),
        ({"positions": "none"}, "set it to sincos or learned"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskedViews(vit, **options)
    with pytest.raises(ValueError, match="set it above 0"):
        MaskedViews(flow.backbone, temperature=0.0, weights={"contrast": 1.0})
    with pytest.raises(ValueError, match="temperature_range"):
        MaskedImageText(flow.backbone, flow.text, temperature=2.0)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_masks(run_group: RunGroup, tmp_path: Path) -> None:
    small = [
        "objective=mae_clip_tgm", "smoke=true", *VIT, SMALL_PATCHES, "objective.decoder.dim=32", "text.width=32",
        "objective.decoder.depth=1", "objective.decoder.num_heads=2", "text.layers=1", "optim.lr=1e-3",
        "data.eval=null", "trainer.limit_train_batches=6", "eval=images",
    ]  # fmt: skip
    main([*small, f"run_folder={tmp_path}/whole"])
    kill = ["_target_=tests.signals.SignalAt", "step=2", f"number={int(signal.SIGTERM)}"]
    options = [f"run_folder={tmp_path}/two", *(f"+callbacks.kill.{option}" for option in kill)]
    ((status, out),) = run_group(1, *small, *options)
    assert status == 128 + signal.SIGTERM, out
    main([f"resume={tmp_path}/two", "trust=true", "callbacks.kill.step=-1"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "two"))
