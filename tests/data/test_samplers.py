import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repr.data.epoch_order import EpochOrder, Place
from repr.data.samplers import EpochBatchSampler, EvalBatchSampler
from repr.seeds import permute


def make(num_samples, batch_size, *, seed, **options):
    return EpochBatchSampler(EpochOrder([(num_samples, 1.0)], seed), batch_size, **options)


def batches(*sizes, epoch=0, **options):
    sampler = make(*sizes, **options)
    if epoch:
        sampler.set_epoch(epoch)
    return list(sampler)


@settings(max_examples=60)
@given(
    world=st.integers(1, 4),
    per_rank=st.integers(1, 5),
    num_batches=st.integers(1, 6),
    rest=st.integers(0, 19),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
)
def test_an_epoch_is_a_permutation_cut_into_batches_and_ranks(world, per_rank, num_batches, rest, seed, epoch):
    size = world * per_rank
    num_samples = num_batches * size + rest % size
    whole = batches(num_samples, size, seed=seed, epoch=epoch)
    assert len(whole) == num_batches == len(make(num_samples, size, seed=seed))
    assert {place.epoch for batch in whole for place in batch} == {epoch}
    rows = [place.row for batch in whole for place in batch]
    assert len(set(rows)) == len(rows) == num_batches * size
    assert rows == permute(torch.arange(num_samples), num_samples, seed, epoch, -1)[: len(rows)].tolist()
    ranks = [batches(num_samples, size, seed=seed, epoch=epoch, rank=r, world_size=world) for r in range(world)]
    assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == whole


def test_every_row_is_left_out_in_some_epoch_only():
    seen = [{row for batch in batches(10, 4, seed=1, epoch=e) for *_, row in batch} for e in range(12)]
    assert all(len(rows) == 8 for rows in seen)
    assert set.union(*seen) == set(range(10))


def test_order_differs_between_epochs_and_seeds():
    orders = [tuple(permute(torch.arange(50), 50, seed, epoch, -1).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_start_applies_to_its_epoch_only():
    whole = {epoch: batches(23, 4, seed=3, epoch=epoch) for epoch in (4, 5)}
    sampler = make(23, 4, seed=3, epoch=4, start=2)
    assert len(sampler) == 5
    assert list(sampler) == whole[4][2:]
    sampler.sampler.set_epoch(4)  # as Lightning does, before and after the first iter
    assert list(sampler) == whole[4][2:]
    sampler.sampler.set_epoch(5)
    assert list(sampler) == whole[5]


def test_an_iterator_keeps_the_epoch_it_was_made_in():
    sampler = make(23, 4, seed=3)
    iterator = iter(sampler)
    sampler.set_epoch(7)
    assert next(iterator)[0][0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 24}, "batch of 24 but only 23 .* set data.batch_size <= 23"),
        ({"batch_size": 4, "world_size": 3}, "data.batch_size=4 .* positive multiple of 3"),
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 4, "start": 5}, "start at batch 5 of 5"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank 2 does not exist"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(23, options.pop("batch_size"), seed=0, **options)


@settings(max_examples=60)
@given(world=st.integers(1, 4), per_rank=st.integers(1, 5), num_rows=st.integers(1, 60))
def test_evaluation_is_in_order_with_equal_batches_on_all_ranks(world, per_rank, num_rows):
    ranks = [list(EvalBatchSampler(num_rows, world * per_rank, rank=r, world_size=world)) for r in range(world)]
    assert len({tuple(len(batch) for batch in rank) for rank in ranks}) == 1
    gathered = [row for parts in zip(*ranks, strict=True) for part in parts for row in part]
    assert gathered == sorted(gathered)
    assert list(dict.fromkeys(gathered)) == list(range(num_rows))
    assert len(gathered) < num_rows + world
    assert len(EvalBatchSampler(num_rows, world * per_rank)) == len(ranks[0])


def test_evaluation_batch_must_be_shared_equally():
    with pytest.raises(ValueError, match=r"data\.eval_batch_size=3"):
        EvalBatchSampler(10, 3, world_size=2)


def test_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    batches(23, 4, seed=3)
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=30)
@given(
    parts=st.lists(
        st.tuples(st.integers(3, 40), st.sampled_from([0.4, 0.5, 1.0, 1.5, 2.0, 3.25])), min_size=1, max_size=3
    ),
    seed=st.integers(0, 99),
)
def test_weights_say_how_often_an_epoch_shows_a_row(parts, seed):
    """Over 20 epochs every row of a part is seen equally often, to one, and never twice as the same views."""
    order = EpochOrder(parts, seed)
    places = torch.cat([order.rows(epoch, torch.arange(len(order))) for epoch in range(20)])
    assert len({tuple(place) for place in places.tolist()}) == len(places) == 20 * len(order)
    first = 0
    for num, weight in parts:
        mine = (places[:, 1] >= first) & (places[:, 1] < first + num)
        counts = torch.bincount(places[mine, 1] - first, minlength=num)
        assert int(counts.sum()) == 20 * round(num * weight)
        assert counts.max() - counts.min() <= 1
        first += num


def test_without_weights_the_order_is_the_permutation_of_the_epoch():
    rows = EpochOrder([(7, 1.0), (5, 1.0)], 3).rows(4, torch.arange(12))
    assert rows[:, 1].tolist() == permute(torch.arange(12), 12, 3, 4, -1).tolist()
    assert set(rows[:, 0].tolist()) == {4}
    with pytest.raises(ValueError, match=r"weight 0\.01 of a source of 7 rows"):
        EpochOrder([(7, 0.01)], 3)


@pytest.mark.parametrize("parts", [[(10**9, 1.0)], [(7 * 10**8, 0.5), (10**9, 1.5)]])
def test_the_order_of_a_billion_rows_takes_no_memory(parts):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tracemalloc.start()
    before = resident()
    size, last = 4096, round(sum(num * weight for num, weight in parts)) // 4096 - 1
    ranks = [EpochBatchSampler(EpochOrder(parts, 3), size, rank=r, world_size=2, start=last) for r in range(2)]
    places = [place for rank in ranks for batch in rank for place in batch]
    held, (_, peak) = resident() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(held, peak) < 100e6
    assert [place.position for place in places] == list(range(last * size, (last + 1) * size))
    assert len({(place.visit, place.row) for place in places}) == size
    assert min(place.row for place in places) < 10**7
    assert max(place.row for place in places) > sum(num for num, _ in parts) - 10**7
    stand = ranks[0].order.replacement(places[0], 1, size)
    assert stand.row not in {place.row for place in places}


def test_a_bad_row_is_replaced_by_the_one_in_the_same_place_of_the_next_batch():
    sampler = make(23, 4, seed=3, epoch=2)
    order = permute(torch.arange(23), 23, 3, 2, -1).tolist()
    for batch, places in enumerate(sampler):
        for slot, place in enumerate(places):
            replacement = sampler.order.replacement(place, 1, sampler.global_batch_size)
            assert replacement == place._replace(row=order[(4 * (batch + 1) + slot) % 23])
            assert replacement.row not in [other.row for other in places]


@settings(max_examples=30)
@given(num=st.integers(2, 40), size=st.integers(1, 40), place=st.integers(0, 39))
def test_replacements_go_through_the_whole_epoch(num, size, place):
    size, place = min(size, num), place % num
    sampler = make(num, size, seed=0)
    first = Place(0, place, 0, int(permute(torch.tensor([place]), num, 0, 0, -1)))
    rows = [sampler.order.replacement(first, attempt, sampler.global_batch_size).row for attempt in range(1, num)]
    assert sorted([first.row, *rows]) == list(range(num))
