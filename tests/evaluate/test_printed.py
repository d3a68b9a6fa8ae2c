"""What a terminal shows of an evaluation."""

import io

import pytest
from rich.console import Console, RenderableType

from repr.evaluate.printed import Entry, all_lines, first, first_lines
from repr.evaluate.probes import KNNSweep


def printed(lines: RenderableType, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(lines)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def entries(*sets: str) -> dict[str, Entry]:
    """The numbers of three protocols; only the first two have levels at chance."""
    return {
        f"{of_set}/{metric}": Entry(0.5, chance, f"What {metric} is.", protocol)
        for of_set in sets
        for metric, chance, protocol in (
            ("R@1", 0.01, "retrieval"), ("R@5", 0.05, "retrieval"), ("spread", None, "geometry"),
            ("rank", None, "geometry"), ("knn_size", None, "knn"), ("knn_a", 0.1, "knn"), ("knn_b", 0.2, "knn"),
        )
    }  # fmt: skip


def test_the_headline_comes_first_then_one_number_of_each_protocol_and_set() -> None:
    numbers = entries("val", "test") | {"train/num_bad": Entry(3, None)}
    assert first(numbers) == [
        "val/R@1", "val/knn_a", "test/R@1", "test/knn_a", "val/spread", "test/spread", "train/num_bad",
    ]  # fmt: skip
    assert first(numbers, ["test/R@5", "val/rank", "nowhere/R@5"]) == [
        "test/R@5", "val/rank", "val/R@5", "val/knn_a", "test/knn_a", "test/rank", "train/num_bad",
    ]  # fmt: skip


def test_there_are_about_ten_of_any_number_of_sets_and_every_protocol_has_one() -> None:
    numbers = entries(*map(str, range(9)))
    assert first(numbers)[:4] == ["0/R@1", "0/knn_a", "1/R@1", "1/knn_a"]
    assert len(first(numbers)) == 10
    headline = [name for name in numbers if name.endswith("knn_b")]
    assert first(numbers, [*headline, "0/R@1", "1/R@1"])[9:] == ["0/R@1", "1/R@1"]


@pytest.mark.parametrize("width", [80, 120])
def test_each_metric_is_explained_once_below_its_numbers(width: int) -> None:
    meaning = "A sentence on what the number is that is longer than a terminal of eighty columns; higher is better."
    numbers = {name: entry._replace(meaning=meaning) for name, entry in entries("a_long_name_of_a_set", "val").items()}
    lines = printed(first_lines(numbers | {"val/num_bad": Entry(2, None, "Unread.")}), width)
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["Evaluation", "value", "chance"]
    assert [line.split() for line in lines[1:3]] == [
        ["a_long_name_of_a_set/R@1", "0.500", "0.0100"], ["val/R@1", "0.500", "0.0100"]
    ]  # fmt: skip
    assert " ".join(lines).count("higher is") == len({name.split("/")[1] for name in first(numbers)})
    assert [line.split() for line in lines[-2:]] == [["val/num_bad", "2"], ["Unread."]]


def test_the_whole_table_has_each_number_beside_its_chance() -> None:
    numbers = {
        "val/i2t_R@1": Entry(0.25, 0.0034), "test/i2t_R@1": Entry(0.5, 0.01), "val/uniformity": Entry(-3.2, None)
    }  # fmt: skip
    lines = [line.replace("│", " ").split() for line in printed(all_lines(numbers), 100)]
    assert ["i2t_R@1", "0.250", "0.0034", "0.500", "0.0100"] in lines
    assert ["uniformity", "-3.200"] in lines


def test_a_number_of_a_sweep_is_explained_by_its_attribute() -> None:
    assert KNNSweep([10], [0.07], 1.0).meaning("knn_size_k10_t0.07").startswith("Share of samples whose size frozen")
