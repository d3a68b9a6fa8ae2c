"""A table of pictures: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import os
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repr.data.sources.columns import CaptionColumns, Labeler, Labels, Packer, rows_of_part, split_texts
from repr.data.sources.pictures import decode, read_picture

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TEXT_END = "\0"  # between the texts of one cell that holds several


class Table(CaptionColumns):
    """Rows of a file, one picture each.

    A row that says nothing usable (no path, more cells than the header, no JSON) is kept and cannot be read, so
    that training replaces and counts it; a file that cannot be understood as a whole is an error here.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` (which needs pyarrow: the extra ``parquet``).
        image: the column of the picture's path.
        root: what relative paths start from; None: the folder of the table.
        captions: columns of texts, the main one first. Training draws one text a row and epoch.
        caption_weights: of the columns, for that draw; None: all alike. A cell of JSON lines or Parquet may be a list,
            whose texts share the column's weight.
        labels: columns of class names, each an attribute.
        where: column -> value or list of values; other rows are left out (a split, a licence).
        part: ``[low, high)``: only rows whose picture's path, hashed to [0, 1), lies there.

    Raises:
        ValueError: the file is missing, of another kind or damaged, a column is missing, or no row is left.
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
        part: Sequence[float] | None = None,
    ) -> None:
        self.path = os.path.expanduser(path)
        self.root = os.path.dirname(self.path) if root is None else os.path.expanduser(root)
        super().__init__(captions, caption_weights)
        if isinstance(labels, str):
            raise ValueError(f"Table: labels={labels!r}; set a list such as [{labels}]")
        wanted = {
            column: {_text(value) for value in (values if isinstance(values, list | tuple) else [values])}
            for column, values in (where or {}).items()
        }
        columns = list(dict.fromkeys([image, *self.weights, *labels, *wanted]))
        lines, paths = array("q"), Packer()
        texts = {name: Packer() for name in self.weights}
        names = {name: Labeler() for name in labels}
        self._faults: dict[int, str] = {}
        for line, cells in read_rows(self.path, columns):
            if isinstance(cells, str):
                fault, cells = cells, {}
            elif any(cells[column] not in values for column, values in wanted.items()):
                continue
            else:
                fault = "" if cells[image] else f"no path in column {image!r}"
            if fault:
                self._faults[len(lines)] = fault
            lines.append(line)
            paths.append(_bytes(cells.get(image, "")))
            for name, packer in texts.items():
                packer.append(_bytes(cells.get(name, "")))
            for name, labeler in names.items():
                labeler.append(cells.get(name, ""))
        if not lines:
            raise ValueError(f"Table: {self.path} has no row{f' where {dict(where)}' if where else ''}")
        self._lines, self._paths = np.array(lines, np.int64), paths.pack()
        self._texts = {name: packer.pack() for name, packer in texts.items()}
        self.attributes: dict[str, Labels] = {name: labeler.labels() for name, labeler in names.items()}
        if part is not None:
            self._take(rows_of_part(self._paths, part))

    def _take(self, rows: np.ndarray) -> None:
        """Keep these rows only."""
        self._faults = {new: self._faults[old] for new, old in enumerate(rows.tolist()) if old in self._faults}
        self._lines, self._paths = self._lines[rows], self._paths.take(rows)
        self._texts = {name: column.take(rows) for name, column in self._texts.items()}
        self.attributes = {name: column.take(rows) for name, column in self.attributes.items()}

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        """The picture's path as the table has it; where it has none, the line."""
        return os.fsdecode(self._paths[index]) or f"line {self._lines[index]}"

    def _name(self, index: int) -> str:
        """What errors call a row."""
        return f"{self.path}, line {self._lines[index]} ({os.fsdecode(self._paths[index])})"

    def _file(self, index: int) -> str:
        """The picture's path.

        Raises:
            OSError: the row is damaged.
        """
        if index in self._faults:
            raise OSError(f"{self._name(index)}: {self._faults[index]}")
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        return read_picture(self._file(index))

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        path = self._file(index)
        return decode(read_picture(path), path)

    def read_texts(self, index: int, column: str) -> list[str]:
        """The texts of one cell, without empty ones."""
        if index in self._faults:
            raise OSError(f"{self._name(index)}: {self._faults[index]}")
        return split_texts(self._texts[column][index], self._name(index), _TEXT_END.encode())


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    """The rows of a table: line number from 1, and column -> cell, or what is wrong with the row.

    Cells are text; what is missing is ``''``, texts of a list are joined by NUL. Bytes that are not UTF-8 come as
    lone surrogates.

    Raises:
        ValueError: the file or a column is missing, or the file is damaged.
    """
    if not os.path.isfile(path):
        raise ValueError(f"Table: path={path!r} does not exist; set path to a .csv, .tsv, .jsonl or .parquet file")
    suffix = os.path.splitext(path)[1].lower()
    if suffix in DELIMITERS:
        return _read_csv(path, columns, DELIMITERS[suffix])
    if suffix == ".jsonl":
        return _read_jsonl(path, columns)
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    raise ValueError(f"Table: {path} is of no known kind; use .csv, .tsv, .jsonl or .parquet")


def _read_csv(path: str, columns: Sequence[str], delimiter: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    limit = csv.field_size_limit(sys.maxsize)  # the standard 128 kB would end the file at a long caption
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            # strict: else a quote that nobody closes swallows the rows after it into one caption
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            _require(path, columns, header)
            positions = {column: header.index(column) for column in columns}
            line = reader.line_num + 1  # where the next row begins; it may have several lines
            for cells in reader:
                if len(cells) > len(header):
                    yield line, f"{len(cells)} cells, but the header has {len(header)}: quote the text"
                elif cells:
                    cells += [""] * (len(header) - len(cells))
                    yield line, {column: cells[position] for column, position in positions.items()}
                line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"Table: {path}, line {reader.line_num}: {error}; text with quotes is written in quotes, with each doubled"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    seen: set[str] = set()
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                seen.update(row)
                yield number, {column: _text(row.get(column)) for column in columns}
            else:
                yield number, "not a JSON object"
    if seen:
        _require(path, columns, sorted(seen))


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Table: Parquet needs pyarrow: pip install 'repr-pretrain[parquet]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(path, columns, file.schema_arrow.names)
            for block in file.iter_batches(columns=list(columns)):
                for row in block.to_pylist():
                    number += 1
                    yield number, {column: _text(row[column]) for column in columns}
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"Table: {path}, after row {number}: {error}") from error


def _require(path: str, columns: Sequence[str], present: Sequence[str]) -> None:
    missing = [column for column in columns if column not in present]
    if missing:
        raise ValueError(f"Table: {path} has no column {missing[0]!r}; it has {', '.join(map(repr, present))}")


def _text(cell: Any) -> str:
    """A cell of any kind as text."""
    if isinstance(cell, list | tuple):
        return _TEXT_END.join(_text(part) for part in cell)
    return "" if cell is None else str(cell)


def _bytes(text: str) -> bytes:
    """UTF-8, with bytes that were not UTF-8 as they came."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair, from an escape in JSON: stays undecodable
        return text.encode("utf-8", "surrogatepass")
