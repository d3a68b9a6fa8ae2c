"""The order of an epoch that visits each row as often as its own weight says."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from repr.data.epoch_order import Order
from repr.seeds import permute

_EPOCH, _ROWS, _BLOCK = -1, -(2**45), 2**20


class WeightedOrder(Order):
    """The order of an epoch that visits a row of weight w w times: 2 twice, 0.5 in every other epoch, 0 never.

    The rows, permuted once, lie on a line on which each has its weight as length. An epoch visits the points k + s, for
    k = 0, 1, ... and its own shift s: so a row comes floor(w) or ceil(w) times. The shifts are van der Corput's
    sequence (0, 1/2, 1/4, 3/4, ...), so that any 2^m epochs from a multiple of 2^m on visit a row 2^m w times, rounded
    up or down, and none falls behind. A row is found in O(log N); the line takes 8 bytes a row.

    Args:
        weights: (N,) float64, from 0 on.
        seed: the run's seed.

    Raises:
        ValueError: the weights add up to less than one visit.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        self.seed, num = seed, len(weights)
        ends = np.empty(num)
        for first in range(0, num, _BLOCK):
            places = torch.arange(first, min(first + _BLOCK, num))
            ends[first : first + _BLOCK] = weights[permute(places, num, seed, 0, _ROWS).numpy()]
        np.cumsum(ends, out=ends)
        total = float(ends[-1])
        if (visits := round(total)) < 1:
            raise ValueError(
                f"the weights of data.train add up to {total:g}, and an epoch visits a row as often as its weight "
                "says: set larger ones"
            )
        ends /= total
        self._ends = np.multiply(ends, visits, out=ends)  # of the rows on the line, whose length is whole
        self._most = math.ceil(weights.max() * visits / total)  # visits of a row in an epoch
        self.parts = [(num, visits)]
        self.made_with = {
            "hash of data.train's weights": hashlib.sha256(np.ascontiguousarray(weights).data).hexdigest()[:16]
        }

    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64; a row has no visit twice."""
        (num, visits), shift = self.parts[0], int(f"{epoch:b}"[::-1], 2) / 2 ** epoch.bit_length()
        points = permute(positions, visits, self.seed, epoch, _EPOCH).numpy()
        places = np.searchsorted(self._ends, points + shift, side="right")
        starts = np.where(places > 0, self._ends[places - 1], 0.0)
        earlier = points - np.ceil(starts - shift).astype(np.int64)  # visits of the row in this epoch
        rows = permute(torch.from_numpy(places), num, self.seed, 0, _ROWS)
        return torch.stack([torch.from_numpy(epoch * self._most + earlier), rows], dim=1)
