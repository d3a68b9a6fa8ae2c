"""Every image below a folder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from unicodedata import normalize

from PIL import Image

from repr.cli import is_first
from repr.data.sources.columns import Labels, Packed, part_filter, split_texts
from repr.data.sources.pictures import IMAGE_SUFFIXES, OTHER_SUFFIXES, Reduction, decode, is_picture, read_picture
from repr.data.sources.plain_files import MAX_TEXT, read_plain

_log = logging.getLogger(__name__)


class Folder:
    """Every image below a folder, nested or flat, in the order of its relative path.

    Other files that look like pictures (HEIC, JPEG XL, a JPEG without suffix) are counted and named in one line.

    A split that is a folder is a source of its own: ``root=IMAGES/train``.

    Args:
        root: the folder.
        labels: the first folder level below ``root`` is the class (attribute ``label``); images that lie directly in
            ``root`` have none.
        captions: the text of an image is the file ``name.txt`` beside it, one caption a line.
        part: ``[low, high)``: only images whose path, hashed to [0, 1), lies there.

    Raises:
        ValueError: ``root`` is no folder or has no images, or it lacks the labels or captions that are wanted.
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
        files, belongs = set(_relative_files(self.root)), part_filter(part)
        images = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES) and belongs(os.fsencode(file)))
        left_out = _left_out(self.root, files)
        if not images:
            chosen = f" in part={list(part)}; widen it" if part else ""
            more = f"; {left_out}" if left_out else ""
            raise ValueError(f"Folder: no image ({', '.join(IMAGE_SUFFIXES)}) below root={str(root)!r}{chosen}{more}")
        if left_out and is_first():
            _log.warning("Folder: root=%r: %s", str(root), left_out)
        if captions:
            missing = [file for file in images if _text_file(file) not in files]
            if missing:
                raise ValueError(
                    f"Folder: {len(missing)} of {len(images)} images below {str(root)!r} have no caption file, "
                    f"the first is {missing[0]!r}; add {_text_file(missing[0])!r} or set captions=false"
                )
        self._files = Packed.of(map(os.fsencode, images))
        self._has_captions = captions
        self.attributes: dict[str, Sequence[str]] = {}
        if labels:
            parts = (image.partition("/") for image in images)
            self.attributes["label"] = label = Labels.of(
                normalize("NFC", first) if slash else "" for first, slash, _ in parts
            )
            if not label.present():
                raise ValueError(f"Folder: no image lies in a sub-folder of {str(root)!r}; set labels=false")

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        """The path relative to the root, with forward slashes."""
        return os.fsdecode(self._files[index])

    def encoded(self, index: int) -> bytes:
        """The file, unchanged."""
        return read_picture(os.path.join(self.root, self.key(index)))

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        return decode(self.encoded(index), os.path.join(self.root, self.key(index)))

    def reduced(self, index: int, reduction: Reduction) -> Image.Image:
        """The picture, RGB, upright, at the scale that ``reduction`` allows."""
        return decode(self.encoded(index), os.path.join(self.root, self.key(index)), reduction=reduction)

    def captions(self, index: int) -> list[str]:
        """The lines of the text file beside the image that are not empty."""
        if not self._has_captions:
            return []
        path = os.path.join(self.root, _text_file(self.key(index)))
        return split_texts(read_plain(path, MAX_TEXT, "a text"), path, "\n")


def _relative_files(root: str) -> Iterator[str]:
    """Paths of all files below root, relative, with forward slashes; hidden ones (``._name.jpg``) are left out.

    Links are followed. A folder that has several names is walked once, under its own where that lies below root.
    """
    folders, links, walked = [root], list[str](), set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        with suppress(OSError), os.scandir(folder) as entries:  # one that may not be read is left out
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in walked:
                continue
            walked.add((status.st_dev, status.st_ino))
            for entry in sorted(entries, key=lambda entry: entry.name):
                linked = entry.is_symlink()
                if os.path.isdir(entry.path) if linked else entry.is_dir():  # a link to itself is no folder
                    (links if linked else folders).append(entry.path)
                elif not entry.name.startswith("."):
                    yield entry.path[len(root) :].replace(os.sep, "/").lstrip("/")


def _left_out(root: str, files: Collection[str]) -> str:
    """A sentence about the files that look like pictures but do not have the name of one; empty where there are none.

    Of those whose suffix says nothing, the first 10,000 are looked into.
    """
    others = sorted(file for file in files if not file.lower().endswith((*IMAGE_SUFFIXES, ".txt")))
    named = [file for file in others if file.lower().endswith(OTHER_SUFFIXES)]
    unknown = (file for file in others if not file.lower().endswith(OTHER_SUFFIXES))
    found = named + [file for file in islice(unknown, 10_000) if is_picture(os.path.join(root, file))]
    if not found:
        return ""
    kinds = Counter(os.path.splitext(file)[1].lower() or "without suffix" for file in found)
    return (
        f"left out, though by name or content pictures: {len(found)} "
        f"({', '.join(f'{kind}: {count}' for kind, count in kinds.most_common(9))}), the first is {min(found)!r}; "
        f"convert or rename them to {', '.join(IMAGE_SUFFIXES[:4])}"
    )


def _text_file(image_file: str) -> str:
    """The caption file that belongs to an image."""
    return image_file.rpartition(".")[0] + ".txt"
