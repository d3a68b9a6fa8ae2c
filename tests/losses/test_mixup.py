"""Mixing and its losses: the authors' numbers, and what the draws depend on."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from repr.losses.mixup import draw_mix, mix, mixed_contrast, soft_clip
from tests.golden import golden

DATA = {key: torch.as_tensor(value) for key, value in golden("m3col").items()}
CASES = ["c0", "c1", "c3"]  # c3 has fixed points


def compare(value: Tensor, name: str, leaves: dict[str, Tensor]) -> None:
    """The authors' value and gradients, float64."""
    grads = torch.autograd.grad(value, list(leaves.values()))
    # Their sums of float32 temperatures and weights carry an error of 1e-8 in places.
    torch.testing.assert_close(value.detach(), DATA[f"{name}.f64"], rtol=1e-8, atol=1e-8)
    for key, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, DATA[f"{name}.grad_{key}"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", ["mix0.text", "mix0.image", "mix1.text", "mix1.image", "mix4d"])
def test_mixing_equals_the_authors_and_leaves_its_input(case: str) -> None:
    x = DATA[f"{case.split('.')[0]}.x"]
    before = x.clone()
    mixed = mix(x, x[DATA[f"{case}.perm"]], lam=DATA[f"{case}.betas"])
    torch.testing.assert_close(mixed, DATA[f"{case}.mixed"], rtol=1e-6, atol=1e-7)
    assert torch.equal(mixed[~DATA[f"{case}.select"]], x[~DATA[f"{case}.select"]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["bi", "uni", "pure"])
def test_the_mixed_contrast_equals_the_authors(case: str, form: str, chunk_size: int | None) -> None:
    of = {key: DATA[f"{case}.{key}"] for key in ("perm", "lam", "temp")}
    other = DATA[f"{case}.mod2"].double().requires_grad_()
    first = DATA[f"{case}.mod1_mixed" if form == "pure" else f"{case}.mod1"].double().requires_grad_()
    draw = {"perm": of["perm"], "lam": of["lam"]}
    mixed = first if form == "pure" else mix(first, first[of["perm"]], lam=of["lam"])
    value = mixed_contrast(
        mixed,
        other,
        **draw,
        temperature=of["temp"].item(),
        bidirectional=form != "uni",
        overwrite=True,
        chunk_size=chunk_size,
    )
    compare(value, f"{case}.mixco_nce_{form}", {"mod1_mixed" if form == "pure" else "mod1": first, "mod2": other})
    single = mixed_contrast(
        *(x.float() for x in (mixed, other)),
        **draw, temperature=0.1, bidirectional=form != "uni", overwrite=True,
    )  # fmt: skip
    torch.testing.assert_close(single, DATA[f"{case}.mixco_nce_{form}.f32"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.125, 0.05])
def test_soft_clip_equals_the_authors(case: str, temperature: float, chunk_size: int | None) -> None:
    name = f"{case}.soft_clip_T{temperature}"
    a, b = (DATA[f"{case}.{key}"].double().requires_grad_() for key in ("mod1", "mod2"))
    value = soft_clip(a, b, temperature=temperature, chunk_size=chunk_size)
    compare(value, name, {"preds": a, "targs": b})
    single = soft_clip(a.float(), b.float(), temperature=temperature)
    torch.testing.assert_close(single, DATA[f"{name}.f32"], rtol=1e-5, atol=0)


def test_a_fixed_point_keeps_its_whole_mass() -> None:
    x, y = (DATA[f"c3.{key}"].double() for key in ("mod1", "mod2"))
    perm, lam = DATA["c3.perm"], DATA["c3.lam"].double()
    fixed = perm == torch.arange(12)
    logits = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T / 0.1
    nats = -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal()
    ours, theirs = (mixed_contrast(x, y, perm=perm, lam=lam, temperature=0.1, overwrite=o) for o in (False, True))
    torch.testing.assert_close(ours - theirs, (lam * nats)[fixed].sum() / 24)
    everyone = mixed_contrast(x, y, perm=torch.arange(12), lam=lam, temperature=0.1)
    torch.testing.assert_close(everyone, nats.mean() / 2)  # that is CLIP's loss


def test_targets_may_be_detached() -> None:
    a, b = (DATA[f"c0.{key}"].double().requires_grad_() for key in ("mod1", "mod2"))
    values = [soft_clip(a, b, temperature=0.1, detach_targets=detach) for detach in (False, True)]
    torch.testing.assert_close(*values)
    grads = [torch.autograd.grad(value, [a, b]) for value in values]
    torch.testing.assert_close(grads[0][0], grads[1][0])
    assert not torch.allclose(grads[0][1], grads[1][1])


def test_draws_are_a_function_of_the_seeds_alone() -> None:
    seed = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    perm, lam = draw_mix(seed, beta=0.15, fraction=0.5)
    torch.manual_seed(7)
    again = draw_mix(seed.clone(), beta=0.15, fraction=0.5)
    assert torch.equal(perm, again[0])
    assert torch.equal(lam, again[1])
    assert perm.sort()[0].tolist() == list(range(64))
    order = torch.randperm(64)
    moved, shares = draw_mix(seed[order], beta=0.15, fraction=0.5)
    assert torch.equal(seed[order][moved], seed[perm][order])  # everyone has the same partner
    assert torch.equal(shares, lam[order])
    other, _ = draw_mix(seed, beta=0.15, fraction=0.5, stream=1)
    assert not torch.equal(perm, other)


def test_draws_have_their_distributions() -> None:
    """Beta(.15, .15) and partners as good as uniform, within what 40,000 draws allow."""
    seed = torch.arange(40_000)
    perm, lam = draw_mix(seed, beta=0.15, fraction=1.0)
    for bound in (1e-20, 1e-5, 0.01, 0.2, 0.5, 0.8, 0.99, 0.9999):
        assert (lam < bound).double().mean().item() == pytest.approx(stats.beta(0.15, 0.15).cdf(bound), abs=0.01)
    assert lam.double().var().item() == pytest.approx(1 / (4 * 1.3), rel=0.02)
    assert stats.kstest(((perm - seed) % 40_000).numpy() / 40_000, "uniform").statistic < 0.01
    _, half = draw_mix(seed, beta=0.15, fraction=0.5)
    assert (half == 1).float().mean().item() == pytest.approx(0.5 + 0.5 * (lam == 1).float().mean().item(), abs=0.01)
    small = torch.stack([draw_mix(torch.arange(4) + 4 * i, beta=1.0, fraction=1.0)[0] for i in range(2400)])
    counts = torch.unique(small, dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("options", [{"beta": 0, "fraction": 0.5}, {"beta": 1, "fraction": 1.5}])
def test_bad_draws_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="set beta above 0, fraction from 0 to 1"):
        draw_mix(torch.arange(4), **options)
