"""I-JEPA: the authors' network, blocks and contexts, a step, and what is refused."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.losses.reconstruction import feature_prediction
from repr.models.decoder import Decoder
from repr.models.masking import encode_kept, take
from repr.models.target_blocks import TargetBlocks
from repr.models.teacher import Teacher
from repr.objectives.jepa import JEPA
from tests.golden import golden
from tests.objectives.conftest import VIT, build, make_batch

FILE = golden("ijepa")
GRID, SEED = (16, 16), torch.arange(400)


def authors_network(data: dict[str, Tensor]) -> tuple[nn.Module, nn.Module, Decoder]:
    """timm's ViTs and our decoder with the stored weights, mapped by name."""
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    vits = []
    for part in ("encoder", "target"):
        vit = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg", fc_norm=False, **options
        )
        vit.load_state_dict({k.removeprefix(f"{part}."): v for k, v in data.items() if k.startswith(f"{part}.")})
        vits.append(vit)
    decoder = Decoder(16, (4, 4), 16, dim=8, depth=1, num_heads=2, mlp_ratio=2, num_prefix_tokens=0)
    state = {key.removeprefix("predictor."): value for key, value in data.items() if key.startswith("predictor.")}
    torch.testing.assert_close(decoder.positions, state.pop("predictor_pos_embed")[0], rtol=0, atol=1e-6)
    renamed = {
        "predictor_embed": "embed",
        "predictor_blocks": "blocks",
        "predictor_norm": "norm",
        "predictor_proj": "predict",
    }
    for theirs, ours in renamed.items():
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    decoder.load_state_dict(state)
    return vits[0], vits[1], decoder


@pytest.mark.parametrize("case", ["full_a", "full_two_contexts"])
def test_the_network_equals_the_authors(case: str) -> None:
    """Predictions are in the order of blocks, of contexts, of pictures."""
    data = {key.removeprefix(f"{case}/"): torch.tensor(FILE[key]) for key in FILE if key.startswith(f"{case}/")}
    vit, teacher, decoder = authors_network(data)
    contexts, blocks = data["masks_enc"], data["masks_pred"]
    num = len(contexts)
    kept = torch.cat([encode_kept(vit, data["images"], ids) for ids in contexts])
    torch.testing.assert_close(kept, data["context_tokens"], rtol=1e-4, atol=1e-5)
    ids = torch.cat([block.repeat(num, 1) for block in blocks])
    pred = decoder.forward_from(kept.repeat(len(blocks), 1, 1), contexts.flatten(0, 1).repeat(len(blocks), 1), ids)
    torch.testing.assert_close(pred, data["predictions"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = teacher.forward_features(data["images"])
    target = take(whole.repeat(num * len(blocks), 1, 1), ids)
    normalised = nn.functional.layer_norm(target, target.shape[-1:])
    torch.testing.assert_close(normalised, data["targets"], rtol=1e-4, atol=1e-5)
    loss = feature_prediction(pred, target)
    torch.testing.assert_close(loss, data["loss"], rtol=1e-5, atol=1e-6)
    loss.backward()
    ours = {f"encoder.{name}": p.grad for name, p in vit.named_parameters()}
    named = {
        "embed": "predictor_embed",
        "blocks": "predictor_blocks",
        "norm": "predictor_norm",
        "predict": "predictor_proj",
    }
    for name, p in decoder.named_parameters():
        first, _, rest = name.partition(".")
        ours[f"predictor.{named.get(first, first)}{'.' if rest else ''}{rest}"] = p.grad
    theirs = {key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")}
    assert theirs
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_the_momentum_rises_along_a_line_as_the_authors_does() -> None:
    expected = FILE["momentum/value_f64"].tolist()
    teacher = Teacher(momentum=expected[0], final_momentum=expected[-1], schedule="linear", backbone=nn.Linear(2, 2))
    found = [teacher.momentum_at(step, len(expected) - 1) for step in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("step", range(6))
def test_blocks_and_contexts(step: int) -> None:
    context, blocks = TargetBlocks().draw(SEED, GRID, step=step)
    rows, columns = blocks // 16, blocks % 16
    height, width = (x.amax(2) - x.amin(2) + 1 for x in (rows, columns))
    assert len({*height.flatten().tolist()}) == len({*width.flatten().tolist()}) == 1  # of all pictures alike
    area, aspect = (height * width)[0, 0].item(), (height / width)[0, 0].item()
    assert area == blocks.shape[2]  # a rectangle
    assert all(len(set(block.tolist())) == area for block in blocks[:9].flatten(0, 1))
    assert 0.13 <= area / 256 <= 0.22
    assert 0.65 <= aspect <= 1.75
    assert context.shape == (400, 256 - 4 * area)
    for seen, hidden in zip(context, blocks, strict=True):
        assert not set(seen.tolist()) & set(hidden.flatten().tolist())
        assert len(set(seen.tolist())) == len(seen)
    tops = rows.amin(2).flatten()
    assert (tops.min(), tops.max()) == (0, 16 - height[0, 0])  # everywhere


def test_blocks_are_as_large_as_the_authors() -> None:
    theirs = [FILE[f"masks/batch{i}.pred"].shape[2] for i in range(4)]
    ours = [math.prod(TargetBlocks().sizes(GRID, step)[0]) for step in range(50)]
    assert min(ours) <= min(theirs) <= max(theirs) <= max(ours)
    assert len(set(ours)) > 5
    assert [TargetBlocks().sizes((4, 4), step)[0] for step in range(20)].count((2, 2)) == 0  # nothing would be left


def test_blocks_are_those_of_the_sample_at_the_step() -> None:
    """Whatever batch it comes in, and on whatever process."""
    blocks = TargetBlocks()
    whole, part = blocks.draw(SEED, GRID, step=3), blocks.draw(SEED[7:9], GRID, step=3)
    assert all(torch.equal(x[7:9], y) for x, y in zip(whole, part, strict=True))
    assert not torch.equal(blocks.draw(SEED + 1000, GRID, step=3)[1], whole[1])


def test_a_step_is_what_it_says() -> None:
    flow, batch = build("ijepa"), make_batch(8)
    flow.step_number = 2
    context, blocks = flow.blocks.draw(batch["seed"], (8, 8), step=2)
    seen: list[tuple[int, ...]] = []
    flow.backbone.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    output = flow.step(batch)
    assert seen == [(8, 1 + context.shape[1])]  # the teacher has hooks of its own
    images = batch["views"][0]
    tokens = encode_kept(flow.backbone, images, context)[:, 1:]
    whole = flow.teacher.backbone.forward_features(images)[:, 1:]
    losses = [
        feature_prediction(flow.decoder.forward_from(tokens, context, block), take(whole, block))
        for block in blocks.unbind(1)
    ]
    torch.testing.assert_close(output.terms["features"], torch.stack(losses).mean())
    assert output.embeddings["context"].shape == (8, 32)
    assert flow.embed(Batch(image=images)).trunk.shape == (8, 32)


def test_blocks_are_predicted_together_by_one_pass() -> None:
    """What they see is the context and each other, which is another loss than that of blocks one by one."""
    flow, batch = build("ijepa", "+objective.together=true"), make_batch(8)
    context, blocks = flow.blocks.draw(batch["seed"], (8, 8), step=0)
    seen: list[tuple[int, ...]] = []
    flow.decoder.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
    output = flow.step(batch)
    assert seen == [(8, blocks[0].numel())]  # one pass
    images, ids = batch["views"][0], blocks.flatten(1)
    tokens = encode_kept(flow.backbone, images, context)[:, 1:]
    whole = flow.teacher.backbone.forward_features(images)[:, 1:]
    expected = feature_prediction(flow.decoder.forward_from(tokens, context, ids), take(whole, ids))
    torch.testing.assert_close(output.terms["features"], expected)
    apart = build("ijepa").step(batch).terms["features"]
    assert not torch.allclose(output.terms["features"], apart)


SMALL = ["run_folder=x", "image_size=32", "embed_dim=32"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["backbone=resnet"], "ResNet has no patch tokens to mask: set backbone to a timm ViT"),
        (["backbone=vit_s16"], "4 blocks of a picture of 4 patch(es) leave nothing to predict them from: set a"),
        (["objective.decoder.dim=30"], "objective.decoder.dim=30; set it to a multiple of 4"),
        (["views=none"], "JEPA masks a view, and views is empty"),
        (["objective.blocks.num=1.5"], "objective.blocks.num takes a whole number, such as 4, and is 1.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_refused_by_the_check(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(compose(["objective=ijepa", *SMALL, *options]))
    assert told in str(refused.value)


def test_what_a_notebook_gets_wrong_is_told() -> None:
    flow, batch = build("ijepa"), make_batch(8)
    with pytest.raises(ValueError, match=r'blocks are drawn from batch\["seed"\]'):
        flow.step(Batch(views=batch["views"]))
    with pytest.raises(ValueError, match=r"views of \(32, 32\) pixels are masked; got \(16, 16\)"):
        flow.step(Batch(views=batch["views"][2:], seed=batch["seed"]))
    with pytest.raises(ValueError, match="has no patch tokens"):
        JEPA(timm.create_model("resnet18", num_classes=0))
    for options, told in (
        ({"num": 0}, "num=0 blocks of up to 0.2 of a picture leave nothing"),
        ({"num": 5}, "num=5 blocks of up to 0.2 of a picture leave nothing"),
        ({"scale": (0.2, 0.1)}, "set two numbers above 0, up to 1, the smaller first"),
        ({"context": (0.5,)}, "set two numbers above 0"),
        ({"aspect": 1.0}, "aspect=1.0; set two numbers above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            TargetBlocks(**options)
    with pytest.raises(ValueError, match=r"4 blocks of a picture of 4 patch\(es\) leave nothing"):
        TargetBlocks().draw(SEED, (2, 2), step=0)


def test_a_class_token_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="JEPA trains the patches of vit_small_patch16_224, not its class token"):
        check(compose(["objective=ijepa", *SMALL, *VIT, "+backbone.patch_size=4"]))
