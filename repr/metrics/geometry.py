"""Where the embeddings of one or two modalities lie on the sphere."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from repr.metrics.features import Features, finite
from repr.metrics.scores import CHANCE

EPSILON = 1e-7  # that RankMe's and LiDAR's authors add to a share, against the logarithm of 0


@torch.no_grad()
def geometry(
    query: Features, *, chunk_size: int = 1024, k: int = 10, num_splits: int = 5, max_pairs: int = 5000, seed: int = 0
) -> dict[str, float]:
    r"""Describe the spread of the embeddings and the gap between the modalities.

    With :math:`x_i, y_i` the image and text embeddings at unit length:

    ========================= =============================================================== ===============
    ``uniformity_image``      :math:`u(x) = \log \mathrm{mean}_{i<j} e^{-2 |x_i - x_j|^2}`    nats, [-8, 0]
    ``uniformity_text``       :math:`u(y)`                                                    nats, [-8, 0]
    ``uniformity``            their mean                                                      nats, [-8, 0]
    ``cross_uniformity``      :math:`\log \mathrm{mean}_{i \ne j} e^{-2 |x_i - y_j|^2}`       nats, [-8, 0]
    ``alignment``             :math:`\mathrm{mean}_i |x_i - y_i|^2`                           [0, 4]
    ``pair_cosine``           :math:`\mathrm{mean}_i\, x_i \cdot y_i` = 1 - alignment / 2     [-1, 1]
    ``centroid_distance``     :math:`|\mathrm{mean}\, x - \mathrm{mean}\, y|`                 [0, 2]
    ``modality_separability`` see :func:`separability`                                        accuracy, [0, 1]
    ``effective_rank_image``  see :func:`effective_rank`                                      [0, min(N-1, D)]
    ``effective_rank_text``   see :func:`effective_rank`                                      [0, min(N-1, D)]
    ``rankme_image``          see :func:`rankme`                                              [0, min(N, D)]
    ``rankme_text``           see :func:`rankme`                                              [0, min(N, D)]
    ``hubness_<a>``           see :func:`hubness`, of the k-occurrence                        skewness
    ``robin_hood_<a>``        see :func:`hubness`, of the k-occurrence                        [0, 1)
    ========================= =============================================================== ===============

    Only the separability has a level at chance, 0.5. Lower uniformity is more spread. Samples that share a caption are
    still different ``i`` and ``j``. A table without text gives the image values only. ``<a>`` is ``image`` or ``text``,
    where each row looks among the others of its kind; ``t2i``, how often an image is among the nearest of a text; or
    ``i2t``.

    Args:
        query: ``image`` (N, D) and, where there is one, ``text`` (N, D); N >= 2, normalised inside.
        chunk_size: rows of the pairwise terms held at a time.
        k: neighbours that hubness counts, at most N - 1.
        num_splits: of the separability.
        max_pairs: so many image-text pairs the separability takes at most, drawn from ``seed``.
        seed: of the splits, too; the global generators are not touched.

    Raises:
        ValueError: the table has fewer than two rows; features are not finite.

    Source: Wang & Isola, 2020, arXiv 2005.10242 (uniformity, alignment); Fahim, Murphy & Fyshe, 2024,
    arXiv 2405.18570 (across modalities, centroids, separability); the others where they are defined.
    """
    if len(query.image) < 2:
        raise ValueError(f"geometry compares rows and needs at least 2, not {len(query.image)}: evaluate more samples")
    values = {
        "uniformity_image": uniformity(finite(query.image), chunk_size=chunk_size).item(),
        "effective_rank_image": effective_rank(query.image),
        "rankme_image": rankme(query.image),
        **hubness(query.image, None, "image", k=k, chunk_size=chunk_size),
    }
    if query.text is None:
        return values
    image, text = F.normalize(query.image, dim=1), F.normalize(finite(query.text), dim=1)
    values["uniformity_text"] = uniformity(text, chunk_size=chunk_size).item()
    values["uniformity"] = (values["uniformity_image"] + values["uniformity_text"]) / 2
    values["cross_uniformity"] = cross_uniformity(image, text, chunk_size=chunk_size).item()
    values["alignment"] = alignment(image, text).item()
    values["pair_cosine"] = (image * text).sum(1).mean().item()
    values["centroid_distance"] = (image.mean(0) - text.mean(0)).norm().item()
    values["modality_separability"] = separability(
        image, text, num_splits=num_splits, max_pairs=max_pairs, generator=np.random.default_rng(seed)
    )
    values[f"modality_separability{CHANCE}"] = 0.5
    values["effective_rank_text"] = effective_rank(query.text)
    values["rankme_text"] = rankme(query.text)
    values |= hubness(text, None, "text", k=k, chunk_size=chunk_size)
    values |= hubness(text, image, "t2i", k=k, chunk_size=chunk_size)
    values |= hubness(image, text, "i2t", k=k, chunk_size=chunk_size)
    return values


@torch.no_grad()
def spectrum(features: Tensor) -> Tensor:
    r"""Give the eigenvalues of the features' covariance, :math:`\frac{1}{N} \sum_i (x_i - \bar x)(x_i - \bar x)^T`.

    They are (D,) float64, the largest first, and their sum is the variance. Those that only rounding leaves are 0.
    """
    singular = _singular(features)
    return F.pad(singular.square() / len(features), (0, features.shape[1] - len(singular)))


def _singular(features: Tensor) -> Tensor:
    """Singular values (min(N, D),) of the features less their mean, in float64; 0 where there is only rounding."""
    x = features.double()
    noise = x.norm() * max(x.shape) * torch.finfo(x.dtype).eps
    singular = torch.linalg.svdvals(x - x.mean(0))
    return singular.where(singular > noise, 0)


def effective_rank(features: Tensor) -> float:
    r"""Give the number of directions that the features fill.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \sigma_k / \sum_j \sigma_j` over the singular values
    :math:`\sigma` of the features (N, D) less their mean, in float64; they are not normalised.

    Returns:
        0 when all rows are equal, else in [1, min(N - 1, D)]; 1 = all on a line, D = the same spread in
        all directions. It is not changed by a shift, a rotation or a common factor.

    Source: Roy & Vetterli, 2007, EUSIPCO, "The effective rank", definition 1 (there without centring).
    """
    return _entropy_rank(_singular(features), 0)


@torch.no_grad()
def rankme(features: Tensor) -> float:
    r"""Give the number of directions that the features fill, their mean included.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \sigma_k / \sum_j \sigma_j + \epsilon` over the singular
    values :math:`\sigma` of the features (N, D) as they are, in float64. Against :func:`effective_rank` a common mean
    counts as a direction, mostly the strongest.

    Returns:
        0 when all features are 0, else in [1, min(N, D)], up to :math:`\epsilon`.

    Source: Garrido, Balestriero, Najman & LeCun, 2023, arXiv 2210.02885, equation 1.
    """
    return _entropy_rank(torch.linalg.svdvals(features.double()), EPSILON)


@torch.no_grad()
def lidar(views: Tensor, *, delta: float = 1e-4) -> float:
    r"""Give the number of directions in which samples differ by more than their views do.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \lambda_k / \sum_j \lambda_j + \epsilon` over the
    eigenvalues of :math:`\Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}`, where, with :math:`\mu_i` the mean of the views
    of a sample, :math:`\Sigma_b = \frac{1}{N} \sum_i (\mu_i - \mu)(\mu_i - \mu)^T` and
    :math:`\Sigma_w = \frac{1}{NQ} \sum_{iq} (x_{iq} - \mu_i)(x_{iq} - \mu_i)^T + \delta I`.

    Args:
        views: (N, Q, D), embeddings of Q augmented views of each of N samples, not normalised, in float64 inside.
            The paper takes 1,000 samples and 50 views; with fewer samples than dimensions the rank is at most N - 1.
        delta: the paper's, in the units of the features' variance.

    Returns:
        0 when all samples have the same mean, else in [1, min(N - 1, D)], up to :math:`\epsilon`.

    Raises:
        ValueError: fewer than two samples or views; features are not finite.

    Source: Thilak et al., 2024, arXiv 2312.04000, section 4.
    """
    if views.ndim != 3 or views.shape[0] < 2 or views.shape[1] < 2:
        raise ValueError(f"lidar needs (N, Q, D) with 2 samples and 2 views or more, not {tuple(views.shape)}")
    num, num_views, dim = views.shape
    means = finite(views).mean(1, dtype=torch.float64)  # (N, D)
    within = delta * torch.eye(dim, dtype=means.dtype, device=means.device)
    for part, mean in zip(views.split(64), means.split(64), strict=True):  # float64 copies of a few samples at a time
        spread = (part.double() - mean[:, None]).flatten(0, 1)
        within += spread.T @ spread / (num * num_views)
    values, vectors = torch.linalg.eigh(within)
    # The singular values of the whitened means are the square roots of the eigenvalues, without squaring rounding.
    singular = torch.linalg.svdvals((means - means.mean(0)) @ (vectors * values.rsqrt()) / num**0.5)
    return _entropy_rank(singular.square(), EPSILON)


def _entropy_rank(values: Tensor, epsilon: float) -> float:
    """Exponential of the entropy of non-negative values as shares."""
    return torch.special.entr(values / values.sum() + epsilon).sum().exp().item() if values.any() else 0.0


@torch.no_grad()
def hubness(queries: Tensor, bank: Tensor | None, name: str, *, k: int, chunk_size: int) -> dict[str, float]:
    r"""Tell how unevenly the rows of a bank are among the k nearest of the queries.

    :math:`N_j` is the number of queries that have row j of the bank among their k nearest by cosine, and m the mean.
    The skewness is :math:`\mathrm{mean}_j (N_j - m)^3 / \mathrm{std}(N)^3`; the Robin Hood index,
    :math:`\frac{1}{2} \sum_j |N_j - m| / \sum_j N_j`, is the share that would have to be given away for all rows to
    have the same.

    Queries (Q, D) and bank (M, D) are normalised inside; without a bank the queries look among the other queries.
    Memory is ``chunk_size`` x M.

    Returns:
        ``hubness_<name>``, the skewness (0 where all have the same; the more hubs, the larger), and
        ``robin_hood_<name>`` in [0, 1).

    Source: Radovanovic, Nanopoulos & Ivanovic, 2010, JMLR 11 (k-occurrence, skewness); Feldbauer et al., 2018, "Fast
    approximate hubness reduction for large high-dimensional data" (Robin Hood index).
    """
    own = bank is None
    bank = F.normalize((queries if bank is None else bank).double(), dim=1)
    counts = torch.zeros(len(bank), dtype=torch.long, device=bank.device)
    for start in range(0, len(queries), chunk_size):
        cosine = F.normalize(queries[start : start + chunk_size].double(), dim=1) @ bank.T  # (chunk, M)
        if own:
            cosine[:, start:].fill_diagonal_(-torch.inf)
        nearest = cosine.topk(min(k, len(bank) - own), dim=1).indices
        counts += nearest.flatten().bincount(minlength=len(bank))
    off = counts.double() - counts.double().mean()
    deviation = off.square().mean().sqrt()
    skewness = (off**3).mean() / deviation**3 if deviation > 0 else deviation
    return {f"hubness_{name}": skewness.item(), f"robin_hood_{name}": (off.abs().sum() / 2 / counts.sum()).item()}


def separability(
    image: Tensor, text: Tensor, *, num_splits: int, max_pairs: int, generator: np.random.Generator
) -> float:
    """Give the accuracy with which a linear classifier tells images from texts that it was not fitted to.

    1 means that the modalities are linearly separable; 0.5 is chance. Logistic regression (L2 penalty, C = 1, with
    intercept) is fitted to 80 % of the pairs, of unit length, and asked about both halves of the other 20 %; the mean
    over random splits is given. A pair is never torn apart: both sides then hold as many images as texts, and equal
    modalities give 0.5 exactly, where a split by rows would show the classifier the twin of a test row under the other
    name. (Fahim et al. split by pairs too, once; published versions of their code fit to 20 %, not 80 %.)
    """
    from sklearn.linear_model import LogisticRegression  # a tenth of a second that the first step need not wait for

    pairs = torch.stack([image, text], 1).double().cpu().numpy()  # (N, 2, D)
    pairs = pairs[generator.permutation(len(pairs))[:max_pairs]]
    num_test = max(1, round(0.2 * len(pairs)))
    scores = []
    for _ in range(num_splits):
        order = generator.permutation(len(pairs))
        (test, train) = (pairs[rows].reshape(-1, pairs.shape[2]) for rows in (order[:num_test], order[num_test:]))
        model = LogisticRegression(max_iter=1000).fit(train, np.arange(len(train)) % 2)
        scores.append(model.score(test, np.arange(len(test)) % 2))
    return float(np.mean(scores))
