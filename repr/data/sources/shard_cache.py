"""Whole shards of a store in a folder on the disk, which the processes of a machine share.

A shard is written aside under a lock of its own, renamed once it is whole, and locked by those that read it; the least
recently used ones make room for others. The locks are those of the kernel on the files themselves (``flock``), so a
process that is killed holds none. A file's name tells its size, that of a file being written, too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from repr.data.sources import remote
from repr.files import PART, disk_full

_CLAIM = ".claim"  # locked by the process that fetches the shard


def cached_name(url: str, facts: remote.Facts) -> str:
    """The name under which what belongs to this state of a file is kept."""
    return hashlib.sha256(f"{url}\n{facts.size}\n{facts.etag}".encode()).hexdigest()[:32]


class ShardCache:
    """Shards on the disk, at most so many bytes.

    Args:
        folder: where; made where it is missing.
        limit: bytes of all shards together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def read(self, url: str, facts: remote.Facts, start: int, end: int) -> bytes:
        """The bytes of a shard from ``start`` to ``end``; it is fetched where it is not here.

        Raises:
            ValueError: it is larger than all of the cache, the disk is full, or the store fails.
        """
        path = self.folder / f"{cached_name(url, facts)}-{facts.size}.tar"
        while True:
            with suppress(FileNotFoundError), path.open("rb") as file, _locked(file, shared=True):
                os.utime(file.fileno(), ns=(now := time.time_ns(), now))  # finer than what the kernel would take
                if _is_there(file):  # else it made room before it was locked
                    return os.pread(file.fileno(), end - start, start)
            self._fetch(url, facts, path)

    def _fetch(self, url: str, facts: remote.Facts, path: Path) -> None:
        """Bring a shard here, or wait for the process that does."""
        if facts.size > self.limit:
            raise ValueError(
                f"{url} has {facts.size / 1e9:.3g} GB, more than cache_gb={self.limit / 1e9:g}; raise cache_gb, or set "
                "cache=ranges"
            )
        claim, partial = path.with_suffix(_CLAIM), path.with_suffix(PART)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with claim.open("ab") as file, _locked(file):
                if not _is_there(file):  # another has done it, or has failed
                    return
                try:
                    if path.exists():  # another had done it before this claim was made
                        return
                    self._make_room(facts.size, partial)
                    if (now := remote.facts(url, patience=remote.READING)) != facts:
                        raise ValueError(
                            f"{url} has changed since it was opened ({now.size:,} bytes, ETag {now.etag or 'none'}; "
                            f"then {facts.size:,}, {facts.etag or 'none'}); start or resume the run again"
                        )
                    remote.download(url, str(partial), facts.size)
                    with partial.open("rb") as whole:
                        os.fsync(whole.fileno())
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
                    claim.unlink()
        except OSError as error:
            if not disk_full(error):
                fault = f"{self.folder}: {error.strerror or error}; set cache_dir to a folder that can be written"
                raise ValueError(fault) from error
            free = shutil.disk_usage(self.folder).free
            raise ValueError(
                f"{url} does not fit on the disk of the cache, {self.folder} ({free / 1e9:.3g} GB free); make room, "
                f"lower cache_gb={self.limit / 1e9:g}, or set cache_dir to another disk"
            ) from error

    def _make_room(self, size: int, partial: Path) -> None:
        """Remove the shards that were not read for longest, and make a place for one of this size.

        It waits while others read all of them, or fetch more.
        """
        while True:
            with (self.folder / "lock").open("ab") as lock, _locked(lock):
                for left in self.folder.glob(f"*{PART}"):
                    _remove_unused(left.with_suffix(_CLAIM), left)
                shards = sorted(self.folder.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
                total = sum(map(_size, [*shards, *self.folder.glob(f"*{PART}")]))
                for shard in shards:
                    if total + size > self.limit and _remove_unused(shard, shard):
                        total -= _size(shard)
                if total + size <= self.limit:
                    partial.touch()
                    return
            time.sleep(0.05)


def _size(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _remove_unused(locked: Path, path: Path) -> bool:
    """Remove a file unless a process holds the lock on ``locked``."""
    with locked.open("ab") as file, suppress(BlockingIOError), _locked(file, wait=False):
        locked.unlink()
        path.unlink(missing_ok=True)
        return True
    return False


@contextmanager
def _locked(file: IO[bytes], *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock; it is given back by name, since a process that was forked meanwhile has the file open, too.

    Raises:
        BlockingIOError: another holds it, and we do not ``wait``.
    """
    import fcntl  # here, since Windows has none

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _is_there(file: IO[bytes]) -> bool:
    """Whether an open file has not been removed."""
    return os.fstat(file.fileno()).st_nlink > 0
