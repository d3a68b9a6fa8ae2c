"""Class files: what they hold and what is refused."""

from pathlib import Path

import open_clip
import pytest
import yaml

from repr.config import CONF
from repr.data.sources.emoji import Emoji
from repr.metrics.classes import Classes, load_classes


def test_the_shipped_file_names_every_concept_of_val() -> None:
    classes, source = Classes.load(CONF / "eval/classes/emoji_val.yaml"), Emoji("val")
    assert classes.attribute == "concept"
    assert len(classes.names) == 293
    for i in range(len(source)):
        assert classes.names[source.attributes["concept"][i]] == source.captions(i)[0]


def test_sentences_and_ids_follow_the_file(tmp_path: Path) -> None:
    content = {"attribute": "a", "templates": ["{}", "a {}!"], "names": {"x": "cat", 2: "{dog}"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    classes = Classes.load(tmp_path / "c.yaml")
    assert classes.sentences() == ["cat", "a cat!", "{dog}", "a {dog}!"]
    assert classes.ids(["2", "w", "x"]) == [2, 0]
    assert classes.ids(["2"]) == [1, 0]  # the data have no x, which is a candidate all the same


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"attribute": "a", "names": {"x": "y"}}, "exactly the keys attribute, names, templates"),
        ({"attribute": "a", "names": {"x": "y"}, "templates": ["no place"]}, "where the name goes"),
        ({"attribute": "a", "names": "open_clip.NAMES", "templates": ["{}"]}, "no list of open_clip"),
        ({"attribute": "a", "names": ["x"], "templates": ["{}"], "labels": "wnid"}, "set imagenet-synsets"),
        ({"attribute": "a", "names": {}, "templates": ["{}"]}, "must not be empty"),
        ({"attribute": "a", "names": {"x": ["y", "z"]}, "templates": ["{}"]}, "is no text"),
        ({"attribute": "a", "names": ["x", ""], "templates": ["{}"]}, "'' is no text"),
        ({"attribute": ["a"], "names": ["x"], "templates": ["{}"]}, "is no text"),
        ({"attribute": "a", "names": {(1, 2): "x"}, "templates": ["{}"]}, "cannot be read"),
        ([1], "exactly the keys"),
    ],
)
def test_a_bad_file_is_refused(content: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.dump(content))
    with pytest.raises(ValueError, match=words):
        Classes.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "name",
    ["on", "off", "yes", "No", "true", "null", "~", "1e3", "007", "1_000", "2020-01-01", "12:30:00", ".5", "1.10", "="],
)
def test_names_are_the_text_that_stands_there(name: str, tmp_path: Path) -> None:
    for names in (f"[{name}]", f"{{0: {name}}}", f"\n- {name}"):
        (tmp_path / "c.yaml").write_text(f"attribute: on\nnames: {names}\ntemplates: ['a sign that says {{}}']\n")
        classes = Classes.load(tmp_path / "c.yaml")
        assert classes.sentences() == [f"a sign that says {name}"]
        assert (classes.attribute, list(classes.names)) == ("on", ["0"])
    (tmp_path / "c.yaml").write_text(f"attribute: a\nnames: {{{name}: x}}\ntemplates: ['{{}}']\n")
    assert list(Classes.load(tmp_path / "c.yaml").names) == [name]


def test_names_are_composed_as_labels_are(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "attribute: a\nnames: {cafe\u0301: Cafe\u0301}\ntemplates: ['{}']\n", encoding="utf-8"
    )
    assert Classes.load(tmp_path / "c.yaml").names == {"caf\xe9": "Caf\xe9"}


def test_labels_that_the_file_lacks_are_named_with_the_nearest() -> None:
    classes = Classes("colour", {"rad": "red", "blue": "blue"}, ["{}"])
    fault = classes.fault({"colour": ["blue", "red"]}, "val")
    assert fault == "the class file lacks 1 of the 2 labels of val, such as 'red' (the nearest that it has: 'rad')"
    assert classes.fault({"shape": ["round"]}, "val") == "val has no labels of 'colour'; it has shape"
    assert classes.fault({"colour": ["blue"]}, "val") is None


@pytest.mark.parametrize(("file", "first"), [("imagenet", "n01440764"), ("imagenet_cls", "0")])
def test_imagenet_is_open_clips(file: str, first: str) -> None:
    classes = Classes.load(CONF / f"eval/classes/{file}.yaml")
    assert next(iter(classes.names.items())) == (first, "tench")
    assert (len(classes.names), len(classes.templates)) == (1000, 80)
    assert classes.sentences()[0] == open_clip.OPENAI_IMAGENET_TEMPLATES[0]("tench")


def test_several_files_are_told_apart_by_name() -> None:
    files = [str(CONF / f"eval/classes/trifeature_{name}.yaml") for name in ("shape", "colour")]
    assert list(load_classes(files)) == ["zero_shot_trifeature_shape", "zero_shot_trifeature_colour"]
    named = load_classes({"a": files[0], "b": files[0]})
    assert [c.attribute for c in named.values()] == ["shape", "shape"]
    assert list(named) == ["zero_shot_a", "zero_shot_b"]
    assert list(load_classes(files[0])) == ["zero_shot"]
    with pytest.raises(ValueError, match="share a name"):
        load_classes([files[0], files[0]])
