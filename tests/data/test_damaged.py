"""Damaged input of every kind from every source: read rightly, replaced and counted, or refused with one error."""

import csv
import io
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from repr.data.datamodule import DataModule
from repr.data.epoch_order import EpochOrder
from repr.data.samplers import EpochBatchSampler
from repr.data.sources.folder import Folder
from repr.data.sources.mixture import Mixture
from repr.data.sources.shards import Shards
from repr.data.sources.source import Source
from repr.data.sources.table import Table
from repr.data.views import View
from repr.seeds import permute

NUM = 24
SOURCES = ["folder", "csv", "tsv", "jsonl", "parquet", "shards", "mixture"]


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(row: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture that tells its row: the gray level of all of it."""
    return Image.new("RGB", size, (row * 10, row * 10, row * 10))


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (40_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(5001 * 400)))
        + chunk(b"IEND", b"")
    )


def rotated(row: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(plain(row), exif=exif)


# What a picture's file may be. Good ones keep the row's gray level.
GOOD = {
    "wrong extension": lambda row: encoded(plain(row), "PNG"),
    "CMYK": lambda row: encoded(plain(row).convert("CMYK")),
    "16 bit": lambda row: encoded(Image.fromarray(np.full((9, 7), row * 10 * 257, np.uint16)), "PNG"),
    "palette": lambda row: encoded(plain(row).convert("P"), "PNG"),
    "alpha": lambda row: encoded(plain(row).convert("RGBA"), "PNG"),
    "1 x 1": lambda row: encoded(plain(row, (1, 1)), "PNG"),
    "1 x 20000": lambda row: encoded(plain(row, (1, 20_000)), "PNG"),
    "20000 x 1": lambda row: encoded(plain(row, (20_000, 1)), "PNG"),
    "EXIF rotation": rotated,
    "animated": lambda row: encoded(
        plain(row).convert("L"), "GIF", save_all=True, append_images=[plain(row + 1).convert("L")]
    ),
}
BAD = {
    "truncated": lambda row: encoded(plain(row, (64, 64)))[:-300],
    "zero length": lambda row: b"",
    "text": lambda row: b"<html>403 Forbidden</html>",
    "bomb": lambda row: bomb(),
    "flipped bytes": lambda row: encoded(plain(row), "PNG")[:40] + b"\xff" * 20 + encoded(plain(row), "PNG")[60:],
}
GOOD_CAPTIONS = {
    "100 kB": lambda row: f"row {row} ".encode() + b"x" * 100_000,
    "quoted newline": lambda row: f'row {row} says "a,\tb"\r\nrow {row} again'.encode(),
    "accents": lambda row: f"row {row} été 猫".encode(),
}
BAD_CAPTIONS = {"not UTF-8": lambda row: b"row \xff\xfe\xe9", "empty": lambda row: b"", "blank": lambda row: b" \n "}


def write(kind: str, folder: Path, pictures: list[bytes | None], captions: list[bytes]) -> Folder | Table | Shards:
    """A source of these pictures (None: the file is missing) and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "shards":
        with tarfile.open(folder / "a.tar", "w") as archive:
            for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                for ending, data in (("jpg", picture), ("txt", caption)):
                    if data is not None:
                        member = tarfile.TarInfo(f"{row:03d}.{ending}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        return Shards(str(folder / "a.tar"), captions=["txt"])
    for row, picture in enumerate(pictures):
        if picture is not None:
            (folder / f"{row:03d}.jpg").write_bytes(picture)
    names = [f"{row:03d}.jpg" for row in range(len(pictures))]
    if kind == "folder":
        for row, caption in enumerate(captions):
            (folder / f"{row:03d}.txt").write_bytes(caption)
        return Folder(folder, captions=True)
    path = folder / f"table.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        # an Arrow string must be UTF-8, so what is not cannot be there
        texts = [caption.decode("utf-8", "replace") for caption in captions]
        pyarrow.parquet.write_table(pyarrow.table({"image": names, "caption": texts}), path)
    elif kind == "jsonl":
        pairs = zip(names, captions, strict=True)
        rows = [b'{"image": "%s", "caption": "%s"}' % (name.encode(), _escaped(caption)) for name, caption in pairs]
        path.write_bytes(b"\n".join(rows) + b"\n")
    else:
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            texts = [caption.decode("utf-8", "surrogateescape") for caption in captions]
            writer.writerows([("image", "caption"), *zip(names, texts, strict=True)])
    return Table(path, captions=["caption"])


def _escaped(caption: bytes) -> bytes:
    for old, new in ((b"\\", b"\\\\"), (b'"', b'\\"'), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\t", b"\\t")):
        caption = caption.replace(old, new)
    return caption


def tokenize(texts: list[str]) -> torch.Tensor:
    """The number in a text, which says the row; -1 without text."""
    return torch.tensor([[int(text.split()[1]) if text else -1] for text in texts])


def datamodule(source: Source, **options: Any) -> DataModule:
    defaults = {
        "train": source,
        "eval": {"val": source},
        "views": {"main": View(size=8, scale=(0.5, 1))},
        "batch_size": 6,
        "eval_batch_size": 6,
        "image_size": 8,
        "seed": 1,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "tokenizer": tokenize,
        "max_bad_fraction": 1.0,
    }
    return DataModule(**{**defaults, **options})


def gray_levels(images: torch.Tensor) -> list[int]:
    return [round(float(image.float().mean()) / 10) for image in images]


FAULTS = [("picture", name) for name in (*GOOD, *BAD, "gone")]
FAULTS += [("caption", name) for name in (*GOOD_CAPTIONS, *BAD_CAPTIONS)]


@pytest.mark.parametrize("kind", SOURCES)
@settings(max_examples=25)
@given(faults=st.dictionaries(st.integers(0, NUM - 1), st.sampled_from(FAULTS), max_size=NUM // 2))
def test_damage_is_read_rightly_or_replaced_and_counted(kind, faults, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    pictures: list[bytes | None] = [encoded(plain(row)) for row in range(NUM)]
    captions = [b"row %d" % row for row in range(NUM)]
    bad = set()
    for row, (what, name) in faults.items():
        if what == "caption":
            captions[row] = {**GOOD_CAPTIONS, **BAD_CAPTIONS}[name](row)
            if kind == "parquet" and name == "not UTF-8":
                captions[row] = b""
        else:
            pictures[row] = None if name == "gone" else {**GOOD, **BAD}[name](row)
        if name in {*BAD, *BAD_CAPTIONS, "gone"} and not (kind == "folder" and name == "gone"):
            bad.add(row)
    if kind == "mixture":
        half = NUM // 2
        source = Mixture(
            [
                write("folder", folder / "a", [p or b"" for p in pictures[:half]], captions[:half]),
                write("shards", folder / "b", pictures[half:], captions[half:]),
            ]
        )
    elif kind == "folder":
        source = write(kind, folder, [p or b"" for p in pictures], captions)
        bad |= {row for row, picture in enumerate(pictures) if picture is None}
    else:
        source = write(kind, folder, pictures, captions)
    assert len(source) == NUM
    data = datamodule(source)
    loader = data.train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(loader)
    order = permute(torch.arange(NUM), NUM, 1, 0, -1).tolist()
    found: dict[int, str] = {}
    for number, batch in enumerate(batches):
        found |= dict(batch.get("bad", []))
        expected = []
        for place in range(6 * number, 6 * number + 6):  # of four batches: the fourth attempt would be back
            tried = (order[(place + 6 * attempt + attempt // 4) % NUM] for attempt in range(NUM))
            expected.append(next(row for row in tried if row not in bad))
        assert batch["index"].tolist() == expected
        assert batch["text"][:, 0].tolist() == expected
        assert gray_levels(batch["views"][0]) == expected
    assert found.keys() == bad
    for row, reason in found.items():
        assert (f"{row:03d}" if kind != "mixture" else f"{row % (NUM // 2):03d}") in reason
    (val,) = data.val_dataloader()[1:]
    for batch in val:
        rows = zip(batch["index"].tolist(), batch["text"][:, 0].tolist(), batch["image"], strict=True)
        for index, text, image in rows:
            if index < 0:
                assert -1 - index in bad
            else:  # an evaluation set may have rows without text
                assert index not in bad or faults[index][1] in ("empty", "blank", "not UTF-8")
                assert gray_levels(image[None]) == [index]
                assert text == (-1 if index in bad else index)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_replacements_do_not_depend_on_workers_or_ranks(num_workers: int, world_size: int, tmp_path: Path) -> None:
    pictures = [encoded(plain(row, (40, 30))) for row in range(NUM)]
    for row in (3, 4, 11, 17):
        pictures[row] = b""
    captions, half = [b"row %d" % row for row in range(NUM)], NUM // 2
    first = write("folder", tmp_path / "a", pictures[:half], captions[:half])
    source = Mixture([first, write("shards", tmp_path / "b", pictures[half:], captions[half:])], weights=[1.5, 0.5])
    loader = datamodule(source).train_dataloader()
    expected = list(loader)
    ranks = []
    for rank in range(world_size):
        sampler = EpochBatchSampler(EpochOrder(source.parts, 1), 6, rank=rank, world_size=world_size)
        ranks.append(list(DataLoader(loader.dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=dict)))
    for batch, parts in zip(expected, zip(*ranks, strict=True), strict=True):
        for key in ("index", "seed", "boxes", "colour", "text"):
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts])), key
        assert torch.equal(batch["views"][0], torch.cat([part["views"][0] for part in parts]))
        assert dict(batch.get("bad", [])) == {row: why for part in parts for row, why in part.get("bad", [])}
    assert set(dict(pair for batch in expected for pair in batch.get("bad", []))) <= {3, 4, 11, 17}


def test_one_batch_an_epoch_has_stand_ins_too(tmp_path: Path) -> None:
    pictures = [b"" if row in (3, 4) else encoded(plain(row)) for row in range(NUM)]
    source = write("folder", tmp_path, pictures, [b"row %d" % row for row in range(NUM)])
    (batch,) = datamodule(source, batch_size=NUM).train_dataloader()
    order = permute(torch.arange(NUM), NUM, 1, 0, -1).tolist()
    expected = [next(r for r in (order * 2)[place:] if r not in (3, 4)) for place in range(NUM)]
    assert batch["index"].tolist() == expected
    assert dict(batch["bad"]).keys() == {3, 4}


@pytest.mark.parametrize("num_bad", [1, 2, NUM])
def test_the_run_ends_once_more_are_bad_than_allowed(
    num_bad: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [b"" if row < num_bad else encoded(plain(row)) for row in range(NUM)]
    data = datamodule(write("folder", tmp_path, pictures, [b"row 1"] * NUM), max_bad_fraction=1 / NUM)

    def epoch() -> None:
        for batch in data.train_dataloader():
            moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
            assert "bad" not in moved

    if num_bad == 1:
        epoch(), epoch()
        assert list(data.bad["train"]) == [0]
        assert [record.message.partition(" (")[0] for record in caplog.records] == ["train: sample 0 replaced"]
        assert str(tmp_path / "000.jpg") in caplog.text
        assert data.state_dict()["bad"] == data.bad
    else:
        with pytest.raises(
            ValueError, match=rf"of {NUM} samples of train cannot be read, more than data\.max_bad_frac"
        ):
            epoch()


def test_a_state_carries_what_was_found_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [b"" if row < 2 else encoded(plain(row)) for row in range(NUM)]
    source = write("folder", tmp_path, pictures, [b"row 1"] * NUM)
    first = datamodule(source, max_bad_fraction=0.1)
    for batch in first.train_dataloader():
        first.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    second = datamodule(source, max_bad_fraction=0.1)
    second.load_state_dict(first.state_dict())
    caplog.clear()
    for batch in second.train_dataloader():
        second.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert second.bad == first.bad
    assert not caplog.records
