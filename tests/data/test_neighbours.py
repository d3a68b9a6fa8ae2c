"""Batches in which each row stands beside a neighbour."""

from pathlib import Path

import numpy as np
import pytest
import torch

from repr.data.clusters import save_clusters
from repr.data.drawn.composition import DrawnComposition
from repr.data.neighbours import NeighbourOrder, Neighbours, nearest, save_neighbours
from repr.data.samplers import EpochBatchSampler
from repr.data.sources.mixture import Mixture
from tests.data.conftest import Noise

IDS = torch.tensor([[(row + 1) % 12, (row + 5) % 12] for row in range(12)])
IDS[3], IDS[4, 1] = -1, -1
ORDER = NeighbourOrder(Neighbours(IDS, "x"), seed=5)


def places(epoch: int, **options: int) -> list[list[tuple[int, int]]]:
    sampler = EpochBatchSampler(ORDER, 8, epoch=epoch, **options)
    return [[(place.visit, place.row) for place in batch] for batch in sampler]


def test_each_row_is_followed_by_one_of_its_neighbours() -> None:
    found = set()
    for epoch in range(20):
        visits, rows = ORDER.rows(epoch, torch.arange(24)).T
        first, second = rows.view(-1, 2).T
        assert first.sort().values.tolist() == list(range(12))
        assert visits.tolist() == [2 * epoch, 2 * epoch + 1] * 12
        found |= set(zip(first.tolist(), second.tolist(), strict=True))
    known = {(row, int(other)) for row in range(12) for other in IDS[row] if other >= 0}
    assert {pair for pair in found if pair[0] != 3} == known
    alone = {second for first, second in found if first == 3}
    assert 3 not in alone
    assert len(alone) > 5


def test_the_order_is_that_of_any_number_of_processes_and_goes_on_where_it_stopped() -> None:
    whole = places(3)
    assert whole != places(4)
    ranks = [places(3, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert places(3, start=2) == whole[2:]
    with pytest.raises(ValueError, match=r"data\.neighbours=x and data\.batch_size=12: .* 4 process.* a multiple of 8"):
        EpochBatchSampler(ORDER, 12, world_size=4)


def test_nearest_rows_are_those_of_largest_cosine() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1100, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    read = np.arange(1100) % 7 != 1
    ids = nearest(features, read, 3)
    similarity = np.where(read & ~np.eye(1100, dtype=bool), features @ features.T, -np.inf)
    assert np.array_equal(ids[read], similarity.argsort(axis=1)[read, :-4:-1])
    assert (ids[~read] == -1).all()
    assert nearest(features[:3], np.array([True, False, True]), 2).tolist() == [[2, -1], [-1, -1], [0, -1]]


def test_the_other_half_of_an_item_is_a_neighbour(make_datamodule) -> None:
    source = DrawnComposition(num_items=4, kinds=["attribute", "order"], size=32)
    neighbours = Neighbours.of("items", source)
    assert neighbours.ids[:, 0].tolist() == [1, 0, 3, 2, 5, 4, 7, 6, -1, -1, -1, -1]
    assert neighbours.mated(torch.tensor([1, 0, 0, 3, 8, 1, 4])).tolist() == [True] * 2 + [False] * 5
    datamodule = make_datamodule(train=source, eval={}, neighbours="items", batch_size=8)
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 3
    index, mated = (torch.cat([batch[key] for batch in batches]).view(-1, 2) for key in ("index", "mated"))
    assert torch.equal(mated[:, 0], mated[:, 1])
    assert torch.equal(mated[:, 0], (index[:, 0] // 2 == index[:, 1] // 2) & (index[:, 0] < 8))
    assert datamodule.order.made_with == {"data.neighbours": "items"}


def test_neighbours_are_kept_with_the_keys_of_their_set(tmp_path: Path) -> None:
    path, source = tmp_path / "neighbours.npz", Noise(12)
    save_neighbours(path, IDS.numpy(), source)
    assert torch.equal(Neighbours.of(str(path), source).ids, IDS)
    with pytest.raises(ValueError, match=r"was made of 12 samples, and data\.train has 13"):
        Neighbours.of(str(path), Noise(13))
    save_clusters(path, np.zeros((1, 12), dtype=int), source)
    with pytest.raises(ValueError, match="has no neighbours; take a file that procedure=neighbours wrote"):
        Neighbours.of(str(path), source)
    with pytest.raises(ValueError, match=r"\(Noise\) has no items of several rows; set procedure=neighbours"):
        Neighbours.of("items", source)
    with pytest.raises(ValueError, match="every row once an epoch"):
        Neighbours.of(str(path), Mixture([source], weights=[2.0]))


def test_one_order_excludes_another(make_datamodule) -> None:
    source = DrawnComposition(num_items=8, kinds=["attribute"], size=32)
    with pytest.raises(ValueError, match=r"data\.lanes and data\.neighbours exclude each other"):
        make_datamodule(train=source, neighbours="items", lanes=2)
