import numpy as np
import pytest
import torch

from repr.metrics.knn import knn, knn_sweep, largest


def clusters(rng, num, labels=(3, 8, 20), spread=1.5):
    """Points around one random direction a label; the directions depend on the label alone."""
    which = torch.randint(len(labels), (num,), generator=rng)
    centres = torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(1))
    return centres[which] + spread * torch.randn(num, 10, generator=rng), torch.tensor(labels)[which]


def brute(bank, bank_labels, query, labels, k, temperature):
    hits = 0
    for q, label in zip(query, labels, strict=True):
        cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        votes = dict.fromkeys(bank_labels.tolist(), 0.0)
        for b in np.argsort(-cosine)[:k]:
            votes[int(bank_labels[b])] += np.exp(cosine[b] / temperature)
        hits += max(votes, key=votes.get) == label
    return hits / len(labels)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_a_plain_loop(table, rng, k, temperature):
    (x, y), (q, z) = clusters(rng, 90), clusters(rng, 60)
    expected = brute(x.double().numpy(), y.numpy(), q.double().numpy(), z.numpy(), k, temperature)
    for chunk_size in (7, 256):
        values = knn(
            table(x, kind=y), table(q, kind=z), attribute="kind", k=k, temperature=temperature, chunk_size=chunk_size
        )
        assert values["knn_kind"] == pytest.approx(expected)
        assert values["knn_kind.chance"] == z.bincount().max().item() / 60
    assert 0.4 < expected < 1  # the comparison is of something


def test_unlabelled_rows_are_left_out(table, rng):
    (x, y), (q, z) = clusters(rng, 40), clusters(rng, 30)
    y[::3], z[::4] = -1, -1
    some = knn(table(x, kind=y), table(q, kind=z), attribute="kind")
    assert some == knn(table(x[y >= 0], kind=y[y >= 0]), table(q[z >= 0], kind=z[z >= 0]), attribute="kind")


def test_a_class_that_the_bank_lacks_is_wrong(table):
    values = knn(table(torch.eye(2), kind=[0, 1]), table(torch.eye(2), kind=[0, 5]), attribute="kind", k=1)
    assert values == {"knn_kind": 0.5, "knn_kind.chance": 0.5}


def test_a_tiny_temperature_does_not_overflow(table):
    values = knn(
        table(torch.eye(3), kind=[0, 1, 2]), table(torch.eye(3), kind=[0, 1, 2]), attribute="kind", temperature=1e-4
    )
    assert values["knn_kind"] == 1


@pytest.mark.parametrize("value", [0.3, 0.0])
def test_a_collapsed_model_stays_at_chance(table, rng, value):
    y, z = torch.randint(4, (2, 101), generator=rng)
    values = knn(
        table(torch.full((101, 9), value), kind=y), table(torch.full((101, 9), value), kind=z), attribute="kind"
    )
    assert values["knn_kind"] <= values["knn_kind.chance"]


def test_errors_say_what_to_do(table):
    bank = table(torch.eye(2), kind=[0, 1], other=[-1, -1])
    with pytest.raises(ValueError, match=r"'kinds'.*\['kind', 'other'\]"):
        knn(bank, bank, attribute="kinds")
    with pytest.raises(ValueError, match="no row has a label"):
        knn(bank, bank, attribute="other")
    for x in (torch.full((2, 2), torch.nan), torch.eye(2) / 0):
        with pytest.raises(ValueError, match="2 of 2 rows"):
            knn(bank, table(x, kind=[0, 1]), attribute="kind")
    with pytest.raises(ValueError, match="k=0"):
        knn(bank, bank, attribute="kind", k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        knn(bank, bank, attribute="kind", temperature=0)


@pytest.mark.parametrize(("length", "k"), [(31, 3), (32, 1), (1000, 5), (4096, 32), (5001, 20), (5001, 5001)])
def test_the_largest_entries_are_those_of_topk(rng, length, k):
    values = torch.randn(9, length, generator=rng)
    values[3, ::2] = values[3].max()  # more equal ones than are wanted
    found, positions = largest(values, k)
    assert torch.equal(found, values.topk(k)[0])
    assert torch.equal(values.gather(1, positions), found)
    assert all(len(set(row)) == k for row in positions.tolist())


def test_the_sweep_is_every_single_one(table, rng):
    (x, y), (q, z) = clusters(rng, 700), clusters(rng, 60)
    bank, query = table(x, kind=y), table(q, kind=z)
    for memory in (1e-5, 1.0):  # a few queries at a time, all at once
        values = knn_sweep(bank, query, attribute="kind", ks=(1, 5, 900), temperatures=(0.07, 0.5), memory=memory)
        for k in (1, 5, 900):
            for temperature in (0.07, 0.5):
                one = knn(bank, query, attribute="kind", k=k, temperature=temperature)
                assert values[f"knn_kind_k{k}_t{temperature:g}"] == one["knn_kind"]
    assert len(values) == 12
    with pytest.raises(ValueError, match="memory=0 gigabytes"):
        knn_sweep(bank, query, attribute="kind", ks=(1,), temperatures=(0.1,), memory=0)


def test_equals_lightly(table, rng):
    lightly = pytest.importorskip("lightly.utils.benchmarking.knn", reason="lightly comes with .[dev]")
    x, q = torch.randn(2000, 24, generator=rng), torch.randn(300, 24, generator=rng)
    y, z = x[:, :7].argmax(1), q[:, :7].argmax(1)
    unit = torch.nn.functional.normalize
    for k, temperature in ((200, 0.1), (20, 0.07), (1, 0.5)):
        ranked = lightly.knn_predict(unit(q, dim=1), unit(x, dim=1).T, y, 7, knn_k=k, knn_t=temperature)
        expected = (ranked[:, 0] == z).double().mean().item()
        values = knn_sweep(
            table(x, kind=y), table(q, kind=z), attribute="kind", ks=(k,), temperatures=(temperature,), memory=0.1
        )
        assert values[f"knn_kind_k{k}_t{temperature:g}"] == expected
        assert 0.3 < expected < 1
