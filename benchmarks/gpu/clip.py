"""CLIP: samples a second, share of the peak and memory, ours beside open_clip's training loop, eager and compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.gpu.common import TINY_VIT, Speed, attempt, clean, config, forget_peak, peak, train
from benchmarks.step_time import wait
from repr.batch import Batch
from repr.models.backbone import backbone
from repr.training.throughput import Operations

BACKBONES = {"clip_b16": "vit_b16", "clip_b32": "vit_b32"}
TITLE = {"clip_b16": "CLIP ViT-B/16", "clip_b32": "CLIP ViT-B/32"}
FORMS = ("ours, compiled", "open_clip, compiled", "ours", "open_clip")
BATCH, QUICK_BATCH, WARM = 1024, 16, 5
STATE = 18  # bytes a parameter: itself, gradient, two moments, and the copy in half precision
MARK = 0.45  # of the peak


def settings(options: Any) -> str:
    return (
        "A step is forward, loss, backward and AdamW on a batch that lies on the device, bf16. Both have the same "
        "towers, timm's ViT and open_clip's text transformer. Ours is made by `repr.fit`'s Trainer with `trainer=gpu`, "
        "its guard and its measure of speed; open_clip's by its `train_one_epoch`, compiled as `--torchcompile` does. "
        "MFU is the share of the card's peak, from the operations of our plain step by torch's formulas. The second "
        "half of the rows has the largest batch that fits."
    )


def rows(options: Any) -> Iterator[dict[str, Any]]:
    logging.disable(logging.INFO)  # open_clip's loop tells every epoch
    batch = QUICK_BATCH if options.quick else BATCH
    cfg = config(
        options,
        ["objective=clip", f"backbone={BACKBONES[options.part]}", "text=clip_base", f"data.batch_size={batch}"],
        [*SMALL, *TINY_VIT],
    )
    device = torch.device(options.device)
    with clean():
        operations = count(cfg, device)
    found: dict[str, tuple[int, Speed]] = {}
    for form in FORMS:
        speed = attempt(form, partial(measure, form, cfg, batch, device, seconds(options)))
        if isinstance(speed, str):
            yield {"note": f"batch {batch}: {speed}"}
            continue
        found[form] = (batch, speed)
        yield row(form, batch, speed, operations)
    for form in FORMS if device.type == "cuda" else ():
        if form in found and time.monotonic() < options.end - 35:
            yield from largest(form, cfg, found[form], operations, options)
    if not options.quick:
        yield from verdicts(found, operations)


SMALL = ["image_size=32", "embed_dim=32", "text.width=64", "text.layers=1", "text.context_length=16"]


def seconds(options: Any) -> float:
    return 0.5 if options.quick else 6.0


def row(form: str, batch: int, speed: Speed, operations: float) -> dict[str, Any]:
    share = peak() and operations * batch / speed.seconds / peak()  # type: ignore[operator]
    told = {"form": form, "batch": batch, "samples/s": batch / speed.seconds, "ms a step": 1e3 * speed.seconds}
    return told | {"MFU": share, "GB": speed.memory / 1e9 or None}


def largest(
    form: str, cfg: DictConfig, known: tuple[int, Speed], operations: float, options: Any
) -> Iterator[dict[str, Any]]:
    """The largest batch by what the known one took, a little less where that does not fit."""
    batch, speed = known
    device = torch.device(options.device)
    state = STATE * sum(parameter.numel() for parameter in instantiate(cfg.objective).parameters())
    room = torch.cuda.mem_get_info()[1] - 2**31 - state  # 2 GiB: context, workspaces, fragments
    num = int(room / (speed.memory - state) * batch) // 64 * 64
    for _ in range(3):
        if num <= batch or time.monotonic() > options.end - 30:
            return
        bigger = attempt(form, partial(measure, form, cfg, num, device, seconds(options)))
        if not isinstance(bigger, str):
            yield row(form, num, bigger, operations)
            return
        num = int(0.93 * num) // 64 * 64


def verdicts(found: dict[str, tuple[int, Speed]], operations: float) -> Iterator[dict[str, Any]]:
    ours, theirs = (found.get(form) for form in FORMS[:2])
    if ours and theirs:
        ratio = theirs[1].seconds / ours[1].seconds
        yield {"note": f"samples/s of ours, compiled, over open_clip's, compiled: {ratio:.3f} (mark: at least 1.00)"}
    if ours and (top := peak()):
        share = operations * ours[0] / ours[1].seconds / top
        yield {"note": f"MFU of ours, compiled: {share:.3f} (mark for ViT-B/16 on an H100 or H200: at least {MARK})"}


# One form -------------------------------------------------------------------------------------------------------------


def measure(form: str, cfg: DictConfig, num: int, device: torch.device, seconds: float) -> Speed:
    batch = inputs(cfg, num, device)
    forget_peak(device)
    if form.startswith("ours"):
        cfg = cfg.copy()
        cfg.compile = "compiled" in form
        cfg.data.batch_size = num
        return train(cfg, batch, seconds, warm=WARM)
    steps = open_clip(cfg, batch, device, compiled="compiled" in form)
    steps(WARM)
    one = timed(steps, 2, device) / 2
    forget_peak(device)
    many = max(3, round(seconds / one))
    took = timed(steps, many, device) / many
    return Speed(took, float(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0))


def timed(steps: Callable[[int], None], num: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    steps(num)
    wait(device)
    return time.perf_counter() - start


def open_clip(cfg: DictConfig, batch: Batch, device: torch.device, *, compiled: bool) -> Callable[[int], None]:
    """A function that makes so many optimizer steps of open_clip's loop."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CustomTextCLIP
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    name, size = cfg.backbone.name, cfg.image_size
    text = {key: cfg.text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
    vision = {"image_size": size, "timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    model = CustomTextCLIP(cfg.embed_dim, vision, text, output_dict=True)
    others = {key: value for key, value in cfg.backbone.items() if key not in ("_target_", "name", "image_size")}
    if others:  # open_clip's config has no place for them
        model.visual.trunk = backbone(name, image_size=size, **others)
        model.visual.head.proj = torch.nn.Linear(model.visual.trunk.num_features, cfg.embed_dim, bias=False)
    num, ours = (sum(p.numel() for p in part.parameters()) for part in (model, instantiate(cfg.objective)))
    if num != ours:
        raise ValueError(f"its towers have {num:,} parameters and ours {ours:,}, so nothing would be compared")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    runs: Any = torch.compile(model) if compiled else model
    args = SimpleNamespace(
        device=str(device), precision="amp_bf16" if device.type == "cuda" else "fp32", distill=False, accum_freq=1,
        skip_scheduler=True, horovod=False, grad_clip_norm=None, log_every_n_steps=10**9, world_size=1, rank=0,
        batch_size=len(batch["text"]), local_rank=0, wandb=False, tensorboard=False, save_logs=False, distributed=False,
    )  # fmt: skip

    class Loader(list):
        num_batches, num_samples = 10**9, 10**9 * len(batch["text"])

    def steps(num: int) -> None:
        loader = Loader([(batch["views"][0], batch["text"])] * num)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(runs, data, ClipLoss(), 0, optimizer, None, None, None, args)

    return steps


def count(cfg: DictConfig, device: torch.device) -> float:
    """Operations of forward and backward of our plain step, a sample."""
    few, objective = 4, instantiate(cfg.objective).to(device)
    with Operations() as counter, torch.autocast(device.type, torch.bfloat16):
        objective.total(objective.step(inputs(cfg, few, device)).terms).backward()
    return counter.total / few


def inputs(cfg: DictConfig, num: int, device: torch.device) -> Batch:
    rng = torch.Generator().manual_seed(0)
    text = torch.randint(1, 49000, (num, cfg.text.context_length), generator=rng)
    text[:, -1] = cfg.text.vocab_size - 1  # the end token, at which the tower pools
    views = [torch.randn(num, 3, cfg.image_size, cfg.image_size, generator=rng).to(device)]
    return Batch(views=views, text=text.to(device))
