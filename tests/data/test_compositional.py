"""Sets of questions: the published layouts, written here from the drawn set, and the drawn set itself."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repr.config import compose
from repr.data.drawn.composition import KINDS, DrawnComposition, tags
from repr.data.drawn.words import DrawnWords
from repr.data.questions.compositional import questions
from repr.data.questions.compositional_files import (
    SUGAR_CREPE,
    AROAttribution,
    AROOrder,
    ARORelation,
    SugarCrepe,
    Winoground,
)
from repr.data.sources.emoji import Emoji
from repr.data.sources.source import has_questions
from repr.data.word_order import shuffled
from tests.drawn_pairs import DrawnPairs

DRAWN = DrawnComposition(size=32, num_items=2, kinds=["attribute", "relation"])  # rows 0 to 3 and 4 to 7


def pair(row: int) -> tuple[str, str]:
    """The right and the wrong caption of a row."""
    return DRAWN.captions(row)[0], DRAWN.distractors(row)[0]


@pytest.fixture
def sugar_crepe(tmp_path: Path) -> tuple[type, dict[str, Any]]:
    (tmp_path / "val2017").mkdir()
    for number, split in enumerate(SUGAR_CREPE):
        DRAWN.image(number).save(tmp_path / "val2017" / f"{number:012d}.jpg")
        right, wrong = pair(number)
        row = {"filename": f"{number:012d}.jpg", "caption": right, "negative_caption": wrong}
        (tmp_path / f"{split}.json").write_text(json.dumps({"0": row}))
    return SugarCrepe, {"root": tmp_path, "pictures": tmp_path / "val2017"}


@pytest.fixture
def winoground(tmp_path: Path) -> tuple[type, dict[str, Any]]:
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(2):
        rows = {f"image_{half}": f"ex_{number}_img_{half}" for half in (0, 1)}
        for half in (0, 1):
            DRAWN.image(2 * number + half).save(tmp_path / "images" / f"ex_{number}_img_{half}.png")
            rows[f"caption_{half}"] = DRAWN.captions(2 * number + half)[0]
        lines.append(json.dumps({"id": number, **rows, "tag": "Noun", "collapsed_tag": ("Object", "Both")[number]}))
    (tmp_path / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return Winoground, {"root": tmp_path}


def zipped(folder: Path) -> Path:
    """Put Winoground's pictures into the zip that its hub has in place of the folder."""
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for path in sorted((folder / "images").iterdir()):
            archive.write(path, f"images/{path.name}")
    (folder / "images").rename(folder / "elsewhere")
    return folder / "images.zip"


def visual_genome(folder: Path, name: str, of: Callable[[int], dict[str, Any]], num: int) -> None:
    (folder / "images").mkdir()
    canvas = Image.new("RGB", (80, 60))
    canvas.paste(DRAWN.image(4), (20, 10))
    canvas.save(folder / "images" / "1.png")
    right, wrong = pair(4)
    box = {"bbox_x": 20, "bbox_y": 10, "bbox_w": 32, "bbox_h": 32}
    entry = {"image_id": 1, "image_path": "1.png", "true_caption": right, "false_caption": wrong, **box}
    (folder / f"visual_genome_{name}.json").write_text(json.dumps([entry | of(row) for row in range(num)]))


@pytest.fixture
def relation(tmp_path: Path) -> tuple[type, dict[str, Any]]:
    visual_genome(tmp_path, "relation", lambda row: {"relation_name": ("to the left of", "near", "on")[row]}, 3)
    return ARORelation, {"root": tmp_path}


@pytest.fixture
def attribution(tmp_path: Path) -> tuple[type, dict[str, Any]]:
    visual_genome(tmp_path, "attribution", lambda row: {"attributes": ["red", "old" if row < 25 else "big"]}, 30)
    return AROAttribution, {"root": tmp_path}


@pytest.fixture
def order(tmp_path: Path) -> tuple[type, dict[str, Any]]:
    (tmp_path / "val2014").mkdir()
    DRAWN.image(0).save(tmp_path / "val2014" / "1.jpg")
    captions = ["A dog  chases the two black cats.", "Dogs!", "Cats. Dogs"]
    rows = [{"image": "val2014/1.jpg", "caption": captions}]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(rows))
    return AROOrder, {"root": tmp_path}


def test_sugarcrepe(sugar_crepe: tuple[type, dict[str, Any]]) -> None:
    source = SugarCrepe(**sugar_crepe[1])
    assert len(source) == 7
    assert list(source.attributes["edit"]) == list(SUGAR_CREPE)
    assert [(source.captions(row)[0], source.distractors(row)[0]) for row in range(7)] == [pair(r) for r in range(7)]
    assert source.key(6) == "swap_att/0"
    asked = questions(source)
    assert asked.items.tolist() == [[row] for row in range(7)]
    assert [[asked.texts[text] for text in row] for row in asked.candidates] == [list(pair(row)) for row in range(7)]
    assert len(asked.texts) == 8  # rows 0 and 1 have each other's
    assert len(SugarCrepe(**sugar_crepe[1], splits=["swap_att"])) == 1


@pytest.mark.parametrize("in_zip", [False, True])
def test_winoground(winoground: tuple[type, dict[str, Any]], in_zip: bool) -> None:
    root = winoground[1]["root"]
    if in_zip:
        zipped(root)
    source = Winoground(root)
    assert source.items.tolist() == [[0, 1], [2, 3]]
    assert list(source.attributes["tag"]) == ["object", "object", "both", "both"]
    assert [(source.captions(row)[0], source.distractors(row)[0]) for row in range(4)] == [pair(r) for r in range(4)]
    for row in range(4):
        assert np.array_equal(source.image(row), DRAWN.image(row))


def test_aro_s_boxes_and_what_its_means_leave_out(relation: Any, tmp_path: Path) -> None:
    source = ARORelation(tmp_path)
    assert np.array_equal(source.image(0), DRAWN.image(4))
    assert list(source.attributes["relation"]) == ["to the left of", "", "on"]
    assert (source.captions(0)[0], source.distractors(0)[0]) == pair(4)


def test_aro_s_pairs_of_attributes_have_25_cases(attribution: Any, tmp_path: Path) -> None:
    assert list(AROAttribution(tmp_path).attributes["attributes"]) == ["red_old"] * 25 + [""] * 5


def tagger(caption: str) -> list[tuple[str, str]]:
    kind = {"dog": "NN", "dogs": "NNS", "cats": "NNS", "black": "JJ", "two": "CD"}
    return [(word, kind.get(word, "DT")) for word in caption.split()]


def test_aro_s_order(order: Any, tmp_path: Path) -> None:
    source = AROOrder(tmp_path, tagger=tagger)
    assert source.captions(0) == ["a dog chases the two black cats"]
    wrong = source.distractors(0)
    assert wrong[0] == "a cats chases the two black dog"  # the only other order of two nouns and one adjective
    assert [word for word in wrong[1].split() if tagger(word)[0][1] in ("NN", "NNS", "JJ")] == ["dog", "black", "cats"]
    assert [sorted(wrong[2].split()[at : at + 3]) for at in (0, 3)] == [["a", "chases", "dog"], ["black", "the", "two"]]
    assert set(wrong[3].replace("a dog chases", "1").replace("the two black", "2").split()) == {"1", "2", "cats"}
    assert len({*wrong, *source.captions(0)}) == 5
    assert (source.captions(1), source.distractors(1)) == (["dogs"], [])  # no other order
    assert source.distractors(2) == ["dogs cats"]  # of four ways, three give nothing new
    assert len(AROOrder(tmp_path).distractors(0)) == 2
    assert AROOrder(tmp_path, tagger=tagger).distractors(0) == wrong
    assert {tuple(AROOrder(tmp_path, tagger=tagger, seed=seed).distractors(0)) for seed in range(4)} != {tuple(wrong)}
    asked = questions(source)
    assert (asked.candidates >= 0).sum(1).tolist() == [5, 1, 2]
    assert AROOrder(tmp_path, max_words=3).captions(0) == ["a dog chases"]


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change what the first line of a file holds, of JSON all."""

    def apply(folder: Path) -> None:
        first, *rest = (folder / name).read_text().splitlines()
        found = json.loads(first)
        change(found)
        (folder / name).write_text("\n".join([json.dumps(found), *rest]))

    return apply


def write(name: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text)


RELATION, ATTRIBUTION = "visual_genome_relation.json", "visual_genome_attribution.json"
COCO = "coco_karpathy_test.json"
BAD = [
    ("sugar_crepe", lambda f: (f / "add_att.json").unlink(), r"no '.*add_att\.json'; SugarCrepe: set root"),
    (
        "sugar_crepe",
        edit("swap_obj.json", lambda x: x["0"].pop("negative_caption")),
        r"obj\.json, '0': no key 'negative_caption'; it has \['filename', 'caption'\]",
    ),
    (
        "sugar_crepe",
        edit("swap_obj.json", lambda x: x["0"].update(caption="")),
        r"swap_obj\.json, '0': 'caption' is ''",
    ),
    ("sugar_crepe", lambda f: (f / "val2017" / f"{3:012d}.jpg").unlink(), r"1 of 7 pictures are missing, .*0003\.jpg"),
    ("sugar_crepe", write("swap_att.json", b"[]"), r"swap_att\.json: holds no cases; a dict of objects"),
    ("sugar_crepe", write("swap_att.json", b'{"0": '), r"swap_att\.json: no JSON"),
    ("sugar_crepe", write("swap_att.json", b"\xff\xfe"), r"swap_att\.json: not UTF-8"),
    ("winoground", lambda f: (f / "examples.jsonl").unlink(), r"no '.*examples\.jsonl'; Winoground"),
    (
        "winoground",
        edit("examples.jsonl", lambda x: x.pop("caption_1")),
        r"examples\.jsonl, line 1: no key 'caption_1'; it has",
    ),
    ("winoground", write("examples.jsonl", b"[1]\n"), r"line 1: no key 'image_0'; it has list"),
    ("winoground", write("examples.jsonl", b"\n"), "Winoground: no case in its files"),
    ("winoground", lambda f: zipped(f).write_bytes(b"PK"), r"images\.zip: no whole zip"),
    (
        "winoground",
        lambda f: (f / "images" / "ex_1_img_0.png").unlink(),
        r"1 of 4 pictures are missing, .*ex_1_img_0\.png",
    ),
    ("winoground", lambda f: (f / "images").rename(f / "pictures"), r"4 of 4 pictures are missing"),
    ("relation", edit(RELATION, lambda x: x[2].pop("bbox_w")), r"relation\.json, entry 2: no key 'bbox_w'"),
    ("relation", edit(RELATION, lambda x: x[2].update(bbox_w=0)), r"entry 2: a box of 0 x 32"),
    ("relation", edit(RELATION, lambda x: x[1].pop("relation_name")), r"entry 1: no key 'relation_name'"),
    ("attribution", edit(ATTRIBUTION, lambda x: x[7].update(attributes="red")), r"entry 7: 'attributes' is 'red'"),
    ("order", edit(COCO, lambda x: x[0].pop("caption")), r"entry 0: no key 'caption'; it has \['image'\]"),
    ("order", edit(COCO, lambda x: x[0].update(caption=["a", 3])), r"'caption' is \['a', 3\], not a list of"),
]


@pytest.mark.parametrize(("layout", "damage", "told"), BAD)
def test_another_layout_is_named(
    layout: str, damage: Callable[[Path], object], told: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, options = request.getfixturevalue(layout)
    damage(tmp_path)
    with pytest.raises(ValueError, match=told):
        kind(**options)


def test_a_damaged_picture_is_a_bad_row(winoground: Any, tmp_path: Path) -> None:
    (tmp_path / "images" / "ex_0_img_1.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"ex_0_img_1\.png"):
        Winoground(tmp_path).image(1)


def test_the_drawn_set_is_a_function_of_its_options() -> None:
    source, again = DrawnComposition(size=40, num_items=5), DrawnComposition(size=40, num_items=5, keep=True)
    again = pickle.loads(pickle.dumps(again))  # as for spawned workers
    assert list(dict.fromkeys(source.attributes["kind"])) == list(KINDS)
    assert (len(source), source.items.shape) == (5 * 7, (20, 2))
    assert len({source.key(row) for row in range(35)}) == 35
    for first, second in source.items.tolist():
        for row in {first, second} - {-1}:
            right, wrong = source.captions(row)[0], source.distractors(row)
            assert all(sorted(text.split()) == sorted(right.split()) and text != right for text in wrong), right
            assert np.array_equal(again.image(row), source.image(row))
            assert np.array_equal(again.image(row), source.image(row))  # now the kept one
        if second == -1:
            assert len(source.distractors(first)) == 4
        else:
            assert source.captions(first) == source.distractors(second)
            assert not np.array_equal(source.image(first), source.image(second))
    assert source.captions(0) != DrawnComposition(size=40, num_items=5, seed=1).captions(0)
    few = DrawnComposition(size=40, num_items=5, kinds=["count"])
    assert [few.captions(row) for row in range(10)] == [source.captions(row + 20) for row in range(10)]


def test_a_drawn_picture_shows_what_its_caption_says() -> None:
    """Blue lies above red, or left of it, as the caption has it; the pixels of each colour are found by hue."""
    source = DrawnComposition(size=64, num_items=200, kinds=["relation", "count"])
    places = {"above": (0, -1), "below": (0, 1), "left": (1, -1), "right": (1, 1)}
    shown = 0
    for row in range(400):
        words = source.captions(row)[0].replace(" of", "").split()
        if {words[1], words[5]} != {"red", "blue"}:
            continue
        red, _, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(source.image(row)), 2, 0))
        centre = {"red": np.argwhere(red - blue > 90).mean(0), "blue": np.argwhere(blue - red > 90).mean(0)}
        axis, sign = places[words[3]]
        assert sign * (centre[words[1]] - centre[words[5]])[axis] > 15, source.captions(row)
        shown += 1
    assert shown > 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 8}, "size >= 32"),
        ({"kinds": ["colour"]}, "out of"),
        ({"colours": 1}, "colours from 2"),
        ({"shapes": 9}, "to 6"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DrawnComposition(**options)


def test_which_sources_ask() -> None:
    assert has_questions(DRAWN)
    assert has_questions(DrawnPairs(pairs=1))
    assert not has_questions(Emoji("val"))
    assert shuffled("a red star above a blue star", np.random.default_rng(0), tags)[0] == "a blue star above a red star"


def test_the_words_of_the_drawn_set_are_a_vocabulary() -> None:
    """Texts come back; what is longer, or has another word, keeps its end."""
    tokenizer, source = DrawnWords(12), DrawnComposition(size=32, num_items=30, colours=10)
    texts = [text for row in range(len(source)) for text in (*source.captions(row), *source.distractors(row))]
    tokens = tokenizer(texts)
    assert not (tokens == 1).any()
    assert [tokenizer.decode(row) for row in tokens.tolist()] == texts
    assert torch.equal(tokens.amax(1), torch.full((len(texts),), tokenizer.vocab_size - 1))  # the end of each
    long = tokenizer("a purple zebra " * 9)[0]
    assert (long[0], long[3], long[-1]) == (tokenizer.sot_token_id, 1, tokenizer.eot_token_id)
    assert compose(["experiment=coca_composition"]).text.vocab_size == tokenizer.vocab_size
