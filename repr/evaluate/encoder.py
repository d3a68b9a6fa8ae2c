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

    Args:
        module: has ``embed(batch) -> Embeddings``, ``backbone`` if it gives feature maps, and
            ``encode_text(tokens) -> (B, D)`` if there is a tokenizer.
        transform: RGB picture -> (3, S, S), uint8 or normalised float.
        image_size: S.
        mean: of the channels, of pixels in [0, 1].
        std: likewise.
        tokenizer: list of texts -> (B, L) int64; None: it encodes images only.
        resize: what the transform does, in words, for the protocol.
        crop: likewise.
        interpolation: likewise.
        notes: lines for whoever starts the evaluation.
    """

    module: nn.Module
    transform: Callable[[Image.Image], Tensor]
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    tokenizer: Callable[[list[str]], Tensor] | None
    resize: str = "shorter side to the resolution"
    crop: str = "centre"
    interpolation: str = "bicubic"
    notes: Sequence[str] = ()

    @classmethod
    def of_objective(
        cls, module: nn.Module, image_size: int, mean: Sequence[float], std: Sequence[float], tokenizer: Any
    ) -> Encoder:
        """An objective with the evaluation transform of this project; without text tower it needs no tokenizer."""
        has_text = hasattr(module, "encode_text") and getattr(module, "text", module) is not None
        transform = partial(evaluation_view, size=image_size)
        return cls(module, transform, image_size, mean, std, tokenizer if has_text else None)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the transform does, in words and numbers."""
        words = {"resize": self.resize, "crop": self.crop, "interpolation": self.interpolation}
        return {"resolution": self.image_size, **words, "mean": list(self.mean), "std": list(self.std)}

    @property
    def has_maps(self) -> bool:
        """Whether its image tower is one of timm's that give feature maps."""
        return hasattr(getattr(self.module, "backbone", None), "forward_intermediates")


def resize(backbone: nn.Module, size: int, own: int, name: str) -> None:
    """Let a timm model take pictures of another size, where its weights depend on it.

    Args:
        backbone: changed in place.
        size: side in pixels.
        own: the size that it was made for.
        name: what the error calls it.

    Raises:
        ValueError: it cannot.
    """
    change: Any = getattr(backbone, "set_input_size", None)
    if size == own or change is None:  # without the method it either takes any size or fails in check_size
        return
    try:
        change(img_size=(size, size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(size_fault(name, size, error)) from error


@torch.no_grad()
def check_size(module: Any, size: int, name: str) -> None:
    """Give an encoder one black picture.

    Raises:
        ValueError: it cannot take pictures of that size.
    """
    try:
        module.embed(Batch(image=torch.zeros(1, 3, size, size)))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(size_fault(name, size, error)) from error


def size_fault(name: str, size: int, error: Exception) -> str:
    """What to tell where a model cannot take pictures of a size."""
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"model={name} cannot take pictures of {size} x {size} pixels, and its image size cannot be changed ({why}): "
        "set image_size=null for its own"
    )
