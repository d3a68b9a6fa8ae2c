"""CLIP on one GPU: samples a second, share of the GPU's peak, and memory; ours beside open_clip's own training loop.

Run from the root of the repository, on an otherwise idle machine with a GPU::

    python -m benchmarks.gpu_clip --write             # ViT-B/16 at 224 px, batch 512, bf16; writes results/gpu_clip.md
    python -m benchmarks.gpu_clip --tiny              # two tiny towers on any device, to see that all of it works

A step is forward under autocast, loss, backward and AdamW on a batch that lies on the device. Both have the same
towers, timm's ViT and open_clip's text transformer, the same optimizer and pictures; open_clip's steps are made by its
``train_one_epoch``. Forms are measured one after the other, in turn twice, and the better round of each counts. The
share of the peak counts the operations of forward and backward of the plain step, without what slices compute again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import hardware, publish
from repr.batch import Batch
from repr.models.backbone import backbone
from repr.models.slicing import compile_encoders, slice_encoders
from repr.objectives.image_text import ImageText

RESULTS = Path(__file__).parents[1] / "benchmarks/results/gpu_clip.md"
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}  # dense bf16, operations a second
FULL = SimpleNamespace(
    vit={"name": "vit_base_patch16_clip_224", "image_size": 224},
    text={"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    dim=512, batch=512, micro_batch=128, steps=20,
)  # fmt: skip
TINY = SimpleNamespace(
    vit={"name": "vit_tiny_patch16_224", "image_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    text={"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    dim=16, batch=16, micro_batch=4, steps=2,
)  # fmt: skip
FORMS = ("open_clip", "ours", "ours, compiled", "ours, slices")
Steps = Callable[[int], None]  # makes so many optimizer steps


def ours(form: str, size: SimpleNamespace, batch: Batch, device: torch.device) -> tuple[torch.nn.Module, Steps]:
    torch.manual_seed(0)
    objective = ImageText(backbone(**size.vit), TextTransformer(**size.text, output_dim=size.dim)).to(device)
    if form == "ours, compiled":
        compile_encoders(objective)
    slice_encoders(objective, size.micro_batch if form == "ours, slices" else None)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)

    def steps(num: int) -> None:
        for _ in range(num):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = objective.total(objective.step(batch).terms)
            loss.backward()
            optimizer.step()
            objective.finish_step()

    return objective, steps


def open_clip(size: SimpleNamespace, batch: Batch, device: torch.device) -> tuple[torch.nn.Module, Steps]:
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    image_size, options = size.vit["image_size"], {k: v for k, v in size.vit.items() if k not in ("name", "image_size")}
    vision = {"image_size": image_size, "timm_model_name": size.vit["name"], "timm_pool": "", "timm_proj": "linear"}
    model = CustomTextCLIP(size.dim, vision, size.text, output_dict=True)
    if options:  # open_clip's config has no place for them
        model.visual.trunk = backbone(**size.vit)
        model.visual.head.proj = torch.nn.Linear(model.visual.trunk.num_features, size.dim, bias=False)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    args = SimpleNamespace(
        device=str(device), precision="amp_bf16", distill=False, accum_freq=1, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, log_every_n_steps=10**9, batch_size=size.batch, world_size=1, rank=0, local_rank=0,
        wandb=False, tensorboard=False, save_logs=False, distributed=False,
    )  # fmt: skip

    class Loader(list):
        num_batches, num_samples = 10**9, 10**9 * size.batch

    def steps(num: int) -> None:
        loader = Loader([(batch["views"][0], batch["text"])] * num)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, args)

    return model, steps


def make(form: str, size: SimpleNamespace, batch: Batch, device: torch.device) -> tuple[torch.nn.Module, Steps]:
    return open_clip(size, batch, device) if form == "open_clip" else ours(form, size, batch, device)


def measure(form: str, size: SimpleNamespace, batch: Batch, device: torch.device) -> dict[str, float]:
    """Samples a second and the peak of memory in MiB; warm first."""
    gpu = device.type == "cuda"
    model, steps = make(form, size, batch, device)
    steps(2 if not gpu else 5)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    steps(size.steps)
    if gpu:
        torch.cuda.synchronize()
    rate = size.steps * size.batch / (time.perf_counter() - begin)
    found = {"rate": rate, "memory": torch.cuda.max_memory_allocated() / 2**20 if gpu else float("nan")}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    del model, steps
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return found


def operations(size: SimpleNamespace, device: torch.device) -> float:
    """Of forward and backward, a sample."""
    batch = inputs(SimpleNamespace(**{**vars(size), "batch": 4}), device)
    objective, _ = ours("ours", size, batch, device)
    with FlopCounterMode(display=False) as counter:
        objective.total(objective.step(batch).terms).backward()
    return counter.get_total_flops() / 4


def inputs(size: SimpleNamespace, device: torch.device) -> Batch:
    rng = torch.Generator().manual_seed(0)
    side = size.vit["image_size"]
    text = torch.randint(1, 49000, (size.batch, size.text["context_length"]), generator=rng)
    text[:, -1] = 49407  # the end token, at which the tower pools
    return Batch(views=[torch.randn(size.batch, 3, side, side, generator=rng).to(device)], text=text.to(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny towers on any device, without a verdict")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu_clip.md; needs a GPU")
    parser.add_argument("--batch", type=int, help="instead of the usual one")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (args.write or not args.tiny):
        raise SystemExit("this machine has no GPU: nothing is measured; --tiny shows whether the program works")
    logging.disable(logging.INFO)  # open_clip's loop tells every epoch
    size = TINY if args.tiny else FULL
    size.batch = args.batch or size.batch
    batch, rounds = inputs(size, device), 1 if args.tiny else 2
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for form in args.forms:
            now = measure(form, size, batch, device)
            if form not in found or now["rate"] > found[form]["rate"]:
                found[form] = now
    if len({row["parameters"] for row in found.values()}) > 1:
        raise SystemExit(f"the towers differ, so nothing was compared: {found}")
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    flops = operations(size, device)
    base = found.get("open_clip", {}).get("rate")
    lines = [
        "# CLIP on one GPU",
        "",
        f"{size.vit}, text tower {size.text}, batch {size.batch}, bf16 autocast, AdamW; {flops / 1e9:.1f} billion "
        f"operations a sample. {hardware('torch', 'timm', 'open_clip_torch')}",
        "",
        "| form | parameters | samples/s | x open_clip | share of the peak | memory MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for form, row in found.items():
        share = f"{row['rate'] * flops / peak:.2f}" if peak else ""
        ratio = f"{row['rate'] / base:.2f}" if base else ""
        lines.append(
            f"| {form} | {row['parameters']:.0f} | {row['rate']:.0f} | {ratio} | {share} | {row['memory']:.0f} |"
        )
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
