"""Reductions over all pairs of samples, a block of rows at a time.

The pairwise losses need two reductions of the logits ``scale * cos(x_i, y_j)``: the log-sum-exp along rows
and columns (CLIP, NT-Xent and, as the squared distance of unit vectors is ``2 - 2 cos``, uniformity),
and the sum of softplus (the sigmoid loss). Both work in the same way:

* a process has the columns of its own samples and the rows of all, so its share of the work is one W-th;
* forward visits ``chunk_size`` rows of the logits at a time, of W processes so many of each, and keeps the reduced
  numbers only; those of rows are then joined over processes, maxima first, N numbers each;
* backward computes each block again, turns it into d(loss) / d(logits) by means of these numbers, and
  adds the block's part to the gradients; that of rows goes home to their process while the next block is computed;
* lengths are factors of rows and of columns, and gradients are turned in place from those of directions to those of
  features, so that no normalised copy of the features is held.

Memory is O(N * chunk_size), beside the N x D rows that are gathered unless they go round a ring. The gradient is exact,
and the price is four products of N x N x D where three are needed at least. ``chunk_size=None``, the plain form, is one
block that is kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F  # noqa: N812

from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, inverse_length
from repr.losses.precision import Precision, add_product, full_precision, product

Pairs = Literal["all", "unequal", "upper"]  # which (i, j) take part: all, i != j, i < j
NEVER = -1e30  # the logit of a pair that takes no part: its exponential is 0, and unlike -inf it makes no NaN


@torch.no_grad()
def true_logits(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """Logits (N,) of the true pairs, without gradient: as a shift they keep the digits of small losses."""
    return (scale * (x * y).sum(1) * inverse_length(x) * inverse_length(y)).to(x.dtype)


class Block(NamedTuple):
    """The logits of some rows of some processes with some of this process's columns."""

    part: slice  # K processes, numbered from this one on
    rows: slice  # C of each
    columns: slice  # M, those without a row of their own last
    logits: Tensor  # (K * C, M)

    @property
    def has_own(self) -> bool:
        """Whether this process's rows are among them."""
        return self.part.start == 0

    def own_diagonal(self, matrix: Tensor) -> Tensor:
        """Where own rows meet their own columns in what has the shape of the logits; a view."""
        return matrix[: self.rows.stop - self.rows.start].diagonal(self.rows.start - self.columns.start)


class Matrix(NamedTuple):
    """The logits of the rows of all processes with this process's columns, a block at a time."""

    rows: Tensor  # what the exchange has spread, of any length
    row_inverse: Tensor  # (W, n), one over the lengths of the rows of all processes
    y: Tensor  # (n + m, D), of any length, m of them without a row of their own
    inverse: Tensor  # (n + m,), one over theirs
    scale: Tensor
    pairs: Pairs
    chunk_size: int | None
    exchange: Exchange
    precision: Precision
    keys: Tensor | None  # (W, n + m, K), of the columns of all processes
    valid: Tensor | None  # (m,) bool, which of the last columns take part

    @classmethod
    def of(cls, x: Tensor, y: Tensor, scale: Tensor, options: Sequence[Any]) -> Matrix:
        """That of features (n, D) and (n + m, D), which are sent round; ``options`` are the fields behind the scale."""
        _, chunk_size, exchange, *_ = options
        rows = exchange.spread(x, chunk_size)
        row_inverse = exchange.rows(inverse_length(x)).unflatten(0, (-1, len(x)))
        return cls(rows, row_inverse, y, inverse_length(y), scale, *options)

    def visit(
        self,
        work: Callable[[Block, Tensor, Any], None],
        home: Tensor | None = None,
        kept: Sequence[Tensor] = (),
    ) -> None:
        """Show ``work`` each block, its rows' directions, and where their gradients go; ``kept`` may have the logits.

        See :meth:`repr.losses.exchange.Exchange.visit`.
        """
        ready = iter(kept)

        def show(part: slice, rows: slice, x: Tensor, out: Tensor | None) -> None:
            columns = slice(rows.start if self._is_edge(part) else 0, len(self.y))
            x = x * self.row_inverse[part, rows].reshape(-1, 1)
            logits = next(ready) if kept else self._logits(part, rows, x, columns)
            work(Block(part, rows, columns, logits), x, out)

        self.exchange.visit(self.rows, self._parts(), self.chunk_size, show, home)

    def gradients(self, weigh: Callable[[Block], Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, of y and of the scale; ``weigh`` turns a block of logits into d(loss) / d(logits)."""
        grad_x, grad_y = self.y.new_empty(self.rows.shape[1:]), torch.zeros_like(self.y)

        def work(block: Block, x: Tensor, out: Tensor) -> None:
            weight = weigh(block).mul_(self.inverse[block.columns])
            product(weight, self.y[block.columns], self.precision, out)
            add_product(grad_y[block.columns], weight.T, x, self.precision)

        with full_precision(self.y, self.precision):  # backward may be called under autocast
            self.visit(work, grad_x, kept)
        inverse = self.row_inverse[0]
        grad_scale = self._turn(grad_x, self.rows[0], inverse, self.scale * inverse).sum()  # weight times cosine
        self._turn(grad_y, self.y, self.inverse, self.scale.expand_as(self.inverse))
        return grad_x, grad_y, grad_scale

    def _turn(self, grad: Tensor, x: Tensor, inverse: Tensor, factor: Tensor) -> Tensor:
        """Make the gradient of directions one of the features ``x``, in place: across them, times ``factor``.

        Returns:
            what it was along the directions, (N,).
        """
        along = x.new_empty(len(x))
        for part in row_blocks(len(x), self.chunk_size and self.chunk_size * self.exchange.size):
            direction = x[part] * inverse[part].unsqueeze(1)
            along[part] = (grad[part] * direction).sum(1)
            grad[part].addcmul_(direction, along[part].unsqueeze(1), value=-1).mul_(factor[part].unsqueeze(1))
        return along

    def _is_edge(self, part: slice) -> bool:
        """Whether a triangle of the logits takes part."""
        return self.pairs == "upper" and 2 * part.start % self.exchange.size == 0

    def _parts(self) -> list[slice]:
        """The processes whose rows meet this one's columns.

        Of pairs that take part in one order alone ("upper") each process has a triangle of its own ones, those with the
        rows of half of the others, and where their number is even a triangle of those with the process opposite.
        """
        size = self.exchange.size
        if self.pairs != "upper":
            return [slice(0, size)]
        edges = [0, size // 2] if size % 2 == 0 else [0]
        parts = [*(slice(edge, edge + 1) for edge in edges), slice(1, (size + 1) // 2)]
        return [part for part in parts if part.start < part.stop]

    def _logits(self, part: slice, rows: slice, x: Tensor, columns: slice) -> Tensor:
        logits = product(self.scale * x, self.y[columns].T, self.precision).mul_(self.inverse[columns])
        num = rows.stop - rows.start
        if self.keys is not None:
            self._leave_out(logits, part, rows, self.keys[0, columns])
        if self.valid is not None:
            logits[:, logits.shape[1] - len(self.valid) :].masked_fill_(~self.valid, NEVER)
        if self.pairs == "unequal" and part.start == 0:
            logits[:num].diagonal(rows.start).fill_(NEVER)
        elif self._is_edge(part):
            square = logits[:, :num]
            square.masked_fill_(torch.ones_like(square, dtype=torch.bool).tril_(-1 if part.start else 0), NEVER)
            if part.start:  # the process opposite has the diagonal too: each takes half of it
                square.diagonal().sub_(math.log(2))
        return logits

    def _leave_out(self, logits: Tensor, part: slice, rows: slice, columns: Tensor) -> None:
        """Take pairs of equal ``keys`` out of the logits of these rows with the ``columns`` (M, K) of keys."""
        assert self.keys is not None
        true = logits[: rows.stop - rows.start].diagonal(rows.start - len(self.y) + len(columns)).clone()
        for row_key, column_key in zip(self.keys[part, rows].flatten(0, 1).T, columns.T, strict=True):
            logits.masked_fill_(row_key.unsqueeze(1) == column_key, NEVER)
        if part.start == 0:
            logits[: rows.stop - rows.start].diagonal(rows.start - len(self.y) + len(columns)).copy_(true)


def logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Scalar,
    shift: Tensor,
    *,
    pairs: Pairs = "all",
    chunk_size: int | None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
    keys: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of ``scale * cos(x_i, y_j) - shift`` over every row i and every column j, and the diagonal.

    Each is (n,), of this process; the sums are over the N rows and columns of all.

    Args:
        x: (n, D).
        y: (n, D), or (n + m, D): the last m count for the rows alone.
        scale: which gets its gradient if it is a tensor.
        shift: (n,), without gradient; row i is shifted by ``shift[i]``, column j by ``shift[j]``. Results close to 0
            keep the digits that a logit of 100 loses in float32.
        pairs: the entries that take part; a row or column without any gives about -1e30.
        chunk_size: how many rows of the logits exist at a time; all if None.
        exchange: how x reaches the other processes.
        precision: of the products.
        keys: of x and y, as many as there are of y; pairs with an equal one take no part, but for the diagonal.
        valid: (m,) bool, which of the last m count; None: all.
    """
    options = pairs, chunk_size, exchange, precision, _of_all(keys, exchange), valid
    return _LogSumExp.apply(x, y, _scalar(scale, x), shift, *options)


def _of_all(keys: Tensor | None, exchange: Exchange) -> Tensor | None:
    """The keys (n + m, K) of all processes from this one on: (W, n + m, K)."""
    return None if keys is None else exchange.rows(keys).unflatten(0, (-1, len(keys)))


class _LogSumExp(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, shift: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, chunk_size, exchange, *_ = ctx.options = options
        matrix = Matrix.of(x, y, scale, options)
        shifts = exchange.rows(shift).unflatten(0, (-1, len(x)))  # (W, n)
        here = x.new_full(shifts.shape, NEVER)  # of all rows, over this process's columns
        column, diagonal = x.new_full((len(x),), NEVER), x.new_empty(len(x))
        kept: list[Tensor] = []

        def reduce(block: Block, *_: Any) -> None:
            part, rows, columns, logits = block
            here[part, rows] = _logsumexp(logits, shifts[part, rows].flatten(), 1).view(here[part, rows].shape)
            true = logits[:, : len(shift[columns])]
            column[columns] = torch.logaddexp(column[columns], _logsumexp(true, shift[columns], 0))
            if block.has_own:
                diagonal[rows] = block.own_diagonal(logits) - shift[rows]
            if chunk_size is None:
                kept.append(logits)

        matrix.visit(reduce)
        row = exchange.logsumexp(here)
        ctx.save_for_backward(*matrix[:5], shift, column, (here - row).exp_(), *kept)
        ctx.set_materialize_grads(False)  # what a loss does not use costs no exponentials
        return row[0].clone(), column, diagonal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_row: Tensor | None, grad_column: Tensor | None, grad_diagonal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *features, shift, column, share = ctx.saved_tensors[:8]
        kept = ctx.saved_tensors[8:]
        matrix = Matrix(*features, *ctx.options)
        grad_row = torch.zeros_like(column) if grad_row is None else grad_row.contiguous()
        grad_rows = share * matrix.exchange.rows(grad_row).view_as(share)

        def weigh(block: Block) -> Tensor:
            part, rows, columns, logits = block
            weight = logits.softmax(1).mul_(grad_rows[part, rows].reshape(-1, 1))
            if grad_column is not None:
                true = logits[:, : len(shift[columns])]
                spare = None if kept else true  # backward may run again on kept logits
                ours = torch.sub(true, shift[columns], out=spare).sub_(column[columns]).exp_()
                weight[:, : len(shift[columns])].addcmul_(ours, grad_column[columns])
            if grad_diagonal is not None and block.has_own:
                block.own_diagonal(weight).add_(grad_diagonal[rows])
            return weight

        return *matrix.gradients(weigh, kept), None, *[None] * len(ctx.options)


def _logsumexp(logits: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of ``logits - shift``; the shift is taken off the largest logit, where it costs no digits."""
    top = logits.amax(dim)
    return (top - shift) + (logits - top.unsqueeze(dim)).exp_().sum(dim).log_()


def softplus_sum(
    x: Tensor,
    y: Tensor,
    scale: Scalar,
    bias: Scalar,
    *,
    chunk_size: int | None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
    keys: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Sum of softplus over the logits ``scale * cos(x_i, y_j) + bias``, those of the diagonal with their sign changed.

    The rows are those of all processes, the columns those of this one, further ones as for :func:`logsumexp`.
    """
    options = "all", chunk_size, exchange, precision, _of_all(keys, exchange), valid
    return _SoftplusSum.apply(x, y, _scalar(scale, x), _scalar(bias, x), *options)


class _SoftplusSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *options: Any) -> Tensor:
        _, chunk_size, *_ = ctx.options = options
        total, kept = torch.zeros_like(bias), []

        def add(block: Block, *_: Any) -> None:
            # Above the threshold softplus is the identity; at 40 that is exact in float64 too.
            total.add_(F.softplus(_margin(block, bias, chunk_size is None), threshold=40).sum())
            if chunk_size is None:
                kept.append(block.logits)

        matrix = Matrix.of(x, y, scale, options)
        matrix.visit(add)
        ctx.save_for_backward(*matrix[:5], bias, *kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, bias, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5], ctx.saved_tensors[6:]
        grad_bias = torch.zeros_like(bias)

        def weigh(block: Block) -> Tensor:
            weight = _margin(block, bias, bool(kept)).sigmoid_().mul_(grad)
            if block.has_own:
                block.own_diagonal(weight).neg_()
            grad_bias.add_(weight.sum())
            return weight

        grads = Matrix(*features, *ctx.options).gradients(weigh, kept)
        return *grads, grad_bias, *[None] * len(ctx.options)


def _margin(block: Block, bias: Tensor, keep: bool) -> Tensor:
    """How wrong every pair is: the logit of a false pair, minus the logit of a true one; in place unless kept."""
    margin = block.logits + bias if keep else block.logits.add_(bias)
    if block.has_own:
        block.own_diagonal(margin).neg_()
    return margin


def _scalar(value: Scalar, like: Tensor) -> Tensor:
    """The value as a tensor of the features' precision; a learned one keeps its gradient."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())
