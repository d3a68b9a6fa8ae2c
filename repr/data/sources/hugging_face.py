"""Data sets of the library ``datasets``: saved to disk, Parquet files of a folder, or by their name on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repr.data.sources.columns import ColumnSource, Labels, encode_cell, label_text, no_row, part_filter, split_texts
from repr.data.sources.pictures import read_picture
from repr.data.sources.plain_files import MAX_BYTES
from repr.data.sources.table import require_columns
from repr.data.sources.where import Where, row_weights, wanted_rows

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFace(ColumnSource):
    """The rows of a split, which the library maps from its Arrow files into memory.

    Pictures are decoded here, with our limits. Parquet is copied into the library's cache when it is first read. No
    code of a data set is run, and there is no network unless the name of a data set on the hub asks for it.

    Args:
        path: what ``save_to_disk`` has written, a folder with Parquet files, a Parquet file, or a name on the hub
            (``owner/name``).
        split: which rows, such as ``train`` or, but for a folder of ``save_to_disk``, ``train[:90%]``.
        subset: which of the data sets under the name, where the hub has several.
        revision: branch, tag or commit on the hub.
        image: the column of pictures, an image feature or the files as bytes.
        captions: columns of texts, the main one first. Training draws one text a row and epoch.
        caption_weights: how often each column is drawn; None: all alike. A cell may be a list, whose texts share the
            column's weight.
        labels: columns of class names, each an attribute; numbers of a ``ClassLabel`` are given their names.
        where: column -> value, list of values or comparison (:class:`repr.data.sources.where.Where`); other rows are
            left out. Its columns are read as labels are.
        weights: a column of numbers from 0 on, how often an epoch of training shows a row: 1 once, 2 twice (as other
            views), 0.5 in every other epoch, 0 never. None: all once.
        part: ``[low, high)``: only rows whose key, hashed to [0, 1), lies there.

    Raises:
        ValueError: there is no such data set, split or column, a column is of another kind, a weight is none, or no row
            is left.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        image: str = "image",
        captions: Sequence[str] = (),
        caption_weights: Sequence[float] | None = None,
        labels: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
        weights: str | None = None,
        part: Sequence[float] | None = None,
    ) -> None:
        super().__init__(captions, caption_weights, labels)
        self.path, self._column = path, image
        data = _opened(os.path.expanduser(path), split, subset, revision)
        wanted = Where(where)
        names = list(dict.fromkeys([*labels, *wanted.columns, *([weights] if weights else [])]))
        require_columns(path, [image, *captions, *names], data.column_names)
        columns = {name: _labels(data, name) for name in names}
        self._rows = np.arange(len(data))
        if where or part is not None:
            self._rows = wanted_rows(wanted, columns, map(_key, range(len(data))), part_filter(part))
            wanted.tell(path)
        if not len(self._rows):
            raise no_row(path, where, part)
        columns = {name: column.take(self._rows) for name, column in columns.items()}
        self._pictures = _pictures(data, image, path)
        self._texts = data.select_columns(_texts(data, captions, path))
        self.attributes = {name: columns[name] for name in labels}
        self.row_weights = row_weights(columns[weights], weights, path) if weights else None

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The row's number in the split."""
        return _key(self._rows[index]).decode()

    def _name(self, index: int) -> str:
        return f"{self.path}, {self.key(index)}"

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        cell = self._pictures[int(self._rows[index])][self._column]
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if not data and path:  # a file that the data set points to
            return read_picture(path)
        if not data or len(data) > MAX_BYTES:
            fault = f"{len(data):,} bytes, more than {MAX_BYTES:,}" if data else "no picture"
            raise OSError(f"{self._name(index)}: {fault} in column {self._column!r}")
        return data

    def _read_texts(self, index: int, column: str) -> list[str]:
        cell, name = self._texts[int(self._rows[index])][column], self._name(index)
        try:
            return split_texts(encode_cell(cell), name)
        except OSError as error:
            raise OSError(f"{name}: {column}: {error}") from error


def _key(row: int) -> bytes:
    return b"row %d" % row


def _opened(path: str, split: str, subset: str | None, revision: str | None) -> Dataset:
    """A split of a data set, on disk or on the hub; raises ValueError where there is none."""
    try:
        import datasets
        from pyarrow import ArrowException
    except ImportError as error:
        raise ValueError("HuggingFace needs the library datasets: pip install 'repr-pretrain[hf]'") from error
    known = os.path.exists(path)
    if not known and not _HUB_NAME.fullmatch(path):
        raise ValueError(f"HuggingFace: path={path!r} does not exist; set it to a folder, or to owner/name on the hub")
    if known and (subset or revision):
        raise ValueError(f"HuggingFace: {path} is on the disk, so subset and revision mean nothing; remove them")
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            data = datasets.load_from_disk(path)
            splits = data if isinstance(data, dict) else {str(data.split or split): data}
            if split not in splits:
                raise ValueError(f"it has no split {split!r}; set split to one of {list(splits)}")
            data = splits[split]
        elif known:
            if os.path.isdir(path) and not any(Path(path).rglob("*.parquet")):
                raise ValueError("no folder of save_to_disk, and no .parquet below it")
            files = {"data_dir" if os.path.isdir(path) else "data_files": path}
            data = datasets.load_dataset("parquet", split=split, **files)
        else:
            data = datasets.load_dataset(path, subset, split=split, revision=revision)
    except (OSError, ValueError, LookupError, TypeError, ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = f"{' '.join(str(error.__cause__ or error).split()):.300}"
        if not known:
            reason = f"no such path here, and on the hub: {reason}; set path to a folder, or allow the network"
        raise ValueError(f"HuggingFace: {path} cannot be read: {reason}") from error
    return data.with_format(None)


def _pictures(data: Dataset, column: str, path: str) -> Dataset:
    """The column of pictures, as bytes or bytes and path; raises ValueError where it is of another kind."""
    import datasets
    from pyarrow import types

    feature, kind = data.features[column], data.features.arrow_schema.field(column).type
    alone = data.select_columns([column])
    if isinstance(feature, datasets.Image):
        return alone.cast_column(column, datasets.Image(decode=False))
    stored = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(stored) or types.is_large_binary(stored)):
        raise ValueError(
            f"HuggingFace: column {column!r} of {path} is {kind!s:.60}; set image to one of images or bytes"
        )
    return alone


def _texts(data: Dataset, columns: Sequence[str], path: str) -> list[str]:
    """Columns of texts; raises ValueError where one is of another kind."""
    from pyarrow import types

    for column in columns:
        kind = data.features.arrow_schema.field(column).type
        inner = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
        if types.is_nested(inner) or types.is_binary(inner):
            raise ValueError(
                f"HuggingFace: column {column!r} of {path} is {kind!s:.60}; a caption is text or a list of it"
            )
    return list(columns)


def _labels(data: Dataset, column: str) -> Labels:
    """The class names of a column."""
    import datasets

    feature = data.features[column]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    cells = data.select_columns([column]).with_format("arrow")[:].column(0).to_pylist()
    if names is not None:
        cells = ["" if cell is None or cell < 0 else names[cell] for cell in cells]
    return Labels.of(label_text(cell, column) for cell in cells)
