"""Batches of one cluster: the laws of the sampler, the authors' numbers, files of clusters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from repr.data.cluster_order import ClusterOrder
from repr.data.clusters import Clusters, accumulate, keys_hash, load_clusters, save_clusters
from repr.data.samplers import EpochBatchSampler
from repr.data.sources.mixture import Mixture
from repr.losses.contrastive import clip
from tests.golden import golden

MODES, LEFTOVERS = ("round_robin", "proportional"), ("drop", "merge", "carry")


def order_of(ids, batch_size, *, seed=0, **options):
    return ClusterOrder(Clusters(torch.as_tensor(ids), **options), batch_size, seed)


def groups_of(order):
    """The group of each row, -1 where it has none."""
    groups = torch.full((order.coverage()["samples"],), -1)
    groups[order.members] = torch.arange(len(order.sizes)).repeat_interleave(order.sizes)
    return groups


def batches(order, epoch=0, **options):
    sampler = EpochBatchSampler(order, order.batch_size, **options)
    sampler.sampler.set_epoch(epoch)  # as Lightning does
    return [[place.row for place in batch] for batch in sampler]


@st.composite
def clusterings(draw, size):
    """Up to 80 rows of six clusters or of none, among them ``size`` rows of one."""
    rows = draw(st.lists(st.integers(-1, 5), max_size=80 - size))
    return draw(st.permutations([*rows, *[draw(st.integers(0, 5))] * size]))


@settings(max_examples=60)
@given(
    data=st.data(),
    world=st.integers(1, 4),
    per_rank=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    leftovers=st.sampled_from(LEFTOVERS),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
)
def test_every_global_batch_is_of_one_cluster_and_no_row_comes_twice(
    data, world, per_rank, mode, leftovers, seed, epoch
):
    size = world * per_rank
    ids = data.draw(clusterings(size))
    order = order_of(ids, size, seed=seed, mode=mode, leftovers=leftovers)
    whole = batches(order, epoch)
    assert len(whole) == len(EpochBatchSampler(order, order.batch_size)) == len(order) // size
    rows = [row for batch in whole for row in batch]
    assert len(set(rows)) == len(rows) == len(order)
    groups = groups_of(order)
    for batch in whole:
        assert len(batch) == size
        assert len({int(groups[row]) for row in batch}) == 1
        assert -1 not in [ids[row] for row in batch]
        if leftovers == "drop":
            assert len({ids[row] for row in batch}) == 1
    ranks = [batches(order, epoch, rank=r, world_size=world) for r in range(world)]
    assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == whole
    again = order_of(ids, size, seed=seed, mode=mode, leftovers=leftovers)  # nothing but (seed, epoch) counts
    for start in {0, len(whole) // 2, len(whole) - 1}:
        sampler = EpochBatchSampler(again, again.batch_size, epoch=epoch, start=start)
        assert [[place.row for place in batch] for batch in sampler] == whole[start:]
        assert len(sampler) == len(whole)


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(1, 8), leftovers=st.sampled_from(LEFTOVERS), epoch=st.integers(0, 9))
def test_a_bad_row_is_replaced_from_its_own_cluster(data, size, leftovers, epoch):
    order = order_of(data.draw(clusterings(size)), size, leftovers=leftovers)
    sampler = EpochBatchSampler(order, order.batch_size, epoch=epoch)
    groups = groups_of(order)
    for batch in sampler:
        members = (groups == groups[batch[0].row]).nonzero()[:, 0].tolist()
        for place in batch:
            stands = [order.replacement(place, attempt, size) for attempt in range(1, len(members))]
            assert {stand.epoch for stand in stands} | {stand.visit for stand in stands} <= {epoch}
            assert sorted([place.row, *(stand.row for stand in stands)]) == members  # all of them, each once
        if len(members) > 1:
            first = [order.replacement(place, 1, size).row for place in batch]
            assert len(set(first)) == len(batch)
            if len(members) >= 2 * size:
                assert not set(first) & {place.row for place in batch}


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(1, 8))
def test_merging_uses_every_row_and_joins_neighbours_only(data, size):
    ids = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=80))
    order = order_of(ids, size, leftovers="merge")  # never an error where there are rows enough
    assert bool((order.sizes >= size).all())
    assert order.coverage()["samples_never_drawn"] == 0
    sizes = torch.bincount(torch.tensor(ids))
    big = {cluster for cluster, count in enumerate(sizes.tolist()) if count >= size}
    small = sorted(set(ids) - big)
    group = groups_of(order)
    groups = [int(group[ids.index(cluster)]) for cluster in small]
    joined = [group for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    assert len(set(joined)) == len(joined)  # small clusters of one group follow one another


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 2), min_size=8, max_size=60), size=st.integers(1, 8), epoch=st.integers(0, 20))
def test_what_an_epoch_leaves_out_is_carried_over(ids, size, epoch):
    order = order_of(ids, size, leftovers="carry")
    out, after = (set(range(len(ids))) - {r for b in batches(order, e) for r in b} for e in (epoch, epoch + 1))
    for members in map(set, [part.tolist() for part in order.members.split(order.sizes.tolist())]):
        if 2 * len(out & members) <= len(members):
            assert not out & after & members


def test_proportional_batches_are_shuffled_and_differ_by_epoch():
    ids = [0] * 40 + [1] * 8
    order = order_of(ids, 4, mode="proportional")
    sequences = {tuple(ids[batch[0]] for batch in batches(order, epoch)) for epoch in range(20)}
    assert len(sequences) > 5
    assert all(sum(sequence) == 2 and len(sequence) == 12 for sequence in sequences)
    turns = [ids[batch[0]] for batch in batches(order_of(ids, 4))]
    assert turns == [0, 1, 0, 1] + [0] * 8


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("world", [1, 2])
def test_round_robin_is_the_authors(case, world):
    """The same clusters in the same turn, and as many batches; which rows is up to the generator."""
    data = golden("mcl")
    labels, per_rank = data[f"samp{case}.labels"], int(data[f"samp{case}.batch_size"])
    key = f"samp{case}.w{world}_sameseed"
    order = order_of(labels.astype(np.int64), per_rank * world)
    for r in range(world):
        theirs = data[f"{key}.batches_r{r}"]
        ours = batches(order, rank=r, world_size=world)
        assert len(ours) == len(theirs) == int(data[f"{key}.len_r{r}"])
        assert [labels[batch[0]] for batch in ours] == [labels[batch[0]] for batch in theirs]
    rows = np.concatenate([data[f"{key}.batches_r{r}"].ravel() for r in range(world)])
    assert len(set(rows.tolist())) == len(rows) == len(order)


def test_the_authors_seed_of_each_rank_repeats_rows_and_ours_does_not():
    data = golden("mcl")
    theirs = [data[f"samp0.w2_rankseed.batches_r{r}"] for r in range(2)]
    assert any(set(a) & set(b) for a, b in zip(*(part.tolist() for part in theirs), strict=True))
    order = order_of(data["samp0.labels"].astype(np.int64), 2 * int(data["samp0.batch_size"]))
    ours = [batches(order, rank=r, world_size=2) for r in range(2)]
    assert not any(set(a) & set(b) for a, b in zip(*ours, strict=True))


@pytest.mark.parametrize("case", range(2))
def test_accumulated_clusters_are_as_meant_and_not_as_the_authors_script_has_them(case):
    data = golden("mcl")
    labels, num = data[f"comb{case}.cluster_labels"], int(data[f"comb{case}.K"])
    for stage in range(len(labels)):
        dense, table = accumulate(labels[: stage + 1])
        meant = data[f"comb{case}.clipmoe_stage{stage}"]
        powers = num ** np.arange(stage, -1, -1)
        np.testing.assert_array_equal((table * powers).sum(axis=1)[dense], meant)
        np.testing.assert_array_equal(dense, np.unique(meant, return_inverse=True)[1])  # dense, in the same order
        official = data[f"comb{case}.official_stage{stage}"]
        newest = [np.unique(ids, return_inverse=True)[1] for ids in (official, labels[stage])]
        np.testing.assert_array_equal(*newest)
        assert (len(np.unique(official)) < len(table)) == (stage > 0)


def test_a_row_without_a_cluster_in_one_stage_has_none():
    dense, table = accumulate(np.array([[0, 1, -1, 1], [3, 2, 2, -1]]))
    assert dense.tolist() == [0, 1, -1, -1]
    assert table.tolist() == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("case", "batch"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_loss_inside_a_batch_is_the_authors(case, batch):
    data, key = golden("mcl"), f"loss{case}.batch{batch}"
    index = data[f"{key}.index"]
    labels = data[f"samp{case}.labels"]
    assert len(set(labels[index].tolist())) == 1
    scale = torch.tensor(float(data[f"loss{case}.logit_scale"]), dtype=torch.float64, requires_grad=True)
    image, text = (
        torch.as_tensor(data[f"loss{case}.{name}"][index]).double().requires_grad_() for name in ("img", "txt")
    )
    value = clip(image, text, logit_scale=scale)
    value.backward()
    assert value.item() == pytest.approx(float(data[f"{key}.clip.f64"]), rel=1e-6)
    assert scale.grad.item() == pytest.approx(float(data[f"{key}.clip.grad_logit_scale"]), rel=1e-4, abs=1e-9)
    for ours, name in ((image, "img"), (text, "txt")):
        theirs = torch.as_tensor(data[f"{key}.clip.grad_{name}"])
        unit = F.normalize(ours.detach(), dim=1)  # ours normalises inside, theirs takes unit vectors
        tangent = theirs - (theirs * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(ours.grad, tangent, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "size", "options", "message"),
    [
        ([0, 0, 0, 1, 1, 2], 4, {}, r"data.batch_size=4, .* 3 clusters have 1 to 3 .* at most 2; .* to 3 or less"),
        ([0, 0, 1, 1], 8, {"leftovers": "merge"}, "no cluster fills a batch"),
        ([-1, -1], 1, {}, "no sample of data.train has a cluster"),
        ([0, 0], 1, {"mode": "random"}, "mode is 'random'; set it to round_robin or proportional"),
        ([0, 0], 1, {"leftovers": "keep"}, "leftovers is 'keep'"),
    ],
)
def test_errors(ids, size, options, message):
    with pytest.raises(ValueError, match=message):
        order_of(ids, size, **options)


def test_a_cluster_with_fewer_rows_than_processes_is_left_out():
    order = order_of([0] * 9 + [1] * 3, 4)
    parts = [batches(order, rank=r, world_size=4) for r in range(4)]
    assert all(len(part) == 2 for part in parts)
    assert {row for part in parts for batch in part for row in batch} <= set(range(9))
    assert order.coverage() == {
        "samples": 12,
        "samples_an_epoch": 8,
        "batches_an_epoch": 2,
        "samples_never_drawn": 3,
        "samples_without_cluster": 0,
        "clusters": 2,
        "clusters_smaller_than_a_batch": 1,
        "groups_that_fill_a_batch": 1,
    }


def test_a_file_of_clusters_is_for_one_data_set(tmp_path, noise):
    source, path = noise(6), tmp_path / "clusters.npz"
    centroids = [{"image": np.ones((2, 3), np.float32)}]
    made = save_clusters(path, np.array([[0, 1, 0, 1, 0, -1]]), source, centroids)
    read = load_clusters(path, mode="proportional")
    assert read.ids.tolist() == made.ids.tolist() == [0, 1, 0, 1, 0, -1]
    read.check(source)
    with np.load(path) as content:
        ends = content["key_ends"].tolist()
        keys = [bytes(content["key_bytes"][a:b]).decode() for a, b in zip([0, *ends], ends, strict=False)]
        assert keys == [source.key(row) for row in range(6)]
        assert content["centroids_0_image"].shape == (2, 3)
    for other in (noise(7), Reversed(source)):
        with pytest.raises(ValueError, match="use the data set that was clustered"):
            read.check(other)
    with pytest.raises(ValueError, match=r"data\.train\.weights=null"):
        Clusters(torch.zeros(6, dtype=torch.int64)).check(Mixture([noise(3), noise(3)], [1, 2]))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"clusters\.npz is damaged"):
        load_clusters(path)
    with pytest.raises(ValueError, match="does not exist"):
        load_clusters(tmp_path / "none.npz")


class Reversed:
    """The same rows in another order."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def key(self, index):
        return self.source.key(len(self) - 1 - index)


class Repeated(Reversed):
    def key(self, index):
        return "same" if index in (2, 4) else str(index)


class Stream:
    def __iter__(self):
        return iter([])


def test_a_data_set_without_keys_length_or_with_keys_that_repeat_is_refused(noise):
    with pytest.raises(ValueError, match=r"samples 2 and 4 of data\.train have the same key 'same'"):
        keys_hash(Repeated(noise(6)))
    with pytest.raises(ValueError, match=r"Stream has no length: .* read at random, in the same order"):
        keys_hash(Stream())


def test_the_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    batches(order_of([0] * 10, 2, mode="proportional", leftovers="carry"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_place_keeps_its_epoch_in_a_worker():
    """A worker knows the epoch from the place alone."""
    order = order_of([0] * 9 + [1] * 9, 3)
    places = next(iter(EpochBatchSampler(order, order.batch_size, epoch=5)))
    elsewhere = order_of([0] * 9 + [1] * 9, 3)
    assert all(place.epoch == 5 for place in places)
    expected = order.replacement(places[0], 1, 3)
    assert elsewhere.replacement(places[0], 1, 3) == expected == places[0]._replace(row=expected.row)


class WithBadRows:
    """Rows 3 and 8 cannot be read."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def image(self, index):
        if index in (3, 8):
            raise OSError(f"row {index} is damaged")
        return self.source.image(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_datamodule_gives_batches_of_one_cluster_also_where_rows_are_bad(make_datamodule, noise, num_workers):
    ids = torch.arange(31) % 3
    options = {"batch_size": 4, "max_bad_fraction": 0.1, "num_workers": num_workers}
    datamodule = make_datamodule(train=WithBadRows(noise(31)), clusters=Clusters(ids), **options)
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 6  # of 11, 10 and 10 rows
    assert {row for batch in batches for row, _ in batch.get("bad", ())} <= {3, 8}
    for batch in batches:
        assert len(set(ids[batch["index"]].tolist())) == 1
        assert len(set(batch["index"].tolist())) == 4
        assert not {3, 8} & set(batch["index"].tolist())
    assert any("bad" in batch for batch in batches)
    whole = torch.cat([batch["index"] for batch in datamodule.predict_dataloader()])
    assert whole.tolist() == [row if row not in (3, 8) else -1 - row for row in range(31)]


def test_a_datamodule_refuses_clusters_of_other_rows(make_datamodule):
    with pytest.raises(ValueError, match=r"31 samples and the clusters were made of 30"):
        make_datamodule(clusters=Clusters(torch.zeros(30, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no cluster fills a batch"):
        make_datamodule(clusters=Clusters(torch.arange(31)))
