"""Compositional scores: the authors' numbers and formulas, and what must not count as a success."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repr.data.drawn.composition import DrawnComposition
from repr.data.questions.compositional import questions
from repr.metrics.compositional import compositional
from repr.metrics.features import Features
from tests.golden import golden

GOLDEN = golden("mcl")
STAGES = {"stage0": [0], "stage1": [1], "stage2": [2], "concat012": [0, 1, 2]}
PAIRS = torch.arange(270).view(-1, 2)
Table = Callable[..., Features]


def score(query: Features, captions: Tensor, candidates: Tensor, items: Tensor, names: str = "abcdefghi") -> dict:
    return compositional(
        query,
        captions=captions,
        candidates=candidates,
        items=items,
        attribute="split",
        names=names,
        chunk_size=7,
    )


def by_picture(query: Features, text: Tensor, num: int = 270) -> dict[str, float]:
    """Rows 2i and 2i + 1 are an item, each with its own caption alone, as in MMVP-VLM."""
    return score(query, text, torch.arange(num)[:, None], PAIRS[: num // 2])


def crossed(num: int) -> tuple[Tensor, Tensor]:
    """Candidates and items of pairs of pictures and captions, as in Winoground."""
    own = torch.arange(num)
    return torch.stack([own, own ^ 1], 1), PAIRS[: num // 2] if num <= 270 else own.view(-1, 2)


@pytest.mark.parametrize("case", STAGES)
def test_the_numbers_of_mmvp_s_authors(case: str, table: Table) -> None:
    """Nine patterns of fifteen pairs; ``concat012`` joins the raw outputs of three stages."""
    image, text = (
        torch.cat([torch.from_numpy(GOLDEN[f"integ.stage_{kind}_raw"][stage]) for stage in STAGES[case]], dim=1)
        for kind in ("img", "txt")
    )
    values = by_picture(table(image, split=torch.arange(270) // 30), text)
    expected = torch.from_numpy(GOLDEN[f"integ.{case}.category_acc"])
    assert [100 * values[f"image_score_{name}"] for name in "abcdefghi"] == pytest.approx(expected.tolist())
    assert 100 * values["image_score"] == pytest.approx(expected.mean().item())
    assert 100 * values["macro_image_score"] == pytest.approx(expected.mean().item())
    assert values["num_items"] == 135
    assert "text_score" not in values


def test_winoground_s_formulas(table: Table, rng: torch.Generator) -> None:
    """Text, image and group score as the paper defines them, an item at a time."""
    image, noise = torch.randn(2, 60, 16, generator=rng)
    text = image + 1.5 * noise
    cosine = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).tolist()
    expected = {"text_score": 0.0, "image_score": 0.0, "group_score": 0.0}
    for first in range(0, 60, 2):
        c0_i0, c1_i0, c0_i1, c1_i1 = (cosine[first + i][first + c] for i in (0, 1) for c in (0, 1))
        by_text = c0_i0 > c1_i0 and c1_i1 > c0_i1
        by_image = c0_i0 > c0_i1 and c1_i1 > c1_i0
        expected["text_score"] += by_text / 30
        expected["image_score"] += by_image / 30
        expected["group_score"] += (by_text and by_image) / 30
    values = score(table(image, split=[0, 0, 1, 1] * 15), text, *crossed(60))
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert 0 < values["group_score"] < min(values["text_score"], values["image_score"]) < 1
    assert values["group_score"] == pytest.approx((values["group_score_a"] + values["group_score_b"]) / 2)


def test_sugarcrepe_s_formula_and_aro_s_mean_over_relations(table: Table, rng: torch.Generator) -> None:
    image, wrong = torch.randn(2, 50, 16, generator=rng)
    text = 0.2 * image + torch.randn(50, 16, generator=rng)
    split = torch.tensor([0] * 10 + [1] * 30 + [-1] * 10)  # the last are in no split
    right = [
        F.cosine_similarity(x, t, 0) > F.cosine_similarity(x, w, 0) for x, t, w in zip(image, text, wrong, strict=True)
    ]
    accuracy = [sum(right[:10]) / 10, sum(right[10:40]) / 30]
    own = torch.arange(50)
    values = score(table(image, split=split), torch.cat([text, wrong]), torch.stack([own, own + 50], 1), own[:, None])
    assert [values["text_score_a"], values["text_score_b"]] == pytest.approx([float(share) for share in accuracy])
    assert values["macro_text_score"] == pytest.approx(float(sum(accuracy)) / 2)
    assert values["text_score"] == pytest.approx(float(sum(right)) / 50)
    assert {name for name in values if "image" in name or "group" in name or "_c" in name} == set()


def test_a_picture_among_n_captions_as_in_aro_s_order(table: Table, rng: torch.Generator) -> None:
    image, captions = torch.randn(20, 8, generator=rng), torch.randn(100, 8, generator=rng)
    candidates = torch.arange(100).view(20, 5)
    cosine = F.normalize(image, dim=1) @ F.normalize(captions, dim=1).T
    best = torch.stack([cosine[row, candidates[row]].argmax() for row in range(20)])
    candidates[0, 3:] = -1  # of this one, two orders were all that there are
    best[0] = cosine[0, :3].argmax()
    values = score(table(image, split=[0] * 20), captions, candidates, torch.arange(20)[:, None])
    assert values["text_score"] == pytest.approx((best == 0).double().mean().item())
    assert values["text_score.chance"] == pytest.approx((1 / 3 + 19 / 5) / 20)


def test_random_features_are_at_chance_and_constant_or_diverged_ones_get_nothing(
    table: Table, rng: torch.Generator
) -> None:
    num, split = 12000, torch.arange(12000) // 6000
    image, text = torch.randn(2, num, 32, generator=rng)
    values = score(table(image, split=split), text, *crossed(num))
    for name, chance in (("text_score", 1 / 4), ("image_score", 1 / 4), ("group_score", 1 / 6)):
        assert values[f"{name}.chance"] == pytest.approx(chance)
        assert values[name] == pytest.approx(chance, abs=0.02)
    for wild in (torch.ones(num, 3), torch.full((num, 3), torch.nan)):
        values = score(table(wild, split=split), wild, *crossed(num))
        assert [values[name] for name in ("text_score", "image_score", "group_score")] == [0, 0, 0]


def test_a_bag_of_words_gets_nothing_on_the_drawn_set_whatever_its_pictures_say(
    table: Table, rng: torch.Generator
) -> None:
    """All candidates have the same words, so the sums of their words' vectors are the same, and a tie is no success."""
    source = DrawnComposition(size=32, num_items=12)
    asked = questions(source)
    words = sorted({word for text in asked.texts for word in text.split()})
    vectors = torch.randint(-9, 9, (len(words), 16), generator=rng)  # whole numbers: sums without rounding
    bag = torch.stack([vectors[[words.index(word) for word in text.split()]].sum(0) for text in asked.texts]).double()
    image = bag[asked.candidates[:, 0]] + torch.randn(len(source), 16, generator=rng)  # knows its words well
    split = torch.tensor([("attribute", "relation", "count", "order").index(k) for k in source.attributes["kind"]])
    values = score(table(image, split=split), bag, asked.candidates, asked.items)
    assert values["num_items"] == 48
    for name in ("text_score", "macro_text_score", *(f"text_score_{letter}" for letter in "abcd")):
        assert values[name] == 0, name
    assert values["group_score"] == 0
    assert values["image_score"] == 0  # of two pictures, each caption prefers the same one


def test_an_item_with_a_row_that_could_not_be_read_is_left_out(table: Table) -> None:
    """Row 2 is missing: rows 3, 4 are no item; and the order of rows does not matter."""
    image = torch.eye(6)
    query = table(image, split=[0] * 6)
    kept = torch.tensor([5, 0, 3, 4, 1])
    query = replace(query, index=kept, image=image[kept], labels={"split": torch.zeros(5).long()})
    values = score(query, image, *crossed(6))
    assert values["num_items"] == 2
    assert values["group_score"] == 1
    with pytest.raises(ValueError, match="whole set"):
        score(replace(query, index=torch.tensor([1, 3, 5]), image=image[:3]), image, *crossed(6))


def test_all_captions_of_all_pictures_must_be_right_and_splits_weigh_the_same(table: Table) -> None:
    image = torch.tensor([[1.0, 0], [0, 1]]).repeat(4, 1)
    text = image.clone()
    text[3] = text[2]  # the second caption of item 1 picks the first picture, and ties with the first caption
    values = score(table(image, split=[0, 0, 0, 0, 0, 0, 1, 1]), text, *crossed(8))
    for name in ("text_score", "image_score", "group_score"):
        assert (values[f"{name}_a"], values[f"{name}_b"]) == (pytest.approx(2 / 3), 1)
        assert values[name] == 3 / 4
        assert values[f"macro_{name}"] == pytest.approx(5 / 6)


def test_what_is_missing_is_named(table: Table) -> None:
    image = torch.eye(2)
    with pytest.raises(ValueError, match="split"):
        score(table(image), image, *crossed(2))
    with pytest.raises(ValueError, match="differ"):
        score(table(image, split=[0, 1]), image, *crossed(2))
