"""Clustering between the stages of MCL: time and peak memory for a million features, against the authors' call.

Run from the root of the repository::

    python -m benchmarks.clustering            # 1,000,000 x 512 float32, 2 GB; some minutes and 6 GB of memory
    python -m benchmarks.clustering --quick    # 50,000 x 512
    python -m benchmarks.clustering --write    # also writes benchmarks/results/clustering.md

Features are generated: unit vectors around 100 centres. Both are scikit-learn's MiniBatchKMeans with ten clusters: ours
as ``conf/procedure/multistage.yaml`` sets it, through the function that stages call; the authors' (MCL, ``cluster.py``)
with batches of a million. Each runs in a process of its own, whose memory is the whole process's, interpreter and
libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/clustering.md"
DIM, LIMIT = 512, 3.0  # width of the features; peak memory in sizes of the array
METHODS = {
    "ours": {},
    "the authors' call": {"batch_size": 1_000_000, "max_iter": 100, "tol": 1e-5, "n_init": 1},
}


def features(num: int) -> np.ndarray:
    """(num, DIM) float32 of unit length, made block by block, so that the peak is not that of making them."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((100, DIM), dtype=np.float32)
    rows = np.empty((num, DIM), np.float32)
    for start in range(0, num, 10_000):
        block = rows[start : start + 10_000]
        block[:] = centres[generator.integers(100, size=len(block))]
        block += 1.5 * generator.standard_normal(block.shape, dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return rows


def measure(method: str, num: int) -> dict[str, float]:
    """Seconds, of the clock and of the CPU, peak memory in GB, and mean squared distance to the own centre."""
    from repr.config import compose
    from repr.procedures.features import cluster

    options = compose(["procedure=multistage"]).procedure.clustering
    options.update(METHODS[method])
    rows = features(num)
    start, start_cpu = time.monotonic(), time.process_time()
    ids, centroids = cluster({"image": rows}, np.ones(num, bool), options, 0)
    seconds, cpu = time.monotonic() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    centres, spread = centroids["image"], 0.0
    for first in range(0, num, 10_000):  # in blocks, and after the peak was read
        part = slice(first, first + 10_000)
        spread += float(np.square(rows[part] - centres[ids[part]]).sum()) / num
    return {"seconds": seconds, "cpu": cpu, "peak": peak / 1e9, "ratio": peak / rows.nbytes, "spread": spread}


def run(method: str, num: int) -> dict[str, float]:
    """The same in a process of its own."""
    program = (
        "import json, sys; from benchmarks.clustering import measure; "
        "print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, method, str(num)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{method}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 features")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    num = 50_000 if args.quick else 1_000_000
    found = {method: run(method, num) for method in METHODS}
    array, ours, theirs = num * DIM * 4 / 1e9, found["ours"], found["the authors' call"]
    word = "within" if ours["ratio"] <= LIMIT else "above"
    verdict = f"Peak memory is {ours['ratio']:.2f} times the array, {word} {LIMIT:g}."
    if args.quick:
        verdict = (
            "With so few features the interpreter and its libraries outweigh the array; the limit is for a million."
        )
    lines = [
        "# Clustering of features",
        "",
        f"{num:,} x {DIM} float32 ({array:.2f} GB), ten clusters.",
        "",
        f"`{' '.join(['python -m benchmarks.clustering', *sys.argv[1:]])}`",
        "",
        hardware("scikit-learn", "numpy", "torch"),
        "",
        "| | seconds | CPU seconds | of the authors' | peak memory, GB | sizes of the array | mean squared distance |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {method} | {row['seconds']:.0f} | {row['cpu']:.0f} | {row['cpu'] / theirs['cpu']:.2f} "
            f"| {row['peak']:.2f} | {row['ratio']:.2f} | {row['spread']:.4f} |"
            for method, row in found.items()
        ),
        "",
        verdict,
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
