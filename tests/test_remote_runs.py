"""Runs from shards in a bucket: the losses are those of the local run, whatever the store, the workers or a kill do."""

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from repr.data.sources.emoji import Emoji
from tests.conftest import RunGroup
from tests.stores import Store, s3_served
from tests.test_fit import TINY
from tests.test_kills import KILL, table
from tools.make_shards import make_shards

SETUP = [
    *TINY, "data=shards", "eval=default", "trainer.max_epochs=2", "trainer.limit_train_batches=1.0",
    "trainer.limit_val_batches=1.0", "data.batch_size=32", "data.bank_size=64", "callbacks.pictures=null",
    "callbacks.checkpoints.every_n_steps=4", *KILL,
]  # fmt: skip


class Part:
    """The first rows of the emoji."""

    def __init__(self, num: int) -> None:
        self.num, self.emoji, self.attributes = num, Emoji("val"), {}

    def __len__(self) -> int:
        return self.num

    def __getattr__(self, name: str):
        return getattr(self.emoji, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as ``make_shards`` writes them, with their indexes."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(Part(256), folder / "set", rows_per_shard=64, tell=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    """The store; processes that are started later find it."""
    with s3_served(folder, "bucket") as (store, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield store


def out_for_a_while(store: Store, num_requests: int) -> None:
    """Stop the store once it has answered so many requests, and start it again after two seconds."""
    while store.requests.total() < num_requests:
        threading.Event().wait(0.01)
    store.stop()
    threading.Event().wait(2)
    store.start()


@pytest.mark.slow
def test_a_run_from_a_bucket_is_the_local_one(folder: Path, store: Store, run_group: RunGroup, tmp_path: Path) -> None:
    def run(name: str, files: str, *options: str, start: bool = True, world: int = 1) -> tuple[int, str]:
        new = [
            f"run_folder={tmp_path}/{name}",
            f"data.train.files={files}",
            f"+data.train.cache_dir={tmp_path}/cache",
            *SETUP,
        ]
        return run_group(world, *(new if start else [f"resume={tmp_path}/{name}", "trust=true"]), *options)[0]

    bucket = "s3://bucket/set/train-*.tar"
    status, out = run("local", f"{folder}/set/train-*.tar")
    assert status == 0, out
    whole = table(tmp_path / "local")
    assert len(whole) >= 16
    store.latency, store.fail_every = 0.1, 20
    restart = threading.Thread(target=out_for_a_while, args=(store, 60))
    restart.start()
    kill = ["+callbacks.kill.place=batch", "+callbacks.kill.number=13"]
    status, out = run("ranges", bucket, "data.num_workers=2", *kill)
    assert status == -signal.SIGKILL, out
    assert out.count("does not answer (") >= 1
    restart.join()
    shutil.copytree(tmp_path / "ranges", tmp_path / "two")
    on_two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "callbacks.kill.place=nowhere"]
    status, out = run("two", bucket, *on_two, start=False, world=2)
    assert status == 0, out
    losses = [
        [float(row["train/loss"]) for row in rows if row["train/loss"]] for rows in (table(tmp_path / "two"), whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    status, out = run("ranges", bucket, "callbacks.kill.place=nowhere", "data.num_workers=1", start=False)
    assert status == 0, out
    assert "num_retries" in out
    status, out = run("shards", bucket, "+data.train.cache=shards", "data.num_workers=2")
    assert status == 0, out
    assert table(tmp_path / "ranges") == table(tmp_path / "shards") == whole
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    config = (tmp_path / "ranges" / "config.yaml").read_text()
    assert bucket in config
    assert "secret" not in config
