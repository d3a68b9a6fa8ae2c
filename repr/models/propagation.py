"""PixPro's pixel propagation module."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repr.losses.features import normalise
from repr.losses.precision import full_precision
from repr.models.heads import mlp

_NUM_SLICES = 8  # of the images, whose similarities are held one slice at a time


class Propagation(nn.Module):
    """Replace every cell of a map by a mean of all cells that resemble it.

    With ``f`` the normalised cells and ``v`` their normalised transforms::

        y_i = sum_j max(<f_i, f_j>, 0)^gamma v_j

    over all cells j of the image, i among them. The weights do not sum to one, and gradients pass through both factors.

    Source: Xie et al., 2021 (PixPro), arXiv:2011.10043, equations 3 and 4, gamma 2, one layer; ``v`` is normalised in
    the authors' code, not in the paper. Always float32 (float64 if the input is), also under autocast. Similarities,
    N x HW x HW, are held for an eighth of the images at a time, and computed again in backward.

    Args:
        dim: C.
        gamma: sharpness of the weights.
        num_layers: linear layers of the transform, with BatchNorm and ReLU between them; 0: none.

    Raises:
        ValueError: gamma is not above 0, or a negative number of layers.
    """

    def __init__(self, dim: int, *, gamma: float, num_layers: int) -> None:
        super().__init__()
        if not gamma > 0 or num_layers < 0:
            raise ValueError(f"propagation: gamma={gamma}, num_layers={num_layers}; set gamma > 0 and num_layers >= 0")
        self.gamma = gamma
        self.values = mlp([dim] * (num_layers + 1)) if num_layers else nn.Identity()

    def forward(self, cells: Tensor) -> Tensor:
        """(N, C, HW) -> (N, C, HW), not normalised."""
        values = self.values(cells.mT.flatten(0, 1)).unflatten(0, (len(cells), -1)).mT
        with full_precision(cells):
            dtype = torch.promote_types(cells.dtype, torch.float32)
            f, v = normalise(cells.to(dtype)), normalise(values.to(dtype))
            slices = zip(f.chunk(_NUM_SLICES), v.chunk(_NUM_SLICES), strict=True)
            # Nothing in it is random.
            again = partial(checkpoint, _mix, gamma=self.gamma, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([again(*part) for part in slices])


def _mix(f: Tensor, v: Tensor, gamma: float) -> Tensor:
    weights = torch.bmm(f.mT, f).relu_()  # (N, HW, HW), symmetric
    if gamma < 1:
        weights = weights + 1e-6  # whose slope at 0 is finite
    return torch.bmm(v, weights.pow(gamma))
