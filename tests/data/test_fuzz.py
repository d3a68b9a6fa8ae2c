"""Whatever a file holds, a source of it gives rows, or one clear error: of the file, or of each row that is damaged."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repr.data.sources.folder import Folder
from repr.data.sources.numeric_tables import NumericTables
from repr.data.sources.shards import Shards
from repr.data.sources.source import Source
from repr.data.sources.table import Table
from tests.data.test_words import picture

FUZZ = settings(max_examples=300, derandomize=True)
pytestmark = pytest.mark.slow
NAME = "0.png"
TEXTS = st.text(max_size=12)
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just(NAME),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
COLUMNS = {  # of one kind each, as Parquet has them
    "text": TEXTS, "number": st.floats(), "whole": st.integers(-(2**63), 2**63 - 1), "bytes": st.binary(max_size=12),
    "flag": st.booleans(), "day": st.dates(), "time": st.datetimes(), "texts": st.lists(TEXTS, max_size=3),
    "numbers": st.lists(st.floats(), max_size=3), "nested": st.lists(st.lists(TEXTS, max_size=2), max_size=2),
    "record": st.fixed_dictionaries({"bytes": st.binary(max_size=4), "path": TEXTS}),
}  # fmt: skip
MEMBERS = st.sampled_from(["0.png", "0.txt", "0.json", "1.txt", "1.json", "1.png", "2.jpg", "2.cls"])


def result_or_one_error(make: Callable[[], Source]) -> None:
    try:
        source = make()
    except ValueError as error:
        assert_clear(error)
        return
    assert len(source) > 0
    for names in source.attributes.values():
        assert all(isinstance(name, str) for name in names)
    for row in range(len(source)):
        assert isinstance(source.key(row), str)
        for read in (source.captions, getattr(source, "image", None), getattr(source, "tables", None)):
            try:
                value = read(row) if read else None
            except OSError as error:
                assert_clear(error)
            else:
                assert read != source.captions or all(isinstance(text, str) and text for text in value)


def assert_clear(error: Exception) -> None:
    assert 10 < len(str(error)) < 1000, repr(str(error))
    assert str(error).count("\n") < 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / NAME).write_bytes(picture())
    return folder


def table(path: Path) -> None:
    result_or_one_error(lambda: Table(path, captions=["caption"], labels=["label"]))


@FUZZ
@given(rows=st.lists(st.fixed_dictionaries({"image": CELLS, "caption": CELLS, "label": CELLS}) | CELLS, max_size=4))
def test_json_lines(rows: list[Any], folder: Path) -> None:
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table(path)


@FUZZ
@given(lines=st.lists(st.lists(TEXTS | st.just(NAME), max_size=4).map(",".join) | TEXTS, max_size=5))
def test_csv(lines: list[str], folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text("\n".join(["image,caption,label", *lines]), encoding="utf-8", errors="surrogatepass")
    table(path)


@FUZZ
@given(data=st.data(), kinds=st.lists(st.sampled_from(sorted(COLUMNS)), min_size=3, max_size=3), num=st.integers(1, 3))
def test_parquet(data: st.DataObject, kinds: list[str], num: int, folder: Path) -> None:
    columns = {
        name: data.draw(st.lists(st.none() | COLUMNS[kind], min_size=num, max_size=num))
        for name, kind in zip(("image", "caption", "label"), kinds, strict=True)
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    table(folder / "t.parquet")


@FUZZ
@given(members=st.lists(st.tuples(MEMBERS, CELLS.map(json.dumps).map(str.encode) | st.binary(max_size=20)), max_size=6))
@example(members=[("0.png", picture()), ("0.json", b"{}"), ("0.txt", b"\xff")])
def test_shards(members: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    result_or_one_error(lambda: Shards(str(path), captions=["txt", "json:caption"], labels=["json:label", "cls"]))


@FUZZ
@given(
    content=st.binary(max_size=600), head=st.sampled_from([b"", b"PAR1", b"image,caption,label\n", b"{", b"\x93NUMPY"])
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "a.tar", "p/1.png", "p/2.jpg", "p/3.webp"])
def test_any_bytes(content: bytes, head: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + content)
    if name.endswith(".tar"):
        result_or_one_error(lambda: Shards(str(path), captions=["txt"]))
    elif path.parent.name == "p":
        result_or_one_error(lambda: Folder(path.parent))
    else:
        table(path)
        result_or_one_error(lambda: NumericTables({"a": path}, key="image"))
