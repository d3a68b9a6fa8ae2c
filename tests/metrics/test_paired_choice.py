"""The scoring of MMVP-VLM: the authors' numbers, and what must not count as a success."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repr.batch import Features
from repr.metrics.paired_choice import paired_choice
from tests.golden import golden

GOLDEN = golden("mcl")
STAGES = {"stage0": [0], "stage1": [1], "stage2": [2], "concat012": [0, 1, 2]}
Table = Callable[..., Features]


def score(query: Features, names: str = "abcdefghi") -> dict[str, float]:
    return paired_choice(query, query, attribute="pattern", names=names)


@pytest.mark.parametrize("case", STAGES)
def test_authors_numbers(case: str, table: Table) -> None:
    """Nine patterns of fifteen pairs; ``concat012`` joins the raw outputs of three stages."""
    image, text = (
        torch.cat([torch.from_numpy(GOLDEN[f"integ.stage_{kind}_raw"][stage]) for stage in STAGES[case]], dim=1)
        for kind in ("img", "txt")
    )
    values = score(table(image, text, pattern=torch.arange(270) // 30))
    expected = torch.from_numpy(GOLDEN[f"integ.{case}.category_acc"])
    assert [100 * values[f"pairs_{name}"] for name in "abcdefghi"] == pytest.approx(expected.tolist())
    assert 100 * values["pairs"] == pytest.approx(expected.mean().item())
    assert values["num_pairs"] == 135


def test_both_statements_must_find_their_picture_and_patterns_weigh_the_same(table: Table) -> None:
    image = torch.tensor([[1.0, 0], [0, 1]]).repeat(4, 1)
    text = image.clone()
    text[3] = text[2]  # the second statement of pair 1 picks the first picture
    values = score(table(image, text, pattern=[0, 0, 0, 0, 0, 0, 1, 1]))
    assert (values["pairs_a"], values["pairs_b"]) == (pytest.approx(2 / 3), 1)
    assert values["pairs"] == pytest.approx(5 / 6)


def test_a_collapsed_or_diverged_model_gets_nothing_and_a_random_one_a_quarter(
    table: Table, rng: torch.Generator
) -> None:
    pattern = torch.arange(4000) // 1000
    ones, wild = torch.ones(4000, 3), torch.full((4000, 3), torch.nan)
    random: list[Tensor] = [torch.randn(4000, 32, generator=rng) for _ in range(2)]
    assert score(table(ones, ones, pattern=pattern))["pairs"] == 0
    assert score(table(wild, wild, pattern=pattern))["pairs"] == 0
    values = score(table(*random, pattern=pattern))
    assert values["pairs"] == pytest.approx(values["pairs.chance"], abs=0.03)


def test_rows_are_paired_by_index_and_half_pairs_are_left_out(table: Table) -> None:
    """Row 2 could not be read: rows 3 and 4 are no pair."""
    image = torch.eye(6)
    query = table(image, image, pattern=[0] * 6)
    kept = torch.tensor([5, 0, 3, 4, 1])
    query = replace(query, index=kept, image=image[kept], text=image[kept], labels={"pattern": torch.zeros(5).long()})
    assert score(query)["num_pairs"] == 2
    with pytest.raises(ValueError, match="whole set"):
        score(replace(query, index=torch.tensor([1, 2, 5, 6, 9])))


def test_what_is_missing_is_named(table: Table) -> None:
    image = torch.eye(2)
    with pytest.raises(ValueError, match="tokenizer"):
        score(table(image, pattern=[0, 0]))
    with pytest.raises(ValueError, match="pattern"):
        score(table(image, image))
    with pytest.raises(ValueError, match="differ"):
        score(table(image, image, pattern=[0, 1]))
