"""Which dimensions of an embedding count for a pair of classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from repr.models.batchnorm import SyncBatchNorm

GateKind = Literal["fused", "product"]


class Gate(nn.Module):
    """How far each dimension is open, in (0, 1), for two classes: (N,), (N,) int64 -> (N, dim), in either order.

    With ``E`` a learned vector of each class, and ``f`` ReLU, BatchNorm, Linear, ReLU, BatchNorm, Linear::

        fused:    g(a, b) = sigmoid f((E_a + E_b) / 2)
        product:  g(a, b) = sigmoid f(E_a) sigmoid f(E_b)

    BatchNorm sees the pairs of all ranks. A class below 0, of a sample without label, counts as class 0.

    Source: Wu et al., 2024 (Hydra, later SimLAP), arXiv:2410.18200, and the authors' code.

    Args:
        num_classes: so many.
        dim: of the embedding.
        kind: ``fused`` or ``product``.
        class_dim: width of a class's vector.
        hidden_dim: of the hidden layer.

    Raises:
        ValueError: there is no such kind.
    """

    def __init__(
        self, num_classes: int, dim: int, *, kind: GateKind = "fused", class_dim: int = 512, hidden_dim: int = 1024
    ) -> None:
        super().__init__()
        if kind not in ("fused", "product"):
            raise ValueError(f"gate={kind}; set it to fused, product or open")
        self.kind = kind
        self.classes = nn.Embedding(num_classes, class_dim)
        self.mlp = nn.Sequential(
            nn.ReLU(),
            SyncBatchNorm(class_dim),
            nn.Linear(class_dim, hidden_dim),
            nn.ReLU(),
            SyncBatchNorm(hidden_dim),
            nn.Linear(hidden_dim, dim),
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The gates of pairs of classes."""
        first, second = self.classes(a.clamp(min=0)), self.classes(b.clamp(min=0))
        if self.kind == "fused":
            return self.mlp((first + second) / 2).sigmoid()
        return self.mlp(first).sigmoid() * self.mlp(second).sigmoid()
