"""The order of an epoch in which every batch is of one cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from repr.data.clusters import Clusters
from repr.data.epoch_order import Order, Place
from repr.seeds import epoch_order, permutation

_TURN, _SCHEDULE = -(2**40), -(2**40) - 1  # streams of random numbers that no row, order or part of a set uses


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
        self.group = torch.full_like(clusters.ids, -1)  # (N,)
        self.group[clusters.ids >= 0] = groups[clusters.ids[clusters.ids >= 0]]
        self.sizes = torch.bincount(self.group[self.group >= 0])  # (G,)
        self.num_batches = self.sizes // batch_size  # (G,)
        self._without = int((self.group < 0).sum())
        self._cached: tuple[int, tuple[Tensor, ...]] | None = None
        self.parts = [(len(self.group), int(self.num_batches.sum()) * batch_size)]
        if not len(self):
            raise ValueError(self._no_batch())
        ids_hash = hashlib.sha256(clusters.ids.numpy().tobytes()).hexdigest()[:16]
        self.made_with = f"{self.mode}, {self.leftovers}, ids {ids_hash}"

    def rows(self, epoch: int) -> Tensor:
        """Visit and row of every place of an epoch, one batch after the other: (len, 2) int64."""
        used = zip(self._by_group(epoch), (self.num_batches * self.batch_size).tolist(), strict=True)
        batches = torch.cat([rows[:num] for rows, num in used]).view(-1, self.batch_size)  # group by group
        if self.mode == "round_robin":
            order = _count_up(self.num_batches).argsort(stable=True)
        else:
            order = permutation(len(batches), self.seed, epoch, _SCHEDULE)
        rows = batches[order].flatten()
        return torch.stack([torch.full_like(rows, epoch), rows], dim=1)

    def ring(self, place: Place) -> Tensor:
        """All rows of the place's cluster in the order of the epoch, those that the epoch leaves out last."""
        rows = self._by_group(place.epoch)[int(self.group[place.row])]
        return torch.stack([torch.full_like(rows, place.epoch), rows], dim=1)

    def coverage(self) -> dict[str, int]:
        """What an epoch shows: counts of rows, clusters and batches."""
        small = self.cluster_sizes < self.batch_size
        never = self.sizes[self.num_batches == 0].sum()
        return {
            "samples": len(self.group),
            "samples_an_epoch": len(self),
            "batches_an_epoch": len(self) // self.batch_size,
            "samples_never_drawn": int(never) + self._without,
            "samples_without_cluster": self._without,
            "clusters": int((self.cluster_sizes > 0).sum()),
            "clusters_smaller_than_a_batch": int((small & (self.cluster_sizes > 0)).sum()),
            "groups_that_fill_a_batch": int((self.num_batches > 0).sum()),
        }

    def _by_group(self, epoch: int) -> tuple[Tensor, ...]:
        """The rows of each group in the epoch's order, those last that the epoch leaves out on purpose."""
        if self._cached is None or self._cached[0] != epoch:
            order = epoch_order(len(self.group), self.seed, epoch)
            key = 2 * self.group + self._left_out(epoch)
            ordered = order[key[order].argsort(stable=True)][self._without :]
            self._cached = epoch, ordered.split(self.sizes.tolist())
        return self._cached[1]

    def _left_out(self, epoch: int) -> Tensor:
        """Whether an epoch leaves a row out on purpose: (N,). The turn goes round each group."""
        out = torch.zeros_like(self.group)
        if self.leftovers == "carry":
            order = permutation(len(self.group), self.seed, 0, _TURN)
            order = order[self.group[order].argsort(stable=True)][self._without :]
            group = self.group[order]
            turn, rest = _count_up(self.sizes), (self.sizes % self.batch_size)[group]
            out[order] = ((turn - epoch * rest) % self.sizes[group] < rest).long()
        return out

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
