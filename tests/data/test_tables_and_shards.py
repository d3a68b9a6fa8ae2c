"""Tables, tar shards and mixtures: what they read, what they refuse, and when a shard's index is made anew."""

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from repr.data.datasets import draw_caption
from repr.data.sources.columns import Labels, Packed, part_filter
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.mixture import Mixture
from repr.data.sources.shards import Shards, expand_files
from repr.data.sources.table import Table


def png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, level: int = 0, **entries: object) -> list[tuple[str, bytes]]:
    text = f"picture {key}".encode()
    return [(f"{key}.png", png(level)), (f"{key}.txt", text), (f"{key}.json", json.dumps(entries).encode())]


def keys(source: Table | Shards) -> list[str]:
    return [source.key(row) for row in range(len(source))]


# Columns --------------------------------------------------------------------------------------------------------------


def test_packed_columns_give_back_what_went_in() -> None:
    values = [b"", "été".encode(), b"x" * 700, b"\0\xff", b""]
    column = Packed.of(iter(values * 20_000))  # more than one block
    assert len(column) == 100_000
    assert [column[row] for row in (0, 1, 2, 3, 4, 99_998, -1)] == [*values, values[3], values[4]]
    assert list(Packed.join([Packed.of(values), Packed.of([]), Packed.of(values[:2])])) == values + values[:2]
    with pytest.raises(IndexError):
        column[100_000]


def test_labels_are_names_by_row() -> None:
    labels = Labels.of(["b", "", "a", "b"])
    assert list(labels) == ["b", "", "a", "b"]
    both = Labels.join([labels, ["c"], Labels(np.zeros(2, np.int32), ["a"])])
    assert list(both) == ["b", "", "a", "b", "c", "a", "a"]
    assert labels.present() == {"a", "b"}
    assert labels.take(np.array([0, 1])).present() == {"b"}
    assert labels[1:] == ["", "a", "b"]


def test_parts_by_hash_are_disjoint_whole_and_stable() -> None:
    names = [b"key %d" % row for row in range(2000)]
    train, val = ({name for name in names if part_filter(part)(name)} for part in ([0, 0.9], [0.9, 1]))
    assert train | val == set(names)
    assert not train & val
    assert len(val) == pytest.approx(200, abs=45)
    # Parts never change: a run that goes on would train on what it was tested on.
    assert [row for row in range(50) if names[row] in val] == [0, 7, 22, 32, 41, 45]
    assert all(map(part_filter(None), names))
    for part in ([0.5, 0.5], [0.5], [-0.1, 1], [0, 1.1]):
        with pytest.raises(ValueError, match="0 <= low < high <= 1"):
            part_filter(part)


# Tables ---------------------------------------------------------------------------------------------------------------

ROWS = [
    {"file": "a.png", "title": "An a", "words": ["one", "two"], "kind": "letter", "split": "train"},
    {"file": "deep/b.png", "title": "", "words": ["three"], "kind": None, "split": "val"},
    {"file": "c.png", "title": "A c", "words": [], "kind": "letter", "split": "train"},
]


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for level, row in enumerate(ROWS):
        (tmp_path / "pictures" / str(row["file"])).write_bytes(png(level))
    path = tmp_path / f"table.{request.param}"
    if request.param == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    elif request.param == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        cells = [[str((v[0] if v else "") if isinstance(v, list) else v or "") for v in row.values()] for row in ROWS]
        delimiter = {"csv": ",", "tsv": "\t"}[request.param]
        path.write_text("\n".join(delimiter.join(row) for row in [list(ROWS[0]), *cells]))
    return path


def test_a_table_gives_pictures_captions_and_labels_by_column(table: Path) -> None:
    def make(**options: object) -> Table:
        return Table(table, image="file", root=table.parent / "pictures", **options)  # type: ignore[arg-type]

    source = make(captions=["title", "words"], caption_weights=[3, 1], labels=["kind"])
    lists = table.suffix in (".jsonl", ".parquet")
    assert keys(source) == ["a.png", "deep/b.png", "c.png"]
    assert source.captions(0) == (["An a", "one", "two"] if lists else ["An a", "one"])
    assert source.caption_weights(0) == ([3, 0.5, 0.5] if lists else [3, 1])
    assert source.captions(1) == ["three"]
    assert source.captions(2) == ["A c"]
    assert list(source.attributes["kind"]) == ["letter", "", "letter"]
    assert source.image(1).getpixel((0, 0)) == (1, 1, 1)
    assert source.encoded(2) == png(2)
    assert keys(make(where={"split": "val"})) == ["deep/b.png"]
    assert len(make(where={"split": ["val", "train"], "kind": "letter"})) == 2
    part, rest = make(captions=["title"], labels=["kind"], part=[0, 0.9]), make(part=[0.9, 1])
    assert sorted(keys(part) + keys(rest)) == sorted(keys(source))
    assert [bool(part.captions(row)) for row in range(len(part))] == [key != "deep/b.png" for key in keys(part)]
    with pytest.raises(ValueError, match=r"no column 'path'; it has .*'file'"):
        Table(table, image="path")
    with pytest.raises(ValueError, match="has no row where"):
        make(where={"split": "test"})
    with pytest.raises(ValueError, match=r"has no row in part=\[0, 1e-09\]"):
        make(part=[0, 1e-9])


@pytest.mark.parametrize(
    ("text", "row", "fault"),
    [
        ("image,caption\na.png,one\nb.png,one, two\n", 1, "line 3 .*: 3 cells, but the header has 2: quote the text"),
        ("image,caption\na.png\n,two\n", 1, r"line 3 \(\): no path in column 'image'"),
        ('{"image": "a.png", "caption": "x"}\n{"image": \n[1]\n', 1, "line 2 .*: not a JSON object"),
        ('{"image": "a.png", "caption": "x"}\n[1]\n', 1, "line 2 .*: not a JSON object"),
        ('{"image": "a.png", "caption": "\\ud800"}\n', 0, "line 1 .*: caption is not UTF-8"),
    ],
)
def test_a_damaged_row_stays_where_it_is_and_names_its_line(text: str, row: int, fault: str, tmp_path: Path) -> None:
    path = tmp_path / ("t.jsonl" if text.startswith("{") else "t.csv")
    path.write_text(text)
    (tmp_path / "a.png").write_bytes(png())
    source = Table(path, captions=["caption"])
    with pytest.raises(OSError, match=fault):
        source.captions(row)
    assert source.image(0).size == (4, 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", 'image,caption\na.png,"open\nb.png,two\n', r"t\.csv, line 3: unexpected end of data"),
        ("t.csv", 'image,caption\na.png,"op"en"\nb.png,two\n', r"t\.csv, line 2: .* with each doubled"),
        ("t.csv", "", "has no column 'image'; it has $"),
        ("t.csv", "image,caption\n", "has no row"),
        ("t.jsonl", "", "has no row"),
        ("t.jsonl", '{"file": 1}', "has no column 'image'; it has 'file'"),
        ("t.parquet", "PAR1 no more", r"t\.parquet, after row 0"),
        ("t.xlsx", "PK", "of no known kind; use .csv"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / name, captions=["caption"])


@pytest.mark.parametrize(
    ("where", "kept", "no_number"),
    [
        ({"score": ">0.28"}, "acg", 3),
        ({"score": ">= 0.28"}, "abcg", 3),
        ({"score": "<=0"}, "d", 3),
        ({"score": "<.28", "kind": "!=n"}, "", 2),
        ({"score": "!=3"}, "abdg", 3),
        ({"score": ">-1", "kind": ["m"]}, "a", 0),
        ({"kind": "!=m"}, "bcdefgh", 0),
        ({"kind": "!="}, "abcdfgh", 0),
        ({"kind": [">m", "m"]}, "ah", 0),  # in a list, texts are values
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "tar"])
def test_rows_are_wanted_by_comparison_and_missing_numbers_are_counted(
    where: dict, kept: str, no_number: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [0.31, 0.28, 3, -1e-3, None, "?", 1.0, float("nan")]
    rows = [
        {"image": name, "score": score, "kind": mark}
        for name, score, mark in zip("abcdefgh", scores, ["m", *"nnn", None, *"nn", ">m"], strict=True)
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "tar":
        tar(
            path,
            *(member for row in rows for member in sample(str(row["image"]), score=row["score"], kind=row["kind"])),
        )
    elif kind == "csv":
        cells = [["" if cell is None else str(cell) for cell in row.values()] for row in rows]
        path.write_text("\n".join(map(",".join, [list(rows[0]), *cells])))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))

    def make() -> Table | Shards:
        if kind == "tar":
            return Shards(str(path), where={f"json:{name}": value for name, value in where.items()})
        return Table(path, where=where)

    if kept:
        assert "".join(key[-1] for key in keys(make())) == kept
    else:
        with pytest.raises(ValueError, match="has no row where"):
            make()
    assert [record.args[2] for record in caplog.records] == ([no_number] if no_number else [])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_one_picture_become_one_with_the_captions_of_all(kind: str, tmp_path: Path) -> None:
    rows = [("a.png", "a 1", "x"), ("b.png", "b 1", "y"), ("./a.png", "", "z"), ("a.png", "a 2", "z"), ("", "lost", "")]
    if kind == "csv":
        text = "\n".join(map(",".join, [("image", "caption", "label"), *rows, ("b.png", "b", "2", "too many")]))
    else:
        text = "\n".join(json.dumps(dict(zip(("image", "caption", "label"), row, strict=True))) for row in rows) + "\n["
    (tmp_path / f"t.{kind}").write_text(text)
    source = Table(tmp_path / f"t.{kind}", captions=["caption"], labels=["label"], group_by="image")
    assert keys(source)[:3] == ["a.png", "b.png", f"line {6 if kind == 'csv' else 5}"]
    assert [source.captions(row) for row in range(2)] == [["a 1", "a 2"], ["b 1"]]
    assert source.caption_weights(0) == [0.5, 0.5]
    assert list(source.attributes["label"])[:2] == ["x", "y"]
    assert len(source) == 4  # what cannot be read stays apart, and is found
    for row, fault in ((2, "no path"), (3, "4 cells|not a JSON object")):
        with pytest.raises(OSError, match=fault):
            source.captions(row)
    assert [draw_caption(source, 0, number) for number in (0.0, 0.49, 0.5, 0.99)] == ["a 1", "a 1", "a 2", "a 2"]


def test_options_of_a_table_are_checked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\na.png,x\n")
    for options, message in (
        ({"captions": "caption"}, r"set a list such as \[caption\]"),
        ({"labels": "caption"}, r"set a list such as \[caption\]"),
        ({"captions": ["caption"], "caption_weights": [0]}, "one positive weight each"),
        ({"captions": ["caption"], "caption_weights": [1, 2]}, "one positive weight each"),
        ({"group_by": "caption"}, "group_by='caption'; set it to image"),
        ({"where": {"caption": ">0,28"}}, r"where: caption is '>0,28', and '0,28' is no number; .*, or \['>0,28'\]"),
        ({"where": {"caption": "<nan"}}, "'nan' is no number"),
        ({"where": {"score": ">1"}}, "no column 'score'"),
    ):
        with pytest.raises(ValueError, match=message):
            Table(tmp_path / "t.csv", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"none\.csv does not exist; set it"):
        Table(tmp_path / "none.csv")


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    two = [*sample("x/one", 1, kind="even", tags=["a", "b"]), *sample("x/two", 2, kind="odd", title="T")]
    tar(tmp_path / "s-00.tar", *two)
    tar(tmp_path / "s-01.tar", *sample("three", 3, kind=None))
    return tmp_path


def test_shards_are_read_at_random_with_fields_of_members_and_json(shards: Path) -> None:
    captions = ["txt", "json:title", "json:tags"]
    files = str(shards / "s-{00..01}.tar")
    source = Shards(files, captions=captions, caption_weights=[2, 1, 1], labels=["json:kind"])
    assert keys(source) == ["s-00.tar/x/one", "s-00.tar/x/two", "s-01.tar/three"]
    assert source.captions(2) == ["picture three"]
    assert source.captions(0) == ["picture x/one", "a", "b"]
    assert source.captions(1) == ["picture x/two", "T"]
    assert source.caption_weights(0) == [2, 0.5, 0.5]
    assert list(source.attributes["kind"]) == ["even", "odd", ""]
    assert [source.image(row).getpixel((0, 0)) for row in (2, 0, 1)] == [(3, 3, 3), (1, 1, 1), (2, 2, 2)]
    assert source.encoded(1) == png(2)
    again = pickle.loads(pickle.dumps(source))  # as for spawned workers, after files were opened
    assert again.image(2).getpixel((0, 0)) == (3, 3, 3)
    part, rest = (Shards(str(shards / "*.tar"), part=bounds) for bounds in ([0, 0.5], [0.5, 1]))
    assert sorted(keys(part) + keys(rest)) == sorted(keys(source))


def test_a_field_of_shards_weighs_their_samples(tmp_path: Path) -> None:
    weights = [0.5, "2", 0, 1]
    samples = [sample(f"s{row}", row, weight=weight, kind="ab"[row % 2]) for row, weight in enumerate(weights)]
    damaged = ("damaged.json", b"{")
    tar(tmp_path / "s-00.tar", *samples[0], *samples[1], damaged)
    tar(tmp_path / "s-01.tar", *samples[2], *samples[3])
    files = str(tmp_path / "s-*.tar")
    source = Shards(files, weights="json:weight")
    assert source.row_weights is not None
    assert source.row_weights.tolist() == [0.5, 2, 1, 0, 1]
    assert not source.attributes
    odd = Shards(files, weights="json:weight", where={"json:kind": "b"})
    assert odd.row_weights is not None
    assert odd.row_weights.tolist() == [2, 1, 1]
    assert Shards(files).row_weights is None
    tar(tmp_path / "s-01.tar", *sample("worse", 1, weight=-1), *sample("none", 1, kind="b"))
    with pytest.raises(ValueError, match=r"s-00\.tar \.\.\.: the weight '(-1)?' in column 'json:weight' is no number"):
        Shards(files, weights="json:weight")
    some = Shards(files, weights="json:weight", where={"json:weight": ">0"})
    assert some.row_weights is not None
    assert some.row_weights.tolist() == [0.5, 2, 1]
    tar(tmp_path / "s-02.tar", *samples[2])
    with pytest.raises(ValueError, match="all weights in column 'json:weight' are 0"):
        Shards(str(tmp_path / "s-02.tar"), weights="json:weight")


def test_the_index_is_made_once_and_again_when_it_does_not_fit(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, index = shards / "s-00.tar", shards / "s-00.tar.index.safetensors"

    def made(**options: object) -> bool:
        Shards(str(path), **options)  # type: ignore[arg-type]
        return "indexing" in capsys.readouterr().err

    assert made()
    assert not made()
    assert made(labels=["json:kind"])
    assert not made()
    assert not made(labels=["json:kind"])
    assert made(labels={"first": "json:title"})
    assert not made(labels=["json:kind", "json:title"])
    for damaged in (index.read_bytes()[:100], b""):
        index.write_bytes(damaged)
        assert made()
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert made()
    tar(path, *sample("other", 7))
    assert made()
    assert Shards(str(path)).key(0) == "s-00.tar/other"
    assert not list(shards.glob("*.part*"))


def test_the_index_of_a_shard_is_mapped_once_it_is_needed(shards: Path) -> None:
    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.rpartition("/")[2].partition(".")[0] for line in lines if f"{shards}/" in line}

    source = Shards(str(shards / "*.tar"), captions=["txt"])
    assert mapped() == {"s-00"}  # which has pictures and captions, so there are some
    assert source.captions(2) == ["picture three"]
    assert mapped() == {"s-00", "s-01"}
    assert len(pickle.dumps(source)) < 2000  # another process maps them, too


@pytest.mark.parametrize("change", ["bit", "gone", "other", "cut"])
def test_an_index_that_changes_while_it_is_used_is_named(change: str, shards: Path) -> None:
    Shards(str(shards / "*.tar"))
    source, index = Shards(str(shards / "*.tar")), shards / "s-01.tar.index.safetensors"
    data = index.read_bytes()
    index.unlink()
    if change == "bit":
        index.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif change == "other":
        index.write_bytes((shards / "s-00.tar.index.safetensors").read_bytes())
    elif change == "cut":
        index.write_bytes(data[:-9])
    assert source.key(0) == "s-00.tar/x/one"
    with pytest.raises(ValueError, match=r"s-01\.tar\.index.*(damaged|cannot be read|another shard).*; remove it"):
        source.key(2)


def test_the_index_goes_to_the_cache_where_the_shard_cannot_have_it(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "s-00.tar.index.safetensors").mkdir()  # root may write everywhere, but not a file over a folder
    for expected in (True, False):
        source = Shards(str(shards / "s-00.tar"), cache_dir=str(tmp_path / "cache"))
        assert ("indexing" in capsys.readouterr().err) == expected
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert source.image(1).getpixel((0, 0)) == (2, 2, 2)
    (tmp_path / "file").write_text("no folder")
    source = Shards(str(shards / "s-00.tar"), cache_dir=str(tmp_path / "file"))
    assert "set cache_dir" in capsys.readouterr().err
    assert len(source) == 2


def test_members_out_of_order_are_paired_by_key_and_names_go_nowhere(tmp_path: Path) -> None:
    members = [
        *sample("a", 1),
        *sample("/etc/passwd", 2),
        *sample("../../b", 3),
        (".hidden.png", b""),
        ("noending", b""),
    ]
    shuffled = (members[position] for position in (0, 3, 6, 1, 7, 4, 9, 10))
    source = Shards(str(tar(tmp_path / "t.tar", *shuffled)), captions=["txt"])
    assert keys(source) == ["t.tar/a", "t.tar//etc/passwd", "t.tar/../../b"]
    assert [source.captions(row) for row in range(3)] == [["picture a"], ["picture /etc/passwd"], ["picture ../../b"]]
    assert [source.image(row).getpixel((0, 0)) for row in range(3)] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]


def test_doubled_keys_links_and_bad_json_make_a_sample_bad(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    plain = [*sample("double", 1), *sample("double", 2), *sample("good", 3), ("json.png", png()), ("json.json", b"{")]
    tar(path, *plain)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "good.png"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("bare.txt"))
    source = Shards(str(path), captions=["json:title"])
    faults = ("is there twice", None, "no JSON", "is a link", "is a link", "no picture")
    assert len(source) == len(faults)
    for row, fault in enumerate(faults):
        if fault is None:
            assert source.image(row).getpixel((0, 0)) == (3, 3, 3)
            continue
        key = source.key(row).removeprefix("t.tar/")
        read = source.captions if key == "json" else source.image
        with pytest.raises(OSError, match=rf"t\.tar: {key}: .*{fault}"):
            read(row)
    labelled = Shards(str(path), labels={"kind": "txt"})
    assert labelled.attributes["kind"][1] == "picture good"


def test_shards_that_were_cut_short_are_all_named(shards: Path) -> None:
    tar(shards / "ok.tar", *sample("k"))
    whole = (shards / "s-00.tar").read_bytes()  # header and content of each member take two blocks of 512
    cuts = {"s-00.tar": whole[:1336], "s-01.tar": whole[:2048], "zero.tar": b"", "text.tar": b"no tar" * 200}
    cuts |= {"middle.tar": whole[:2048] + b"x" * 512 + whole[2560:], "gz.tar": b"\x1f\x8b" + bytes(600)}
    for name, data in cuts.items():
        (shards / name).write_bytes(data)
    with pytest.raises(ValueError, match="damaged; fetch them again") as refused:
        Shards(str(shards / "*.tar"))
    lines = str(refused.value).splitlines()[1:]
    assert {line.partition(": ")[0] for line in lines} == {str(shards / name) for name in cuts}
    for words in ("was cut short", "ends without its end mark", "is damaged at byte 2048", "unpack it"):
        assert any(words in line for line in lines), words


@settings(max_examples=40)
@given(cut=st.integers(0, 10_240))
@example(cut=6145)  # one byte of the end mark
def test_a_shard_cut_anywhere_is_whole_or_refused(cut: int, tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", *sample("one", 1), *sample("two", 2)).read_bytes()
    end = 6 * 2 * 512  # after it there are only blocks of zeros, one of which is enough
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[:cut])
    if cut >= end + 512:
        source = Shards(str(path), captions=["txt"])
        assert [source.captions(row) for row in range(len(source))] == [["picture one"], ["picture two"]]
    else:
        with pytest.raises(ValueError, match=r"cut\.tar: (is no tar file, or was cut short|ends without|is damaged)"):
            Shards(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "none-*.tar"}, r"none-\*\.tar.* does not exist"),
        ({"files": []}, "files is empty"),
        ({"captions": ["caption"]}, "no sample of .* has caption; members end in json, png, txt"),
        ({"image": "jpg"}, "has jpg; members end in"),
        ({"part": [0, 1e-9]}, r"s-00\.tar \.\.\. has no row in part=\[0, 1e-09\]"),
        ({"labels": ["json:size"]}, "no sample has the label 'json:size'"),
        ({"labels": ["json:tags"]}, r"x/one: the label 'json:tags' is \['a', 'b'\]; a label is a single value"),
        ({"labels": "json:kind"}, r"set a list such as \[json:kind\]"),
        ({"captions": "txt"}, r"set a list such as \[txt\]"),
    ],
)
def test_options_of_shards_are_checked(shards: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shards(**{"files": str(shards / "s-*.tar"), **options})


def test_a_shard_that_changes_while_it_is_read_is_named(shards: Path) -> None:
    source = Shards([str(shards / "s-00.tar"), str(shards / "s-01.tar")], captions=["txt"])
    assert source.captions(0) == ["picture x/one"]
    with (shards / "s-00.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"s-00\.tar has changed while it was read"):
        source.captions(1)
    (shards / "s-01.tar").unlink()
    with pytest.raises(ValueError, match=r"s-01\.tar has gone"):
        source.image(2)


def test_files_expand_in_order(tmp_path: Path) -> None:
    for number in range(8, 12):
        (tmp_path / f"a-{number:02d}.tar").touch()
    expected = [str(tmp_path / f"a-{number:02d}.tar") for number in range(8, 12)]
    assert expand_files([str(tmp_path / "a-{08..11}.tar")]) == expected
    assert expand_files([str(tmp_path / "a-*.tar")]) == expected
    with pytest.raises(ValueError, match=r"a-12\.tar does not exist"):
        expand_files([str(tmp_path / "a-{08..12}.tar")])
    os.mkfifo(tmp_path / "a-12.tar")  # reading it would wait for ever
    with pytest.raises(ValueError, match=r"a-12\.tar does not exist"):
        expand_files([str(tmp_path / "a-*.tar")])


def test_real_shards(root: Path, tmp_path: Path) -> None:
    folder = root.parent / "shared" / "data" / "openclipart"
    if not folder.is_dir():
        pytest.skip("the shards of Open Clip Art are not beside the repository")
    files = str(folder / "train-{00000..00001}.tar")
    source = Shards(files, captions=["txt"], labels=["json:category"], cache_dir=str(tmp_path))
    pack = json.loads((folder / "pack.json").read_text())
    assert len(source) == pack["splits"]["train"]
    assert len(source.attributes["category"].present()) == pack["num_categories"]
    shard, _, name = source.key(1234).partition("/")
    with tarfile.open(folder / shard) as archive:
        text, picture = archive.extractfile(f"{name}.txt"), archive.extractfile(f"{name}.jpg")
        assert text is not None
        assert picture is not None
        assert [text.read().decode().strip()] == source.captions(1234)
        assert picture.read() == source.encoded(1234)


# Mixtures -------------------------------------------------------------------------------------------------------------


# Pictures in Parquet --------------------------------------------------------------------------------------------------


def embedded(path: Path, form: str, pictures: list[bytes | None]) -> Path:
    """A table of pictures that lie in it, ten to a row group."""
    import pyarrow
    import pyarrow.parquet

    if form == "struct":
        column = pyarrow.array([{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(pictures)])
    else:
        column = pyarrow.array(pictures, pyarrow.large_binary() if form == "large" else pyarrow.binary())
    if form == "dictionary":
        column = column.dictionary_encode()
    kinds = [f"kind {row % 2}" for row in range(len(pictures))]
    columns = {"photo": column, "text": [f"number {row}" for row in range(len(pictures))], "kind": kinds}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10)
    return path


@pytest.mark.parametrize("form", ["struct", "bytes", "large", "dictionary"])
def test_parquet_may_hold_the_pictures_themselves(form: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    pictures = [png(row) for row in range(25)]
    path = embedded(tmp_path / "t.parquet", form, [None, b"no \0 picture", *pictures[2:]])
    source = Table(path, image="photo", captions=["text"], labels=["kind"])
    for row in (24, 3, 4, 2, 15, 15, 9, 10):  # forward, backward, over the ends of row groups
        assert source.encoded(row) == pictures[row]
        assert source.image(row).getpixel((0, 0)) == (row, row, row)
        assert source.captions(row) == [f"number {row}"]
    assert source.attributes["kind"][24] == "kind 0"
    assert keys(source)[:2] == ["line 1", "line 2"]
    for row, fault in ((0, "line 1: no picture in column 'photo'"), (1, "line 2: not readable as an image")):
        with pytest.raises(OSError, match=rf"t\.parquet, {fault}"):
            source.image(row)
    assert pickle.loads(pickle.dumps(source)).encoded(7) == pictures[7]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as workers:  # which must not share an open file
        assert list(workers.map(source.encoded, range(2, 25))) == pictures[2:]
    halves = [Table(path, image="photo", captions=["text"], part=part) for part in ([0, 0.5], [0.5, 1])]
    assert sorted(key for half in halves for key in keys(half)) == sorted(keys(source))
    with pytest.raises(ValueError, match="holds pictures, which no path tells apart; set group_by=null"):
        Table(path, image="photo", group_by="image")
    odd = Table(path, image="photo", where={"kind": "kind 1"})
    assert [odd.encoded(row) for row in range(1, 12)] == pictures[3::2]
    with path.open("r+b") as file:
        file.seek(pyarrow.parquet.read_metadata(path).row_group(1).column(0).data_page_offset)
        file.write(b"\xff" * 20)
    damaged = Table(path, image="photo")
    assert damaged.encoded(3) == pictures[3]
    with pytest.raises(OSError, match=r"t\.parquet, line 13: ") as caught:
        damaged.image(12)
    assert len(str(caught.value)) < 500
    assert damaged.encoded(24) == pictures[24]


def test_what_is_no_path_is_told_shortly(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\n" + "x" * 57_000)
    source = Table(tmp_path / "t.csv")
    with pytest.raises(OSError, match=r"line 2 .*a path of 57,000 bytes \('xxx.*; name the column of paths") as caught:
        source.image(0)
    assert len(str(caught.value)) < 300
    embedded(tmp_path / "old.parquet", "bytes", [b"a.png", b"b.png"])  # as old writers store text
    (tmp_path / "b.png").write_bytes(png(7))
    old = Table(tmp_path / "old.parquet", image="photo")
    assert keys(old) == ["a.png", "b.png"]
    assert old.encoded(1) == png(7)


def test_a_mixture_is_its_sources_one_after_the_other(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "p.png").write_bytes(png(9))
    (tmp_path / "f" / "p.txt").write_text("from a folder")
    first = Shards(str(shards / "s-00.tar"), captions=["txt", "json:tags"], labels=["json:kind"])
    emoji = Emoji("val")
    parts = [first, Folder(tmp_path / "f", captions=True), emoji]
    mixture = Mixture(parts, weights=[1, 2, 0.5])
    assert len(mixture) == 3 + len(emoji)
    assert [mixture.key(row) for row in (0, 2, 3)] == ["0:s-00.tar/x/one", "1:p.png", f"2:{emoji.key(0)}"]
    assert mixture.captions(2) == ["from a folder"]
    assert mixture.image(2).getpixel((0, 0)) == (9, 9, 9)
    assert mixture.encoded(3) == emoji.encoded(0)
    assert mixture.caption_weights(0) == [1, 0.5, 0.5]
    assert mixture.caption_weights(2) is None
    assert list(mixture.attributes["kind"])[:4] == ["even", "odd", "", ""]
    assert mixture.attributes["category"][3] == emoji.attributes["category"][0]
    assert mixture.parts == [(2, 1.0), (1, 2.0), (len(emoji), 0.5)]
    for sources, weights in (([], None), (parts, [1, 2]), (parts, [1, 0, 1])):
        with pytest.raises(ValueError, match="one positive weight"):
            Mixture(sources, weights)
