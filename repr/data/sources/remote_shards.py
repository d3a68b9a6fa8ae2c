"""Members of shards in a store: those of a batch are fetched together, and decoding begins when the first is here."""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from repr.data.sources import remote
from repr.data.sources.shard_cache import ShardCache
from repr.data.sources.shard_index import BLOCK

MAX_GAP = 2**14  # bytes between two members that are fetched along, which is faster than another request
MAX_RANGE = 2**23  # bytes of a request for several members


class _Range(NamedTuple):
    url: str
    start: int
    end: int


def check_header(block: bytes, url: str, offset: int, size: int) -> None:
    """Raise ValueError unless a block is the header of a member of this size."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except tarfile.TarError:
        found = -1
    if found != size:
        raise ValueError(
            f"{url} is not the shard that its index tells of: at byte {offset:,} there is no member of {size:,} bytes; "
            f"it has changed, or the index is that of another: python -m tools.index_shards {url}"
        )


class RemoteShards:
    """Reads members by ranges, or from whole shards on the disk.

    Args:
        facts: what the store said of each shard when it was opened.
        disk: keeps whole shards; None: ranges are read.

    Raises:
        ValueError: the store knows no ranges.
    """

    def __init__(self, facts: Mapping[str, remote.Facts], disk: ShardCache | None) -> None:
        self.facts, self.disk = facts, disk
        self._let_go()
        if disk is None:
            remote.read(min(facts, key=lambda url: facts[url].size), 0, 1, patience=remote.OPENING)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what is under way, which another process cannot have."""
        return {"facts": self.facts, "disk": self.disk}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._let_go()

    def _let_go(self) -> None:
        self._process = os.getpid()  # what a parent has begun never ends here
        self._begun: dict[_Range, Future[bytes]] = {}  # in the order of shards and bytes
        self._ranges: list[_Range] = []  # its keys

    def prefetch(self, spans: Iterable[tuple[str, int, int]], coming: Iterable[tuple[str, int, int]] = ()) -> None:
        """Begin to fetch members (URL, offset and size of each), and then those that are read thereafter.

        What was begun and is asked for again goes on; all other is let go.
        """
        if self._process != os.getpid():
            self._let_go()
        old, wanted = self._begun, dict.fromkeys([*_merged(spans), *_merged(coming)])
        for part in old.keys() - wanted.keys():
            old[part].cancel()
        begun = {part: old.get(part) or remote.submit(self._fetch, *part) for part in wanted}
        self._begun = dict(sorted(begun.items()))
        self._ranges = list(self._begun)

    def _fetch(self, url: str, start: int, end: int) -> bytes:
        if self.disk is None:
            return remote.read(url, start, end)
        return self.disk.read(url, self.facts[url], start, end)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The content of a member.

        Raises:
            ValueError: the shard is gone or another one by now, or the store fails.
        """
        start, end = offset - BLOCK, offset + size
        if (part := self._find(url, start, end)) is None:
            data = self._fetch(url, start, end)
        else:
            data = self._begun[part].result()[start - part.start : end - part.start]
        check_header(data[:BLOCK], url, offset, size)  # costs little, and tells a shard that is another one by now
        return data[BLOCK:]

    def _find(self, url: str, start: int, end: int) -> _Range | None:
        """The range under way that holds these bytes."""
        if self._process != os.getpid():
            return None
        number = bisect_right(self._ranges, (url, start, float("inf"))) - 1
        found = self._ranges[number] if number >= 0 else None
        return found if found and found.url == url and end <= found.end else None


def _merged(spans: Iterable[tuple[str, int, int]]) -> list[_Range]:
    """The ranges that hold members and their headers, near ones as one; sorted."""
    ranges: list[_Range] = []
    for url, offset, size in sorted(spans):
        new = _Range(url, offset - BLOCK, offset + size)
        last = ranges[-1] if ranges else None
        if last and last.url == url and new.start - last.end <= MAX_GAP and new.end - last.start <= MAX_RANGE:
            ranges[-1] = last._replace(end=max(last.end, new.end))
        else:
            ranges.append(new)
    return ranges
