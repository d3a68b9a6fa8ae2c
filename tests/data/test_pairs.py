"""Sets of pairs: the published layout of MMVP-VLM, and the drawn set, which here is written in that layout."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from repr.data.questions.mmvp import IMAGES, MMVP, PATTERNS, QUESTIONS
from repr.data.sources.table import MAX_LINE
from tests.drawn_pairs import SCENES, DrawnPairs

TYPES = {pattern: name for name, pattern in PATTERNS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pairs of each pattern as the benchmark's files."""
    source = DrawnPairs(size=32, pairs=2, prefix="")
    with (tmp_path / QUESTIONS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Question ID", "Type", "Statement"])
        for index in range(len(source)):
            kind = TYPES[source.attributes["pattern"][index]]
            writer.writerow([index + 1, kind, *source.captions(index)])
            path = tmp_path / IMAGES / kind / f"{index + 1}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.image(index).save(path, quality=95)
    return tmp_path


def test_the_published_layout_is_read(folder: Path) -> None:
    drawn, read = DrawnPairs(size=32, pairs=2), MMVP(folder)
    assert len(read) == len(drawn) == 36
    assert list(read.attributes["pattern"]) == list(drawn.attributes["pattern"])
    assert [read.captions(index) for index in range(36)] == [drawn.captions(index) for index in range(36)]
    assert read.captions(0)[0].startswith("a photo of a")
    assert MMVP(folder, prefix="").captions(35) == DrawnPairs(size=32, pairs=2, prefix="").captions(35)
    assert read.key(35) == "36"
    difference = [np.abs(np.array(read.image(i), int) - np.array(drawn.image(i), int)).mean() for i in range(36)]
    assert max(difference) < 12  # JPEG
    (folder / IMAGES / TYPES["text"] / "31.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"31\.jpg"):
        read.image(30)


def rewrite(change: Callable[[list[list[str]]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / QUESTIONS
        rows = list(csv.reader(path.read_text().splitlines()))
        change(rows)
        path.write_text("\n".join(",".join(row) for row in rows))

    return apply


def assign(row: int, column: int, value: str) -> Callable[[Path], object]:
    return rewrite(lambda rows: rows[row].__setitem__(column, value))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / QUESTIONS).unlink(), r"no '.*Questions\.csv'"),
        (lambda folder: (folder / IMAGES / TYPES["state"] / "10.jpg").unlink(), r"1 of 36 pictures.*State.*10\.jpg"),
        (assign(0, 1, "Kind"), "no column 'Type'"),
        (assign(3, 0, "three"), "line 4: 'Question ID' is 'three'"),
        (assign(3, 1, "Colour"), "line 4: 'Type' is 'Colour'"),
        (assign(3, 2, ""), "line 4: 'Statement' is empty"),
        (assign(4, 0, "6"), "3 and 6 are no pair"),
        (rewrite(lambda rows: rows.pop()), "35 statements"),
        (rewrite(lambda rows: rows.append(["37"])), "line 38: 'Type' is ''"),
        (lambda folder: (folder / QUESTIONS).write_bytes(b"\xff"), r"Questions\.csv cannot be read: 'utf-8' codec"),
        (assign(3, 2, "x" * (MAX_LINE + 1)), r"Questions\.csv cannot be read: field larger than"),
    ],
)
def test_a_bad_layout_is_named(folder: Path, damage: Callable[[Path], object], told: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=told):
        MMVP(folder)


def test_the_drawn_set_is_a_function_of_its_options() -> None:
    source, again = DrawnPairs(size=48), DrawnPairs(size=48)
    assert len(source) == 9 * 15 * 2
    assert list(dict.fromkeys(source.attributes["pattern"])) == list(SCENES) == list(PATTERNS.values())
    assert len({source.key(index) for index in range(270)}) == 270
    for index in range(0, 270, 2):
        first, second = np.array(source.image(index)), np.array(source.image(index + 1))
        assert first.shape == (48, 48, 3)
        assert (first != second).any(), source.key(index)
        assert source.captions(index) != source.captions(index + 1)
        assert (np.array(again.image(index)) == first).all()
    assert source.captions(0) != DrawnPairs(size=48, seed=1).captions(0)
    few = DrawnPairs(size=48, pairs=2)
    assert (few.key(5), few.captions(5)) == ("presence/0b", source.captions(31)) == (source.key(31), few.captions(5))
    with pytest.raises(ValueError, match="size to 32"):
        DrawnPairs(size=8)
