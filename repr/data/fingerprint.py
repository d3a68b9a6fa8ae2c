"""Short names for what data and texts hold, so that features are only taken for those of the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from repr.data.sources.source import Source

SAMPLE = 1000  # rows whose files are read at least, where there are as many


def of_rows(source: Source, rows: Tensor) -> str:
    """A hash of the pictures of some rows (M,), 64 hexadecimal digits.

    It takes the keys of all rows and the files of every n-th of them, 1,000 to 1,999 where there are as many: a file
    that is replaced by another under the same key is noticed if it is one of those.
    """
    digest, step = hashlib.sha256(type(source).__qualname__.encode()), max(1, len(rows) // SAMPLE)
    for row in rows.tolist():
        digest.update(source.key(row).encode(errors="surrogateescape") + b"\0")
    for row in rows[::step].tolist():
        try:
            digest.update(hashlib.sha256(source.encoded(row)).digest())
        except OSError:  # such a row is left out, as long as it cannot be read
            digest.update(b"-")
    return digest.hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """A hash of texts in their order, 64 hexadecimal digits."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode(errors="surrogatepass")).hexdigest()


def captions_of(source: Source, rows: Tensor) -> tuple[list[str], Tensor]:
    """The distinct captions of some rows.

    Returns:
        The captions, and which belong to which rows: (P, 2) int64, positions in ``rows`` and in the captions, in the
        order of the rows and of their captions. A row whose captions cannot be read has none.
    """
    numbers: dict[str, int] = {}  # caption -> its position among the distinct ones
    pairs: list[tuple[int, int]] = []
    for position, row in enumerate(rows.tolist()):
        with suppress(OSError):
            own = dict.fromkeys(source.captions(row))
            pairs += [(position, numbers.setdefault(caption, len(numbers))) for caption in own]
    return list(numbers), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
