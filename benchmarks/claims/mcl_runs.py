"""The runs behind benchmarks/claims/mcl.py: what is trained on what, and a pool of processes that does it."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image
from sklearn.base import BaseEstimator
from torch import nn

from repr.config import compose
from repr.config_check import check
from repr.data.clusters import Clusters
from repr.runs.folder import CLUSTERS, JOINED, stage_folder
from repr.runs.joined import Joined
from repr.runs.trained import Trained
from repr.training.trainer import make_trainer

SIDE, RENDERS = 32, 8  # pixels; of each combination of trifeature
Values = dict[str, float]


class Small(nn.Sequential):
    """Four convolutions and the mean over places: (B, 3, 32, 32) -> (B, 64)."""

    def __init__(self, width: int = 16) -> None:
        widths = [width, 2 * width, 4 * width, 4 * width]
        layers = zip([3, *widths], widths, [4, 3, 3, 3], [2, 2, 2, 1], strict=False)
        blocks = [
            nn.Sequential(nn.Conv2d(i, o, side, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
            for i, o, side, stride in layers
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = 4 * width


class InMemory:
    """A source whose pictures are made once and kept, at 32 pixels, so that data cost next to nothing."""

    _kept: ClassVar[dict[str, np.ndarray]] = {}  # of all stages of a process

    def __init__(self, source: Mapping[str, Any]) -> None:
        self.source = instantiate(source)
        self.attributes, self.key, self.captions = self.source.attributes, self.source.key, self.source.captions
        if hasattr(self.source, "caption_weights"):
            self.caption_weights = self.source.caption_weights
        name = str(source)
        if name not in self._kept:
            pictures = (self.source.image(row).resize((SIDE, SIDE), Image.Resampling.BOX) for row in range(len(self)))
            self._kept[name] = np.stack([np.asarray(picture) for picture in pictures])
        self.pixels = self._kept[name]  # (N, 32, 32, 3)

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels[index])


class RandomClusters(BaseEstimator):
    """Cluster ids that say nothing."""

    def __init__(self, n_clusters: int, random_state: int | None = None) -> None:
        self.n_clusters, self.random_state = n_clusters, random_state

    def fit_predict(self, rows: np.ndarray) -> np.ndarray:
        """One id a row."""
        return np.random.default_rng(self.random_state).integers(self.n_clusters, size=len(rows))


COMMON = [
    f"image_size={SIDE}", "data=default", "data.num_workers=0", "data.batch_size=64", "data.bank_size=2400",
    "~backbone.name", "~backbone.image_size", "backbone._target_=benchmarks.claims.mcl_runs.Small",
    "procedure=multistage", "procedure.norm=each", "procedure.clustering.n_clusters=16",
    "optim.lr=2.0e-3", "optim.weight_decay=0.05", "optim.warmup_steps=30",
    "trainer.max_epochs=-1", "trainer.check_val_every_n_epoch=1000", "+trainer.enable_progress_bar=false",
    "eval.geometry=null", "eval.knn=null",
    *(f"callbacks.{name}=null" for name in ("progress", "pictures", "throughput", "collapse")),
    "logger.tensorboard=null",
]  # fmt: skip
BASES = {
    "SimCLR": [
        "objective=simclr", "views.main.scale=[0.5, 1.0]",
        *(f"views.main.{name}=0.0" for name in ("gray_prob", "blur_prob", "flip", "jitter_prob")),
        "objective.hidden_dim=96", "objective.dim=64", "objective.losses.contrast.temperature=0.2",
    ],
    "CLIP": [
        "objective=clip", "eval=default", "eval.retrieval=null", "views=clip_small", "views.main.scale=[0.5, 1.0]",
        "embed_dim=64", "text.width=64", "text.layers=1", "text.context_length=12",
    ],
}  # fmt: skip
TRIFEATURE, EMOJI = "repr.data.drawn.trifeature.Trifeature", "repr.data.sources.emoji.Emoji"


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    base: str
    source: str
    clusters: int
    attributes: tuple[str, ...]
    suppressed: tuple[str, ...]  # by what the other attributes, or the captions, offer
    options: dict[str, Any] = field(default_factory=dict)  # of the data set

    def sources(self) -> dict[str, dict[str, Any]]:
        """Configs of the training set and of the evaluated one, of combinations or concepts never trained on."""
        kept = {"_target_": "benchmarks.claims.mcl_runs.InMemory", "_recursive_": False}
        if self.source == EMOJI:
            splits: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "held_out": {"split": "val"}}
        else:
            splits = {"train": {"split": "train", "renders": RENDERS}, "held_out": {"split": "held_out", "renders": 5}}
            splits = {name: {**split, "size": SIDE, **self.options} for name, split in splits.items()}
        return {name: {**kept, "source": {"_target_": self.source, **split}} for name, split in splits.items()}


def chance(setting: Setting) -> Values:
    """Share of the most frequent value of every attribute in the evaluated set."""
    source = instantiate(setting.sources()["held_out"]["source"])
    counts = {name: np.bincount(source.attributes[name].codes) for name in setting.attributes}
    return {name: float(count.max() / len(source)) for name, count in counts.items()}


@dataclass(frozen=True)
class Job:
    """A multistage run."""

    setting: Setting
    name: str  # of its folder
    seed: int
    steps: int
    stages: int
    random: bool = False
    truth: str | None = None  # a single stage, within clusters that are this attribute
    start: str | None = None  # a finished job whose stage 0 is taken over


def config(job: Job, folder: Path) -> Any:
    """The config of a job.

    Args:
        job: what to run.
        folder: of all jobs.
    """
    cfg = compose([*COMMON, *BASES[job.setting.base], f"seed={job.seed}", f"run_folder={folder / job.name}"])
    sources = job.setting.sources()
    cfg.data.train, cfg.data.eval = sources["train"], {"held_out": sources["held_out"]}
    cfg.trainer.max_steps = job.steps
    cfg.procedure.num_stages, cfg.procedure.clustering.n_clusters = job.stages, job.setting.clusters
    if job.random:
        target = "benchmarks.claims.mcl_runs.RandomClusters"
        cfg.procedure.clustering = {"_target_": target, "n_clusters": job.setting.clusters}
    if job.truth:
        target = "benchmarks.claims.mcl_runs.true_clusters"
        clusters = {"_target_": target, "attribute": job.truth, "source": sources["train"]}
        cfg.procedure.first = {"data": {"clusters": clusters}}
    if job.start:  # the stages after it start from random weights, as all others
        cfg.init_from = str(stage_folder(folder / job.start, 0))
        cfg.procedure.first = {"trainer": {"max_steps": 0}, "optim": {"warmup_steps": 0}}
        cfg.procedure.later = {"init_from": None}
    return cfg


def true_clusters(source: InMemory, attribute: str) -> Clusters:
    """Clusters that are the values of an attribute."""
    return Clusters(torch.from_numpy(source.attributes[attribute].codes).long(), "proportional", "merge")


def run(job: Job, folder: Path) -> dict[str, Values]:
    """Train all stages; what each and all joined know of every attribute."""
    cfg = config(job, folder)
    check(cfg)
    columns = instantiate(cfg.procedure)(cfg)
    found = {name: values(results, job.setting) for name, results in columns.items()}
    if job.stages > 1:
        source = InMemory(job.setting.sources()["train"]["source"])
        found["purity"] = purity(stage_folder(folder / job.name, 0) / CLUSTERS, source)
    return found


def purity(path: Path, source: InMemory) -> Values:
    """Share of samples whose value of an attribute is the most frequent one of their cluster of stage 0."""
    with np.load(path) as file:
        ids = file["ids"][0]
    shares = {}
    for attribute, labels in source.attributes.items():
        counts = np.zeros((ids.max() + 1, labels.codes.max() + 1))
        np.add.at(counts, (ids, labels.codes), 1)
        shares[attribute] = float(counts.max(axis=1).sum() / len(ids))
    return shares


def join(job: Job, stages: Sequence[str], folder: Path) -> Values:
    """What stages, ``NAME/stage-S``, of jobs with the setting of ``job`` know joined."""
    cfg = config(job, folder)
    cfg.run_folder = str(folder / JOINED)
    evaluation = instantiate(cfg.callbacks.evaluation)
    joined = Joined([Trained.read(folder / stage).objective for stage in stages], norm="each").eval()
    make_trainer(cfg, [evaluation], []).validate(joined, instantiate(cfg.data), verbose=False)
    return values(evaluation.results, job.setting)


def values(results: Mapping[str, tuple[float, float | None]], setting: Setting) -> Values:
    """Accuracy of the probe of every attribute."""
    return {attribute: results[f"held_out/ridge_{attribute}"][0] for attribute in setting.attributes}


def prepare() -> None:
    """One thread a process, and nothing but the result on standard output."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.filterwarnings("ignore")


class Runner:
    """Runs jobs in processes of one thread each, and keeps what they find.

    Attributes:
        found: name of a job -> stage, ``joined`` or ``purity`` -> values by attribute.
    """

    def __init__(self, pool: ProcessPoolExecutor, folder: Path) -> None:
        self.pool, self.folder, self.start = pool, folder, time.monotonic()
        self.found: dict[str, dict[str, Values]] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs that do not need each other."""
        futures = {job.name: self.pool.submit(run, job, self.folder) for job in jobs}
        for name, future in futures.items():
            self.found[name] = future.result()
            told = {column: [round(value, 3) for value in row.values()] for column, row in self.found[name].items()}
            print(f"{time.monotonic() - self.start:.0f} s: {name}: {told}", file=sys.stderr, flush=True)

    def join(self, groups: Sequence[tuple[Job, Sequence[str]]]) -> list[Values]:
        """What stages of different jobs know joined: of each group, a job of their setting, and the stages."""
        futures = [self.pool.submit(join, job, stages, self.folder) for job, stages in groups]
        return [future.result() for future in futures]
