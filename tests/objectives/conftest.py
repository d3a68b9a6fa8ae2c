"""Small objectives and batches, built from the files of conf/objective."""

from collections.abc import Callable, Sequence
from functools import cache

import open_clip
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from repr.batch import Batch
from repr.config import CONF, compose
from repr.config_check import check
from repr.objectives.base import Objective

OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml"))
SMALL = [
    "image_size=32", "small_size=16", "embed_dim=16", "optim.warmup_steps=0", "text.width=32", "text.layers=1",
    "text.context_length=12",
]  # fmt: skip
VIT = ["backbone=vit_s16", "+backbone.depth=2", "+backbone.embed_dim=32", "+backbone.num_heads=2"]
OWN = {name: ["embed_dim=32"] for name in OBJECTIVES if name.startswith("m3col")}  # no projection: widths are equal
OWN["pixcontrast"] = ["+backbone.patch_size=8"]  # contrast of cells needs more than four of them
OWN["ijepa"] = ["+backbone.patch_size=4"]  # four blocks, and a context, of 64 patches
OWN["mocov2"] = ["objective.queue_length=48", "data.batch_size=12"]  # batches of 8 and of 12 divide it
OWN["densecl"] = OWN["mocov2"]
OWN["tips"] = ["data.num_texts=2", "views.local.count=3", "+backbone.reg_tokens=1"]
OWN["clip_pixcontrast"] = OWN["pixcontrast"]
OWN["siglip2"] = ["views.local.count=2"]
OWN["coca_dino"] = ["views.small.count=1", "objective.views.dino=[0,1,2,3]"]
OWN["albef"] = [*OWN["mocov2"], "objective.num_layers=1"]
OWN["obow"] = ["objective.num_words=48", "data.batch_size=12", "+backbone.patch_size=4"]
OWN["coca"] = ["objective.num_queries=4"]
SMALL_HEAD = {
    "hidden_dim": 32,
    "dim": 16,
    "num_prototypes": 12,
}
SMALL_DECODER = {"dim": 128, "depth": 1, "num_heads": 2}


def build(name: str, *overrides: str, backbone: Sequence[str] = VIT, seed: int = 0) -> Objective:
    """An objective of conf/objective with small towers and a small head."""
    cfg = _composed(name, overrides, tuple(backbone)).copy()
    torch.manual_seed(seed)
    return instantiate(cfg.objective)


def config(name: str, *overrides: str, backbone: Sequence[str] = VIT) -> DictConfig:
    """The checked config of such an objective."""
    cfg = _composed(name, overrides, tuple(backbone)).copy()
    check(cfg)
    return cfg


@cache
def _composed(name: str, overrides: tuple[str, ...], backbone: tuple[str, ...]) -> DictConfig:
    head = []
    for place, known in options(name).items():
        head += [f"{place}.{key}={value}" for key, value in SMALL_HEAD.items() if key in known]
        if "decoder" in known:
            head += [f"{place}.decoder.{key}={value}" for key, value in SMALL_DECODER.items()]
    return compose([f"objective={name}", *SMALL, *backbone, *OWN.get(name, []), *head, *overrides])


@cache
def options(name: str) -> dict[str, frozenset[str]]:
    """The options of an objective that have a value, and of its parts, by where they stand."""
    node = compose([f"objective={name}", VIT[0]]).objective
    places = {"objective": node, **{f"objective.parts.{part}": own for part, own in node.get("parts", {}).items()}}
    return {
        place: frozenset(key for key in own if not OmegaConf.is_missing(own, key) and own[key] is not None)
        for place, own in places.items()
    }


@cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=12)


def make_batch(size: int = 8, seed: int = 1, *, objective: str = "") -> Batch:
    """Four noisy views of random pictures, two of them small; for each a caption, a label and two blocks of numbers.

    If the ``objective`` wants wrong captions, every third sample has two and the others one.

    The boxes say that the views are crops of various places; pictures are random, so any place is as good.
    """
    generator = torch.Generator().manual_seed(seed)
    looks = ("red", "green", "blue", "dark", "striped", "round", "large", "small")
    things = ("cat", "dog", "bus", "tree", "house", "shoe", "star", "cup")
    captions = [f"{looks[i % 8]} {things[(i * 3 + i // 8) % 8]} {i}" for i in range(size)]
    pictures = torch.randn(size, 3, 16, 16, generator=generator)
    large = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    views = [view + 0.3 * torch.randn(view.shape, generator=generator) for view in (large, large, pictures, pictures)]
    corners = 0.25 * torch.rand(size, 4, 2, generator=generator)
    batch = Batch(
        index=torch.arange(size),
        seed=torch.arange(size),
        views=views,
        boxes=torch.cat([corners, corners + 0.75], dim=2),
        text=tokenizer()(captions),
        texts=torch.stack([tokenizer()(captions), tokenizer()([f"this is a {text}" for text in captions])], dim=1),
        label=torch.arange(size)[:, None] % 3,
        tables=[torch.randn(size, width, generator=generator) for width in (5, 6)],
    )
    if objective and compose([f"objective={objective}", VIT[0]]).hard_captions is not None:
        swapped = [f"{thing} {look} {i}" for look, thing, i in map(str.split, captions)]
        hard = torch.stack([tokenizer()(swapped), tokenizer()(swapped[1:] + swapped[:1])], dim=1)  # (B, 2, L)
        hard[torch.arange(size) % 3 > 0, 1] = 0
        batch["hard_text"], batch["mated"] = hard, torch.arange(size) % 6 < 2  # pairs of 1, 2, 3 and 4 processes
    return batch


@pytest.fixture
def small() -> Callable[..., Objective]:
    return build


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> Batch:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return make_batch(objective=parameters["name"] if parameters.get("name") in OBJECTIVES else "")
