"""In what products of pairs are computed: on the CPU in float32 always, on a GPU in what was chosen."""

import pytest
import torch

from repr.losses.contrastive import clip
from repr.losses.precision import Precision, full_precision, precision_of, product_of_halves
from tests.losses.test_laws import pairs

PRECISIONS: list[Precision] = ["float32", "tf32", "bf16x3"]


def test_a_product_of_halves_keeps_sixteen_bits():
    a, b = (torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    exact, lengths = a.double() @ b.double().T, a.norm(dim=1).unsqueeze(1) * b.norm(dim=1)
    assert ((product_of_halves(a, b.T) - exact).abs() / lengths).max() < 2**-17
    assert ((a.bfloat16().float() @ b.bfloat16().float().T - exact).abs() / lengths).max() > 2**-13


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("chunk", [None, 3])
def test_on_the_cpu_nothing_changes(precision, chunk):
    x, y = pairs(8, dtype=torch.float32)
    found = [clip(x, y, logit_scale=100.0, chunk_size=chunk, precision=p) for p in ("float32", precision)]
    grads = [torch.autograd.grad(value, (x, y)) for value in found]
    assert torch.equal(*found)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("name", ["bf16", "TF32", "high", ""])
def test_an_unknown_precision_is_named(name):
    with pytest.raises(ValueError, match=f"^loss_precision={name}; set it to float32, tf32 or bf16x3$"):
        precision_of(name)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("bf16x3", 1e-4), ("tf32", 1e-2)])
@pytest.mark.parametrize("elsewhere", ["highest", "high", "medium"])
def test_on_a_gpu_a_loss_has_its_own_precision(precision, bound, elsewhere):
    x, y = pairs(512, dim=256, noise=0.1, dtype=torch.float32)
    exact = clip(x.double(), y.double(), logit_scale=100.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(elsewhere)
    try:
        x, y = (leaf.detach().cuda().requires_grad_() for leaf in (x, y))
        value = clip(x, y, logit_scale=100.0, chunk_size=64, precision=precision)
        value.backward()
        assert torch.get_float32_matmul_precision() == elsewhere
        assert value.item() == pytest.approx(exact.item(), rel=bound, abs=bound)
        with full_precision(x):
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
