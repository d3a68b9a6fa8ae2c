"""The index of a tar shard, which tells where each sample's members lie; :mod:`repr.data.sources.shards` uses it.

It is a safetensors file. Its arrays, some 60 bytes a sample, are mapped when the first sample of the shard is asked
for: the processes of a machine share them, and of most shards a set is opened by the heads of their indexes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from repr.data.sources.columns import Labels, Packed, label_text
from repr.data.sources.plain_files import MAX_BYTES
from repr.files import replacing

ENDING = ".index.safetensors"  # of the file beside the shard
BLOCK = 512  # of the tar format
_VERSION = 3
_MAPPED = 16_384  # indexes that a process has mapped; Linux allows it 65,530 maps
# The key is the name up to the first dot of its last part; hidden members (._name.jpg) have none.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class ShardIndex:
    """The N samples and M members of one shard.

    The arrays are ``key_bytes`` and ``key_ends`` (the samples' keys as :class:`Packed`, in the order in which they
    first appear), ``member_ends`` (N,) int64 (where the members of each sample end), ``ending`` (M,) int32 (position in
    ``endings``), ``span`` (M, 2) int64 (offset and size of the content) and ``label:<field>`` (N,) int32.
    """

    size: int  # of the shard in bytes, when the index was made
    time: int  # of a local shard's last change in nanoseconds, likewise
    num: int  # N
    endings: list[str]  # the different endings of members, in lower case
    labels: dict[str, list[str]]  # field -> its different class names
    faults: dict[int, str]  # sample -> why it cannot be read
    kept: dict[str, np.ndarray] | Path  # the arrays, or the file that has them
    etag: str = ""  # of a shard in a store; '' where it was indexed on a disk

    def __len__(self) -> int:
        return self.num

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays.

        Raises:
            ValueError: the file has gone, is damaged or that of another shard.
        """
        if isinstance(self.kept, dict):
            return self.kept
        return _mapped(self.kept, self.size, self.time, tuple(self.labels))

    @property
    def keys(self) -> Packed:
        """The keys of the samples."""
        arrays = self.arrays
        return Packed(arrays["key_bytes"], arrays["key_ends"])

    def column(self, field: str) -> Labels:
        """The class names of a field of ``labels``."""
        return Labels(self.arrays[f"label:{field}"], self.labels[field])

    def has(self, endings: Sequence[str]) -> bool:
        """Whether a member of some sample has one of these endings."""
        wanted = [number for number, ending in enumerate(self.endings) if ending in endings]
        return bool(wanted) and bool(np.isin(self.arrays["ending"], wanted).any())

    def span(self, row: int, endings: Sequence[str]) -> tuple[int, int] | None:
        """Offset and size of a sample's first member with one of ``endings``, if there is one."""
        arrays = self.arrays
        ends, ending = arrays["member_ends"], arrays["ending"]
        for member in range(ends[row - 1] if row else 0, ends[row]):
            if self.endings[ending[member]] in endings:
                offset, size = arrays["span"][member].tolist()
                return offset, size
        return None

    @classmethod
    def build(cls, path: str, *, labels: Sequence[str], url: str = "", etag: str = "") -> ShardIndex:
        """Read a shard's headers, and the members that hold the labels.

        Args:
            path: of the shard, or of a copy.
            labels: fields.
            url: what a copy is of.
            etag: of that, where the store has one.

        Raises:
            ValueError: it is no tar file, or was cut short.
        """
        keys: dict[str, int] = {}
        endings: dict[str, int] = {}
        faults: dict[int, str] = {}
        members: dict[tuple[int, int], tuple[int, int]] = {}  # (sample, ending) -> span
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            for member in _members(url or path, file):
                match = _NAME.fullmatch(member.name)
                if match is None or member.isdir():
                    continue
                row = keys.setdefault(match[1], len(keys))
                ending = endings.setdefault(match[2].lower(), len(endings))
                if not member.isreg() or member.issparse():
                    faults[row] = f"{member.name!r} is a link or no plain file"
                elif (row, ending) in members:
                    faults[row] = f"{member.name!r} is there twice"
                else:
                    members[row, ending] = (member.offset_data, member.size)
            packed = Packed.of(os.fsencode(key) for key in keys)
            rows_and_endings = np.array(list(members), np.int32).reshape(-1, 2)
            spans = np.array(list(members.values()), np.int64).reshape(-1, 2)
            by_row = rows_and_endings[:, 0].argsort(kind="stable")  # the first of a sample's members stays the first
            arrays = {
                "key_bytes": packed.buffer,
                "key_ends": packed.ends,
                "member_ends": np.bincount(rows_and_endings[:, 0], minlength=len(keys)).cumsum(),
                "ending": rows_and_endings[by_row, 1],
                "span": spans[by_row],
            }
            time = 0 if url else stat.st_mtime_ns
            index = cls(stat.st_size, time, len(keys), list(endings), {}, faults, arrays, etag)
            for field in labels:
                column = index._read_labels(url or path, file.fileno(), field)
                arrays[f"label:{field}"], index.labels[field] = column.codes, column.names
        return index

    def _read_labels(self, path: str, descriptor: int, field: str) -> Labels:
        """The values of one field; a sample whose member is damaged gets a fault and no label."""
        ending, _, entry = field.partition(":")
        names = [""] * len(self)
        for row in range(len(self)):
            span = self.span(row, [ending])
            if span is None or row in self.faults:
                continue
            offset, size = span
            if size > MAX_BYTES:
                self.faults[row] = f"label: {size:,} bytes, more than {MAX_BYTES:,}"
                continue
            data = os.pread(descriptor, size, offset)
            try:
                names[row] = label_text(json_object(data, ending).get(entry) if entry else data, field)
            except OSError as error:
                self.faults[row] = f"label: {error}"
            except ValueError as error:
                raise ValueError(f"{path}: {os.fsdecode(self.keys[row])}: {error}") from error
        return Labels.of(names)

    @classmethod
    def load(cls, path: str, *, cache_dir: str | None) -> ShardIndex | None:
        """The kept index of a shard, or None where there is none that fits."""
        try:
            stat = os.stat(path)
        except OSError as error:
            raise ValueError(f"Shards: {path} cannot be read ({error.strerror})") from error
        for place in _places(path, cache_dir):
            index = cls.read(place)
            if index is not None and (index.size, index.time) == (stat.st_size, stat.st_mtime_ns):
                return index
        return None

    @classmethod
    def read(cls, place: Path) -> ShardIndex | None:
        """The index in a file, or None where that is absent, cut short or of an older kind."""
        try:
            with safe_open(place, "np") as file:
                head = _head(file)
            if head.pop("version") == _VERSION:
                head["faults"] = {int(row): fault for row, fault in head["faults"].items()}
                return cls(**head, kept=place)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            pass
        return None

    def encoded(self) -> bytes:
        """The content of its file."""
        head = {"version": _VERSION, "size": self.size, "time": self.time, "num": self.num, "endings": self.endings}
        head |= {"labels": self.labels, "faults": self.faults} | ({"etag": self.etag} if self.etag else {})
        return save(self.arrays, {"head": json.dumps(head), "checksum": _checksum(self.arrays)})

    def save(self, path: str, *, cache_dir: str | None) -> ShardIndex:
        """Keep the index beside the shard, or in the cache folder where that is not possible.

        Returns:
            The index with its arrays in the file; with them in memory where it could not be kept.
        """
        data, fault = self.encoded(), ""
        for place in _places(path, cache_dir):
            try:
                with replacing(place, shared=True) as file:
                    file.write(data)
                return replace(self, kept=place)
            except OSError as error:
                fault = f"{place}: {error.strerror or error}"
        print(f"the index of {path} cannot be kept ({fault}); set cache_dir to a folder that can", file=sys.stderr)
        return self


def _head(file: Any) -> dict[str, Any]:
    """What an open index file says besides its arrays."""
    return json.loads((file.metadata() or {})["head"])


@lru_cache(_MAPPED)
def _mapped(place: Path, size: int, time: int, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of a kept index, as :class:`ShardIndex` has them."""
    fault = "belongs to another shard"
    try:
        with safe_open(place, "pt") as file:  # torch maps a file that numpy would copy
            head = _head(file)
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            if (head["size"], head["time"]) == (size, time) and head["labels"].keys() >= set(labels):
                if file.metadata()["checksum"] == _checksum(arrays):
                    return arrays
                fault = "is damaged"
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fault = f"cannot be read ({error})"
    raise ValueError(f"{place}, the index of a shard, {fault}; remove it, and start or resume the run again")


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).data, total)
    return f"{total:08x}"


def load_indexes(paths: Sequence[str], *, labels: Sequence[str], cache_dir: str | None) -> list[ShardIndex]:
    """The indexes of shards; those that are missing, stale or lack a label are made and kept.

    Raises:
        ValueError: shards that are damaged or no tar files; all of them are named.
    """
    indexes, faults, told = [], [], False
    for path in paths:
        index = ShardIndex.load(path, cache_dir=cache_dir)
        if index is None or set(labels) - index.labels.keys():
            if not told:
                print("indexing tar shards; this is done once ...", file=sys.stderr, flush=True)
                told = True
            known = [] if index is None else list(index.labels)
            try:
                index = ShardIndex.build(path, labels=list(dict.fromkeys([*known, *labels])))
            except ValueError as error:
                faults.append(str(error))
                continue
            index = index.save(path, cache_dir=cache_dir)
        indexes.append(index)
    if faults:
        raise ValueError("\n".join(["Shards: damaged; fetch them again, or leave them out of files:", *faults]))
    return indexes


def _places(path: str, cache_dir: str | None) -> list[Path]:
    """Where the index of a shard may lie: beside it, or in the cache folder under a name made of its path."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return [Path(path + ENDING), cache_folder(cache_dir) / f"{name}.safetensors"]


def cache_folder(cache_dir: str | None) -> Path:
    """The folder that a ``cache_dir`` stands for."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_dir or Path(cache, "repr", "shards"))


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file; raises ValueError where the file is not whole."""
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd":
        raise ValueError(f"{path}: is compressed, so it cannot be read at random; unpack it to a plain .tar")
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                yield member
                archive.members = []  # type: ignore[attr-defined]  # else it keeps a header of every member
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: is no tar file, or was cut short ({error})") from error
    # tarfile takes a header it cannot read, and the end of the file, for the end of the archive.
    file.seek(end)
    while block := file.read(1 << 20):
        if any(block):
            raise ValueError(f"{path}: is damaged at byte {end}, so samples may be missing")
    if file.tell() < end + BLOCK:
        raise ValueError(f"{path}: ends without its end mark, so samples may be missing")


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object; what is none raises an OSError that begins with the name."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{name}: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise OSError(f"{name}: no JSON object")
    return value
