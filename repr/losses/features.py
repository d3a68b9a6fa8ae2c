"""What losses share: how they take features, and gradients that were computed together with a value.

A loss is a pure function of tensors to a scalar. Unless its docstring says otherwise:

* Features are (N, D), and row i of one belongs to row i of the other. They are normalised inside. With several
  processes each gives its own n of the N rows, and an ``exchange`` (:mod:`repr.losses.exchange`) by which the loss
  reaches those of the others: value and gradient are those of the global batch. By default there are no others.
* Values and gradients are computed in float32, or in float64 if an input is float64, also under autocast. Features in
  half precision get a gradient of their own type.
* ``swapped_prediction``, the losses of cells and ``masked_mse`` take no exchange: the mean of what each process
  computes on its own features is the loss of the global batch.
* ``chunk_size`` is how many rows of the N x N matrix of pairs exist at a time (None: all). It changes neither value
  nor gradient.
* ``precision`` is that of the products of pairs on a GPU (:mod:`repr.losses.precision`).
* ``keys`` (n, K) int64 keep pairs that are no negatives out of a loss: those of two rows with the same number in one of
  the K columns. The true pair of a row stays.
* ``extra_text`` (m, D) are further texts with which every image is compared and that belong to none, such as wrong
  captions: a process gives m of its own, and the images of all meet them. ``extra_valid`` (m,) bool leaves out some,
  whose features must be finite all the same. Beside them ``keys`` is (n + m, K), with those of the further texts last.
* A loss gives the numbers of its paper and of the authors' code, but for what stands under "Departures".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from repr.losses.exchange import ALONE, Exchange

Scalar = float | Tensor  # a number, or a 0-dim tensor


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 or, if one of them is float64, in float64."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return [x.to(dtype) for x in tensors]


def paired(*features: Tensor, num_min: int = 1, exchange: Exchange = ALONE) -> list[Tensor]:
    """Features of one shape (n, D), in float32 or, if one of them is float64, in float64.

    Raises:
        ValueError: the shapes are not (n, D), are not equal, or N is below ``num_min``, where the loss is undefined.
    """
    shapes = [tuple(x.shape) for x in features]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"features must be (N, D), and of equal shape where there are two; got {shapes}")
    if (num := shapes[0][0] * exchange.size) < num_min:
        raise ValueError(
            f"this loss is undefined for {num} sample(s): set the batch size to at least {num_min} "
            "and drop_last=True if the last batch can be smaller"
        )
    return widened(*features)


def unit(*features: Tensor, num_min: int = 1, exchange: Exchange = ALONE) -> list[Tensor]:
    """As :func:`paired`, with all rows scaled to length 1 by :func:`normalise`."""
    return [normalise(x) for x in paired(*features, num_min=num_min, exchange=exchange)]


def normalise(x: Tensor) -> Tensor:
    """Scale the vectors along the second dimension of (N, D, ...) to length 1.

    A vector shorter than 1e-12 has no direction: it becomes zero, and so does its gradient.
    """
    # A product needs half the memory of a quotient in backward, which would be the peak of the whole loss.
    return x * inverse_length(x).unsqueeze(1)


def inverse_length(x: Tensor) -> Tensor:
    """One over the lengths of the vectors along the second dimension of (N, D, ...); 0 for one without direction."""
    norm = torch.linalg.vector_norm(x, dim=1)
    return norm.masked_fill(norm < 1e-12, math.inf).reciprocal()


def with_gradient(value: Tensor, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor:
    """A scalar that was computed together with its gradients with respect to the inputs."""
    return _WithGradient.apply(value, grads, *inputs)


class _WithGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if saved is None else grad * saved for saved in ctx.saved_tensors)
