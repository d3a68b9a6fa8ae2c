"""Small objectives and batches, built from the files of conf/objective."""

from collections.abc import Callable
from functools import cache

import open_clip
import pytest
import torch
from hydra.utils import instantiate

from repr.batch import Batch
from repr.config import CONF, check, compose
from repr.objectives.base import Objective

OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
SMALL = [
    "image_size=32", "embed_dim=16", "optim.warmup_steps=0", "text.width=32", "text.layers=1", "text.context_length=12",
    "backbone.name=vit_tiny_patch16_224", "+backbone.depth=2", "+backbone.embed_dim=32", "+backbone.num_heads=2",
]  # fmt: skip


def build(name: str, *overrides: str, seed: int = 0) -> Objective:
    """An objective of conf/objective with small towers."""
    cfg = compose([f"objective={name}", *SMALL, *overrides])
    check(cfg)
    torch.manual_seed(seed)
    return instantiate(cfg.objective)


@cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=12)


def make_batch(size: int = 8) -> Batch:
    """Random pictures, each with a caption of its own."""
    generator = torch.Generator().manual_seed(1)
    looks = ("red", "green", "blue", "dark", "striped", "round", "large", "small")
    things = ("cat", "dog", "bus", "tree", "house", "shoe", "star", "cup")
    captions = [f"{looks[i % 8]} {things[(i * 3 + i // 8) % 8]} {i}" for i in range(size)]
    return Batch(
        index=torch.arange(size),
        seed=torch.arange(size),
        views=[torch.randn(size, 3, 32, 32, generator=generator)],
        text=tokenizer()(captions),
    )


@pytest.fixture
def small() -> Callable[..., Objective]:
    return build


@pytest.fixture
def batch() -> Batch:
    return make_batch()
