"""What flows with a tower for pictures and one for texts share: captions, projection, temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from repr.batch import Batch
from repr.models.backbone import width_of


def captions(batch: Batch) -> Tensor:
    """The captions of a batch, (B, L) token ids; where it has none, a ValueError says what to set."""
    if "text" not in batch:
        raise ValueError("captions are needed here: set data.tokenizer and a source that has them")
    return batch["text"]


def image_projection(backbone: nn.Module, text: nn.Module) -> nn.Linear:
    """A linear layer from the backbone's width to that of the text tower, without bias, with CLIP's initial weights."""
    width = width_of(backbone)
    projection = nn.Linear(width, width_of(text, "output_dim"), bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def logit_scale(temperature: float, temperature_range: tuple[float, float], *, learned: bool) -> nn.Parameter:
    """The logarithm of 1 / temperature, as open_clip has it.

    It is a parameter even when it is fixed, so that checkpoints and exports hold it under open_clip's name.

    Raises:
        ValueError: the temperature lies outside of its range.
    """
    low, high = temperature_range
    if not 0 < low <= temperature <= high:
        raise ValueError(f"objective.temperature={temperature} lies outside temperature_range=({low}, {high})")
    return nn.Parameter(torch.tensor(-math.log(temperature)), learned)


@torch.no_grad()
def clamp_scale(scale: nn.Parameter, temperature_range: tuple[float, float]) -> None:
    """Clamp what :func:`logit_scale` made, in place, so that the temperature stays in its range."""
    low, high = temperature_range
    scale.clamp_(-math.log(high), -math.log(low))
