"""The randomness that belongs to a sample."""

import math

import pytest
import torch

from repr.seeds import permute, sample_seed, uniform


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


def plain_permute(index: int, num: int, key: int) -> int:
    """The network on Python integers."""
    width = math.isqrt(num - 1) + 1
    height = -(-num // width)
    while True:
        top, left, state = index // width, index % width, key
        for _ in range(6):
            state = splitmix(state + 0x9E3779B97F4A7C15)
            top = (top + (splitmix(left ^ state) >> 1)) % height
            state = splitmix(state + 0x9E3779B97F4A7C15)
            left = (left + (splitmix(top ^ state) >> 1)) % width
        index = top * width + left
        if index < num:
            return index


@pytest.mark.parametrize("num", [1, 2, 5, 50, 10**9, 2**30 + 1, 2**40])
def test_a_permutation_equals_the_formula_in_plain_integers(num: int) -> None:
    key = int(sample_seed(3, 2, torch.tensor(-1)))
    index = torch.arange(0, num, max(1, num // 50))
    moved = permute(index, num, 3, 2, -1)
    assert moved.tolist() == [plain_permute(i, num, key) for i in index.tolist()]


@pytest.mark.parametrize("num", [*range(1, 51), 97, 127, 128, 129, 1009, 4096, 10_007, 65_536])
def test_a_permutation_has_every_position_once(num: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (2**40, 300)):
        assert permute(torch.arange(num), num, seed, epoch, -1).sort().values.equal(torch.arange(num))


def test_positions_may_have_permutations_of_their_own() -> None:
    num, epoch, stream = torch.tensor([7, 1, 20, 7]), torch.tensor([0, 5, 2, 0]), torch.tensor([-1, -2, -1, -3])
    index = torch.tensor([6, 0, 13, 6])
    rows = zip(index.split(1), num.tolist(), epoch.tolist(), stream.tolist(), strict=True)
    expected = torch.cat([permute(i, n, 3, e, s) for i, n, e, s in rows])
    assert torch.equal(permute(index, num, 3, epoch, stream), expected)
    assert permute(index[:0], 5, 3, 0, -1).tolist() == []


@pytest.mark.parametrize("num", [2, 3, 5, 7, 8, 13])
def test_every_order_of_two_rows_is_equally_frequent_over_epochs(num: int) -> None:
    """What stands at the first and at the last place, of all pairs of rows."""
    epochs = torch.arange(40_000)
    first, last = (permute(torch.full_like(epochs, i), num, 1, epochs, -1) for i in (0, num - 1))
    counts = torch.bincount(first * num + last, minlength=num**2).view(num, num).double()
    assert counts.diagonal().sum() == 0
    pairs, expected = num * (num - 1), len(epochs) / (num * (num - 1))
    chi2 = ((counts - expected) ** 2 / expected).sum() - num * expected
    assert chi2 < pairs - 1 + 4 * math.sqrt(2 * (pairs - 1)) + 4


@pytest.mark.parametrize("num", [65_536, 99_991, 10**9])
def test_orders_are_random_and_independent(num: int) -> None:
    """Where the first 60,000 positions go: neighbours, places apart, position and row, epochs, seeds, streams."""
    index = torch.arange(60_000)
    orders = [permute(index, num, seed, epoch, -1 - seed) for seed in (0, 1) for epoch in (0, 1)]
    columns = [index[:-256], *(order[:-256] for order in orders)]
    columns += [orders[0][lag : len(index) - 256 + lag] for lag in (1, 2, 16, 256)]
    correlation = torch.corrcoef(torch.stack(columns).double()).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02
    for part in orders[0].view(6, 10_000):  # of each stretch of the order, each stretch of the data set has its share
        chi2 = ((torch.bincount(part * 20 // num, minlength=20) - 500.0) ** 2 / 500).sum()
        assert chi2 < 45  # 19 degrees of freedom: 45 is passed with probability 0.001
    steps = (orders[0][1:] - orders[0][:-1]) % num  # neighbours are not a step apart more often than others
    chi2 = ((torch.bincount(steps * 20 // num, minlength=20) - len(steps) / 20) ** 2 / (len(steps) / 20)).sum()
    assert chi2 < 45
