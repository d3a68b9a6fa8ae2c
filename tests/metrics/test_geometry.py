import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repr.metrics.geometry import effective_rank, geometry, hubness, lidar, rankme, spectrum


@pytest.fixture
def pairs(rng):
    image, text = torch.randn(2, 40, 7, generator=rng, dtype=torch.float64)
    return image, 0.5 * image + text + 0.8


def test_equals_the_plain_formulas(table, pairs):
    x, y = (F.normalize(features, dim=1) for features in pairs)
    off = ~torch.eye(40, dtype=torch.bool)

    def spread(a, b):
        return (-2 * (a[:, None] - b).square().sum(-1)).exp()[off].mean().log().item()

    values = geometry(table(*pairs))
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
        *(f"{name}_{kind}" for name in ("effective_rank", "rankme") for kind in ("image", "text")),
        *(f"{name}_{kind}" for name in ("hubness", "robin_hood") for kind in ("image", "text", "t2i", "i2t")),
    }


def test_chunks_and_lengths_of_vectors_change_nothing(table, pairs):
    values = geometry(table(*pairs))
    assert geometry(table(*pairs), chunk_size=7) == pytest.approx(values, rel=1e-9)
    scaled = geometry(table(pairs[0] * torch.linspace(0.1, 9, 40)[:, None], pairs[1]))
    del scaled["effective_rank_image"], scaled["rankme_image"]  # of the features as they are
    assert scaled == pytest.approx({name: values[name] for name in scaled}, rel=1e-9)


def test_without_text_the_image_values_remain(table, pairs):
    values = geometry(table(*pairs))
    alone = geometry(table(pairs[0]))
    names = ("uniformity_image", "effective_rank_image", "rankme_image", "hubness_image", "robin_hood_image")
    assert alone == {name: values[name] for name in names}


def test_equal_modalities_cannot_be_told_apart(table, pairs):
    values = geometry(table(pairs[0], pairs[0]))
    assert values["modality_separability"] == values["modality_separability.chance"] == 0.5
    assert (values["alignment"], values["centroid_distance"]) == (0, 0)
    assert values["pair_cosine"] == pytest.approx(1)


def test_independent_samples_of_one_law_are_near_chance(table, rng):
    query = table(*torch.randn(2, 1500, 8, generator=rng))
    assert geometry(query)["modality_separability"] == pytest.approx(0.5, abs=0.05)


def test_modalities_far_apart_are_separable(table, pairs):
    shift = torch.zeros(7).double()
    shift[0] = 10
    values = geometry(table(pairs[0] + shift, pairs[1] - shift))
    assert values["modality_separability"] == 1
    assert values["centroid_distance"] > 1.9


def test_the_separability_takes_a_bounded_sample_and_its_own_generator(table, pairs):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    query = table(*pairs)
    values = geometry(query, max_pairs=20)
    assert geometry(query, max_pairs=20) == values
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    tested = values["modality_separability"] * 5 * 4 * 2  # five splits, each with 4 of the 20 pairs
    assert tested == pytest.approx(round(tested))
    others = {geometry(query, max_pairs=20, seed=seed)["modality_separability"] for seed in range(4)}
    assert len(others) > 1


def test_a_collapsed_model(table):
    query = table(torch.full((10, 5), 0.3), torch.full((10, 5), 0.3))
    values = geometry(query)
    assert values["modality_separability"] == 0.5
    assert (values["effective_rank_image"], values["effective_rank_text"]) == (0, 0)
    assert values["uniformity"] == pytest.approx(0, abs=1e-5)


def test_two_rows_suffice_and_one_does_not(table):
    query = table(torch.eye(2), torch.eye(2))
    assert geometry(query)["uniformity"] == pytest.approx(-4)
    for num in (0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            geometry(table(torch.eye(2)[:num]))


def test_features_must_be_finite(table):
    whole, broken = torch.eye(2), torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    for query in (table(broken), table(broken, whole), table(whole, broken)):
        with pytest.raises(ValueError, match="1 of 2 rows hold NaN"):
            geometry(query)


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


def test_the_spectrum_is_that_of_the_covariance(rng):
    x = torch.randn(30, 9, generator=rng, dtype=torch.float64) * torch.logspace(-2, 1, 9) + 4
    expected = np.linalg.eigvalsh(np.cov(x.numpy(), rowvar=False, bias=True))[::-1]
    assert spectrum(x).numpy() == pytest.approx(expected, rel=1e-9)
    few = spectrum(x[:4])
    assert few.shape == (9,)
    assert (few > 0).tolist() == [True] * 3 + [False] * 6
    assert not spectrum(torch.full((5, 3), 0.1)).any()


def test_rankme_equals_its_definition(rng):
    x = torch.randn(30, 9, generator=rng, dtype=torch.float64) + 2
    singular = np.linalg.svd(x.numpy(), compute_uv=False)
    p = singular / np.abs(singular).sum() + 1e-7
    assert rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-12)
    assert rankme(x) < effective_rank(x)  # the common mean is a strong direction
    assert rankme(torch.eye(6)) == pytest.approx(6, rel=1e-5)
    assert rankme(torch.ones(8, 5)) == pytest.approx(1, rel=1e-4)
    assert rankme(torch.zeros(8, 5)) == 0


def test_lidar_equals_its_definition(rng):
    x = torch.randn(12, 5, 7, generator=rng, dtype=torch.float64)
    x = x * 0.3 + torch.randn(12, 1, 7, generator=rng, dtype=torch.float64) * torch.logspace(-1, 1, 7)
    between, within = np.zeros((7, 7)), np.zeros((7, 7))
    for sample in x.numpy():
        off = sample.mean(0) - x.numpy().mean((0, 1))
        between += np.outer(off, off) / 12
        for view in sample:
            within += np.outer(view - sample.mean(0), view - sample.mean(0)) / 60
    within += 1e-4 * np.eye(7)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigen = np.linalg.eigvalsh(root @ between @ root)
    p = eigen / np.abs(eigen).sum() + 1e-7
    assert lidar(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_lidar_counts_what_tells_samples_apart_and_not_what_tells_views_apart(rng):
    samples = torch.randn(400, 1, 10, generator=rng, dtype=torch.float64)
    views = torch.randn(400, 8, 10, generator=rng, dtype=torch.float64)
    three = torch.zeros(10, dtype=torch.float64)
    three[:3] = 1
    x = samples * three + 0.01 * views * three + 5 * views * (1 - three)
    assert lidar(x) == pytest.approx(3, abs=0.05)
    assert effective_rank(x.flatten(0, 1)) > 8  # which counts both
    assert lidar(torch.ones(4, 3, 2)) == 0
    for shape in ((1, 3, 2), (3, 1, 2), (3, 2)):
        with pytest.raises(ValueError, match="2 samples and 2 views"):
            lidar(torch.ones(shape))
    with pytest.raises(ValueError, match="NaN"):
        lidar(x * torch.nan)


def test_hubness_equals_its_definition(rng):
    x, y = torch.randn(2, 40, 5, generator=rng, dtype=torch.float64)
    for queries, bank, given in ((x, x, None), (x, y, y)):
        counts = np.zeros(40)
        for i, query in enumerate(queries):
            cosine = F.cosine_similarity(query[None], bank, dim=1).tolist()
            order = sorted(range(40), key=lambda j: -cosine[j])
            counts[[j for j in order if given is not None or j != i][:4]] += 1
        off = counts - counts.mean()
        expected = {
            "hubness_a": (off**3).mean() / (off**2).mean() ** 1.5,
            "robin_hood_a": np.abs(off).sum() / (2 * counts.sum()),
        }
        assert hubness(queries, given, "a", k=4, chunk_size=7) == pytest.approx(expected, rel=1e-9)


def test_hubs_are_seen(rng):
    x = torch.randn(200, 300, generator=rng) + 1
    x[0] = 1  # near to all
    assert hubness(torch.eye(12), None, "a", k=11, chunk_size=5) == {"hubness_a": 0, "robin_hood_a": 0}
    hubs = hubness(x, None, "a", k=1, chunk_size=64)
    assert hubs["hubness_a"] > 10
    assert hubs["robin_hood_a"] > 0.9
