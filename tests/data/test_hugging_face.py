"""Data sets of the library datasets, made here: what is read of them, and what is refused."""

import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from repr.config import compose
from repr.data.sources.hugging_face import HuggingFace
from repr.runs.trust import check_trusted

NUM = 12


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def large_jpeg() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((320, 240)).save(file, "JPEG")
    return file.getvalue()


PICTURES = [b"no picture", *map(png, range(1, NUM - 1)), large_jpeg()]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`saved`, `splits`, and `parquet` of two files."""
    folder = tmp_path_factory.mktemp("sets")
    outside = folder / "outside.png"
    outside.write_bytes(png(99))
    stored: list[Any] = [{"bytes": data, "path": "one name.png"} for data in PICTURES]
    kinds = {
        "image": datasets.Image(), "file": Value("binary"), "text": Value("string"), "more": List(Value("string")),
        "kind": ClassLabel(names=["cat", "dog"]), "word": Value("string"), "number": Value("float32"),
        "record": List({"raw": Value("string")}), "row": Value("float64"),
    }  # fmt: skip
    columns = {
        "image": stored, "file": [None, *PICTURES[1:]], "text": [f"number {row}" for row in range(NUM)],
        "more": [["a", "", f"b {row}"] for row in range(NUM)], "kind": [None, *(row % 2 for row in range(1, NUM))],
        "word": [" fox ", None, *["owl"] * (NUM - 2)], "number": [0.5] * NUM, "record": [[{"raw": "x"}]] * NUM,
        "row": [float(row) for row in range(NUM)],
    }  # fmt: skip
    data = Dataset.from_dict(columns, features=Features(kinds))
    data.save_to_disk(folder / "saved")
    shuffled = data.select(list(range(NUM))[::-1])
    DatasetDict({"train": data, "test": shuffled}).save_to_disk(folder / "splits")
    (folder / "parquet").mkdir()
    for part in range(2):
        data.shard(2, part, contiguous=True).to_parquet(folder / f"parquet/train-0000{part}-of-00002.parquet")
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    points_to = [{"path": str(outside)}, {"path": str(folder / "gone.png")}]
    table = pyarrow.table({"image": pyarrow.array(points_to, struct)})
    pyarrow.parquet.write_table(table, folder / "points.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["saved", "splits", "parquet"])
def test_rows_of_a_data_set(name: str, sets: Path) -> None:
    captions, weights = ["text", "more"], [3.0, 1.0]
    source = HuggingFace(str(sets / name), captions=captions, caption_weights=weights, labels=["kind", "word"])
    assert len(source) == NUM
    assert [source.key(row) for row in (0, 11)] == ["row 0", "row 11"]
    assert source.captions(7) == ["number 7", "a", "b 7"]
    assert source.caption_weights(7) == [3, 0.5, 0.5]
    assert list(source.attributes["kind"])[:4] == ["", "dog", "cat", "dog"]
    assert list(source.attributes["word"])[:3] == ["fox", "", "owl"]
    for row in (7, 1, 11):
        assert source.encoded(row) == PICTURES[row]
    assert source.image(7).getpixel((0, 0)) == (7, 7, 7)
    assert source.reduced(11, lambda width, height: 4).size == (80, 60)
    with pytest.raises(OSError, match=rf"{name}, row 0: not readable as an image"):
        source.image(0)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.encoded(9), copy.captions(9)) == (PICTURES[9], ["number 9", "a", "b 9"])
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as workers:
        assert list(workers.map(source.encoded, range(NUM))) == PICTURES


def test_other_columns_splits_and_parts(sets: Path) -> None:
    source = HuggingFace(str(sets / "splits"), split="test", image="file", captions=["text"])
    assert source.captions(0) == ["number 11"]
    assert source.encoded(3) == PICTURES[8]
    with pytest.raises(OSError, match=r"splits, row 11: no picture in column 'file'"):
        source.encoded(11)
    halves = [HuggingFace(str(sets / "saved"), part=part, labels=["kind"]) for part in ([0, 0.5], [0.5, 1])]
    found = {
        half.key(row): (half.encoded(row), half.attributes["kind"][row]) for half in halves for row in range(len(half))
    }
    assert found == {f"row {row}": (data, ["cat", "dog"][row % 2] if row else "") for row, data in enumerate(PICTURES)}
    assert len(HuggingFace(str(sets / "parquet"), split="train[:25%]")) == NUM // 4
    points = HuggingFace(str(sets / "points.parquet"))
    assert points.encoded(0) == png(99)
    with pytest.raises(OSError, match=r"gone\.png: not readable as an image"):
        points.encoded(1)


def test_rows_are_chosen_and_weighed_by_their_columns(sets: Path) -> None:
    dogs = HuggingFace(str(sets / "parquet"), where={"kind": "dog", "row": ">=4"}, weights="row", labels=["kind"])
    assert [dogs.key(row) for row in range(len(dogs))] == ["row 5", "row 7", "row 9", "row 11"]
    assert dogs.row_weights is not None
    assert dogs.row_weights.tolist() == [5, 7, 9, 11]
    assert dogs.encoded(1) == PICTURES[7]
    assert list(dogs.attributes) == ["kind"]
    owls = HuggingFace(str(sets / "saved"), where={"word": ["fox", "!=owl"]}, part=[0, 1])
    assert [owls.key(row) for row in range(len(owls))] == ["row 0"]
    assert owls.row_weights is None


REFUSED = [
    ({"path": "saved", "where": {"row": ">11"}}, r"saved has no row where \{'row': '>11'\}"),
    ({"path": "saved", "where": {"rows": 1}}, "has no column 'rows'; it has"),
    ({"path": "saved", "weights": "kind"}, "saved: the weight '.*' in column 'kind' is no number from 0 on"),
    ({"path": "saved", "image": "photo"}, "has no column 'photo'; it has .*'image'"),
    ({"path": "saved", "image": "text"}, "column 'text' of .* is string; set image to"),
    ({"path": "saved", "image": "record"}, "column 'record' of .* is list<.*; set image to"),
    ({"path": "saved", "captions": "text"}, r"captions='text'; set a list"),
    ({"path": "saved", "captions": ["record"]}, "column 'record' of .*; a caption is text or a list"),
    ({"path": "saved", "captions": ["file"]}, "column 'file' of .*; a caption is text or a list"),
    ({"path": "saved", "labels": ["more"]}, "label 'more' is .*; a label is a single value"),
    ({"path": "splits", "split": "val"}, r"no split 'val'; set split to one of \['train', 'test'\]"),
    ({"path": "parquet", "split": "val"}, r"Unknown split \"val\". Should be one of \['train'\]"),
    ({"path": "parquet", "subset": "a"}, "is on the disk, so subset and revision mean nothing"),
    ({"path": "nowhere/at/all"}, "does not exist; set it to a folder, or to owner/name"),
    ({"path": ""}, "no folder of save_to_disk, and no .parquet below it"),
    ({"path": "damaged.parquet"}, "damaged.parquet cannot be read: "),
]


@pytest.mark.parametrize(("options", "fault"), REFUSED)
def test_what_is_refused(options: dict[str, Any], fault: str, sets: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    path = sets / options["path"] if options["path"] else tmp_path / "empty"
    path = tmp_path / path.name if path.name == "damaged.parquet" else path
    with pytest.raises(ValueError, match=fault) as caught:
        HuggingFace(**{**options, "path": str(path)})
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_a_name_of_the_hub_without_a_network_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"owner/name cannot be read: no such path here, and on the hub: ") as caught:
        HuggingFace("owner/name")
    assert "\n" not in str(caught.value)


def test_the_config_names_it_and_a_strangers_may() -> None:
    cfg = compose(["data=hf", "data.train.path=FOLDER"])
    assert cfg.data.train.split == "train"
    check_trusted(cfg, "a config", ["data"])
