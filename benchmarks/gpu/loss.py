"""CLIP's loss alone: time and memory by the digits of its products, beside open_clip's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import attempt, forget_peak, median
from benchmarks.loss_precision import DIM, SCALE, features
from repr.losses.contrastive import clip

TITLE = {"loss": "CLIP's loss alone"}
SIZES, QUICK_SIZES, CHUNKS = (4096, 32768), (256,), (None, 1024)


def settings(options: Any) -> str:
    return (
        f"Forward and backward of N pairs with D = {DIM} at scale {SCALE:g}; GB beside the features. open_clip's is "
        "its `ClipLoss` under bfloat16 autocast, as in its training. What the digits cost is in docs/precision.md."
    )


def rows(options: Any) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for num in QUICK_SIZES if options.quick else SIZES:
        x, y = (z.to(device) for z in features(num, 5.0))
        for name, loss in losses(device).items():
            found = attempt(f"{name}, N = {num:,}", partial(cost, loss, x, y, 0.2 if options.quick else 1.0))
            if isinstance(found, str):
                yield {"note": found}
            else:
                yield {"loss": name, "N": num, "ms": 1e3 * found[0], "GB": found[1] / 1e9}


def losses(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def theirs(x: Tensor, y: Tensor) -> Tensor:
        from open_clip.loss import ClipLoss

        with torch.autocast(device.type, torch.bfloat16):
            return ClipLoss()(x, y, torch.tensor(SCALE, device=device))

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"open_clip": theirs}
    for precision in ("float32", "tf32", "bf16x3"):
        for chunk in CHUNKS:
            name = f"ours, {precision}" + (f", chunk_size={chunk}" if chunk else "")
            found[name] = partial(clip, logit_scale=SCALE, chunk_size=chunk, precision=precision)  # type: ignore[arg-type]
    return found


def cost(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, seconds: float) -> tuple[float, float]:
    """Seconds, and bytes beside the features."""
    cuda = x.device.type == "cuda"

    def step() -> None:
        loss(*(z.detach().requires_grad_() for z in (x, y))).backward()

    step()
    forget_peak(x.device)
    before = torch.cuda.memory_allocated() if cuda else 0
    took = median(step, x.device, seconds)
    return took, float(torch.cuda.max_memory_allocated() - before if cuda else 0)
