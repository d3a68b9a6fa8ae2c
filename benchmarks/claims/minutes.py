"""What do methods learn in as many minutes, ours by ``repr.fit``, others with the views of their own library?

The same pictures, backbone, heads, optimizer and schedule, in the same minutes of two cores. The other libraries'
modules and losses are those of :mod:`benchmarks.claims.quality`, in Lightning's Trainer as in their documentation, with
their transforms and PyTorch's ``DataLoader``, and without logs, checkpoints and reports. The transforms have the
probabilities and strengths of our recipes. Each library has as many workers, none to two, as make it fastest, and then
as many steps as fit.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.claims.peers import become_peer
from benchmarks.claims.quality import METHODS as ALL
from benchmarks.claims.quality import OURS, RECIPES, compared_blocks
from benchmarks.claims.runs import Values, composed, trained
from benchmarks.claims.swav import CHANCE, numbers
from repr.batch import Batch
from repr.data.sources.emoji import Emoji
from repr.fit import train as run
from repr.runs.folder import Results
from repr.training.trainer import no_external_callbacks

TITLE = "As many minutes, ours beside other libraries as they are used"
LIBRARIES = ("torch", "torchvision", "timm", "lightly", "stable-pretraining")
SEEDS, LENGTH = (3, 1), (60, 10)
COMPARED = ("SimCLR", "SwAV", "SwAV, all views assigned", "BYOL", "DINO", "MAE")
METHODS = [name for name in ALL if name.split(" | ")[0] in COMPARED]
STEPS, SECONDS, WORKERS = "steps", "s", "workers"
SKIPPED, TRIED = 5, 30  # steps before the clock starts, and until it stops, where numbers of workers are compared
SHORT = ["data.eval=null", "eval=images", "optim.warmup_steps=0"]
LEAST = 60  # steps of a run, of which 50 are the warm-up of the learning rate
Transform = Callable[[Image.Image], Sequence[Tensor]]


class Clock(pl.Callback):
    """Seconds of the training steps after the first ``skip``."""

    def __init__(self, skip: int) -> None:
        self.skip, self.start, self.seconds = skip, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.skip:
            self.start = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seconds = time.monotonic() - self.start


class Pictures(Dataset):
    """The views of the training pictures by a library's transform."""

    def __init__(self, transform: Transform) -> None:
        self.source, self.transform = Emoji("train"), transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> Sequence[Tensor]:
        return self.transform(self.source.image(row))


def collate(rows: Sequence[Sequence[Tensor]]) -> Batch:
    return Batch(views=[torch.stack(view) for view in zip(*rows, strict=True)])


def transform(library: str, cfg: DictConfig) -> Transform:
    """A library's transform with the sizes, probabilities and strengths of our views."""
    return {"lightly": lightly_transform, "stable-pretraining": stable_transform}[library](cfg)


def lightly_transform(cfg: DictConfig) -> Transform:
    from lightly.transforms import MAETransform, SimCLRTransform, SwaVTransform

    main, *small = cfg.views.values()
    normalize = {"mean": list(cfg.data.mean), "std": list(cfg.data.std)}
    colour = {
        "cj_bright": main.brightness, "cj_contrast": main.contrast, "cj_sat": main.saturation, "cj_hue": main.hue,
        "cj_prob": main.jitter_prob, "random_gray_scale": main.gray_prob, "gaussian_blur": main.blur_prob,
        "hf_prob": main.flip, "normalize": normalize,
    }  # fmt: skip
    if main.get("count", 1) == 1:
        return MAETransform(main.size, min_scale=main.scale[0], normalize=normalize)
    if not small:
        return SimCLRTransform(main.size, min_scale=main.scale[0], **colour)
    crops = zip(*((view.size, view.count, *view.scale) for view in (main, *small)), strict=True)
    names = ("crop_sizes", "crop_counts", "crop_min_scales", "crop_max_scales")
    return SwaVTransform(**dict(zip(names, crops, strict=True)), **colour)


def stable_transform(cfg: DictConfig) -> Transform:
    from stable_pretraining.data import transforms as t

    def one(view: DictConfig) -> Any:
        crop = t.RandomResizedCrop((view.size, view.size), scale=tuple(view.scale))
        strength = {name: view[name] for name in ("brightness", "contrast", "saturation", "hue")}
        jitter = t.ColorJitter(**strength, p=view.jitter_prob)
        return t.Compose(t.RGB(), crop, jitter, t.ToImage(mean=list(cfg.data.mean), std=list(cfg.data.std)))

    views = t.MultiViewTransform([one(view) for view in cfg.views.values() for _ in range(view.get("count", 1))])
    return lambda image: [view["image"] for view in views({"image": image})["views"]]


def config(recipe: Sequence[str], seed: int, folder: str, num_steps: int, *changed: str) -> DictConfig:
    length = [f"trainer.max_steps={num_steps}", "trainer.max_epochs=-1", "trainer.check_val_every_n_epoch=1000"]
    return composed([*recipe, *length, *changed], seed, 0, folder)


def our_run(
    recipe: Sequence[str], seed: int, num_steps: int, workers: int, skip: int, *changed: str
) -> tuple[Results, float]:
    """Train by ``repr.fit``, and evaluate; what is found, and the seconds of the steps after the first ``skip``."""
    with tempfile.TemporaryDirectory() as folder:
        timed = f"+callbacks.clock._target_={__name__}.Clock", f"+callbacks.clock.skip={skip}"
        done = run(config(recipe, seed, folder, num_steps, f"data.num_workers={workers}", *timed, *changed))
    (clock,) = (callback for callback in done.trainer.callbacks if isinstance(callback, Clock))
    return done.results, clock.seconds


def their_run(
    name: str, library: str, seed: int, num_steps: int, workers: int, skip: int, *changed: str
) -> tuple[dict[str, Tensor], float]:
    """Train as the documentation of a library does; the backbone's weights, and the seconds as in :func:`our_run`."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(RECIPES[name], seed, folder, num_steps, *changed)
    pictures = Pictures(transform(library, cfg))
    become_peer(cfg, name, library)
    pl.seed_everything(seed, verbose=False)
    module, clock = instantiate(cfg.objective), Clock(skip)
    how: Any = {"shuffle": True, "drop_last": True, "collate_fn": collate, "persistent_workers": workers > 0}
    loader = DataLoader(pictures, cfg.data.batch_size, num_workers=workers, **how)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "callbacks": [clock]}
    with no_external_callbacks():  # those of stable-pretraining, where it is installed
        trainer = pl.Trainer(max_steps=num_steps, max_epochs=-1, **quiet)
    trainer.fit(module, loader)
    return module.backbone.state_dict(), clock.seconds


def train(method: str, seed: int, seconds: int) -> Values:
    """One run on all cores; the metrics of its evaluation, its steps and what they took."""
    name, library = method.split(" | ")
    recipe = RECIPES[name]
    go: Any = partial(our_run, recipe) if library == OURS else partial(their_run, name, library)
    done, took = in_seconds(go, seed, seconds)
    return {**numbers(done if library == OURS else evaluated(recipe, seed, done)), **took}


def in_seconds(go: Callable[..., tuple[Any, float]], seed: int, seconds: int) -> tuple[Any, Values]:
    """What ``go(seed, num_steps, workers, skip, *changed)`` gives that trains for some seconds, as fast as it can.

    With it come the number of steps, the seconds that they took, and the number of workers.
    """
    torch.set_num_threads(2)
    tried = [go(seed, SKIPPED + TRIED, workers, SKIPPED, *SHORT)[1] / TRIED for workers in range(3)]
    workers, num_steps = tried.index(min(tried)), max(LEAST, int(seconds / min(tried)))
    done, taken = go(seed, num_steps, workers, 0)
    return done, {STEPS: num_steps, SECONDS: taken, WORKERS: workers}


def evaluated(recipe: Sequence[str], seed: int, weights: dict[str, Tensor]) -> Results:
    """What our evaluation says of weights that were trained elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, file := Path(folder, "weights.pt"))
        still = ["optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"]
        return run(config(recipe, seed, folder, 0, f"init_from={file}", *still)).results


def settings(options: Namespace) -> str:
    return (
        f"{timed(options)} Pictures, backbones, heads and the columns of the table are those of `quality.md`. "
        "lightly's transform of MAE flips pictures, besides."
    )


def timed(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} seconds of training on two cores, nothing "
        "beside, of which those are told that were needed; start, evaluation and the choice of the number of workers "
        "come on top."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    options.jobs = 1  # a run takes all cores
    runs = trained(METHODS, options)
    names = [name for name in runs[METHODS[0]][0] if name not in (STEPS, SECONDS, WORKERS)]
    chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
    yield from compared_blocks(runs, chance, (STEPS, SECONDS, WORKERS))
