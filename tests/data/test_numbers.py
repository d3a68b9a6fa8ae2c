"""Blocks of numbers, drawn ones, noisy pairs, and pairs that have a label too."""

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from repr.data.datamodule import DataModule
from repr.data.drawn.tables import DrawnTables
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.mixture import Mixture
from repr.data.sources.noisy import Noisy
from repr.data.sources.numeric_tables import NumericTables
from repr.data.sources.shards import Shards
from repr.data.sources.table import Table
from repr.data.views import View

OPTIONS = {"batch_size": 4, "eval_batch_size": 4, "image_size": 16, "seed": 0, "mean": (0, 0, 0), "std": (1, 1, 1)}


def write(folder: Path, **files: str) -> dict[str, str]:
    """CSV files, lines separated by |."""
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text.replace("|", "\n"))
    return {name: str(folder / f"{name}.csv") for name in files}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write(
        tmp_path,
        rna="id,g1,g2|a,0,1|b,2,1|c,4,1|d,8,5|e,1,1",
        dna="s1,id,s2,s3|1,e,1,1|2e-1,d,.5,-1|0.3,c,1,1|0.4,b,1,1|1.5,a,1,1",  # the key anywhere, rows in any order
        labels="id,kind,split|a,x,train|b,y,train|c,,train|d,y,val|e,x,train",
    )


def make(files: dict[str, str], **options: object) -> NumericTables:
    blocks = {name: files[name] for name in files if name != "labels"}
    return NumericTables(blocks, **{"key": "id", "labels": files["labels"], "attributes": ["kind"]} | options)


def test_files_are_joined_by_the_key(files: dict[str, str]) -> None:
    source = make(files)
    assert [source.key(row) for row in range(len(source))] == list("abcde")
    assert list(source.attributes["kind"]) == ["x", "y", "", "y", "x"]
    assert source.columns == {"rna": ["g1", "g2"], "dna": ["s1", "s2", "s3"]}
    np.testing.assert_allclose(source.tables["dna"][:, 0], [1.5, 0.4, 0.3, 0.2, 1])
    assert source.tables["rna"].dtype == np.float32
    val = make(files, where={"split": "val"})
    assert [val.key(0), len(val)] == ["d", 1]
    np.testing.assert_allclose(val.tables["dna"], [[0.2, 0.5, -1]])
    parts = [make(files, part=part) for part in ([0, 0.5], [0.5, 1])]
    assert sorted(part.key(row) for part in parts for row in range(len(part))) == list("abcde")
    assert len(NumericTables({"rna": files["rna"]}, key="id")) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rna": "id,g1,g2|a,0,1|b,2,one|c,4,1|d,8,5|e,1,1"}, "rna.csv, row 'b', column 'g2' holds 'one'"),
        ({"rna": "id,g1,g2|a,0,1|b,,1|c,4,1|d,8,5|e,1,1"}, "rna.csv, row 'b', column 'g1' is empty"),
        ({"rna": "id,g1,g2|a,nan,1|b,2,1|c,4,1|d,8,5|e,1,1"}, "row 'a', column 'g1' holds 'nan'"),
        ({"rna": "id,g1,g2|a,0,1|b,2,1|c,1e99,1|d,8,5|e,1,1"}, "row 'c', column 'g1' holds '1e99'"),
        ({"rna": "id,g1,g2|a,0,1|b,2,1|c,4,1|d,8,5"}, "rna.csv lacks the row 'e' of"),
        ({"rna": "id,g1,g2|a,0,1|b,2,1|c,4,1|d,8,5|e,1,1|f,1,1"}, "labels.csv lacks the row 'f' of"),
        ({"rna": "id,g1,g2|a,0,1|b,2,1|a,4,1|d,8,5|e,1,1"}, "line 4: the row 'a' is there twice"),
        ({"rna": "id,g1,g2|a,0,1|b,2|c,4,1|d,8,5|e,1,1"}, "rna.csv, line 3: 2 cells, but the header has 3"),
        ({"rna": "name,g1,g2|a,0,1"}, "rna.csv has no column 'id'"),
        ({"rna": "id,g1,g1|a,0,1"}, "two columns of one name"),
        ({"rna": "id,g1,g2"}, "rna.csv has no row"),
    ],
)
def test_a_table_that_does_not_fit_is_one_error(
    change: dict[str, str], words: str, files: dict[str, str], tmp_path: Path
) -> None:
    write(tmp_path, **change)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        make(files)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attributes": ["sort"]}, "labels.csv has no column 'sort'; it has 'kind', 'split'"),
        ({"attributes": "kind"}, "set a list such as [kind]"),
        ({"labels": None}, "columns of the file `labels`; set it"),
        ({"labels": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"labels": "labels.xls"}, "labels.xls is of no known kind"),
        ({"where": {"split": "test"}}, "has no row where {'split': 'test'}"),
        ({"part": [0, 1e-9]}, "has no row in part=[0, 1e-09]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, words: str, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make(files, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_hold_the_blocks_scaled_by_the_training_set(num_workers: int, files: dict[str, str]) -> None:
    sets = {"train": make(files, where={"split": "train"}), "eval": {"val": make(files, where={"split": "val"})}}
    data = DataModule(**sets, views={}, min_max=True, num_workers=num_workers, **OPTIONS)
    (batch,) = data.train_dataloader()
    assert batch.keys() == {"index", "seed", "tables", "label"}
    assert [table.shape for table in batch["tables"]] == [(4, 2), (4, 3)]
    order = batch["index"].argsort()
    torch.testing.assert_close(batch["tables"][0][order], torch.tensor([[0, 0], [0.5, 0], [1, 0], [0.25, 0]]))
    bank, (val,) = (list(loader) for loader in data.val_dataloader())
    assert bank[0].keys() == val.keys() == {"index", "tables", "label"}
    torch.testing.assert_close(
        val["tables"][0], torch.tensor([[2.0, 0]])
    )  # 0: constant in training; 2: beyond its range
    raw = DataModule(**sets, views={}, **OPTIONS)
    torch.testing.assert_close(raw.tables["val"]["rna"], torch.tensor([[8.0, 5]]))


def test_sets_with_other_blocks_are_refused(files: dict[str, str]) -> None:
    train = make(files)
    other = make({key: files[key] for key in ("dna", "labels")})
    with pytest.raises(ValueError, match=r"data.eval.val has blocks of numbers dna \(3 columns\), and data.train rna"):
        DataModule(train=train, eval={"val": other}, views={}, **OPTIONS)
    renamed = make(files)
    renamed.columns = renamed.columns | {"rna": ["g2", "g1"]}
    with pytest.raises(ValueError, match=r"the column 'g2' stands where data\.train has 'g1'"):
        DataModule(train=train, eval={"val": renamed}, views={}, **OPTIONS)
    renamed.columns = {}  # a source need not name its columns
    DataModule(train=train, eval={"val": renamed}, views={}, **OPTIONS)
    with pytest.raises(ValueError, match=r"data.train \(NumericTables\) has no pictures: set views=none"):
        DataModule(train=train, eval={}, views={"main": View(size=16, scale=(1, 1))}, **OPTIONS)


def test_drawn_tables_are_functions_of_seed_and_row() -> None:
    a, longer, val = (DrawnTables(split, num_rows=n) for split, n in (("train", 50), ("train", 80), ("val", 50)))
    for name, table in a.tables.items():
        assert table.shape == (50, 200)
        assert not np.allclose(table, val.tables[name])
        both = np.corrcoef(table.ravel(), longer.tables[name][:50].ravel())  # the signal's scale is that of all rows
        assert both[0, 1] > 0.999
    assert sorted(set(a.attributes["class"])) == [f"class {i}" for i in range(5)]
    for options in ({"split": "test"}, {"num_rows": 0}, {"widths": []}, {"num_classes": 1}):
        with pytest.raises(ValueError, match="DrawnTables: "):
            DrawnTables(**{"split": "train", "num_rows": 4} | options)


def test_noise_is_a_function_of_seed_and_row_and_in_one_modality_alone() -> None:
    plain = Emoji("val")
    noisy, again, other = (Noisy(plain, pictures=0.3, captions=0.5, strength=0.8, seed=seed) for seed in (0, 0, 1))
    rows = range(200)
    pictures = [noisy.image(row).tobytes() != plain.image(row).tobytes() for row in rows]
    captions = [noisy.captions(row) != plain.captions(row) for row in rows]
    assert not any(a and b for a, b in zip(pictures, captions, strict=True))
    assert sum(pictures) == pytest.approx(60, abs=20)
    assert sum(captions) == pytest.approx(100, abs=30)  # less those in which no word was exchanged
    for row in reversed(rows):
        assert again.image(row).tobytes() == noisy.image(row).tobytes()
        assert again.captions(row) == noisy.captions(row)
        assert len(noisy.captions(row)[0].split()) == len(plain.captions(row)[0].split())
    assert any(other.captions(row) != noisy.captions(row) for row in rows)
    with pytest.raises(ValueError, match="together at most 1"):
        Noisy(plain, pictures=0.6, captions=0.6, strength=1, seed=0)


def test_pairs_of_every_source_come_with_their_label(tmp_path: Path) -> None:
    emoji, rows = Emoji("val"), ["image,title,kind"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row in range(0, 160, 20):
            kind, title = emoji.attributes["category"][row].replace(" ", "_"), emoji.captions(row)[0]
            path = tmp_path / "IMAGES" / kind / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            emoji.image(row).save(path)
            path.with_suffix(".txt").write_text(title)
            rows.append(f'{path},"{title}",{kind}')
            for ending, content in (
                ("webp", emoji.encoded(row)),
                ("json", json.dumps({"title": title, "kind": kind}).encode()),
            ):
                member = tarfile.TarInfo(f"{row}.{ending}")
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    (tmp_path / "table.csv").write_text("\n".join(rows))
    folder = Folder(tmp_path / "IMAGES", captions=True, labels=True)
    table = Table(tmp_path / "table.csv", captions=["title"], labels=["kind"])
    shards = Shards(str(tmp_path / "a.tar"), captions=["json:title"], labels=["json:kind"])
    mixture, noisy = (
        Mixture([table, Table(tmp_path / "table.csv", captions=["title"], labels=["kind"])]),
        Noisy(table, pictures=0.5, captions=0.5, strength=0.5, seed=0),
    )
    for source in (emoji, folder, table, shards, mixture, noisy):
        views = {"main": View(size=16, scale=(1.0, 1.0))}
        data = DataModule(
            train=source,
            eval={},
            views=views,
            tokenizer=lambda texts: torch.tensor([[len(t)] for t in texts]),
            **OPTIONS,
        )
        batch = next(iter(data.train_dataloader()))
        name = next(iter(data.attributes))
        for row, text, label in zip(batch["index"].tolist(), batch["text"], batch["label"], strict=True):
            assert text.item() == len(source.captions(row)[0])
            assert data.attributes[name][label[0]] == source.attributes[name][row]
