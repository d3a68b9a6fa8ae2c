"""The randomness that belongs to a sample."""

import pytest
import torch

from repr.seeds import sample_seed, uniform


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python integers."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (1, 2, 3), (2**40, 7, 123456789)])
def test_seeds_and_draws_equal_the_formula_in_plain_integers(seed: int, epoch: int, index: int) -> None:
    gold = 0x9E3779B97F4A7C15
    expected = splitmix(splitmix((splitmix(seed + gold) ^ epoch) + gold) ^ index)
    ours = sample_seed(seed, epoch, torch.tensor([index]))
    assert ours.item() == signed(expected)
    for stream in (0, 1, 9):
        base = splitmix(expected + gold * (stream + 1))
        draws = [splitmix(base + gold * counter) >> 40 for counter in (1, 2, 3)]
        assert (uniform(ours, 3, stream=stream)[0] * 2**24).tolist() == draws


def test_draws_are_uniform_and_independent() -> None:
    index = torch.arange(50_000)
    parts = [
        uniform(sample_seed(0, 0, index), 2),
        uniform(sample_seed(0, 0, index), 2, stream=1),
        uniform(sample_seed(0, 1, index), 2),
    ]
    draws = torch.cat(parts, 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.stack([torch.histc(column, 20, 0, 1) for column in draws.T])
    chi2 = ((counts - 2500) ** 2 / 2500).sum(1)
    assert (chi2 < 45).all()  # 19 degrees of freedom: 45 is passed with probability 0.001
    correlation = torch.corrcoef(draws.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02
    assert len(sample_seed(0, 0, index).unique()) == len(index)


def test_a_row_depends_on_its_seed_alone_and_more_draws_do_not_move_the_first() -> None:
    seeds = sample_seed(3, 1, torch.arange(10))
    assert torch.equal(uniform(seeds, 5)[4:7], uniform(seeds[4:7], 5))
    assert torch.equal(uniform(seeds, 5)[:, :3], uniform(seeds, 3))
