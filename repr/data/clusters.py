"""Clusters of a training set: which row belongs to which, kept in a file, and the order of batches of one cluster."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from repr.data.columns import Packed
from repr.data.samplers import Place, epoch_order, permutation
from repr.data.sources import Source
from repr.files import replacing

Mode = Literal["round_robin", "proportional"]
Leftovers = Literal["drop", "merge", "carry"]
_TURN, _SCHEDULE = -(2**40), -(2**40) - 1  # streams of random numbers that no row, order or part of a set uses


@dataclass(frozen=True)
class Clusters:
    """The clusters of a training set, and how batches are made of them.

    Attributes:
        ids: (N,) int64, the cluster of each row; -1: of none, so that it is never drawn.
        mode: ``round_robin``: one batch of each cluster in turn, as MCL's authors do it, so that the largest cluster
            is left for the end of an epoch; ``proportional``: all batches of an epoch in random order.
        leftovers: what becomes of rows that fill no batch. ``drop``: a cluster smaller than a batch is never used, and
            of the others each epoch leaves some rows out at random (MCL's authors); ``merge``: small clusters are
            joined with their neighbours in the order of ids, which share the clusters of the earlier stages, until they
            fill a batch; ``carry``: likewise, and the rows that one epoch leaves out are in the next.
        keys: :func:`keys_hash` of the data set that was clustered; None: any set of N rows.
    """

    ids: Tensor
    mode: Mode = "round_robin"
    leftovers: Leftovers = "drop"
    keys: str | None = None

    def __post_init__(self) -> None:
        for name, value, valid in (("mode", self.mode, Mode), ("leftovers", self.leftovers, Leftovers)):
            options = valid.__args__  # type: ignore[attr-defined]
            if value not in options:
                raise ValueError(f"clusters: {name} is '{value}'; set it to {' or '.join(options)}")

    def check(self, source: Source) -> None:
        """Refuse a data set that is not the one that was clustered.

        Raises:
            ValueError: other rows, another order, or other weights than once an epoch.
        """
        if len(source) != len(self.ids) or (self.keys is not None and keys_hash(source) != self.keys):
            raise ValueError(
                f"data.train has {len(source)} samples and the clusters were made of {len(self.ids)}, or their keys or "
                "order differ: use the data set that was clustered, or cluster anew with a new run"
            )
        if any(weight != 1 for _, weight in getattr(source, "parts", ())):
            raise ValueError("batches of one cluster show every row once an epoch: set data.train.weights=null")


def load_clusters(path: str | Path, *, mode: Mode = "round_robin", leftovers: Leftovers = "drop") -> Clusters:
    """The clusters that :func:`save_clusters` wrote.

    Args:
        path: the file.
        mode: see :class:`Clusters`.
        leftovers: likewise.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    content = read_arrays(Path(path))
    return Clusters(torch.from_numpy(content["accumulated"].astype(np.int64)), mode, leftovers, str(content["keys"]))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in a file of clusters.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"clusters: {path} does not exist") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"clusters: {path} is damaged ({error}); remove its folder, and resume the run") from error


def save_clusters(
    path: Path, ids: np.ndarray, source: Source, centroids: Sequence[dict[str, np.ndarray]] = ()
) -> Clusters:
    """Write the clusters of every stage so far, with the accumulated ones.

    The file holds ``ids`` (S, N) int32, ``accumulated`` (N,) int32, ``table`` (C, S) (accumulated id -> ids of the
    stages), ``keys`` (:func:`keys_hash`), ``key_bytes`` and ``key_ends`` (the keys, UTF-8, one after the other), and
    ``centroids_<stage>_<feature>`` (K, D).

    Args:
        path: ``.npz``; replaced as a whole.
        ids: (S, N), see :func:`accumulate`.
        source: the data set.
        centroids: of each stage, feature -> (K, D).

    Raises:
        ValueError: two rows have the same key.
    """
    keys = _packed_keys(source)
    dense, table = accumulate(ids)
    digest = _digest(keys)
    named: Any = {f"centroids_{s}_{name}": value for s, found in enumerate(centroids) for name, value in found.items()}
    with replacing(path) as file:
        np.savez(
            file,
            ids=ids.astype(np.int32),
            accumulated=dense.astype(np.int32),
            table=table.astype(np.int32),
            keys=np.array(digest),
            key_bytes=keys.buffer,
            key_ends=keys.ends,
            **named,
        )
    return Clusters(torch.from_numpy(dense), keys=digest)


def accumulate(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clusters within clusters: rows are together if they are together in every stage.

    ``P_s = sum_r c_r K^(s-r)`` of MCL (arXiv 2402.11816, section 3), renumbered densely in the same order. The
    authors' script takes the newest ``c_s`` for every ``c_r``, so that the earlier stages are lost; this does not.

    Args:
        ids: (S, N) integers, the clusters of each stage; -1 in any: the row has none.

    Returns:
        (N,) int64 from 0, -1 for none; and (C, S), the stages' ids of each.
    """
    known = (ids >= 0).all(axis=0)
    table, inverse = np.unique(ids[:, known], axis=1, return_inverse=True)
    dense = np.full(ids.shape[1], -1, dtype=np.int64)
    dense[known] = inverse.reshape(-1)
    return dense, table.T


def keys_hash(source: Source) -> str:
    """SHA-256 over the keys of all rows in order, each with a zero byte behind it.

    Raises:
        ValueError: two rows have the same key, or the source has no keys or no length.
    """
    return _digest(_packed_keys(source))


def _packed_keys(source: Source) -> Packed:
    if not hasattr(source, "key") or not hasattr(source, "__len__"):
        raise ValueError(
            f"{type(source).__name__} has no {'key' if hasattr(source, '__len__') else 'length'}: clusters need a data "
            "set that is read at random, in the same order at every start (data=shards reads tar shards so)"
        )
    keys = Packed.of(source.key(row).encode("utf-8", "surrogateescape") for row in range(len(source)))
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    order = hashes.argsort(kind="stable")
    for place in (hashes[order][1:] == hashes[order][:-1]).nonzero()[0]:
        first, second = order[place : place + 2].tolist()
        if keys[first] == keys[second]:
            raise ValueError(
                f"samples {first} and {second} of data.train have the same key '{source.key(first)}': clusters need "
                "one row a picture, or a batch holds it several times (a table takes several captions as columns)"
            )
    return keys


def _digest(keys: Packed) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key + b"\0")
    return digest.hexdigest()


class ClusterOrder:
    """Which rows an epoch shows, in batches of one cluster: a function of (seed, epoch) alone.

    Every epoch has the same number of batches.

    Args:
        clusters: of all rows.
        batch_size: of all ranks together.
        seed: the run's.

    Attributes:
        parts: (number of rows, visits an epoch).

    Raises:
        ValueError: no cluster fills a batch.
    """

    def __init__(self, clusters: Clusters, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.mode, self.leftovers = batch_size, seed, clusters.mode, clusters.leftovers
        self.cluster_sizes = torch.bincount(clusters.ids[clusters.ids >= 0])
        groups = torch.arange(len(self.cluster_sizes))
        if self.leftovers != "drop":
            groups = _merged(self.cluster_sizes, batch_size)
        self.group = torch.full_like(clusters.ids, -1)  # (N,)
        self.group[clusters.ids >= 0] = groups[clusters.ids[clusters.ids >= 0]]
        self.sizes = torch.bincount(self.group[self.group >= 0])  # (G,)
        self.num_batches = self.sizes // batch_size  # (G,)
        self._without = int((self.group < 0).sum())
        self._first = self.sizes.cumsum(0) - self.sizes
        self._cached: tuple[int, Tensor] | None = None
        if not len(self):
            raise ValueError(self._no_batch())
        self.parts = [(len(self.group), len(self))]
        self._ids_hash = hashlib.sha256(clusters.ids.numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Visits an epoch."""
        return int(self.num_batches.sum()) * self.batch_size

    def rows(self, epoch: int) -> Tensor:
        """Visit and row of every place of an epoch, one batch after the other: (len, 2) int64."""
        group = torch.repeat_interleave(torch.arange(len(self.sizes)), self.num_batches)  # of each batch
        number = torch.arange(len(group)) - (self.num_batches.cumsum(0) - self.num_batches)[group]  # in its group
        if self.mode == "round_robin":
            order = (number * len(self.sizes) + group).argsort()
        else:
            order = permutation(len(group), self.seed, epoch, _SCHEDULE)
        first = (self._first[group] + number * self.batch_size)[order]
        rows = self._by_group(epoch)[(first[:, None] + torch.arange(self.batch_size)).flatten()]
        return torch.stack([torch.full_like(rows, epoch), rows], dim=1)

    def members(self, place: Place) -> Tensor:
        """All rows of a place's cluster in the order of the epoch, those that the epoch leaves out last."""
        group = int(self.group[place.row])
        return self._by_group(place.epoch)[self._first[group] :][: self.sizes[group]]

    def made_with(self) -> str:
        """What the order depends on beside batch size and seed."""
        return f"{self.mode}, {self.leftovers}, ids {self._ids_hash}"

    def coverage(self) -> dict[str, int]:
        """What an epoch shows: counts of rows, clusters and batches."""
        small = self.cluster_sizes < self.batch_size
        never = self.group[self.group >= 0][self.num_batches[self.group[self.group >= 0]] == 0]
        return {
            "samples": len(self.group),
            "samples_an_epoch": len(self),
            "batches_an_epoch": len(self) // self.batch_size,
            "samples_never_drawn": len(never) + self._without,
            "samples_without_cluster": self._without,
            "clusters": int((self.cluster_sizes > 0).sum()),
            "clusters_smaller_than_a_batch": int((small & (self.cluster_sizes > 0)).sum()),
            "groups_that_fill_a_batch": int((self.num_batches > 0).sum()),
        }

    def _by_group(self, epoch: int) -> Tensor:
        """Rows that have a group, group by group in the epoch's order: (M,)."""
        if self._cached is None or self._cached[0] != epoch:
            order = epoch_order(len(self.group), self.seed, epoch)
            key = 2 * self.group + self._left_out(epoch)
            self._cached = epoch, order[key[order].argsort(stable=True)][self._without :]
        return self._cached[1]

    def _left_out(self, epoch: int) -> Tensor:
        """Whether an epoch leaves a row out on purpose: (N,). The turn goes round each group."""
        out = torch.zeros_like(self.group)
        if self.leftovers == "carry":
            order = permutation(len(self.group), self.seed, 0, _TURN)
            order = order[self.group[order].argsort(stable=True)][self._without :]
            group = self.group[order]
            turn, rest = torch.arange(len(order)) - self._first[group], (self.sizes % self.batch_size)[group]
            out[order] = ((turn - epoch * rest) % self.sizes[group] < rest).long()
        return out

    def _no_batch(self) -> str:
        sizes = self.cluster_sizes[self.cluster_sizes > 0].sort().values.tolist()
        if not sizes:
            return "no sample of data.train has a cluster"
        told = f"{sizes[0]} to {sizes[-1]}, half of them at most {sizes[(len(sizes) - 1) // 2]}"
        more = "" if self.leftovers != "drop" else ", or join small clusters with procedure.leftovers=merge"
        return (
            f"no cluster fills a batch: data.batch_size={self.batch_size}, and the {len(sizes)} clusters have {told} "
            f"samples; lower data.batch_size to {sizes[-1]} or less, or the number of clusters "
            f"(procedure.clustering.n_clusters){more}"
        )


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
    found = torch.tensor(groups, dtype=torch.int64)
    if filled < batch_size and num > 1:  # the last of them go to the group before
        found[found == last] = last - 1 if last else 1
        found[found > last] -= 1
    return found


def describe(coverage: dict[str, Any]) -> str:
    """One line about what an epoch shows."""
    text = (
        f"{coverage['clusters']} clusters, {coverage['batches_an_epoch']} batches an epoch with "
        f"{coverage['samples_an_epoch']} of {coverage['samples']} samples"
    )
    return text + (f", {coverage['samples_never_drawn']} never drawn" if coverage["samples_never_drawn"] else "")
