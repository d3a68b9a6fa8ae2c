"""Which rows are wanted, and how often an epoch shows them, by the cells of some columns."""

from __future__ import annotations

import itertools
import logging
import math
import operator
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from repr.cli import is_first
from repr.data.sources.columns import Labels, label_text

_log = logging.getLogger(__name__)

_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "!=": operator.ne}
Test = Callable[[Any], bool | None]  # whether a cell fits; None: it is no number, and is compared with one


class Where:
    """Rows are wanted by the cells of some columns, each of which must fit.

    The value of a column is that of its cells, or a list of such values; ``">0.28"`` and the like (``>=``, ``<``,
    ``<=``, ``!=``) compare with a number, and ``"!=val"`` with a text. A cell that is no number does not fit a
    comparison with one; rows that are left out for it alone are counted. Within a list a text is a value, whatever it
    begins with.

    Args:
        where: column -> value, list of values, or comparison.

    Raises:
        ValueError: ``>``, ``>=``, ``<`` or ``<=`` stands before what is no number.
    """

    def __init__(self, where: Mapping[str, Any] | None) -> None:
        self._tests = {column: _test(value, column) for column, value in (where or {}).items()}
        self._num_no_number = 0

    @property
    def columns(self) -> list[str]:
        """The columns that are looked at."""
        return list(self._tests)

    def takes(self, cells: Mapping[str, Any]) -> bool:
        """Whether a row is wanted, by its cells.

        Raises:
            ValueError, OSError: a cell has no text, see :func:`repr.data.sources.columns.label_text`.
        """
        fits = [test(cells[column]) for column, test in self._tests.items()]
        self._num_no_number += None in fits and False not in fits
        return all(fits)

    def tell(self, path: str) -> None:
        """Warn of the rows of a file that were left out because a cell is no number."""
        if self._num_no_number and is_first():
            told = " or ".join(map(repr, self.columns))
            _log.warning("%s: rows left out because %s is missing or no number: %d", path, told, self._num_no_number)


def number(cell: Any) -> float | None:
    """The number that a cell holds, also as text; None for anything else, NaN and infinity."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def wanted_rows(
    where: Where,
    columns: Mapping[str, Labels],
    keys: Iterable[bytes],
    belongs: Callable[[bytes], bool],
    damaged: Collection[int] = (),
) -> np.ndarray:
    """The rows (M,) int64 that are wanted by their cells and by their keys; of damaged ones the keys alone decide."""
    cells = zip(*(columns[name] for name in where.columns), strict=True) if where.columns else itertools.repeat(())
    fits = (
        belongs(key) and (row in damaged or where.takes(dict(zip(where.columns, found, strict=True))))
        for row, (key, found) in enumerate(zip(keys, cells, strict=False))
    )
    return np.flatnonzero(np.fromiter(fits, bool))


def row_weight(cell: Any, column: str) -> float:
    """How often an epoch shows a row; raises ValueError where its cell is no number from 0 on."""
    if (weight := number(cell)) is None or weight < 0:
        raise ValueError(
            f"the weight {reprlib.repr(cell)} in column {column!r} is no number from 0 on; set one, or leave the row "
            "out by where"
        )
    return weight


def row_weights(cells: Labels, column: str, path: str, damaged: Collection[int] = ()) -> np.ndarray:
    """How often an epoch shows each row, (N,) float64; damaged ones once.

    Raises:
        ValueError: a cell is no number from 0 on, or all are 0.
    """
    sound = np.setdiff1d(np.arange(len(cells)), list(damaged))
    weights, names = np.ones(len(cells)), np.zeros(len(cells.names))
    for code in np.unique(cells.codes[sound]):
        try:
            names[code] = row_weight(cells.names[code], column)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    weights[sound] = names[cells.codes[sound]]
    return some_weight(weights, column, path)


def some_weight(weights: np.ndarray, column: str, path: str) -> np.ndarray:
    """The weights of rows; raises ValueError where all are 0."""
    if not weights.any():
        raise ValueError(f"{path}: all weights in column {column!r} are 0, so no row would be trained on")
    return weights


def _test(value: Any, column: str) -> Test:
    match = re.fullmatch(r"\s*(>=|<=|!=|>|<)(.*)", value, re.DOTALL) if isinstance(value, str) else None
    if match is None:
        values = {label_text(one, column) for one in (value if isinstance(value, list | tuple) else [value])}
        return lambda cell: label_text(cell, column) in values
    compare, text = _COMPARE[match[1]], match[2].strip()
    bound = number(text)
    if bound is not None:
        return lambda cell: None if (found := number(cell)) is None else compare(found, bound)
    if match[1] == "!=":
        return lambda cell: label_text(cell, column) != text
    raise ValueError(
        f"where: {column} is {value!r}, and {text!r} is no number; set a number behind {match[1]}, or [{value!r}] for "
        "cells of this text"
    )
