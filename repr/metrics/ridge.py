"""Linear probe in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr.metrics.features import Features, labelled_trunk, standardisation
from repr.metrics.scores import accuracy

PENALTIES = tuple(10.0**power for power in range(-6, 3))
CHUNK = 8192  # rows classified at a time


@torch.no_grad()
def ridge(
    bank: Features, query: Features, *, attribute: str, penalties: Sequence[float] = PENALTIES
) -> dict[str, float]:
    r"""Accuracy of a linear classifier that ridge regression fits to the bank's one-hot labels.

    .. math::
        \min_{W, b} \frac{1}{N} \lVert Y - X W - 1 b^\top \rVert^2 + \lambda \lVert W \rVert^2,
        \qquad \hat y_q = \arg\max_c\, (x_q W + b)_c

    X is standardised with the bank's mean and deviation, the intercept is not penalised. One eigendecomposition serves
    all penalties. The one with the best exact leave-one-out accuracy on the bank is taken, of equally good ones the
    largest; only then the query is looked at.

    Args:
        bank: ``trunk`` (N, T) and labels; unlabelled rows are left out. T > N is fine.
        query: the same; a label that the bank lacks counts as wrong.
        attribute: which labels.
        penalties: candidates for :math:`\lambda`, positive. The unit is the variance of one standardised
            feature, so that a grid fits banks of any length (scikit-learn's ``alpha`` is :math:`\lambda N`).

    Returns:
        ``ridge_<attribute>`` in [0, 1]; chance is the share of the query's largest class.

    Raises:
        ValueError: there are no such labels; features are not finite; a penalty is not positive.

    Source: Hoerl & Kennard, 1970 (ridge); Allen, 1974 (leave-one-out in closed form).
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"set at least one penalty, all above 0, not {tuple(penalties)}")
    learned, bank_labels = labelled_trunk(bank, attribute)
    probed, labels = labelled_trunk(query, attribute)
    classes, target = bank_labels.unique(return_inverse=True)
    probe = fit(learned, target)
    best = max(penalties, key=lambda penalty: (probe.leave_one_out(penalty), penalty))
    predicted = probe.predict(probed, best)
    return accuracy(f"ridge_{attribute}", classes[predicted], labels)


@dataclass(frozen=True)
class Probe:
    """Ridge regressions of one-hot labels for all penalties; r directions, float64.

    ``rotation`` (T, r) standardises and rotates to the principal directions, in which the covariance is
    ``diag(spectrum)``; ``moment`` (r, C) is the covariance of these coordinates with the labels.
    """

    mean: Tensor  # (T,)
    rotation: Tensor  # (T, r)
    spectrum: Tensor  # (r,), positive
    moment: Tensor  # (r, C)
    prior: Tensor  # (C,), shares of the classes
    coordinates: Tensor  # (N, r), the bank's
    target: Tensor  # (N,), the bank's classes

    def predict(self, features: Tensor, penalty: float, *, chunk_size: int = CHUNK) -> Tensor:
        """Classify rows (M, T) into (M,) classes."""
        weight = self.rotation @ (self.moment / (self.spectrum + penalty)[:, None])  # (T, C)
        chunks = features.split(chunk_size)
        return torch.cat([((chunk.double() - self.mean) @ weight + self.prior).argmax(1) for chunk in chunks])

    def leave_one_out(self, penalty: float, *, chunk_size: int = CHUNK) -> float:
        r"""Give the accuracy on the bank when every row is classified by the fit to all others.

        Without row i the fit at row i is :math:`(\hat y_i - h_i y_i) / (1 - h_i)`, with the leverage
        :math:`h_i = \frac{1}{N} (1 + \sum_j z_{ij}^2 / (s_j + \lambda))` of its coordinates z and the
        spectrum s. The denominator is positive and does not move the argmax. (The row's share in the
        deviations and the factor N of the penalty stay as they are.)
        """
        shrunk = (self.spectrum + penalty).reciprocal()
        weight = shrunk[:, None] * self.moment
        hits = 0
        for z, y in zip(self.coordinates.split(chunk_size), self.target.split(chunk_size), strict=True):
            leverage = (1 + z.square() @ shrunk) / len(self.target)
            scores = z @ weight + self.prior  # (chunk, C)
            scores.scatter_add_(1, y[:, None], -leverage[:, None])
            hits += int((scores.argmax(1) == y).sum())
        return hits / len(self.target)


def fit(features: Tensor, target: Tensor) -> Probe:
    """Decompose the bank (N, T) of classes (N,) 0 to C - 1, each present, once for all penalties.

    Constant features (:func:`repr.metrics.features.standardisation`) have no weight. Where the trunk is wider than the
    bank is long, the Gram matrix is decomposed instead of the covariance.
    """
    x, num = features.double(), len(features)
    mean, scale = standardisation(x)
    x = (x - mean) * scale
    wide = x.shape[1] > num
    spectrum, basis = torch.linalg.eigh((x @ x.T if wide else x.T @ x) / num)  # (R,), (R, R) with R = min(N, T)
    kept = spectrum > spectrum[-1] * max(x.shape) * torch.finfo(x.dtype).eps
    spectrum, basis = spectrum[kept], basis[:, kept]
    if wide:
        basis = x.T @ basis / (num * spectrum).sqrt()  # (T, r): right singular vectors from the left ones
    coordinates = x @ basis  # (N, r)
    count = target.bincount().double()
    moment = coordinates.new_zeros(len(count), len(spectrum)).index_add_(0, target, coordinates).T / num
    return Probe(mean, scale[:, None] * basis, spectrum, moment, count / num, coordinates, target)
