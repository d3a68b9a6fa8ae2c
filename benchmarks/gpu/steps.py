"""Step time of SimCLR, SwAV, methods with a teacher and MAE: ours beside lightly's and stable-pretraining's modules."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.common import clean
from benchmarks.step_time import LIBRARIES, Step, lightly_mae, measure, our_mae, trunk
from benchmarks.teacher_step_time import METHODS as TEACHERS
from benchmarks.teacher_step_time import OF_PATCHES, encoder, twice

TITLE = {"steps": "Steps of self-supervised methods"}
METHODS = ("SimCLR", "SwAV", *TEACHERS, "MAE")
BACKBONES = {"ViT-S/16": "vit_small_patch16_224", "ResNet-50": "resnet50"}
RECIPE = (128, [224] * 2, [96] * 6)  # batch, large views, small ones
QUICK_BACKBONES = {"ViT": "test_vit", "ResNet": "test_resnet"}
QUICK_RECIPE = (4, [96] * 2, [64] * 2)


def settings(options: Any) -> str:
    num, large, small = QUICK_RECIPE if options.quick else RECIPE
    return (
        "Forward, loss and backward of a batch that lies on the device, bf16 autocast, and the update of a teacher. "
        "All have a backbone of the same class and the same pictures; a peer is its own modules and loss, put together "
        "as in its documentation. A step each in turn; the median counts, and `ours again` tells the noise. "
        f"Batch {num}, {len(large)} views of {large[0]} px, for SwAV and DINO {len(small)} of {small[0]} px besides, "
        "for MAE one view, a share of .75 removed."
    )


def rows(options: Any) -> Iterator[dict[str, Any]]:
    device, models = torch.device(options.device), QUICK_BACKBONES if options.quick else BACKBONES
    num, sides, small_sides = QUICK_RECIPE if options.quick else RECIPE
    rng = torch.Generator().manual_seed(0)
    large, small = (
        [torch.randn(num, 3, side, side, generator=rng).to(device) for side in each] for each in (sides, small_sides)
    )
    cases = [
        (method, *shown)
        for method in METHODS
        for shown in models.items()
        if "ViT" in shown[0] or method not in ("MAE", *OF_PATCHES)
    ]
    for place, (method, shown, name) in enumerate(cases):
        left = options.end - time.monotonic()
        if left < 5:
            yield {"note": f"{', '.join(dict.fromkeys(case[0] for case in cases[place:]))}: the time was up"}
            return
        if method == "MAE":
            makes = mae(name, sides[0], large[0])
        else:
            models_of = twice(TEACHERS[method]) if method in TEACHERS else libraries(method)
            makes = {
                library: partial(make, encoder(method, name, sides[0]), large, small)
                for library, make in models_of.items()
            }
        with clean():
            times = measure(makes, 0.5 if options.quick else min(5.0, 0.6 * left / (len(cases) - place)), device)
        medians = {library: statistics.median(clock for clock, _ in pairs) for library, pairs in times.items()}
        for library, seconds in medians.items():
            told = {"method": method, "backbone": shown, "library": library, "ms": 1e3 * seconds}
            yield told | {"ours / it": medians["ours"] / seconds, "steps": len(times[library])}
        peers = {library: seconds for library, seconds in medians.items() if not library.startswith("ours")}
        if peers and not options.quick:
            best = min(peers, key=lambda library: peers[library])
            ratio = min(medians["ours"], medians["ours again"]) / peers[best]
            yield {"note": f"{method}, {shown}: {ratio:.2f} of the time of {best} (mark: at most 1.00)"}


def libraries(method: str) -> dict[str, Any]:
    return {library: partial(make, method) for library, make in LIBRARIES.items()}


def mae(name: str, size: int, images: Tensor) -> Mapping[str, Any]:
    def model() -> nn.Module:
        return trunk(name, size)

    makes = {library: partial(our_mae, model(), images, 0.75) for library in ("ours", "ours again")}
    return makes | {
        "lightly": partial(lightly_mae, model(), images, 0.75),
        "stable-pretraining": partial(stable_mae, model(), images),
    }


def stable_mae(model: nn.Module, images: Tensor) -> tuple[nn.Module, Step]:
    from stable_pretraining.methods.mae import MAE

    module = MAE(model, mask_ratio=0.75, norm_pix_loss=False)
    return module, lambda: module(images).loss
