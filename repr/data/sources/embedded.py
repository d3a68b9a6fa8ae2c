"""Pictures that lie in a column of a Parquet file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from repr.cli import is_first
from repr.data.sources.plain_files import MAX_BYTES

ROWS = 8  # read at a time, since a picture may be large
SLOW = 2**27  # bytes of a row group from which on reading at random takes longer than decoding

_log = logging.getLogger(__name__)


class EmbeddedPictures:
    """The cells of a column of bytes, or of Hugging Face's struct of ``bytes`` and ``path``, of which ``bytes`` count.

    A cell is found by reading its row group from the beginning; rows in their order are read once. A process holds
    ``ROWS`` cells and the page of the file that they lie in.

    Args:
        path: the Parquet file.
        column: the column.
    """

    def __init__(self, path: str, column: str) -> None:
        import pyarrow.parquet

        self.path, self.column = path, column
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._at = (-1, -1)  # the process that reads, and its row group
        self._first, self._cells = 0, list[Any]()  # what was read last: the place in the group, and cells from it on
        self._rest: Iterator[list[Any]] = iter(())
        if is_first() and (largest := max((group.total_byte_size for group in groups), default=0)) > SLOW:
            _log.warning(
                "%s: a picture is found by reading its row group, of up to %d MB: write groups of some 100 rows, use "
                "data=hf, or pack shards (tools/make_shards.py)", path, largest // 10**6
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """The state without an open file, which another process cannot have."""
        return self.__dict__ | {"_at": (-1, -1), "_cells": [], "_rest": None}

    def read(self, row: int) -> bytes:
        """The bytes of a row's picture.

        Raises:
            OSError: there are none, or the file is damaged.
        """
        import pyarrow

        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[group])
        try:
            if self._at != (os.getpid(), group) or place < self._first:  # a file that was forked shares its position
                self._at, self._first, self._cells, self._rest = (os.getpid(), group), 0, [], self._read_group(group)
            while place >= self._first + len(self._cells):
                self._first += len(self._cells)
                self._cells = next(self._rest)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            self._at = (-1, -1)
            raise OSError(f"damaged ({str(error)[:200]})") from error
        cell = self._cells[place - self._first].as_py()
        if not cell or len(cell) > MAX_BYTES:
            fault = f"{len(cell):,} bytes, more than {MAX_BYTES:,}" if cell else "no picture"
            raise OSError(f"{fault} in column {self.column!r}")
        return cell

    def _read_group(self, group: int) -> Iterator[list[Any]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False) as file:
            for block in file.iter_batches(ROWS, row_groups=[group], columns=[self.column], use_threads=False):
                cells = block.column(0)
                yield list(cells.field("bytes") if pyarrow.types.is_struct(cells.type) else cells)


def find_embedded(path: str, column: str) -> EmbeddedPictures | None:
    """The pictures of a column of a Parquet file; None where it holds other things, such as paths, or is not there.

    Bytes without a zero are paths, since old writers store text so. Whoever reads the rows tells what is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            position = file.schema_arrow.get_field_index(column)
            kind = file.schema_arrow.types[position] if position >= 0 else pyarrow.null()
            if pyarrow.types.is_struct(kind):
                is_ours = any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
            else:
                blocks = file.iter_batches(ROWS, columns=[column], use_threads=False) if _is_bytes(kind) else ()
                first = next((cell.as_py() for block in blocks for cell in block.column(0) if cell.is_valid), b"")
                is_ours = b"\0" in first
            return EmbeddedPictures(path, column) if is_ours else None
    except (OSError, pyarrow.ArrowException):
        return None


def _is_bytes(kind: Any) -> bool:
    from pyarrow.types import is_dictionary

    return str(kind.value_type if is_dictionary(kind) else kind) in ("binary", "large_binary", "binary_view")
