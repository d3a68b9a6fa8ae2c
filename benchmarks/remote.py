"""Images a second from shards behind HTTP, against webdataset's own pipeline on the same server.

Run from the root of the repository::

    python -m benchmarks.remote            # ten minutes at most on two cores
    python -m benchmarks.remote --quick    # three minutes at most
    python -m benchmarks.remote --write    # also writes benchmarks/results/remote.md

The server is a process of its own (aiohttp), which answers after 20 ms. All pipelines read the same JPEGs of 500 x 375,
decode, crop to 224 px at random, resize, flip: what a worker does in training. webdataset streams each shard by
``pipe:curl``, shard by shard, with a shuffle buffer of 1,000; ours takes rows of all shards in the order of the epoch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import BATCH, MEAN, SIZE, STD, Several, cpu_seconds, crops, make_pictures
from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/remote.md"
LATENCY = 0.02  # seconds of each request


def serve(folder: str) -> None:
    """The server: it prints its address, and at ``/sent`` tells how many bytes it has sent."""
    from tests.stores import Store

    store = Store(Path(folder))
    store.latency = LATENCY
    store.start()
    print(store.url, flush=True)
    for _ in sys.stdin:
        print(store.sent, flush=True)


class Server:
    """The server as a process."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()  # type: ignore[union-attr]

    def sent(self) -> int:
        """Bytes of all answers so far."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return int(self.process.stdout.readline())  # type: ignore[union-attr]

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def ours(files: list[str], cache: str, folder: Path, workers: int) -> Iterable:
    from repr.data.datamodule import DataModule
    from repr.data.sources.shards import Shards
    from repr.data.views import View

    cache_dir, view = str(folder / "cache"), View(size=SIZE, scale=(0.08, 1), flip=0.5)
    local = "://" not in files[0]
    source = Shards(files, cache_dir=cache_dir) if local else Shards(files, cache=cache, cache_dir=cache_dir)  # type: ignore[arg-type]
    data = DataModule(
        train=source, eval={}, views={"view": view}, batch_size=BATCH, eval_batch_size=BATCH, image_size=SIZE, seed=0,
        mean=MEAN, std=STD, num_workers=workers,
    )  # fmt: skip
    return data.train_dataloader()


def peer(files: list[str], workers: int) -> Iterable:
    import webdataset

    data = webdataset.WebDataset([f"pipe:curl -s -f {url}" for url in files], shardshuffle=len(files))
    data = data.shuffle(1000).decode("pil").to_tuple("jpg").map_tuple(Several(crops(), 1)).batched(BATCH, partial=False)
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers)


def rates(loader: Iterable, batches: int) -> tuple[float, float]:
    """Images a second of the clock, and of CPU time of this process and its workers, once these are at work."""
    stream = iter(loader)
    for _ in islice(stream, 3):
        pass
    begin, cpu = time.perf_counter(), cpu_seconds()
    done = sum(1 for _ in islice(stream, batches)) * BATCH
    return done / (time.perf_counter() - begin), done / (cpu_seconds() - cpu)


def speed(server: Server, folder: Path, files: list[str], repetitions: int, batches: int) -> list[str]:
    """Best of several repetitions, of which each goes through all lines."""
    urls = [f"{server.url}/{Path(file).name}" for file in files]
    makers: dict[str, Any] = {
        "ours, cache: shards": lambda workers: ours(urls, "shards", folder, workers),
        "ours, cache: ranges": lambda workers: ours(urls, "ranges", folder, workers),
        "webdataset, pipe:curl": lambda workers: peer(urls, workers),
        "ours, local shards": lambda workers: ours(files, "ranges", folder, workers),
    }
    best: dict[tuple[str, int, int], float] = {}  # pipeline, workers, clock or CPU
    for repetition in range(repetitions):
        for name, make in makers.items():
            for workers in (1, 2):
                for kind, value in enumerate(rates(make(workers), batches)):
                    best[name, workers, kind] = max(value, best.get((name, workers, kind), 0.0))
            print(f"repetition {repetition + 1}: {name}", file=sys.stderr, flush=True)
    lines = [
        "| pipeline | 1 worker | 2 workers | 1 worker, CPU | 2 workers, CPU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    columns = [(workers, kind) for kind in (0, 1) for workers in (1, 2)]
    for name in makers:
        values = [(best[name, *column], best["webdataset, pipe:curl", *column]) for column in columns]
        cells = [f"{value:.0f} ({value / base:.2f})" for value, base in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def volume(server: Server, folder: Path, files: list[str]) -> list[str]:
    """Bytes that an epoch of two workers reads, as a share of the shards."""
    urls, size = [f"{server.url}/{Path(file).name}" for file in files], sum(Path(file).stat().st_size for file in files)
    lines = ["| cache | bytes read, of those of all shards |", "| --- | ---: |"]
    for cache in ("shards", "ranges"):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        before = server.sent()
        for _ in ours(urls, cache, folder, 2):
            pass
        lines.append(f"| {cache} | {(server.sent() - before) / size:.3f} |")
    return lines


def first_batch(server: Server, folder: Path, num: int) -> list[str]:
    """Seconds to the first batch of many shards with ready indexes."""
    urls = [f"{server.url}/many/train-{number:05d}.tar" for number in range(num)]
    lines = ["| indexes | cache | seconds |", "| --- | --- | ---: |"]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for kept in ("beside the shards", "in the local cache"):
        begin = time.perf_counter()
        next(iter(ours(urls, "ranges", folder, 1)))
        lines.append(f"| {kept} | ranges | {time.perf_counter() - begin:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, repetitions and shards")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    torch.set_num_threads(1)
    num, repetitions, batches, num_shards = (640, 1, 4, 100) if args.quick else (2000, 3, 16, 1000)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder, num)
        files = sorted(map(str, (folder / "shards").glob("*.tar")))
        (folder / "shards" / "many").mkdir()
        for number in range(num_shards):  # a file under many names
            for ending in (".tar", ".tar.index.safetensors"):
                os.link(f"{files[0][:-4]}{ending}", folder / "shards" / "many" / f"train-{number:05d}{ending}")
        server = Server(folder / "shards")
        try:
            urllib.request.urlopen(f"{server.url}/{Path(files[0]).name}").close()
            tables = [
                speed(server, folder, files, repetitions, batches),
                volume(server, folder, files),
                first_batch(server, folder, num_shards),
            ]
        finally:
            server.stop()
        size = sum(Path(file).stat().st_size for file in files)
    lines = [
        "# Shards in a store",
        "",
        f"`{' '.join(['python -m benchmarks.remote', *sys.argv[1:]])}`: {num} JPEGs of 500 x 375 in {len(files)} "
        f"shards of {size / len(files) / 1e6:.0f} MB behind HTTP on this machine, {LATENCY * 1000:.0f} ms a request; "
        f"batches of {BATCH}, crops of {SIZE} px, uint8, one thread a process.",
        "",
        f"{hardware('torch', 'fsspec', 'aiohttp', 'webdataset')}, load before {load:.1f}",
        "",
        "Images a second of the clock and, since other programs may run beside, of CPU time (without that of curl), "
        f"best of {repetitions} interleaved; in brackets the ratio to webdataset. The server shares the two cores. "
        "With `cache: shards` all are on the disk after the first batches.",
        "",
        *tables[0],
        "",
        "## Bytes read in an epoch of two workers",
        "",
        "From an empty cache, indexes included. With ranges, the rows that do not fill a batch are not read.",
        "",
        *tables[1],
        "",
        f"## The first batch of {num_shards:,} shards with ready indexes",
        "",
        "Sizes and ETags of all shards are asked for at each opening; one worker, its start included.",
        "",
        *tables[2],
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
