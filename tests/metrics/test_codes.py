"""Statistics of codes where they are known: all alike, one alone, Zipf's law, relabelled, with and without order."""

import math

import pytest
import torch
from torch import Tensor

from repr.metrics.codes import code_statistics

GENERATOR = torch.Generator().manual_seed(0)


def drawn(weights: Tensor, num: int, size: int) -> Tensor:
    return weights.double().multinomial(num * size * size, replacement=True, generator=GENERATOR).view(num, size, size)


def test_codes_that_are_all_alike() -> None:
    values = code_statistics(drawn(torch.ones(64), 100, 32), num_codes=64)
    assert values["codes_used"] == 1
    assert values["codes_entropy"] == pytest.approx(math.log(64), abs=2e-3)
    assert values["codes_entropy.chance"] == math.log(64)
    assert values["codes_conditional_entropy"] == pytest.approx(math.log(64), abs=5e-3)
    assert values["codes_zipf"] == pytest.approx(0, abs=0.05)
    assert values["codes_heaps"] == pytest.approx(0)  # all were there in the first tenth
    assert values["codes_compression"] == pytest.approx(1, abs=0.08)
    assert values["codes_granularity_picture"] == pytest.approx(values["codes_granularity_picture.chance"], abs=5e-3)


def test_one_code_alone() -> None:
    values = code_statistics(torch.zeros(5, 4, 4, dtype=torch.int64), num_codes=10)
    assert values["codes_used"] == pytest.approx(0.1)
    assert values["codes_entropy"] == values["codes_conditional_entropy"] == values["codes_heaps"] == 0
    assert "codes_zipf" not in values
    assert all(map(math.isfinite, values.values()))


def test_zipfs_law_is_found_and_labels_do_not_matter() -> None:
    codes = drawn(torch.arange(1, 1001).double() ** -1.2, 100, 32)
    values = code_statistics(codes, num_codes=1000)
    assert values["codes_zipf"] == pytest.approx(1.2, abs=0.05)
    assert values["codes_zipf_r2"] > 0.95
    other = code_statistics(torch.randperm(1000, generator=GENERATOR)[codes], num_codes=1000)
    for name in ("codes_used", "codes_entropy", "codes_conditional_entropy", "codes_zipf", "codes_heaps"):
        assert other[name] == pytest.approx(values[name], rel=1e-9)
    few = code_statistics(codes[:10], num_codes=1000)
    assert 0.2 < few["codes_heaps"] < 1  # the vocabulary still grows
    assert few["codes_entropy"] == pytest.approx(values["codes_entropy"], abs=0.05)


def test_order_and_place_are_told_from_chance() -> None:
    rows = torch.arange(16).view(1, 4, 4).repeat(40, 1, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    values = code_statistics(rows, num_codes=16)
    assert values["codes_conditional_entropy"] < 0.8 < 2.5 < values["codes_conditional_entropy.chance"]
    assert values["codes_compression"] < 0.1 < 0.9 < values["codes_compression.chance"]


def test_what_codes_name_has_the_highest_granularity() -> None:
    mask = torch.randint(0, 3, (20, 8, 8), generator=GENERATOR)
    codes = 2 * mask + torch.randint(0, 2, mask.shape, generator=GENERATOR)  # two codes of each class
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    pixels[:, :2, :2] = 255
    values = code_statistics(codes, num_codes=6, masks={"part": pixels, "none": torch.full_like(pixels, 255)})
    assert values["codes_granularity_part"] == pytest.approx(2 * math.log(3) / (math.log(3) + math.log(6)), abs=0.01)
    assert values["codes_granularity_part.chance"] < 0.05
    assert values["codes_granularity_picture"] < 0.1
    assert "codes_granularity_none" not in values


def test_what_are_no_codes_is_refused() -> None:
    for codes in (torch.full((1, 2, 2), 4), torch.full((1, 2, 2), -1), torch.empty(0, 2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"codes are .N, H, W. from 0 to num_codes - 1 = 3"):
            code_statistics(codes, num_codes=4)
