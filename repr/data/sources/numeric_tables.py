"""Blocks of numbers: several files joined by a key, and what a data module makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repr.data.sources.columns import Labels, label_text, no_row, part_filter
from repr.data.sources.source import Source, columns_of, tables_of
from repr.data.sources.table import read_csv, require_columns
from repr.data.sources.where import Where

if TYPE_CHECKING:
    from torch import Tensor


class NumericTables:
    """Rows of numbers, in one block or several, each from a file of its own; no pictures, no texts.

    All files have the same rows, each named by a key, in any order. A row that one file lacks is an error, as are a key
    that occurs twice and a cell that is empty or no finite number.

    Args:
        blocks: name -> ``.csv`` or ``.tsv`` file with a header; all columns but the key are numbers.
        key: the column that names a row, in every file.
        labels: a file of the same kind and rows that has class names; None: there are none.
        attributes: those of its columns that are attributes; an empty cell is no label.
        where: column of ``labels`` -> value, list of values or comparison (:class:`repr.data.sources.where.Where`);
            other rows are left out (as those of another split are), but all files must have them.
        part: ``[low, high)``: only rows whose key, hashed to [0, 1), lies there.

    Attributes:
        tables: block -> (N, F) float32.
        columns: block -> the names of its F columns.

    Raises:
        ValueError: a file or column is missing, or a cell or row does not fit; the message names file, row and column.
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
        wanted, belongs = Where(where), part_filter(part)
        cells: dict[str, list[str]] = {}
        tables: dict[str, np.ndarray] = {}
        self.columns: dict[str, list[str]] = {}
        first, keys = "", list[str]()  # the file that decides the order of the rows, and its keys
        if labels is not None:
            first = os.path.expanduser(labels)
            header, rows = _read(first, key)
            keys = list(rows)
            require_columns(first, [*attributes, *wanted.columns], header)
            cells = {
                name: [label_text(row[header.index(name)], name) for row in rows.values()]
                for name in (*attributes, *wanted.columns)
            }
        for name, file in blocks.items():
            path = os.path.expanduser(file)
            self.columns[name], rows = _read(path, key)
            if not first:
                first, keys = path, list(rows)
            others = set(keys)
            for lacks, has, missing in ((path, first, others - rows.keys()), (first, path, rows.keys() - others)):
                if missing:
                    raise ValueError(
                        f"{lacks} lacks the row {min(missing)!r} of {has} ({len(missing)} of its rows); all files of a "
                        "set have the same rows: add them there or take them out here"
                    )
            tables[name] = _numbers(path, self.columns[name], {row: rows[row] for row in keys})
        fitting = (wanted.takes({column: cells[column][row] for column in wanted.columns}) for row in range(len(keys)))
        kept = np.flatnonzero([fits and belongs(name.encode()) for fits, name in zip(fitting, keys, strict=True)])
        wanted.tell(first)
        if not len(kept):
            raise no_row(first, where, part)
        self._keys = [keys[row] for row in kept]
        self.tables = {name: table[kept] for name, table in tables.items()}
        self.attributes = {name: Labels.of(cells[name]).take(kept) for name in attributes}

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The row's key."""
        return self._keys[index]

    def captions(self, index: int) -> list[str]:
        """There are none."""
        return []


def _read(path: str, key: str) -> tuple[list[str], dict[str, list[str]]]:
    """The F columns without the key, and for each of the N keys its F cells as they stand."""
    lines = read_csv(path)
    _, header = next(lines, (1, []))
    require_columns(path, [key], header)
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of one name; rename one")
    place = header.index(key)
    rows: dict[str, list[str]] = {}
    for line, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)}")
        name = cells.pop(place)
        if name in rows:
            raise ValueError(f"{path}, line {line}: the row {name!r} is there twice")
        rows[name] = cells
    if not rows:
        raise ValueError(f"{path} has no row")
    return [column for column in header if column != key], rows


def _numbers(path: str, header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> np.ndarray:
    """The cells as (N, F) float32."""
    numbers = np.empty((len(rows), len(header)), np.float32)
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        for number, cells in enumerate(rows.values()):
            try:
                numbers[number] = cells
            except ValueError:
                numbers[number] = [_number(cell) for cell in cells]
    for row, column in np.argwhere(~np.isfinite(numbers))[:1]:
        key = list(rows)[row]
        cell = rows[key][column]
        what = f"holds {cell!r}" if cell.strip() else "is empty"
        raise ValueError(
            f"{path}, row {key!r}, column {header[column]!r} {what}, which is no finite number; mend the cell, or "
            "leave the row or the column out"
        )
    return numbers


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def gather_tables(sources: Mapping[str, Source], *, min_max: bool) -> dict[str, dict[str, Tensor]]:
    """The blocks of all sets: set -> block -> (N, F) float32; empty ones where no set has any.

    Args:
        sources: ``train`` and the evaluation sets.
        min_max: bring each column to [0, 1] by its least and greatest value in ``train``; one that is constant there
            becomes 0.

    Raises:
        ValueError: a set has other blocks, or other columns, than ``train``.
    """
    import torch

    sets = {
        name: {block: torch.as_tensor(table) for block, table in tables_of(source).items()}
        for name, source in sources.items()
    }
    shapes = {
        name: ", ".join(f"{block} ({table.shape[1]} columns)" for block, table in blocks.items()) or "of no kind"
        for name, blocks in sets.items()
    }
    for name, source in sources.items():
        if shapes[name] != shapes["train"]:
            raise ValueError(
                f"data.eval.{name} has blocks of numbers {shapes[name]}, and data.train {shapes['train']}; give all "
                "sets the same ones, in the same order"
            )
        for block in sets["train"]:
            columns = (columns_of(of).get(block, ()) for of in (source, sources["train"]))
            for theirs, ours in zip(*columns, strict=False):  # a source need not name its columns
                if theirs != ours:
                    raise ValueError(
                        f"data.eval.{name}, block {block}: the column {theirs!r} stands where data.train has {ours!r}; "
                        "give both files the same columns in the same order"
                    )
    if min_max:
        for block, table in sets["train"].items():
            low, high = table.aminmax(dim=0)
            span = (high - low).masked_fill(high == low, torch.inf)
            for blocks in sets.values():
                blocks[block] = (blocks[block] - low) / span
    return sets
