"""What does CLIP learn in as many minutes, ours by ``repr.fit``, beside open_clip's own training?

The same towers, pairs, crops, optimizer and schedule, in the same minutes of two cores. open_clip's run has its models,
its transform, its reader of a table of files, its loss and its loop, as ``python -m open_clip_train.main`` puts them
together, without checkpoints. Each has as many workers, none to two, as make it fastest, and then as many steps as fit.
"""

from __future__ import annotations

import logging
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from benchmarks.claims.minutes import SECONDS, STEPS, WORKERS, config, evaluated, in_seconds, our_run, timed
from benchmarks.claims.runs import Values, against, table, trained
from benchmarks.claims.ssl_clip import COLUMNS, SMALL
from repr.data.sources.emoji import Emoji

TITLE = "CLIP for as many minutes, ours beside open_clip"
LIBRARIES = ("torch", "torchvision", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (60, 10)
RECIPE = ["experiment=demo", "objective=clip", *SMALL]
OURS, THEIRS = "ours", "open_clip"


class Batches:
    """The first batches of a loader; ``start`` is when that after ``skip`` has come."""

    def __init__(self, loader: Any, num: int, skip: int) -> None:
        self.loader, self.num, self.skip, self.start = loader, num, skip, 0.0
        self.num_batches, self.num_samples = len(loader), len(loader) * loader.batch_size  # of a whole epoch

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(islice(self.loader, self.num)):
            if number == self.skip:
                self.start = time.monotonic()
            yield batch


def their_run(seed: int, num_steps: int, workers: int, skip: int, *changed: str) -> tuple[dict[str, Tensor], float]:
    """Train as open_clip does; the weights, and the seconds of the steps after the first ``skip``."""
    import open_clip
    from open_clip_train.data import get_csv_dataset
    from open_clip_train.scheduler import cosine_lr
    from open_clip_train.train import train_one_epoch

    logging.disable(logging.INFO)  # its loop tells every epoch
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(RECIPE, seed, folder, num_steps, *changed)
        seed_everything(seed, verbose=False)
        size, optim, view = cfg.image_size, cfg.optim, cfg.views.main
        text = {key: cfg.text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
        vision = {"image_size": size, "timm_model_name": cfg.backbone.name, "timm_pool": "", "timm_proj": "linear"}
        model = open_clip.model.CustomTextCLIP(cfg.embed_dim, vision, text, output_dict=True)
        crops = {"scale": tuple(view.scale)}
        transform = open_clip.image_transform(
            size, is_train=True, mean=tuple(cfg.data.mean), std=tuple(cfg.data.std), aug_cfg=crops
        )
        args = Namespace(
            train_data=write_table(Path(folder)), csv_img_key="file", csv_caption_key="caption", csv_separator="\t",
            batch_size=cfg.data.batch_size, workers=workers, distributed=False, device="cpu", precision="fp32",
            distill=False, accum_freq=1, skip_scheduler=False, horovod=False, grad_clip_norm=None, world_size=1, rank=0,
            log_every_n_steps=100, local_rank=0, wandb=False, tensorboard=False, save_logs=False,
        )  # fmt: skip
        read = get_csv_dataset(
            args, transform, True, tokenizer=open_clip.SimpleTokenizer(context_length=cfg.text.context_length)
        )
        flat, deep = ([p for p in model.parameters() if (p.ndim < 2) == is_flat] for is_flat in (True, False))
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": deep, "weight_decay": optim.weight_decay}]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, **optim.options)
        schedule = cosine_lr(optimizer, optim.lr, int(optim.warmup_steps * num_steps), num_steps)
        loader, starts = read.dataloader, []
        for epoch in range(-(-num_steps // len(loader))):
            read.dataloader = batches = Batches(loader, min(num_steps - epoch * len(loader), len(loader)), skip)
            train_one_epoch(model, {"train": read}, open_clip.ClipLoss(), epoch, optimizer, None, schedule, None, args)
            starts.append(batches.start)
        seconds = time.monotonic() - starts[0]
    return model.state_dict(), seconds


def write_table(folder: Path) -> str:
    """The training pairs as files and a table of them, which open_clip reads."""
    source, lines = Emoji("train"), ["file\tcaption"]
    for row in range(len(source)):
        (file := folder / f"{row}.webp").write_bytes(source.encoded(row))
        lines.append(f"{file}\t{source.captions(row)[0]}")
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def train(method: str, seed: int, seconds: int) -> Values:
    """One run on all cores; the metrics of its evaluation, its steps and what they took."""
    go: Any = partial(our_run, RECIPE) if method == OURS else their_run
    done, took = in_seconds(go, seed, seconds)
    results = done if method == OURS else evaluated(RECIPE, seed, done)
    return {title: results[name][0] for name, title in COLUMNS.items()} | took


def settings(options: Namespace) -> str:
    return (
        f"{timed(options)} timm's `test_resnet` at 32 pixels, batches of 128; else the demo's text tower, optimizer "
        "and crops. `R@5`: of concepts of the training set, drawn by a vendor never trained on."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    options.jobs = 1  # a run takes all cores
    runs = trained([OURS, THEIRS], options)
    yield table(runs, [*COLUMNS.values(), STEPS, SECONDS, WORKERS], corner="CLIP of")
    kinds = {"retrieval": ["R@5 of texts", "R@5 of pictures"], "frozen features": ["probe category", "kNN category"]}
    yield against(runs, [OURS], [THEIRS], kinds)
