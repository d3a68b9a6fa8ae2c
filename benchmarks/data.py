"""Images a second from folder, table and shards, and what a set of a million rows costs.

Run from the root of the repository::

    python -m benchmarks.data            # an hour at most on two cores
    python -m benchmarks.data --quick    # a quarter of an hour at most
    python -m benchmarks.data --write    # also writes benchmarks/results/data.md

All read the same JPEGs, which are made first: 500 x 375 and 4000 x 3000, quality 90, composed of embedded emoji and
noise. Two kinds of line. *Crops*: read, decode, crop to 224 px at random, resize, flip, uint8: what a worker process
does in training, colour being left to the device. *All on the CPU*: with colour jitter, gray, blur and normalisation,
ours being worker half and device half one after the other. Peers get the same sizes, batches and law of crops.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/data.md"
SIZE, BATCH = 224, 16
SMALL, LARGE = (500, 375), (4000, 3000)  # width and height of the pictures
DISTINCT = 16  # large pictures that are made; others are links to them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT = 200  # bytes a row that a worker may hold by itself (issue 3)
Make = Callable[[Path, int, int], Iterable]  # (folder of the files, views, workers) -> batches


# The files ---------------------------------------------------------------------------------------------------------


def make_pictures(folder: Path, num: int, size: tuple[int, int] = SMALL) -> None:
    """A folder of classes, a table of the same files, and shards of the same bytes."""
    from PIL import Image

    from repr.data.sources.emoji import Emoji
    from repr.data.sources.folder import Folder
    from tools.make_shards import make_shards

    source, rng, (width, height) = Emoji("train"), np.random.default_rng(0), size
    rows, side = [], 8 * height // 15
    for i in range(num):
        name = f"class{i % 10}/{i:05d}.jpg"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.append([name, f"picture {i}", f"class{i % 10}"])
        if size == LARGE and i >= DISTINCT:
            os.link(folder / "images" / rows[i % DISTINCT][0], path)
            continue
        one, two = (source.image(int(row)) for row in rng.integers(0, len(source), 2))
        pixels = np.asarray(one.resize(size, Image.Resampling.BICUBIC), np.float32)
        pixels = 0.6 * pixels + rng.normal(50, 9, (height, width, 1)) + rng.normal(0, 4, (height, width, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        place = rng.integers(0, (width - side, height - side)).tolist()
        picture.paste(two.resize((side, side), Image.Resampling.BICUBIC), tuple(place))
        picture.save(path, quality=90)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "category"], *rows])
    make_shards(Folder(folder / "images"), folder / "shards", rows_per_shard=num // 4, tell=lambda line: None)


# The pipelines -----------------------------------------------------------------------------------------------------


def source_of(kind: str, folder: Path) -> Any:
    from repr.data.sources.folder import Folder
    from repr.data.sources.shards import Shards
    from repr.data.sources.table import Table

    if kind == "folder":
        return Folder(folder / "images")
    if kind == "table":
        return Table(folder / "table.csv", root=folder / "images")
    return Shards(f"{folder}/shards/train-*.tar")


def datamodule(kind: str, folder: Path, views: int, workers: int, decode: str = "scaled") -> Any:
    """Ours, with SimCLR's view."""
    from repr.data.datamodule import DataModule
    from repr.data.views import View

    view = View(
        size=SIZE, count=views, scale=(0.08, 1), flip=0.5, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2,
        jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, blur_sigma=(0.1, 2),
    )  # fmt: skip
    return DataModule(
        train=source_of(kind, folder), eval={}, views={"view": view}, batch_size=BATCH, eval_batch_size=BATCH,
        image_size=SIZE, seed=0, mean=MEAN, std=STD, num_workers=workers, decode=decode,
    )  # fmt: skip


def ours(kind: str, *, device_half: bool, decode: str = "scaled") -> Make:
    def make(folder: Path, views: int, workers: int) -> Iterable:
        data = datamodule(kind, folder, views, workers, decode)
        loader = data.train_dataloader()
        return (data.on_after_batch_transfer(batch, 0) for batch in loader) if device_half else loader

    return make


def device_half(folder: Path, views: int, workers: int) -> Iterable:
    """Colour and normalisation alone, of one batch again and again; CPU only."""
    data = datamodule("folder", folder, views, 0)
    batch = next(iter(data.train_dataloader()))
    while True:
        yield data.on_after_batch_transfer(batch | {"views": list(batch["views"])}, 0)


def crops() -> Callable:
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(SIZE, scale=(0.08, 1), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([crop, t.RandomHorizontalFlip(), t.PILToTensor()])


def simclr() -> Callable:
    from lightly.transforms.simclr_transform import SimCLRViewTransform

    return SimCLRViewTransform(input_size=SIZE)


class Several:
    """A picture -> several views of it."""

    def __init__(self, transform: Callable, views: int) -> None:
        self.transform, self.views = transform, views

    def __call__(self, image: Any) -> tuple:
        return tuple(self.transform(image) for _ in range(self.views))


def image_folder(transform: Callable[[], Callable]) -> Make:
    def make(folder: Path, views: int, workers: int) -> Iterable:
        from lightly.transforms import SimCLRTransform
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder

        two = SimCLRTransform(input_size=SIZE) if transform is simclr and views == 2 else Several(transform(), views)
        data = ImageFolder(str(folder / "images"), two)
        return DataLoader(data, BATCH, shuffle=True, num_workers=workers)

    return make


def web_dataset(transform: Callable[[], Callable]) -> Make:
    def make(folder: Path, views: int, workers: int) -> Iterable:
        import webdataset

        files = sorted(map(str, (folder / "shards").glob("*.tar")))
        data = webdataset.WebDataset(files, shardshuffle=len(files), nodesplitter=webdataset.split_by_node)
        data = (
            data.shuffle(1000)
            .decode("pil")
            .to_tuple("jpg")
            .map_tuple(Several(transform(), views))
            .batched(BATCH, partial=False)
        )
        return webdataset.WebLoader(data, batch_size=None, num_workers=workers)

    return make


CROPS: dict[str, Make] = {
    "ours, folder": ours("folder", device_half=False),
    "ours, table": ours("table", device_half=False),
    "ours, shards": ours("shards", device_half=False),
    "ours, shards, decode=exact": ours("shards", device_half=False, decode="exact"),
    "webdataset, torchvision's crops": web_dataset(crops),
    "ImageFolder, torchvision's crops": image_folder(crops),
}
ALL: dict[str, Make] = {
    "ours, shards": ours("shards", device_half=True),
    "ours, shards, decode=exact": ours("shards", device_half=True, decode="exact"),
    "ours, the device half alone": device_half,
    "webdataset, lightly's SimCLR": web_dataset(simclr),
    "ImageFolder, lightly's SimCLR": image_folder(simclr),
}


def cpu_seconds() -> float:
    """CPU time of this process and of its workers so far."""
    total = time.process_time()
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system
    return total


def rate(make: Make, folder: Path, views: int, workers: int, batches: int) -> float:
    """Images a second of CPU time, of all processes together, once the workers are at work."""
    stream = iter(make(folder, views, workers))
    for _ in islice(stream, 4 if workers else 1):
        pass
    begin = cpu_seconds()
    done = sum(1 for _ in islice(stream, batches))
    seconds = cpu_seconds() - begin
    assert done == batches, "too few pictures for this many batches"
    return done * BATCH / seconds


def decode_table(folders: dict[str, Path], repetitions: int) -> list[str]:
    """Decoding alone, of files in memory, for one view each."""
    from io import BytesIO

    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    from repr.data.sources.pictures import decode
    from repr.data.views import draw, reduction
    from repr.seeds import sample_seed

    def pillow(data: bytes, _: int) -> Any:
        return np.asarray(Image.open(BytesIO(data)))

    def torchvision(data: bytes, _: int) -> Any:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

    def exact(data: bytes, _: int) -> Any:
        return decode(data, "")

    def scaled(data: bytes, row: int) -> Any:
        return decode(data, "", reduction=lambda width, height: reduction(draws[row], data_views, width, height))

    data_views = datamodule("shards", folders["500 x 375"], 1, 0).views
    draws = draw(sample_seed(0, 0, torch.arange(DISTINCT)), data_views)[0].tolist()
    methods = {
        "Pillow, to an array": pillow,
        "torchvision.io.decode_jpeg": torchvision,
        "ours, decode=exact": exact,
        "ours, decode=scaled": scaled,
    }
    best: dict[tuple[str, str], float] = {}
    for size, folder in folders.items():
        files = [path.read_bytes() for path in sorted((folder / "images").rglob("*.jpg"))[:DISTINCT]]
        for _ in range(3 * repetitions):
            for name, method in methods.items():
                begin = time.process_time()
                for row, data in enumerate(files):
                    method(data, row)
                value = len(files) / (time.process_time() - begin)
                best[name, size] = max(value, best.get((name, size), 0.0))
        assert all(np.array_equal(torchvision(data, 0).permute(1, 2, 0), pillow(data, 0)) for data in files)
    table = [f"| decoder | {' | '.join(folders)} |", f"| --- |{' ---: |' * len(folders)}"]
    for name in methods:
        cells = [
            f"{best[name, size]:.0f} ({best[name, size] / best['Pillow, to an array', size]:.2f})" for size in folders
        ]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


# A million rows ----------------------------------------------------------------------------------------------------


def make_rows(kind: str, folder: Path, num: int) -> None:
    """A set whose pictures are never read."""
    folder.mkdir(parents=True)
    if kind == "folder":
        for i in range(num):
            path = folder / f"class{i % 100:02d}" / f"picture_{i:07d}.jpg"
            if i < 100:
                path.parent.mkdir()
            path.touch()
    elif kind == "table":
        with (folder / "table.csv").open("w", newline="") as file:
            write = csv.writer(file).writerow
            write(["image", "caption", "category"])
            for i in range(num):
                write(
                    [
                        f"class{i % 100:02d}/picture_{i:07d}.jpg",
                        f"a caption of some length, number {i}",
                        f"class{i % 100}",
                    ]
                )
    else:
        from webdataset.writer import TarWriter

        with TarWriter(str(folder / "first"), encoder=False, mtime=0) as tar:
            for i in range(num // 100):
                facts, text = json.dumps({"category": f"class{i % 100}"}), f"a caption of some length, number {i}"
                tar.write({"__key__": f"picture_{i:07d}", "jpg": b"x", "txt": text.encode(), "json": facts.encode()})
        for number in range(100):  # one file under 100 names: as much to index, and less to write
            os.link(folder / "first", folder / f"train-{number:05d}.tar")


def private_bytes() -> int:
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def open_rows(kind: str, folder: Path) -> dict[str, Any]:
    """Open a set, then read all its columns in two forked workers. In a process of its own."""
    from repr.data.sources.folder import Folder
    from repr.data.sources.shards import Shards
    from repr.data.sources.table import Table

    makers: dict[str, Callable[[], Any]] = {
        "folder": lambda: Folder(folder, labels=True),
        "table": lambda: Table(folder / "table.csv", root=folder, captions=["caption"], labels=["category"]),
        "shards": lambda: Shards(f"{folder}/train-*.tar", captions=["txt"], labels=["json:category"]),
    }
    before, begin = private_bytes(), time.perf_counter()
    source = makers[kind]()
    seconds, held = time.perf_counter() - begin, private_bytes() - before
    workers = [_worker(source) for _ in range(2)]
    return {
        "rows": len(source),
        "seconds": seconds,
        "main": held / len(source),
        "worker": max(workers) / len(source),
    }


def _worker(source: Any) -> int:
    """Private bytes that reading keys, captions and labels of all rows adds to a forked process."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        before = private_bytes()
        for row in range(len(source)):
            source.key(row), source.captions(row), [labels[row] for labels in source.attributes.values()]
        os.write(send, str(private_bytes() - before).encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive) as file:
        return int(file.read())


# All together ------------------------------------------------------------------------------------------------------


def speed_table(folder: Path, lines: dict[str, Make], repetitions: int, batches: int) -> list[str]:
    """Best of several repetitions, of which each goes through all lines."""
    columns = [(views, workers) for workers in (0, 2) for views in (1, 2)]
    best: dict[tuple[str, int, int], float] = {}
    for repetition in range(repetitions):
        for name, make in lines.items():
            for views, workers in columns:
                if make is device_half and workers:
                    continue
                value = rate(make, folder, views, workers, batches)
                best[name, views, workers] = max(value, best.get((name, views, workers), 0.0))
            print(f"repetition {repetition + 1}: {name}", file=sys.stderr, flush=True)
    base = next(name for name in lines if name.startswith("webdataset"))
    table = [
        "| pipeline | 1 view | 2 views | 2 workers, 1 view | 2 workers, 2 views |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in lines:
        cells = []
        for column in columns:
            value = best.get((name, *column))
            cells.append("" if value is None else f"{value:.0f} ({value / best[base, *column]:.2f})")
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def rows_table(folder: Path, sets: dict[str, int]) -> list[str]:
    """Opening generated sets."""
    table = [
        "| source | rows | first opening s | opening s | main process, bytes a row | worker, bytes a row |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, num in sets.items():
        make_rows(kind, folder / kind, num)
        command = [sys.executable, "-m", "benchmarks.data", "--child", kind, str(folder / kind)]
        runs = []
        for _ in range(2):
            child = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(child.stdout.splitlines()[-1]))
        first, found = runs
        shutil.rmtree(folder / kind)
        met = "" if found["worker"] <= LIMIT else " MISSED"
        table.append(
            f"| {kind} | {found['rows']:,} | {first['seconds']:.2f} | {found['seconds']:.2f} | {found['main']:.0f} | "
            f"{found['worker']:.0f}{met} |"
        )
        print(table[-1], file=sys.stderr, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures, repetitions and rows")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--repetitions", type=int, help="instead of the usual number")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(open_rows(args.child[0], Path(args.child[1]))))
        return
    torch.set_num_threads(1)
    num, repetitions, batches = (448, 2, 8) if args.quick else (2000, 3, 32)
    repetitions = args.repetitions or repetitions
    sets = {"table": 100_000, "shards": 50_000} if args.quick else {"table": 10**6, "shards": 10**6, "folder": 10**5}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, small, large = Path(name), Path(name) / "small", Path(name) / "large"
        make_pictures(small, num)
        make_pictures(large, 160, LARGE)
        size, large_size = (
            np.mean([path.stat().st_size for path in (folder / "images").rglob("*.jpg")]) / 1024
            for folder in (small, large)
        )
        print(f"pictures of {size:.0f} and {large_size:.0f} KiB", file=sys.stderr, flush=True)
        decoding = decode_table({"500 x 375": small, "4000 x 3000": large}, repetitions)
        tables = [speed_table(small, lines, repetitions, batches) for lines in (CROPS, ALL)]
        tables += [
            speed_table(
                large, {k: v for k, v in lines.items() if "shards" in k or "webd" in k}, (repetitions + 1) // 2, 4
            )
            for lines in (CROPS, ALL)
        ]
        rows = rows_table(folder / "rows", sets)
    lines = [
        "# Data",
        "",
        f"`{' '.join(['python -m benchmarks.data', *sys.argv[1:]])}`: {num} JPEGs of 500 x 375 and {size:.0f} KiB on "
        f"average, and 160 of 4000 x 3000 and {large_size:.0f} KiB ({DISTINCT} different ones), in the page cache; "
        f"batches of {BATCH}, views of {SIZE} px, one thread a process.",
        "",
        f"{hardware('torch', 'torchvision', 'pillow', 'webdataset', 'lightly')}, load before {load:.1f}",
        "",
        f"Images a second of CPU time, all processes together (images/s a core), best of {repetitions} interleaved, of "
        f"large pictures of {(repetitions + 1) // 2}; in brackets the ratio to webdataset. Not time of the clock, so "
        "that other programs on the machine count little.",
        "",
        "## Decoding alone",
        "",
        "RGB in memory; in brackets the ratio to Pillow, whose pixels torchvision's are, too. Scaled: for a view of a "
        "share of .08 to 1 of the picture.",
        "",
        *decoding,
        "",
        "## Crops, uint8: what a worker does",
        "",
        "Targets: 1.3 of webdataset on 500 x 375, 3 on 4000 x 3000.",
        "",
        "500 x 375:",
        "",
        *tables[0],
        "",
        "4000 x 3000:",
        "",
        *tables[2],
        "",
        "## All on the CPU: crops, colour, blur, normalisation, float32",
        "",
        "Ours is both halves. Without a GPU the device half runs in the main process; with one it runs there.",
        "",
        "500 x 375:",
        "",
        *tables[1],
        "",
        "4000 x 3000:",
        "",
        *tables[3],
        "",
        "## Opening a set",
        "",
        "Generated rows with a caption and a label each; twice, since the first opening of shards makes their index. "
        "Memory is private memory (`smaps_rollup`); a worker is a fork that has read key, captions and labels of all "
        f"rows. Target: at most {LIMIT} bytes a row in a worker.",
        "",
        *rows,
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
