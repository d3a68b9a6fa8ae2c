"""Cross-entropy over a vocabulary of what is predicted for places of texts; their logits are never whole.

M places that are to be predicted and V words make M x V logits: with 76 places, 256 texts and 49,408 words 3.8 GB, and
as much for their gradient. So forward visits ``chunk_size`` places at a time and keeps a number for each; backward
computes their logits again. Places that are not predicted, such as padding, cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from repr.losses.exchange import row_blocks
from repr.losses.features import widened
from repr.losses.precision import Precision, add_product, full_precision, product

Sum = Callable[[Tensor], Tensor]  # over all processes, with gradient
Soft = Callable[[slice], Tensor]  # some of the M places -> their target distributions (C, V)
BLOCK = 2**23  # logits that exist at a time where no chunk_size is given: 32 MiB of float32


def caption(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    pad_id: int,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    all_reduce: Sum | None = None,
) -> Tensor:
    """Cross-entropy of predicting the words of captions, each from what a decoder makes of its place.

    With ``z_bl = hidden_bl @ head`` and the M places of all captions whose target is no padding::

        loss = -1/M sum_bl log softmax(z_bl)[targets_bl]

    Shapes: ``hidden`` (B, L, D), ``head`` (D, V), ``targets`` (B, L) int64; a place whose target is ``pad_id`` takes no
    part. ``chunk_size`` is how many places have logits at a time; None: as many as fill 32 MiB.

    Range: [0, inf), in nats a word; 0 where every target is padding. At chance (equal logits): ln V.

    Source: Yu et al., 2022 (CoCa), arXiv:2205.01917, section 3.1.

    Departures: M counts the words of all processes, where open_clip divides those of each process by their own number.

    Several processes: give each its own captions and ``repr.distributed.all_reduce``, which is called once.

    Raises:
        ValueError: the shapes do not match.
    """
    _, losses = _of_words(hidden, head, targets, pad_id, chunk_size, precision)
    return mean_of_all(losses, all_reduce)


def log_likelihood(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    pad_id: int,
    chunk_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """The logarithm of the probability of each caption, the sum over its words: (B,), in nats.

    Shapes as for :func:`caption`.
    """
    rows, losses = _of_words(hidden, head, targets, pad_id, chunk_size, precision)
    return losses.new_zeros(len(targets)).index_add_(0, rows // targets.shape[1], losses).neg()


def _of_words(
    hidden: Tensor, head: Tensor, targets: Tensor, pad_id: int, chunk_size: int | None, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Which of the B x L places are predicted, (M,), and their losses."""
    if hidden.ndim != 3 or targets.shape != hidden.shape[:2] or head.ndim != 2 or len(head) != hidden.shape[2]:
        shapes = [tuple(x.shape) for x in (hidden, head, targets)]
        raise ValueError(f"hidden is (B, L, D), head (D, V) and targets (B, L); got {shapes}")
    rows = (targets != pad_id).flatten().nonzero()[:, 0]
    flat, words = hidden.flatten(0, 1), targets.flatten()[rows]
    return rows, word_losses(flat, head, rows, words, chunk_size=chunk_size, precision=precision)


def mean_of_all(losses: Tensor, all_reduce: Sum | None) -> Tensor:
    """The mean of the losses (M,) of all processes, which may have different numbers of them; of none 0."""
    sums = torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))])
    total, num = sums if all_reduce is None else all_reduce(sums)
    return total / num.clamp(min=1)


def word_losses(
    hidden: Tensor,
    head: Tensor,
    rows: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    soft: Soft | None = None,
    chunk_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Cross-entropy of each of M places, with gradient: (M,) float32 or float64.

    With ``z_m = hidden[rows_m] @ head + bias``, it is ``-log softmax(z_m)[targets_m]``, or with ``soft`` in the place
    of targets, ``- sum_v q_mv log softmax(z_m)_v`` of the distributions ``q`` that it gives, without gradient.

    Shapes: ``hidden`` (N, D), ``head`` (D, V), ``rows`` (M,) int64, different places in ``hidden``; ``targets`` (M,);
    ``bias`` (V,).
    """
    if chunk_size is None:
        chunk_size = max(1, BLOCK // head.shape[1])
    return _WordLosses.apply(hidden, head, bias, rows, targets, soft, chunk_size, precision)


class _WordLosses(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, rows: Tensor, targets: Any, *options: Any
    ) -> Tensor:
        soft, chunk_size, precision = ctx.options = options
        _, matrix = widened(hidden[:0], head)
        log_sums, losses = (matrix.new_empty(len(rows)) for _ in range(2))
        parts, block = row_blocks(len(rows), chunk_size), matrix.new_empty(min(len(rows), chunk_size), head.shape[1])
        with full_precision(hidden, precision):
            for part in parts:
                logits = _logits(hidden[rows[part]], matrix, bias, precision, block)
                wanted = logits.gather(1, targets[part, None])[:, 0] if soft is None else (soft(part) * logits).sum(1)
                top = logits.amax(1)
                above = logits.sub_(top.unsqueeze(1)).exp_().sum(1).log_()
                log_sums[part], losses[part] = above + top, above + (top - wanted)
        ctx.save_for_backward(hidden, head, bias, rows, targets, log_sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, rows, targets, log_sums = ctx.saved_tensors
        soft, chunk_size, precision = ctx.options
        matrix, grad_hidden = head.to(log_sums.dtype), torch.zeros_like(hidden)
        grad_head, grad_bias = torch.zeros_like(matrix), torch.zeros_like(matrix[0])
        block = matrix.new_empty(min(len(rows), chunk_size), head.shape[1])
        with full_precision(hidden, precision):  # backward may be called under autocast
            for part in row_blocks(len(rows), chunk_size):
                weight = _logits(hidden[rows[part]], matrix, bias, precision, block)
                weight.sub_(log_sums[part, None]).exp_()
                if soft is None:
                    weight.scatter_add_(1, targets[part, None], torch.full_like(weight[:, :1], -1))
                else:
                    weight.sub_(soft(part))
                weight.mul_(grad[part, None])
                grad_hidden[rows[part]] = product(weight, matrix.T, precision).to(hidden.dtype)
                add_product(grad_head, hidden[rows[part]].to(matrix.dtype).T, weight, precision)
                if bias is not None:
                    grad_bias += weight.sum(0)
        of_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_head.to(head.dtype), of_bias, None, None, *[None] * len(ctx.options)


def _logits(x: Tensor, head: Tensor, bias: Tensor | None, precision: Precision, block: Tensor) -> Tensor:
    """The logits of some places, in the memory of a block that is made once, since those that are freed add up."""
    logits = product(x.to(head.dtype), head, precision, block[: len(x)])
    return logits if bias is None else logits.add_(bias)


def masked_language(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    alpha: float = 0.0,
    chunk_size: int | None = None,
    precision: Precision = "float32",
    all_reduce: Sum | None = None,
) -> Tensor:
    """Cross-entropy of naming hidden words, and of naming them as a teacher does.

    With ``z_m = hidden_m @ head + bias`` of M hidden words, ``p = softmax`` of the teacher's and ``q_m = alpha p_m``
    plus ``1 - alpha`` for the word ``targets_m``::

        loss = -1/M sum_m sum_v q_mv log softmax(z_m)_v

    Shapes: ``hidden`` (M, D), of hidden words alone; ``head`` (D, V), ``bias`` (V,), ``targets`` (M,) int64;
    ``teacher`` its hidden, head and bias, which get no gradient; an ``alpha`` of 0 needs none.
    ``chunk_size`` is how many words have logits at a time; None: as many as fill 32 MiB.

    Range: [0, inf), in nats a word; 0 where no word is hidden. At chance (equal logits): ln V.

    Source: Li et al., 2021 (ALBEF), arXiv:2107.07651, equations 3 and 7.

    Departures: M counts the words of all processes, where the authors divide those of each by their own number.

    Several processes: give each its own words and ``repr.distributed.all_reduce``, which is called once.

    Raises:
        ValueError: the shapes do not match, or there is no teacher for an ``alpha`` above 0.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or head.ndim != 2 or len(head) != hidden.shape[1]:
        shapes = [tuple(x.shape) for x in (hidden, head, targets)]
        raise ValueError(f"hidden is (M, D), head (D, V) and targets (M,); got {shapes}")
    if alpha and teacher is None:
        raise ValueError(f"alpha={alpha} is the share of a teacher: give one, or set it to 0")

    @torch.no_grad()
    def soft(part: slice) -> Tensor:
        assert teacher is not None
        theirs, matrix, own = teacher
        theirs, matrix = widened(theirs[part], matrix)
        block = matrix.new_empty(len(theirs), matrix.shape[1])
        q = _logits(theirs, matrix, own, precision, block).softmax(1).mul_(alpha).to(widened(hidden[:0], head)[1].dtype)
        return q.scatter_add_(1, targets[part, None], torch.full_like(q[:, :1], 1 - alpha))

    rows = torch.arange(len(targets), device=targets.device)
    losses = word_losses(
        hidden, head, rows, targets, bias=bias, soft=soft if alpha else None, chunk_size=chunk_size, precision=precision
    )
    return mean_of_all(losses, all_reduce)
