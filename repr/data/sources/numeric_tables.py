"""Blocks of numbers: several files joined by a key, and what a data module makes of them."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repr.data.sources.columns import Labels, rows_of_part
from repr.data.sources.source import Source, columns_of, tables_of
from repr.data.sources.table import DELIMITERS

Blocks = dict[str, np.ndarray]  # block -> (N, F) float32


class NumericTables:
    """Rows of numbers, in one block or several, each from a file of its own; no pictures, no texts.

    The rows of all files are the same ones, named by a key and in any order: a row that one file lacks is an error, as
    are a key that occurs twice and a cell that is empty or no finite number.

    Args:
        blocks: name -> ``.csv`` or ``.tsv`` file with a header; all columns but the key are numbers.
        key: the column that names a row, in every file.
        labels: a file of the same kind and rows with class names; None: there are none.
        attributes: its columns that are read, each an attribute; an empty cell is no label.
        where: column of ``labels`` -> value or list of values; other rows are left out (a split), once all files were
            found to have the same rows.
        part: ``[low, high)``: only rows whose key, hashed to [0, 1), lies there.

    Attributes:
        tables: block -> (N, F) float32.
        columns: block -> the names of its F columns.

    Raises:
        ValueError: a file or column is missing, a cell or a row does not fit; names file, row and column.
    """

    def __init__(
        self,
        blocks: Mapping[str, str | Path],
        *,
        key: str,
        labels: str | Path | None = None,
        attributes: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
        part: Sequence[float] | None = None,
    ) -> None:
        if not blocks:
            raise ValueError("NumericTables: blocks is empty; set it to {name: FILE.csv}")
        if isinstance(attributes, str):
            raise ValueError(f"NumericTables: attributes={attributes!r}; set a list such as [{attributes}]")
        if labels is None and (attributes or where):
            raise ValueError("NumericTables: attributes and where are columns of the file `labels`; set it")
        self.tables: Blocks = {}
        self.columns: dict[str, list[str]] = {}
        cells: dict[str, list[str]] = {}
        first = ""
        if labels is not None:
            first = os.path.expanduser(labels)
            self._keys, header, rows = _read(first, key)
            for column in (*attributes, *(where or {})):
                if column not in header:
                    raise ValueError(f"{first} has no column {column!r}; it has {', '.join(map(repr, header))}")
                cells[column] = [row[header.index(column)] for row in rows]
        for name, file in blocks.items():
            path = os.path.expanduser(file)
            keys, header, rows = _read(path, key)
            numbers = _numbers(path, keys, header, rows)
            if not first:
                first, self._keys = path, keys
            self.tables[name] = numbers[_places(self._keys, keys, first, path)]
            self.columns[name] = header
        self.attributes = {name: Labels.of(cells[name]) for name in attributes}
        kept = np.arange(len(self._keys))
        for column, wanted in (where or {}).items():
            values = {str(value) for value in (wanted if isinstance(wanted, list | tuple) else [wanted])}
            kept = kept[[cells[column][row] in values for row in kept]]
        if not len(kept):
            raise ValueError(f"NumericTables: {first} has no row{f' where {dict(where)}' if where else ''}")
        if part is not None:
            kept = kept[rows_of_part([self._keys[row].encode() for row in kept], part)]
        self._keys = [self._keys[row] for row in kept]
        self.tables = {name: table[kept] for name, table in self.tables.items()}
        self.attributes = {name: column.take(kept) for name, column in self.attributes.items()}

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The row's key."""
        return self._keys[index]

    def captions(self, index: int) -> list[str]:
        """None."""
        return []


def _read(path: str, key: str) -> tuple[list[str], list[str], list[list[str]]]:
    """Keys (N,), the other columns (F,), and their cells (N, F) as they stand."""
    delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower())
    if delimiter is None or not os.path.isfile(path):
        fault = "does not exist" if delimiter else "is of no known kind"
        raise ValueError(f"NumericTables: {path} {fault}; set it to a .csv or .tsv file")
    keys: dict[str, int] = {}
    rows = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if key not in header or len(set(header)) < len(header):
                fault = f"has no column {key!r}" if key not in header else "has two columns of one name"
                raise ValueError(f"{path} {fault}; its columns are {', '.join(map(repr, header[:20]))}")
            place = header.index(key)
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)}"
                    )
                name = cells.pop(place)
                if name in keys:
                    raise ValueError(f"{path}, line {reader.line_num}: the row {name!r} is there twice")
                keys[name] = len(keys)
                rows.append(cells)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError(f"{path} has no row")
    return list(keys), [column for column in header if column != key], rows


def _numbers(path: str, keys: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> np.ndarray:
    """The cells as (N, F) float32."""
    numbers = np.empty((len(rows), len(header)), np.float32)
    for number, (name, cells) in enumerate(zip(keys, rows, strict=True)):
        try:
            with np.errstate(over="ignore"):  # to infinity, which is told below
                numbers[number] = cells
            sound = bool(np.isfinite(numbers[number]).all())
        except ValueError:
            sound = False
        if not sound:
            column, cell = next((c, v) for c, v in zip(header, cells, strict=True) if not _is_number(v))
            what = f"holds {cell!r}" if cell.strip() else "is empty"
            raise ValueError(
                f"{path}, row {name!r}, column {column!r} {what}, which is no finite number; mend the cell, or leave "
                "the row or the column out"
            )
    return numbers


def _is_number(cell: str) -> bool:
    try:
        return abs(float(cell)) <= float(np.finfo(np.float32).max)
    except ValueError:
        return False


def _places(wanted: Sequence[str], keys: Sequence[str], first: str, path: str) -> np.ndarray:
    """Where each wanted row stands in a file, which must have these rows and no others."""
    places = {name: place for place, name in enumerate(keys)}
    for missing, has, lacks in (
        ([name for name in wanted if name not in places], first, path),
        (sorted(places.keys() - set(wanted)), path, first),
    ):
        if missing:
            raise ValueError(
                f"{lacks} lacks the row {missing[0]!r} of {has} ({len(missing)} of its rows); all files of a set have "
                "the same rows: add them there or take them out here"
            )
    return np.array([places[name] for name in wanted], np.int64)


def gather_tables(sources: Mapping[str, Source], *, min_max: bool) -> dict[str, dict[str, Tensor]]:
    """The blocks of all sets: set -> block -> (N, F) float32; empty ones where no set has any.

    Args:
        sources: ``train`` and the evaluation sets.
        min_max: bring each column to [0, 1] by its least and greatest value in ``train``; one that is constant there
            becomes 0.

    Raises:
        ValueError: a set has other blocks, or other columns, than ``train``.
    """
    sets = {
        name: {block: torch.as_tensor(table) for block, table in tables_of(source).items()}
        for name, source in sources.items()
    }
    shapes = {name: {block: table.shape[1] for block, table in blocks.items()} for name, blocks in sets.items()}
    for name, widths in shapes.items():
        if list(widths.items()) != list(shapes["train"].items()):
            raise ValueError(
                f"data.eval.{name} has blocks of numbers {_told(widths)}, and data.train {_told(shapes['train'])}; "
                "give all sets the same ones, in the same order"
            )
        for block in widths if name != "train" else ():
            theirs, ours = (columns_of(sources[s]).get(block) for s in (name, "train"))
            if theirs != ours:
                other = next((a, b) for a, b in zip(theirs or [], ours or [], strict=True) if a != b)
                raise ValueError(
                    f"data.eval.{name}, block {block}: the column {other[0]!r} stands where data.train has "
                    f"{other[1]!r}; give both files the same columns in the same order"
                )
    if min_max:
        for block in shapes["train"]:
            low, high = sets["train"][block].aminmax(dim=0)
            span = (high - low).masked_fill(high == low, torch.inf)
            for blocks in sets.values():
                blocks[block] = (blocks[block] - low) / span
    return sets


def _told(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({width} columns)" for name, width in widths.items()) or "of no kind"
