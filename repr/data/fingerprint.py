"""Short names for what data and texts hold, so that features are only taken for those of the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from repr.data.sources.source import Source, picture_name, prefetch

SAMPLE = 1000  # rows whose files are read at least, where there are as many


def of_rows(source: Source, rows: Tensor) -> str:
    """A hash of the pictures of some rows (M,), 64 hexadecimal digits.

    It takes the keys of all rows and the files of every n-th of them, 1,000 to 1,999 where there are as many: a file
    that is replaced by another under the same key is noticed if it is one of those.
    """
    digest, step = hashlib.sha256(type(source).__qualname__.encode()), max(1, len(rows) // SAMPLE)
    for row in rows.tolist():
        digest.update(source.key(row).encode(errors="surrogateescape") + b"\0")
    for part in rows[::step].split(100):
        prefetch(source, part.tolist())
        for row in part.tolist():
            try:
                digest.update(hashlib.sha256(source.encoded(row)).digest())
            except OSError:  # such a row is left out, as long as it cannot be read
                digest.update(b"-")
    return digest.hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """A hash of texts in their order, 64 hexadecimal digits."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode(errors="surrogatepass")).hexdigest()


def captions_of(source: Source, rows: Tensor) -> tuple[list[str], Tensor]:
    """The distinct captions of the pictures of some rows, each of another picture; all rows of a picture give theirs.

    Returns:
        The captions, and which belong to which rows: (P, 2) int64, positions in ``rows`` and in the captions; of a row
        they are in the order of the source. A row whose captions cannot be read has none.
    """
    position = {picture_name(source, row): place for place, row in enumerate(rows.tolist())}
    numbers: dict[str, int] = {}  # caption -> its position among the distinct ones
    pairs: dict[tuple[int, int], None] = {}
    for row in range(len(source)):
        if (place := position.get(picture_name(source, row))) is not None:
            with suppress(OSError):
                for caption in source.captions(row):
                    pairs[place, numbers.setdefault(caption, len(numbers))] = None
    return list(numbers), torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
