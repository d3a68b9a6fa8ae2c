from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch

from repr.metrics.features import Features, one_caption
from repr.metrics.retrieval import chance, retrieval

CAPTION = [5, 2, 5, 9, 2, 5, 0, 7, 7, 3, 5, 1, 0, 4, 6]  # 15 images, 9 captions, neither sorted nor dense


def brute(image, text, caption, k):
    """Recalls by plain loops over every query and every candidate, ties against the query."""
    x = image / np.linalg.norm(image, axis=1, keepdims=True)
    y = text / np.linalg.norm(text, axis=1, keepdims=True)
    cosine = np.round(x @ y.T, 10)  # (image, row of the text)
    row = {c: caption.index(c) for c in caption}
    i2t = [sum(cosine[i, row[d]] >= cosine[i, row[c]] for d in row if d != c) < k for i, c in enumerate(caption)]
    t2i = []
    for c in row:
        best = max(cosine[i, row[c]] for i in range(len(caption)) if caption[i] == c)
        t2i.append(sum(cosine[i, row[c]] >= best for i in range(len(caption)) if caption[i] != c) < k)
    return np.mean(i2t), np.mean(t2i)


def shared(values, caption):
    """Text features as an encoder gives them: the same for the same caption."""
    return values[[caption.index(c) for c in caption]]


@pytest.mark.parametrize("memory", [1e-9, 2e-6, 1.0])  # for 1, 4 and all queries at a time
@pytest.mark.parametrize("kind", ["random", "ties", "paired"])
def test_equals_brute_force(table, rng, kind, memory):
    image, text = torch.randn(2, 15, 6, generator=rng)
    if kind == "ties":
        image, text = torch.randint(1, 3, (2, 15, 2), generator=rng).float()  # four points only, in three directions
    if kind == "paired":
        text = image + 0.7 * text
    text = shared(text, CAPTION)
    values = retrieval(table(image, text, CAPTION), ks=(1, 2, 5), memory=memory)
    for k in (1, 2, 5):
        i2t, t2i = brute(image.double().numpy(), text.double().numpy(), CAPTION, k)
        assert (values[f"i2t_R@{k}"], values[f"t2i_R@{k}"]) == pytest.approx((i2t, t2i))


def test_without_captions_every_row_is_its_own(table, rng):
    image, text = torch.randn(2, 20, 4, generator=rng)
    query = table(image, text)
    assert retrieval(query) == retrieval(table(image, text, list(range(20))))


def test_only_directions_matter(table, rng):
    image, text = torch.randn(2, 20, 4, generator=rng)
    scaled = table(image * torch.rand(20, 1, generator=rng), text * 7)
    assert retrieval(scaled) == retrieval(table(image, text))


def test_perfect_pairs_are_all_found(table):
    query = table(torch.eye(12), torch.eye(12))
    values = retrieval(query)
    assert all(value == 1 for name, value in values.items() if not name.endswith("chance"))
    assert [values["i2t_R@1.chance"], values["t2i_R@5.chance"]] == pytest.approx([1 / 12, 5 / 12])


@pytest.mark.parametrize("value", [0.3, 0.0, torch.nan])
@pytest.mark.parametrize("size", [7, 130])
def test_a_collapsed_or_diverged_model_finds_nothing(table, value, size):
    query = table(torch.full((size, 33), value), torch.full((size, 33), value))
    values = retrieval(query, ks=(1, 5))
    assert all(value == 0 for name, value in values.items() if not name.endswith("chance"))


def test_k_beyond_the_candidates_finds_everything(table, rng):
    image, text = torch.randn(2, 4, 3, generator=rng)
    query = table(image, shared(text, [0, 0, 1, 1]), [0, 0, 1, 1])
    values = retrieval(query, ks=(2, 3, 10))
    assert all(value == 1 for name, value in values.items() if name.startswith("i2t"))  # two captions
    assert values["t2i_R@3"] == values["t2i_R@3.chance"] == values["t2i_R@10.chance"] == 1  # two images are wrong


@pytest.mark.parametrize("k", [1, 2, 7, 12, 13, 40])
def test_chance_is_the_hypergeometric_one(k):
    num_right, total = [1, 2, 2, 5, 9], 13
    expected = np.mean([1 - comb(total - m, min(k, total)) / comb(total, min(k, total)) for m in num_right])
    assert chance(torch.tensor(num_right), total, k) == pytest.approx(expected, rel=1e-12)


def test_chance_keeps_its_digits_on_large_tables():
    assert chance(torch.ones(3, dtype=torch.int64), 10_000_000, 5) == pytest.approx(5e-7, rel=1e-12)


def test_random_embeddings_reach_chance(table, rng):
    runs = []
    for _ in range(600):
        image, text = torch.randn(2, 15, 6, generator=rng)
        query = table(image, shared(text, CAPTION), CAPTION)
        runs.append(retrieval(query, ks=(1, 4)))
    for name in ("i2t_R@1", "i2t_R@4", "t2i_R@1", "t2i_R@4"):
        assert np.mean([run[name] for run in runs]) == pytest.approx(runs[0][f"{name}.chance"], abs=0.02)
    assert runs[0]["i2t_R@4.chance"] == pytest.approx(4 / 9)


def test_needs_text(table):
    query = table(torch.eye(3))
    with pytest.raises(ValueError, match="text"):
        retrieval(query)


@pytest.fixture
def several(rng):
    """30 images with one to five captions each, in no order, and what is right of them."""
    row = torch.cat([torch.arange(30), torch.randint(30, (40,), generator=rng)])[torch.randperm(70, generator=rng)]
    image = torch.randn(30, 8, generator=rng)
    text = image[row] + 1.5 * torch.randn(70, 8, generator=rng)
    return Features(
        index=torch.arange(30), image=image, trunk=image, text=text, pairs=torch.stack([row, torch.arange(70)], 1)
    )


def test_several_captions_equal_clip_benchmark(several):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason="make test installs it")
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in (several.image, several.text))
    scores, right = texts @ images.T, several.pairs[:, :1] == torch.arange(30)
    values = retrieval(several, ks=(1, 5))
    for k in (1, 5):
        t2i = (theirs.batchify(theirs.recall_at_k, scores, right, 16, "cpu", k=k) > 0).double().mean().item()
        i2t = (theirs.batchify(theirs.recall_at_k, scores.T, right.T, 16, "cpu", k=k) > 0).double().mean().item()
        assert (values[f"i2t_R@{k}"], values[f"t2i_R@{k}"]) == (i2t, t2i)
        assert 0.2 < i2t < 1
    assert values["t2i_R@5.chance"] == pytest.approx(5 / 30)


def test_captions_shared_by_images_with_several_of_them(rng):
    """Against plain loops: 12 images, 9 captions, each image has some of them."""
    image, text = torch.randn(12, 5, generator=rng), torch.randn(9, 5, generator=rng)
    right = torch.rand(12, 9, generator=rng) < 0.3
    right[torch.arange(12), torch.arange(12) % 9] = True
    query = Features(torch.arange(12), image, image, text=text, pairs=right.nonzero())
    values = retrieval(query, ks=(1, 3), memory=2e-6)
    cosine = torch.cosine_similarity(image[:, None], text[None], dim=2).numpy()
    for direction, scores, own in (("i2t", cosine, right.numpy()), ("t2i", cosine.T, right.numpy().T)):
        for k in (1, 3):
            hits = [(scores[q][~own[q]] >= scores[q][own[q]].max()).sum() < k for q in range(len(scores))]
            misses = [comb(len(row) - row.sum(), k) / comb(len(row), k) for row in own]
            assert values[f"{direction}_R@{k}"] == pytest.approx(np.mean(hits))
            assert values[f"{direction}_R@{k}.chance"] == pytest.approx(1 - np.mean(misses))


@pytest.mark.parametrize("memory", [1e-7, 1e-5, 1.0])
def test_a_memory_budget_changes_nothing(several, memory):
    assert retrieval(several, memory=memory) == retrieval(several)


def test_one_caption_an_image_is_the_plain_case(table, rng):
    image, text = torch.randn(2, 20, 4, generator=rng)
    rows = torch.randperm(20, generator=rng)
    pairs = torch.stack([rows, torch.arange(20)], 1)
    listed = Features(index=torch.arange(20), image=image, trunk=image, text=text[rows], pairs=pairs)
    plain, several = retrieval(table(image, text)), retrieval(listed)
    assert several == pytest.approx(plain, abs=1e-12)


def test_an_image_without_caption_is_an_error(several):
    few = replace(several, pairs=several.pairs.clamp(min=2))
    with pytest.raises(ValueError, match="2 of 30 images have no caption"):
        retrieval(few)


def test_the_first_caption_of_every_image(several):
    aligned = one_caption(several)
    for row in range(30):
        first = next(text for image, text in several.pairs.tolist() if image == row)
        assert torch.equal(aligned.text[row], several.text[first])
    assert one_caption(aligned) is aligned
    assert one_caption(replace(several, pairs=several.pairs.clamp(min=2))).text is None
