"""A student that predicts what its slow copy, the teacher, gives: distributions over prototypes, cells or keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from repr.losses.clustering import near_rows, soft_cross_entropy, swapped_prediction
from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, normalise, unit, widened
from repr.losses.precision import Precision, full_precision

Sum = Callable[[Tensor], Tensor]  # over all processes


def self_distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy of predicting the teacher's distribution of a view from every other view.

    With ``P_t = softmax((teacher_t - center) / teacher_temperature)``, over pairs of different views::

        loss = -mean over (t, v), v != t, of 1/B sum_b sum_k P_t,bk log softmax(student_v,b / student_temperature)_k

    Shapes: ``student`` V tensors (B, K), ``teacher`` those of the first views, at least one; ``center`` K numbers of
    any shape. The teacher gets no gradient. It takes no exchange; the center is to be that of all processes.

    Range: [0, inf), in nats. At chance (equal scores of the student): ln K.

    Source: Caron et al., 2021 (DINO), arXiv:2104.14294, equations 1 to 3.

    Raises:
        ValueError: there are no two different views, or they differ in shape.
    """
    if not teacher or len(student) < max(2, len(teacher)):
        raise ValueError(f"{len(student)} views of the student and {len(teacher)} of the teacher make no pairs")
    if len({tuple(x.shape) for x in (*student, *teacher)}) != 1:
        raise ValueError(f"views differ in shape: {[tuple(x.shape) for x in (*student, *teacher)]}")
    targets = [centred(x, center, teacher_temperature) for x in teacher]
    return swapped_prediction(student, targets, assign_views=range(len(teacher)), temperature=student_temperature)


def patch_distillation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy of predicting the teacher's distribution of each cell that the student did not see.

    It is :func:`masked_prediction` of ``P_bl = softmax((teacher_bl - center) / teacher_temperature)``.

    Shapes: ``student`` and ``teacher`` (B, L, K), of one view; ``mask`` (B, L), true for cells that were masked;
    ``center`` K numbers of any shape. The center is to be that of all processes.

    Source: Zhou et al., 2022 (iBOT), arXiv:2111.07832, equation 2.

    Raises:
        ValueError: the shapes do not match.
    """
    if student.ndim != 3 or student.shape != teacher.shape or mask.shape != student.shape[:2]:
        shapes = [tuple(x.shape) for x in (student, teacher, mask)]
        raise ValueError(f"student and teacher are (B, L, K) and mask (B, L); got {shapes}")
    cells = mask.bool()
    targets = centred(teacher[cells], center, teacher_temperature)
    return masked_prediction(student[cells], targets, mask, temperature=student_temperature)


def masked_prediction(scores: Tensor, targets: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of predicting the distributions ``P`` of masked cells, of which alone scores are computed.

    With ``S = softmax(scores / temperature)``::

        loss = -1/B sum_b 1/max(1, |mask_b|) sum_{l in mask_b} sum_k P_blk log S_blk

    Shapes: ``mask`` (B, L), true for M masked cells; ``scores`` and ``targets`` (M, K), theirs in the order of the
    pictures and of the cells. A picture without masked cells counts as 0. The targets get no gradient. It takes no
    exchange.

    Range: [0, inf), in nats. At chance (equal scores of the student): ln K times the share of pictures with a mask.

    Source: Zhou et al., 2022 (iBOT), arXiv:2111.07832, equation 2.

    Departures: the paper sums over cells, the authors' code and this function take their mean.
    """
    losses = soft_cross_entropy(scores, targets, temperature=temperature)  # (M,)
    picture = mask.nonzero()[:, 0]
    share = 1 / mask.sum(1).clamp(min=1).to(losses.dtype)
    return (losses * share[picture]).sum() / len(mask)


def soft_contrast(
    query: Tensor,
    keys: Tensor,
    teacher: Tensor,
    *,
    temperature: Scalar,
    alpha: float,
    queue: Tensor | None = None,
    chunk_size: int | None = None,
    exchange: Exchange = ALONE,
    precision: Precision = "float32",
) -> Tensor:
    """Cross-entropy of finding the key of a query among all keys, and of weighing the keys as a teacher does.

    With ``q``, ``k`` and ``t`` the unit vectors of queries, keys and teacher, ``s_ij = <q_i, k_j> / temperature`` over
    the N keys of the batch and the K of the queue, and ``p_ij = softmax_j(<t_i, k_j> / temperature)``::

        loss = -1/N sum_i sum_j (alpha p_ij + (1 - alpha) [i = j]) log softmax_j(s_ij)

    Shapes: ``query``, ``keys`` and ``teacher`` (n, D) of this process, ``queue`` (K, D), the same on all. Query and
    temperature get a gradient, the latter by ``s`` alone. ``chunk_size`` is how many queries are compared at a time.

    Range: [0, 2 / temperature + ln(N + K)], in nats. At chance (all similarities equal): ln(N + K).

    Source: Li et al., 2021 (ALBEF), arXiv:2107.07651, equation 6.

    Departures: the keys are those of all processes, where the authors' code has each one's own and the queue.

    Raises:
        ValueError: the shapes do not match.
    """
    if queue is not None and (queue.ndim != 2 or queue.shape[1:] != query.shape[1:]):
        raise ValueError(f"queue is (K, D) as wide as query; got {tuple(queue.shape)} and {tuple(query.shape)}")
    with full_precision(query, precision):
        q, own, t = unit(query, keys.detach(), teacher.detach(), exchange=exchange)
        columns = exchange.rows(own)  # (N, D), this process's first
        if queue is not None:
            columns = torch.cat([columns, normalise(queue.detach().to(columns.dtype))])
        some = partial(_softly, columns=columns, scale=1 / temperature, alpha=alpha)
        if chunk_size is None:
            return exchange.mean(some(q, own, t).mean())
        losses = [checkpoint(some, q[i], own[i], t[i], use_reentrant=False) for i in row_blocks(len(q), chunk_size)]
        return exchange.mean(torch.cat(losses).mean())


def _softly(q: Tensor, own: Tensor, t: Tensor, *, columns: Tensor, scale: Scalar, alpha: float) -> Tensor:
    """The cross-entropies (C,) of some queries, from their own keys on, which keeps the digits of small losses."""
    above = scale * (q @ columns.T) - scale * (q * own).sum(1, keepdim=True)  # (C, N + K)
    losses = above.logsumexp(1)
    if alpha:
        with torch.no_grad():
            weights = (scale * (t @ columns.T)).softmax(1)
        losses = losses - alpha * (weights * above).sum(1)
    return losses


@torch.no_grad()
def centred(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's distributions, ``softmax((scores - center) / temperature)``: (..., K), float32 or float64.

    Several processes: the center, K numbers of any shape, is to be that of all.
    """
    with full_precision(scores):
        scores, center = widened(scores, center.flatten())
        flat, out = scores.flatten(0, -2), torch.empty_like(scores, memory_format=torch.contiguous_format)
        for rows in near_rows(flat):
            torch.softmax((flat[rows] - center).div_(temperature), 1, out=out.flatten(0, -2)[rows])
        return out


@torch.no_grad()
def moved_center(center: Tensor, teacher: Tensor, *, momentum: float, all_reduce: Sum | None = None) -> Tensor:
    """The center after a step: ``momentum`` of the old one, and the rest of the mean of all the teacher's rows.

    Shapes: ``center`` (K,); ``teacher`` (..., K), all views that it saw; where there are no rows, the center stays.
    Several processes: give each its own rows and ``repr.distributed.all_reduce``.

    Source: Caron et al., 2021 (DINO), arXiv:2104.14294, equation 4.
    """
    total = teacher.flatten(0, -2).sum(0, dtype=center.dtype)
    num = center.new_tensor(float(teacher.shape[:-1].numel()))
    if all_reduce is not None:
        total, num = all_reduce(total), all_reduce(num)
    return torch.where(num > 0, center * momentum + total / num * (1 - momentum), center)
