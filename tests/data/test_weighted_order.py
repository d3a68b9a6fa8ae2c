"""The order in which each row has a weight of its own."""

import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repr.data.clusters import Clusters
from repr.data.samplers import EpochBatchSampler
from repr.data.sources.mixture import Mixture
from repr.data.sources.table import Table
from repr.data.weighted_order import WeightedOrder
from tests.data.test_datamodule import fit

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:The dirpath has changed")


def counts(order, epochs):
    """How often each epoch visits each row: (E, N)."""
    rows = [order.rows(epoch, torch.arange(len(order)))[:, 1] for epoch in epochs]
    return np.stack([np.bincount(own, minlength=order.parts[0][0]) for own in rows])


@settings(max_examples=30)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.125, 0.3, 0.5, 1.0, 1.7, 4.0]), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_rows_are_visited_in_proportion_to_their_weights(weights, seed) -> None:
    """Any 8 epochs from a multiple of 8 on visit a row 8 w times, rounded; never twice as the same views."""
    weights = np.array([*weights, 2.0])
    order = WeightedOrder(weights, seed)
    exact = weights * len(order) / weights.sum()  # an epoch has a whole number of visits
    places = torch.cat([order.rows(epoch, torch.arange(len(order))) for epoch in range(16)])
    assert len(places.unique(dim=0)) == len(places) == 16 * round(weights.sum())
    seen = counts(order, range(16))
    for found, expected in ((seen, exact), (seen[:8].sum(0), 8 * exact), (seen[8:].sum(0), 8 * exact)):
        assert (np.floor(expected - 1e-9) <= found).all()
        assert (found <= np.ceil(expected + 1e-9)).all()


def test_a_large_set_is_weighed_the_same_for_all_processes() -> None:
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=2 * 10**5)
    order, size = WeightedOrder(weights, 3), 512
    assert np.abs(counts(order, [5])[0] - weights * len(order) / weights.sum()).max() < 1 + 1e-6
    whole = EpochBatchSampler(order, size, epoch=1, start=7)
    ranks = [
        EpochBatchSampler(WeightedOrder(weights, 3), size, rank=r, world_size=4, epoch=1, start=7) for r in range(4)
    ]
    batch, *parts = next(zip(whole, *ranks, strict=True))
    assert list(chain(*parts)) == batch


def table(folder: Path, weights: list, name: str = "t") -> Path:
    rows = [{"image": f"{row}.png", "caption": "x", "weight": weight} for row, weight in enumerate(weights)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / f"{name}.jsonl"


def test_a_column_of_a_table_weighs_its_rows_also_in_a_mixture(tmp_path: Path) -> None:
    one = Table(table(tmp_path, [0.5, "2", 0, 1.0]), weights="weight")
    assert one.row_weights is not None
    assert one.row_weights.tolist() == [0.5, 2, 0, 1]
    two = Table(table(tmp_path, [7] * 3, "u"))
    assert Mixture([two, two]).row_weights is None
    mixed = Mixture([one, two], weights=[2, 0.5]).row_weights
    assert mixed is not None
    assert mixed.tolist() == [1, 4, 0, 2, 0.5, 0.5, 0.5]
    grouped = Table(tmp_path / "t.jsonl", weights="weight", group_by="image", where={"weight": ">0"})
    assert grouped.row_weights is not None
    assert grouped.row_weights.tolist() == [0.5, 2, 1]
    for bad, message in (
        (-1, r"t\.jsonl, line 2: the weight -1 in column .weight. is no number from 0 on"),
        (math.nan, "line 2: the weight nan in"),
        (math.inf, "line 2: the weight inf in"),
        (None, "line 2: the weight None in"),
        ("", "line 2: the weight '' in"),
        ([1], r"line 2: the weight \[1\] in"),
    ):
        with pytest.raises(ValueError, match=message):
            Table(table(tmp_path, [1, bad]), weights="weight")
    with pytest.raises(ValueError, match="all weights in column 'weight' are 0"):
        Table(table(tmp_path, [0, 0]), weights="weight")
    with pytest.raises(ValueError, match="line 1: the weight None in column 'wight'"):
        Table(tmp_path / "t.jsonl", weights="wight")


def test_weighted_rows_are_trained_on_and_resumed_within_an_epoch(make_datamodule, noise, tmp_path: Path) -> None:
    def source(weights: list) -> object:
        rows = noise(len(weights))
        rows.row_weights = np.array(weights)
        return rows

    weights = [0.0, 3.0, *[0.5] * 18]  # 12 visits
    options = {"limit_val_batches": 0}
    whole = fit(make_datamodule(train=source(weights)), tmp_path, **options).batches
    assert len(whole) == 3 * 2
    for epoch in range(3):
        rows = [row for _, rows, *_ in whole[2 * epoch : 2 * epoch + 2] for row in rows]
        assert (rows.count(0), rows.count(1)) == (0, 3)
    assert sorted({*whole[0][1], *whole[1][1], *whole[2][1], *whole[3][1]}) == list(range(1, 20))
    assert len({seed for _, _, seeds, _ in whole for seed in seeds}) == 36
    resumed = fit(make_datamodule(train=source(weights)), tmp_path, checkpoint=tmp_path / "step=3.ckpt", **options)
    assert resumed.batches == whole[3:]
    with pytest.raises(ValueError, match=r"cannot resume: hash of data\.train's weights was"):
        fit(make_datamodule(train=source(weights[::-1])), tmp_path, checkpoint=tmp_path / "step=3.ckpt", **options)
    for more, message in (
        (
            {"clusters": Clusters(torch.zeros(20, dtype=torch.int64))},
            r"every row once an epoch: set data\.train\.weights",
        ),
        ({"lanes": 2}, r"data\.lanes=2 .*those of data\.train have weights: set data\.lanes=null"),
        ({"train": source([0.1, 0.2])}, r"weights of data\.train add up to 0\.3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_datamodule(**{"train": source(weights), **more})
