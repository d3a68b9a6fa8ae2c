"""Sources written as shards: what is read back, real kills, and what is refused."""

import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.shards import Shards
from tools.make_shards import MANIFEST, main, make_shards, member_name

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*use of fork")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """47 pictures with no, one or two captions, odd names (dots, spaces, very long, the same stem), two damaged."""
    root, source = tmp_path_factory.mktemp("make_shards") / "IMAGES", Emoji("val")
    for i in range(44):
        path = root / f"v1.{i % 3}" / f"{i:02d} a.b {'é' * (i % 2)}.{('png', 'jpg', 'webp', 'gif')[i % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(20 * i).resize((50 + i, 90 - i)).save(path)
        texts = ["", f"picture {i}", f"picture {i}\nbild {i} – ganz nah"][i % 3]
        path.with_suffix(".txt").write_text(texts, encoding="utf-8")
    deep = root / "v1.3" / ("folder " * 20) / ("of a name " * 15)
    deep.mkdir(parents=True)
    source.image(9).save(deep / "long.png")
    (deep / "long.txt").write_text("too long for the old tar format")
    for name in ("twin.png", "twin.jpg"):
        source.image(5).save(root / name)
    (root / "twin.txt").write_text("twins")
    damaged = root / "v1.1" / "01 a.b é.jpg"
    damaged.write_bytes(damaged.read_bytes()[:700])
    (root / "v1.2" / "05 a.b é.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def source(pictures: Path) -> Folder:
    return Folder(pictures, captions=True, labels=True)


@pytest.fixture(scope="module")
def whole(pictures: Path) -> Path:
    """The shards of a run that nothing interrupts, by the command line."""
    out = pictures.parent / "whole"
    overrides = ["data=folder", f"data.train.root={pictures}", "data.train.captions=true", "data.train.labels=true"]
    main([*overrides, "--out", str(out), "--rows-per-shard", "10"])
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Shards and their sums."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar" or path.suffix == ""}


def good_rows(source: Folder) -> list[int]:
    return [row for row in range(len(source)) if source.key(row)[5:7] not in ("01", "05")]


def test_webdataset_reads_back_what_went_in(source: Folder, whole: Path) -> None:
    files = sorted(map(str, whole.glob("*.tar")))
    assert len(files) == 5
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    rows = good_rows(source)
    assert len(samples) == len(rows) == 45
    assert len({sample["__key__"] for sample in samples}) == 45
    kinds = {"jpg", "png", "webp", "gif"}
    for row, sample in zip(rows, samples, strict=True):
        (kind,) = kinds & sample.keys()
        assert source.key(row).endswith(kind)
        assert sample[kind] == source.encoded(row)
        facts = json.loads(sample["json"]) if "json" in sample else {}
        texts = [sample["txt"].decode()] if "txt" in sample else facts.pop("captions", [])
        assert texts == source.captions(row)
        assert facts == ({"label": source.attributes["label"][row]} if source.attributes["label"][row] else {})
    assert Path(samples[0]["__url__"]).name == "train-00000.tar"
    assert sum(sample["__url__"] == samples[0]["__url__"] for sample in samples) == 10


def test_our_own_reader_too(source: Folder, whole: Path) -> None:
    shards = Shards(f"{whole}/train-*.tar", captions=["txt", "json:captions"], labels=["json:label"])
    for position, row in enumerate(good_rows(source)):
        assert shards.encoded(position) == source.encoded(row)
        assert shards.captions(position) == source.captions(row)
        assert shards.attributes["label"][position] == source.attributes["label"][row]


def test_sums_and_what_was_left_out(source: Folder, whole: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=whole, check=True, capture_output=True)
    lines = [line.split("\t") for line in (whole / "unreadable.tsv").read_text().splitlines()]
    assert [key for key, _ in lines] == ["v1.1/01 a.b é.jpg", "v1.2/05 a.b é.jpg"]
    assert all(f"{source.root}/{key}" in reason for key, reason in lines)


class Deadly(Folder):
    """Kills its process (and the one that started it, where that is a loader's worker) at the n-th picture decoded."""

    def __init__(self, root: Path, row: int, first: int) -> None:
        super().__init__(root, captions=True, labels=True)
        self.row, self.first = row, first

    def image(self, index: int) -> Image.Image:
        if index == self.row:
            if os.getpid() != self.first:
                os.kill(self.first, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def doomed(root: Path, out: Path, row: int, workers: int) -> None:
    make_shards(Deadly(root, row, os.getpid()), out, rows_per_shard=10, workers=workers)


@pytest.mark.parametrize(("rows", "workers"), [((3,), 0), ((29, 30), 0), ((11, 25, 45), 2)])
def test_killed_and_resumed_runs_write_the_same_bytes(
    rows: tuple[int, ...], workers: int, source: Folder, whole: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "download.part"
    strange.write_text("of another program")
    for row in rows:
        process = multiprocessing.get_context("fork").Process(target=doomed, args=(source.root, tmp_path, row, workers))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert workers or not (tmp_path / f"train-{row // 10:05d}.tar").exists()
    told: list[str] = []
    make_shards(source, tmp_path, rows_per_shard=10, workers=2 - workers, tell=told.append)
    strange.unlink()
    assert contents(tmp_path) == contents(whole)
    if workers == 0:
        written = [line.partition(":")[0] for line in told if ".tar" in line]
        assert written == [f"train-{number:05d}.tar" for number in range(max(rows) // 10, 5)]


def test_killed_as_soon_as_a_shard_is_there(source: Folder, whole: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=doomed, args=(source.root, tmp_path, -1, 0))
    process.start()
    while not list(tmp_path.glob("train-*.tar")):
        process.join(timeout=0.001)
    process.kill()
    process.join()
    make_shards(source, tmp_path, rows_per_shard=10)
    assert contents(tmp_path) == contents(whole)


def cramped(root: Path, out: Path) -> None:
    """Files may not grow beyond 30 kB, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    overrides = ["data=folder", f"data.train.root={root}", "data.train.captions=true", "data.train.labels=true"]
    main([*overrides, "--out", str(out), "--rows-per-shard", "10"])


def test_a_full_disk_is_one_error_and_nothing_is_lost(
    source: Folder, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=cramped, args=(source.root, out))
    process.start()
    process.join()
    assert process.exitcode == 1
    error = capfd.readouterr().err.strip()
    assert error.startswith(f"error: {out}")
    assert "cannot be written (File too large); what was saved before is kept" in error
    assert not list(out.glob("*.tar")) + list(out.glob(".*"))
    make_shards(source, out, rows_per_shard=10)
    assert contents(out) == contents(whole)


def test_a_shard_cut_short_is_written_again(source: Folder, whole: Path, tmp_path: Path) -> None:
    make_shards(source, tmp_path, rows_per_shard=10)
    (tmp_path / "train-00002.tar").write_bytes(b"short")
    (tmp_path / "train-00003.tar").unlink()
    told: list[str] = []
    make_shards(source, tmp_path, rows_per_shard=10, tell=told.append)
    assert [line.partition(":")[0] for line in told[1:]] == ["train-00002.tar", "train-00003.tar"]
    assert contents(tmp_path) == contents(whole)


def test_a_shard_without_readable_rows_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "IMAGES"
    root.mkdir()
    for i in range(6):
        Image.new("RGB", (9, 9)).save(root / f"{i}.png")
    for i in (2, 3):
        (root / f"{i}.png").write_bytes(b"no picture")
    done = make_shards(Folder(root), tmp_path / "out", rows_per_shard=2)
    assert [done[name]["samples"] for name in sorted(done)] == [2, 0, 2]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["train-00000.tar", "train-00002.tar"]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    told: list[str] = []
    make_shards(Folder(root), tmp_path / "out", rows_per_shard=2, tell=told.append)
    assert told == ["3 of 3 shards are there already"]


def test_smaller_pictures(tmp_path: Path) -> None:
    """Only those that are too large are touched; the orientation in EXIF is applied."""
    root = tmp_path / "IMAGES"
    root.mkdir()
    picture = Image.linear_gradient("L").convert("RGB").resize((300, 100))
    for name in ("photo.jpg", "drawing.png", "web.webp", "old.bmp", "scan.tiff"):
        picture.save(root / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(root / "turned.jpg", exif=exif)
    Image.new("RGB", (60, 20)).save(root / "small.jpg", exif=exif)
    make_shards(Folder(root), tmp_path / "out", max_side=120, quality=80)
    samples = {
        s["__key__"]: s for s in webdataset.WebDataset(str(tmp_path / "out/train-00000.tar"), shardshuffle=False)
    }
    expected = {
        "photo": ("jpg", (120, 40)), "drawing": ("png", (120, 40)), "web": ("webp", (120, 40)),
        "old": ("png", (120, 40)), "scan": ("png", (120, 40)), "turned": ("jpg", (40, 120)),
    }  # fmt: skip
    for name, (kind, size) in expected.items():
        with Image.open(io.BytesIO(samples[name][kind])) as image:
            assert image.size == size
            assert image.getexif().get(0x0112, 1) == 1
    assert samples["small"]["jpg"] == (root / "small.jpg").read_bytes()
    again = make_shards(Folder(root), tmp_path / "again", max_side=120, quality=40)["train-00000.tar"]
    assert again["bytes"] <= (tmp_path / "out/train-00000.tar").stat().st_size


def test_what_has_changed_is_told_and_nothing_is_touched(source: Folder, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    for options, message in (
        ({"rows_per_shard": 20}, "--rows-per-shard was 10"),
        ({"rows_per_shard": 10, "max_side": 64, "quality": 90}, "--max-side was None"),
        ({"rows_per_shard": 10, "name": "val"}, "--set was train"),
    ):
        with pytest.raises(ValueError, match=message):
            make_shards(source, whole, **options)
    with pytest.raises(ValueError, match="the source has changed"):
        make_shards(Folder(source.root, captions=True), whole, rows_per_shard=10)
    assert contents(whole) == before
    stranger = tmp_path / "strange"
    stranger.mkdir()
    (stranger / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mine\.tar is not of this program's making"):
        make_shards(source, stranger)
    assert not (stranger / MANIFEST).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=folder", "data.train.root=nowhere"], "'nowhere' does not exist"),
        (["--rows-per-shard", "0"], "--rows-per-shard 0; set it to 1 or more"),
        (["--quality", "80"], "set --max-side too"),
        (["--set", "vall"], "there is no such set; choose one of test_style, train, val"),
        (["optim.lrr=3"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert str(stop.value.code).startswith("error: ")
    assert message in str(stop.value.code)
    assert "\n" not in str(stop.value.code)
    assert not (tmp_path / "out").exists()


@given(st.text(max_size=40), st.sampled_from(["jpg", "json", "txt"]))
def test_any_key_gives_a_name_that_webdataset_takes_apart_rightly(key: str, kind: str) -> None:
    name = member_name(key)
    assert base_plus_ext(f"{name}.{kind}") == (name, kind)
    assert not name.startswith(("/", "__"))
    assert not {"", ".", ".."} & set(name.split("/"))
    assert "~" not in name
    name.encode()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cats/a.jpg", "cats/a"),
        ("v1.0/a.b.JPEG", "v1.0/a_b"),
        ("/root/../a.png", "root/a"),
        (".hidden", "_hidden"),
        ("__meta__/x.jpg", "_meta__/x"),
        ("a~1.jpg", "a_1"),
        ("line\nbreak", "line_break"),
        ("", "_"),
    ],
)
def test_names(key: str, name: str) -> None:
    assert member_name(key) == name
