"""Where the embeddings of one or two modalities lie on the sphere."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.batch import Features
from repr.losses.hypersphere import alignment, cross_uniformity, uniformity
from repr.metrics.tables import finite


@torch.no_grad()
def geometry(
    bank: Features,
    query: Features,
    *,
    chunk_size: int = 1024,
    num_splits: int = 5,
    max_pairs: int = 5000,
    seed: int = 0,
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
    ========================= =============================================================== ===============

    Lower uniformity is more spread. Rows are taken as they come: samples that share a caption are
    still different ``i`` and ``j``. A table without text gives the image values only.

    Args:
        bank: not used.
        query: ``image`` (N, D) and, where there is one, ``text`` (N, D); N >= 2, normalised inside.
        chunk_size: rows of the pairwise terms held at a time.
        num_splits: splits of the separability.
        max_pairs: image-text pairs that the separability takes, drawn from ``seed`` where there are more.
        seed: of the splits; the global generators are not touched.

    Returns:
        The values above; only the separability has a chance level, 0.5.

    Raises:
        ValueError: the table has fewer than two rows; features are not finite.

    Source: Wang & Isola, 2020, arXiv 2005.10242 (uniformity, alignment); Fahim, Murphy & Fyshe, 2024,
    arXiv 2405.18570 (across modalities, centroids, separability); Roy & Vetterli, 2007 (effective rank).
    """
    if len(query.image) < 2:
        raise ValueError(f"geometry compares rows and needs at least 2, not {len(query.image)}: evaluate more samples")
    values = {
        "uniformity_image": uniformity(finite(query.image), chunk_size=chunk_size).item(),
        "effective_rank_image": effective_rank(query.image),
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
    values["modality_separability.chance"] = 0.5
    values["effective_rank_text"] = effective_rank(query.text)
    return values


def effective_rank(features: Tensor) -> float:
    r"""Give the number of directions that the features fill.

    :math:`\exp(-\sum_k p_k \ln p_k)` with :math:`p_k = \sigma_k / \sum_j \sigma_j` over the singular
    values :math:`\sigma` of the features less their mean.

    Args:
        features: (N, D), as they are: not normalised, in float64 inside.

    Returns:
        0 when all rows are equal, else in [1, min(N - 1, D)]; 1 = all on a line, D = the same spread in
        all directions. It is not changed by a shift, a rotation or a common factor.

    Source: Roy & Vetterli, 2007, EUSIPCO, "The effective rank", definition 1 (there without centring).
    """
    x = features.double()
    noise = x.norm() * max(x.shape) * torch.finfo(x.dtype).eps
    singular = torch.linalg.svdvals(x - x.mean(0))
    singular = singular[singular > noise]
    if len(singular) == 0:
        return 0.0
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp().item()


def separability(
    image: Tensor, text: Tensor, *, num_splits: int, max_pairs: int, generator: np.random.Generator
) -> float:
    """Give the accuracy with which a linear classifier tells images from texts it was not fitted to.

    Logistic regression (L2 penalty, C = 1, with intercept) is fitted to 80 % of the pairs and asked about
    both halves of the other 20 %; the mean over splits is given. A pair is never torn apart: both sides
    then hold as many images as texts, and equal modalities give 0.5 exactly, where a split by rows
    would show the classifier the twin of a test row under the other name. (Fahim et al. split by pairs
    too, once, with the global generator; published versions of their code fit to 20 %, not 80 %.)

    Args:
        image: (N, D) of unit length.
        text: (N, D) of unit length.
        num_splits: number of random splits.
        max_pairs: pairs used at most.
        generator: draws the pairs and the splits.

    Returns:
        Accuracy in [0, 1]; 0.5 at chance, 1 = the modalities are linearly separable.
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
