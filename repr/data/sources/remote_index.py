"""The indexes of shards in a store: fetched from beside them once, and kept in the cache folder.

The name in the cache is made of URL, size and ETag of the shard, so another state of a shard never finds the index of
an earlier one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from repr.data.sources import remote
from repr.data.sources.remote_shards import check_header
from repr.data.sources.shard_cache import cached_name
from repr.data.sources.shard_index import BLOCK, ENDING, ShardIndex, cache_folder
from repr.files import replacing

AT_ONCE = 10**9  # bytes of shards without an index that are read at opening


def load_remote_indexes(
    urls: Sequence[str], *, labels: Sequence[str], cache_dir: str | None
) -> tuple[list[ShardIndex], list[remote.Facts]]:
    """The indexes of shards, and what the store says of each shard.

    Those that lie nowhere, or lack a label, are made where the shards are small.

    Raises:
        ValueError: a shard is not there or may not be read, its index is that of another, or has to be made first.
    """
    folder = cache_folder(cache_dir)
    facts = remote.each(remote.facts, urls)
    known = remote.each(lambda pair: kept_index(*pair, labels, folder), list(zip(urls, facts, strict=True)))
    indexes, lacking = {}, []
    for url, fact, index in zip(urls, facts, known, strict=True):
        if index is None or set(labels) - index.labels.keys():
            lacking.append((url, fact, list(dict.fromkeys([*(index.labels if index else []), *labels]))))
        else:
            indexes[url] = index
    if (size := sum(fact.size for _, fact, _ in lacking)) > AT_ONCE:
        names = " ".join(f"--label {label}" for label in labels)
        raise ValueError(
            f"Shards: {len(lacking):,} of {len(urls):,} shards ({size / 1e9:.3g} GB) have no index beside them"
            f"{' with these labels' if labels else ''}, such as {lacking[0][0]}{ENDING}; make them in one pass: "
            f"python -m tools.index_shards FILES {names}".rstrip()
        )
    if lacking:
        print(
            f"indexing {len(lacking)} shards of {size / 1e6:,.0f} MB; this is done once ...",
            file=sys.stderr,
            flush=True,
        )
        for url, fact, fields in lacking:
            indexes[url] = make_index(url, fact, fields, folder)
    return [indexes[url] for url in urls], facts


def kept_index(url: str, facts: remote.Facts, labels: Sequence[str], folder: Path) -> ShardIndex | None:
    """The index of a shard from the cache or, where that lacks a label, from beside the shard; None: there is none."""
    place = folder / f"{cached_name(url, facts)}.safetensors"
    index = ShardIndex.read(place)
    if index is not None and not set(labels) - index.labels.keys():
        return index
    try:
        data = remote.read(url + ENDING, patience=remote.OPENING)
    except remote.LackingError:
        return index
    _keep(place, data)
    try:
        return _checked(ShardIndex.read(place), url, facts)
    except ValueError:
        place.unlink()
        raise


def _checked(index: ShardIndex | None, url: str, facts: remote.Facts) -> ShardIndex:
    """An index from beside a shard; raises ValueError where it is not that of the shard."""
    again = f"make it again: python -m tools.index_shards {url}"
    if index is None:
        raise ValueError(f"{url}{ENDING} is damaged, or of another version; {again}")
    known = bool(index.etag and facts.etag)
    if index.size != facts.size or (known and index.etag != facts.etag):
        raise ValueError(
            f"{url}{ENDING} is not that of the shard: it is of {index.size:,} bytes, ETag {index.etag or 'not known'}; "
            f"the shard has {facts.size:,}, {facts.etag or 'none'}; {again}"
        )
    spans = index.arrays["span"]
    if not known and len(spans):  # an equal size alone says little
        offset, size = spans[spans[:, 1].argmax()].tolist()
        with suppress(remote.RangesError):
            check_header(remote.read(url, offset - BLOCK, offset, patience=remote.OPENING), url, offset, size)
    return index


def make_index(url: str, facts: remote.Facts, labels: Sequence[str], folder: Path) -> ShardIndex:
    """Read a shard once, and keep its index in the cache folder.

    Raises:
        ValueError: the shard is damaged, or no tar file.
    """
    place = folder / f"{cached_name(url, facts)}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        copy = os.path.join(name, "shard.tar")
        remote.download(url, copy, facts.size)
        index = ShardIndex.build(copy, labels=labels, url=url, etag=facts.etag)
    _keep(place, index.encoded())
    return ShardIndex.read(place) or index


def _keep(place: Path, data: bytes) -> None:
    try:
        with replacing(place, shared=True) as file:
            file.write(data)
    except OSError as error:
        raise ValueError(f"{place} cannot be written ({error}); set cache_dir to a folder that can") from error
