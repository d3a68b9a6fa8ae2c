"""Linear probes of frozen features by the published protocols: logistic regression, and SGD at many rates at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repr.metrics.features import Features, labelled_trunk
from repr.metrics.scores import accuracy

CHUNK = 8192  # rows classified at a time


class Linear(NamedTuple):
    """A linear classifier, or H of them: ``weight`` (C, T) or (H, C, T), ``bias`` (C,) or (H, C)."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Classify rows (M, T) into (M,) classes, or (H, M) of H classifiers."""
        parts = [(part @ self.weight.mT + self.bias[..., None, :]).argmax(-1) for part in features.split(CHUNK)]
        return torch.cat(parts, dim=-1)


@torch.no_grad()
def logistic(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    exponents: tuple[int, int] = (-6, 6),
    steps_per_decade: int = 8,
    held_out: float = 0.2,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    r"""Accuracy of logistic regression by L-BFGS, with its regularisation chosen on a held-out part of the bank.

    .. math::
        \min_{W, b}\ \frac12 \lVert W \rVert^2 + C \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i}

    as scikit-learn's ``LogisticRegression(C=C)`` does, for two classes too. C is searched as CLIP's authors do: every
    second power of ten between the exponents, then around the best one at half the distance, down to
    ``steps_per_decade``. Of equally good ones the smallest is taken, and the whole bank fitted with it.

    Args:
        bank: ``trunk`` (N, T), taken as it is, in its own precision, and labels; unlabelled rows are left out.
        query: the same; a label that the bank lacks counts as wrong.
        attribute: which labels.
        exponents: the smallest and the largest C are ten to these powers.
        steps_per_decade: how finely C is searched.
        held_out: share of the bank, drawn from ``seed``, on which C is chosen.
        max_iter: steps of L-BFGS in each fit at most.
        tolerance: a fit ends where no derivative of the objective above, divided by C N, is larger.
        seed: of the held-out part; the global generators are not touched.

    Returns:
        ``linear_<attribute>`` in [0, 1], with the share of the query's largest class as its chance, and
        ``linear_<attribute>_C``, the C that was chosen.

    Raises:
        ValueError: there are no such labels; features are not finite; fewer than two rows or classes to fit.

    Source: Radford et al., 2021, arXiv 2103.00020, section A.3.
    """
    x, target, classes = _bank(bank, attribute)
    probed, labels = labelled_trunk(query, attribute)
    fit, held = split(len(x), held_out, seed)
    stop: Any = {"max_iter": max_iter, "tolerance": tolerance}
    probes: dict[float, tuple[float, Linear]] = {}  # exponent -> accuracy on the held-out part, classifier

    def look(exponent: float) -> None:
        if exponent in probes or not exponents[0] <= exponent <= exponents[1]:
            return
        weaker = [e for e in probes if e < exponent]  # a start from there takes a fraction of the steps
        start = probes[max(weaker)][1] if weaker else None
        probe = fit_logistic(x[fit], target[fit], len(classes), c=10**exponent, start=start, **stop)
        probes[exponent] = (probe.predict(x[held]) == target[held]).double().mean().item(), probe

    step = 2.0
    for number in range(int((exponents[1] - exponents[0]) / step) + 1):
        look(exponents[0] + number * step)
    while step > 1 / steps_per_decade:
        step /= 2
        best = _best(probes)
        look(best - step)
        look(best + step)
    best = _best(probes)
    probe = fit_logistic(x, target, len(classes), c=10**best, start=probes[best][1], **stop)
    name = f"linear_{attribute}"
    return accuracy(name, classes[probe.predict(probed)], labels) | {f"{name}_C": 10**best}


def _best(probes: dict[float, tuple[float, Linear]]) -> float:
    return min(probes, key=lambda exponent: (-probes[exponent][0], exponent))


@torch.no_grad()
def fit_logistic(
    x: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    c: float,
    start: Linear | None = None,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
) -> Linear:
    """Minimise the objective of :func:`logistic` for rows ``x`` (N, T) of the classes ``target`` (N,), counted from 0.

    The search begins at ``start``, or else at zero. The rows of the weight sum to zero; of two classes, the difference
    is scikit-learn's ``coef_``.
    """
    num, width = x.shape
    # scikit-learn fits two classes with one weight w; the rows are then -w/2 and w/2, whose squares sum to half of w's.
    penalty = (2.0 if num_classes == 2 else 1.0) / (c * num)
    flat = x.new_zeros(num_classes * (width + 1)).requires_grad_()
    weight, bias = flat.detach()[: num_classes * width].view(num_classes, width), flat.detach()[-num_classes:]
    if start is not None:
        weight.copy_(start.weight), bias.copy_(start.bias)
    flat.grad = torch.empty_like(flat)
    weight_grad, bias_grad = flat.grad[: num_classes * width].view(num_classes, width), flat.grad[-num_classes:]
    rows = torch.arange(num, device=x.device)

    def objective() -> Tensor:  # divided by c N, with its gradient by hand: two products with x and nothing kept
        scores = torch.addmm(bias, x, weight.T).log_softmax(1)
        loss = -scores[rows, target].mean() + 0.5 * penalty * weight.square().sum()
        scores.exp_()
        scores[rows, target] -= 1
        scores /= num
        torch.addmm(weight, scores.T, x, beta=penalty, out=weight_grad)
        torch.sum(scores, 0, out=bias_grad)
        return loss

    solver = torch.optim.LBFGS(
        [flat],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=10,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    solver.step(objective)
    return Linear(weight, bias)


@torch.no_grad()
def sgd(
    bank: Features,
    query: Features,
    *,
    attribute: str,
    rates: Sequence[float],
    epochs: int = 10,
    batch_size: int = 1024,
    momentum: float = 0.9,
    held_out: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of the best of many linear classifiers that SGD trains at once, each at a rate of its own.

    Rates fall to zero along a cosine; there is no weight decay. The query is shown to the classifier that is the best
    on the held-out part of the bank.

    Args:
        bank: ``trunk`` (N, T), taken as it is, and labels; unlabelled rows are left out.
        query: the same; a label that the bank lacks counts as wrong.
        attribute: which labels.
        rates: learning rates, used as they are.
        epochs: passes through the rest of the bank.
        batch_size: rows a step.
        momentum: of SGD.
        held_out: share of the bank, drawn from ``seed``, on which the rate is chosen.
        seed: of the held-out part, the weights at the start and the order; the global generators are not touched.

    Returns:
        ``linear_sgd_<attribute>`` in [0, 1], with the share of the query's largest class as its chance, and
        ``linear_sgd_<attribute>_rate``, the rate that was chosen.

    Raises:
        ValueError: as :func:`logistic`; no rates.

    Source: Oquab et al., 2023, arXiv 2304.07193, appendix B.3 (the grid of rates).
    """
    if not rates or min(rates) <= 0:
        raise ValueError(f"set at least one rate, all above 0, not {[*rates]}")
    x, target, classes = _bank(bank, attribute)
    probed, labels = labelled_trunk(query, attribute)
    fit, held = split(len(x), held_out, seed)
    options: Any = {"rates": rates, "epochs": epochs, "batch_size": batch_size, "momentum": momentum}
    generator = torch.Generator().manual_seed(seed)
    heads = fit_sgd(x[fit], target[fit], len(classes), generator=generator, **options)
    hits = (heads.predict(x[held]) == target[held]).double().mean(1)  # (H,)
    best = int(hits.argmax())
    predicted = classes[Linear(heads.weight[best], heads.bias[best]).predict(probed)]
    name = f"linear_sgd_{attribute}"
    return accuracy(name, predicted, labels) | {f"{name}_rate": float(rates[best])}


@torch.no_grad()
def fit_sgd(
    x: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    generator: torch.Generator,
) -> Linear:
    """Train a classifier at each of the H rates, all on the same batches, as :func:`sgd` has it.

    Rows ``x`` (N, T) have the classes ``target`` (N,), counted from 0. The generator, on the CPU, draws the weights at
    the start, which are the same for all, and the order.
    """
    num, width = x.shape
    weight = (0.01 * torch.randn(num_classes, width, generator=generator)).to(x).repeat(len(rates), 1)  # (H C, T)
    bias = x.new_zeros(len(rates) * num_classes)
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rate = x.new_tensor(rates).repeat_interleave(num_classes)  # (H C,)
    num_steps, step = epochs * -(-num // batch_size), 0
    for _ in range(epochs):
        for rows in torch.randperm(num, generator=generator).to(x.device).split(batch_size):
            part = x[rows]
            scores = torch.addmm(bias, part, weight.T).unflatten(1, (len(rates), num_classes)).softmax(2)
            scores[torch.arange(len(rows), device=x.device), :, target[rows]] -= 1
            error = scores.flatten(1) / len(rows)  # (B, H C), the derivative of the mean cross-entropy
            speed[0].mul_(momentum).addmm_(error.T, part)
            speed[1].mul_(momentum).add_(error.sum(0))
            now = rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            weight.addcmul_(now[:, None], speed[0], value=-1)
            bias.addcmul_(now, speed[1], value=-1)
            step += 1
    return Linear(weight.view(len(rates), num_classes, width), bias.view(len(rates), num_classes))


def split(num: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows to fit and rows to hold out from the seed, at least one each: int64.

    Raises:
        ValueError: there are fewer than two rows, or the share is not between 0 and 1.
    """
    if num < 2 or not 0 < held_out < 1:
        raise ValueError(f"{num} rows and held_out={held_out}: give at least 2 rows, and a share between 0 and 1")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(held_out * num)), num - 1)
    return order[held:], order[:held]


def _bank(bank: Features, attribute: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, T) of the labelled rows, their classes (N,) from 0, and the labels (C,) of these."""
    features, labels = labelled_trunk(bank, attribute)
    classes, target = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all labels of {attribute!r} in the bank are equal: a classifier needs two classes")
    return features, target, classes
