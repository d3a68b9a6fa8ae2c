"""The order that reads shard by shard: what an epoch shows, who reads what, and that processes change nothing."""

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repr.data.samplers import EpochBatchSampler
from repr.data.shard_order import ShardOrder
from repr.data.sources.mixture import Mixture
from repr.data.sources.shards import Shards
from tests.data.test_datamodule import fit
from tests.data.test_tables_and_shards import sample, tar

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:The dirpath has changed")

BLOCKS = np.random.default_rng(0).integers(900, 1101, 400)  # rows of 400 shards
OPTIONS = {"batch_size": 512, "seed": 3, "lanes": 16, "window": 8}


def make(parts, blocks, **options):
    return ShardOrder(parts, blocks, **{**OPTIONS, **options})


def shards_of(rows, blocks):
    return np.searchsorted(np.cumsum(blocks), rows, side="right")


def test_an_epoch_reads_each_shard_about_once_and_mixes_many() -> None:
    num = int(BLOCKS.sum())
    order = make([(num, 1.0)], BLOCKS)
    epochs = [order.rows(epoch, torch.arange(len(order) // 512 * 512)) for epoch in range(3)]
    left_out = []
    for epoch, places in enumerate(epochs):
        assert set(places[:, 0].tolist()) == {epoch}
        rows = places[:, 1].numpy()
        assert len(np.unique(rows)) == len(rows) > num - 16 - 512  # no row twice; some fill no lane, some no batch
        left_out.append(set(range(num)) - set(rows.tolist()))
        batches = shards_of(rows, BLOCKS).reshape(-1, 512)
        assert np.mean([len(np.unique(batch)) for batch in batches]) == pytest.approx(120, abs=8)
        for world in (1, 2, 4, 8, 16):  # the reads of all processes together
            slices = batches.reshape(len(batches), world, -1).transpose(1, 0, 2)
            assert sum(len(np.unique(own)) for own in slices) <= 400 + world - 1
    assert not set.intersection(*left_out)
    assert len({tuple(places[:50, 1].tolist()) for places in epochs}) == 3


@pytest.mark.parametrize("weights", [[1.0], [0.5, 1.0, 2.25]])
def test_every_number_of_processes_sees_the_same_batches(weights: list[float]) -> None:
    blocks = np.tile([30, 7, 0, 55], 6 * len(weights))
    parts = [(92 * 6, weight) for weight in weights]
    order = make(parts, blocks, batch_size=64)
    for epoch, start in ((0, 0), (5, 5)):
        whole = list(islice(EpochBatchSampler(order, 64, epoch=epoch, start=start), 4))
        for world in (2, 4, 16):  # a restart with other processes, anywhere in an epoch
            fresh = make(parts, blocks, batch_size=64)
            samplers = [
                EpochBatchSampler(fresh, 64, rank=rank, world_size=world, epoch=epoch, start=start)
                for rank in range(world)
            ]
            assert [list(chain(*slices)) for slices in islice(zip(*samplers, strict=True), 4)] == whole
    with pytest.raises(ValueError, match=r"data\.lanes=16 and 64 processes.*a multiple of 64"):
        EpochBatchSampler(order, 64, world_size=64)


@settings(max_examples=25)
@given(
    blocks=st.tuples(*[st.integers(1, 9)] * 4, st.lists(st.integers(0, 9), max_size=36))
    .map(lambda parts: [*parts[:4], *parts[4]])
    .flatmap(st.permutations),
    lanes=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 5),
    share=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_any_shards_give_every_row_at_most_once(blocks, lanes, window, share, epoch) -> None:
    num = sum(blocks)
    order = make([(num, 1.0)], blocks, batch_size=lanes * share, lanes=lanes, window=window)
    rows = order.rows(epoch, torch.arange(len(order) // order.batch_size * order.batch_size))[:, 1]
    assert rows.unique().numel() == rows.numel() > num - lanes - order.batch_size
    assert ((rows >= 0) & (rows < num)).all()
    if len(order) >= 2 * order.batch_size:  # what stands in for a row is none of its batch, and each is another
        places = next(iter(EpochBatchSampler(order, order.batch_size, epoch=epoch)))
        stand = [order.replacement(place, 1, order.batch_size).row for place in places]
        assert len({*stand, *(place.row for place in places)}) == 2 * len(places)


def test_parts_keep_their_weights_and_have_their_share_of_every_batch() -> None:
    """Over 8 epochs every row of a part is seen about as often, never twice as the same views."""
    parts, blocks = [(3000, 0.25), (5000, 1.0), (600, 3.0)], np.full(86, 100)
    order = make(parts, blocks, batch_size=128)
    assert order.parts == [(3000, 46 * 16), (5000, 312 * 16), (600, 112 * 16)]  # to 15 rows
    places = torch.stack([order.rows(epoch, torch.arange(len(order) // 128 * 128)) for epoch in range(8)])
    assert len(places.view(-1, 2).unique(dim=0)) == places.numel() // 2
    part = torch.bucketize(places[..., 1].reshape(8, -1, 128).contiguous(), torch.tensor([3000, 8000]), right=True)
    for number, (_, visits) in enumerate(order.parts):
        in_batch = (part == number).sum(-1)
        assert (in_batch.float() - 128 * visits / len(order)).abs().max() <= 6
    counts = torch.bincount(places[..., 1].reshape(-1), minlength=8600)
    for rows, often in ((slice(0, 3000), 2), (slice(3000, 8000), 8), (slice(8000, 8600), 24)):
        assert (counts[rows].float().mean() / often - 1).abs() < 0.05
        assert (counts[rows] - often).abs().max() <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 12}, r"data\.lanes=12, .*data\.batch_size=512.*set data\.lanes=8"),
        ({"lanes": 512}, r"400 shards.*set data\.lanes=256"),
        ({"lanes": 0}, r"set data\.lanes=1"),
        ({"window": 0}, r"data\.window to 1 or more"),
        (
            {"parts": [(int(BLOCKS.sum()) - 900, 1.0), (900, 0.01)], "blocks": [*BLOCKS[:-1], 9]},
            "9 rows of a source of",
        ),
    ],
)
def test_lanes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"parts": [(int(BLOCKS.sum()), 1.0)], "blocks": BLOCKS, **options})


def test_shards_are_trained_on_lane_by_lane_and_resumed_within_an_epoch(make_datamodule, noise, tmp_path: Path) -> None:
    for shard in range(6):
        tar(tmp_path / f"{shard}.tar", *(member for key in "abcde" for member in sample(f"{shard}{key}")))
    shards = Shards(str(tmp_path / "*.tar"), captions=["txt"])
    assert shards.blocks.tolist() == [5] * 6
    part = Shards(str(tmp_path / "*.tar"), captions=["txt"], part=[0, 0.5])
    assert part.blocks.tolist() == [
        sum(part.key(row).startswith(f"{n}.") for row in range(len(part))) for n in range(6)
    ]
    assert Mixture([part, shards]).blocks.tolist() == [*part.blocks, *shards.blocks]

    lanes = {"train": shards, "lanes": 3, "window": 2, "eval": {}}
    whole = fit(make_datamodule(**lanes), tmp_path, limit_val_batches=0).batches
    assert len(whole) == 3 * 5
    assert [len({row // 5 for _, rows, *_ in whole[:5] for row in rows[n : n + 2]}) for n in (0, 2, 4)] == [2] * 3
    resumed = fit(make_datamodule(**lanes), tmp_path / "2", checkpoint=tmp_path / "step=7.ckpt", limit_val_batches=0)
    assert resumed.batches == whole[7:]
    for changed in ({"lanes": 2}, {"window": 1}, {"lanes": None}):
        with pytest.raises(ValueError, match=r"cannot resume: data\.lanes was 3 \(data\.window=2"):
            fit(make_datamodule(**{**lanes, **changed}), tmp_path, checkpoint=tmp_path / "step=7.ckpt")
    for source in (noise(31), Mixture([shards, noise(31)])):
        with pytest.raises(ValueError, match=r"data\.lanes=3, but data\.train .* has no shards"):
            make_datamodule(**{**lanes, "train": source})
