"""Shards in a store: real servers on the loopback give what the disk gives, and what fails is told."""

import io
import json
import mmap
import multiprocessing
import os
import resource
import tarfile
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from repr.check.__main__ import main as check
from repr.data.sources import remote
from repr.data.sources.emoji import Emoji
from repr.data.sources.mixture import Mixture
from repr.data.sources.shard_cache import ShardCache
from repr.data.sources.shards import Shards
from tests.stores import Store, s3_served, served
from tools.index_shards import main as index_shards

OPTIONS = {"captions": ["txt", "json:more"], "labels": ["json:category"]}
NUM, SHARDS = 120, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 30 pictures with captions and labels, their indexes beside them."""
    root, source = tmp_path_factory.mktemp("store"), Emoji("val")
    (root / "set").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / "set" / f"s-{shard:02d}.tar", "w") as archive:
            for row in range(shard, NUM, SHARDS):
                facts = {"category": source.attributes["category"][row], "more": [f"number {row}"]}
                for ending, data in {
                    "webp": source.encoded(row),
                    "txt": source.captions(row)[0].encode(),
                    "json": json.dumps(facts).encode(),
                }.items():
                    member = tarfile.TarInfo(f"{'long name ' * (row % 3 * 9)}{row}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    Shards(f"{root}/set/*.tar", **OPTIONS)
    return root


@pytest.fixture(scope="module")
def local(folder: Path) -> Shards:
    return Shards(f"{folder}/set/*.tar", **OPTIONS)


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Store]:
    with served(folder) as store:
        yield store


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[Store]:
    with s3_served(folder, "bucket") as (store, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)


def assert_equal(source: Shards, local: Shards) -> None:
    assert len(source) == len(local)
    assert {name: list(labels) for name, labels in source.attributes.items()} == {
        name: list(labels) for name, labels in local.attributes.items()
    }
    rows = np.random.default_rng(0).permutation(len(local)).tolist()
    for first in range(0, len(rows), 50):
        source.prefetch(rows[first : first + 50])
        for row in rows[first : first + 50]:
            assert source.key(row) == local.key(row)
            assert source.encoded(row) == local.encoded(row)
            assert source.captions(row) == local.captions(row)
            assert source.caption_weights(row) == local.caption_weights(row)
    assert source.encoded(rows[0]) == local.encoded(rows[0])  # which is held no more


@pytest.mark.parametrize("cache", ["ranges", "shards"])
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_store_gives_what_the_disk_gives(
    cache: str, protocol: str, local: Shards, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = request.getfixturevalue(protocol)
    base = "s3://bucket/set" if protocol == "s3" else f"{store.url}/set"
    options = {**OPTIONS, "cache": cache, "cache_dir": str(tmp_path)}
    store.requests.clear()
    source = Shards(f"{base}/s-{{00..03}}.tar", **options)
    assert (
        store.requests.total() <= 4 * SHARDS + 1
    )  # at most: size, size of the index, index, a header; whether there are ranges
    assert_equal(source, local)
    again = Shards([f"{base}/s-*.tar"], **options)
    assert again.key(0) == local.key(0)
    assert len(list(tmp_path.glob("*.tar"))) == (SHARDS if cache == "shards" else 0)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.claim"))
    if cache == "shards":
        store.requests.clear()
        assert_equal(again, local)  # from the disk
        assert not store.requests


def test_a_list_and_a_mixture_of_both_places(http: Store, folder: Path, local: Shards, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"# two shards\n{http.url}/set/s-{{00..01}}.tar\n\n{folder}/set/s-02.tar\n")
    options = {**OPTIONS, "cache_dir": str(tmp_path)}
    source = Shards(str(tmp_path / "list.txt"), **options)
    assert [source.encoded(row) for row in (0, 40, 80)] == [local.encoded(row) for row in (0, 40, 80)]
    mixture = Mixture([source, Shards(f"{http.url}/set/s-03.tar", **options)])
    http.requests.clear()
    mixture.prefetch([0, 1, 2, 100])
    assert mixture.encoded(100) == local.encoded(100)
    assert [mixture.captions(row) for row in (0, 1, 2)] == [local.captions(row) for row in (0, 1, 2)]
    assert http.requests.total() == 2  # rows beside one another are one request


def test_an_epoch_reads_each_row_once(
    http: Store, folder: Path, local: Shards, tmp_path: Path, make_datamodule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch has fetched ahead is not asked for again."""
    monkeypatch.setattr("repr.data.sources.remote_shards.MAX_GAP", 512)  # these pictures are smaller than the usual one
    source = Shards(f"{http.url}/set/s-*.tar", **OPTIONS, cache_dir=str(tmp_path))
    before = http.sent
    loaders = (make_datamodule(train=train, eval={}, batch_size=20).train_dataloader() for train in (source, local))
    for ours, its in zip(*loaders, strict=True):
        assert all(map(torch.equal, ours["views"], its["views"]))
        assert torch.equal(ours["text"], its["text"])
    assert http.sent - before <= 1.05 * sum(path.stat().st_size for path in (folder / "set").glob("*.tar"))


def test_the_data_check_reads_a_sample_and_says_so(
    s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("repr.check.facts.REMOTE_ROWS", 20)
    monkeypatch.chdir(tmp_path)
    data = ["data=shards", "data.train.files=s3://bucket/set/s-*.tar", "+data.train.cache_dir=cache"]
    with pytest.raises(SystemExit) as stop:
        check([*data, "data.num_workers=0", "data.batch_size=32"])
    assert stop.value.code == 0
    assert "note: train: 20 of 120 rows were read, evenly spread" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "data-check" / "check.json").read_text())["sets"]["train"]["read"] == 20


def _read(source: Shards, rows: list[int], queue) -> None:
    source.prefetch(rows)
    queue.put([source.encoded(row) for row in rows])


@pytest.mark.parametrize("cache", ["ranges", "shards"])
def test_workers_have_clients_of_their_own(cache: str, s3: Store, local: Shards, tmp_path: Path) -> None:
    source = Shards("s3://bucket/set/s-*.tar", **OPTIONS, cache=cache, cache_dir=str(tmp_path))
    source.prefetch(range(0, 60))  # is under way in the parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    rows = [[1, 50, 100], [2, 50, 119]]
    processes = [context.Process(target=_read, args=(source, part, queue)) for part in rows]
    s3.requests.clear()
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in rows]
    assert sorted(found) == sorted([local.encoded(row) for row in part] for part in rows)
    assert source.encoded(3) == local.encoded(3)
    if cache == "shards":
        assert max(s3.requests.values()) <= 2  # one process fetched each: its ETag, and all of it


def test_faults_that_pass_are_counted_and_told(
    http: Store, local: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Shards(f"{http.url}/set/s-*.tar", **OPTIONS, cache_dir=str(tmp_path))
    monkeypatch.setattr(remote, "_shared", mmap.mmap(-1, mmap.PAGESIZE))  # where nothing was told yet
    http.fail_every = 5
    assert_equal(source, local)
    http.fail_every = 0
    assert remote.num_retries() > 0
    assert not caplog.messages  # it was short
    monkeypatch.setattr(remote, "_TOLD_WAIT", 0.1)
    http.stop()
    url = f"{http.url}/set/s-00.tar"
    futures = [remote.submit(remote.read, url, 0, 512) for _ in range(5)]
    while not caplog.messages and not all(future.done() for future in futures):
        wait(futures, 0.02)
    http.start()
    assert [len(future.result(30)) for future in futures] == [512] * 5
    assert [message.split(" (")[0] for message in caplog.messages[:1]] == [f"{url} does not answer"]
    assert "is there again after" in caplog.messages[1]
    assert len(caplog.messages) == 2  # once for all threads
    monkeypatch.setattr(remote, "READING", 0.1)
    http.fail_every = 1
    with pytest.raises(ValueError, match=r"s-00\.tar cannot be reached, tried for .* 503.*resume=RUN_FOLDER"):
        remote.read(url, 0, 9, patience=remote.READING)
    http.fail_every = 0


@pytest.mark.parametrize("cache", ["ranges", "shards"])
def test_a_shard_that_is_gone_or_another_is_named(cache: str, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number, place in enumerate(("a.tar", "b.tar")):
        data = (folder / "set" / f"s-0{number}.tar").read_bytes()
        (root / place).write_bytes(data)
    with served(root) as store:
        source = Shards(f"{store.url}/*.tar", captions=["txt"], cache=cache, cache_dir=str(tmp_path / "cache"))
        (root / "a.tar").unlink()
        with pytest.raises(ValueError, match=r"a\.tar does not exist"):
            source.encoded(0)
        size = (root / "b.tar").stat().st_size
        (root / "b.tar").write_bytes(bytes(512) + (root / "b.tar").read_bytes()[:-512])
        assert (root / "b.tar").stat().st_size == size
        with pytest.raises(ValueError, match=r"b\.tar (has changed since|is not the shard that its index tells of)"):
            source.encoded(40)
        (root / "b.tar").write_bytes(bytes(512))
        with pytest.raises(ValueError, match=r"b\.tar .*has changed"):
            source.encoded(40)
        assert not list((tmp_path / "cache").glob("*.tar")) + list((tmp_path / "cache").glob("*.part"))


def test_an_index_of_another_shard_is_refused_and_made_again(folder: Path, tmp_path: Path, capsys) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    root.mkdir()
    (root / "a.tar").write_bytes((folder / "set" / "s-00.tar").read_bytes())
    index = root / "a.tar.index.safetensors"
    with served(root) as store:
        for data, fault in (
            ((folder / "set" / "s-01.tar.index.safetensors").read_bytes(), "is not the shard that its index tells of"),
            (b"none", "is damaged"),
        ):
            index.write_bytes(data)
            with pytest.raises(ValueError, match=rf"a\.tar.* {fault}.*: python -m tools\.index_shards http"):
                Shards(f"{store.url}/a.tar", cache_dir=str(cache))
        index_shards([f"{store.url}/a.tar", "--label", "json:category", "--cache-dir", str(cache)])
        assert "a.tar: 30 samples, " in capsys.readouterr().out
        source = Shards(f"{store.url}/a.tar", labels=["json:category"], cache_dir=str(cache))
        assert len(source) == 30


def test_indexes_that_are_missing(http: Store, s3: Store, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Small shards are indexed at opening, others by a program, which writes beside them where it may."""
    import s3fs

    import repr.data.sources.remote_index as remote_index

    store = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for number in range(2):
        store.put_file(str(folder / "set" / f"s-0{number}.tar"), f"bucket/bare/s-0{number}.tar")
    monkeypatch.setattr(remote_index, "AT_ONCE", 1000)
    files, labels = "s3://bucket/bare/s-*.tar", ["json:category"]
    with pytest.raises(
        ValueError, match=r"2 of 2 shards .* no index .*: python -m tools\.index_shards FILES --label json:c"
    ):
        Shards(files, labels=labels, cache_dir=str(tmp_path / "a"))
    index_shards([files, "--cache-dir", str(tmp_path / "b"), "--workers", "2"])
    assert "s-01.tar: 30 samples, s3://bucket/bare/s-01.tar.index.safetensors" in capsys.readouterr().out
    assert len(Shards(files, cache_dir=str(tmp_path / "a"))) == 60
    with pytest.raises(ValueError, match="no index beside them with these labels"):
        Shards(files, labels=labels, cache_dir=str(tmp_path / "a"))
    index_shards([files, "--cache-dir", str(tmp_path / "b"), "--label", "json:category"])
    assert len(Shards(files, labels=labels, cache_dir=str(tmp_path / "a")).attributes["category"]) == 60
    store.pipe_file("bucket/bare/s-00.tar", (folder / "set" / "s-00.tar").read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"s-00\.tar\.index\..* is not that of the shard: .* ETag \w+; the shard has"):
        Shards(files, cache_dir=str(tmp_path / "d"))
    monkeypatch.setattr(remote_index, "AT_ONCE", 10**9)
    monkeypatch.setattr(remote_index, "ENDING", ".none")
    capsys.readouterr()
    assert len(Shards(f"{http.url}/set/s-00.tar", labels=labels, cache_dir=str(tmp_path / "c"))) == 30
    assert "indexing 1 shards" in capsys.readouterr().err


def test_what_a_store_refuses_is_one_error(
    http: Store, s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(files: str, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message) as stop:
            Shards(files, cache_dir=str(tmp_path), **options)
        assert "\n" not in str(stop.value)
        assert "secret" not in str(stop.value)

    monkeypatch.setattr(remote, "OPENING", 0.1)
    refused("s3://nowhere/a.tar", r"s3://nowhere/a\.tar does not exist: there is no bucket 'nowhere'")
    refused("s3://bucket/set/none.tar", r"set/none\.tar does not exist; set files")
    refused("s3://bucket/none-*.tar", "the store lists no file s3://bucket/none")
    refused(f"{http.url}/none/*.tar", "none")
    refused(f"{http.url}/set/s-9.tar", r"s-9\.tar does not exist")
    refused("http://127.0.0.1:9/a.tar", "cannot be reached")
    refused("nope://x/a.tar", "Protocol not known: nope; use s3://")
    refused(f"{http.url}/a.tar.gz", "is compressed")
    refused("http://user:secret@host/a.tar", "http://host/a.tar: the URL holds credentials")
    refused("https://host/a.tar?X-Amz-Signature=secret", "https://host/a.tar: the URL holds credentials")
    refused("https://host/a.tar?v=1&access_token=secret", "holds credentials")
    refused(f"{http.url}/set/s-00.tar", "set cache to ranges or shards", cache="disk")
    for store, files in ((http, f"{http.url}/set/s-00.tar"), (s3, "s3://bucket/set/s-00.tar")):
        store.forbidden = True
        refused(f"{http.url}/moved/a.tar", r"moved/a\.tar (may not be read|does not exist)")
        refused(files, r"s-00\.tar may not be read .*; set the credentials")
        store.forbidden = False
    http.ranges = False
    refused(f"{http.url}/set/s-00.tar", "sends whole files; set cache=shards")
    assert Shards(f"{http.url}/set/s-00.tar", cache_dir=str(tmp_path), cache="shards").encoded(0)
    http.ranges = True
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(remote, "_stores", {})
    monkeypatch.setattr("fsspec.config.conf", {"s3": {"skip_instance_cache": True}})
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused("s3://bucket/set/s-00.tar", "may not be read .*credentials")


def test_the_least_recently_used_shards_make_room(http: Store, folder: Path, tmp_path: Path) -> None:
    urls = [f"{http.url}/set/s-0{number}.tar" for number in range(SHARDS)]
    facts = [remote.facts(url) for url in urls]
    cache = ShardCache(tmp_path, sum(sorted(fact.size for fact in facts)[1:]))
    for number in (0, 1, 2, 0, 3, 0):
        assert cache.read(urls[number], facts[number], 0, 9) == (folder / "set" / f"s-0{number}.tar").read_bytes()[:9]
    http.requests.clear()
    for number in (0, 2, 3):
        cache.read(urls[number], facts[number], 0, 9)
    assert not http.requests
    cache.read(urls[1], facts[1], 0, 9)
    assert http.requests
    (tmp_path / "dead-1000.part").write_bytes(b"of a process that was killed")
    cache.read(urls[0], facts[0], 0, 9)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".tar", ".tar", ".tar"]
    with pytest.raises(ValueError, match=r"more than cache_gb=1e-06; raise cache_gb, or set cache=ranges"):
        ShardCache(tmp_path / "other", 1000).read(urls[0], facts[0], 0, 9)


def test_a_shard_that_came_while_a_process_was_about_to_fetch_it_is_left(http: Store, tmp_path: Path) -> None:
    url = f"{http.url}/set/s-00.tar"
    facts, cache = remote.facts(url), ShardCache(tmp_path, 10**9)
    cache.read(url, facts, 0, 9)
    (path,) = tmp_path.glob("*.tar")
    before = path.stat().st_ino
    http.requests.clear()
    cache._fetch(url, facts, path)  # of a process that had not found it
    assert not http.requests
    assert path.stat().st_ino == before
    assert not [*tmp_path.glob("*.claim"), *tmp_path.glob("*.part")]


def _cramped(url: str, folder: Path, queue) -> None:
    """Files may not grow beyond 30 kB, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try:
        ShardCache(folder, 10**9).read(url, remote.facts(url), 0, 9)
    except ValueError as error:
        queue.put(str(error))


def test_a_cache_that_cannot_help_is_told(http: Store, folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"more than cache_gb=0\.0001: .* set cache=ranges"):
        source = Shards(f"{http.url}/set/s-*.tar", cache="shards", cache_gb=0.0001, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="more than cache_gb=0\\.0001; raise cache_gb"):
        source.encoded(0)
    with pytest.warns(UserWarning, match="cache=shards has no effect"):
        Shards(f"{folder}/set/s-*.tar", cache="shards")


def test_a_full_disk_of_the_cache_is_one_error(http: Store, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_cramped, args=(f"{http.url}/set/s-00.tar", tmp_path / "cache", queue))
    process.start()
    assert "does not fit on the disk of the cache" in queue.get(timeout=60)
    process.join()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]
