import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from repr.metrics.ridge import PENALTIES, fit, ridge


def problem(rng, num, dim, labels=(3, 8, 20)):
    """Labels from a noisy linear rule on features of unequal scale, far from zero, float32."""
    x = torch.randn(num, dim, generator=rng)
    rule = torch.randn(dim, len(labels), generator=torch.Generator().manual_seed(1)) / dim**0.5
    which = (x @ rule + 0.4 * torch.randn(num, len(labels), generator=rng)).argmax(1)
    return x * torch.logspace(-1, 2, dim) + 5, torch.tensor(labels)[which]


def standardised(bank, query):
    scaler = StandardScaler().fit(bank.double().numpy())
    return scaler.transform(bank.double().numpy()), scaler.transform(query.double().numpy())


@pytest.mark.parametrize(("num", "dim"), [(80, 12), (40, 40), (30, 100)])
@pytest.mark.parametrize("penalty", [1e-4, 0.1, 10.0])
def test_equals_scikit_learn_for_a_fixed_penalty(table, rng, num, dim, penalty):
    (x, y), (q, z) = problem(rng, num, dim), problem(rng, 200, dim)
    bank, query = standardised(x, q)
    targets = (y[:, None] == y.unique()).double().numpy()
    expected = Ridge(alpha=penalty * num).fit(bank, targets).predict(query).argmax(1)

    probe = fit(x, y.unique(return_inverse=True)[1])
    assert probe.predict(q, penalty, chunk_size=64).tolist() == expected.tolist()
    values = ridge(table(x, kind=y), table(q, kind=z), attribute="kind", penalties=[penalty])
    classifier = RidgeClassifier(alpha=penalty * num).fit(bank, y.numpy())
    assert values["ridge_kind"] == pytest.approx(classifier.score(query, z.numpy()))
    assert values["ridge_kind.chance"] == z.bincount().max().item() / 200


def loop(bank, target, penalty):
    """Leave-one-out by as many fits as there are rows; standardisation and alpha are the whole bank's."""
    hits = 0
    for i in range(len(bank)):
        rest = np.arange(len(bank)) != i
        model = Ridge(alpha=penalty * len(bank)).fit(bank[rest], np.eye(3)[target[rest]])
        hits += model.predict(bank[[i]]).argmax() == target[i]
    return hits / len(bank)


@pytest.mark.parametrize("dim", [5, 60])
def test_leave_one_out_equals_a_loop_and_chooses_the_penalty(table, rng, dim):
    (x, y), (q, z) = problem(rng, 36, dim), problem(rng, 300, dim)
    target = y.unique(return_inverse=True)[1]
    probe = fit(x, target)
    bank, query = standardised(x, q)
    scores = [loop(bank, target.numpy(), penalty) for penalty in PENALTIES]
    assert [probe.leave_one_out(penalty, chunk_size=10) for penalty in PENALTIES] == pytest.approx(scores)
    assert len(set(scores)) > 1

    best = max(zip(scores, PENALTIES, strict=True))[1]
    expected = RidgeClassifier(alpha=best * 36).fit(bank, y.numpy()).score(query, z.numpy())
    assert ridge(table(x, kind=y), table(q, kind=z), attribute="kind")["ridge_kind"] == pytest.approx(expected)


def test_a_separable_problem_is_solved_wide_and_long(table, rng):
    for num, dim in ((300, 6), (60, 400)):
        y = torch.arange(num) % 2
        x = torch.randn(num, dim, generator=rng)
        x += 2 * y[:, None]  # a little in every feature
        half = num // 2
        bank, query = table(x[:half], kind=y[:half]), table(x[half:], kind=y[half:])
        values = ridge(bank, query, attribute="kind")
        assert values["ridge_kind"] > 0.9


def test_unlabelled_rows_are_left_out(table, rng):
    (x, y), (q, z) = problem(rng, 50, 8), problem(rng, 40, 8)
    y[::3], z[::4] = -1, -1
    some = ridge(table(x, kind=y), table(q, kind=z), attribute="kind")
    assert some == ridge(table(x[y >= 0], kind=y[y >= 0]), table(q[z >= 0], kind=z[z >= 0]), attribute="kind")


def test_a_class_that_the_bank_lacks_is_wrong(table):
    x = torch.eye(4)
    values = ridge(table(x, kind=[0, 0, 1, 1]), table(x, kind=[0, 0, 7, 1]), attribute="kind")
    assert values == {"ridge_kind": 0.75, "ridge_kind.chance": 0.5}


@pytest.mark.parametrize(("num", "dim"), [(101, 9), (9, 101)])
def test_a_collapsed_model_stays_at_chance(table, rng, num, dim):
    y, z = torch.randint(4, (2, num), generator=rng)
    for noise in (0, 1e-8):  # 1e-8 moves some values to the next float32
        x = torch.full((num, dim), 0.3) + noise * torch.randn(num, dim, generator=rng)
        values = ridge(table(x, kind=y), table(x, kind=z), attribute="kind")
        assert values["ridge_kind"] <= values["ridge_kind.chance"]


def test_a_constant_feature_changes_nothing(table, rng):
    (x, y), (q, z) = problem(rng, 50, 8), problem(rng, 40, 8)
    values = ridge(table(x, kind=y), table(q, kind=z), attribute="kind")
    x, q = (torch.cat([features, torch.full((len(features), 1), 0.1)], 1) for features in (x, q))
    assert ridge(table(x, kind=y), table(q, kind=z), attribute="kind") == values


@pytest.mark.parametrize("penalties", [(), (0.0, 1.0), (-1.0,)])
def test_penalties_are_checked(table, penalties):
    bank = table(torch.eye(2), kind=[0, 1])
    with pytest.raises(ValueError, match="penalty"):
        ridge(bank, bank, attribute="kind", penalties=penalties)


def test_features_must_be_finite(table):
    bank, broken = (table(x, kind=[0, 1]) for x in (torch.eye(2), torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])))
    for tables in ((bank, broken), (broken, bank)):
        with pytest.raises(ValueError, match="1 of 2 rows hold NaN"):
            ridge(*tables, attribute="kind")
