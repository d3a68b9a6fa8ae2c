"""Accuracy, F1 and AUC of heads, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from repr.metrics.classification import heads
from repr.metrics.features import Features


def table(num: int, num_classes: int, seed: int = 0, absent: int | None = None) -> Features:
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(num_classes, (num,), generator=rng)
    label[label == absent] = 0
    logits = torch.randn(num, num_classes, generator=rng) + 1.5 * torch.nn.functional.one_hot(label, num_classes)
    label[:5] = -1
    empty = torch.zeros(num, 2)
    labels = {"style": torch.zeros(num, dtype=torch.int64), "class": label}
    return Features(torch.arange(num), empty, empty, labels=labels, logits={"fusion": logits, "text_head": -logits})


@pytest.mark.parametrize(("num_classes", "absent"), [(2, None), (4, None), (5, 3)])
def test_they_are_those_of_scikit_learn(num_classes: int, absent: int | None) -> None:
    query = table(300, num_classes, absent=absent)
    values = heads(query, attribute="class")
    label, logits = query.labels["class"][5:].numpy(), query.logits["fusion"][5:]
    predicted, share = logits.argmax(1).numpy(), logits.softmax(1).numpy()
    assert values["fusion_accuracy"] == pytest.approx(metrics.accuracy_score(label, predicted))
    assert values["fusion_accuracy.chance"] == pytest.approx(np.bincount(label).max() / 295)
    for average in ("macro", "weighted"):
        assert values[f"fusion_f1_{average}"] == pytest.approx(metrics.f1_score(label, predicted, average=average))
    if num_classes == 2:
        auc = metrics.roc_auc_score(label, share[:, 1])
    else:
        auc = np.mean([metrics.roc_auc_score(label == c, share[:, c]) for c in np.unique(label)])
    assert values["fusion_auc"] == pytest.approx(auc, abs=1e-6)
    assert values["fusion_auc.chance"] == 0.5
    assert values["text_head_accuracy"] < 0.3


def test_what_cannot_be_told_is_left_out_or_refused() -> None:
    query = table(50, 3)
    assert heads(Features(query.index, query.image, query.trunk, labels=query.labels)) == {}
    assert "fusion_auc" not in heads(query)  # of the first attribute, style, which has one class
    with pytest.raises(ValueError, match="no labels named 'species'"):
        heads(query, attribute="species")
    query.logits["fusion"] = query.logits["fusion"][:, :2]
    with pytest.raises(ValueError, match=r"the data has 3 classes or more, and the head 'fusion' 2"):
        heads(query, attribute="class")
    query.logits["fusion"] = torch.full((50, 3), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        heads(query, attribute="class")
