"""Values that are known beforehand; golden numbers and common laws are in the files next to this one."""

import pytest
import torch

from repr.losses.hypersphere import alignment, cross_uniformity, uniformity

CHUNKS = pytest.mark.parametrize("chunk", [None, 3])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_alignment_of_known_pairs(alpha):
    x = torch.eye(4, 8, dtype=torch.float64)
    assert alignment(x, 3 * x, alpha=alpha) == 0
    assert alignment(x, x.roll(4, 1), alpha=alpha).item() == pytest.approx(2 ** (alpha / 2))
    assert alignment(x, -x, alpha=alpha).item() == pytest.approx(2**alpha)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alignment_of_pairs_that_coincide_has_no_gradient(alpha):
    x = torch.randn(4, 8, requires_grad=True)
    alignment(x, x.detach(), alpha=alpha).backward()
    assert not x.grad.any()


@CHUNKS
@pytest.mark.parametrize("t", [0.5, 2.0, 1000.0])
def test_uniformity_of_known_points(t, chunk):
    same = torch.ones(7, 3)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    orthogonal = torch.eye(7)
    for points, value in ((same, 0), (opposite, -4 * t), (orthogonal, -2 * t)):
        ours = uniformity(points, t=t, chunk_size=chunk).item()
        assert ours == pytest.approx(value, rel=1e-6, abs=1e-6 * t)
    assert cross_uniformity(same, same, t=t, chunk_size=chunk).item() == pytest.approx(0, abs=1e-6 * t)
    ours = cross_uniformity(orthogonal, orthogonal, t=t, chunk_size=chunk).item()
    assert ours == pytest.approx(-2 * t, rel=1e-6)


@CHUNKS
def test_at_chance(chunk):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 1000, generator=rng)
    assert uniformity(x, chunk_size=chunk).item() == pytest.approx(-4, abs=0.02)
    assert cross_uniformity(x, y, chunk_size=chunk).item() == pytest.approx(-4, abs=0.02)
    assert alignment(x, y).item() == pytest.approx(2, abs=0.05)


@CHUNKS
def test_true_pairs_are_left_out(chunk):
    x = torch.eye(5)
    far, near = cross_uniformity(x, -x, chunk_size=chunk), cross_uniformity(x, x, chunk_size=chunk)
    assert far.item() == pytest.approx(near.item()) == pytest.approx(-4)


@CHUNKS
def test_one_sample_is_an_error_that_says_what_to_set(chunk):
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match=r"undefined for 1 sample.*set the batch size to at least 2"):
        uniformity(x, chunk_size=chunk)
    with pytest.raises(ValueError, match=r"undefined for 1 sample.*set the batch size to at least 2"):
        cross_uniformity(x, x, chunk_size=chunk)
