"""Cluster assignments that spread a batch evenly over prototypes, and their prediction from other views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from repr.losses.exchange import ALONE, Exchange, row_blocks
from repr.losses.features import Scalar, unit, widened
from repr.losses.precision import full_precision

# (values of this rank, reduction) -> values of all ranks
Reduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, num_iters: int, all_reduce: Reduce | None = None) -> Tensor:
    """Assign samples softly to prototypes so that all prototypes get about the same mass.

    ``Q_nk = u_k exp(s_nk / epsilon) v_n``, with u and v found by ``num_iters`` rounds of::

        u_k = 1 / sum_n exp(s_nk / epsilon) v_n      (over the samples of all ranks, up to a common factor)
        v_n = 1 / sum_k exp(s_nk / epsilon) u_k

    Shapes: ``scores`` (N, K), cosines of N samples and K prototypes, taken as they are; the result is (N, K), float32
    whatever comes in, and without gradient.

    Range: entries in [0, 1], every row sums to 1, every column to N / K as nearly as ``num_iters`` rounds bring it.
    Equal rows give 1 / K everywhere, the fixed point of collapse: entropy ln K nats.

    Source: Cuturi, 2013, arXiv:1306.0895; Caron et al., 2020 (SwAV), arXiv:2006.09882, section 3.1 and appendix A.1,
    where epsilon is 0.05 and ``num_iters`` 3.

    Departures: every row is divided by its own maximum, and v starts at that maximum over the global one. The product
    is the same, but exp(1 / 0.05) has no place in half precision, nor exp(1 / 0.01) in float32. Below an epsilon of
    about 0.02 the smaller of two exponentials may be no float32 number; it counts as 0, and the result stays finite.

    Several processes: give each its own rows and ``repr.distributed.all_reduce``, which is called once for the maximum
    and once a round.

    Raises:
        ValueError: ``scores`` is not a matrix, ``epsilon`` not positive, or ``num_iters`` below 1.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (N, K); got {tuple(scores.shape)}")
    if epsilon <= 0 or num_iters < 1:
        raise ValueError(f"sinkhorn: epsilon={epsilon}, num_iters={num_iters}; set epsilon > 0 and num_iters >= 1")
    reduce = all_reduce or (lambda x, op: x)
    with full_precision(scores):
        logits = scores.float() / epsilon
        top = logits.amax(1)  # (N,)
        q = logits.sub_(top[:, None]).exp_()  # (N, K), 1 at the best prototype of each sample
        most = torch.cat([top, top.new_full((1,), -torch.inf)]).max()  # a process may have no rows
        v = (top - reduce(most, "max")).exp()
        for _ in range(num_iters):
            mass = reduce(q.T @ v, "sum")  # (K,)
            # The mean keeps the scale of v from round to round. A mass of 0 is one that is no float32 number.
            u = mass.mean() / mass.clamp_min(1e-30)
            v = (q @ u).reciprocal()
        return q.mul_(u).mul_(v[:, None])


def swapped_prediction(
    scores: Sequence[Tensor], assignments: Sequence[Tensor], *, assign_views: Sequence[int], temperature: Scalar
) -> Tensor:
    """Cross-entropy of predicting the assignments of some views from the scores of all other views.

    With ``S_v`` the scores of view v, ``Q_a`` the assignments of view a and A the ``assign_views``::

        loss = -1/|A| sum_{a in A} 1/(V-1) sum_{v != a} 1/B sum_b sum_k Q_a,bk log softmax(S_v,b / temperature)_k

    Shapes: ``scores`` V tensors (B, K), V >= 2, cosines taken as they are; ``assignments`` a tensor (B, K) for each of
    ``assign_views``, in that order, whose rows sum to 1. They get no gradient, the scores do.

    Range: [0, ln K + 2 / temperature], in nats. At chance (equal scores): ln K.

    Source: Caron et al., 2020 (SwAV), arXiv:2006.09882, equations 1, 2 and 6.

    Departures: the paper's multi-crop objective (equation 6) is the plain double sum; the authors' code, and this
    function, take the mean over the V - 1 predicting views and over the assigned views.

    Raises:
        ValueError: fewer than two views, views of unequal batch size, or an assign view that does not exist.
    """
    check_views(len(scores), assign_views)
    if len({tuple(s.shape) for s in (*scores, *assignments)}) != 1 or len(assignments) != len(assign_views):
        raise ValueError(
            "every view needs scores, and every assign view assignments, of the same (B, K); got scores of "
            f"{[tuple(s.shape) for s in scores]} and assignments of {[tuple(q.shape) for q in assignments]}"
        )
    with full_precision(scores[0]):
        loss = scores[0].new_zeros((), dtype=torch.promote_types(scores[0].dtype, torch.float32))
        for view, score in enumerate(scores):
            targets = [q for q, a in zip(assignments, assign_views, strict=True) if a != view]
            if targets:
                target = torch.stack(targets).sum(0) if len(targets) > 1 else targets[0]
                loss = loss + soft_cross_entropy(score, target, temperature=temperature).mean()
        return loss / (len(assign_views) * (len(scores) - 1))


def soft_cross_entropy(scores: Tensor, targets: Tensor, *, temperature: Scalar) -> Tensor:
    """Cross-entropies ``-sum_k P_mk log softmax(scores_m / temperature)_k`` of rows, in float32 or float64.

    Beside the scores and their gradient no matrix of their size is made, where torch's own function makes five; with K
    in the ten thousands these are most of the work beside the products.

    Shapes: ``scores`` and ``targets`` (M, K), the latter not negative and without gradient; the result is (M,).
    """
    with full_precision(scores):
        scores, targets = widened(scores, targets.detach())
        if isinstance(temperature, Tensor):
            scores, temperature = scores / temperature, 1.0
        return _SoftCrossEntropy.apply(scores, targets, temperature)


class _SoftCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, targets)
        ctx.temperature = temperature
        out = scores.new_empty(len(scores))
        for rows in near_rows(scores):
            out[rows] = (targets[rows] * (scores[rows] / temperature).log_softmax(1)).sum(1).neg_()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        scores, targets = ctx.saved_tensors
        out, share = torch.empty_like(scores), (grads[0] / ctx.temperature)[:, None]
        for rows in near_rows(scores):
            softmax = torch.softmax(scores[rows] / ctx.temperature, 1, out=out[rows])
            mass = targets[rows].sum(1, keepdim=True)
            softmax.mul_(share[rows] * mass).addcmul_(targets[rows], -share[rows])
        return out, None, None


def near_rows(x: Tensor) -> list[slice]:
    """Slices of the rows of (M, K), of as many as stay in the cache of a CPU; 256 slices at most."""
    near = (2**24 if x.is_cuda else 2**19) // max(1, x.shape[1])
    return row_blocks(len(x), max(1, near, -(-len(x) // 256)))


def swapped_pairs(
    images: Sequence[Tensor],
    texts: Sequence[Tensor],
    *,
    logit_scale: Scalar,
    epsilon: float = 0.05,
    num_iters: int = 3,
    exchange: Exchange = ALONE,
) -> Tensor:
    """Cross-entropy of predicting, of a view and a caption, how the other view of each sample goes with other captions.

    With ``S_ab`` the cosines of all images in view a with all texts in form b, which stand for prototypes, and
    ``Q_ab = sinkhorn(S_ab)``::

        loss = -1/4 sum_a sum_b 1/N sum_i sum_j Q_ab,ij log softmax_j(logit_scale S_a'b',i)

    where a' and b' are the other view and form; and the same with the roles of images and texts exchanged, half each.

    Shapes: ``images`` and ``texts`` two tensors (n, D) each, of this process.

    Range: [0, ln N + 2 logit_scale], in nats. At chance (equal cosines): ln N.

    Source: Fini et al., 2023, arXiv:2305.08675 (SwALIP), as in the authors' code.

    Raises:
        ValueError: there are not two views of images and two of texts, or their shapes differ.
    """
    if len(images) != 2 or len(texts) != 2:
        raise ValueError(f"swapped_pairs takes two views and two texts of a sample; got {len(images)} and {len(texts)}")
    terms = []
    assign = partial(sinkhorn, epsilon=epsilon, num_iters=num_iters, all_reduce=exchange.all_reduce)
    with full_precision(images[0]):
        *images, first, second = unit(*images, *texts, exchange=exchange)
        for queries, keys in ((images, [first, second]), ([first, second], images)):
            prototypes = [exchange.rows(key, own_first=False) for key in keys]  # (N, D)
            scores = [[query @ prototype.T for prototype in prototypes] for query in queries]  # (n, N)
            for pair in ((scores[0][0], scores[1][1]), (scores[0][1], scores[1][0])):
                found = [assign(s) for s in pair]
                terms.append(swapped_prediction(pair, found, assign_views=(0, 1), temperature=1 / logit_scale))
        return exchange.mean(torch.stack(terms).mean())


def check_views(num_views: int, assign_views: Sequence[int]) -> None:
    """Refuse views from which nothing can be predicted.

    Raises:
        ValueError: fewer than two views, no assign view, one twice, or one that does not exist.
    """
    if num_views < 2:
        raise ValueError(
            f"swapped prediction needs two views or more of each sample, but there is {num_views}: add views"
        )
    if wrong := [a for a in assign_views if not 0 <= a < num_views]:
        raise ValueError(f"assign_views names view {wrong[0]}, but the {num_views} views are 0 to {num_views - 1}")
    if not assign_views or len(set(assign_views)) != len(assign_views):
        raise ValueError(f"assign_views={list(assign_views)}: name at least one view, and none twice")
