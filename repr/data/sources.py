"""Sources: where the pictures, captions and class names of a data set come from.

A source is map-style and knows nothing of views, batches or ranks. :class:`Source` is the whole
interface; the config names a class with these members by ``_target_``, and
:class:`repr.data.dense.MaskedSource` is one that has a class for every pixel besides. Tables are in
:mod:`repr.data.table`, tar shards in :mod:`repr.data.shards`, several sources as one in :mod:`repr.data.mixture`, and
drawn scenes in :mod:`repr.data.scenes`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from repr.data.columns import Labels, Packed, rows_of_part
from repr.data.pictures import IMAGE_SUFFIXES, decode, read_picture

EMOJI_ZIP = Path(__file__).with_name("emoji64.zip")
EMOJI_ATTRIBUTES = ("category", "subcategory", "style", "concept")
EMOJI_TEXTS = ("caption", "keywords")
WHITE = 230  # from this value on in all channels, a pixel of an emoji is ground; WebP blurs white down to some 235


class Source(Protocol):
    """A data set of N rows. Every member may be called in any worker process, in any order.

    A row that cannot be read raises ``OSError`` with a message that names it: training replaces and counts it.
    Any other error ends the run.
    """

    @property
    def attributes(self) -> Mapping[str, Sequence[str]]:
        """Attribute -> N class names, one a row; ``''`` where a row has no label."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name of the row that does not change between runs."""
        ...

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged.

        Raises:
            OSError: it cannot be read; the message names it.
        """
        ...

    def image(self, index: int) -> Image.Image:
        """The picture in RGB, upright, alpha composited on white.

        Raises:
            OSError: it cannot be decoded; the message names it.
        """
        ...

    def captions(self, index: int) -> list[str]:
        """The texts the row offers, the main one first, without empty ones; may be empty.

        Training draws one a sample and epoch: uniformly, or, where the source has a method
        ``caption_weights(index)``, with the weights that it gives, one a text.

        Raises:
            OSError: they cannot be read; the message names the row.
        """
        ...


@lru_cache(maxsize=8)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once a process: a handle shared across a fork would share its file position."""
    return zipfile.ZipFile(path)


@lru_cache(maxsize=1)
def _emoji_index() -> list[dict[str, Any]]:
    """The rows of the embedded index, all splits."""
    return [json.loads(line) for line in open_zip(EMOJI_ZIP, os.getpid()).read("index.jsonl").splitlines()]


class Emoji:
    """The embedded data set: emoji of six vendors, 64 x 64 (sources and licences: NOTICE.txt inside the zip).

    Args:
        split: ``train``, ``val`` (concepts never trained on), ``test_style`` (trained concepts drawn by
            a vendor never trained on) or ``test_both``.
        captions: which texts a row offers, in this order: ``caption``, ``keywords`` (joined by a comma).
            With several, training draws one a sample and epoch, evaluation takes the first.

    Raises:
        ValueError: unknown split or text.
    """

    def __init__(self, split: str, *, captions: Sequence[str] = ("caption",)) -> None:
        rows = _emoji_index()
        splits = sorted({row["split"] for row in rows})
        if split not in splits:
            raise ValueError(f"Emoji: no split {split!r}; set split to one of {splits}")
        if isinstance(captions, str) or not set(captions) <= set(EMOJI_TEXTS):
            raise ValueError(f"Emoji: captions={captions!r}; set a list out of {list(EMOJI_TEXTS)}")
        rows = [row for row in rows if row["split"] == split]
        self.attributes = {name: Labels.of(row[name] for row in rows) for name in EMOJI_ATTRIBUTES}
        self._keys = [row["key"] for row in rows]
        self._files = [row["file"] for row in rows]
        texts = [{"caption": row["caption"], "keywords": ", ".join(row["keywords"])} for row in rows]
        self._captions = [[text[name] for name in captions if text[name]] for text in texts]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The row's key in the embedded index."""
        return self._keys[index]

    def encoded(self, index: int) -> bytes:
        """The picture as WebP."""
        return open_zip(EMOJI_ZIP, os.getpid()).read(self._files[index])

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        return decode(self.encoded(index), f"{EMOJI_ZIP}:{self._files[index]}", ["WEBP"])

    @property
    def mask_classes(self) -> dict[str, list[str]]:
        """The only mask, ``figure``."""
        return {"figure": ["ground", "figure"]}

    def masks(self, index: int) -> np.ndarray:
        """Which pixels are not white: (1, 64, 64) uint8. White inside a drawing counts as ground."""
        return (np.asarray(self.image(index)).min(2) < WHITE).astype(np.uint8)[None]

    def captions(self, index: int) -> list[str]:
        """The texts chosen by ``captions``, without empty ones."""
        return self._captions[index]


class Folder:
    """Every image below a folder, nested or flat, in the order of its relative path.

    A split that is a folder is a source of its own: ``root=IMAGES/train``.

    Args:
        root: the folder.
        labels: the first folder level below ``root`` is the class (attribute ``label``); images that
            lie directly in ``root`` have none.
        captions: the text of an image is the file ``name.txt`` beside it, one caption a line.
        part: ``[low, high)``: only images whose path, hashed to [0, 1), lies there.

    Raises:
        ValueError: ``root`` is missing, no folder or without images; labels or captions are wanted
            and are not there.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        labels: bool = False,
        captions: bool = False,
        part: Sequence[float] | None = None,
    ) -> None:
        self.root = os.path.expanduser(root)
        if not os.path.isdir(self.root):
            fault = "is a file" if os.path.exists(self.root) else "does not exist"
            raise ValueError(f"Folder: root={str(root)!r} {fault}; set root to a folder of images")
        files = _relative_files(self.root)
        images = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
        if not images:
            raise ValueError(f"Folder: no image ({', '.join(IMAGE_SUFFIXES)}) below root={str(root)!r}")
        if captions:
            missing = [file for file in images if _text_file(file) not in files]
            if missing:
                raise ValueError(
                    f"Folder: {len(missing)} of {len(images)} images below {str(root)!r} have no caption file, "
                    f"the first is {missing[0]!r}; add {_text_file(missing[0])!r} or set captions=false"
                )
        packed = Packed.of(os.fsencode(file) for file in images)
        self._files = packed if part is None else packed.take(rows_of_part(packed, part))
        self._has_captions = captions
        self.attributes: dict[str, Sequence[str]] = {}
        if labels:
            folders = (self.key(row).partition("/") for row in range(len(self)))
            self.attributes["label"] = label = Labels.of(first if slash else "" for first, slash, _ in folders)
            if not label.present():
                raise ValueError(f"Folder: no image lies in a sub-folder of {str(root)!r}; set labels=false")

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """The path relative to the root, with forward slashes."""
        return os.fsdecode(self._files[index])

    def encoded(self, index: int) -> bytes:
        """The file, unchanged.

        Raises:
            OSError: it cannot be read.
        """
        return read_picture(os.path.join(self.root, self.key(index)))

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright.

        Raises:
            OSError: the file is no image or damaged; the message names its path.
        """
        return decode(self.encoded(index), os.path.join(self.root, self.key(index)))

    def captions(self, index: int) -> list[str]:
        """The lines of the text file beside the image that are not empty.

        Raises:
            OSError: the text file cannot be read, or is not UTF-8.
        """
        if not self._has_captions:
            return []
        path = os.path.join(self.root, _text_file(self.key(index)))
        try:
            with open(path, "rb") as file:
                return split_texts(file.read(), path, b"\n")
        except FileNotFoundError as error:
            raise OSError(f"{path}: no such file") from error


def _relative_files(root: str) -> set[str]:
    """Paths of all files below root, relative, with forward slashes; hidden ones (``._name.jpg``) are left out."""
    files: set[str] = set()
    for folder, _, names in os.walk(root, followlinks=True):
        relative = folder[len(root) :].strip(os.sep).replace(os.sep, "/")
        prefix = f"{relative}/" if relative else ""
        files.update(f"{prefix}{name}" for name in names if not name.startswith("."))
    return files


def _text_file(image_file: str) -> str:
    """The caption file that belongs to an image."""
    return image_file.rpartition(".")[0] + ".txt"


def split_texts(data: bytes, name: str, separator: bytes) -> list[str]:
    """The captions in a stored text, without empty ones.

    Args:
        data: UTF-8, with or without a byte-order mark.
        name: what the error calls the row.
        separator: what stands between two captions.

    Raises:
        OSError: it is not UTF-8.
    """
    try:
        texts = [part.decode("utf-8-sig").strip() for part in data.split(separator)]
    except UnicodeDecodeError as error:
        raise OSError(f"{name}: caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    return [text for text in texts if text]


def weighted_columns(captions: Sequence[str], weights: Sequence[float] | None, owner: str) -> dict[str, float]:
    """Column -> weight with which training draws it; None: all alike.

    Args:
        captions: the columns.
        weights: one each.
        owner: what the error calls the source.

    Raises:
        ValueError: not a list, or weights that do not fit.
    """
    if isinstance(captions, str):
        raise ValueError(f"{owner}: captions={captions!r}; set a list such as [{captions}]")
    weights = [1.0] * len(captions) if weights is None else weights
    if len(weights) != len(captions) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"{owner}: caption_weights={list(weights)} for captions={list(captions)}; set one positive weight each"
        )
    return dict(zip(captions, map(float, weights), strict=True))
