"""What losses share: how they take features, and reductions over all pairs, a block of rows at a time.

A loss is a pure function of tensors to a scalar. Unless its docstring says otherwise:

* Features are (N, D), and row i of one belongs to row i of the other. They are normalised inside.
* Values and gradients are computed in float32, or in float64 if an input is float64, also under autocast. Features in
  half precision get a gradient of their own type.
* With several processes, give the features of all of them, gathered with gradient: value and gradient are then those
  of the global batch. The mean of what each process computes on its own features is another number in general; for
  ``swapped_prediction``, the losses of cells and ``masked_mse`` it is the same, and they need no gathering.
* ``chunk_size`` is how many rows of the N x N matrix of pairs exist at a time (None: all). It changes neither value
  nor gradient.
* A loss gives the numbers of its paper and of the authors' code, but for what stands under "Departures".

The pairwise losses need two reductions of the logits ``scale * x @ y.T``: the log-sum-exp along rows
and columns (CLIP, NT-Xent and, as the squared distance of unit vectors is ``2 - 2 cos``, uniformity),
and the sum of softplus (the sigmoid loss). Both work in the same way:

* forward visits ``chunk_size`` rows of the logits at a time and keeps the reduced numbers only;
* backward computes each block again, turns it into d(loss) / d(logits) by means of these numbers, and
  adds the block's part to the gradients.

Memory is O(N * chunk_size), the gradient is exact, and the price is four products of N x N x D where
three are needed at least. ``chunk_size=None``, the plain form, is one block that is kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F  # noqa: N812

Scalar = float | Tensor  # a number, or a 0-dim tensor
Pairs = Literal["all", "unequal", "upper"]  # which (i, j) take part: all, i != j, i < j
NEVER = -1e30  # the logit of a pair that takes no part: its exponential is 0, and unlike -inf it makes no NaN
Block = tuple[slice, slice, Tensor]  # rows, columns, and the logits there


def full_precision(features: Tensor) -> torch.autocast:
    """Autocast off on the device of ``features``: bfloat16 has three digits, a logit of 100 needs more."""
    return torch.autocast(features.device.type, enabled=False)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 or, if one of them is float64, in float64."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return [x.to(dtype) for x in tensors]


def paired(*features: Tensor, num_min: int = 1) -> list[Tensor]:
    """Features of one shape (N, D), in float32 or, if one of them is float64, in float64.

    Raises:
        ValueError: the shapes are not (N, D), are not equal, or N is below ``num_min``, where the loss is undefined.
    """
    shapes = [tuple(x.shape) for x in features]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"features must be (N, D), and of equal shape where there are two; got {shapes}")
    if shapes[0][0] < num_min:
        raise ValueError(
            f"this loss is undefined for {shapes[0][0]} sample(s): set the batch size to at least {num_min} "
            "and drop_last=True if the last batch can be smaller"
        )
    return widened(*features)


def unit(*features: Tensor, num_min: int = 1) -> list[Tensor]:
    """As :func:`paired`, with all rows scaled to length 1 by :func:`normalise`."""
    return [normalise(x) for x in paired(*features, num_min=num_min)]


def normalise(x: Tensor) -> Tensor:
    """Scale the vectors along the second dimension of (N, D, ...) to length 1.

    A vector shorter than 1e-12 has no direction: it becomes zero, and so does its gradient.
    """
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # A product needs half the memory of a quotient in backward, which would be the peak of the whole loss.
    return x * norm.masked_fill(norm < 1e-12, math.inf).reciprocal()


@torch.no_grad()
def true_logits(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """Logits (N,) of the true pairs, without gradient: as a shift they keep the digits of small losses."""
    return (scale * (x * y).sum(1)).to(x.dtype)


def row_blocks(num: int, chunk_size: int | None) -> list[slice]:
    """Slices of at most ``chunk_size`` rows, which together are all ``num`` rows; one slice if None.

    Raises:
        ValueError: ``chunk_size`` is below 1.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for the plain form; got {chunk_size}")
    size = chunk_size or num
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


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


def logsumexp(
    x: Tensor, y: Tensor, scale: Scalar, shift: Tensor, *, pairs: Pairs = "all", chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of ``scale * <x_i, y_j> - shift`` over every row i and every column j, and the diagonal: (N,) each.

    Args:
        x: (N, D).
        y: (N, D).
        scale: which gets its gradient if it is a tensor.
        shift: (N,), without gradient; row i is shifted by ``shift[i]``, column j by ``shift[j]``. Results close to 0
            keep the digits that a logit of 100 loses in float32.
        pairs: the entries that take part; a row or column without any gives about -1e30.
        chunk_size: how many rows of the logits exist at a time; all if None.
    """
    return _LogSumExp.apply(x, y, _scalar(scale, x), shift, pairs, chunk_size)


class _LogSumExp(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, pairs: Pairs, chunk_size: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        row, column, diagonal = x.new_empty(len(x)), x.new_full((len(x),), NEVER), x.new_empty(len(x))
        for rows, columns, logits in _blocks(x, y, scale, pairs, chunk_size):
            row[rows] = _logsumexp(logits, shift[rows], 1)
            column[columns] = torch.logaddexp(column[columns], _logsumexp(logits, shift[columns], 0))
            diagonal[rows] = logits.diagonal(rows.start - columns.start) - shift[rows]
        ctx.save_for_backward(x, y, scale, shift, column, logits if chunk_size is None else None)
        ctx.pairs, ctx.chunk_size = pairs, chunk_size
        ctx.set_materialize_grads(False)  # what a loss does not use costs no exponentials
        return row, column, diagonal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_row: Tensor | None, grad_column: Tensor | None, grad_diagonal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, y, scale, shift, column, kept = ctx.saved_tensors
        grad_row = x.new_zeros(len(x)) if grad_row is None else grad_row

        def weigh(rows: slice, columns: slice, logits: Tensor) -> Tensor:
            weight = logits.softmax(1).mul_(grad_row[rows, None])
            if grad_column is not None:
                spare = logits if kept is None else None  # backward may run again on kept logits
                share = torch.sub(logits, shift[columns], out=spare).sub_(column[columns]).exp_()
                weight.addcmul_(share, grad_column[columns])
            if grad_diagonal is not None:
                weight.diagonal(rows.start - columns.start).add_(grad_diagonal[rows])
            return weight

        blocks = _blocks(x, y, scale, ctx.pairs, ctx.chunk_size, kept)
        return *_gradients(x, y, scale, blocks, weigh), None, None, None


def _logsumexp(logits: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of ``logits - shift``; the shift is taken off the largest logit, where it costs no digits."""
    top = logits.amax(dim)
    return (top - shift) + (logits - top.unsqueeze(dim)).exp_().sum(dim).log_()


def softplus_sum(x: Tensor, y: Tensor, scale: Scalar, bias: Scalar, *, chunk_size: int | None) -> Tensor:
    """Sum of softplus over the logits ``scale * x @ y.T + bias``, those of the diagonal with their sign changed."""
    return _SoftplusSum.apply(x, y, _scalar(scale, x), _scalar(bias, x), chunk_size)


class _SoftplusSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, chunk_size: int | None) -> Tensor:
        total = torch.zeros_like(bias)
        for rows, _, logits in _blocks(x, y, scale, "all", chunk_size):
            # Above the threshold softplus is the identity; at 40 that is exact in float64 too.
            total += F.softplus(_margin(rows, logits, bias, chunk_size is None), threshold=40).sum()
        ctx.save_for_backward(x, y, scale, bias, logits if chunk_size is None else None)
        ctx.chunk_size = chunk_size
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, bias, kept = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias)

        def weigh(rows: slice, columns: slice, logits: Tensor) -> Tensor:
            weight = _margin(rows, logits, bias, kept is not None).sigmoid_().mul_(grad)
            weight.diagonal(rows.start).neg_()
            grad_bias.add_(weight.sum())
            return weight

        blocks = _blocks(x, y, scale, "all", ctx.chunk_size, kept)
        return *_gradients(x, y, scale, blocks, weigh), grad_bias, None


def _margin(rows: slice, logits: Tensor, bias: Tensor, keep: bool) -> Tensor:
    """How wrong every pair is: the logit of a false pair, minus the logit of a true one; in place unless kept."""
    margin = logits + bias if keep else logits.add_(bias)
    margin.diagonal(rows.start).neg_()
    return margin


def _scalar(value: Scalar, like: Tensor) -> Tensor:
    """The value as a tensor of the features' precision; a learned one keeps its gradient."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def _blocks(
    x: Tensor, y: Tensor, scale: Tensor, pairs: Pairs, chunk_size: int | None, kept: Tensor | None = None
) -> Iterator[Block]:
    """The logits from top to bottom in blocks of ``chunk_size`` rows; ``kept`` are those of a single block."""
    for rows in row_blocks(len(x), chunk_size):
        # No pair below the diagonal takes part in "upper", so nothing left of the block need be computed.
        columns = slice(rows.start if pairs == "upper" else 0, len(x))
        yield rows, columns, _logits(scale * x[rows], y[columns], pairs, rows.start) if kept is None else kept


def _logits(x: Tensor, y: Tensor, pairs: Pairs, start: int) -> Tensor:
    """All logits of some rows, the first of which is row ``start``."""
    logits = x @ y.T
    if pairs == "unequal":
        logits.diagonal(start).fill_(NEVER)
    elif pairs == "upper":
        square = logits[:, : len(logits)]
        square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(), NEVER)
    return logits


def _gradients(
    x: Tensor, y: Tensor, scale: Tensor, blocks: Iterable[Block], weigh: Callable[[slice, slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of y and of the scale; ``weigh`` turns a block of logits into d(loss) / d(logits)."""
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
    with full_precision(x):  # backward may be called under autocast
        for rows, columns, logits in blocks:
            weight = weigh(rows, columns, logits)
            torch.mm(weight, y[columns], out=grad_x[rows])
            grad_y[columns].addmm_(weight.T, x[rows])
            del logits, weight  # or they would live beside the next block
    grad_scale = (grad_x * x).sum()  # the sum of weight times cosine, without the matrix
    return grad_x.mul_(scale), grad_y.mul_(scale), grad_scale
