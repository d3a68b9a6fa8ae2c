"""Which rows make which batch: pure functions of (seed, epoch, rank), without state in workers.

A global batch is cut into one contiguous slice a rank, so that gathering in rank order gives the
batch that one process would have had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from repr.seeds import epoch_order, permutation

if TYPE_CHECKING:
    from repr.data.cluster_order import ClusterOrder


class Place(NamedTuple):
    """A place in an epoch and the row that stands there."""

    epoch: int
    visit: int  # how often the row was visited before; the epoch, where every epoch visits every row once
    row: int


def position(step: int, num_batches: int, accumulate: int) -> tuple[int, int]:
    """The epoch and the first batch in it of an optimizer step, counted from 0.

    Args:
        step: of the optimizer.
        num_batches: batches an epoch.
        accumulate: batches a step; the last step of an epoch takes those that are left.
    """
    epoch, step_of_epoch = divmod(step, -(-num_batches // accumulate))
    return epoch, step_of_epoch * accumulate


class EpochOrder:
    """Which rows an epoch visits, and in which order: a function of (seed, epoch) alone.

    A data set has parts, each with a weight w: an epoch visits w times as many rows as the part has. The visits of a
    part go through it pass by pass, so that with w = 0.5 two epochs make one pass, and with w = 2 an epoch makes two.

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

    def __len__(self) -> int:
        """Visits an epoch."""
        return sum(visits for _, visits in self.parts)

    def rows(self, epoch: int) -> Tensor:
        """Visit and row of every place of an epoch: (len, 2) int64."""
        if self._cached is None or self._cached[0] != epoch:
            first, blocks = 0, []
            for part, (num, visits) in enumerate(self.parts):
                begin, end = epoch * visits, (epoch + 1) * visits  # in the endless sequence of passes
                for visit in range(begin // num, -(-end // num)):
                    low, high = max(begin - visit * num, 0), min(end - visit * num, num)
                    index = torch.arange(num) if high - low == num else self._pass(part, visit)[low:high]
                    blocks.append(torch.stack([torch.full_like(index, visit), first + index], dim=1))
                first += num
            self._cached = epoch, torch.cat(blocks)[epoch_order(len(self), self.seed, epoch)]
        return self._cached[1]

    def _pass(self, part: int, visit: int) -> Tensor:
        """The order in which a pass through a part is cut into epochs."""
        return permutation(self.parts[part][0], self.seed, visit, -2 - part)

    def after(self, place: Place, step: int) -> Place:
        """The place ``step`` further on in the same epoch, which begins again after its end."""
        rows = self.rows(place.epoch)
        number = int(((rows[:, 0] == place.visit) & (rows[:, 1] == place.row)).nonzero()[0])
        return Place(place.epoch, *rows[(number + step) % len(rows)].tolist())


class EpochBatchSampler(Sampler[list[Place]]):
    """Batches of rows in the order of each epoch.

    Global batch k of an epoch is places ``[k * G, (k + 1) * G)`` of its order, G the global batch
    size; rank r takes the r-th of its ``world_size`` equal slices. A last batch that is not full is
    dropped. The epoch travels with the index, so workers need not be told of it.

    Args:
        order: of the training set.
        batch_size: of all ranks together.
        rank: this process.
        world_size: number of processes.
        epoch: the epoch of the first iteration.
        start: batches of that epoch to leave out (resume); other epochs are whole.

    Raises:
        ValueError: the batch is larger than the data set, the ranks do not divide it, or ``start``
            lies outside the epoch.
    """

    def __init__(
        self,
        order: EpochOrder | ClusterOrder,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        _check_batch_size("data.batch_size", batch_size, rank, world_size)
        if batch_size > len(order):
            raise ValueError(
                f"batch of {batch_size} but only {len(order)} training samples; set data.batch_size <= {len(order)}"
            )
        self.order, self.global_batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start_epoch = epoch
        self.start = start
        if not 0 <= start < len(self):
            raise ValueError(
                f"cannot start at batch {start} of {len(self)} an epoch; "
                "resume with the data.batch_size and data set of the checkpoint"
            )

    @property
    def sampler(self) -> EpochBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on ``dataloader.batch_sampler.sampler`` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter``; iterators that exist already keep theirs."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, also where the first one starts later (Lightning counts on it)."""
        return len(self.order) // self.global_batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        # Not a generator: epoch and start are read now, not at the first `next`, so that a loader
        # without workers (lazy) and one with workers (prefetching) see the same.
        return self._batches(self.epoch, self.start if self.epoch == self.start_epoch else 0)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Place]]:
        rows = self.order.rows(epoch)
        size = self.global_batch_size // self.world_size
        for batch in range(start, len(self)):
            first = batch * self.global_batch_size + self.rank * size
            yield [Place(epoch, visit, row) for visit, row in rows[first : first + size].tolist()]

    def replacement(self, place: Place, attempt: int) -> Place:
        """What stands in for a row that cannot be read: the row in the same place of the next batch.

        So it is none of the row's own batch, where a contrastive loss would take the copy for a negative, and two
        rows of a batch do not get the same one.

        Args:
            place: the row's.
            attempt: from 1; further ones are batches further on, until the epoch's places are exhausted.
        """
        assert isinstance(self.order, EpochOrder)
        return self.order.after(place, batches_further(attempt, self.global_batch_size, len(self.order)))


class ClusterBatchSampler(EpochBatchSampler):
    """Batches that each hold rows of one cluster, so that all negatives of a contrastive loss come from it.

    Every rank takes its slice of the same batch, hence of the same cluster, and no row is in a batch twice. Length,
    ``start`` and ``set_epoch`` are those of :class:`EpochBatchSampler`.

    Method: the sampler of MCL (Zhang et al., 2024, arXiv 2402.11816). The authors' draws from a generator that differs
    between ranks, so that rows repeat within a batch; here the order is a function of (seed, epoch).

    Args:
        order: of the training set's clusters; it knows the size of a batch.
        rank: this process.
        world_size: number of processes.
        epoch: the epoch of the first iteration.
        start: batches of that epoch to leave out (resume); other epochs are whole.

    Raises:
        ValueError: the ranks do not divide the batch, or ``start`` lies outside the epoch.
    """

    def __init__(
        self, order: ClusterOrder, *, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        super().__init__(order, order.batch_size, rank=rank, world_size=world_size, epoch=epoch, start=start)
        self.clusters = order

    def replacement(self, place: Place, attempt: int) -> Place:
        """What stands in for a row that cannot be read: a row of the same cluster, a batch further on among its rows.

        It is none of the row's own batch where the cluster has two batches or more, and two rows of a batch never get
        the same one.

        Args:
            place: the row's.
            attempt: from 1; further ones go on until the cluster is exhausted.
        """
        rows = self.clusters.members(place)
        number = int((rows == place.row).nonzero()[0])
        step = batches_further(attempt, self.global_batch_size, len(rows))
        return place._replace(row=int(rows[(number + step) % len(rows)]))


def batches_further(attempt: int, size: int, num: int) -> int:
    """Steps to the same place ``attempt`` batches further on in a ring of ``num`` rows, through all of them."""
    round_trip = num // math.gcd(size, num)  # after so many batches one is back, and takes the place beside
    return attempt * size + attempt // round_trip


class EvalBatchSampler(Sampler[list[int]]):
    """Rows in order, the same number of equal batches on every rank.

    Global batch k is rows ``[k * G, (k + 1) * G)``, cut into one contiguous slice a rank. Where the
    ranks do not divide the last one, its last row is repeated; whoever collects drops repetitions
    by index.

    Args:
        num_samples: rows of the data set.
        batch_size: of all ranks together.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: the ranks do not divide the batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        _check_batch_size("data.eval_batch_size", batch_size, rank, world_size)
        self.num_samples, self.global_batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = batch * self.global_batch_size
            rows = min(self.global_batch_size, self.num_samples - first)
            size = -(-rows // self.world_size)
            mine = range(first + self.rank * size, first + (self.rank + 1) * size)
            yield [min(row, self.num_samples - 1) for row in mine]


def _check_batch_size(option: str, batch_size: int, rank: int, world_size: int) -> None:
    """Refuse a global batch that the ranks cannot share equally."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among {world_size} processes")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"{option}={batch_size} is the batch of all {world_size} processes together; "
            f"set {option} to a positive multiple of {world_size}"
        )
