"""Files in a store (``s3://``, ``https://``, ``gs://``, ``hf://`` and what else fsspec knows), read with patience.

Credentials and endpoints come from where the store's own library looks for them (``AWS_PROFILE``, ``HF_TOKEN``,
``~/.netrc``, fsspec's ``FSSPEC_S3_ANON`` and the like), and never from a config. Faults that may pass are asked again
with growing waits and counted, over the worker processes that are forked, too. What does not pass is a ``ValueError``:
it ends a run, where an ``OSError`` would cost it a row.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from repr.files import disk_full

T = TypeVar("T")
U = TypeVar("U")

NUM_REQUESTS = 64  # that a process has under way at a time
OPENING, READING = 15.0, 600.0  # seconds of waiting until a store is given up
_FIRST_WAIT, _LONGEST_WAIT, _TOLD_WAIT, _TOLD_EVERY = 0.1, 30.0, 1.0, 60.0  # seconds
_SECRET = re.compile(r"(^|&)[^=&]*(sig|token|secret|passw|credential|auth|key)[^=&]*=", re.IGNORECASE)
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of the package, by protocol
# What errors of other libraries are caught; such as are not OSErrors.
_ERRORS = {"aiohttp": ["ClientError"], "botocore.exceptions": ["BotoCoreError", "ClientError"], "httpx": ["HTTPError"]}
_LASTING = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, getattr(errno, "EREMCHG", errno.EINVAL))

_log = logging.getLogger(__name__)
_stores: dict[tuple[int, str], Any] = {}  # (process, protocol) -> file system; fsspec refuses those of a parent
# Memory that forked processes share: 8 bytes for the time when a wait was told last, then counts of requests.
_shared = mmap.mmap(-1, mmap.PAGESIZE)


class Facts(NamedTuple):
    """What a store says of a file without reading it."""

    size: int  # bytes
    etag: str  # '' where the store has none


class LackingError(ValueError):
    """The file is not there, or may not be read."""


class RangesError(ValueError):
    """The store knows no ranges."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def refuse_secrets(url: str) -> None:
    """Raise ValueError where a URL holds credentials, which would be kept in ``config.yaml`` and logs."""
    parts = urlsplit(url)
    if "@" in parts.netloc or _SECRET.search(parts.query):
        plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"{plain}: the URL holds credentials (a name with a password, or a signed query), which would be kept in "
            "config.yaml; leave them out and set what the store's own library reads: AWS_PROFILE, HF_TOKEN, ~/.netrc"
        )


def matches(url: str) -> list[str]:
    """The files that a URL with ``*`` stands for, in order; empty where the store lists none."""
    store, protocol = _store(url), url.partition("://")[0]
    found = _patiently(partial(store.glob, url), url, OPENING)
    return sorted(path if is_remote(path) else f"{protocol}://{path}" for path in found)


def facts(url: str, *, patience: float | None = None) -> Facts:
    """Size and ETag of a file.

    Raises:
        LackingError: it is not there, or may not be read.
        ValueError: the store cannot be reached, or does not tell the size.
    """
    info = _patiently(partial(_store(url).info, url), url, OPENING if patience is None else patience)
    if info.get("size") is None or info.get("type") == "directory":
        raise ValueError(f"{url}: the store tells no size of it; set files to .tar shards")
    lfs = info.get("lfs") or {}
    marks = (info.get("ETag"), info.get("etag"), lfs.get("sha256"), info.get("blob_id"), info.get("md5Hash"))
    return Facts(int(info["size"]), next((mark.removeprefix("W/").strip('"') for mark in marks if mark), ""))


def read(url: str, start: int | None = None, end: int | None = None, *, patience: float | None = None) -> bytes:
    """The bytes of a file from ``start`` to ``end``, or all of it.

    Raises:
        LackingError: it is not there, or may not be read.
        RangesError: the store sends whole files only.
        ValueError: the store cannot be reached for ``patience`` seconds, or the file is shorter.
    """
    ask = partial(_store(url).cat_file, url, start=start, end=end)
    data = _patiently(ask, url, READING if patience is None else patience)
    if start is not None and end is not None and len(data) != end - start:
        if len(data) > end - start:
            raise RangesError(f"{url}: the store ignores ranges and sends whole files; set cache=shards")
        raise ValueError(f"{url} ends before byte {end}: it has changed; make its index again")
    return data


def download(url: str, path: str, size: int) -> None:
    """Write all of a file to a local ``path``.

    Raises:
        OSError: the disk is full.
        ValueError: as :func:`read`.
    """
    _patiently(partial(_store(url).get_file, url, path), url, READING)
    if (now := os.stat(path).st_size) != size:
        raise ValueError(f"{url} has changed: {now:,} bytes came, {size:,} in its index; make its index again")


def write(url: str, data: bytes) -> bool:
    """Write a file where the store lets us; whether it did."""
    if url.startswith(("http", "hf:")):
        return False
    with suppress(LackingError):
        _patiently(partial(_store(url).pipe_file, url, data), url, OPENING)
        return True
    return False


def each(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """The results of a function for all items, many at a time."""
    return list(_pool(os.getpid()).map(function, items))


def submit(function: Callable[..., U], *arguments: Any) -> Future[U]:
    """Call a function in a thread of this process; what it calls must not submit."""
    return _pool(os.getpid()).submit(function, *arguments)


def num_retries() -> int:
    """How many requests of this process and of those forked from it had to be made again."""
    return sum(count for (count,) in struct.iter_unpack("q", _shared[8:]))


@lru_cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process; those of its parent are none of its own."""
    return ThreadPoolExecutor(NUM_REQUESTS)


def _store(url: str) -> Any:
    """The file system of a URL, made once in each process."""
    import fsspec

    protocol = url.partition("://")[0].lower()
    if (os.getpid(), protocol) in _stores:
        return _stores[os.getpid(), protocol]
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=60)
        options["client_kwargs"] = {"timeout": limits, "trust_env": True}
    elif protocol in ("s3", "s3a"):
        config = {"max_pool_connections": NUM_REQUESTS, "retries": {"max_attempts": 0}}  # `_patiently` counts and tells
        options = {"config_kwargs": config, "use_listings_cache": False}
    try:
        store = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = f"pip install 'repr-pretrain[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else str(error)
        raise ValueError(f"{protocol}:// needs another package: {package}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; use s3://, gs://, https:// or hf://") from error
    store.retries = 1  # of s3fs, likewise
    return _stores.setdefault((os.getpid(), protocol), store)


def _patiently(ask: Callable[[], T], url: str, patience: float) -> T:
    """What ``ask()`` gives, asked again with growing waits while the fault is one that may pass."""
    wait, waited, told = _FIRST_WAIT, 0.0, False
    while True:
        try:
            result = ask()
        except _faults() as error:
            error = _origin(error)
            fault = f"{type(error).__name__}: {_said(error)}"
            _raise_lasting(error, url)
            if waited + wait > patience:
                raise ValueError(
                    f"{url} cannot be reached, tried for {waited:.0f} s ({fault}); see to the store or the network, "
                    "then start again; a run goes on with resume=RUN_FOLDER"
                ) from error
        else:
            if told:
                _log.warning("%s is there again after %.0f s", url, waited)
            return result
        _count()
        if wait > _TOLD_WAIT and not told and (told := _may_tell()):
            _log.warning("%s does not answer (%s); waiting for it, %.0f s at most", url, fault, patience)
        time.sleep(wait)
        waited, wait = waited + wait, min(2 * wait, _LONGEST_WAIT)


def _faults() -> tuple[type[Exception], ...]:
    """The errors of stores, of those libraries that are in use."""
    loaded = [(sys.modules[module], names) for module, names in _ERRORS.items() if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, names in loaded for name in names))


def _origin(error: Exception) -> Exception:
    """What fsspec's http tells as a file that is not there, whatever it was."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return cause if type(cause).__module__.partition(".")[0] in ("aiohttp", "builtins") else error


def _said(error: Exception) -> str:
    """What an error says, in one line, without queries of URLs: stores send on to addresses that are signed."""
    return re.sub(r"\?[^\s'\")]+", "?...", " ".join(str(error).split())) or type(error).__name__


def _raise_lasting(error: Exception, url: str) -> None:
    """Raise what a user has to mend; a fault that may pass is left."""
    if disk_full(error):
        raise error
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None) or 0
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise LackingError(f"{url} does not exist{_lacking_bucket(url)}; set files to shards that are there") from error
    if isinstance(error, PermissionError) or status in (401, 403, 407) or "Credential" in type(error).__name__:
        raise LackingError(
            f"{url} may not be read ({_said(error)}); set the credentials that the store's own library reads "
            "(AWS_PROFILE, HF_TOKEN, ~/.netrc), or FSSPEC_S3_ANON=true for a public bucket"
        ) from error
    if status == 416:
        raise ValueError(f"{url} has changed: it ends before what its index tells of; make its index again") from error
    lasting = isinstance(error, OSError) and error.errno in _LASTING
    if lasting or (400 <= status < 500 and status not in (408, 425, 429)) or type(error).__name__.startswith("Offline"):
        raise ValueError(f"{url}: the store refuses the request ({_said(error)})") from error


def _lacking_bucket(url: str) -> str:
    protocol, _, path = url.partition("://")
    with suppress(OSError):
        if protocol in _EXTRAS and not _store(url).exists(path.partition("/")[0]):
            return f": there is no bucket {path.partition('/')[0]!r}"
    return ""


def _count() -> None:
    place = 8 + os.getpid() % (len(_shared) // 8 - 1) * 8  # a number for each process, so that they need no lock
    struct.pack_into("q", _shared, place, struct.unpack_from("q", _shared, place)[0] + 1)


def _may_tell() -> bool:
    """Whether no thread or process has told of waiting within a minute; this one then has."""
    (last,), now = struct.unpack_from("d", _shared), time.monotonic()
    if last and now - last < _TOLD_EVERY:
        return False
    struct.pack_into("d", _shared, 0, now)
    return True
