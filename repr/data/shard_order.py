"""The order of an epoch that reads each shard about once, over all processes together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repr.data.epoch_order import Order, Place, further_on, part_visits
from repr.seeds import permute

_SHARDS, _WINDOW = -(2**43), -(2**44)  # streams of random numbers; each part, and each window, takes one downwards


class ShardOrder(Order):
    """The order of an epoch in lanes of shards.

    The shards are permuted, and their rows are cut into equal lanes. Of a lane, so many shards as ``window`` says are
    mixed row by row, then the next ones. Every batch takes as many rows of each lane, one lane after the other, so that
    a process which takes a contiguous slice of it reads whole lanes. A shard that two lanes share is read by both: with
    S shards an epoch reads at most S + lanes - 1. It leaves out what fills no batch, other rows in each epoch.

    Parts have weights, as in :class:`repr.data.epoch_order.EpochOrder`. Each lane has a stretch of every part, spread
    evenly over it, so that the share of a part is the same in every batch, to a row a lane. An unreadable row is
    replaced by one of its lane. Memory is that of the shards.

    Args:
        parts: (number of rows, weight) of each part of the data set, in the order of its rows.
        blocks: the number of rows of each shard, in the order of the rows; no shard is in two parts.
        batch_size: of all ranks together.
        seed: the run's seed.
        lanes: so many; they divide the batch, and the number of processes divides them.
        window: shards of a lane that are mixed.

    Raises:
        ValueError: lanes or window do not fit batch and shards, or an epoch visits fewer rows of a part than it has
            lanes.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, float]],
        blocks: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        *,
        lanes: int,
        window: int,
    ) -> None:
        sizes = torch.as_tensor(np.asarray(blocks, np.int64))
        num_shards = int((sizes > 0).sum())
        if min(lanes, window) < 1 or batch_size % lanes or lanes > num_shards:
            fits = max((n for n in range(1, min(lanes, num_shards, batch_size) + 1) if batch_size % n == 0), default=1)
            raise ValueError(
                f"data.lanes={lanes}, data.window={window}, data.batch_size={batch_size} and {num_shards} shards of "
                f"data.train do not fit: lanes divide the batch, and there are as many shards; set data.lanes={fits}, "
                "and data.window to 1 or more"
            )
        self.batch_size, self.lanes, self.window = batch_size, lanes, window
        self._parts, firsts = [], sizes.cumsum(0) - sizes
        for (num, weight), end in zip(parts, np.cumsum([num for num, _ in parts]).tolist(), strict=True):
            own = (firsts < end) & (firsts >= end - num) & (sizes > 0)
            visits = part_visits(num, weight)
            if visits < lanes:
                raise ValueError(
                    f"an epoch visits {visits} rows of a source of {num}, fewer than data.lanes={lanes}; set fewer "
                    "lanes, or give the source a larger weight"
                )
            self._parts.append(_Part(firsts[own], sizes[own], visits, lanes, window, seed))
        self._num_rows = sum(part.share for part in self._parts)  # of a lane in an epoch
        self.parts = [(part.num, part.share * lanes) for part in self._parts]
        shards = hashlib.sha256(sizes.numpy().tobytes()).hexdigest()[:16]
        self.made_with = {"data.lanes": f"{lanes} (data.window={window}, sizes of shards {shards})"}

    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64."""
        return self._rows(epoch, *self._place(positions))

    def replacement(self, place: Place, attempt: int, batch_size: int) -> Place:
        """As in :class:`Order`; the ring is the place's lane."""
        lane, number = self._place(torch.tensor([place.position]))
        other = further_on(int(number), attempt, batch_size // self.lanes, self._num_rows)
        visit, row = self._rows(place.epoch, lane, torch.tensor([other]))[0].tolist()
        return place._replace(visit=visit, row=row)

    def _place(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The lane of each position, and which place it is in it: (M,) each."""
        size = self.batch_size // self.lanes
        slot = positions % self.batch_size
        return slot // size, positions // self.batch_size * size + slot % size

    def _rows(self, epoch: int, lane: Tensor, number: Tensor) -> Tensor:
        """Visit and row of places in lanes: (M, 2)."""
        found, open_ = torch.empty(len(lane), 2, dtype=torch.int64), torch.arange(len(lane))
        left = self._num_rows
        for part in self._parts:  # each is spread evenly over what those before it have left; the last takes the rest
            passed, ahead = ((n * part.share + lane * left // self.lanes) // left for n in (number, number + 1))
            own = ahead > passed
            found[open_[own]] = part.rows(epoch, lane[own], passed[own])
            open_, lane, number = open_[~own], lane[~own], (number - passed)[~own]
            left -= part.share
        return found


class _Part:
    """The shards of a part, and the endless sequence of its passes, of which each lane of an epoch has its stretch."""

    def __init__(self, firsts: Tensor, sizes: Tensor, visits: int, lanes: int, window: int, seed: int) -> None:
        self.firsts, self.sizes = firsts, sizes  # (S,) the first row of each shard, and how many it has
        self.num, self.visits, self.share = int(sizes.sum()), visits, visits // lanes  # rows, of an epoch, of a lane
        self.window, self.seed = window, seed
        self._passes: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, epoch: int, lane: Tensor, number: Tensor) -> Tensor:
        """Visit and row of places (M,) among those of this part in lanes: (M, 2)."""
        start = epoch * self.visits + lane * self.share
        visits = (start + number) // self.num
        found = torch.stack([visits, visits], dim=1)
        for visit in visits.unique().tolist():
            own = visits == visit
            start_here, before = start[own], visit * self.num
            low, high = (start_here - before).clamp(min=0), (start_here - before + self.share).clamp(max=self.num)
            found[own, 1] = self._rows(visit, low, high, (start_here - before) + number[own])
        return found

    def _rows(self, visit: int, low: Tensor, high: Tensor, place: Tensor) -> Tensor:
        """The rows at these places of a pass, in stretches [low, high) of it that are mixed window by window: (M,)."""
        shards, ends = self._pass(visit)
        first, shard = (torch.bucketize(at, ends, right=True) for at in (low, place))
        first += (shard - first) // self.window * self.window  # of the window
        low = torch.maximum(low, ends[first] - self.sizes[shards[first]])
        high = torch.minimum(high, ends[(first + self.window - 1).clamp(max=len(ends) - 1)])
        stream = _WINDOW - self.firsts[0] - low  # no other window begins there
        place = low + permute(place - low, high - low, self.seed, visit, stream)
        shard = torch.bucketize(place, ends, right=True)
        return self.firsts[shards[shard]] + place - (ends[shard] - self.sizes[shards[shard]])

    def _pass(self, visit: int) -> tuple[Tensor, Tensor]:
        """The shards in the order of a pass, and where each ends in it: (S,) each."""
        if visit not in self._passes:
            if len(self._passes) > self.visits // self.num + 1:  # more than an epoch has
                del self._passes[min(self._passes)]
            num = len(self.firsts)
            shards = permute(torch.arange(num), num, self.seed, visit, _SHARDS - int(self.firsts[0]))
            self._passes[visit] = shards, self.sizes[shards].cumsum(0)
        return self._passes[visit]
