"""Which rows make which batch: pure functions of (seed, epoch, rank), without state in workers.

A global batch is cut into one contiguous slice a rank, so that gathering in rank order gives the batch that one process
would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor
from torch.utils.data import Sampler

from repr.data.epoch_order import Order, Place


def position(step: int, num_batches: int, accumulate: int) -> tuple[int, int]:
    """The epoch and the first batch in it of an optimizer step, all counted from 0.

    An epoch has ``num_batches``, a step ``accumulate`` of them; the last step of an epoch takes those that are left.
    """
    epoch, step_of_epoch = divmod(step, -(-num_batches // accumulate))
    return epoch, step_of_epoch * accumulate


class EpochBatchSampler(Sampler[list[Place]]):
    """Batches of rows in the order of each epoch.

    Global batch k of an epoch is places ``[k * G, (k + 1) * G)`` of its order, G the batch size of all ranks together;
    rank r takes the r-th of its ``world_size`` equal slices. A last batch that is not full is dropped. Each place has
    its epoch, so that workers need not be told of it.

    Args:
        order: which rows an epoch visits.
        batch_size: G.
        rank: of this process.
        world_size: number of processes.
        epoch: of the first iteration.
        start: batches of that epoch to leave out (resume); other epochs are whole.

    Raises:
        ValueError: the batch is larger than the data set, the ranks do not divide it or the order's lanes, or
            ``start`` lies outside the epoch.
    """

    def __init__(
        self, order: Order, batch_size: int, *, rank: int = 0, world_size: int = 1, epoch: int = 0, start: int = 0
    ) -> None:
        _check_batch_size("data.batch_size", batch_size, rank, world_size)
        if batch_size > len(order):
            raise ValueError(
                f"batch of {batch_size} but only {len(order)} training samples; set data.batch_size <= {len(order)}"
            )
        if order.lanes % world_size:
            raise ValueError(
                f"data.lanes={order.lanes} and {world_size} processes, each of which reads whole lanes: set data.lanes "
                f"to a multiple of {world_size} that divides data.batch_size={batch_size}"
            )
        if batch_size // world_size % order.together:
            raise ValueError(
                f"data.neighbours={order.made_with['data.neighbours']} and data.batch_size={batch_size}: a row and its "
                f"neighbour go to one of {world_size} process(es), so set the size to a multiple of "
                f"{order.together * world_size}"
            )
        self.order, self.global_batch_size = order, batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start_epoch, self.start = epoch, epoch, start
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
        # The epoch is read now, not at the first `next` as in a generator function, so that a loader without workers
        # (lazy) and one with workers (prefetching) see the same.
        epoch, start = self.epoch, self.start if self.epoch == self.start_epoch else 0
        size = self.global_batch_size // self.world_size
        firsts = (batch * self.global_batch_size + self.rank * size for batch in range(start, len(self)))
        return (self._places(epoch, torch.arange(first, first + size)) for first in firsts)

    def _places(self, epoch: int, positions: Tensor) -> list[Place]:
        visits, rows = self.order.rows(epoch, positions).T.tolist()
        return list(map(Place, repeat(epoch), positions.tolist(), visits, rows))


class EvalBatchSampler(Sampler[list[int]]):
    """Rows in order, the same number of equal batches on every rank.

    Global batch k is rows ``[k * G, (k + 1) * G)``, G the batch size of all ranks together, cut into a slice a rank.
    Where the ranks do not divide the last one, its last row is repeated; whoever collects drops repetitions by index.

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
