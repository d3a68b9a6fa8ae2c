"""A table of pictures: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from repr.data.sources.columns import (
    TEXT_END,
    ColumnSource,
    Labels,
    Packed,
    Packer,
    cell_text,
    encode_cell,
    label_text,
    no_row,
    part_filter,
    split_texts,
)
from repr.data.sources.embedded import find_embedded
from repr.data.sources.pictures import Reduction, decode, read_picture
from repr.data.sources.where import Where, row_weight, some_weight

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NO_TEXT = "a table has text, and pictures as paths, as bytes, or as Hugging Face's bytes and path"
MAX_PATH = 4096  # bytes; what is longer is no path
MAX_LINE = 2**24  # characters; a file without ends of lines would else be read as a whole
Row = tuple[int, dict[str, Any], str]  # number of its line from 1, column -> cell, and what is wrong with it


class Table(ColumnSource):
    """Rows of a file, one picture each.

    A row that says nothing usable (no path, more cells than the header, no JSON, an object as caption) is kept and
    cannot be read, so that training replaces and counts it; a file that cannot be understood as a whole is an error
    here. Text stands as it is; of typed cells None and NaN are empty, and 3.0 is 3.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` (which needs pyarrow: the extra ``parquet``).
        image: the column of the picture's path, or in Parquet of the picture itself: its file as bytes, or Hugging
            Face's struct of bytes and path. Such a picture is read when it is wanted.
        root: what relative paths start from; None: the folder of the table.
        captions: columns of texts, the main one first. Training draws one text a row and epoch.
        caption_weights: how often each column is drawn; None: all alike. A cell of JSON lines or Parquet may be a
            list, whose texts share the column's weight.
        labels: columns of class names, each an attribute.
        where: column -> value, list of values or comparison, such as ``">0.28"`` (see
            :class:`repr.data.sources.where.Where`); other rows are left out.
        weights: a column of numbers from 0 on, how often an epoch of training shows a row: 1 once, 2 twice (as other
            views), 0.5 in every other epoch, 0 never. None: all once. Evaluation reads every row once.
        part: ``[low, high)``: only rows whose key, hashed to [0, 1), lies there.
        group_by: ``image`` makes one row of all that have the picture's path, where that of the first stood: with the
            texts of all of them, and labels and weight of the first. A row that cannot be read stays by itself.

    Raises:
        ValueError: the file is missing, of another kind or damaged, a column is missing, a weight is none, or no row
            is left.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image: str = "image",
        root: str | Path | None = None,
        captions: Sequence[str] = (),
        caption_weights: Sequence[float] | None = None,
        labels: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
        weights: str | None = None,
        part: Sequence[float] | None = None,
        group_by: str | None = None,
    ) -> None:
        if group_by not in (None, "image"):
            raise ValueError(f"Table: group_by={group_by!r}; set it to image, or to null")
        self.path = os.path.expanduser(path)
        self.root = os.path.dirname(self.path) if root is None else os.path.expanduser(root)
        super().__init__(captions, caption_weights, labels)
        wanted, belongs = Where(where), part_filter(part)
        self._embedded = find_embedded(self.path, image) if self.path.lower().endswith(".parquet") else None
        if self._embedded and group_by:
            raise ValueError(
                f"{self.path}: column {image!r} holds pictures, which no path tells apart; set group_by=null"
            )
        lines, paths, shown = array("q"), Packer(), array("d")
        read = [
            *([] if self._embedded else [image]),
            *captions,
            *labels,
            *wanted.columns,
            *([weights] if weights else []),
        ]
        texts = {name: Packer() for name in captions}
        codes, names = {name: array("i") for name in labels}, {name: dict[str, int]() for name in labels}
        for line, cells, fault in read_rows(self.path, list(dict.fromkeys(read))):
            weight, picture, words, classes = 1.0, b"", dict.fromkeys(captions, b""), dict.fromkeys(labels, "")
            try:
                if not fault:
                    if not wanted.takes(cells):
                        continue
                    weight = row_weight(cells[weights], weights) if weights else 1.0
                    picture = b"line %d" % line if self._embedded else _encode_path(cells[image])
                    classes = {name: label_text(cells[name], name) for name in labels}
                    words = {name: encode_cell(cells[name]) for name in captions}
            except ValueError as error:
                raise ValueError(f"{self.path}, line {line}: {error}") from error
            except OSError as error:
                fault = str(error)
            if not belongs(picture):
                continue
            if fault or not picture:
                self._faults[len(lines)] = fault or f"no path in column {image!r}"
            lines.append(line)
            shown.append(weight)
            paths.append(picture)
            for name, packer in texts.items():
                packer.append(words[name])
            for name, numbers in names.items():
                codes[name].append(numbers.setdefault(classes[name], len(numbers)))
        wanted.tell(self.path)
        if not lines:
            raise no_row(self.path, where, part)
        self.row_weights = some_weight(np.array(shown), weights, self.path) if weights else None
        self._lines, self._paths = np.array(lines, np.int64), paths.pack()
        self._texts = {name: packer.pack() for name, packer in texts.items()}
        self.attributes = {name: Labels(np.array(codes[name]), list(numbers)) for name, numbers in names.items()}
        if group_by:
            self._group()

    def _group(self) -> None:
        """Make one row of all that have the same picture."""
        pictures = (
            f"\0{row}" if row in self._faults else os.path.normpath(os.fsdecode(path))
            for row, path in enumerate(self._paths)
        )
        groups = Labels.of(pictures).codes  # numbered as they appear
        order, sizes = groups.argsort(kind="stable"), np.bincount(groups)
        ends = sizes.cumsum()
        firsts = order[ends - sizes]
        self._faults = {int(groups[row]): fault for row, fault in self._faults.items()}
        self._lines, self._paths = self._lines[firsts], Packed.of(self._paths[row] for row in firsts)
        if self.row_weights is not None:
            self.row_weights = self.row_weights[firsts]
        for name, texts in self._texts.items():
            members = (order[end - size : end] for size, end in zip(sizes, ends, strict=True))
            self._texts[name] = Packed.of(TEXT_END.encode().join(texts[row] for row in rows) for rows in members)
        self.attributes = {name: labels.take(firsts) for name, labels in self.attributes.items()}

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        """The picture's path as the table has it; where it has none, or the picture itself, the line."""
        return os.fsdecode(self._paths[index]) or f"line {self._lines[index]}"

    def _name(self, index: int) -> str:
        path = "" if self._embedded else f" ({os.fsdecode(self._paths[index])})"
        return f"{self.path}, line {self._lines[index]}{path}"

    def _file(self, index: int) -> str:
        """The picture's path, or the row that it lies in; OSError where the row is damaged."""
        self._check_row(index)
        return self._name(index) if self._embedded else os.path.join(self.root, os.fsdecode(self._paths[index]))

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        name = self._file(index)
        if self._embedded is None:
            return read_picture(name)
        try:
            return self._embedded.read(int(self._lines[index]) - 1)
        except OSError as error:
            raise OSError(f"{name}: {error}") from error

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        return decode(self.encoded(index), self._file(index))

    def reduced(self, index: int, reduction: Reduction) -> Image.Image:
        """The picture, RGB, upright, at the scale that ``reduction`` allows."""
        return decode(self.encoded(index), self._file(index), reduction=reduction)

    def _read_texts(self, index: int, column: str) -> list[str]:
        self._check_row(index)
        return split_texts(self._texts[column][index], self._name(index))


def _encode_path(cell: Any) -> bytes:
    """A path; raises OSError where a cell cannot be one."""
    path = encode_cell(cell_text(cell))  # not a list
    if len(path) > MAX_PATH:
        raise OSError(f"a path of {len(path):,} bytes ({os.fsdecode(path[:40])!r} ...); name the column of paths")
    return path


def file_suffix(path: str, known: Sequence[str]) -> str:
    """What the name of a file ends in; raises ValueError where that is not known, or where there is no such file."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in known:
        raise ValueError(f"{path} is of no known kind; use {', '.join(known)}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; set it to a file that ends in {', '.join(known)}")
    return suffix


def read_csv(path: str, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV or TSV file, its header first, each with the number of its first line; empty ones are left out.

    ``errors`` says how bytes are decoded that are not UTF-8, as :func:`open` has it.

    Raises:
        ValueError: there is no such file, or it is of another kind or damaged.
    """
    delimiter = DELIMITERS[file_suffix(path, list(DELIMITERS))]
    csv.field_size_limit(MAX_LINE)  # the standard 128 kB would end the file at a long caption
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:
            # strict: else a quote that nobody closes swallows the rows after it into one caption
            reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
            line = 1
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: {error}; text with quotes is written in quotes, with each doubled"
        ) from error


def _lines(path: str, file: TextIO) -> Iterator[str]:
    """The lines of a file; raises ValueError at one that is longer than ``MAX_LINE``."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise ValueError(f"{path}, line {number} is longer than {MAX_LINE:,} characters; this is no table")
        yield line


def read_rows(path: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, with cells as the file has them; a row with a fault has none.

    Bytes that are not UTF-8 come as lone surrogates.

    Raises:
        ValueError: the file or a column is missing, or the file is damaged.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    return readers[file_suffix(path, list(readers))](path, columns)


def _read_csv(path: str, columns: Sequence[str]) -> Iterator[Row]:
    rows = read_csv(path, errors="surrogateescape")
    _, header = next(rows, (1, []))
    require_columns(path, columns, header)
    positions = {column: header.index(column) for column in columns}
    for line, cells in rows:
        if len(cells) > len(header):
            fault = f"{len(cells)} cells, but the header has {len(header)}: quote the text"
            yield line, {}, fault
        else:
            cells += [""] * (len(header) - len(cells))
            yield line, {column: cells[position] for column, position in positions.items()}, ""


def _read_jsonl(path: str, columns: Sequence[str]) -> Iterator[Row]:
    seen: set[str] = set()
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(_lines(path, file), 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                seen.update(row)
                yield number, {column: row.get(column) for column in columns}, ""
            else:
                yield number, {}, "not a JSON object"
    if seen:
        require_columns(path, columns, sorted(seen))


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Table: Parquet needs pyarrow: pip install 'repr-pretrain[parquet]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            require_columns(path, columns, names)
            for column in columns:
                kind = file.schema_arrow.types[names.index(column)]
                if pyarrow.types.is_nested(getattr(kind, "value_type", kind)):
                    raise ValueError(f"{path}: column {column!r} is {kind!s:.60}; {_NO_TEXT}")
            for block in file.iter_batches(columns=list(columns), batch_size=256):  # few, since a cell may be long
                for row in block.to_pylist():
                    number += 1
                    for column, cell in row.items():
                        if isinstance(cell, bytes) and b"\0" in cell:
                            raise ValueError(f"{path}, row {number}: column {column!r} holds bytes; {_NO_TEXT}")
                    yield number, row, ""
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"Table: {path}, after row {number}: {error}") from error


def require_columns(path: str, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError where one of the columns is not present in a file."""
    missing = [column for column in columns if column not in present]
    if missing:
        has = ", ".join(map(repr, present[:20])) + (" ..." if len(present) > 20 else "")
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {has}")
