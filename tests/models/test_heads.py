"""Projection and prediction heads."""

import pytest
import torch
from torch import nn

from repr.models.heads import mlp


def test_heads() -> None:
    head = mlp([8, 16, 16, 4], last_norm="plain")
    assert [type(layer).__name__ for layer in head] == [
        "Linear", "SyncBatchNorm", "ReLU", "Linear", "SyncBatchNorm", "ReLU", "Linear", "SyncBatchNorm",
    ]  # fmt: skip
    assert not any(layer.bias is not None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].weight is None
    assert head(torch.randn(5, 8)).mean(0).abs().max() < 1e-5
    assert mlp([8, 4])[0].bias is not None
    assert mlp([8, 4], last_bias=False)[0].bias is None
    with pytest.raises(ValueError, match="affine, plain or null"):
        mlp([8, 4], last_norm="batch")
