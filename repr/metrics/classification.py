"""What the heads of a classifier get right."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_f1_score

from repr.metrics.features import Features, finite, labelled
from repr.metrics.scores import CHANCE, accuracy


@torch.no_grad()
def heads(query: Features, *, attribute: str | None = None) -> dict[str, float]:
    """Accuracy, F1 and area under the ROC curve of every head, by torchmetrics.

    Args:
        query: ``logits`` by head, (N, C) each, and labels; unlabelled rows are left out.
        attribute: which labels the heads were trained on; None: the first.

    Returns:
        Of each head ``<head>_accuracy`` (chance: the share of the largest class), ``<head>_f1_macro`` and
        ``<head>_f1_weighted`` (over the classes that are labelled or predicted), and ``<head>_auc`` (chance .5): of two
        classes that of the second, of more the mean over the labelled classes of each against the rest. Without a
        second labelled class there is no ``auc``, and without logits nothing at all.

    Raises:
        ValueError: there are no such labels; logits are not finite; a label has no logit.
    """
    if not query.logits:
        return {}
    rows, labels = labelled(query, attribute or next(iter(query.labels), ""))
    values: dict[str, float] = {}
    for head, logits in query.logits.items():
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(
                f"the data has {int(labels.max()) + 1} classes or more, and the head '{head}' {logits.shape[1]}: set "
                "objective.num_classes to all that there are"
            )
        values |= _scores(head, finite(logits[rows]).float(), labels)
    return values


def _scores(head: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    num, predicted, share = logits.shape[1], logits.argmax(1), logits.softmax(1)
    right = multiclass_accuracy(predicted, labels, num_classes=num, average="micro")
    values = accuracy(f"{head}_accuracy", predicted, labels) | {f"{head}_accuracy": right.item()}
    for average in ("macro", "weighted"):
        f1 = multiclass_f1_score(predicted, labels, num_classes=num, average=average)
        values[f"{head}_f1_{average}"] = f1.item()
    present = labels.unique().tolist()
    if len(present) > 1:
        wanted = [1] if num == 2 else present
        areas = [binary_auroc(share[:, c], (labels == c).int()) for c in wanted]
        values |= {f"{head}_auc": torch.stack(areas).mean().item(), f"{head}_auc{CHANCE}": 0.5}
    return values
