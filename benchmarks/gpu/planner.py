"""The planner's memory of a step beside what CUDA's allocator held, for five objectives."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.common import TINY, attempt, config

TITLE = {"planner": "The planner's memory beside the measured"}
VIT = ["backbone=vit_s16", "++backbone.dynamic_img_size=true"]
CASES = {
    "clip, ViT-B/16": ["objective=clip", "backbone=vit_b16", "text=clip_base", "data.batch_size=256"],
    "simclr, ResNet-50": ["objective=simclr", "backbone=resnet", "backbone.name=resnet50", "data.batch_size=128"],
    "swav, ResNet-50": ["objective=swav", "backbone=resnet", "backbone.name=resnet50", "data.batch_size=64"],
    "dino, ViT-S/16": ["objective=dino", *VIT, "data.batch_size=64"],
    "mae, ViT-B/16": ["objective=mae", "backbone=vit_b16", "+backbone.fc_norm=false", "data.batch_size=256"],
}
QUICK = ["data.batch_size=4", "optim.warmup_steps=0"]
MARK = 0.05


def settings(options: Any) -> str:
    return (
        "Three steps of Lightning's on random data in bf16-mixed; `torch.cuda.max_memory_allocated` less what was "
        "there before, against `repr.training.forecast`, which `python -m repr.plan` shows."
    )


def made(options: Any, name: str) -> Any:
    small = ["backbone.name=test_resnet"] if "ResNet" in name else ["backbone.name=test_vit"]
    return config(options, CASES[name], [*TINY, *small, *QUICK])


def forecast(told: dict[str, Any], name: str) -> float:
    """Bytes; in a process of its own, since it takes seconds of a core."""
    from repr.training.forecast import Planner

    options = SimpleNamespace(**told)
    cfg = made(options, name)
    foreach = options.device == "cuda"
    return Planner(cfg, gpus=1, foreach=foreach).at(cfg.data.batch_size)[""].total


def rows(options: Any) -> Iterator[dict[str, Any]]:
    told = {"device": options.device, "quick": options.quick}
    errors = []
    with ProcessPoolExecutor(min(5, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        futures = {name: pool.submit(forecast, told, name) for name in CASES}
        for name in CASES:
            real = attempt(name, partial(held, options, name))
            if isinstance(real, str):
                yield {"note": real}
                continue
            try:
                planned = futures[name].result(timeout=max(1.0, options.end - time.monotonic()))
            except TimeoutError:
                yield {"note": f"{name}: the forecast was not ready in time; {real / 1e9:.2f} GB were held"}
                continue
            told_row = {"case": name, "batch": made(options, name).data.batch_size, "planned GB": planned / 1e9}
            if not real:
                yield told_row
                continue
            errors.append(planned / real - 1)
            yield told_row | {"measured GB": real / 1e9, "error": f"{errors[-1]:+.1%}"}
    if errors:
        yield {"note": f"errors from {min(errors):+.1%} to {max(errors):+.1%} (mark: within {MARK:.0%})"}


def held(options: Any, name: str) -> float:
    """Bytes at the fullest moment; the first run leaves cuBLAS its workspaces, which are no part of a forecast."""
    from benchmarks.plan import steps

    cfg = made(options, name)
    steps(cfg, options.device)
    if options.device != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps(cfg, "cuda")
    return float(torch.cuda.max_memory_allocated() - before)
