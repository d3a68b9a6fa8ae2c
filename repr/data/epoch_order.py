"""Which rows an epoch visits, and in which order: functions of (seed, epoch) alone, without state in workers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repr.seeds import epoch_order, permutation


class Place(NamedTuple):
    """A place in an epoch and the row that stands there."""

    epoch: int
    visit: int  # how often the row was visited before; the epoch, where every epoch visits every row once
    row: int


class Order(ABC):
    """Which rows an epoch visits, and in which order.

    Attributes:
        parts: (number of rows, visits an epoch) of each part of the data set, in the order of its rows.
        made_with: what the order depends on besides parts, seed and the size of a batch; None: nothing.
    """

    parts: list[tuple[int, int]]
    made_with: str | None = None

    def __len__(self) -> int:
        """Visits an epoch."""
        return sum(visits for _, visits in self.parts)

    @abstractmethod
    def rows(self, epoch: int) -> Tensor:
        """Visit and row of every place of an epoch: (len, 2) int64."""

    @abstractmethod
    def ring(self, place: Place) -> Tensor:
        """Visit and row of the places among which another is sought for a row that cannot be read: (M, 2) int64."""

    def replacement(self, place: Place, attempt: int, batch_size: int) -> Place:
        """What stands in for a row that cannot be read: the row in the same place of the next batch of its ring.

        If the ring has two batches or more, that row is none of the own batch, where a contrastive loss would take the
        copy for a negative; and two rows of a batch never get the same one.

        Args:
            place: of the row that cannot be read.
            attempt: from 1; further ones are batches further on, until the ring is exhausted.
            batch_size: of all ranks together.
        """
        ring = self.ring(place)
        number = int(((ring[:, 0] == place.visit) & (ring[:, 1] == place.row)).nonzero()[0])
        round_trip = len(ring) // math.gcd(batch_size, len(ring))  # after so many batches one is back at the start ...
        step = attempt * batch_size + attempt // round_trip  # ... and goes on with the place beside it
        return Place(place.epoch, *ring[(number + step) % len(ring)].tolist())


class EpochOrder(Order):
    """The order of an epoch that shuffles all rows.

    Of a part with weight w, an epoch visits w times as many rows as it has, pass by pass: with w = 0.5 two epochs make
    one pass, with w = 2 an epoch makes two.

    Args:
        parts: (number of rows, weight) of each part of the data set, in the order of its rows.
        seed: the run's seed.

    Raises:
        ValueError: a weight is so small that an epoch visits nothing of its part.
    """

    def __init__(self, parts: Sequence[tuple[int, float]], seed: int) -> None:
        self.parts, self.seed = [(num, round(num * weight)) for num, weight in parts], seed
        for (num, visits), (_, weight) in zip(self.parts, parts, strict=True):
            if visits < 1:
                raise ValueError(f"weight {weight} of a source of {num} rows visits none of them; set a larger one")
        self._cached: tuple[int, Tensor] | None = None

    def rows(self, epoch: int) -> Tensor:
        """Visit and row of every place of an epoch: (len, 2) int64."""
        if self._cached is None or self._cached[0] != epoch:
            first, blocks = 0, []
            for part, (num, visits) in enumerate(self.parts):
                begin, end = epoch * visits, (epoch + 1) * visits  # in the endless sequence of passes
                for visit in range(begin // num, -(-end // num)):
                    low, high = max(begin - visit * num, 0), min(end - visit * num, num)
                    whole = high - low == num  # else an own permutation decides how the pass is cut into epochs
                    index = torch.arange(num) if whole else permutation(num, self.seed, visit, -2 - part)[low:high]
                    blocks.append(torch.stack([torch.full_like(index, visit), first + index], dim=1))
                first += num
            self._cached = epoch, torch.cat(blocks)[epoch_order(len(self), self.seed, epoch)]
        return self._cached[1]

    def ring(self, place: Place) -> Tensor:
        """All places of the epoch."""
        return self.rows(place.epoch)
