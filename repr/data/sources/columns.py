"""Columns of a large table, packed so that forked workers share them.

A Python object for each row would cost some 60 bytes and, because reference counts are written, a copy in every worker.
Here a column is two arrays that nobody writes to.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from repr.data.sources.pictures import Reduction, decode
from repr.data.sources.plain_files import MAX_TEXT

TEXT_END = "\0"  # between the texts of one cell that holds several


@dataclass(eq=False)
class Packed:
    """N byte strings in one buffer, which take their length and 8 bytes each."""

    buffer: np.ndarray  # (total,) uint8, all strings one after the other
    ends: np.ndarray  # (N,) int64, where each string ends

    @classmethod
    def of(cls, values: Iterable[bytes]) -> Packed:
        """Pack the strings of any iterable."""
        packer = Packer()
        for value in values:
            packer.append(value)
        return packer.pack()

    @classmethod
    def join(cls, parts: Sequence[Packed]) -> Packed:
        """Join columns, one after the other."""
        starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.buffer for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> bytes:
        row = range(len(self))[index]
        start = self.ends[row - 1] if row else 0
        return self.buffer[start : self.ends[row]].tobytes()


class Packer:
    """Collects strings for a :class:`Packed` column, in little more memory than the column needs."""

    def __init__(self) -> None:
        self._buffer, self._ends = bytearray(), array("q")

    def append(self, value: bytes) -> None:
        """Add a row."""
        self._buffer += value
        self._ends.append(len(self._buffer))

    def pack(self) -> Packed:
        """The column."""
        return Packed(np.frombuffer(self._buffer, np.uint8), np.frombuffer(self._ends, np.int64))


@dataclass(eq=False)
class Labels(Sequence[str]):
    """The class names of one attribute, 4 bytes a row; ``''`` where a row has none."""

    codes: np.ndarray  # (N,) int32, positions in `names`
    names: list[str]  # the different class names

    @classmethod
    def of(cls, values: Iterable[str]) -> Labels:
        """Number the names of any iterable in their order of appearance; labels are returned as they are."""
        if isinstance(values, Labels):
            return values
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int32)
        return cls(codes, list(numbers))

    @classmethod
    def join(cls, parts: Sequence[Sequence[str]]) -> Labels:
        """Join columns, one after the other."""
        numbers: dict[str, int] = {}
        codes = []
        for labels in map(Labels.of, parts):
            renumbered = np.array([numbers.setdefault(name, len(numbers)) for name in labels.names], np.int32)
            codes.append(renumbered[labels.codes])
        return cls(np.concatenate(codes), list(numbers))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Any:
        """One name, or a list of several for a slice."""
        codes = self.codes[index]
        return [self.names[code] for code in codes] if isinstance(index, slice) else self.names[codes]

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of these rows, (M,) int64."""
        return Labels(self.codes[rows], self.names)

    def present(self) -> set[str]:
        """The names that some row has, without ``''``."""
        return {self.names[code] for code in np.unique(self.codes)} - {""}


def part_filter(part: Sequence[float] | None) -> Callable[[bytes], bool]:
    """Make a function that tells from a row's key whether the row belongs to a part of a data set.

    The hash of the key decides. So rows keep their part when others are added, and whoever splits the same keys gets
    the same parts.

    Args:
        part: ``[low, high)`` within [0, 1]; ``[0, 0.9]`` and ``[0.9, 1]`` split 9 to 1. None: every row belongs to it.

    Raises:
        ValueError: there is no such range.
    """
    if part is None:
        return lambda key: True
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"part={list(part)}; set [low, high] with 0 <= low < high <= 1, such as [0, 0.9]")
    low, high = part

    def belongs(key: bytes) -> bool:
        share = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64  # in [0, 1]
        return low <= share and (share < high or high == 1)

    return belongs


def no_row(path: str, where: Mapping[str, Any] | None, part: Sequence[float] | None) -> ValueError:
    """The error of a data set without a row that is wanted."""
    wanted = (f" where {dict(where)}" if where else "") + (f" in part={list(part)}; widen it" if part else "")
    return ValueError(f"{path} has no row{wanted}")


def cell_text(cell: Any) -> str:
    """A single value as text: empty for None and NaN, a whole number without a point, bytes as UTF-8.

    Bytes that are not UTF-8 become lone surrogates.

    Raises:
        OSError: it is a list, an object or infinite.
    """
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (list, tuple, dict)) or (isinstance(cell, float) and math.isinf(cell)):
        raise OSError(f"{reprlib.repr(cell)} is no text")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, bytes):
        return cell.decode("utf-8-sig", "surrogateescape")
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell)


def label_text(cell: Any, name: str) -> str:
    """A class name from the cell of a label: as text, in Unicode's composed form (NFC), without space around it.

    Raises:
        ValueError: it is a list or an object; the message begins with the ``name`` of the label.
        OSError: it is infinite, or not UTF-8.
    """
    if isinstance(cell, (list, tuple, dict)):
        raise ValueError(f"the label {name!r} is {reprlib.repr(cell)}; a label is a single value")
    text = unicodedata.normalize("NFC", cell_text(cell).strip())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OSError(f"the label {name!r} is not UTF-8") from error
    return text


def encode_cell(cell: Any) -> bytes:
    """The text of a cell in UTF-8, those of a list joined by ``TEXT_END``.

    What was no UTF-8 and was decoded to lone surrogates comes out as it was.

    Raises:
        OSError: it is no text, as :func:`cell_text` has it, or longer than ``MAX_TEXT`` bytes.
    """
    text = TEXT_END.join(map(cell_text, cell)) if isinstance(cell, (list, tuple)) else cell_text(cell)
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair, from an escape in JSON: stays undecodable
        data = text.encode("utf-8", "surrogatepass")
    if len(data) > MAX_TEXT:
        raise OSError(f"a text of {len(data):,} bytes, more than {MAX_TEXT:,}")
    return data


def split_texts(data: bytes, name: str, separator: str = TEXT_END) -> list[str]:
    """The captions between the separators of a UTF-8 text, with or without a byte-order mark; empty ones are left out.

    They come in Unicode's composed form (NFC), as labels do.

    Raises:
        OSError: it is not UTF-8; the message begins with ``name``.
    """
    try:
        texts = [part.decode("utf-8-sig").strip() for part in data.split(separator.encode())]
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    except UnicodeDecodeError as error:
        raise OSError(f"{name}: caption is not UTF-8 ({error.reason} at byte {error.start})") from error
    return [text for text in texts if text]


class ColumnSource(ABC):
    """A base of sources with pictures, weighted columns of captions, columns of labels, and rows that are damaged.

    Args:
        captions: the columns, the main one first.
        weights: how often training draws each of them; None: all alike. The texts of one cell share its weight.
        labels: the columns of class names.

    Raises:
        ValueError: columns are not given as a list, or weights do not fit.
    """

    def __init__(self, captions: Sequence[str], weights: Sequence[float] | None, labels: Iterable[str]) -> None:
        owner = type(self).__name__
        for option, columns in (("captions", captions), ("labels", labels)):
            if isinstance(columns, str):
                raise ValueError(f"{owner}: {option}={columns!r}; set a list such as [{columns}]")
        weights = [1.0] * len(captions) if weights is None else weights
        if len(weights) != len(captions) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(
                f"{owner}: caption_weights={list(weights)} for captions={list(captions)}; set one positive weight each"
            )
        self.weights = dict(zip(captions, map(float, weights), strict=True))
        self._faults: dict[int, str] = {}  # row -> why it cannot be read

    @abstractmethod
    def _name(self, index: int) -> str:
        """What errors call a row."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        return decode(self.encoded(index), self._name(index))

    def reduced(self, index: int, reduction: Reduction) -> Image.Image:
        """The picture, RGB, upright, at the scale that ``reduction`` allows."""
        return decode(self.encoded(index), self._name(index), reduction=reduction)

    def _check_row(self, index: int) -> None:
        """Raise OSError where a row is damaged."""
        if index in self._faults:
            raise OSError(f"{self._name(index)}: {self._faults[index]}")

    @abstractmethod
    def _read_texts(self, index: int, column: str) -> list[str]:
        """The texts of one cell, without empty ones."""

    def captions(self, index: int) -> list[str]:
        """The texts of all columns in their order, without empty ones."""
        return [text for column in self.weights for text in self._read_texts(index, column)]

    def caption_weights(self, index: int) -> list[float]:
        """One weight for each text of :meth:`captions`."""
        cells = [(weight, len(self._read_texts(index, column))) for column, weight in self.weights.items()]
        return [weight / num for weight, num in cells for _ in range(num)]
