import os
import pickle
from collections import Counter
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from repr.data.eval_datasets import EvalDataset
from repr.data.sources.emoji import Emoji
from repr.data.sources.folder import Folder
from repr.data.sources.pictures import decode
from repr.data.views import evaluation_view
from repr.data.workers import Loader

ORIENTATION = 0x0112


def picture(size=(12, 8), colour=(200, 30, 60)):
    return Image.new("RGB", size, colour)


def stored(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Nested and flat images of several kinds, one caption file each, and things that are no images."""
    for name in ("b/two.JPG", "a/deep/one.png", "a/zero.webp", "top.jpeg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path, {"JPG": "JPEG", "jpeg": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper()))
        path.with_suffix(".txt").write_text(f"a {path.stem}\n\n  same as {path.stem} \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "a" / "._zero.webp").write_text("what macOS leaves behind")
    return tmp_path


def test_folder_is_in_the_order_of_relative_paths(tree):
    source = Folder(tree)
    assert [source.key(row) for row in range(len(source))] == ["a/deep/one.png", "a/zero.webp", "b/two.JPG", "top.jpeg"]
    assert source.attributes == {}
    assert source.captions(0) == []
    assert source.image(2).mode == "RGB"
    assert source.image(2).size == (12, 8)


def test_folder_labels_are_the_first_level(tree):
    assert list(Folder(tree, labels=True).attributes["label"]) == ["a", "a", "b", ""]


def test_folder_captions_are_the_lines_of_the_text_file(tree):
    assert Folder(str(tree), captions=True).captions(1) == ["a zero", "same as zero"]


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda root: root / "absent", {}, "does not exist; set root"),
        (lambda root: root / "notes.md", {}, "is a file; set root"),
        (lambda root: root / "empty", {}, r"no image \(.jpg"),
        (lambda root: root, {"part": [0, 1e-9]}, r"no image .* in part=\[0, 1e-09\]"),
        (lambda root: root / "b", {"labels": True}, "set labels=false"),
        (lambda root: root, {"captions": True}, r"1 of 4 images .* 'b/two.JPG'; add 'b/two.txt' or set captions=false"),
    ],
)
def test_folder_errors_come_at_construction_and_say_what_to_set(tree, prepare, options, message):
    (tree / "empty").mkdir()
    (tree / "b" / "two.txt").unlink()
    with pytest.raises(ValueError, match=message):
        Folder(prepare(tree), **options)


@pytest.mark.parametrize("damage", ["text", "truncated", "gone", "pipe"])
def test_a_file_that_is_no_image_is_named_and_left_out_of_evaluation(tree, damage):
    path = tree / "b" / "two.JPG"
    source = Folder(tree)
    if damage in ("gone", "pipe"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
    else:
        path.write_bytes(b"no image at all" if damage == "text" else path.read_bytes()[:-200])
    with pytest.raises(OSError, match=r"two\.JPG: not readable as an image"):
        source.image(2)
    dataset = EvalDataset(
        source, torch.arange(4), partial(evaluation_view, size=8), torch.zeros(4, 0, dtype=torch.int64), None
    )
    loader = Loader(dataset, batch_sampler=[[0, 1], [2, 3]], num_workers=1)
    first, second = loader
    assert "bad" not in first
    assert second["index"].tolist() == [-3, 3]
    ((row, reason),) = second["bad"]
    assert row == 2
    assert str(path) in reason


def test_decoding_error_keeps_its_cause():
    with pytest.raises(OSError, match=r"^the name: not readable") as caught:
        decode(b"GIF89a", "the name")
    assert caught.value.__cause__ is not None


def test_alpha_is_composited_on_white():
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (100, 0, 0, 255))
    palette = rgba.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    for image in (rgba, rgba.convert("LA"), palette):
        decoded = decode(stored(image, "PNG"), "x")
        assert decoded.mode == "RGB"
        assert decoded.getpixel((0, 0)) == (255, 255, 255), image.mode
        assert decoded.getpixel((1, 0)) != (255, 255, 255), image.mode
    half = decode(stored(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"), "x")
    assert half.getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


def test_transparent_colour_of_an_rgb_file():
    decoded = decode(stored(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), "x")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb():
    deep = Image.fromarray(np.array([[0, 128 * 256, 255 * 256]], np.uint16))
    assert [pixel[0] for pixel in np.asarray(decode(stored(deep, "PNG"), "x"))[0]] == [0, 128, 255]
    assert decode(stored(picture().convert("L"), "PNG"), "x").mode == "RGB"
    assert decode(stored(picture().convert("1"), "PNG"), "x").mode == "RGB"
    assert decode(stored(picture().convert("CMYK"), "JPEG"), "x").mode == "RGB"


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned by a quarter to be upright
    upright = decode(stored(image, "JPEG", exif=exif), "x")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2))[0] > 200
    assert upright.getpixel((5, 17))[0] < 50


def test_emoji_counts():
    sizes = {split: len(Emoji(split)) for split in ("train", "val", "test_style", "test_both")}
    assert sizes == {"train": 5610, "val": 1008, "test_style": 1343, "test_both": 249}
    train, val, style = Emoji("train"), Emoji("val"), Emoji("test_style")
    assert set(train.attributes) == {"category", "subcategory", "style", "concept"}
    assert len(set(val.attributes["concept"])) == 293
    assert not set(val.attributes["concept"]) & set(train.attributes["concept"])
    assert set(style.attributes["style"]) == {"fluent"}
    assert max(Counter(style.attributes["category"]).values()) / len(style) == pytest.approx(0.22, abs=0.005)


def test_emoji_rows():
    source = Emoji("train")
    assert source.key(0) == "emojione_1st_place_medal_1f947"
    assert source.captions(0) == ["1st place medal"]
    image = source.image(0)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert Emoji("train", captions=["caption", "keywords"]).captions(0) == [
        "1st place medal",
        "1st, first, gold, medal, place",
    ]


@pytest.mark.parametrize(
    ("split", "captions", "message"),
    [("test", ["caption"], r"'test'; set split to one of \['test_both'"), ("val", ["title"], "set a list out of"),
     ("val", "caption", "set a list out of")],
)  # fmt: skip
def test_emoji_errors(split, captions, message):
    with pytest.raises(ValueError, match=message):
        Emoji(split, captions=captions)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_emoji_can_be_read_after_a_fork_and_after_pickling():
    source = Emoji("val")
    before = np.asarray(source.image(3))  # the parent's handle is open now
    labels = torch.zeros(len(source), 0, dtype=torch.int64)
    transform = partial(evaluation_view, size=64)
    dataset = EvalDataset(pickle.loads(pickle.dumps(source)), torch.arange(32), transform, labels, None)
    loader = Loader(dataset, batch_sampler=torch.arange(32).reshape(8, 4).tolist(), num_workers=3)
    images = torch.cat([batch["image"] for batch in loader])
    expected = np.stack([np.asarray(source.image(row)) for row in range(32)]).transpose(0, 3, 1, 2)
    assert np.array_equal(images.numpy(), expected)
    assert np.array_equal(expected[3], before.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "links", [{"a/up": ".."}, {"x": ".", "y": "."}, {"a/self": "../a", "a/loop": "loop"}, {"0": "b", "a/c": "../b"}]
)
def test_each_folder_is_walked_once_under_its_own_name(tree, links):
    for link, target in links.items():
        (tree / link).symlink_to(target)
    source = Folder(tree)
    assert [source.key(row) for row in range(len(source))] == ["a/deep/one.png", "a/zero.webp", "b/two.JPG", "top.jpeg"]


def test_links_out_of_the_folder_are_followed(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture().save(outside / "far.png")
    (outside / "back").symlink_to(tree)
    (tree / "b" / "linked").symlink_to(outside)
    source = Folder(tree, labels=True)
    assert [source.key(row) for row in range(len(source))][2:4] == ["b/linked/far.png", "b/two.JPG"]
    assert len(source) == 5


def test_pictures_that_are_left_out_are_counted_and_named(tree, caplog):
    Folder(tree)
    assert caplog.text == ""
    for name in ("b.heic", "c.JXL", "a/raw.dng"):
        (tree / name).write_bytes(b"\xff\x0a")
    for name in ("d", "b/e.jpg_large", "f.jpe"):
        (tree / name).write_bytes(stored(picture(), "JPEG"))
    (tree / "LICENSE").write_text("Permission is granted")
    os.mkfifo(tree / "pipe")
    source = Folder(tree)
    assert len(source) == 4
    (record,) = caplog.records
    assert "left out, though by name or content pictures: 6 (" in record.message
    for kind in (".heic: 1", ".jxl: 1", ".dng: 1", "without suffix: 1"):
        assert kind in record.message
    assert "the first is 'a/raw.dng'" in record.message
    assert "\n" not in record.message


def test_a_folder_of_other_pictures_alone_says_so(tmp_path):
    (tmp_path / "b.heic").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"no image .*pictures: 1 \(\.heic: 1\).*'b\.heic'; convert or rename"):
        Folder(tmp_path)
