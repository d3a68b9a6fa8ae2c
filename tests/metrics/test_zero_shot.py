import numpy as np
import pytest
import torch

from repr.metrics.zero_shot import average_templates, zero_shot

LABELS = torch.tensor([4, 0, 11, 7, 2, 30])


def test_equals_a_plain_loop(table, rng):
    x = torch.randn(50, 8, generator=rng)
    classes = torch.randn(6, 8, generator=rng)
    labels = LABELS[torch.randint(6, (50,), generator=rng)]
    hits = {1: 0, 3: 0}
    for features, label in zip(x.double().numpy(), labels, strict=True):
        cosine = classes.double().numpy() @ features / np.linalg.norm(classes.double().numpy(), axis=1)
        order = LABELS.numpy()[np.argsort(-cosine)].tolist()
        for k in hits:
            hits[k] += label.item() in order[:k]
    share = labels.unique(return_counts=True)[1].sort(descending=True)[0] / 50  # as of every other classifier
    for chunk_size in (9, 100):
        values = zero_shot(
            table(x * 3, kind=labels),
            attribute="kind",
            class_embeddings=classes,
            class_labels=LABELS,
            ks=(1, 3),
            chunk_size=chunk_size,
        )
        assert values == pytest.approx(
            {
                "zero_shot_top1": hits[1] / 50,
                "zero_shot_top1.chance": share[0].item(),
                "zero_shot_top3": hits[3] / 50,
                "zero_shot_top3.chance": share[:3].sum().item(),
            }
        )


def test_unlabelled_rows_are_left_out_and_k_beyond_the_classes_gives_one(table):
    query = table(torch.eye(3), kind=[1, 0, -1])
    values = zero_shot(query, attribute="kind", class_embeddings=torch.eye(3)[:2], class_labels=torch.tensor([1, 0]))
    assert values == {
        "zero_shot_top1": 1,
        "zero_shot_top1.chance": 0.5,
        "zero_shot_top5": 1,
        "zero_shot_top5.chance": 1,
    }


@pytest.mark.parametrize("value", [0.3, 0.0, torch.nan])
def test_a_collapsed_or_diverged_model_gets_nothing(table, value):
    query = table(torch.full((12, 17), value), kind=LABELS.repeat(2))
    values = zero_shot(query, attribute="kind", class_embeddings=torch.full((6, 17), 0.2), class_labels=LABELS)
    assert (values["zero_shot_top1"], values["zero_shot_top5"]) == (0, 0)


def test_random_embeddings_reach_chance(table, rng):
    query = table(torch.randn(6000, 16, generator=rng), kind=LABELS.repeat(1000))
    classes = torch.randn(6, 16, generator=rng)
    values = zero_shot(query, attribute="kind", class_embeddings=classes, class_labels=LABELS)
    assert values["zero_shot_top1"] == pytest.approx(1 / 6, abs=0.02)
    assert values["zero_shot_top5"] == pytest.approx(5 / 6, abs=0.02)


def test_errors_name_the_labels(table):
    query = table(torch.eye(3), kind=[1, 9, 5])
    with pytest.raises(ValueError, match=r"\[5, 9\] of 'kind'"):
        zero_shot(query, attribute="kind", class_embeddings=torch.eye(3), class_labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="twice"):
        zero_shot(query, attribute="kind", class_embeddings=torch.eye(3), class_labels=torch.tensor([1, 1, 2]))
    with pytest.raises(ValueError, match=r"\(2,\) labels, \(3, 3\) embeddings"):
        zero_shot(query, attribute="kind", class_embeddings=torch.eye(3), class_labels=torch.tensor([1, 2]))


def test_templates_are_normalised_before_and_after_the_mean(rng):
    embeddings = torch.randn(4, 5, 6, generator=rng, dtype=torch.float64)
    averaged = average_templates(embeddings)
    for c in range(4):
        mean = sum(prompt / prompt.norm() for prompt in embeddings[c]) / 5
        torch.testing.assert_close(averaged[c], mean / mean.norm())
    torch.testing.assert_close(average_templates(embeddings * torch.rand(4, 5, 1, generator=rng).add(0.1)), averaged)
