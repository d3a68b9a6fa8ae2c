import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from repr.metrics.linear import fit_logistic, fit_sgd, logistic, sgd, split

RATES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e4)


def points(rng, num, num_classes, spread=2.0, width=12):
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(1))
    which = torch.randint(num_classes, (num,), generator=rng)
    return (centres[which] + spread * torch.randn(num, width, generator=rng)).double(), which


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_coefficients_are_those_of_scikit_learn(rng, num_classes, c):
    x, y = points(rng, 400, num_classes)
    theirs = LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(x.numpy(), y.numpy())
    ours = fit_logistic(x, y, num_classes, c=c, tolerance=1e-9, max_iter=5000)
    weight, bias = ours
    if num_classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    scale = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-4 * scale)
    np.testing.assert_allclose(bias, theirs.intercept_, atol=1e-4 * scale)
    q, _ = points(rng, 1000, num_classes)
    assert (ours.predict(q).numpy() == theirs.predict(q.numpy())).all()


@pytest.mark.parametrize("num_classes", [2, 7])
def test_the_sweep_is_the_one_by_hand(table, rng, num_classes):
    """As CLIP's, written with scikit-learn; in float32, as features come."""
    (x, y), (q, z) = points(rng, 600, num_classes), points(rng, 500, num_classes)
    x, q = x.float(), q.float()
    named = [labels.clone() + 3 for labels in (y, z)]
    named[0][:50], named[1][:20] = -1, -1
    options = {"held_out": 0.25, "max_iter": 3000, "tolerance": 1e-6}
    values = logistic(table(x, kind=named[0]), table(q, kind=named[1]), attribute="kind", **options, seed=4)
    x, y = x[50:].double().numpy(), y[50:].numpy()
    fit, held = split(len(y), 0.25, 4)

    def score(exponent, fit, x_held, y_held):
        model = LogisticRegression(C=10.0**exponent, tol=1e-8, max_iter=5000).fit(x[fit], y[fit])
        return (model.predict(x_held) == y_held).mean()

    found = {e: score(e, fit, x[held], y[held]) for e in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
    for step in (1, 0.5, 0.25, 0.125):
        best = min(found, key=lambda e: (-found[e], e))
        for exponent in {best - step, best + step} - found.keys():
            if -6 <= exponent <= 6:
                found[exponent] = score(exponent, fit, x[held], y[held])
    best = min(found, key=lambda e: (-found[e], e))
    assert values["linear_kind_C"] == 10**best
    everything = np.arange(len(y))
    expected = score(best, everything, q.double().numpy()[20:], z[20:].numpy())
    assert values["linear_kind"] == expected
    assert values["linear_kind.chance"] < 0.9 * expected
    assert values["linear_kind.chance"] == z[20:].bincount().max().item() / 480


def test_all_rates_at_once_are_each_rate_with_torchs_sgd(rng):
    x, y = points(rng, 300, 4)
    heads = fit_sgd(
        x, y, 4, rates=RATES[:4], epochs=3, batch_size=64, momentum=0.9, generator=torch.Generator().manual_seed(2)
    )
    for number, rate in enumerate(RATES[:4]):
        generator = torch.Generator().manual_seed(2)
        head = torch.nn.Linear(12, 4).double()
        with torch.no_grad():
            head.weight.copy_(0.01 * torch.randn(4, 12, generator=generator))
            head.bias.zero_()
        solver = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, 15)
        for _ in range(3):
            for rows in torch.randperm(300, generator=generator).split(64):
                solver.zero_grad()
                torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
                solver.step()
                schedule.step()
        torch.testing.assert_close(heads.weight[number], head.weight.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(heads.bias[number], head.bias.detach(), rtol=1e-9, atol=1e-9)


def test_sgd_chooses_a_rate_that_works_and_survives_those_that_do_not(table, rng):
    (x, y), (q, z) = points(rng, 600, 4), points(rng, 500, 4)
    bank, query = table(x.float(), kind=y), table(q.float(), kind=z)
    values = sgd(bank, query, attribute="kind", rates=RATES, epochs=5, batch_size=128)
    assert values == sgd(bank, query, attribute="kind", rates=RATES, epochs=5, batch_size=128)
    assert values["linear_sgd_kind_rate"] in (1e-2, 0.1, 1.0, 10.0)
    best = logistic(bank, query, attribute="kind")["linear_kind"]
    assert best - 0.05 < values["linear_sgd_kind"] <= best + 0.05
    assert best > 0.6


def test_a_label_that_the_bank_lacks_is_wrong(table, rng):
    x, y = points(rng, 200, 3, spread=0.1)
    for probe in (logistic, lambda *tables, **options: sgd(*tables, **options, rates=(0.1,), batch_size=32)):
        values = probe(table(x[:100].float(), kind=y[:100].clamp(max=1)), table(x.float(), kind=y), attribute="kind")
        (accuracy,) = (values[name] for name in ("linear_kind", "linear_sgd_kind") if name in values)
        assert accuracy <= 1 - (y == 2).double().mean()


def test_errors_say_what_to_do(table):
    bank = table(torch.eye(3), kind=[1, 1, 1], two=[0, 1, -1])
    with pytest.raises(ValueError, match="two classes"):
        logistic(bank, bank, attribute="kind")
    with pytest.raises(ValueError, match="held_out=1"):
        logistic(bank, bank, attribute="two", held_out=1)
    with pytest.raises(ValueError, match="at least one rate"):
        sgd(bank, bank, attribute="two", rates=())
    with pytest.raises(ValueError, match="3 of 3 rows"):
        sgd(table(torch.full((3, 2), torch.nan), two=[0, 1, 1]), bank, attribute="two", rates=(1.0,))
