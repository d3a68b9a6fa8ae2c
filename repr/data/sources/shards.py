"""Tar shards in WebDataset layout, on a disk or in a store, read at random through an index of offsets.

Members of a sample share their name up to the first dot of the last part: ``a/dog.jpg``, ``a/dog.txt``,
``a/dog.json``. The index of a shard is made once, by one pass over it, and kept beside it (or in a cache folder,
where that cannot be written). It knows size and time of the shard it was made from, and is made anew where they
differ. So everything that needs positions (exact resume, clusters, evaluation) works on shards as on files.
Of shards in a store, :mod:`repr.data.sources.remote_index` gets the indexes.
"""

from __future__ import annotations

import glob
import os
import re
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Literal

import numpy as np

from repr.data.sources.columns import ColumnSource, Labels, encode_cell, no_row, part_filter, split_texts
from repr.data.sources.pictures import IMAGE_SUFFIXES
from repr.data.sources.plain_files import MAX_BYTES, read_plain
from repr.data.sources.remote import OPENING, is_remote, matches, read, refuse_secrets
from repr.data.sources.remote_index import load_remote_indexes
from repr.data.sources.remote_shards import RemoteShards
from repr.data.sources.shard_cache import ShardCache
from repr.data.sources.shard_index import ShardIndex, cache_folder, json_object, load_indexes
from repr.data.sources.where import Where, row_weights, wanted_rows

OPEN_SHARDS = 64  # file descriptors that a process keeps
MAX_LIST = 2**28  # bytes of a list of shards


class Shards(ColumnSource):
    """The samples of tar shards, in the order of shards and members.

    A field is the ending of a member (``txt``, ``jpg``, ``seg.png``), or an entry of a JSON member
    (``json:title``). A sample whose members are damaged, links, or doubled is kept and cannot be read, so that
    training replaces and counts it; a shard that was cut short is an error here.

    Args:
        files: shards, as a path or URL (``s3://``, ``gs://``, ``https://``, ``hf://``) or a list of them; ``*`` and
            ``{00000..00009}`` are expanded, and a file that ends in ``.txt`` has one a line.
        image: ending of the picture's member; None: the first that is an image's.
        captions: fields of texts, the main one first. Training draws one text a sample and epoch.
        caption_weights: how often each field is drawn; None: all alike. A member such as ``txt`` is one text, a list
            in JSON is several, which share the field's weight.
        labels: fields of class names, each an attribute under the last part of the field's name, or attribute -> field.
        where: field -> value, list of values or comparison (:class:`repr.data.sources.where.Where`); other samples are
            left out. Its fields are read as labels are.
        weights: a field of numbers from 0 on, how often an epoch of training shows a sample: 1 once, 2 twice (as other
            views), 0.5 in every other epoch, 0 never. None: all once. It is read as labels are.
        part: ``[low, high)``: only samples whose key, hashed to [0, 1), lies there.
        cache_dir: where indexes go that cannot lie beside their shard, and shards of a store; None: ``repr/shards`` in
            the user's cache.
        cache: ``ranges`` reads of shards in a store what a batch needs; ``shards`` fetches them whole, once, which pays
            where a batch takes its rows of few of them.
        cache_gb: so many gigabytes of whole shards are kept; those not used for longest go.

    Raises:
        ValueError: there is no such shard, a shard is damaged or of another kind, no sample has a field, a weight is
            none, or a store cannot be read.
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
        weights: str | None = None,
        part: Sequence[float] | None = None,
        cache_dir: str | None = None,
        cache: Literal["ranges", "shards"] = "ranges",
        cache_gb: float = 100.0,
    ) -> None:
        if cache not in ("ranges", "shards") or not cache_gb > 0:
            raise ValueError(
                f"Shards: cache={cache}, cache_gb={cache_gb}; set cache to ranges or shards, cache_gb above 0"
            )
        self.files = expand_files([files] if isinstance(files, str) else files)
        self._folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self.files])
        super().__init__(captions, caption_weights, labels)
        fields = dict(labels) if isinstance(labels, Mapping) else {name.rpartition(":")[2]: name for name in labels}
        wanted, belongs = Where(where), part_filter(part)
        names = list(dict.fromkeys([*fields.values(), *wanted.columns, *([weights] if weights else [])]))
        disk = ShardCache(cache_folder(cache_dir), int(cache_gb * 1e9)) if cache == "shards" else None
        self._indexes, self._remote = _opened(self.files, names, cache_dir, disk)
        self.is_remote = self._remote is not None
        self._ends = list(accumulate(map(len, self._indexes)))  # of the shards' rows
        if not self._ends[-1]:
            raise ValueError(f"Shards: no sample in {', '.join(self.files[:3])}{' ...' if len(self.files) > 3 else ''}")
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
        if where or part is not None:
            keys = (key for index in self._indexes for key in index.keys)
            rows = wanted_rows(wanted, columns, keys, belongs, self._faults)
            wanted.tell(f"{self.files[0]} ...")
            if not len(rows):
                raise no_row(f"{self.files[0]} ...", where, part)
            self._faults = {new: self._faults[old] for new, old in enumerate(rows.tolist()) if old in self._faults}
            columns = {field: column.take(rows) for field, column in columns.items()}
            self._rows = rows
        self.attributes = {name: columns[field] for name, field in fields.items()}
        self.row_weights = None
        if weights:
            self.row_weights = row_weights(columns[weights], weights, f"{self.files[0]} ...", self._faults)

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, which another process cannot have."""
        return self.__dict__ | {"_open": OrderedDict()}

    @property
    def blocks(self) -> np.ndarray:
        """The number of samples of each shard."""
        ends = [0, *self._ends]
        return np.diff(ends if self._rows is None else np.searchsorted(self._rows, ends))

    def prefetch(self, rows: Sequence[int], coming: Sequence[int] = ()) -> None:
        """Begin to fetch what these rows, and then the coming ones, need of shards in a store; all other is let go."""
        if self._remote is not None:
            self._remote.prefetch(self._spans(rows), self._spans(coming))

    def _spans(self, rows: Sequence[int]) -> set[tuple[str, int, int]]:
        """The members that pictures and captions of these rows need of shards in a store: URL, offset and size."""
        fields = [self._image, *([field.partition(":")[0]] for field in self.weights)]
        spans = set[tuple[str, int, int]]()
        for row in rows:
            shard, place = self._find(row)
            if is_remote(self.files[shard]):
                found = (self._indexes[shard].span(place, endings) for endings in fields)
                spans |= {(self.files[shard], *span) for span in found if span is not None and span[1] <= MAX_BYTES}
        return spans

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
        if self._remote is not None and is_remote(self.files[shard]):
            return self._remote.read(self.files[shard], offset, size)
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


def _opened(
    files: Sequence[str], labels: Sequence[str], cache_dir: str | None, disk: ShardCache | None
) -> tuple[list[ShardIndex], RemoteShards | None]:
    """The indexes of all shards, and the reader of those in a store, if there are any."""
    urls, paths = [file for file in files if is_remote(file)], [file for file in files if not is_remote(file)]
    indexes = dict(zip(paths, load_indexes(paths, labels=labels, cache_dir=cache_dir), strict=True))
    remote = None
    if urls:
        found, facts = load_remote_indexes(urls, labels=labels, cache_dir=cache_dir)
        indexes |= zip(urls, found, strict=True)
        remote = RemoteShards(dict(zip(urls, facts, strict=True)), disk)
        if disk is not None and (size := sum(fact.size for fact in facts)) > disk.limit:
            warnings.warn(
                f"the shards have {size / 1e9:.3g} GB, more than cache_gb={disk.limit / 1e9:g}: where a batch takes "
                "rows of all of them, each is fetched again and again; raise cache_gb, or set cache=ranges",
                stacklevel=3,
            )
    elif disk is not None:
        warnings.warn("cache=shards has no effect, since all shards are on a disk", stacklevel=3)
    return [indexes[file] for file in files], remote


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of shards from those with ``*`` and ``{00000..00009}``, and from lists (``.txt``), in order.

    Raises:
        ValueError: a pattern matches nothing, a shard is compressed, or a URL holds credentials.
    """
    lists = (_listed(pattern) if pattern.endswith(".txt") else [pattern] for pattern in patterns)
    files = [file for pattern in chain.from_iterable(lists) for file in _expand(pattern)]
    if not files:
        raise ValueError("Shards: files is empty; set files to .tar shards")
    if packed := [file for file in files if file.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz"))]:
        raise ValueError(
            f"Shards: {packed[0]} is compressed, so it cannot be read at random; unpack it to a plain .tar"
        )
    return files


def _expand(pattern: str) -> Iterator[str]:
    """The files of one pattern."""
    if is_remote(pattern):
        refuse_secrets(pattern)
    for path in _expand_range(os.path.expanduser(pattern)):
        if is_remote(path):
            found = matches(path) if "*" in path else [path]
            if not found:
                raise ValueError(f"Shards: files={pattern!r}: the store lists no file {path}; set files to .tar shards")
        else:
            found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
            if missing := [match for match in found or [path] if not os.path.isfile(match)]:  # or a pipe
                raise ValueError(f"Shards: files={pattern!r}: {missing[0]} does not exist; set files to .tar shards")
        yield from found


def _listed(path: str) -> Iterator[str]:
    """The patterns in a list, paths being those from its folder; empty lines and such with # are left out."""
    if is_remote(path):
        refuse_secrets(path)
        text, folder = read(path, patience=OPENING), path.rpartition("/")[0]
    else:
        text, folder = read_plain(os.path.expanduser(path), MAX_LIST, "a list of shards"), os.path.dirname(path)
    for line in filter(None, map(str.strip, text.decode("utf-8-sig", "surrogateescape").splitlines())):
        if not line.startswith("#"):
            yield line if is_remote(line) or line[0] in "/~" else f"{folder or '.'}/{line}"


def _expand_range(path: str) -> list[str]:
    """``a-{08..10}.tar`` -> ``a-08.tar``, ``a-09.tar``, ``a-10.tar``."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if match is None:
        return [path]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [whole for number in numbers for whole in _expand_range(path.replace(match[0], number, 1))]
