"""Values that are known beforehand; golden numbers and common laws are in the files next to this one."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.contrastive import clip, nt_xent, sigmoid

CHUNKS = pytest.mark.parametrize("chunk", [None, 3])


@CHUNKS
@pytest.mark.parametrize("num", [1, 2, 8])
def test_clip_at_chance(num, chunk):
    same = torch.ones(num, 4)
    assert clip(same, same, logit_scale=100.0, chunk_size=chunk).item() == pytest.approx(math.log(num), abs=1e-5)
    features = torch.randn(num, 4)
    assert clip(features, features, logit_scale=0.0, chunk_size=chunk).item() == pytest.approx(math.log(num), abs=1e-6)


@CHUNKS
@pytest.mark.parametrize("num", [1, 2, 8])
def test_nt_xent_at_chance(num, chunk):
    same = torch.ones(num, 4)
    value = nt_xent(same, same, temperature=0.1, chunk_size=chunk).item()
    assert value == pytest.approx(math.log(2 * num - 1), abs=1e-6)


@CHUNKS
@pytest.mark.parametrize("bias", [0.0, -10.0, 3.0])
def test_sigmoid_at_chance(bias, chunk):
    num = 8
    image, text = torch.eye(2 * num)[:num], torch.eye(2 * num)[num:]
    expected = math.log1p(math.exp(-bias)) + (num - 1) * math.log1p(math.exp(bias))
    value = sigmoid(image, text, logit_scale=10.0, logit_bias=bias, chunk_size=chunk).item()
    assert value == pytest.approx(expected, rel=1e-6)
    if bias == 0:
        assert value == pytest.approx(num * math.log(2), rel=1e-6)


@CHUNKS
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_a_solved_batch_keeps_its_digits(name, chunk):
    """At scale 100 a float32 logit has the step 8e-6; a small loss must neither drown in it nor fall below 0."""
    rng = torch.Generator().manual_seed(0)
    centre, spread, noise = (torch.randn(num, 64, generator=rng, dtype=torch.float64) for num in (1, 16, 16))
    x = centre + 0.4 * spread
    y = x + 0.02 * noise

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if name == "clip":
            return clip(x, y, logit_scale=100.0, chunk_size=chunk)
        return nt_xent(x, y, temperature=0.01, chunk_size=chunk)

    value = loss(x, y).item()
    assert 0 < value < 1e-2
    assert loss(x.float(), y.float()).item() == pytest.approx(value, abs=5e-8)
    assert loss(spread.float(), spread.float()).item() >= 0


@CHUNKS
def test_worst_case_is_the_stated_bound(chunk):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value = clip(x, -x, logit_scale=50.0, chunk_size=chunk).item()
    assert value == pytest.approx(100.0, rel=1e-6)
    assert value <= 2 * 50 + math.log(2)


@CHUNKS
def test_label_smoothing_is_that_of_the_cross_entropy(chunk):
    x, y = (leaf.requires_grad_() for leaf in torch.randn(2, 7, 4, dtype=torch.float64))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    logits, true = scale * F.normalize(x) @ F.normalize(y).T, torch.arange(7)
    expected = sum(F.cross_entropy(each, true, label_smoothing=0.1) for each in (logits, logits.T)) / 2
    value = clip(x, y, logit_scale=scale, label_smoothing=0.1, chunk_size=chunk)
    torch.testing.assert_close(value, expected)
    grads = (torch.autograd.grad(loss, (x, y, scale)) for loss in (value, expected))
    torch.testing.assert_close(*grads)
    for options in ({"label_smoothing": 1.5}, {"label_smoothing": 0.1, "keys": true[:, None]}):
        with pytest.raises(
            ValueError, match=r"label_smoothing=.*; set a number from 0 to 1, without extra_text and keys"
        ):
            clip(x, y, logit_scale=scale, **options)


def test_a_number_and_a_tensor_are_the_same_scale():
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    assert clip(x, y, logit_scale=7.0) == clip(x, y, logit_scale=torch.tensor(7.0))
    assert nt_xent(x, y, temperature=0.5) == nt_xent(x, y, temperature=torch.tensor(0.5))
    assert sigmoid(x, y, logit_scale=7.0, logit_bias=-1.0) == sigmoid(
        x, y, logit_scale=torch.tensor(7.0), logit_bias=torch.tensor(-1.0)
    )
