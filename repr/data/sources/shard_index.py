"""The index of a tar shard, which tells where each sample's members lie; :mod:`repr.data.sources.shards` uses it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from repr.data.sources.columns import Labels, Packed, label_text
from repr.data.sources.plain_files import MAX_BYTES
from repr.files import replacing

_VERSION = 2
_BLOCK = 512  # of the tar format
# The key is the name up to the first dot of its last part; hidden members (._name.jpg) have none.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class ShardIndex:
    """The N samples and M members of one shard."""

    size: int  # of the shard in bytes, when the index was made
    time: int  # of the shard's last change in nanoseconds, likewise
    keys: Packed  # of the samples, in the order in which they first appear
    endings: list[str]  # the different endings of members, in lower case
    row: np.ndarray  # (M,) int32, the sample of each member
    ending: np.ndarray  # (M,) int32, position in `endings`
    span: np.ndarray  # (M, 2) int64, offset and size of the member's content
    labels: dict[str, Labels]  # field -> N class names
    faults: dict[int, str]  # sample -> why it cannot be read

    def __len__(self) -> int:
        return len(self.keys)

    def spans(self, endings: Sequence[str]) -> np.ndarray:
        """Offset and size of each sample's first member with one of ``endings``: (N, 2), size -1 where none is."""
        spans = np.full((len(self), 2), -1, np.int64)
        wanted = np.array([ending in endings for ending in self.endings], bool)
        members = np.flatnonzero(wanted[self.ending])[::-1]  # backwards, so that the first one stays
        spans[self.row[members]] = self.span[members]
        return spans

    @classmethod
    def build(cls, path: str, *, labels: Sequence[str]) -> ShardIndex:
        """Read a shard's headers, and the members that hold the labels.

        Raises:
            ValueError: it is no tar file, or was cut short.
        """
        keys: dict[str, int] = {}
        endings: dict[str, int] = {}
        faults: dict[int, str] = {}
        members: dict[tuple[int, int], tuple[int, int]] = {}  # (sample, ending) -> span
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            for member in _members(path, file):
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
            rows_and_endings = np.array(list(members), np.int32).reshape(-1, 2)
            index = cls(
                size=stat.st_size,
                time=stat.st_mtime_ns,
                keys=Packed.of(os.fsencode(key) for key in keys),
                endings=list(endings),
                row=rows_and_endings[:, 0],
                ending=rows_and_endings[:, 1],
                span=np.array(list(members.values()), np.int64).reshape(-1, 2),
                labels={},
                faults=faults,
            )
            for field in labels:
                index.labels[field] = index._read_labels(path, file.fileno(), field)
        return index

    def _read_labels(self, path: str, descriptor: int, field: str) -> Labels:
        """The values of one field; a sample whose member is damaged gets a fault and no label."""
        ending, _, entry = field.partition(":")
        names = [""] * len(self)
        for row, (offset, size) in enumerate(self.spans([ending]).tolist()):
            if size < 0 or row in self.faults:
                continue
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
            try:
                with np.load(place, allow_pickle=False) as file:
                    head = json.loads(file["head"].tobytes())
                    if (head["version"], head["size"], head["time"]) != (_VERSION, stat.st_size, stat.st_mtime_ns):
                        continue
                    return cls(
                        size=head["size"],
                        time=head["time"],
                        keys=Packed(file["key_bytes"], file["key_ends"]),
                        endings=head["endings"],
                        row=file["row"],
                        ending=file["ending"],
                        span=file["span"],
                        labels={
                            field: Labels(file[f"label{number}"], names)
                            for number, (field, names) in enumerate(head["labels"].items())
                        },
                        faults={int(row): fault for row, fault in head["faults"].items()},
                    )
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # absent, cut short or of an older kind: made anew
        return None

    def save(self, path: str, *, cache_dir: str | None) -> None:
        """Keep the index beside the shard, or in the cache folder where that is not possible."""
        head = {"version": _VERSION, "size": self.size, "time": self.time, "endings": self.endings}
        head |= {"labels": {field: column.names for field, column in self.labels.items()}, "faults": self.faults}
        arrays: dict[str, Any] = {"row": self.row, "ending": self.ending, "span": self.span}
        arrays |= {f"label{number}": column.codes for number, column in enumerate(self.labels.values())}
        arrays |= {"key_bytes": self.keys.buffer, "key_ends": self.keys.ends}
        arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
        fault = ""
        for place in _places(path, cache_dir):
            try:
                with replacing(place, shared=True) as file:
                    np.savez(file, **arrays)
                return
            except OSError as error:
                fault = f"{place}: {error.strerror or error}"
        print(f"the index of {path} cannot be kept ({fault}); set cache_dir to a folder that can", file=sys.stderr)


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
            index.save(path, cache_dir=cache_dir)
        indexes.append(index)
    if faults:
        raise ValueError("\n".join(["Shards: damaged; fetch them again, or leave them out of files:", *faults]))
    if not any(map(len, indexes)):
        raise ValueError(f"Shards: no sample in {', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}")
    return indexes


def _places(path: str, cache_dir: str | None) -> list[Path]:
    """Where the index of a shard may lie: beside it, or in the cache folder under a name made of its path."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return [Path(f"{path}.index.npz"), Path(cache_dir or Path(cache, "repr", "shards"), f"{name}.npz")]


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
    if file.tell() < end + _BLOCK:
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
