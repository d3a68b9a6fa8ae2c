"""ARO, SugarCrepe and Winoground from local files in the layouts that their authors publish."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from repr.data.questions.compositional import Case, Cases, members
from repr.data.sources.plain_files import MAX_BYTES, read_plain
from repr.data.word_order import Tagger, shuffled

SUGAR_CREPE = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
MIN_OF_ATTRIBUTES = 25  # cases of a pair of attributes, below which ARO's mean over pairs leaves it out
# Relations that ARO's mean leaves out, since they mostly hold both ways or tell the two things apart by themselves.
LEFT_OUT = frozenset(
    """adjusting; attached to; between; bigger than; biting; boarding; brushing; chewing; cleaning; climbing; close to;
    coming from; coming out of; contain; crossing; dragging; draped over; drinking; drinking from; driving; driving
    down; driving on; eating from; eating in; enclosing; exiting; facing; filled with; floating in; floating on;
    flying; flying above; flying in; flying over; flying through; full of; going down; going into; going through;
    grazing in; growing in; growing on; guiding; hanging from; hanging in; hanging off; hanging over; higher than;
    holding onto; hugging; in between; jumping off; jumping on; jumping over; kept in; larger than; leading; leaning
    over; leaving; licking; longer than; looking in; looking into; looking out; looking over; looking through; lying
    next to; lying on top of; making; mixed with; mounted on; moving; on the back of; on the edge of; on the front of;
    on the other side of; opening; painted on; parked at; parked beside; parked by; parked in; parked in front of;
    parked near; parked next to; perched on; petting; piled on; playing; playing in; playing on; playing with; pouring;
    reaching for; reading; reflected on; riding on; running in; running on; running through; seen through; sitting
    behind; sitting beside; sitting by; sitting in front of; sitting near; sitting next to; sitting under; skiing down;
    skiing on; sleeping in; sleeping on; smiling at; sniffing; splashing; sprinkled on; stacked on; standing against;
    standing around; standing behind; standing beside; standing in front of; standing near; standing next to; staring
    at; stuck in; surrounding; swimming in; swinging; talking to; topped with; touching; traveling down; traveling on;
    tying; typing on; underneath; wading in; waiting for; walking across; walking by; walking down; walking next to;
    walking through; working in; working on; worn on; wrapped around; wrapped in; by; of; near; next to; with; beside;
    on the side of; around""".replace("\n    ", " ").split("; ")
)


class SugarCrepe(Cases):
    """SugarCrepe: a picture of COCO, its caption, and a fluent caption that is wrong in one thing (arXiv 2306.14610).

    The layout is the published one: ``root/<split>.json``, each a mapping of numbers to ``filename``, ``caption`` and
    ``negative_caption``; the pictures are those of COCO's ``val2017``. Attribute and split: ``edit``.

    Args:
        root: the folder of the JSON files.
        pictures: the folder of the pictures.
        splits: which of the seven files are read.

    Raises:
        ValueError: a file, a key or a picture is missing.
    """

    def __init__(self, root: str | Path, pictures: str | Path, *, splits: Sequence[str] = SUGAR_CREPE) -> None:
        cases = []
        for split in splits:
            path = os.path.join(root, f"{split}.json")
            rows = _json(path, dict, "SugarCrepe: set root to the folder that holds add_obj.json and the others")
            for number, row in rows.items():
                where = f"{path}, {number!r}"
                file, right, wrong = _texts(row, ("filename", "caption", "negative_caption"), where)
                cases.append(Case(f"{split}/{number}", file, right, (wrong,), split))
        super().__init__(pictures, cases, split="edit")


class Winoground(Cases):
    """Winoground: two pictures and two captions of the same words, to be matched (arXiv 2204.03162).

    The layout is that of the data set's hub: a line of ``root/examples.jsonl`` has ``id``, ``image_0``, ``image_1``,
    ``caption_0``, ``caption_1`` and ``collapsed_tag``; the picture of ``ex_0_img_0`` is ``ex_0_img_0.png`` in
    ``root/images`` or ``root/images.zip``. Rows 2i and 2i + 1 are an item. Attribute and split: ``tag`` (``object``,
    ``relation``, ``both``).

    Raises:
        ValueError: a file, a key or a picture is missing.
    """

    def __init__(self, root: str | Path) -> None:
        root = os.path.expanduser(root)
        path = os.path.join(root, "examples.jsonl")
        names = ("image_0", "image_1", "caption_0", "caption_1", "collapsed_tag")
        pictures, in_zip = os.path.join(root, "images"), dict[str, str]()
        if not os.path.isdir(pictures) and os.path.isfile(f"{pictures}.zip"):
            pictures += ".zip"
            in_zip = {PurePosixPath(name).name: name for name in members(pictures)}
        cases = []
        text = _text(path, "Winoground: set root to the folder that holds examples.jsonl")
        for line, row in enumerate(filter(None, map(str.strip, text.split("\n"))), 1):
            where = f"{path}, line {line}"
            *images, caption, other, tag = _texts(_parsed(row, where), names, where)
            for image, right, wrong in zip(images, (caption, other), (other, caption), strict=True):
                file = f"{image}.png"
                cases.append(Case(image, in_zip.get(file, file), right, (wrong,), tag.lower()))
        super().__init__(pictures, cases, split="tag", rows=2)


class ARORelation(Cases):
    """ARO's relations: a box of a picture of Visual Genome, and its caption with the two things exchanged.

    The layout is the published one: ``root/visual_genome_relation.json``, a list of objects with ``image_path``,
    ``bbox_x``, ``bbox_y``, ``bbox_w``, ``bbox_h``, ``true_caption``, ``false_caption`` and ``relation_name``, beside
    ``root/images``. Attribute and split: ``relation``; empty for those that the published mean leaves out, so that
    ``macro_text_score`` is the published number.

    Raises:
        ValueError: a file, a key or a picture is missing.

    Source: Yuksekgonul et al., 2023, arXiv 2210.01936, section 2.1; their code.
    """

    def __init__(self, root: str | Path) -> None:
        cases = []
        for row, case, where in _boxes(os.path.join(root, "visual_genome_relation.json"), "ARORelation"):
            relation = _value(row, "relation_name", str, where)
            cases.append(case._replace(split="" if relation in LEFT_OUT else relation))
        super().__init__(os.path.join(root, "images"), cases, split="relation")


class AROAttribution(Cases):
    """ARO's attributes: likewise, with the attributes of two things exchanged.

    As :class:`ARORelation`, but ``root/visual_genome_attribution.json`` with ``attributes``, a list of two, in place of
    ``relation_name``. Attribute and split: ``attributes``, the two joined by ``_``; empty for pairs with fewer than 25
    cases, which the published mean leaves out.

    Raises:
        ValueError: a file, a key or a picture is missing.
    """

    def __init__(self, root: str | Path) -> None:
        cases = []
        for row, case, where in _boxes(os.path.join(root, "visual_genome_attribution.json"), "AROAttribution"):
            cases.append(case._replace(split="_".join(_value(row, "attributes", list, where)[:2])))
        counts = Counter(case.split for case in cases)
        cases = [case if counts[case.split] >= MIN_OF_ATTRIBUTES else case._replace(split="") for case in cases]
        super().__init__(os.path.join(root, "images"), cases, split="attributes")


class AROOrder(Cases):
    """ARO's sets of order: a picture's caption among others of the same words.

    The layout is that of the split files of COCO and Flickr30k for retrieval which ARO's code reads: a list of objects
    with ``image``, a path relative to ``root``, and ``caption``, a list. Each caption is a row. ARO publishes no wrong
    captions, but makes them anew when it loads: see :mod:`repr.data.word_order`, also for what differs. As
    there, captions lose case and punctuation, and all words after ``max_words``. Attribute and split: ``words``, always
    ``order``.

    Args:
        root: the folder of the pictures.
        annotations: the file, relative to ``root``, such as ``coco_karpathy_test.json`` or ``flickr30k_test.json``.
        tagger: caption -> [(word, Penn Treebank tag), ...], for the two ways that exchange nouns, adjectives and other
            words, as ``spacy.load("en_core_web_sm")`` tells them; None: only the two ways by threes of words, so that
            the level at chance is 1/3 in place of 1/5.
        seed: of the orders.
        max_words: of a caption.

    Raises:
        ValueError: the file, a key or a picture is missing.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str = "coco_karpathy_test.json",
        *,
        tagger: Tagger | None = None,
        seed: int = 0,
        max_words: int = 30,
    ) -> None:
        path = os.path.join(root, annotations)
        cases: list[Case] = []
        for number, row in enumerate(_json(path, list, "AROOrder: set root and annotations to where it is")):
            where = f"{path}, entry {number}"
            file = _value(row, "image", str, where)
            for of, text in enumerate(_value(row, "caption", list, where)):
                caption = " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:max_words])
                rng = np.random.Generator(np.random.Philox(key=[seed, len(cases)]))
                cases.append(Case(f"{number}/{of}", file, caption, shuffled(caption, rng, tagger), "order"))
        super().__init__(root, cases, split="words")


def _boxes(path: str, owner: str) -> Iterator[tuple[Any, Case, str]]:
    """The entries of one of ARO's files about Visual Genome, as they are and as cases without a split, and where."""
    for number, row in enumerate(_json(path, list, f"{owner}: set root to the folder that holds it beside images")):
        where = f"{path}, entry {number}"
        file, right, wrong = _texts(row, ("image_path", "true_caption", "false_caption"), where)
        left, upper, width, height = (_value(row, f"bbox_{name}", (int, float), where) for name in "xywh")
        if not (width >= 1 and height >= 1):
            raise ValueError(f"{where}: a box of {width} x {height} pixels")
        yield row, Case(str(number), file, right, (wrong,), box=(left, upper, left + width, upper + height)), where


def _json(path: str, kind: type, hint: str) -> Any:
    """What a JSON file holds, which must be a filled list or dict, as ``kind`` says."""
    content = _parsed(_text(path, hint), path)
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path}: holds no cases; a {kind.__name__} of objects is expected")
    return content


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def _text(path: str, hint: str) -> str:
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise ValueError(f"there is no {path!r}; {hint}")
    try:
        return read_plain(path, MAX_BYTES, "a text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _value(row: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """The value of a key: a filled text, a filled list of texts or a number, as ``kind`` says; else ValueError."""
    if not isinstance(row, Mapping) or key not in row:
        has = list(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where}: no key {key!r}; it has {has}")
    value = row[key]
    if not isinstance(value, kind) or (isinstance(value, (str, list)) and not value):
        raise ValueError(f"{where}: {key!r} is {value!r}")
    if isinstance(value, list) and not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{where}: {key!r} is {value!r}, not a list of texts")
    return value


def _texts(row: Any, keys: Sequence[str], where: str) -> list[str]:
    return [_value(row, key, str, where) for key in keys]
