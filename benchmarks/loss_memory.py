"""Time and peak memory of the pairwise losses: ours in chunks, ours plain, open_clip's, lightly's.

Run from the root of the repository, on an otherwise idle machine::

    python -m benchmarks.loss_memory            # N = 1024 ... 16384, at most half an hour on two cores
    python -m benchmarks.loss_memory --quick    # N = 4096, at most three minutes
    python -m benchmarks.loss_memory --write    # also writes benchmarks/results/loss_memory.md

A measurement is forward and backward of one loss on N x 512 float32 features on the CPU, in a process of its
own: the least time of several repetitions, and the peak of resident memory over all of them above what the
process held when the inputs were ready. All implementations get the same inputs and include the
normalisation; their values are compared.
"""

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/loss_memory.md"
DIM = 512
NUMS = [1024, 2048, 4096, 8192, 16384]
QUICK_NUMS = [4096]
SCALE, BIAS, TEMPERATURE = 14.3, -10.0, 0.1

# loss -> implementations. Those that hold the whole matrix ("plain") set the scale of time.
FORMS = {
    "clip": ["ours, chunks", "ours, plain", "open_clip ClipLoss"],
    "sigmoid": ["ours, chunks", "ours, plain", "open_clip SigLipLoss", "open_clip SigLipLoss, chunks"],
    "nt_xent": ["ours, chunks", "ours, plain", "lightly NTXentLoss"],
    # lightly's is the sum of alignment and of the uniformity of both views, so ours is too
    "uniformity": ["ours, chunks", "ours, plain", "lightly HypersphereLoss"],
}


# One measurement, in its own process --------------------------------------------------------------------------------


def build(loss: str, form: str, chunk: int) -> Callable:
    """A function of (x, y, scale, bias); raises ImportError where the library or its option is missing."""
    from torch.nn import functional as F  # noqa: N812

    from repr.losses import contrastive, hypersphere

    if form.startswith("ours"):
        size = chunk if form.endswith("chunks") else None
        return {
            "clip": lambda x, y, s, b: contrastive.clip(x, y, logit_scale=s, chunk_size=size),
            "sigmoid": lambda x, y, s, b: contrastive.sigmoid(x, y, logit_scale=s, logit_bias=b, chunk_size=size),
            "nt_xent": lambda x, y, s, b: contrastive.nt_xent(x, y, temperature=TEMPERATURE, chunk_size=size),
            "uniformity": lambda x, y, s, b: (
                hypersphere.alignment(x, y)
                + hypersphere.uniformity(x, chunk_size=size) / 2
                + hypersphere.uniformity(y, chunk_size=size) / 2
            ),
        }[loss]
    if form.startswith("open_clip"):
        from open_clip.loss import ClipLoss, SigLipLoss

        options = {}
        if form.endswith("chunks"):
            if "chunk_size" not in inspect.signature(SigLipLoss).parameters:
                raise ImportError("this open_clip has no chunk_size")
            options["chunk_size"] = chunk
        module = ClipLoss() if loss == "clip" else SigLipLoss(**options)
        bias = {"clip": lambda b: None, "sigmoid": lambda b: b}[loss]
        return lambda x, y, s, b: module(F.normalize(x), F.normalize(y), s, bias(b))
    if loss == "nt_xent":
        from lightly.loss import NTXentLoss

        module = NTXentLoss(temperature=TEMPERATURE)
    else:
        from lightly.loss.hypersphere_loss import HypersphereLoss

        module = HypersphereLoss(t=2.0, lam=1.0, alpha=2.0)
    return lambda x, y, s, b: module(x, y)


def resident(field: str) -> float:
    """A line of the process's own status (VmRSS, or VmHWM, its peak) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(loss: str, form: str, num: int, chunk: int, budget: float, threads: int | None) -> dict:
    import torch

    if threads:
        torch.set_num_threads(threads)
    try:
        function = build(loss, form, chunk)
    except ImportError as error:
        return {"note": f"not there: {error}"}

    def inputs(num: int) -> list:
        rng = torch.Generator().manual_seed(0)
        x, noise = (torch.randn(num, DIM, generator=rng) for _ in range(2))
        noise.add_(x)
        return [t.requires_grad_() for t in (x, noise, torch.tensor(SCALE), torch.tensor(BIAS))]

    function(*inputs(64)).backward()  # code is loaded and threads are started before anything is measured
    leaves = inputs(num)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        start, peak = resident("VmRSS"), lambda: resident("VmHWM")
    except OSError:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731

    seconds: list[float] = []
    while not seconds or (sum(seconds) < budget and len(seconds) < 20):
        for leaf in leaves:
            leaf.grad = None
        begin = time.perf_counter()
        value = function(*leaves)
        value.backward()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds), "repetitions": len(seconds), "peak": peak() - start, "value": value.item()}


# All measurements ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table; ``note`` says why there are no numbers."""

    loss: str
    num: int
    form: str
    seconds: float = float("nan")
    peak: float = float("nan")
    value: float = float("nan")
    repetitions: int = 0
    note: str = ""

    @property
    def plain(self) -> bool:
        """Whether the whole matrix is held."""
        return not self.form.endswith("chunks")


def available() -> float:
    """Free memory of the machine in MiB."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 1024


def run(loss: str, num: int, form: str, options: list, end: float, before: Row | None) -> Row:
    """A row, measured in a fresh process; ``before`` is the same at the last smaller N."""
    row = Row(loss, num, form)
    left = end - time.monotonic()
    if before is not None:
        growth = (num / before.num) ** 2
        if before.peak * growth > 0.7 * available():
            row.note = f"not run: would take about {before.peak * growth / 1024:.0f} GiB"
        elif before.seconds * growth > left:
            row.note = f"not run: would take about {before.seconds * growth:.0f} s"
        elif before.note:
            row.note = before.note
    if left <= 0:
        row.note = "not run: time is up"
    if row.note:
        return row
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--child", json.dumps([loss, form, num, *options])]
    try:
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        row.note = "stopped: time is up"
        return row
    if child.returncode:
        row.note = f"failed ({child.returncode}): {(child.stderr.strip().splitlines() or ['no message'])[-1]}"
        return row
    for name, value in json.loads(child.stdout.splitlines()[-1]).items():
        setattr(row, name, value)
    return row


def table(rows: list[Row]) -> str:
    lines = [
        "| loss | N | implementation | ms | x fastest plain | peak MiB | value |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        fastest = fastest_plain(rows, row.loss, row.num)
        if row.note:
            cells = [row.note, "", "", ""]
        else:
            cells = [
                f"{row.seconds * 1e3:.0f}",
                f"{row.seconds / fastest:.2f}" if fastest else "",
                f"{row.peak:.0f}",
                f"{row.value:.5g}",
            ]
        lines.append(f"| {row.loss} | {row.num} | {row.form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest_plain(rows: list[Row], loss: str, num: int) -> float | None:
    return min((r.seconds for r in rows if (r.loss, r.num, r.plain, r.note) == (loss, num, True, "")), default=None)


def disagreements(rows: list[Row]) -> list[str]:
    """Losses whose implementations give different values: then their times mean nothing."""
    found = []
    for loss, num in dict.fromkeys((r.loss, r.num) for r in rows):
        values = [r.value for r in rows if (r.loss, r.num, r.note) == (loss, num, "")]
        if values and max(values) - min(values) > 1e-4 * max(abs(v) for v in values):
            found.append(f"VALUES DIFFER for {loss} at N = {num}: {values}")
    return found


def verdict(rows: list[Row]) -> str:
    """The target: clip at N = 4096 in chunks, under 100 MiB and no slower than 1.3 times the fastest plain one."""
    fastest = fastest_plain(rows, "clip", 4096)
    chunked = [r for r in rows if (r.loss, r.num, r.plain, r.note) == ("clip", 4096, False, "")]
    if not chunked or fastest is None:
        return "Target (clip, N = 4096): not measured."
    ratio, peak = chunked[0].seconds / fastest, chunked[0].peak
    met = "met" if peak < 100 and ratio <= 1.3 else "MISSED"
    return (
        f"Target (clip, N = 4096, in chunks: < 100 MiB, <= 1.3 x fastest plain): {peak:.0f} MiB, {ratio:.2f} x: {met}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only N = 4096")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--chunk", type=int, default=256, help="rows of a chunk")
    parser.add_argument("--threads", type=int, help="of torch; 1 where other programs use the cores too")
    parser.add_argument("--losses", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--nums", nargs="+", type=int, help="values of N instead of the usual ones")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return

    load = os.getloadavg()[0]
    nums = sorted(args.nums or (QUICK_NUMS if args.quick else NUMS))
    budget, limit = (2.0, 165.0) if args.quick else (4.0, 1700.0)
    end = time.monotonic() + limit
    rows: list[Row] = []
    for num in nums:
        for loss in args.losses:
            for form in FORMS[loss]:
                before = next((r for r in reversed(rows) if (r.loss, r.form) == (loss, form)), None)
                rows.append(run(loss, num, form, [args.chunk, budget, args.threads], end, before))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    order = {loss: i for i, loss in enumerate(FORMS)}
    rows.sort(key=lambda row: (order[row.loss], row.num))  # a stable sort: implementations stay in order
    command = " ".join(["python -m benchmarks.loss_memory", *(a for a in sys.argv[1:])])
    lines = [
        "# Time and memory of pairwise losses",
        "",
        f"Forward and backward, N x {DIM} float32, chunks of {args.chunk} rows. `{command}`",
        "",
        f"{hardware('torch', 'open_clip_torch', 'lightly')}, load before {load:.1f}"
        + (f", {args.threads} thread(s) a measurement" if args.threads else ""),
        "",
        table(rows),
        "",
        verdict(rows),
        *disagreements(rows),
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
