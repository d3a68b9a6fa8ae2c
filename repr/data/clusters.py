"""Clusters of a training set: which row belongs to which, kept in a file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from repr.data.sources.columns import Packed
from repr.data.sources.source import Source, parts_of, row_weights_of
from repr.files import replacing

Mode = Literal["round_robin", "proportional"]
Leftovers = Literal["drop", "merge", "carry"]


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
            if value not in get_args(valid):
                raise ValueError(f"clusters: {name} is '{value}'; set it to {' or '.join(get_args(valid))}")

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
        if any(weight != 1 for _, weight in parts_of(source)) or row_weights_of(source) is not None:
            raise ValueError("batches of one cluster show every row once an epoch: set data.train.weights=null")


def load_clusters(path: str | Path, *, mode: Mode = "round_robin", leftovers: Leftovers = "drop") -> Clusters:
    """The accumulated clusters that :func:`save_clusters` wrote; ``mode`` and ``leftovers`` as in :class:`Clusters`.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    content = read_arrays(Path(path))
    return Clusters(torch.from_numpy(content["accumulated"].astype(np.int64)), mode, leftovers, str(content["keys"]))


def read_arrays(path: Path, what: str = "clusters") -> dict[str, np.ndarray]:
    """Everything in a file of clusters, or of ``what`` else is made between stages.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"{what}: {path} does not exist") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{what}: {path} is damaged ({error}); remove its folder, and resume the run") from error


def save_clusters(
    path: Path, ids: np.ndarray, source: Source, centroids: Sequence[dict[str, np.ndarray]] = ()
) -> Clusters:
    """Write the clusters of every stage so far to an ``.npz`` file, and give the accumulated ones.

    The file holds ``ids`` (S, N) int32, ``accumulated`` (N,) int32, ``table`` (C, S) (accumulated id -> ids of the
    stages), ``keys`` (:func:`keys_hash`), ``key_bytes`` and ``key_ends`` (the keys, UTF-8, one after the other), and
    ``centroids_<stage>_<feature>`` (K, D).

    Args:
        path: of the file, which is replaced as a whole.
        ids: (S, N), see :func:`accumulate`.
        source: the data set.
        centroids: of each stage, feature -> (K, D).

    Raises:
        ValueError: two rows have the same key.
    """
    keys = _packed_keys(source)
    digest, (accumulated, stages_of) = _digest(keys), accumulate(ids)
    named: Any = {f"centroids_{s}_{name}": value for s, stage in enumerate(centroids) for name, value in stage.items()}
    with replacing(path) as file:
        np.savez(
            file,
            ids=ids.astype(np.int32),
            accumulated=accumulated.astype(np.int32),
            table=stages_of.astype(np.int32),
            keys=np.array(digest),
            key_bytes=keys.buffer,
            key_ends=keys.ends,
            **named,
        )
    return Clusters(torch.from_numpy(accumulated), keys=digest)


def accumulate(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clusters within clusters: rows are together if they are together in every stage.

    ``P_s = sum_r c_r K^(s-r)`` of MCL (arXiv 2402.11816, section 3), renumbered densely in the same order. The
    authors' script takes the newest ``c_s`` for every ``c_r``, so that the earlier stages are lost; this does not.

    Args:
        ids: (S, N) integers, the clusters of each stage; -1 in any: the row has none.

    Returns:
        (N,) int64 from 0, -1 for none; and (C, S), the stages' ids of each.
    """
    rows = np.flatnonzero((ids >= 0).all(axis=0))
    inverse, first = np.zeros(len(rows), dtype=np.int64), np.zeros(min(len(rows), 1), dtype=np.int64)
    for stage in ids:  # one sort of integers a stage, not one of columns
        code = inverse * (int(stage.max(initial=0)) + 1) + stage[rows]
        _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    dense = np.full(ids.shape[1], -1, dtype=np.int64)
    dense[rows] = inverse
    return dense, ids[:, rows[first]].T


def keys_hash(source: Source) -> str:
    """SHA-256 over the keys of all rows in order, each with a zero byte behind it.

    Raises:
        ValueError: two rows have the same key, or the source has no keys or no length.
    """
    return _digest(_packed_keys(source))


def _packed_keys(source: Source) -> Packed:
    if not hasattr(source, "key") or not hasattr(source, "__len__"):
        raise ValueError(
            f"{type(source).__name__} has no {'key' if hasattr(source, '__len__') else 'length'}: clusters and "
            "neighbours need a data set that is read at random, in the same order at every start (data=shards reads "
            "tar shards so)"
        )
    keys = Packed.of(source.key(row).encode("utf-8", "surrogateescape") for row in range(len(source)))
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    order = hashes.argsort(kind="stable")
    for place in (hashes[order][1:] == hashes[order][:-1]).nonzero()[0]:
        first, second = order[place : place + 2].tolist()
        if keys[first] == keys[second]:
            raise ValueError(
                f"samples {first} and {second} of data.train have the same key '{source.key(first)}': clusters and "
                "neighbours need one row a picture, or a batch holds it several times; a table makes one by "
                "data.train.group_by=image"
            )
    return keys


def _digest(keys: Packed) -> str:
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key + b"\0")
    return digest.hexdigest()
