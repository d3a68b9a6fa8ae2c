"""What is evaluated: an encoder with the way in which it takes pictures and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from repr.batch import Batch
from repr.data.views import evaluation_view


@dataclass(frozen=True)
class Encoder:
    """Anything that can be evaluated.

    The module has ``embed(batch) -> Embeddings``, ``backbone`` if it gives feature maps, and
    ``encode_text(tokens) -> (B, D)`` if there is a tokenizer; ``log_likelihood(images, tokens) -> (B, P)`` of captions
    (B, P, L) if there is a ``caption_tokenizer``.
    """

    module: nn.Module
    transform: Callable[[Image.Image], Tensor]  # RGB picture -> (3, S, S), uint8 or normalised float
    image_size: int  # S
    mean: Sequence[float]  # of the channels, of pixels in [0, 1]
    std: Sequence[float]
    tokenizer: Callable[[list[str]], Tensor] | None  # texts -> (B, L) int64; None: it encodes images only
    resize: str = "shorter side to the resolution"  # what the transform does, in words, for the record of a number
    crop: str = "centre"
    interpolation: str = "bicubic"
    caption_tokenizer: Callable[[list[str]], Tensor] | None = None  # as tokenizer; None: it is no captioner
    notes: Sequence[str] = ()  # lines for whoever starts the evaluation

    @classmethod
    def of_objective(
        cls, module: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float], tokenizer: Any
    ) -> Encoder:
        """Take an objective with the evaluation transform of this project, and a tokenizer if it has a text tower."""
        has_text = hasattr(module, "encode_text") and getattr(module, "text", module) is not None
        transform = partial(evaluation_view, size=image_size)
        return cls(
            module,
            transform,
            image_size,
            mean,
            std,
            tokenizer if has_text else None,
            caption_tokenizer=tokenizer if hasattr(module, "log_likelihood") else None,
        )


@torch.no_grad()
def set_size(module: Any, size: int, name: str, own: int | None = None) -> None:
    """Let an encoder take pictures of a size, and try it with a black one.

    Its timm backbone, which was made for the size ``own``, is changed in place if weights depend on it. The error calls
    the encoder ``name``.

    Raises:
        ValueError: it cannot take such pictures.
    """
    try:
        if own not in (None, size) and hasattr(module.backbone, "set_input_size"):
            module.backbone.set_input_size(img_size=(size, size))
        module.embed(Batch(image=torch.zeros(1, 3, size, size)))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(size_fault(name, size, error)) from error


def size_fault(name: str, size: int, error: Exception) -> str:
    """Say why a model cannot take pictures of a size, and what to set."""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"model={name} cannot take pictures of {size} x {size} pixels, and its image size cannot be changed ({why}): "
        "set image_size=null for its own"
    )
