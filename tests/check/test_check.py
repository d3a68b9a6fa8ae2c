import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from repr.check.__main__ import main
from repr.check.contact_sheet import HEAD, MARGIN, TEXT, choose_font, contact_sheet, shorten, wrap
from repr.check.facts import check_data, equal_groups
from repr.data.colour import colour_views
from repr.data.sources.emoji import Emoji

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

LONG = "a caption that is much longer than the sixteen tokens which the small text tower of the demo reads at most"


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """44 pictures of several formats and modes: three are copies, two damaged; and an evaluation set that leaks."""
    root, source = tmp_path_factory.mktemp("check") / "train", Emoji("train")
    for i in range(40):
        folder = root / ("cats", "dogs", "birds")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        suffix, mode = [("jpg", "RGB"), ("png", "RGBA"), ("jpg", "CMYK"), ("webp", "RGB")][i % 4]
        path = folder / f"[red]{i:02d}.{suffix}"
        source.image(50 * i).resize((30 + i, 90 - i)).convert(mode).save(path)
        path.with_suffix(".txt").write_text({5: LONG, 7: "", 9: "日本語"}.get(i, f"[bold]picture {i % 10}"))
    for n in range(3):
        shutil.copy(root / "cats" / "[red]00.jpg", root / f"copy{n}.jpg")
        (root / f"copy{n}.txt").write_text("a copy")
    data = (root / "cats" / "[red]06.jpg").read_bytes()
    (root / "cats" / "[red]06.jpg").write_bytes(data[: len(data) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "empty.txt").write_text("nothing")
    held_out = root.parent / "held_out" / "whales"
    held_out.mkdir(parents=True)
    shutil.copy(root / "dogs" / "[red]01.png", held_out / "seen.png")
    source.image(7).save(held_out / "new.png")
    return root.parent


def overrides(folder, *more):
    sets = ["data=folder", f"data.train.root={folder}/train", "data.train.captions=true", "data.train.labels=true"]
    sets += ["eval=default", "+data.eval.held_out._target_=repr.data.sources.folder.Folder"]
    sets += [f"+data.eval.held_out.root={folder}/held_out", "+data.eval.held_out.labels=true"]
    return [*sets, "data.num_workers=2", *more]


def run(capsys, *arguments):
    """Exit status, standard output, and what was said on leaving."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, capsys.readouterr().out


@pytest.fixture(scope="module")
def checked(messy):
    """Exit status and report of a check by two worker processes."""
    with pytest.raises(SystemExit) as stop:
        main(overrides(messy, "--out", str(messy / "out")))
    return stop.value.code, json.loads((messy / "out" / "check.json").read_text())


def readable(messy):
    files = sorted((path for path in (messy / "train").rglob("*.*") if path.suffix != ".txt"), key=str)
    return [path for path in files if path.name not in ("[red]06.jpg", "empty.png")]


def test_sizes_formats_and_modes(messy, checked):
    _, report = checked
    train = report["sets"]["train"]
    assert (train["rows"], train["read"], report["sets"]["held_out"]["rows"]) == (44, 44, 2)
    pictures = [Image.open(path) for path in readable(messy)]
    for name, values in (("width", [p.width for p in pictures]), ("height", [p.height for p in pictures])):
        assert train[name] == {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    assert train["formats"] == Counter(picture.format for picture in pictures)
    assert train["modes"] == Counter(picture.mode for picture in pictures)
    assert set(train["modes"]) == {"RGB", "RGBA", "CMYK"}


def test_unreadable_rows_are_named_and_count(messy, checked):
    status, report = checked
    faults = {fault["key"]: fault["reason"] for fault in report["sets"]["train"]["unreadable"]}
    assert faults.keys() == {"cats/[red]06.jpg", "empty.png"}
    assert all(str(messy / "train" / key) in reason for key, reason in faults.items())
    assert status == 1
    # one more has no caption, which training needs
    assert report["too_many_bad"] == [
        "train: 3 of 44 rows cannot be used, more than data.max_bad_fraction=0.01 allows; mend or remove them"
    ]


def test_duplicates_within_a_set_and_across_sets(messy, checked):
    _, report = checked
    groups = {}
    for path in readable(messy):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        groups.setdefault(digest, []).append(path.relative_to(messy / "train").as_posix())
    (expected,) = (group for group in groups.values() if len(group) > 1)
    found = report["sets"]["train"]["duplicates"]
    assert (found["groups"], found["surplus"]) == (1, 3)
    assert sorted(found["keys"][0]) == sorted(expected)
    assert report["leakage"] == {
        "held_out": {"rows": 1, "keys": [{"train": ["dogs/[red]01.png"], "set": ["whales/seen.png"]}]}
    }


def test_captions(messy, checked):
    _, report = checked
    captions = report["sets"]["train"]["captions"]
    assert captions["captions"] == 41
    assert captions["keys_without"] == ["dogs/[red]07.webp"]
    assert captions["characters"] == {"min": 3, "median": 15.0, "max": len(LONG)}
    assert captions["words"] == {"min": 1, "median": 2.0, "max": 21}
    assert (captions["context_length"], captions["cut"]) == (16, 1)
    assert captions["cut_share"] == pytest.approx(1 / 41)
    texts = Counter(path.with_suffix(".txt").read_text() for path in readable(messy)) - Counter([""])
    assert captions["distinct"] == len(texts)
    assert captions["frequent"] == [{"caption": text, "count": num} for text, num in texts.most_common(10)]
    assert report["sets"]["held_out"]["captions"]["captions"] == 0


def test_labels(checked):
    _, report = checked
    labels = report["sets"]["train"]["labels"]["label"]
    assert labels == {"classes": 3, "unlabelled": 4, "counts": {"cats": 14, "birds": 13, "dogs": 13}}
    assert report["sets"]["held_out"]["labels"]["label"]["not_in_train"] == ["whales"]


def test_what_is_printed_fits_and_shows_text_as_it_is(messy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out = run(
        capsys, *overrides(messy, "--out", str(messy / "printed"), "data.max_bad_fraction=0.5", "data.lanes=8")
    )
    assert status == 0
    assert max(len(line) for line in out.splitlines() if not line.startswith("written: ")) <= 100
    assert "[bold]picture 0" in out
    assert "cats/[red]00.jpg" in out
    assert "held_out: 1 of its pictures are in train too" in out
    assert "an epoch of train has 44 samples, fewer than a batch: set data.batch_size=44 or less" in out


def test_the_number_of_workers_does_not_matter(make_datamodule):
    source = Emoji("val", captions=["caption", "keywords"])
    reports = [
        check_data(make_datamodule(train=source, eval={"style": Emoji("test_style")}, num_workers=num), num_rows=100)
        for num in (0, 2)
    ]
    assert reports[0] == reports[1]
    assert reports[0]["sets"].keys() == {"train", "style"}
    train = reports[0]["sets"]["train"]
    assert (train["rows"], train["read"]) == (1008, 100)
    words = [source.captions(n * 1008 // 100) for n in range(100)]
    assert train["captions"]["captions"] == sum(map(len, words))
    assert "tokens" not in train["captions"]  # this tokenizer cannot tell


def test_equal_groups():
    digests = np.random.default_rng(0).integers(0, 12, size=(200, 2)).astype(np.uint64)
    expected = {}
    for position, digest in enumerate(map(tuple, digests.tolist())):
        expected.setdefault(digest, []).append(position)
    expected = [group for group in expected.values() if len(group) > 1]
    assert equal_groups(digests) == sorted(expected)
    assert equal_groups(np.zeros((0, 2), np.uint64)) == []


def test_the_sheet_shows_what_the_model_sees(make_datamodule):
    datamodule = make_datamodule(train=Emoji("val"), eval={})
    sheet, remarks = contact_sheet(datamodule)
    assert remarks == []
    batch = next(iter(datamodule.train_dataloader()))
    large, small = colour_views(batch["views"], batch["colour"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    shown = np.asarray(sheet)[MARGIN + 2 * HEAD :, MARGIN:]
    for view, left in ((large, 0), (small, 16 * 12 + 3)):  # 16 pixels become 192, and 3 lie between the views
        side = view.shape[-1]
        pixels = shown[: 12 * side : 12, left : left + 12 * side : 12]
        torch.testing.assert_close(torch.tensor(pixels / 255).float(), view[0].permute(1, 2, 0), atol=3e-3, rtol=0)


def test_the_sheet_leaves_out_what_cannot_be_shown(messy, capsys):
    status, _ = run(capsys, *overrides(messy, "--out", str(messy / "small"), "--rows", "9", "data.batch_size=44"))
    assert status == 0  # none of the nine is damaged
    assert Image.open(messy / "small" / "contact_sheet.png").width <= 1600


def test_text_on_the_sheet_fits():
    font = ImageFont.load_default(TEXT)
    for text in (LONG, "x" * 500, "", "one", f"two\n{LONG}"):
        lines = wrap(text, 150, 3, font)
        assert len(lines) <= 3
        assert all(font.getlength(line) <= 150 for line in [*lines, shorten(text, 150, font)])
    assert "".join(wrap(LONG, 150, 99, font)).replace(" ", "") == LONG.replace(" ", "")
    assert wrap("x" * 500, 150, 2, font)[-1].endswith("...")


def test_a_font_that_lacks_characters_is_told():
    _, lacking = choose_font(["abc", "\U00013000\U00013001"], None)  # hieroglyphs
    assert lacking == {"\U00013000", "\U00013001"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=foldre"], "did you mean 'folder'?"),
        (["data=folder"], "data.train.root has no value"),
        (["--rows", "0"], "--rows 0; set it to 1 or more"),
        (["data=folder", "data.train.root=nowhere"], "'nowhere' does not exist"),
        (["--rows", "3", "data.num_workers=0", "--font", "nowhere.ttf"], "--font nowhere.ttf is not a TrueType font"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _ = run(capsys, *arguments)
    assert str(code).startswith("error: ")
    assert message in code
    assert "\n" not in code
