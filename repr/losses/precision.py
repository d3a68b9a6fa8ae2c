"""How many digits losses compute with: all of float32, or on a GPU fewer in the products of a pairwise loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bf16x3"]


def precision_of(name: str) -> Precision:
    """The precision of an objective's products of pairs by its name.

    Raises:
        ValueError: there is no such precision, or this torch cannot compute it.
    """
    if name not in get_args(Precision):
        raise ValueError(f"loss_precision={name}; set it to {', '.join(get_args(Precision)[:-1])} or bf16x3")
    if name == "bf16x3" and torch.cuda.is_available() and torch.__version__ < torch.torch_version.TorchVersion("2.8"):
        raise ValueError(f"loss_precision=bf16x3 needs torch 2.8, and this is {torch.__version__}; set it to float32")
    return name  # type: ignore[return-value]


@contextmanager
def full_precision(features: Tensor, precision: Precision = "float32") -> Iterator[None]:
    """No autocast on the device of ``features``, and products in ``precision``, whatever torch is set to do elsewhere.

    bfloat16 has three digits, a logit of 100 needs more.
    """
    with torch.autocast(features.device.type, enabled=False):
        if features.device.type != "cuda":
            yield
            return
        elsewhere = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(elsewhere)


def product(a: Tensor, b: Tensor, precision: Precision, out: Tensor | None = None) -> Tensor:
    """``a @ b``; under ``bf16x3`` float32 matrices on a GPU are multiplied by halves, all others as torch does it."""
    if not _by_halves(a, precision):
        return torch.mm(a, b, out=out)
    return product_of_halves(a, b) if out is None else out.copy_(product_of_halves(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor, precision: Precision) -> None:
    """Add ``a @ b`` to ``total``, with the product as in :func:`product`."""
    if _by_halves(a, precision):
        total.add_(product_of_halves(a, b))
    else:
        total.addmm_(a, b)


def _by_halves(a: Tensor, precision: Precision) -> bool:
    return precision == "bf16x3" and a.is_cuda and a.dtype == torch.float32


def product_of_halves(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` (M, K) (K, N) by products of bfloat16 and sums of float32: some 16 of the 24 bits are kept.

    Each factor is the sum of two of 8 bits, ``a = a1 + a2``; of their four products the least, ``a2 @ b2``, is left
    out. On the CPU the result is the same but for the order of sums, and nothing is gained.
    """
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    left, right = torch.cat([a1, a1, a2], 1), torch.cat([b1, b2, b1], 0)
    return torch.mm(left, right, out_dtype=torch.float32) if a.is_cuda else left.float() @ right.float()


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()
