"""Memory and time of a CLIP step at batch 1,024 to 16,384: plain, in slices, and as open_clip's ``--accum-freq``.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.large_batch            # at most half an hour on two cores
    python -m benchmarks.large_batch --quick    # batch 1,024 and 4,096, at most three minutes
    python -m benchmarks.large_batch --write    # also writes benchmarks/results/large_batch.md

A measurement is forward, loss and backward of one batch on the CPU, float32, with a small ViT and a small text tower.
Time is the least of several repetitions in a process of its own. Memory is the peak of what a second process has
resident, above what it held when the batch was ready; there malloc gives back what is freed (its threshold for mappings
is fixed at 64 kB), since otherwise gaps between blocks count, too. All forms have the same weights and inputs and the
gradient of the whole batch; its length and the loss are compared.

* plain: both towers on the whole batch, the matrix of all pairs;
* slices: ``micro_batch`` and ``chunk_size``;
* accumulated: what open_clip does with ``--accum-freq``, written anew with its own loss. Without gradient, the features
  of all micro-batches; then, for one micro-batch after the other, its features again with gradient in place of those,
  the loss of all, and backward. So the loss is computed once a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loss_memory import available, resident
from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/large_batch.md"
FORMS = ("plain", "slices", "accumulated")
NUMS, QUICK_NUMS = [1024, 2048, 4096, 8192, 16384], [1024, 4096]
MICRO_BATCH, CHUNK_SIZE, DIM = 256, 256, 64
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
TEXT = {"context_length": 16, "width": 96, "heads": 3, "layers": 2, "output_dim": DIM}
LIMIT = 1.45  # of the time of plain
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
LONGEST = 100.0  # seconds of a step whose memory is measured, too, in which it takes about twice as long


# One measurement, in its own process ---------------------------------------------------------------------------------


def build(form: str) -> Any:
    """An image-text objective with small towers."""
    import torch
    from open_clip.transformer import TextTransformer

    from repr.models.backbone import backbone
    from repr.models.slicing import slice_encoders
    from repr.objectives.image_text import ImageText

    torch.manual_seed(0)
    towers = backbone("vit_tiny_patch16_224", **VIT), TextTransformer(**TEXT)
    objective = ImageText(*towers, chunk_size=CHUNK_SIZE if form == "slices" else None)
    if form == "slices":
        slice_encoders(objective, MICRO_BATCH)
    return objective


def step_of(form: str) -> Callable[[Any, Any], Any]:
    """A function of objective and batch that leaves the gradient and gives the loss."""

    def whole(objective: Any, batch: Any) -> Any:
        loss = objective.total(objective.step(batch).terms)
        loss.backward()
        return loss.detach()

    return accumulated if form == "accumulated" else whole


def accumulated(objective: Any, batch: Any) -> Any:
    import torch
    from open_clip.loss import ClipLoss
    from torch.nn import functional as F  # noqa: N812

    criterion, total = ClipLoss(), None
    parts = [x.split(MICRO_BATCH) for x in (batch["views"][0], batch["text"])]
    encoders = objective.encode_image, objective.encode_text

    def encode(k: int) -> list[Any]:
        return [F.normalize(e(p[k]), dim=-1) for e, p in zip(encoders, parts, strict=True)]

    with torch.no_grad():
        cached = [encode(k) for k in range(len(parts[0]))]
    for k in range(len(cached)):
        features = [*cached[:k], encode(k), *cached[k + 1 :]]
        image, text = (torch.cat(list(column)) for column in zip(*features, strict=True))
        loss = criterion(image, text, objective.logit_scale.exp())
        loss.backward()
        total = loss.detach()
    # The scale has its whole gradient from each of the losses, in open_clip too.
    objective.logit_scale.grad /= len(cached)
    return total


def measure(form: str, num: int, budget: float, threads: int | None) -> dict[str, float]:
    import torch

    from repr.batch import Batch

    if threads:
        torch.set_num_threads(threads)

    def inputs(num: int) -> Batch:
        rng = torch.Generator().manual_seed(0)
        text = torch.randint(1, 49000, (num, TEXT["context_length"]), generator=rng)
        text[:, -1] = 49407  # the end token, at which the tower pools
        return Batch(views=[torch.randn(num, 3, VIT["image_size"], VIT["image_size"], generator=rng)], text=text)

    objective, step = build(form), step_of(form)
    step(objective, inputs(2 * MICRO_BATCH))  # code is loaded and threads are started before anything is measured
    batch = inputs(num)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    start, seconds = resident("VmRSS"), []
    while not seconds or (sum(seconds) + seconds[-1] < budget and len(seconds) < 10):
        objective.zero_grad()
        begin = time.perf_counter()
        loss = step(objective, batch)
        seconds.append(time.perf_counter() - begin)
    grads = [p.grad.double().square().sum() for p in objective.parameters() if p.grad is not None]
    size = sum(x.nbytes for x in (*batch["views"], batch["text"])) / 2**20
    norm = torch.stack(grads).sum().sqrt().item()
    found = {"seconds": min(seconds), "repetitions": len(seconds), "peak": resident("VmHWM") - start}
    return found | {"inputs": size, "loss": loss.item(), "norm": norm}


# All measurements ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table; ``note`` says why there are no numbers."""

    form: str
    num: int
    seconds: float = float("nan")
    repetitions: int = 0
    peak: float = float("nan")
    inputs: float = float("nan")
    loss: float = float("nan")
    norm: float = float("nan")
    note: str = ""


def run(form: str, num: int, budget: float, threads: int | None, end: float, before: Row | None) -> Row:
    """A row, measured in a fresh process; ``before`` is the same form at the last smaller batch."""
    row, left = Row(form, num), end - time.monotonic()
    if before is not None and before.note:
        row.note = before.note
    elif before is not None:
        # Accumulated, the loss is quadratic and comes as often as there are micro-batches.
        growth = (num / before.num) ** (3 if form == "accumulated" else 1.3)
        if form == "plain" and (need := before.peak * (num / before.num) ** 1.2) > 0.8 * available():
            row.note = f"not run: would take about {need / 1024:.0f} GiB"
        elif 1.5 * before.seconds * growth > left:
            row.note = f"not run: would take up to {before.seconds * growth:.0f} s"
    if row.note or left <= 0:
        row.note = row.note or "not run: time is up"
        return row
    found = child(row, budget, threads, left)
    if found and found["seconds"] <= LONGEST:
        found["peak"] = child(row, 0.0, threads, end - time.monotonic(), GIVES_BACK).get("peak", float("nan"))
    for name, value in found.items():
        setattr(row, name, value)
    return row


def child(
    row: Row, budget: float, threads: int | None, left: float, settings: Mapping[str, str] | None = None
) -> dict[str, float]:
    """What a fresh process measures; empty with a note in the row if nothing."""
    arguments = json.dumps([row.form, row.num, budget, threads])
    command = [sys.executable, "-m", "benchmarks.large_batch", "--child", arguments]
    environment = os.environ | dict(settings or {})
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(left, 1.0), check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        row.note = "stopped: time is up"
        return {}
    if done.returncode:
        row.note = f"failed ({done.returncode}): {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    return found if settings else {key: value for key, value in found.items() if key != "peak"}


def plain_of(rows: list[Row], num: int) -> Row | None:
    return next((row for row in rows if (row.form, row.num, row.note) == ("plain", num, "")), None)


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| batch | form | s | x plain | samples/s | peak MiB above the batch | batch MiB | loss | gradient |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row.note:
            cells = [row.note, *[""] * 6]
        else:
            plain = plain_of(rows, row.num)
            ratio = f"{row.seconds / plain.seconds:.2f}" if plain else ""
            rate = f"{row.num / row.seconds:.0f}"
            sizes = "" if math.isnan(row.peak) else f"{row.peak:.0f}", f"{row.inputs:.0f}"
            cells = [f"{row.seconds:.2f}", ratio, rate, *sizes, f"{row.loss:.5f}", f"{row.norm:.5f}"]
        lines.append(f"| {row.num} | {row.form} | {' | '.join(cells)} |")
    return lines


def verdicts(rows: list[Row]) -> list[str]:
    """The targets: peak nearly flat in the batch, and time at most 1.45 times plain."""
    lines = []
    sliced = [row for row in rows if row.form == "slices" and not row.note]
    ratios = {row.num: row.seconds / plain.seconds for row in sliced if (plain := plain_of(rows, row.num))}
    if ratios:
        worst = max(ratios, key=lambda num: ratios[num])
        met = "met" if ratios[worst] <= LIMIT else "MISSED"
        lines.append(f"Target (slices: <= {LIMIT} x plain): {ratios[worst]:.2f} x at batch {worst}: {met}.")
    if len(sliced) > 1:
        first, last = sliced[0], sliced[-1]
        per_row = (last.peak - first.peak) * 2**20 / (last.num - first.num)
        lines.append(
            f"Slices: from batch {first.num} to {last.num} the peak grows by {per_row / 1024:.1f} KiB a sample, beside "
            f"{last.inputs * 1024 / last.num:.1f} KiB of inputs and {2 * DIM * 4 / 1024:.1f} KiB of the two embeddings."
        )
    for num in dict.fromkeys(row.num for row in rows):
        for name in ("loss", "norm"):
            values = [getattr(row, name) for row in rows if row.num == num and not row.note]
            if values and max(values) - min(values) > 1e-4 * max(values):
                lines.append(f"VALUES DIFFER at batch {num}: {name} {values}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1,024 and 4,096 alone")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--threads", type=int, help="of torch; 1 where other programs use the cores too")
    parser.add_argument("--nums", nargs="+", type=int, help="batches instead of the usual ones")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    load = os.getloadavg()[0]
    nums = sorted(args.nums or (QUICK_NUMS if args.quick else NUMS))
    budget, limit = (8.0, 165.0) if args.quick else (40.0, 1700.0)
    end = time.monotonic() + limit
    rows: list[Row] = []
    for num in nums:
        for form in args.forms:
            before = next((row for row in reversed(rows) if row.form == form), None)
            rows.append(run(form, num, budget, args.threads, end, before))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows.sort(key=lambda row: row.num)
    command = " ".join(["python -m benchmarks.large_batch", *sys.argv[1:]])
    lines = [
        "# CLIP with large batches",
        "",
        f"Forward, loss and backward; ViT {VIT}, text tower {TEXT}; micro-batches of {MICRO_BATCH}, chunks of "
        f"{CHUNK_SIZE} rows. `{command}`",
        "",
        f"{hardware('torch', 'timm', 'open_clip_torch')}, load before {load:.1f}"
        + (f", {args.threads} thread(s) a measurement" if args.threads else ""),
        "",
        *table(rows),
        "",
        *verdicts(rows),
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
