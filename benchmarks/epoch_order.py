"""Memory and time of the order of an epoch, from a million to a billion samples.

Run from the root of the repository::

    python -m benchmarks.epoch_order          # seconds
    python -m benchmarks.epoch_order --write  # also writes benchmarks/results/epoch_order.md

A batch is 4,096 places of a random batch of the epoch, as a sampler gives them to a loader.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.data import private_bytes
from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/epoch_order.md"
BATCH, REPETITIONS = 4096, 50
LIMIT_MB, LIMIT_MS = 100, 5
SETS: dict[str, list[tuple[int, float]]] = {
    "a million": [(10**6, 1.0)],
    "a billion": [(10**9, 1.0)],
    "a billion in two parts, weights 1.5 and 0.5": [(5 * 10**8, 1.5), (5 * 10**8, 0.5)],
}


def measure(name: str) -> dict[str, float]:
    """Seconds and bytes of one set, in a process of its own."""
    from repr.data.epoch_order import EpochOrder
    from repr.data.samplers import EpochBatchSampler

    torch.set_num_threads(1)
    before = private_bytes()
    order = EpochOrder(SETS[name], seed=0)
    last = len(order) // BATCH - 1
    times = []
    for epoch in range(REPETITIONS):
        batches = iter(EpochBatchSampler(order, BATCH, epoch=epoch, start=last * epoch // REPETITIONS))
        begin = time.process_time()
        next(batches)
        times.append(time.process_time() - begin)
    return {"held": private_bytes() - before, "median": median(times), "first": times[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a million samples alone")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    table = ["| samples | held MB | a batch ms, median | the first |", "| --- | ---: | ---: | ---: |"]
    for name in list(SETS)[: 1 if args.quick else None]:
        command = [sys.executable, "-m", "benchmarks.epoch_order", "--child", name]
        found = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
        held, middle = found["held"] / 1e6, found["median"] * 1e3
        met = "" if held < LIMIT_MB and middle < LIMIT_MS else " MISSED"
        table.append(f"| {name} | {held:.1f} | {middle:.2f}{met} | {found['first'] * 1e3:.2f} |")
    lines = [
        "# The order of an epoch",
        "",
        f"`{' '.join(['python -m benchmarks.epoch_order', *sys.argv[1:]])}`: batches of {BATCH:,} places, "
        f"{REPETITIONS} of them in as many epochs; CPU time of one thread, private memory. An order in memory held 16 "
        f"bytes a sample, 16,000 MB at a billion. Target: at most {LIMIT_MB} MB and {LIMIT_MS} ms a batch.",
        "",
        hardware("torch", "numpy"),
        "",
        *table,
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
