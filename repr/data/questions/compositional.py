"""What a set of compositional questions is, and a source of such questions whose pictures are files.

The benchmarks are read in :mod:`repr.data.questions.compositional_files` and :mod:`repr.data.questions.mmvp`; one that
needs no files is drawn by :mod:`repr.data.drawn.composition`. :func:`repr.metrics.compositional.compositional` scores
all of them.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from repr.data.sources.columns import Labels
from repr.data.sources.pictures import decode, open_zip, read_picture, read_zipped
from repr.data.sources.source import QuestionSource

if TYPE_CHECKING:
    from torch import Tensor


class Questions(NamedTuple):
    """The questions of a source of N rows."""

    texts: list[str]  # T captions, all different
    candidates: Tensor  # (N, K) int64, positions in `texts`, a row's right caption first and -1 for none
    items: Tensor  # (I, G) int64, the rows of each item, -1 for none
    split: str  # the attribute that names an item's part of the benchmark


def questions(source: QuestionSource) -> Questions:
    """All questions of a source.

    Raises:
        OSError: a row has no caption, or it cannot be read.
    """
    import torch

    from repr.data.datasets import MAX_CAPTION_CHARS

    places: dict[str, int] = {}
    rows = []
    for row in range(len(source)):
        captions = source.captions(row)
        if not captions:
            raise OSError(f"{source.key(row)}: no caption to ask for")
        texts = [text[:MAX_CAPTION_CHARS] for text in (captions[0], *source.distractors(row))]
        rows.append(torch.tensor([places.setdefault(text, len(places)) for text in texts]))
    candidates = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return Questions(list(places), candidates, torch.as_tensor(source.items), source.split)


def compared(asked: Questions) -> Tensor:
    """The captions that each row's picture is compared with: its candidates, and the right ones of its items' rows.

    Returns:
        (N, P) int64, positions in ``texts``, different ones in a row and -1 for none.
    """
    import torch

    texts = [set(row) - {-1} for row in asked.candidates.tolist()]
    right = asked.candidates[:, 0].tolist()
    for item in asked.items.tolist():
        rows = [row for row in item if row >= 0]
        for row in rows:
            texts[row] |= {right[other] for other in rows}
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(sorted(row)) for row in texts], batch_first=True, padding_value=-1
    )


class Case(NamedTuple):
    """A row: a picture with its caption and wrong ones."""

    key: str
    file: str  # relative to the folder, or a member of the zip
    caption: str
    distractors: Sequence[str] = ()
    split: str = ""  # empty: it counts in the score of all, and in no split
    box: tuple[float, float, float, float] | None = None  # left, upper, right, lower of what is shown of the picture


def members(path: str) -> list[str]:
    """The names of the files in a zip; ValueError if it is none, or damaged."""
    try:
        return open_zip(Path(path), os.getpid()).namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: no whole zip ({error})") from error


class Cases:
    """A source of cases whose pictures are files of a folder, or of a zip.

    ``split`` names the attribute that ``Case.split`` is. Each item has so many ``rows``, which follow each other.

    Raises:
        ValueError: there are no cases, or pictures are missing.
    """

    def __init__(self, pictures: str | Path, cases: Sequence[Case], *, split: str, rows: int = 1) -> None:
        if not cases:
            raise ValueError(f"{type(self).__name__}: no case in its files; set root to the folder of the benchmark")
        self.pictures, self.cases, self.split = os.path.expanduser(pictures), cases, split
        self.items = np.arange(len(cases)).reshape(-1, rows)
        self.attributes = {split: Labels.of(case.split for case in cases)}
        self._zipped = os.path.isfile(self.pictures)
        files = dict.fromkeys(case.file for case in cases)
        there = set(members(self.pictures)) if self._zipped else {f for f in files if os.path.isfile(self._path(f))}
        if missing := [file for file in files if file not in there]:
            raise ValueError(
                f"{type(self).__name__}: {len(missing)} of {len(files)} pictures are missing, "
                f"the first is {self._path(missing[0])!r}"
            )

    def _path(self, file: str) -> str:
        return os.path.join(self.pictures, file)

    def __len__(self) -> int:
        return len(self.cases)

    def key(self, index: int) -> str:
        """The name of the case in its benchmark."""
        return self.cases[index].key

    def encoded(self, index: int) -> bytes:
        """The file, unchanged; the whole picture also where a box is shown."""
        file = self.cases[index].file
        return read_zipped(self.pictures, file) if self._zipped else read_picture(self._path(file))

    def image(self, index: int) -> Image.Image:
        """What is shown of the picture, RGB, upright."""
        case = self.cases[index]
        image = decode(self.encoded(index), self._path(case.file))
        return image if case.box is None else image.crop(case.box)

    def captions(self, index: int) -> list[str]:
        """The right caption."""
        return [self.cases[index].caption]

    def distractors(self, index: int) -> Sequence[str]:
        """The wrong captions."""
        return self.cases[index].distractors
