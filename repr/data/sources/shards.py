"""Tar shards in WebDataset layout, read at random through an index of offsets.

Members of a sample share their name up to the first dot of the last part: ``a/dog.jpg``, ``a/dog.txt``,
``a/dog.json``. The index of a shard is made once, by one pass over it, and kept beside it (or in a cache folder,
where that cannot be written). It knows size and time of the shard it was made from, and is made anew where they
differ. So everything that needs positions (exact resume, clusters, evaluation) works on shards as on files.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

from repr.data.sources.columns import ColumnSource, Labels, encode_cell, no_row, part_filter, split_texts
from repr.data.sources.pictures import IMAGE_SUFFIXES, Reduction, decode
from repr.data.sources.plain_files import MAX_BYTES
from repr.data.sources.shard_index import json_object, load_indexes
from repr.data.sources.where import Where

OPEN_SHARDS = 64  # file descriptors that a process keeps


class Shards(ColumnSource):
    """The samples of local tar shards, in the order of shards and members.

    A field is the ending of a member (``txt``, ``jpg``, ``seg.png``), or an entry of a JSON member
    (``json:title``). A sample whose members are damaged, links, or doubled is kept and cannot be read, so that
    training replaces and counts it; a shard that was cut short is an error here.

    Args:
        files: shards, as a path or a list of paths; ``*`` and ``{00000..00009}`` are expanded.
        image: ending of the picture's member; None: the first that is an image's.
        captions: fields of texts, the main one first. Training draws one text a sample and epoch.
        caption_weights: how often each field is drawn; None: all alike. A member such as ``txt`` is one text, a list
            in JSON is several, which share the field's weight.
        labels: fields of class names, each an attribute under the last part of the field's name, or attribute -> field.
        where: field -> value, list of values or comparison (:class:`repr.data.sources.where.Where`); other samples are
            left out. Its fields are read as labels are.
        part: ``[low, high)``: only samples whose key, hashed to [0, 1), lies there.
        cache_dir: where indexes go that cannot lie beside their shard; None: ``repr/shards`` in the user's cache.

    Raises:
        ValueError: there is no such shard, a shard is damaged or of another kind, or no sample has a field.
    """

    def __init__(
        self,
        files: str | Sequence[str],
        *,
        image: str | None = None,
        captions: Sequence[str] = (),
        caption_weights: Sequence[float] | None = None,
        labels: Sequence[str] | Mapping[str, str] = (),
        where: Mapping[str, Any] | None = None,
        part: Sequence[float] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.files = expand_files([files] if isinstance(files, str) else files)
        self._folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self.files])
        super().__init__(captions, caption_weights, labels)
        fields = dict(labels) if isinstance(labels, Mapping) else {name.rpartition(":")[2]: name for name in labels}
        wanted, belongs = Where(where), part_filter(part)
        names = list(dict.fromkeys([*fields.values(), *wanted.columns]))
        self._indexes = load_indexes(self.files, labels=names, cache_dir=cache_dir)
        self._ends = list(accumulate(map(len, self._indexes)))  # of the shards' rows
        self._rows: np.ndarray | None = None  # those of `where` and `part`
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor
        self._image = [suffix[1:] for suffix in IMAGE_SUFFIXES] if image is None else [image]
        offers = "members end in " + ", ".join(sorted({ending for index in self._indexes for ending in index.endings}))
        for endings in (self._image, *([name.partition(":")[0]] for name in captions)):
            if not any(index.has(endings) for index in self._indexes):
                lacks = endings[0] if len(endings) == 1 else "a picture"
                raise ValueError(f"Shards: no sample of {self.files[0]} ... has {lacks}; {offers}")
        for index, end in zip(self._indexes, self._ends, strict=True):
            self._faults.update({end - len(index) + row: fault for row, fault in index.faults.items()})
        columns = {field: Labels.join([index.column(field) for index in self._indexes]) for field in names}
        for field, column in columns.items():
            if not column.present():
                raise ValueError(f"Shards: no sample has the label {field!r}; {offers}")
        self.attributes = {name: columns[field] for name, field in fields.items()}
        if where or part is not None:
            cells = ({field: columns[field][row] for field in wanted.columns} for row in range(self._ends[-1]))
            fits = [row in self._faults or wanted.takes(found) for row, found in enumerate(cells)]
            keys = (key for index in self._indexes for key in index.keys)
            rows = np.flatnonzero([fit and belongs(key) for fit, key in zip(fits, keys, strict=True)])
            wanted.tell(f"{self.files[0]} ...")
            if not len(rows):
                raise no_row(f"{self.files[0]} ...", where, part)
            self._faults = {new: self._faults[old] for new, old in enumerate(rows.tolist()) if old in self._faults}
            self.attributes = {name: column.take(rows) for name, column in self.attributes.items()}
            self._rows = rows

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, which another process cannot have."""
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def blocks(self) -> np.ndarray:
        """The number of samples of each shard."""
        ends = [0, *self._ends]
        return np.diff(ends if self._rows is None else np.searchsorted(self._rows, ends))

    def __len__(self) -> int:
        return self._ends[-1] if self._rows is None else len(self._rows)

    def _find(self, index: int) -> tuple[int, int]:
        """The number of a sample's shard, and its row there."""
        row = index if self._rows is None else int(self._rows[index])
        shard = bisect_right(self._ends, row)
        return shard, row - self._ends[shard] + len(self._indexes[shard])

    def _key(self, index: int) -> tuple[str, str]:
        """The path of a sample's shard, and the sample's key in it."""
        shard, row = self._find(index)
        return self.files[shard], os.fsdecode(self._indexes[shard].keys[row])

    def key(self, index: int) -> str:
        """The shard's path below the folder of all, and the sample's key in it."""
        path, key = self._key(index)
        return f"{os.path.relpath(path, self._folder)}/{key}"

    def _name(self, index: int) -> str:
        return ": ".join(self._key(index))

    def _read(self, index: int, endings: Sequence[str], what: str) -> bytes | None:
        """The bytes of a sample's first member with one of ``endings``, if there is one.

        Raises:
            OSError: the sample is damaged.
            ValueError: the shard has changed since it was opened.
        """
        self._check_row(index)
        shard, row = self._find(index)
        span = self._indexes[shard].span(row, endings)
        if span is None:
            return None
        offset, size = span
        if size > MAX_BYTES:
            raise OSError(f"{self._name(index)}: {what} of {size:,} bytes, more than {MAX_BYTES:,}")
        descriptor = self._descriptor(shard)
        if (now := os.fstat(descriptor).st_size) != self._indexes[shard].size:
            raise ValueError(
                f"{self.files[shard]} has changed while it was read: {now} bytes, {self._indexes[shard].size} in the "
                "index; resume the run once the shard is whole again"
            )
        # pread, since workers that were forked share the file's position
        return os.pread(descriptor, size, offset)

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard; the one that was not used for longest is closed for it."""
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[shard] = os.open(self.files[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except FileNotFoundError as error:
                raise ValueError(f"{self.files[shard]} has gone while the run was using it; put it back") from error
        self._open.move_to_end(shard)
        return self._open[shard]

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        data = self._read(index, self._image, "picture")
        if data is None:
            raise OSError(f"{self._name(index)}: no picture")
        return data

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        return decode(self.encoded(index), self._name(index))

    def reduced(self, index: int, reduction: Reduction) -> Image.Image:
        """The picture, RGB, upright, at the scale that ``reduction`` allows."""
        return decode(self.encoded(index), self._name(index), reduction=reduction)

    def _read_texts(self, index: int, column: str) -> list[str]:
        data, name = self._read(index, [column.partition(":")[0]], column), self._name(index)
        if data is None:
            return []  # a sample may lack the field
        if ":" in column:
            entry = json_object(data, name).get(column.partition(":")[2])
            try:
                data = encode_cell(entry)
            except OSError as error:
                raise OSError(f"{name}: {column}: {error}") from error
        return split_texts(data, name)


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Paths of shards from paths with ``*`` and ``{00000..00009}``, in order.

    Raises:
        ValueError: a pattern matches nothing.
    """
    files = []
    for pattern in patterns:
        for path in _expand_range(os.path.expanduser(pattern)):
            matches = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
            if missing := [match for match in matches or [path] if not os.path.isfile(match)]:  # or a pipe
                raise ValueError(f"Shards: files={pattern!r}: {missing[0]} does not exist; set files to .tar shards")
            files += matches
    if not files:
        raise ValueError("Shards: files is empty; set files to .tar shards")
    return files


def _expand_range(path: str) -> list[str]:
    """``a-{08..10}.tar`` -> ``a-08.tar``, ``a-09.tar``, ``a-10.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [whole for number in numbers for whole in _expand_range(path.replace(match[0], number, 1))]
