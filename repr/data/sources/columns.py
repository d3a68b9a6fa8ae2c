"""Columns of a large table, packed so that forked workers share them.

A Python object a row would cost some 60 bytes and, because reference counts are written, a copy in every
worker. Here a column is two arrays that nobody writes to.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

_BLOCK = 1 << 16  # rows packed at a time, so that building a column needs little more than the column


class Packed(Sequence[bytes]):
    """N byte strings in one buffer: their length and 8 bytes each.

    Args:
        buffer: (total,) uint8, all strings one after the other.
        ends: (N,) int64, where each string ends.
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, values: Iterable[bytes]) -> Packed:
        """Pack the strings of any iterable."""
        packer = Packer()
        for value in values:
            packer.append(value)
        return packer.pack()

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """One column after the other."""
        starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        empty = np.empty(0, np.int64)
        return cls(np.concatenate([part.buffer for part in parts]), np.concatenate([empty, *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One string, or a list of several."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        start = self.ends[row - 1] if row else 0
        return self.buffer[start : self.ends[row]].tobytes()

    def take(self, rows: np.ndarray) -> Packed:
        """The strings of these rows, (M,) int64."""
        return Packed.of(self[row] for row in rows.tolist())


class Packer:
    """Collects strings for a :class:`Packed` column, packing them in blocks as they come."""

    def __init__(self) -> None:
        self._block: list[bytes] = []
        self._buffers, self._lengths = [b""], [np.empty(0, np.int64)]

    def append(self, value: bytes) -> None:
        """Add a row."""
        self._block.append(value)
        if len(self._block) == _BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._buffers.append(b"".join(self._block))
        self._lengths.append(np.fromiter(map(len, self._block), np.int64, len(self._block)))
        self._block.clear()

    def pack(self) -> Packed:
        """The column."""
        self._flush()
        return Packed(np.frombuffer(b"".join(self._buffers), np.uint8), np.cumsum(np.concatenate(self._lengths)))


class Labels(Sequence[str]):
    """The class names of one attribute, 4 bytes a row; ``''`` where a row has none.

    Args:
        codes: (N,) int32, positions in ``names``.
        names: the different class names.
    """

    def __init__(self, codes: np.ndarray, names: Sequence[str]) -> None:
        self.codes, self.names = codes, list(names)

    @classmethod
    def of(cls, values: Iterable[str]) -> Labels:
        """Number the names of any iterable in the order in which they come; labels are returned as they are."""
        if isinstance(values, Labels):
            return values
        labeler = Labeler()
        for value in values:
            labeler.append(value)
        return labeler.labels()

    @classmethod
    def constant(cls, name: str, num_rows: int) -> Labels:
        """The same name in every row."""
        return cls(np.zeros(num_rows, np.int32), [name])

    @classmethod
    def join(cls, parts: Sequence[Sequence[str]]) -> Labels:
        """One column after the other."""
        numbers: dict[str, int] = {}
        codes = [np.empty(0, np.int32)]
        for labels in map(Labels.of, parts):
            renumbered = np.array([numbers.setdefault(name, len(numbers)) for name in labels.names], np.int32)
            codes.append(renumbered[labels.codes] if len(renumbered) else labels.codes)
        return cls(np.concatenate(codes), list(numbers))

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One name, or a list of several."""
        if isinstance(index, slice):
            return [self.names[code] for code in self.codes[index]]
        return self.names[self.codes[index]]

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of these rows, (M,) int64."""
        return Labels(self.codes[rows], self.names)

    def present(self) -> set[str]:
        """The names that some row has, without ``''``."""
        return {self.names[code] for code in np.unique(self.codes)} - {""}


class Labeler:
    """Collects class names for a :class:`Labels` column."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._codes = array("i")

    def append(self, value: str) -> None:
        """Add a row."""
        self._codes.append(self._numbers.setdefault(value, len(self._numbers)))

    def labels(self) -> Labels:
        """The column."""
        return Labels(np.array(self._codes, np.int32), list(self._numbers))


def rows_of_part(keys: Iterable[bytes], part: Sequence[float]) -> np.ndarray:
    """Rows that belong to a part of a data set that the hash of their key decides.

    Rows keep their part when others are added, and whoever splits the same keys gets the same parts.

    Args:
        keys: N stable keys.
        part: ``[low, high)`` within [0, 1]; ``[0, 0.9]`` and ``[0.9, 1]`` split 9 to 1.

    Returns:
        (M,) int64 positions, ascending.

    Raises:
        ValueError: no such range, or no row lies in it.
    """
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"part={list(part)}; set [low, high] with 0 <= low < high <= 1, such as [0, 0.9]")
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in keys)
    share = np.frombuffer(digests, ">u8") / 2.0**64  # (N,) in [0, 1]
    rows = np.flatnonzero((share >= part[0]) & ((share < part[1]) | (part[1] == 1)))
    if not len(rows):
        raise ValueError(f"part={list(part)} holds none of {len(share)} rows; set a wider range")
    return rows


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


class CaptionColumns:
    """A base of sources whose captions come from columns, each with a weight.

    Args:
        captions: the columns, the main one first.
        weights: how often training draws each of them; None: all alike. The texts of one cell share its weight.

    Raises:
        ValueError: no list of columns, or weights that do not fit.
    """

    def __init__(self, captions: Sequence[str], weights: Sequence[float] | None) -> None:
        owner = type(self).__name__
        if isinstance(captions, str):
            raise ValueError(f"{owner}: captions={captions!r}; set a list such as [{captions}]")
        weights = [1.0] * len(captions) if weights is None else weights
        if len(weights) != len(captions) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(
                f"{owner}: caption_weights={list(weights)} for captions={list(captions)}; set one positive weight each"
            )
        self.weights = dict(zip(captions, map(float, weights), strict=True))

    def read_texts(self, index: int, column: str) -> list[str]:
        """The texts of one cell, without empty ones."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """The texts of all columns in their order, without empty ones."""
        return [text for column in self.weights for text in self.read_texts(index, column)]

    def caption_weights(self, index: int) -> list[float]:
        """One weight a text of :meth:`captions`."""
        cells = [(weight, len(self.read_texts(index, column))) for column, weight in self.weights.items()]
        return [weight / num for weight, num in cells for _ in range(num)]
