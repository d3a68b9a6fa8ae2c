"""The colour half of views: pictures a second, ours beside kornia's and torchvision's, and its share of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.common import attempt, median
from benchmarks.step_time import measure, ours, trunk
from repr.data.colour import colour_views
from repr.data.views import View, draw
from repr.seeds import sample_seed

TITLE = {"colour": "The colour half of views"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
MARK = 0.05
BACKBONES = {"ViT-S/16": "vit_small_patch16_224", "ResNet-50": "resnet50"}


def size_of(options: Any) -> tuple[int, int]:
    return (8, 64) if options.quick else (256, 224)


def settings(options: Any) -> str:
    num, side = size_of(options)
    return (
        f"SimCLR's colours (jitter of .8, .8, .8, .2 with probability .8, gray .2, blur .5 of up to 2 pixels) and "
        f"normalisation of {num} uint8 pictures of {side} px that lie on the device, each with its own draw; "
        "torchvision has one draw for all it is given, so it is given one picture at a time, and all at once for "
        "comparison. The share is that of both views in a step of SimCLR (forward, loss, backward, bf16) on so many."
    )


def rows(options: Any) -> Iterator[dict[str, Any]]:
    device, (num, side) = torch.device(options.device), size_of(options)
    pictures = torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(0)).byte().to(device)
    seconds, found = 0.3 if options.quick else 3.0, dict[str, float]()
    for name, make in CANDIDATES.items():
        took = attempt(name, lambda make=make: median(partial(make(pictures), pictures), device, seconds, 3))
        if isinstance(took, str):
            yield {"note": took}
            continue
        found[name] = took
        yield {"who": name, "ms": 1e3 * took, "pictures/s": num / took}
    for shown, name in {"ResNet": "test_resnet"}.items() if options.quick else BACKBONES.items():
        views = [torch.randn(num, 3, side, side, device=device) for _ in range(2)]
        times = measure({"ours": partial(ours, "SimCLR", trunk(name, side), views, [])}, seconds, device)
        step = sorted(clock for clock, _ in times["ours"])[len(times["ours"]) // 2]
        share = 2 * found["ours"] / (step + 2 * found["ours"])
        mark = "" if options.quick else f" (mark: below {MARK:.0%})"
        yield {"note": f"share of a step of SimCLR on {shown}, {1e3 * step:.1f} ms: {share:.1%}{mark}"}


def our_half(pictures: Tensor) -> Callable[[Tensor], Any]:
    view = View(size=pictures.shape[-1], scale=(1, 1), jitter_prob=0.8, gray_prob=0.2, blur_prob=0.5, **JITTER)
    colour = draw(sample_seed(0, 0, torch.arange(len(pictures))), [view])[1]
    return lambda x: colour_views([x], colour, MEAN, STD)


def kornia_half(pictures: Tensor) -> Callable[[Tensor], Any]:
    import kornia.augmentation as k

    mean, std = (torch.tensor(values) for values in (MEAN, STD))
    half: Any = nn.Sequential(
        k.ColorJitter(**JITTER, p=0.8), k.RandomGrayscale(p=0.2), k.RandomGaussianBlur((17, 17), (0.1, 2.0), p=0.5),
        k.Normalize(mean, std),
    )  # fmt: skip
    return lambda x: half.to(x.device)(x.float() / 255)


def transform() -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True), v2.RandomApply([v2.ColorJitter(**JITTER)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], 0.5), v2.Normalize(MEAN, STD),
    ])  # fmt: skip


def one_by_one(pictures: Tensor) -> Callable[[Tensor], Any]:
    half = transform()
    return lambda x: torch.stack([half(picture) for picture in x])


CANDIDATES: dict[str, Callable[[Tensor], Callable[[Tensor], Any]]] = {
    "ours": our_half,
    "kornia": kornia_half,
    "torchvision v2, one by one": one_by_one,
    "torchvision v2, one draw for all": lambda pictures: transform(),
}
