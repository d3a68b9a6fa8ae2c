import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repr.metrics.geometry import effective_rank, geometry


@pytest.fixture
def pairs(rng):
    image, text = torch.randn(2, 40, 7, generator=rng, dtype=torch.float64)
    return image, 0.5 * image + text + 0.8


def test_equals_the_plain_formulas(table, pairs):
    x, y = (F.normalize(features, dim=1) for features in pairs)
    off = ~torch.eye(40, dtype=torch.bool)

    def spread(a, b):
        return (-2 * (a[:, None] - b).square().sum(-1)).exp()[off].mean().log().item()

    values = geometry(table(pairs[0]), table(*pairs))
    expected = {
        "uniformity_image": spread(x, x),
        "uniformity_text": spread(y, y),
        "uniformity": (spread(x, x) + spread(y, y)) / 2,
        "cross_uniformity": spread(x, y),
        "alignment": (x - y).square().sum(1).mean().item(),
        "pair_cosine": F.cosine_similarity(*pairs).mean().item(),
        "centroid_distance": (x.mean(0) - y.mean(0)).norm().item(),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert values["pair_cosine"] == pytest.approx(1 - values["alignment"] / 2)
    assert set(values) - set(expected) == {
        "modality_separability",
        "modality_separability.chance",
        "effective_rank_image",
        "effective_rank_text",
    }


def test_chunks_and_lengths_of_vectors_change_nothing(table, pairs):
    values = geometry(table(pairs[0]), table(*pairs))
    assert geometry(table(pairs[0]), table(*pairs), chunk_size=7) == pytest.approx(values, rel=1e-9)
    scaled = geometry(table(pairs[0]), table(pairs[0] * torch.linspace(0.1, 9, 40)[:, None], pairs[1]))
    del scaled["effective_rank_image"]  # of the features as they are
    assert scaled == pytest.approx({name: values[name] for name in scaled}, rel=1e-9)


def test_without_text_the_image_values_remain(table, pairs):
    values = geometry(table(*pairs), table(*pairs))
    alone = geometry(table(pairs[0]), table(pairs[0]))
    assert alone == {name: values[name] for name in ("uniformity_image", "effective_rank_image")}


def test_equal_modalities_cannot_be_told_apart(table, pairs):
    values = geometry(table(pairs[0]), table(pairs[0], pairs[0]))
    assert values["modality_separability"] == values["modality_separability.chance"] == 0.5
    assert (values["alignment"], values["centroid_distance"]) == (0, 0)
    assert values["pair_cosine"] == pytest.approx(1)


def test_independent_samples_of_one_law_are_near_chance(table, rng):
    query = table(*torch.randn(2, 1500, 8, generator=rng))
    assert geometry(query, query)["modality_separability"] == pytest.approx(0.5, abs=0.05)


def test_modalities_far_apart_are_separable(table, pairs):
    shift = torch.zeros(7).double()
    shift[0] = 10
    values = geometry(table(pairs[0]), table(pairs[0] + shift, pairs[1] - shift))
    assert values["modality_separability"] == 1
    assert values["centroid_distance"] > 1.9


def test_the_separability_takes_a_bounded_sample_and_its_own_generator(table, pairs):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    query = table(*pairs)
    values = geometry(query, query, max_pairs=20)
    assert geometry(query, query, max_pairs=20) == values
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    tested = values["modality_separability"] * 5 * 4 * 2  # five splits, each with 4 of the 20 pairs
    assert tested == pytest.approx(round(tested))
    others = {geometry(query, query, max_pairs=20, seed=seed)["modality_separability"] for seed in range(4)}
    assert len(others) > 1


def test_a_collapsed_model(table):
    query = table(torch.full((10, 5), 0.3), torch.full((10, 5), 0.3))
    values = geometry(query, query)
    assert values["modality_separability"] == 0.5
    assert (values["effective_rank_image"], values["effective_rank_text"]) == (0, 0)
    assert values["uniformity"] == pytest.approx(0, abs=1e-5)


def test_two_rows_suffice_and_one_does_not(table):
    query = table(torch.eye(2), torch.eye(2))
    assert geometry(query, query)["uniformity"] == pytest.approx(-4)
    for num in (0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            geometry(query, table(torch.eye(2)[:num]))


def test_features_must_be_finite(table):
    whole, broken = torch.eye(2), torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    for query in (table(broken), table(broken, whole), table(whole, broken)):
        with pytest.raises(ValueError, match="1 of 2 rows hold NaN"):
            geometry(query, query)


def test_effective_rank_of_known_sets(rng):
    isotropic = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(isotropic + 3) == pytest.approx(6)
    line = torch.randn(50, 1, generator=rng, dtype=torch.float64) * torch.randn(6, generator=rng)
    assert effective_rank(line + 2) == pytest.approx(1)
    assert effective_rank(torch.full((50, 6), 0.1)) == 0
    assert effective_rank(torch.randn(4, 100, generator=rng)) <= 3 + 1e-9


def test_effective_rank_equals_its_definition(rng):
    x = torch.randn(30, 9, generator=rng, dtype=torch.float64) * torch.logspace(-2, 1, 9)
    singular = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    p = singular / singular.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=torch.float64))[0]
    assert effective_rank(5 * x @ rotation + 1) == pytest.approx(effective_rank(x))
