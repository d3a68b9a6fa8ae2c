"""Which rows an epoch visits, and in which order: functions of (seed, epoch, position), without state in workers.

No order is ever laid out in memory: the rows of a batch are computed when it is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from repr.seeds import permute

_EPOCH, _PASS = -1, -2  # streams of random numbers that no row uses; each part of a data set takes one, from -2 on


class Place(NamedTuple):
    """A place in an epoch and the row that stands there."""

    epoch: int
    position: int  # in the order of the epoch, from 0
    visit: int  # counts up with the visits of the row; the epoch, where every epoch visits every row once
    row: int


class Order(ABC):
    """Which rows an epoch visits, and in which order.

    Attributes:
        parts: (number of rows, visits an epoch) of each part of the data set, in the order of its rows.
        made_with: option -> what the order depends on besides parts, seed and the size of a batch.
        lanes: the number of processes must divide it; 0: it need not.
        together: so many rows that follow each other go to one process.
    """

    parts: list[tuple[int, int]]
    made_with: Mapping[str, str] = MappingProxyType({})
    lanes: int = 0
    together: int = 1

    def __len__(self) -> int:
        """Visits an epoch."""
        return sum(visits for _, visits in self.parts)

    @abstractmethod
    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64."""

    def replacement(self, place: Place, attempt: int, batch_size: int) -> Place:
        """The same place with another row, where its own cannot be read: that of the next batch of its ring.

        The ring is made of the places among which another row is sought, here those of the epoch. If it has two batches
        or more, that row is none of the own batch, where a contrastive loss would take the copy for a negative; and two
        rows of a batch never get the same one.

        Args:
            place: whose row cannot be read.
            attempt: from 1; further ones are batches further on, until the ring is exhausted.
            batch_size: of all ranks together.
        """
        other = further_on(place.position, attempt, batch_size, len(self))
        visit, row = self.rows(place.epoch, torch.tensor([other]))[0].tolist()
        return place._replace(visit=visit, row=row)


def further_on(number: int, attempt: int, batch_size: int, size: int) -> int:
    """The place that lies ``attempt`` batches after that of a ``number``, in a ring of ``size`` places."""
    round_trip = size // math.gcd(batch_size, size)  # after so many batches one is back at the start ...
    return (number + attempt * batch_size + attempt // round_trip) % size  # ... and goes on with the place beside it


def part_visits(num: int, weight: float) -> int:
    """How many of its ``num`` rows an epoch visits of a part; raises ValueError where that is none."""
    if (visits := round(num * weight)) < 1:
        raise ValueError(f"weight {weight} of a source of {num} rows visits none of them; set a larger one")
    return visits


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
        self.parts, self.seed = [(num, part_visits(num, weight)) for num, weight in parts], seed
        self._nums, self._visits = torch.tensor(self.parts).unbind(1)  # (P,)
        self._ends = self._visits.cumsum(0)

    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64."""
        shuffled = permute(positions, len(self), self.seed, epoch, _EPOCH)
        part = torch.bucketize(shuffled, self._ends, right=True)
        num, visits = self._nums[part], self._visits[part]
        turn = epoch * visits + shuffled - (self._ends - self._visits)[part]  # in the endless sequence of passes
        visit, row = turn // num, turn % num
        cut = visits % num != 0  # an own permutation decides how a pass is cut into epochs
        if cut.any():
            row[cut] = permute(row[cut], num[cut], self.seed, visit[cut], _PASS - part[cut])
        return torch.stack([visit, row + (self._nums.cumsum(0) - self._nums)[part]], dim=1)
