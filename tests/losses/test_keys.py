"""Pairs that are no negatives, since they have a key in common, take no part in a loss."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from repr.losses.contrastive import clip, nt_xent, sigmoid
from tests.losses.test_laws import pairs

NUM = 7
# Rows 0 and 3 have one picture, 3 and 5 one caption, which makes nothing of 0 and 5; the rest is alone.
KEYS = torch.tensor([[0, 10], [1, 11], [2, 12], [0, 13], [4, 14], [5, 13], [6, 16]])
SAME = (KEYS.unsqueeze(1) == KEYS).any(2)
FALSE = SAME & ~torch.eye(NUM, dtype=torch.bool)


def naive(name: str, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss from the whole matrix of logits."""
    x, y = F.normalize(x), F.normalize(y)
    logits = (scale * x @ y.T).masked_fill(FALSE, -torch.inf)
    true = torch.arange(NUM)
    if name == "clip":
        return (F.cross_entropy(logits, true) + F.cross_entropy(logits.T, true)) / 2
    if name == "sigmoid":
        signs = 2 * torch.eye(NUM, dtype=torch.float64) - 1
        return -F.logsigmoid(signs * (scale * x @ y.T - 3)).masked_fill(FALSE, 0).sum() / NUM
    z = torch.cat([x, y])
    logits = (scale * z @ z.T).masked_fill(
        SAME.repeat(2, 2) & ~torch.eye(NUM).roll(0, 0).bool().repeat(2, 2), -torch.inf
    )
    return F.cross_entropy(logits.masked_fill(torch.eye(2 * NUM).bool(), -torch.inf), torch.cat([true + NUM, true]))


def ours(name: str, x: Tensor, y: Tensor, scale: Tensor, **options: object) -> Tensor:
    if name == "clip":
        return clip(x, y, logit_scale=scale, **options)
    if name == "sigmoid":
        return sigmoid(x, y, logit_scale=scale, logit_bias=-3.0, **options)
    return nt_xent(x, y, temperature=1 / scale, **options)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", ["clip", "sigmoid", "nt_xent"])
def test_value_and_gradient_are_those_of_the_masked_matrix(name, chunk):
    leaves = [*pairs(NUM), torch.tensor(20.0, dtype=torch.float64, requires_grad=True)]
    value, expected = ours(name, *leaves, chunk_size=chunk, keys=KEYS), naive(name, *leaves)
    torch.testing.assert_close(value, expected)
    assert value < ours(name, *leaves)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("name", ["clip", "sigmoid", "nt_xent"])
def test_keys_that_nothing_shares_change_nothing(name):
    leaves = [*pairs(NUM), torch.tensor(20.0)]
    assert torch.equal(ours(name, *leaves, keys=torch.arange(2 * NUM).view(NUM, 2)), ours(name, *leaves))


def test_where_all_show_the_same_there_is_nothing_to_tell_apart():
    x, y = pairs(NUM)
    value = clip(x, y, logit_scale=20.0, keys=torch.zeros(NUM, 1, dtype=torch.long))
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(value, (x, y)))
