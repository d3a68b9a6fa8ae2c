"""Zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from repr.metrics.features import Features, labelled
from repr.metrics.scores import CHANCE, majority, ranks


@torch.no_grad()
def zero_shot(
    query: Features,
    *,
    attribute: str,
    class_embeddings: Tensor,
    class_labels: Tensor,
    ks: Sequence[int] = (1, 5),
    chunk_size: int = 8192,
    name: str = "zero_shot",
) -> dict[str, float]:
    r"""Share of images whose class is among the k classes with the nearest text embedding.

    :math:`\frac{1}{N} \sum_i [r_i < k]`, where the rank :math:`r_i` counts wrong classes that are at least
    as near to image i as its own: ties count against the image, and collapsed features get 0.

    Args:
        query: ``image`` (N, D), normalised inside, and labels; unlabelled rows are left out.
        attribute: which labels.
        class_embeddings: (C, D), one a class (see :func:`average_templates`), normalised inside.
        class_labels: (C,) the distinct labels that they stand for.
        ks: the k; a k of at least C gives 1 by definition (unless features are NaN).
        chunk_size: images compared at a time; memory is chunk_size x C float64.
        name: what the numbers are called.

    Returns:
        ``<name>_topk`` in [0, 1]; chance is the share of the query's k largest classes, as of every classifier.

    Raises:
        ValueError: there are no such labels; shapes differ; a class is given twice; a label of the query has no class.

    Source: Radford et al., 2021, arXiv 2103.00020, section 3.1.
    """
    if class_labels.shape != class_embeddings.shape[:1]:
        raise ValueError(
            f"give one label a class: {tuple(class_labels.shape)} labels, {tuple(class_embeddings.shape)} embeddings"
        )
    if len(class_labels.unique()) < len(class_labels):
        raise ValueError("class_labels hold a label twice: average the embeddings of a class into one")
    rows, labels = labelled(query, attribute)
    class_labels, class_embeddings = class_labels.to(labels.device), class_embeddings.to(query.image.device)
    if unknown := labels[~torch.isin(labels, class_labels)].unique().tolist():
        raise ValueError(f"labels {unknown} of {attribute!r} have no class embedding: add them to class_labels")
    right = (labels[:, None] == class_labels).nonzero()  # (M, 2)
    rank = ranks(query.image[rows], class_embeddings, right, chunk_size=chunk_size)
    values = {}
    for k in ks:
        values[f"{name}_top{k}"] = (rank < k).double().mean().item()
        values[f"{name}_top{k}{CHANCE}"] = majority(labels, k)
    return values


def average_templates(embeddings: Tensor) -> Tensor:
    """Average the text embeddings (C, T, D) of each class's T prompts: normalise, take the mean, normalise it: (C, D).

    Source: Radford et al., 2021, arXiv 2103.00020, section 3.1.4.
    """
    return F.normalize(F.normalize(embeddings, dim=-1).mean(1), dim=-1)
