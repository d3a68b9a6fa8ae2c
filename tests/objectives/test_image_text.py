"""The image-text flow: which terms it computes, temperature, and the authors' numbers for it."""

import math

import pytest
import torch
from torch import nn

from repr.batch import Batch
from repr.losses import contrastive, hypersphere
from repr.objectives.image_text import ImageText
from tests.golden import golden
from tests.objectives.conftest import build


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


def test_captions_are_needed(batch: Batch) -> None:
    del batch["text"]
    with pytest.raises(ValueError, match="set a tokenizer"):
        build("clip").step(batch)
