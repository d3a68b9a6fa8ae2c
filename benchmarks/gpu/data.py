"""Data for a GPU: pictures a second from JPEG shards, the share of time spent waiting, and where a step's time goes."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from benchmarks.gpu.common import TINY_VIT, clean, config, train
from benchmarks.step_time import wait
from repr.runs.inputs import data_module

TITLE = {"data": "Data, and where the time of a step goes"}
BATCH, DISTINCT, A_SHARD, SHARDS, LINKS = 512, 128, 1024, 4, 32
QUICK = (8, 8, 32, 2, 2)  # likewise
SIZE = (500, 375)
MARKS = {"wait": 0.03, "colour": 0.05}


def settings(options: Any) -> str:
    return (
        f"JPEGs of {SIZE[0]} x {SIZE[1]} in tar shards on the local disk, {os.cpu_count()} cores and as many workers, "
        "CLIP's views of 224 px. The loader alone, then CLIP ViT-B/16 with `trainer=gpu` in the Trainer of `repr.fit`: "
        "the share of time spent waiting for data, as `train/data_wait` has it; then the phases of a step, for each of "
        "which the GPU is waited for, so that they add up; losses are what forward takes outside of the encoders."
    )


def rows(options: Any) -> Iterator[dict[str, Any]]:
    num, distinct, a_shard, shards, links = QUICK if options.quick else (BATCH, DISTINCT, A_SHARD, SHARDS, LINKS)
    device, workers = torch.device(options.device), os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), distinct, a_shard, shards, links)
        cfg = config(
            options,
            [
                "objective=clip", "backbone=vit_b16", "text=clip_base", "data=shards", f"data.batch_size={num}",
                f"data.train.files={folder}/train-*.tar", f"data.num_workers={workers}", "eval=default",
            ],
            ["image_size=32", "embed_dim=32", "text.width=64", "text.layers=1", *TINY_VIT],
        )  # fmt: skip
        left = options.end - time.monotonic()
        rate = loader_alone(cfg, num, 0.2 * left)
        yield {"what": "the loader alone, pictures/s", "value": rate}
        yield {"what": "a worker, pictures/s", "value": rate / workers}
        with clean():
            speed = train(cfg, None, 0.3 * left, warm=10, data=data_module(cfg))
        told: Any = speed.throughput
        waited = told.waited / (told.waited + told.busy)
        yield {"what": "CLIP ViT-B/16 on them, samples/s", "value": num / speed.seconds}
        yield {"what": "share of time spent waiting for data", "value": waited}
        cfg.callbacks.throughput.phases = 1
        phases = Phases(device)
        with clean():
            train(cfg, None, 0.2 * left, warm=10, data=data_module(cfg), callbacks=[phases])
        shares = phases.shares()
        for name, share in shares.items():
            yield {"what": f"phase: {name}", "value": share}
        if not options.quick:
            yield {"note": f"waiting for data: {waited:.1%} of the time (mark: below {MARKS['wait']:.0%})"}
            yield {"note": f"the colour half: {shares['colour']:.1%} of a step (mark: below {MARKS['colour']:.0%})"}


def make_shards(folder: Path, distinct: int, a_shard: int, shards: int, links: int) -> None:
    """Shards of some distinct pictures again and again, each under several names."""
    from PIL import Image

    from repr.data.sources.emoji import Emoji

    source, rng, pictures = Emoji("train"), np.random.default_rng(0), []
    for i in range(distinct):  # an emoji on a noisy ground is about as large a file as a photograph
        pixels = np.asarray(source.image(i).resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        pixels = 0.6 * pixels + rng.normal(50, 9, (SIZE[1], SIZE[0], 1)) + rng.normal(0, 4, (SIZE[1], SIZE[0], 3))
        data = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        pictures.append(data.getvalue())
    for shard in range(shards):
        path = folder / f"train-{shard:05d}.tar"
        with tarfile.open(path, "w") as archive:
            for row in range(a_shard):
                for suffix, data in ((".jpg", pictures[row % distinct]), (".txt", f"picture {row}".encode())):
                    member = tarfile.TarInfo(f"{row:05d}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        for link in range(1, links):
            os.link(path, folder / f"train-{link * shards + shard:05d}.tar")


def loader_alone(cfg: Any, num: int, seconds: float) -> float:
    """Pictures a second that the main process is handed over, after a batch of every worker."""
    batches = iter(data_module(cfg).train_dataloader())
    for _ in range(cfg.data.num_workers + 1):
        next(batches)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds and next(batches, None) is not None:
        count += 1
    return count * num / (time.monotonic() - start)


class Phases(pl.Callback):
    """Means over a run of the shares that the measure of speed logs, and of the encoders' part of forward."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start, self.encoders = device, 0.0, 0.0
        self.sums: dict[str, float] = {}
        self.last: float | None = None
        self.total = 0.0

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        for name in module.ENCODERS:
            part = getattr(module, name, None)
            if isinstance(part, torch.nn.Module):
                part.register_forward_pre_hook(lambda *_: self.enter())
                part.register_forward_hook(lambda *_: self.leave())

    def now(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def enter(self) -> None:
        self.start = self.now()

    def leave(self) -> None:
        self.encoders += self.now() - self.start

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        now, last, encoders = self.now(), self.last, self.encoders
        self.last, self.encoders = now, 0.0
        if last is None or index < 2 or "train/time_load" not in trainer.callback_metrics:
            return
        seconds = now - last
        self.total += seconds
        for name, share in trainer.callback_metrics.items():
            if name.startswith("train/time_"):
                phase = name.removeprefix("train/time_")
                self.sums[phase] = self.sums.get(phase, 0.0) + seconds * float(share)
        self.sums["encoders"] = self.sums.get("encoders", 0.0) + encoders

    def shares(self) -> dict[str, float]:
        means = {name: seconds / self.total for name, seconds in self.sums.items()}
        forward, encoders = means.pop("forward"), means.pop("encoders")
        parts = {name: means.pop(name) for name in ("load", "transfer", "colour")}
        parts |= {"forward": encoders, "loss": forward - encoders, **means}
        return parts | {"rest": 1 - sum(parts.values())}
