"""Time and peak memory of PixPro's parts: ours against the plain formula written out in torch.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.pixel            # at most ten minutes on two cores
    python -m benchmarks.pixel --quick    # batch 32 for the parts, at most three minutes
    python -m benchmarks.pixel --write    # also writes benchmarks/results/pixel.md

The parts: what 128 images of 224 pixels bring, maps of 7 x 7 (stride 32) and 14 x 14 (patches of 16), 256 channels,
float32 on the CPU; forward and backward to the queries, keys without gradient, as the flow has them. Times are the
least CPU time of several repetitions, the two forms in turn; memory, in a process of its own, is the peak of what is
resident above what was held when the inputs were ready, with an allocator that gives every block back. ``pairs`` is
that peak in float tensors (N, HW, HW). The plain forms hold what the formula names: distances, cosines, weights.

The step: forward and backward of the whole flow with a ResNet-10 at 224 pixels, teacher and propagation included, the
parts once ours and once plain in turn in one process; values are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.loss_memory import resident
from benchmarks.report import hardware, publish
from repr.losses.pixel import pixel_consistency, pixel_contrast, positive_mask
from repr.models.propagation import Propagation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/pixel.md"
DIM, THRESHOLD, TEMPERATURE, GAMMA = 256, 0.7, 0.3, 2.0
PARTS = ("mask", "consistency", "contrast", "propagation")


# The formulas, written out ------------------------------------------------------------------------------------------


def plain_mask(boxes_q: Tensor, boxes_k: Tensor, *, grid_q: tuple, grid_k: tuple, threshold: float) -> Tensor:
    def centres(boxes: Tensor, grid: tuple) -> tuple[Tensor, Tensor]:
        cell = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([grid[1], grid[0]])  # (N, 2)
        rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
        place = torch.stack([columns, rows], dim=-1).flatten(0, 1) + 0.5  # (HW, 2)
        return boxes[:, None, :2] + place * cell[:, None], cell.norm(dim=1)

    (q, diagonal_q), (k, diagonal_k) = centres(boxes_q, grid_q), centres(boxes_k, grid_k)
    distance = (q[:, :, None] - k[:, None]).norm(dim=3)  # (N, HW, HW)
    return distance / torch.maximum(diagonal_q, diagonal_k)[:, None, None] < threshold


def cosines(q: Tensor, k: Tensor) -> Tensor:
    return F.normalize(q, dim=1).mT @ F.normalize(k, dim=1)  # (N, HW, HW)


def plain_consistency(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    pairs = mask.float()
    return -2 * ((cosines(q, k) * pairs).sum((1, 2)) / (pairs.sum((1, 2)) + 1e-6)).mean()


def plain_contrast(q: Tensor, k: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    powers = (cosines(q, k) / temperature).exp()
    has_positive = mask.any(2)
    share = (powers * mask).sum(2) / powers.sum(2)
    loss = -torch.where(has_positive, share, 1.0).log()
    return (loss.sum(1) / has_positive.sum(1).clamp_min(1)).mean()


class PlainPropagation(Propagation):
    """The same module with all weights of all images at once."""

    def forward(self, cells: Tensor) -> Tensor:
        """(N, C, HW) -> (N, C, HW)."""
        values = self.values(cells.mT.flatten(0, 1)).unflatten(0, (len(cells), -1)).mT
        weights = cosines(cells, cells).clamp_min(0) ** self.gamma
        return F.normalize(values, dim=1) @ weights.mT


# Parts, each in its own process -------------------------------------------------------------------------------------


def build(part: str, form: str, num: int, side: int) -> Callable[[], Tensor]:
    """A function without arguments that runs one part and gives its value."""
    torch.manual_seed(0)
    low = 0.3 * torch.rand(2, num, 2)
    boxes = torch.cat([low, low + 0.6], dim=2)
    grids = {"grid_q": (side, side), "grid_k": (side, side), "threshold": THRESHOLD}
    mask = positive_mask(*boxes, **grids)
    q = torch.randn(num, side**2, DIM).mT.requires_grad_()  # as a head of rows leaves them
    k = torch.randn(num, side**2, DIM).mT
    ours = form == "ours"
    if part == "mask":
        return lambda: (positive_mask if ours else plain_mask)(*boxes, **grids)[::16].sum()
    if part == "propagation":
        module = (Propagation if ours else PlainPropagation)(DIM, gamma=GAMMA, num_layers=1)
        return lambda: _backward(module(q).square().mean(), q)
    if part == "consistency":
        return lambda: _backward((pixel_consistency if ours else plain_consistency)(q, k, mask), q)
    contrast = pixel_contrast if ours else plain_contrast
    return lambda: _backward(contrast(q, k, mask, temperature=TEMPERATURE), q)


def _backward(value: Tensor, leaf: Tensor) -> Tensor:
    value.backward()
    leaf.grad = None
    return value.detach()


def memory(part: str, form: str, num: int, side: int) -> float:
    """Peak of one part in MiB."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: whatever is larger goes back to the system when freed
    function = build(part, form, num, side)
    function()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start = resident("VmRSS")
    function()
    return resident("VmHWM") - start


def times(part: str, num: int, side: int) -> dict[str, tuple[float, float]]:
    """Form -> least seconds of CPU, and the value."""
    functions = {form: build(part, form, num, side) for form in ("plain", "ours")}
    values = {form: function().item() for form, function in functions.items()}
    least, start = dict.fromkeys(functions, float("inf")), time.process_time()
    for repetition in range(30):
        if repetition > 4 and time.process_time() - start > 3:
            break
        for form, function in functions.items():
            begin = time.process_time()
            function()
            least[form] = min(least[form], time.process_time() - begin)
    return {form: (least[form], values[form]) for form in functions}


def apart(function: Callable, *arguments: object) -> object:
    """Call in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def parts(num: int) -> list[str]:
    lines = [
        "| part | map | form | CPU ms | x plain | peak MiB | pairs | value |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for side in (7, 14):
        pairs = num * side**4 * 4 / 2**20  # MiB of one float tensor (N, HW, HW)
        for part in PARTS:
            found = apart(times, part, num, side)
            (plain, expected), (_, value) = found["plain"], found["ours"]
            differ = " DIFFERS" if abs(value - expected) > 1e-4 * abs(expected) + 1e-6 else ""
            for form, (seconds, value) in found.items():
                mib = apart(memory, part, form, num, side)
                cells = f"{seconds * 1e3:.1f} | {seconds / plain:.2f} | {mib:.1f} | {mib / pairs:.2f}"
                lines.append(f"| {part} | {side} x {side} | {form} | {cells} | {value:.5g}{differ} |")
                print(".", end="", file=sys.stderr, flush=True)
    return lines


# The whole step -----------------------------------------------------------------------------------------------------


def step(num: int, budget: float) -> list[str]:
    """Ours and plain in turn, the same weights and views."""
    from repr.batch import Batch
    from repr.models.backbone import backbone
    from repr.objectives import pixpro

    def flow(form: str) -> pixpro.PixPro:
        torch.manual_seed(0)
        kind = Propagation if form == "ours" else PlainPropagation
        with patch.object(pixpro, "Propagation", kind):
            losses = {"pixel": pixel_consistency if form == "ours" else plain_consistency}
            return pixpro.PixPro(backbone("resnet10t", image_size=224), losses=losses)

    flows = {form: flow(form) for form in ("plain", "ours")}
    corners = 0.3 * torch.rand(num, 2, 2)
    views = [torch.randn(num, 3, 224, 224) for _ in range(2)]
    batch = Batch(views=views, boxes=torch.cat([corners, corners + 0.6], dim=2))
    least, values = dict.fromkeys(flows, float("inf")), {}
    end, rounds = time.monotonic() + budget, 0
    while time.monotonic() < end or rounds < 6:
        rounds += 1
        for form, objective in flows.items():
            mask = positive_mask if form == "ours" else plain_mask
            begin = time.process_time()
            with patch.object(pixpro, "positive_mask", mask):
                loss = objective.total(objective.step(batch).terms)
            loss.backward()
            least[form] = min(least[form], time.process_time() - begin)
            objective.zero_grad()
            values.setdefault(form, loss.item())
    differ = "" if abs(values["ours"] - values["plain"]) < 1e-4 else f" VALUES DIFFER: {values}"
    return [
        f"Step of PixPro, ResNet-10 at 224 px, batch {num}, map 7 x 7: ours {least['ours']:.2f} s of CPU, plain "
        f"{least['plain']:.2f} s, ratio {least['ours'] / least['plain']:.2f} ({rounds} rounds in turn).{differ}"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 32 for the parts, a shorter step")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    load, num = os.getloadavg()[0], 32 if args.quick else 128
    torch.set_num_threads(1)
    table, whole = parts(num), step(4, 15 if args.quick else 90)
    print(file=sys.stderr)
    lines = [
        "# Time and memory of PixPro's parts",
        "",
        f"Batch {num}, {DIM} channels, float32, forward and backward, one thread. "
        f"`{' '.join(['python -m benchmarks.pixel', *sys.argv[1:]])}`",
        "",
        f"{hardware('torch')}, load before {load:.1f}; seconds of CPU, so other programs disturb little",
        "",
        *table,
        "",
        "`pairs`: the peak in float tensors (N, HW, HW). Every part but the mask holds several tensors of queries or "
        f"keys, each as large as {DIM / 49:.1f} (7 x 7) or {DIM / 196:.1f} (14 x 14) of them.",
        "",
        *whole,
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
