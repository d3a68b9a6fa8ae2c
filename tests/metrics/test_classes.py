"""Class files: what they hold and what is refused."""

from pathlib import Path

import pytest
import yaml

from repr.config import CONF
from repr.data.sources import Emoji
from repr.metrics.classes import Classes


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
    assert classes.ids({"a": ["2", "w", "x"]}, "here") == [2, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"attribute": "a", "names": {"x": "y"}}, "exactly the keys attribute, names, templates"),
        ({"attribute": "a", "names": {"x": "y"}, "templates": ["no place"]}, "where the name goes"),
        ({"attribute": "a", "names": {}, "templates": ["{}"]}, "must not be empty"),
        ([1], "exactly the keys"),
    ],
)
def test_a_bad_file_is_refused(content: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=words):
        Classes.load(tmp_path / "c.yaml")


def test_labels_that_the_data_lacks_are_named_with_the_nearest() -> None:
    classes = Classes("colour", {"rad": "red", "blue": "blue"}, ["{}"])
    with pytest.raises(ValueError, match=r"eval: 1 labels .* such as 'rad' \(nearest: 'red'\)"):
        classes.ids({"colour": ["blue", "red"]}, "eval")
    with pytest.raises(ValueError, match="no attribute 'colour'; it has shape"):
        classes.ids({"shape": ["round"]}, "eval")
