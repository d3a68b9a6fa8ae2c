"""Batches in which each row stands beside a neighbour: a row that is like it, and hard to tell from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repr.data.clusters import keys_hash, read_arrays
from repr.data.epoch_order import EpochOrder, Order
from repr.data.sources.source import Source, has_questions, parts_of, row_weights_of
from repr.data.views import Purpose, stream
from repr.files import replacing
from repr.seeds import sample_seed, uniform

_BLOCK = 1024  # rows whose similarities to all exist at a time


@dataclass(frozen=True)
class Neighbours:
    """The neighbours of the rows of a training set.

    Attributes:
        ids: (N, K) int64, rows; -1, behind the others, where a row has fewer.
        name: what they are called in checkpoints and errors.
    """

    ids: Tensor
    name: str

    @classmethod
    def of(cls, where: str, source: Source) -> Neighbours:
        """Those of a training set.

        Args:
            where: ``items``: the other rows of an item are neighbours; else a file of :func:`save_neighbours`.
            source: the training set.

        Raises:
            ValueError: it has no items of several rows, the file is not one of this set, or rows have weights.
        """
        if any(weight != 1 for _, weight in parts_of(source)) or row_weights_of(source) is not None:
            raise ValueError("data.neighbours shows every row once an epoch: set data.train.weights=null")
        if where == "items":
            return cls(_of_items(source), where)
        content = read_arrays(Path(where), "data.neighbours")
        if "neighbours" not in content:
            raise ValueError(f"data.neighbours: {where} has no neighbours; take a file that procedure=neighbours wrote")
        if len(content["neighbours"]) != len(source) or keys_hash(source) != str(content["keys"]):
            raise ValueError(
                f"data.neighbours: {where} was made of {len(content['neighbours'])} samples, and data.train has "
                f"{len(source)}, or their keys or order differ: use the data set that it was made of"
            )
        ids = torch.from_numpy(content["neighbours"].astype(np.int64))
        return cls(ids, f"file {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}")

    def mated(self, rows: Tensor) -> Tensor:
        """Where rows (B,) int64 stand beside a neighbour, the first beside the second and so on: (B,) bool."""
        found = torch.zeros(len(rows), dtype=torch.bool)
        first, second = rows[: len(rows) // 2 * 2].view(-1, 2).unbind(1)
        found[: 2 * len(first)] = (self.ids[first] == second[:, None]).any(1).repeat_interleave(2)
        return found


def _of_items(source: Source) -> Tensor:
    """The other rows of each row's item."""
    if not has_questions(source) or source.items.shape[1] < 2:
        raise ValueError(
            f"data.neighbours=items: data.train ({type(source).__name__}) has no items of several rows; set "
            "procedure=neighbours, which finds neighbours by features, or data.neighbours=null"
        )
    items = torch.from_numpy(np.asarray(source.items))
    ids = torch.full((len(source), items.shape[1] - 1), -1)
    for place in range(items.shape[1]):
        others = torch.cat([items[:, :place], items[:, place + 1 :]], dim=1)
        there = items[:, place] >= 0
        ids[items[there, place]] = others[there].sort(1, descending=True).values
    return ids


def save_neighbours(path: Path, ids: np.ndarray, source: Source) -> None:
    """Write the neighbours (N, K) of a data set, as :func:`nearest` gives them, to an ``.npz`` file.

    Raises:
        ValueError: two rows have the same key.
    """
    with replacing(path) as file:
        np.savez(file, neighbours=ids.astype(np.int32), keys=np.array(keys_hash(source)))


def nearest(features: np.ndarray, read: np.ndarray, num: int) -> np.ndarray:
    """The rows that are most similar to each, by brute force.

    Args:
        features: (N, D) float32, of length 1.
        read: (N,) bool, the rows that count.
        num: K.

    Returns:
        (N, K) int64, the most similar first; -1 where there are fewer, and for rows that do not count.
    """
    rows = np.flatnonzero(read)
    x, ids = torch.from_numpy(features[rows]), np.full((len(read), num), -1)
    num = min(num, len(rows) - 1)
    for start in range(0, len(rows), _BLOCK):
        similarity = x[start : start + _BLOCK] @ x.T
        similarity.diagonal(start).fill_(-torch.inf)
        ids[rows[start : start + _BLOCK], :num] = rows[similarity.topk(num).indices.numpy()]
    return ids


class NeighbourOrder(Order):
    """The order of an epoch in which each row, shuffled, is followed by one of its neighbours.

    So an epoch has 2 N places: N rows, each at an even place, and behind it a neighbour that is drawn for it. A row
    that has none is followed by any other. Views and captions of the second are drawn for themselves.

    Source: NegCLIP (Yuksekgonul et al., 2023, arXiv 2210.01936), which draws one of three nearest pictures.
    """

    together = 2

    def __init__(self, neighbours: Neighbours, seed: int) -> None:
        self.ids, self.seed = neighbours.ids, seed
        num = len(self.ids)
        self._first = EpochOrder([(num, 1.0)], seed)
        self.parts = [(num, 2 * num)]
        self.made_with = {"data.neighbours": neighbours.name}

    def rows(self, epoch: int, positions: Tensor) -> Tensor:
        """Visit and row at these positions (M,) int64 of an epoch: (M, 2) int64."""
        (visit, row), is_second = self._first.rows(epoch, positions // 2).unbind(1), positions % 2
        draws = uniform(stream(sample_seed(self.seed, visit, row), Purpose.NEIGHBOUR), 2).double()
        ids, num = self.ids[row], len(self.ids)
        count = (ids >= 0).sum(1)
        chosen = ids.gather(1, (draws[:, :1] * count[:, None]).long())[:, 0]
        other = (row + 1 + (draws[:, 1] * (num - 1)).long()) % num
        second = torch.where(count > 0, chosen, other)
        return torch.stack([2 * visit + is_second, torch.where(is_second > 0, second, row)], dim=1)
