"""What a step of SigLIP 2 costs in its first and in its second stage, beside its parts alone.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.hybrid_step            # some ten minutes on two cores
    python -m benchmarks.hybrid_step --quick    # a small ViT, half a minute
    python -m benchmarks.hybrid_step --write    # also writes benchmarks/results/hybrid_step.md

A step is forward, loss, backward of a batch that is ready, float32. The first stage must cost what a captioner alone
does, which is SigLIP and the decoder: the views of the second stage cost nothing before it begins. For the second stage
the prediction counts passes of the backbone: one with gradient over a view of 256 patches is measured, one without
takes a third of it, and a pass over fewer patches as many times less. What the heads of student and teacher take for
the tokens of a step is measured by itself, and added in a line of its own. The candidates are measured in turn; the
least time of each counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from benchmarks.report import hardware, publish
from benchmarks.step_time import Candidate, measure
from repr.batch import Batch
from repr.config import compose
from repr.losses.contrastive import sigmoid
from repr.models.heads import PrototypeHead
from repr.objectives.hybrid import Hybrid
from repr.objectives.image_text import ImageText

RESULTS = Path(__file__).parent / "results" / "hybrid_step.md"
PATCH, LARGE, SMALL, NUM_SMALL = 16, 256, 96, 8
PASS, HEADS = "a pass over the large view", "heads of student and teacher"
TOTAL = 100  # steps of the run that is stood for
WHOLE = ["backbone=vit_b16", "text=coca_base", "text.context_length=64", "objective.parts.siglip.decoder_layers=6"]
QUICK = ["backbone=vit_s16", "+backbone.depth=4", "text=coca_small", "objective.parts.siglip.decoder_layers=1"]


def siglip2(options: list[str], step: int) -> Hybrid:
    """The hybrid at a step of the run."""
    sizes = [f"image_size={LARGE}", f"small_size={SMALL}", "++backbone.dynamic_img_size=true"]
    torch.manual_seed(0)
    flow = instantiate(compose(["objective=siglip2", *sizes, *options]).objective)
    flow.total_steps, flow.step_number = TOTAL, step
    return flow


def alone(options: list[str], *, captions: bool) -> nn.Module:
    """The captioner of the hybrid, or the loss of SigLIP without decoder, as objectives of their own."""
    flow = siglip2(options, 0)
    part: Any = flow.evaluated()
    if captions:
        return part
    return ImageText(flow.backbone, flow.text, losses={"contrast": sigmoid}, temperature=0.1, logit_bias=-10.0)


def one_pass(options: list[str], batch: Batch) -> Candidate:
    """The backbone over the first view, forward and backward."""
    encoder: Any = siglip2(options, 0).backbone
    return encoder, lambda: encoder(batch["views"][0]).sum()


def heads_alone(options: list[str], batch: Batch) -> Candidate:
    """The heads of the second stage over what they get in a step, forward and backward."""
    flow, calls = siglip2(options, TOTAL - 1), list[tuple[Callable[..., Any], Tensor, tuple[Any, ...], bool]]()

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def note(x: Tensor, *others: Any) -> Any:
            learns = torch.is_grad_enabled()
            calls.append((work, x.detach().requires_grad_(learns), others, learns))
            return work(x, *others)

        return note

    heads = [module for module in flow.modules() if isinstance(module, PrototypeHead)]
    for head, name in itertools.product(heads, ("forward", "forward_some")):
        setattr(head, name, noted(getattr(head, name)))
    flow.step(batch)

    def step() -> Tensor:
        total = torch.zeros(())
        for work, x, others, learns in calls:
            with torch.set_grad_enabled(learns):
                scores = work(x, *others)
            total = total + scores.sum() if learns else total
        return total

    return nn.ModuleList(heads), step


def candidate(make: Callable[[], Any], batch: Batch) -> Candidate:
    flow = make()
    return flow, lambda: flow.total(flow.step(batch).terms)


def batch_of(size: int, context_length: int) -> Batch:
    rng = torch.Generator().manual_seed(0)
    sides = [LARGE, LARGE, *[SMALL] * NUM_SMALL]
    text = torch.randint(1, 49000, (size, context_length), generator=rng)
    text[:, -1] = 49407
    views = [torch.randn(size, 3, side, side, generator=rng) for side in sides]
    return Batch(index=torch.arange(size), seed=torch.arange(size), views=views, text=text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a ViT-S of four blocks")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/hybrid_step.md")
    parser.add_argument("--seconds", type=float, help="of measuring; default 480, quick 20")
    args = parser.parse_args()
    options = QUICK if args.quick else WHOLE
    batch = batch_of(2 if args.quick else 4, 16 if args.quick else 64)
    flows = {
        "ours": partial(alone, options, captions=True),  # the name of what is measured at least three times
        "SigLIP": partial(alone, options, captions=False),
        "SigLIP 2, first stage": partial(siglip2, options, 0),
        "SigLIP 2, second stage": partial(siglip2, options, TOTAL - 1),
    }
    load = hardware("torch", "timm", "open-clip-torch")
    seconds = args.seconds or (20 if args.quick else 480)
    makes: dict[str, Callable[[], Candidate]]
    makes = {name: partial(candidate, make, batch) for name, make in flows.items()}
    makes |= {PASS: partial(one_pass, options, batch), HEADS: partial(heads_alone, options, batch)}
    times = measure(makes, seconds)
    best = {name: min(cpu for _, cpu in pairs) for name, pairs in times.items()}
    clock = {name: min(wall for wall, _ in pairs) for name, pairs in times.items()}
    cells = (SMALL / LARGE) ** 2
    predicted = best["ours"] + best[PASS] * (1 + 1 / 3 + NUM_SMALL * cells)
    first, second = "SigLIP 2, first stage", "SigLIP 2, second stage"
    rows = [(PASS, PASS, None), (HEADS, HEADS, None), ("SigLIP", "SigLIP", None)]
    rows += [("captioner: SigLIP and decoder", "ours", None), (first, first, best["ours"]), (second, second, predicted)]
    rows += [(f"{second}, with heads", second, predicted + best[HEADS])]
    command = " ".join(["python -m benchmarks.hybrid_step", *sys.argv[1:]])
    lines = ["# What a step of SigLIP 2 costs", "", f"`{command}`; the load is that before.", "", load, ""]
    lines += ["| step | s by the clock | s of CPU | predicted s of CPU | over it | steps |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for title, name, expected in rows:
        told = " | " if expected is None else f"{expected:.2f} | {best[name] / expected:.2f}"
        lines.append(f"| {title} | {clock[name]:.2f} | {best[name]:.2f} | {told} | {len(times[name])} |")
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
