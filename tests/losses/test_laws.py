"""What holds for every loss: its formula, its gradient, its types, its extremes; each plain and in chunks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from repr.losses.contrastive import clip, nt_xent, sigmoid
from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from repr.losses.mixup import mixed_contrast, soft_clip
from tests.losses import naive

Loss = Callable[..., Tensor]  # (x, y, scale, chunk_size) -> value


def partners(x: Tensor) -> dict[str, Tensor]:
    """The next sample but one, which is the sample itself where there are two; every third is not mixed."""
    num = torch.arange(len(x))
    return {"perm": (num + 2) % max(len(x), 1), "lam": 1 - 0.3 * (num % 3).double()}


OURS: dict[str, Loss] = {
    "clip": lambda x, y, s, chunk: clip(x, y, logit_scale=s, chunk_size=chunk),
    "sigmoid": lambda x, y, s, chunk: sigmoid(x, y, logit_scale=s, logit_bias=-s / 3, chunk_size=chunk),
    "nt_xent": lambda x, y, s, chunk: nt_xent(x, y, temperature=1 / s, chunk_size=chunk),
    "uniformity": lambda x, y, s, chunk: uniformity(x, t=2.0, chunk_size=chunk),
    "cross_uniformity": lambda x, y, s, chunk: cross_uniformity(x, y, t=2.0, chunk_size=chunk),
    "alignment": lambda x, y, s, chunk: alignment(x, y),
    "mixed_contrast": lambda x, y, s, c: mixed_contrast(x, y, temperature=1 / s, chunk_size=c, **partners(x)),
    "soft_clip": lambda x, y, s, chunk: soft_clip(x, y, temperature=1 / s, chunk_size=chunk),
}
NAIVE: dict[str, Callable[..., Tensor]] = {
    "clip": naive.clip,
    "sigmoid": lambda x, y, s: naive.sigmoid(x, y, s, -s / 3),
    "nt_xent": lambda x, y, s: naive.nt_xent(x, y, 1 / s),
    "uniformity": lambda x, y, s: naive.uniformity(x, 2),
    "cross_uniformity": lambda x, y, s: naive.cross_uniformity(x, y, 2),
    "alignment": lambda x, y, s: naive.alignment(x, y, 2),
    "mixed_contrast": lambda x, y, s: naive.mixed_contrast(x, y, s, **partners(x)),
    "soft_clip": naive.soft_clip,
}
CHUNKED = [name for name in OURS if name != "alignment"]
TEMPERED = ["clip", "sigmoid", "nt_xent", "mixed_contrast", "soft_clip"]
ONE_SIDED = ["uniformity", "mixed_contrast", "soft_clip"]  # the two features have not the same part in them

each_loss = pytest.mark.parametrize("name", OURS)
each_form = pytest.mark.parametrize("chunk", [None, 3])


def pairs(num: int, dim: int = 7, *, seed: int = 0, noise: float = 1.0, dtype: torch.dtype = torch.float64) -> list:
    """Features of different lengths, partners alike."""
    rng = torch.Generator().manual_seed(seed)
    x, y, length = (torch.randn(num, dim, generator=rng, dtype=torch.float64) for _ in range(3))
    y = (x + noise * y) * length[:, :1].exp()
    return [x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()]


def scale(value: float = 10.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def evaluate(loss: Loss, leaves: list[Tensor], *args: object) -> list[Tensor]:
    """Value, then the gradient of every leaf, None where the loss does not depend on it."""
    value = loss(*leaves, *args)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def assert_close(ours: list, theirs: list, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@each_loss
@pytest.mark.parametrize("chunk", [None, 1, 2, 4, 5, 100])
@pytest.mark.parametrize("num", [2, 5, 12])
def test_is_its_formula(name, num, chunk):
    def formula(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return NAIVE[name](F.normalize(x), F.normalize(y), s)

    leaves = [*pairs(num), scale()]
    assert_close(evaluate(OURS[name], leaves, chunk), evaluate(formula, leaves), 1e-10)


@pytest.mark.parametrize("name", TEMPERED)
@each_form
def test_one_sample(name, chunk):
    def formula(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return NAIVE[name](F.normalize(x), F.normalize(y), s)

    leaves = [*pairs(1), scale()]
    ours, theirs = evaluate(OURS[name], leaves, chunk), evaluate(formula, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("value", [10.0, 100.0])
@pytest.mark.parametrize("chunk", [32, 50, 129])
def test_chunks_change_nothing(name, value, chunk):
    double = [*pairs(129, 32), scale(value)]
    single = [*pairs(129, 32, dtype=torch.float32), scale(value, torch.float32)]
    assert_close(evaluate(OURS[name], double, chunk), evaluate(OURS[name], double, None), 1e-12)
    # A logit of 100 is exact to 8e-6 in float32, whichever way it is computed.
    assert_close(evaluate(OURS[name], single, chunk), evaluate(OURS[name], single, None), 1e-6 * max(1, value / 20))


@each_loss
@pytest.mark.parametrize("chunk", [None, 1, 3, 9])
def test_gradient(name, chunk):
    leaves = [*pairs(5, 3), scale(3.0)]
    torch.autograd.gradcheck(lambda *inputs: OURS[name](*inputs, chunk), leaves)


@each_form
def test_gradient_of_the_bias(chunk):
    x, y = (leaf.detach() for leaf in pairs(5, 3))
    torch.autograd.gradcheck(
        lambda s, b: sigmoid(x, y, logit_scale=s, logit_bias=b, chunk_size=chunk), [scale(3.0), scale(-2.0)]
    )


@each_loss
@each_form
def test_backward_twice(name, chunk):
    leaves = pairs(5)
    value = OURS[name](*leaves, 10.0, chunk)
    first = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    assert_close(first, torch.autograd.grad(value, leaves, allow_unused=True), 0)


@each_loss
@each_form
def test_order_and_length_of_rows_do_not_matter(name, chunk):
    x, y = pairs(8)
    order, length = torch.randperm(8), torch.rand(8, 1, dtype=torch.float64) + 0.1
    if name != "mixed_contrast":  # whose partners are named by their place
        torch.testing.assert_close(OURS[name](x[order], y[order], 10.0, chunk), OURS[name](x, y, 10.0, chunk))
    torch.testing.assert_close(OURS[name](x * length, y / length, 10.0, chunk), OURS[name](x, y, 10.0, chunk))


@pytest.mark.parametrize("name", [name for name in OURS if name not in ONE_SIDED])
@each_form
def test_symmetry(name, chunk):
    x, y = pairs(8)
    torch.testing.assert_close(OURS[name](x, y, 10.0, chunk), OURS[name](y, x, 10.0, chunk))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_bound_the_memory(name):
    num, dim, chunk = 90, 3, 4
    leaves = [*pairs(num, dim), scale()]
    with Largest() as plain:
        evaluate(OURS[name], leaves, None)
    with Largest() as chunked:
        evaluate(OURS[name], leaves, chunk)
    assert plain.numel == num * num
    assert chunked.numel <= num * max(dim, chunk)


@pytest.mark.parametrize("name", ["clip", "sigmoid", "nt_xent", "uniformity", "cross_uniformity"])
def test_chunks_keep_no_copy_of_the_features(name):
    num, dim = 64, 32
    leaves, kept = [*pairs(num, dim), scale()], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        OURS[name](*leaves, 4)
    theirs = {x.untyped_storage().data_ptr() for x in leaves}
    copies = [x.shape for x in kept if x.numel() >= num * dim and x.untyped_storage().data_ptr() not in theirs]
    assert len(kept) > len(leaves)
    assert not copies


@each_loss
@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(name, dtype, chunk):
    half = pairs(6, dtype=dtype)
    single = [x.detach().float().requires_grad_() for x in half]
    value, *grads = evaluate(OURS[name], half, 10.0, chunk)
    expected, *expected_grads = evaluate(OURS[name], single, 10.0, chunk)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad is None or (grad.dtype == dtype and torch.equal(grad, wanted.to(dtype)))


@each_loss
@each_form
def test_types_meet_in_the_wider_one(name, chunk):
    x, y = pairs(6)
    assert OURS[name](x, y.float(), 10.0, chunk).dtype == torch.float64
    assert OURS[name](x.bfloat16(), y.float(), 10.0, chunk).dtype == torch.float32
    assert OURS[name](x.float(), y.float(), scale(10.0), chunk).dtype == torch.float32


@each_loss
@each_form
def test_autocast_changes_nothing(name, chunk):
    leaves = [*pairs(6, 64, dtype=torch.float32), scale(10.0, torch.float32)]
    outside = evaluate(OURS[name], leaves, chunk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(OURS[name], leaves, chunk)
    assert_close(inside, outside, 0)


@each_loss
@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 100.0, 1e6])
@pytest.mark.parametrize("kind", ["same", "identical", "opposite", "orthogonal", "zero", "huge", "tiny"])
def test_extremes_are_finite(name, kind, value, dtype, chunk):
    x, y = (leaf.detach() for leaf in pairs(6, 12, dtype=dtype))
    x, y = {
        "same": (x[:1].expand(6, -1), x[:1].expand(6, -1)),
        "identical": (x, x),
        "opposite": (x, -x),
        "orthogonal": (torch.eye(6, 12, dtype=dtype), torch.eye(6, 12, dtype=dtype).roll(6, 1)),
        "zero": (x * 0, torch.cat([y[:5], y[5:] * 0])),
        "huge": (x * 1e15, y * 1e15),
        "tiny": (x * 1e-10, y * 1e-10),
    }[kind]
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), scale(value, torch.float32)]
    for result in evaluate(OURS[name], leaves, chunk):
        assert result is None or result.isfinite().all()


@each_loss
@each_form
def test_a_zero_row_gets_no_gradient(name, chunk):
    x, y = pairs(6)
    with torch.no_grad():
        x[2] = 0
    _, grad, _ = evaluate(OURS[name], [x, y], 10.0, chunk)
    assert not grad[2].any()
    assert grad[3].any()


@each_loss
def test_nonfinite_features_show(name):
    x, y = pairs(6)
    with torch.no_grad():
        x[2, 0] = torch.nan
    assert OURS[name](x, y, 10.0, 3).isnan()


@pytest.mark.parametrize("name", [name for name in OURS if name != "uniformity"])
def test_shapes_that_differ(name):
    x, y = pairs(6)
    for wrong in (y[:5], y[:, :3], y[0]):
        with pytest.raises(ValueError, match=r"\(N, D\).*got \[\(6, 7\)"):
            OURS[name](x, wrong, 10.0, None)


@each_loss
def test_no_samples(name):
    with pytest.raises(ValueError, match="batch size"):
        OURS[name](torch.zeros(0, 3), torch.zeros(0, 3), 10.0, None)


@pytest.mark.parametrize("name", CHUNKED)
def test_chunk_size_below_one(name):
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        OURS[name](*pairs(4), 10.0, 0)
