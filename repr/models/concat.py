"""Several encoders as one: their outputs side by side, with one norm or one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Norm = Literal["joined", "each"]


def join(outputs: Sequence[Tensor], norm: Norm) -> Tensor:
    """Put embeddings (B, D_s) of the same samples side by side: (B, sum of D_s), of unit length.

    With ``joined`` there is one L2 norm over all, so that an encoder with longer outputs counts more; with ``each``
    every encoder's output is brought to unit length first, so that all count alike.

    Source: MCL (Zhang et al., 2024, arXiv 2402.11816), whose authors join raw outputs.
    """
    if norm == "each":
        outputs = [F.normalize(output.float(), dim=1) for output in outputs]
    return F.normalize(torch.cat([output.float() for output in outputs], dim=1), dim=1)


class Concat(nn.Module):
    """Encoders (B, ...) -> (B, D_s) of the same images or token ids, as one; ``norm`` is that of :func:`join`.

    ``num_features`` and ``output_dim``, the names of backbones and of text towers, are the sum of the encoders' own.

    Raises:
        ValueError: no encoder, or an unknown norm.
    """

    def __init__(self, encoders: Sequence[nn.Module], *, norm: Norm = "joined") -> None:
        super().__init__()
        if not encoders:
            raise ValueError("Concat joins one encoder or more, and got none")
        if norm not in ("joined", "each"):
            raise ValueError(f"norm is '{norm}'; set it to joined (one norm over all) or each (one for each encoder)")
        self.encoders, self.norm = nn.ModuleList(encoders), norm
        widths: list[Any] = [getattr(e, "num_features", None) or getattr(e, "output_dim", 0) for e in encoders]
        self.num_features = self.output_dim = sum(widths)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, ...) -> (B, num_features), of unit length, float32."""
        return join([encoder(inputs) for encoder in self.encoders], self.norm)


class Encoder(nn.Module):
    """A method (B, ...) -> (B, num_features) of a module, such as ``encode_image``, as a module of its own."""

    def __init__(self, module: nn.Module, method: str, num_features: int) -> None:
        super().__init__()
        self.module, self.method, self.num_features = module, method, num_features

    def forward(self, inputs: Tensor) -> Tensor:
        """Call the method."""
        return getattr(self.module, self.method)(inputs)
