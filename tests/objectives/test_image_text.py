"""The image-text flow: which terms it computes, temperature, and the authors' numbers for it."""

import math
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repr.batch import Batch
from repr.config import ConfigError, compose
from repr.config_check import check
from repr.losses import contrastive, hypersphere
from repr.models.freezing import freeze
from repr.objectives.image_text import ImageText
from tests.golden import golden
from tests.objectives.conftest import build, make_batch


class Tower(nn.Module):
    """Passes features on, so that the flow can be fed with the authors' numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = self.output_dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("case", ["c0", "c1", "c3"])
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("clip", {"contrast": 1}),
        ("U", {"uniformity": 1}),
        ("A", {"alignment": 1}),
        ("XU", {"cross_uniformity": 1}),
        ("CUA", {"contrast": 1, "uniformity": 1, "alignment": 1}),
        ("CUAXU", {"contrast": 1, "uniformity": 1, "alignment": 1, "cross_uniformity": 1}),
        ("UAXU_nocontrastive", {"uniformity": 1, "alignment": 1, "cross_uniformity": 1}),
    ],
)
def test_the_flow_equals_the_authors_method(case: str, name: str, weights: dict) -> None:
    data = {
        key.removeprefix(f"{case}."): torch.as_tensor(v)
        for key, v in golden("contrastive_gap").items()
        if key.startswith(case)
    }
    image, text = data["img"].requires_grad_(), data["txt"].requires_grad_()
    flow = ImageText(
        Tower(image.shape[1]), Tower(image.shape[1]), weights=weights, temperature=data["temperature"].item()
    )
    with torch.no_grad():
        flow.image_projection.weight.copy_(torch.eye(image.shape[1]))
    loss = flow.total(flow.step(Batch(views=[image], text=text)).terms)
    loss.backward()
    torch.testing.assert_close(loss, data[f"{name}.f32"], rtol=1e-5, atol=1e-6)
    for ours, theirs in ((image.grad, data[f"{name}.grad_img"]), (text.grad, data[f"{name}.grad_txt"])):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", ["T0.001", "T2"])
def test_the_clamp_equals_the_authors(temperature: str) -> None:
    flow = ImageText(Tower(4), Tower(4))
    with torch.no_grad():
        flow.logit_scale.fill_(-math.log(float(temperature[1:])))
    flow.update_targets()
    assert flow.logit_scale.item() == pytest.approx(
        golden("contrastive_gap")[f"clamp.{temperature}_logit_scale"].item()
    )


def test_only_weighted_terms_are_computed(batch: Batch) -> None:
    def explode(*args: object) -> None:
        raise AssertionError("a term of weight 0 was computed")

    flow = build("clip", "+objective.weights.alignment=0")
    flow.losses["alignment"] = explode
    assert flow.step(batch).terms.keys() == {"contrast"}


def test_losses_are_options(batch: Batch) -> None:
    plain, chunked = build("cuaxu"), build("cuaxu")
    chunked.losses |= {
        "contrast": lambda *x, **k: contrastive.clip(*x, **k, chunk_size=3),
        "uniformity": lambda *x: hypersphere.uniformity(*x, chunk_size=3),
    }
    a, b = plain.step(batch).terms, chunked.step(batch).terms
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_a_fixed_temperature_is_stored_but_not_trained() -> None:
    flow = build("cuaxu")
    assert not flow.logit_scale.requires_grad
    assert flow.state_dict()["logit_scale"].item() == pytest.approx(math.log(100))
    assert build("clip").logit_scale.requires_grad


def test_siglip_has_a_bias_and_clip_has_none() -> None:
    assert build("siglip").logit_bias.item() == -10
    assert build("clip").logit_bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"contrastive": 1}}, "weights names contrastive"),
        ({"weights": {"contrast": 0}}, "all zero"),
        ({"losses": {"align": hypersphere.alignment}}, "losses names align"),
        ({"temperature": 0.001}, "temperature_range"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageText(Tower(4), Tower(4), **options)


@cache
def negclip() -> ImageText:
    return build("negclip", "+objective.weights.pairs=1")


def test_wrong_captions_are_compared_with_every_image() -> None:
    flow, batch, seen = deepcopy(negclip()), make_batch(objective="negclip"), []
    flow.text.register_forward_hook(lambda tower, tokens, output: seen.append(tokens[0]))
    output = flow.step(batch)
    assert [len(tokens) for tokens in seen] == [24]  # all at once
    assert seen[0].any(1).all()
    assert output.logs["hard_captions"].item() == pytest.approx(11 / 8)  # three of eight have a second one
    wrong = flow.encode_text(batch["hard_text"].flatten(0, 1))[batch["hard_text"].flatten(0, 1).any(1)]
    image, text, scale = output.embeddings["image"], output.embeddings["text"], flow.logit_scale.exp()
    expected = contrastive.clip(image, text, logit_scale=scale, extra_text=wrong)
    torch.testing.assert_close(output.terms["contrast"], expected)
    flow.output = output
    assert float(flow.chance(8)["contrast"]) == pytest.approx((math.log(8) + math.log(19)) / 2)
    del batch["hard_text"]
    flow.output = flow.step(batch)
    torch.testing.assert_close(flow.output.terms["contrast"], contrastive.clip(image, text, logit_scale=scale))
    assert flow.chance(8)["contrast"] == pytest.approx(math.log(8))


def test_a_wrong_caption_that_is_right_for_another_sample_can_be_left_out() -> None:
    batch = make_batch(objective="negclip")
    batch["picture"] = torch.arange(8)
    del batch["label"]
    batch["hard_text"] = batch["text"].roll(1, 0)[:, None]
    keep, mask = negclip(), deepcopy(negclip())
    mask.compared = ("picture", "text")
    of_keep, of_mask = keep.step(batch), mask.step(batch)
    assert of_mask.terms["contrast"] < of_keep.terms["contrast"]
    image, text = of_mask.embeddings["image"], of_mask.embeddings["text"]
    keys = torch.cat([torch.arange(8), (torch.arange(8) - 1) % 8])[:, None]
    options = {"logit_scale": mask.logit_scale.exp(), "extra_text": text.roll(1, 0), "keys": keys}
    torch.testing.assert_close(of_mask.terms["contrast"], contrastive.clip(image, text, **options))


def test_pairs_are_of_neighbours(batch: Batch) -> None:
    flow = deepcopy(negclip())
    batch["mated"] = torch.arange(8) < 4
    output = flow.step(batch)
    image, text = (output.embeddings[name][:4] for name in ("image", "text"))
    torch.testing.assert_close(
        output.terms["pairs"], contrastive.pairs(image, text, logit_scale=flow.logit_scale.exp())
    )
    flow._trainer = SimpleNamespace(datamodule=SimpleNamespace(neighbours=None))
    with pytest.raises(ValueError, match=r"batches have none: set data\.neighbours=items"):
        flow.setup("fit")
    flow.setup("validate")


def test_an_objective_without_captions_to_compare_refuses_wrong_ones() -> None:
    with pytest.raises(ConfigError, match="learns nothing from wrong captions: set hard_captions=none"):
        check(compose(["objective=cua", "objective.weights.contrast=0", "hard_captions=exchange"]))


@cache
def with_dropped_patches() -> ImageText:
    return build("clip", "+backbone.patch_size=8", "+backbone.patch_drop_rate=0.5", "optim.schedule=constant")


def test_a_locked_tower_does_not_move(batch: Batch) -> None:
    flow = deepcopy(with_dropped_patches())
    freeze(flow, {"backbone": 0})
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    optimizer, _ = flow.optim.build(flow, 1)
    flow.train()
    flow.total(flow.step(batch).terms).backward()
    optimizer.step()
    moved = {name for name, parameter in flow.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[0] for name in moved} == {"text", "image_projection", "logit_scale"}


def test_dropped_patches_are_not_encoded_and_come_from_the_generator_of_torch(batch: Batch) -> None:
    flow, seen = deepcopy(with_dropped_patches()), []
    flow.backbone.blocks[0].register_forward_hook(lambda block, tokens, output: seen.append(tokens[0].shape[1]))
    losses = [torch.manual_seed(seed) and flow.step(batch).terms["contrast"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    flow.eval()
    assert flow.step(batch).terms["contrast"] == flow.step(batch).terms["contrast"]
    assert seen == [9, 9, 9, 17, 17]  # and the class token


def test_captions_are_needed(batch: Batch) -> None:
    del batch["text"]
    with pytest.raises(ValueError, match="set a tokenizer"):
        build("clip").step(batch)


def test_every_view_is_compared_with_every_further_caption(batch: Batch) -> None:
    """The mean over pairs; the losses themselves are the authors' in tests/losses/test_golden_rocket.py."""
    part = build("clip_rocket").parts["local"]
    batch["views"] = batch["views"][:3]
    found = part.step(batch).terms["contrast"]
    images = [part.encode_image(view) for view in batch["views"]]
    texts = [part.encode_text(tokens) for tokens in batch["texts"].unbind(1)]
    options = {"logit_scale": part.logit_scale.exp(), "label_smoothing": 0.1}
    pairs = [contrastive.clip(image, text, **options) for image in images for text in texts]
    assert len(pairs) == 6
    torch.testing.assert_close(found, torch.stack(pairs).mean())
    del batch["texts"]
    with pytest.raises(ValueError, match="set distorted_captions=shuffled"):
        part.step(batch)


def test_further_captions_are_asked_for_where_they_are_read_and_refused_where_not() -> None:
    with pytest.raises(ConfigError, match="set distorted_captions=shuffled"):
        check(compose(["objective=clip_rocket", "distorted_captions=none"]))
    with pytest.raises(ConfigError, match="reads one caption of a sample: set distorted_captions=none"):
        check(compose(["objective=clip", "distorted_captions=shuffled"]))
