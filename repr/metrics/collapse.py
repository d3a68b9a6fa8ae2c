"""Signs that an encoder maps everything to one point, or to few prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    r"""Give the spread of features on the sphere.

    :math:`\sqrt{\frac{1}{N} \sum_i |x_i - \bar x|^2}` with :math:`x_i` at unit length, which is
    :math:`\sqrt{1 - |\bar x|^2}`, in float64. The features (N, D) are normalised inside.

    Returns:
        0 = all the same, 1 = spread around the origin. (SimSiam's paper draws :math:`1/\sqrt D` of it.)

    Source: Chen & He, 2021 (SimSiam), arXiv 2011.10566, section 4.1.
    """
    x = F.normalize(features.double(), dim=1)
    return (x - x.mean(0)).square().sum(1).mean().sqrt().item()


@torch.no_grad()
def assignment_entropy(assignments: Tensor) -> float:
    r"""Give the mean entropy of the samples' assignments, :math:`-\frac{1}{N} \sum_n \sum_k Q_{nk} \ln Q_{nk}`.

    Returns:
        Nats in [0, ln K], of assignments (N, K) whose rows sum to 1; ln K = every sample belongs to all prototypes
        alike, as at collapse.
    """
    return torch.special.entr(assignments.double()).sum(1).mean().item()


@torch.no_grad()
def prototype_entropy(scores: Tensor) -> float:
    r"""Give the entropy of the usage of prototypes, :math:`-\sum_k p_k \ln p_k`.

    :math:`p_k` is the share of samples whose nearest prototype is k. The scores themselves tell it: assignments are
    balanced by construction, even where all samples are the same.

    Returns:
        Nats in [0, ln min(N, K)] for cosines (N, K); 0 = one prototype is the nearest to all.
    """
    share = scores.argmax(1).bincount(minlength=scores.shape[1]).double() / len(scores)
    return torch.special.entr(share).sum().item()
