"""More positives: what lies beyond an embedding, seen from the other view's."""

from __future__ import annotations

from torch import Tensor, nn

from repr.losses.features import normalise


class Hallucinator(nn.Module):
    """Make of a query what shares less with its key: (N, D), (N, D), (N, 1) -> (N, D), of length 1.

    With ``u`` and ``v`` the normalised query and key::

        e = u + share (u - v),    h = W2 relu(W1 e + b1) + b2

    A flow draws ``share`` from [0, ``bound``), one a sample. Where both are
    equal, so is ``e``. The map is one of all samples, without BatchNorm, and is left behind after training.

    Source: ours, after Wu et al., 2023 (Hallucinator), arXiv:2307.12168, who have published no code. It is no
    reproduction.

    Args:
        dim: D.
        bound: of the share.

    Raises:
        ValueError: the bound is below 0.
    """

    def __init__(self, dim: int, bound: float) -> None:
        super().__init__()
        if bound < 0:
            raise ValueError(f"extrapolation={bound}; set it to 0 or more")
        self.bound = bound
        self.map = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, query: Tensor, key: Tensor, share: Tensor) -> Tensor:
        """The hallucinated rows."""
        beyond = extrapolated(query, key, share)  # float32, whatever the weights are
        return normalise(self.map(beyond.to(next(self.map.parameters()).dtype)))


def extrapolated(query: Tensor, key: Tensor, share: Tensor) -> Tensor:
    """On the great circle through key and query, beyond the query: (N, D), not of length 1."""
    u, v = normalise(query), normalise(key)
    return u + share * (u - v)
