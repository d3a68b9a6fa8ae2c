"""Captions and labels are what a person would say they are, in every kind of source alike."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from repr.check.facts import joined_labels
from repr.cli import one_line_errors
from repr.data.bad_rows import one_line
from repr.data.sources.columns import MAX_TEXT
from repr.data.sources.folder import Folder
from repr.data.sources.numeric_tables import NumericTables
from repr.data.sources.shards import Shards
from repr.data.sources.table import MAX_LINE, Table

NAN = float("nan")
DECOMPOSED, COMPOSED = "cafe\u0301", "caf\xe9"


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def write(kind: str, folder: Path, cells: list[Any], *, labelled: bool = True) -> Table | Shards:
    """A source whose rows have each of these cells as caption and, if wanted, as label."""
    names = [f"{row}.png" for row in range(len(cells))]
    for name in names:
        (folder / name).write_bytes(picture())
    if kind == "shards":
        with tarfile.open(folder / "a.tar", "w") as archive:
            for name, cell in zip(names, cells, strict=True):
                words = json.dumps({"caption": cell, "label": cell}).encode()
                for member, data in ((name, picture()), (f"{name[:-4]}.json", words)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return Shards(str(folder / "a.tar"), captions=["json:caption"], labels=["json:label"] if labelled else [])
    path = folder / f"t.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": names, "caption": cells, "label": cells}), path)
    elif kind == "jsonl":
        rows = [{"image": name, "caption": cell, "label": cell} for name, cell in zip(names, cells, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        texts = ["" if cell is None else str(cell) for cell in cells]
        path.write_text("\n".join(["image,caption,label", *map(",".join, zip(names, texts, texts, strict=True))]))
    return Table(path, captions=["caption"], labels=["label"] if labelled else [])


def words(source: Table | Shards | Folder) -> tuple[list[list[str]], list[str]]:
    return [source.captions(row) for row in range(len(source))], list(source.attributes["label"])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "shards"])
@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        (["fox", None, " fox "], ["fox", "", "fox"]),
        ([1, None, 30], ["1", "", "30"]),
        ([0.5, None, 2.25], ["0.5", "", "2.25"]),
        ([DECOMPOSED, COMPOSED], [COMPOSED, COMPOSED]),
        (["nan", "None", "3.0", "1e3"], ["nan", "None", "3.0", "1e3"]),  # text stands as it is
    ],
)
def test_every_kind_reads_the_same(kind: str, cells: list[Any], texts: list[str], tmp_path: Path) -> None:
    assert words(write(kind, tmp_path, cells)) == ([[text] if text else [] for text in texts], texts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "shards"])
def test_typed_numbers_are_whole_or_nothing(kind: str, tmp_path: Path) -> None:
    captions, labels = words(write(kind, tmp_path, [1.0, NAN, 2.0, -0.0]))
    assert labels == ["1", "", "2", "0"]
    assert captions == [["1"], [], ["2"], ["0"]]


def test_rows_are_chosen_by_the_same_words(tmp_path: Path) -> None:
    write("parquet", tmp_path, [2020.0, NAN, 2021.0])
    assert len(Table(tmp_path / "t.parquet", where={"label": 2020})) == 1
    write("jsonl", tmp_path, [DECOMPOSED, " " + COMPOSED])
    assert len(Table(tmp_path / "t.jsonl", where={"label": [DECOMPOSED]})) == 2


@pytest.mark.parametrize("kind", ["jsonl", "shards", "parquet"])
@pytest.mark.parametrize("cell", [["cat", "dog"], ["cat"]])
def test_a_label_of_several_values_is_refused(kind: str, cell: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label' is \['cat'.*\]; a label is a single value"):
        write(kind, tmp_path, [cell])


@pytest.mark.parametrize("kind", ["jsonl", "shards"])
def test_a_label_that_is_an_object_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label' is \{'en': 'cat'\}; a label is a single value"):
        write(kind, tmp_path, [{"en": "cat"}])


@pytest.mark.parametrize("kind", ["jsonl", "shards"])
@pytest.mark.parametrize("cell", [{"en": "cat"}, [["cat"]], float("inf"), [{"raw": "cat"}], "x" * (MAX_TEXT + 1)])
def test_a_caption_that_is_no_text_costs_its_row(kind: str, cell: Any, tmp_path: Path) -> None:
    source = write(kind, tmp_path, ["cat", cell], labelled=False)
    assert source.captions(0) == ["cat"]
    with pytest.raises(OSError, match=r"(line 2 \(1\.png\)|a\.tar: 1): .*(is no text|more than 524,288)"):
        source.captions(1)


def test_a_row_of_nested_lists_costs_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    for depth in (400, 900, 100_000):
        nested = f'{{"image":"a.png","caption":{"[" * depth}1{"]" * depth}}}'
        (tmp_path / "t.jsonl").write_text('{"image":"a.png","caption":"words"}\n' + nested)
        source = Table(tmp_path / "t.jsonl", captions=["caption"])
        assert source.captions(0) == ["words"]
        with pytest.raises(OSError, match=r"line 2 .*(is no text|not a JSON object)"):
            source.captions(1)


def test_bytes_are_read_as_utf8(tmp_path: Path) -> None:
    source = write("parquet", tmp_path, [b"a red fox", DECOMPOSED.encode(), None])
    assert words(source) == ([["a red fox"], [COMPOSED], []], ["a red fox", COMPOSED, ""])
    damaged = write("parquet", tmp_path, [b"a red fox", b"\xff\xfe"])
    assert damaged.captions(0) == ["a red fox"]
    with pytest.raises(OSError, match=r"line 2 \(1\.png\): the label 'label' is not UTF-8"):
        damaged.image(1)


def test_labels_that_are_not_utf8_cost_their_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "t.csv").write_bytes(b"image,label\na.png,\xff\na.png,fox\n")
    (tmp_path / "t.jsonl").write_text('{"image":"a.png","label":"\\ud800"}\n{"image":"a.png","label":"fox"}')
    for kind in ("csv", "jsonl"):
        source = Table(tmp_path / f"t.{kind}", labels=["label"])
        assert list(source.attributes["label"]) == ["", "fox"]
        with pytest.raises(OSError, match="'label' is not UTF-8"):
            source.image(0)


@pytest.mark.parametrize(
    "column",
    [
        [{"data": picture(), "path": "a.png"}],
        [[{"bytes": picture(), "path": "a.png"}]],
        [[[list(range(256))] * 99]],
        pyarrow.array([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    ],
)
def test_a_column_of_other_kinds_is_refused_in_one_line(column: Any, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": ["words"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"column 'image' .*pictures as paths, as bytes, or") as caught:
        Table(tmp_path / "t.parquet", captions=["text"])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_without_ends_of_lines_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"t.{kind}"
    with path.open("wb") as file:
        file.truncate(4 * MAX_LINE)
    with pytest.raises(ValueError, match="line 1 is longer than 16,777,216 characters"):
        Table(path)


def test_other_sources_compose_labels_too(tmp_path: Path) -> None:
    for name in (DECOMPOSED, COMPOSED):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture())
        (tmp_path / name / "a.txt").write_text(DECOMPOSED, encoding="utf-8")
    assert words(Folder(tmp_path, labels=True, captions=True)) == ([[COMPOSED]] * 2, [COMPOSED] * 2)
    (tmp_path / "numbers.csv").write_text("id,x\n0,1\n1,2\n")
    (tmp_path / "labels.csv").write_text(f"id,label\n0,{DECOMPOSED} \n1,{COMPOSED}\n", encoding="utf-8")
    source = NumericTables(
        {"a": tmp_path / "numbers.csv"}, key="id", labels=tmp_path / "labels.csv", attributes=["label"]
    )
    assert list(source.attributes["label"]) == [COMPOSED] * 2


def test_the_check_tells_of_labels_that_look_like_several(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes(picture())
    (tmp_path / "t.csv").write_text('image,label\na.png,"cat,dog"\nb.png,cat\nc.png,"red, round"\nd.png,dog; cat\n')
    (remark,) = joined_labels("train", Table(tmp_path / "t.csv", labels=["label"]))
    assert remark.startswith("train: 2 of 4 classes of 'label' look like several in one cell, such as 'cat,dog'")


def test_names_of_strangers_do_not_drive_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "\x1b]0;owned\x07.png\n", "caption": "a"}))
    with pytest.raises(OSError, match="owned") as caught:
        Table(tmp_path / "t.jsonl").image(0)
    assert r"\x1b]0;owned\x07.png" in one_line(caught.value)
    with pytest.raises(SystemExit, match=r"\\x1b\[2J.csv does not exist"), one_line_errors():
        Table("\x1b[2J.csv")
