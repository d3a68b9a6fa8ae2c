"""The order of an epoch in which every batch is of one cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from repr.data.clusters import Clusters
from repr.data.epoch_order import Order, Place, further_on
from repr.seeds import permute

# Streams of random numbers that no row, order or part of a set uses; of the last two each group takes one, downwards.
_SCHEDULE, _GROUP, _TURN = -(2**40), -(2**41), -(2**42)


class ClusterOrder(Order):
    """The order of an epoch in batches that each hold rows of one cluster, from which all negatives then come.

    Every rank takes its slice of the same batch, hence of the same cluster, and no row is in a batch twice. Every epoch
    has the same number of batches. A row that cannot be read is replaced by one of the same cluster.

    Source: the sampler of MCL (Zhang et al., 2024, arXiv 2402.11816). The authors' draws from a generator that differs
    between ranks, so that rows repeat within a batch; here the order is a function of (seed, epoch).

    Raises:
        ValueError: no cluster fills a batch (of ``batch_size`` rows on all ranks together).
    """

    def __init__(self, clusters: Clusters, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.mode, self.leftovers = batch_size, seed, clusters.mode, clusters.leftovers
        self.cluster_sizes = torch.bincount(clusters.ids[clusters.ids >= 0])
        drop = self.leftovers == "drop"
        groups = torch.arange(len(self.cluster_sizes)) if drop else _merged(self.cluster_sizes, batch_size)
        clustered = (clusters.ids >= 0).nonzero()[:, 0]
        group = groups[clusters.ids[clustered]]
        self.members = clustered[group.argsort(stable=True)]  # the rows, group by group
        self.sizes = torch.bincount(group)  # (G,)
        self.num_batches = self.sizes // batch_size  # (G,)
        self.parts = [(len(clusters.ids), int(self.num_batches.sum()) * batch_size)]
        if not len(self):
            raise ValueError(self._no_batch())
        self._turns = _count_up(self.num_batches).argsort(stable=True)  # first a batch of each group, then the second
        ids_hash = hashlib.sha256(clusters.ids.numpy().tobytes()).hexdigest()[:16]
        self.made_with = {"data.clusters": f"{self.mode}, {self.leftovers}, ids {ids_hash}"}

    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64."""
        return self._rows(epoch, *self._place(epoch, positions))

    def replacement(self, place: Place, attempt: int, batch_size: int) -> Place:
        """As in :class:`Order`; the ring is the place's group, the rows that the epoch leaves out last."""
        group, number = self._place(place.epoch, torch.tensor([place.position]))
        other = further_on(int(number), attempt, batch_size, int(self.sizes[group]))
        visit, row = self._rows(place.epoch, group, torch.tensor([other]))[0].tolist()
        return place._replace(visit=visit, row=row)

    def coverage(self) -> dict[str, int]:
        """What an epoch shows: counts of rows, clusters and batches."""
        small = self.cluster_sizes < self.batch_size
        never, without = self.sizes[self.num_batches == 0].sum(), self.parts[0][0] - len(self.members)
        return {
            "samples": self.parts[0][0],
            "samples_an_epoch": len(self),
            "batches_an_epoch": len(self) // self.batch_size,
            "samples_never_drawn": int(never) + without,
            "samples_without_cluster": without,
            "clusters": int((self.cluster_sizes > 0).sum()),
            "clusters_smaller_than_a_batch": int((small & (self.cluster_sizes > 0)).sum()),
            "groups_that_fill_a_batch": int((self.num_batches > 0).sum()),
        }

    def _place(self, epoch: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The group of each position, and which place it is in the order of the group: (M,) each."""
        batch, ends = positions // self.batch_size, self.num_batches.cumsum(0)
        if self.mode == "round_robin":
            batch = self._turns[batch]
        else:
            batch = permute(batch, int(ends[-1]), self.seed, epoch, _SCHEDULE)
        group = torch.bucketize(batch, ends, right=True)
        first = (ends - self.num_batches)[group]
        return group, (batch - first) * self.batch_size + positions % self.batch_size

    def _rows(self, epoch: int, group: Tensor, number: Tensor) -> Tensor:
        """Visit and row of places in the orders of groups: (M, 2)."""
        size = self.sizes[group]
        if self.leftovers == "carry":  # the epoch leaves the last `rest` out, and whose turn it is goes round the group
            rest = size % self.batch_size
            shown = size - rest
            shuffled = permute(number % shown, shown, self.seed, epoch, _GROUP - group)
            number = torch.where(number < shown, shuffled, number)
            number = permute((number + (epoch + 1) * rest) % size, size, self.seed, 0, _TURN - group)
        else:
            number = permute(number, size, self.seed, epoch, _GROUP - group)
        rows = self.members[(self.sizes.cumsum(0) - self.sizes)[group] + number]
        return torch.stack([torch.full_like(rows, epoch), rows], dim=1)

    def _no_batch(self) -> str:
        sizes = self.cluster_sizes[self.cluster_sizes > 0].sort().values.tolist()
        if not sizes:
            return "no sample of data.train has a cluster"
        told = f"{sizes[0]} to {sizes[-1]} samples, half of them at most {sizes[(len(sizes) - 1) // 2]}"
        more = "" if self.leftovers != "drop" else ", or join small clusters with procedure.leftovers=merge"
        return (
            f"no cluster fills a batch: data.batch_size={self.batch_size}, and the {len(sizes)} clusters have {told}; "
            f"lower data.batch_size to {sizes[-1]} or less, or the number of clusters "
            f"(procedure.clustering.n_clusters){more}"
        )


def _count_up(sizes: Tensor) -> Tensor:
    """0, 1, ... up to each size, one after the other: (sum of sizes,)."""
    return torch.cat([torch.arange(size) for size in sizes.tolist()])


def _merged(sizes: Tensor, batch_size: int) -> Tensor:
    """The group of each cluster: small ones share one with the next small ones, until it fills a batch."""
    groups, num, filled, last = [], 0, batch_size, -1  # `last`: the group that small clusters go to
    for size in sizes.tolist():
        if size >= batch_size:
            groups.append(num)
            num += 1
            continue
        if filled >= batch_size:
            last, filled, num = num, 0, num + 1
        groups.append(last)
        filled += size
    merged = torch.tensor(groups, dtype=torch.int64)
    if filled < batch_size and num > 1:  # the last of them go to the group before
        merged[merged == last] = last - 1 if last else 1
        merged[merged > last] -= 1
    return merged


def describe(coverage: Mapping[str, int]) -> str:
    """One line about what an epoch shows."""
    text = (
        f"{coverage['clusters']} clusters, {coverage['batches_an_epoch']} batches an epoch with "
        f"{coverage['samples_an_epoch']} of {coverage['samples']} samples"
    )
    return text + (f", {coverage['samples_never_drawn']} never drawn" if coverage["samples_never_drawn"] else "")
