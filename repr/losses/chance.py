"""Values of the losses at chance: what a model is worth that has learned nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.losses.captioning import caption
from repr.losses.clustering import swapped_pairs, swapped_prediction
from repr.losses.contrastive import clip, cross_nt_xent, nt_xent, pairs, sigmoid
from repr.losses.decorrelation import covariance, cross_correlation, invariance
from repr.losses.features import Scalar
from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from repr.losses.mixup import mixed_contrast, soft_clip
from repr.losses.pixel import pixel_consistency
from repr.losses.reconstruction import masked_mse


def _sigmoid(num_rows: int, logit_bias: Scalar, num_extra: float | Tensor = 0.0, **_: Any) -> Tensor:
    """All cosines 0, at the bias that the logits have now."""
    bias = torch.as_tensor(logit_bias, dtype=torch.float32).detach()
    return F.softplus(-bias) + (num_rows + num_extra - 1) * F.softplus(bias)


def _clip(num_rows: int, num_extra: float | Tensor = 0.0, **_: Any) -> Scalar:
    """Texts among images, and images among texts and the further ones."""
    num_texts = num_rows + num_extra
    return (math.log(num_rows) + (num_texts.log() if isinstance(num_texts, Tensor) else math.log(num_texts))) / 2


# (num_rows, dim, all options of the loss) -> value; each loss's docstring says what chance means. Variance has none.
LEVELS: Mapping[Callable, Callable[..., Scalar]] = {
    clip: _clip,
    sigmoid: _sigmoid,
    pairs: lambda **_: math.log(2),
    mixed_contrast: lambda num_rows, **_: math.log(num_rows),
    soft_clip: lambda num_rows, **_: math.log(num_rows),
    cross_nt_xent: lambda num_rows, **_: math.log(num_rows),
    nt_xent: lambda num_rows, **_: math.log(2 * num_rows - 1),
    alignment: lambda alpha, **_: 2 ** (alpha / 2),
    uniformity: lambda t, **_: -2 * t,
    cross_uniformity: lambda t, **_: -2 * t,
    invariance: lambda **_: 2.0,
    covariance: lambda num_rows, dim, **_: (dim - 1) / (num_rows - 1),
    cross_correlation: lambda num_rows, dim, off_diagonal_weight, **_: (
        dim + off_diagonal_weight * dim * (dim - 1) / num_rows
    ),
    swapped_prediction: lambda dim, **_: math.log(dim),
    swapped_pairs: lambda num_rows, **_: math.log(num_rows),
    pixel_consistency: lambda **_: 0.0,
    masked_mse: lambda dim, **_: 1 - 1 / dim,
    caption: lambda dim, **_: math.log(dim),
}


def at_chance(loss: Callable, *, num_rows: int = 0, dim: int = 0, **options: Any) -> Scalar | None:
    """The value of a loss for features without relation; None where it has no such value, or is not one of ours.

    Args:
        loss: one of :mod:`repr.losses`, or a ``functools.partial`` of it, whose options count.
        num_rows: N, samples of the global batch; like ``dim`` needed where the level depends on it.
        dim: D, width of the features; prototypes of ``swapped_prediction``, values a patch of ``masked_mse``, words of
            ``caption``.
        options: what else the flow calls it with; ``num_extra`` is how many of ``extra_text`` count, of all processes.
    """
    function: Any = loss
    while isinstance(function, partial):
        function = function.func
    if function not in LEVELS:
        return None
    given = {name: parameter.default for name, parameter in inspect.signature(loss).parameters.items()}
    return LEVELS[function](**{**given, **options}, num_rows=num_rows, dim=dim)
