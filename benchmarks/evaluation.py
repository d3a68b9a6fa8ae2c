"""kNN beside lightly's and the matrix product alone, and the linear sweep beside scikit-learn's.

python -m benchmarks.evaluation [--quick] [--write]

Needs `pip install -e '.[bench]'`. Features are drawn: a point for each class on the sphere, with noise. Everything is
timed in one process, the contestants by turns, a part of the queries each; memory in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.loss_memory import resident
from benchmarks.report import hardware, publish
from repr.metrics.features import Features
from repr.metrics.knn import knn_sweep, sizes
from repr.metrics.linear import logistic, split

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/evaluation.md"
K, TEMPERATURE = 200, 0.1  # lightly's own
PEER_CHUNK = 256  # queries that lightly's function gets at a time; its one-hot labels take 200 MB then
BUDGETS = (0.1, 0.25, 1.0)  # gigabytes


def table(num: int, width: int, num_classes: int, seed: int, spread: float = 0.6) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    label = torch.randint(num_classes, (num,), generator=generator)
    x = centres[label] + spread * width**0.25 * torch.randn(num, width, generator=generator)
    return Features(index=torch.arange(num), image=x, trunk=x, labels={"kind": label})


def rows(features: Features, part: slice) -> Features:
    x, label = features.trunk[part], features.labels["kind"][part]
    return Features(index=features.index[part], image=x, trunk=x, labels={"kind": label})


def timed(work: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def knn(num_bank: int, num_queries: int, width: int, num_classes: int) -> list[str]:
    from lightly.utils.benchmarking.knn import knn_predict

    bank, query = table(num_bank, width, num_classes, 1), table(num_queries, width, num_classes, 2)
    keys, labels = F.normalize(bank.trunk, dim=1), bank.labels["kind"]
    chunk = sizes(BUDGETS[-1], bank.trunk, torch.arange(num_bank), K, num_classes)[1]

    def ours(part: Features) -> float:
        values = knn_sweep(bank, part, attribute="kind", ks=[K], temperatures=[TEMPERATURE], memory=BUDGETS[-1])
        return values[f"knn_kind_k{K}_t{TEMPERATURE:g}"]

    def lightly(part: Features) -> float:
        found = [
            knn_predict(F.normalize(x, dim=1), keys.T, labels, num_classes, knn_k=K, knn_t=TEMPERATURE)[:, 0]
            for x in part.trunk.split(PEER_CHUNK)
        ]
        return (torch.cat(found) == part.labels["kind"]).double().mean().item()

    def floor(part: Features) -> float:
        for x in part.trunk.split(chunk):
            F.normalize(x, dim=1) @ keys.T
        return 0.0

    contestants = {"repr": ours, "lightly": lightly, "product": floor}
    seconds, hits = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0.0)
    num_parts = max(2, num_queries // 20_000)  # each pays for the bank anew, which a whole set does once
    for number in range(num_parts):
        part = rows(query, slice(number * num_queries // num_parts, (number + 1) * num_queries // num_parts))
        for name, work in contestants.items():
            took, found = timed(lambda work=work, part=part: work(part))  # type: ignore[misc]
            seconds[name] += took
            hits[name] += found * len(part.trunk)
    same = abs(hits["repr"] - hits["lightly"]) / num_queries
    return [
        f"kNN, {num_queries:,} queries and a bank of {num_bank:,} x {width}, {num_classes:,} classes, k {K}, "
        f"T {TEMPERATURE}; each in {num_parts} parts, by turns:",
        "",
        "| | seconds | of lightly's | over the product alone |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {seconds[key]:.1f} | {seconds[key] / seconds['lightly']:.2f} | "
            f"{seconds[key] / seconds['product']:.2f} |"
            for name, key in (
                ("`repr.metrics.knn`, budget 1 GB", "repr"),
                (f"lightly `knn_predict`, {PEER_CHUNK} queries at a time", "lightly"),
                ("the products of queries and bank alone", "product"),
            )
        ),
        "",
        f"Accuracy {hits['repr'] / num_queries:.4f}, lightly's {hits['lightly'] / num_queries:.4f} "
        f"(they differ by {same:.1g}; equal cosines in float32 may be taken in another order).",
        "",
    ]


def peak(memory: float, num_bank: int, width: int) -> None:
    """In a process of its own: how much the resident set grows while 8,192 queries are classified."""
    bank, query = table(num_bank, width, 1000, 1), table(8192, width, 1000, 2)
    knn_sweep(rows(bank, slice(0, 2000)), rows(query, slice(0, 10)), attribute="kind", ks=[K], temperatures=[0.1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; making the tables took more
    before = resident("VmRSS")
    knn_sweep(bank, query, attribute="kind", ks=[K], temperatures=[0.1], memory=memory)
    print(json.dumps({"grown": (resident("VmHWM") - before) * 2**20 / 1e9, "bank": bank.trunk.nbytes / 1e9}))


def memory(num_bank: int, width: int) -> list[str]:
    lines = ["| budget | peak above the tables | the bank |", "|---:|---:|---:|"]
    for budget in BUDGETS:
        command = [sys.executable, "-m", "benchmarks.evaluation", "--peak", str(budget), str(num_bank), str(width)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(f"| {budget} GB | {found['grown']:.2f} GB | {found['bank']:.2f} GB |")
    return [
        f"Memory of kNN with a bank of {num_bank:,} x {width}, 8,192 queries, in a process each, "
        "beside the tables. A bank that at unit length takes more than half of the budget is searched in blocks:",
        "",
        *lines,
        "",
    ]


def linear(num: int, width: int, num_classes: int) -> list[str]:
    from sklearn.linear_model import LogisticRegression

    bank, query = table(num, width, num_classes, 3, spread=2.0), table(num // 2, width, num_classes, 4, spread=2.0)
    found: dict[str, tuple[float, float]] = {}
    seconds, values = {}, {}
    start = time.perf_counter()
    values["repr"] = logistic(bank, query, attribute="kind")
    seconds["repr"] = time.perf_counter() - start
    x, y = bank.trunk.numpy(), bank.labels["kind"].numpy()
    fit, held = (part.numpy() for part in split(num, 0.2, 0))

    def score(exponent: float) -> float:
        model = LogisticRegression(C=10.0**exponent, max_iter=1000, tol=1e-4).fit(x[fit], y[fit])
        return float((model.predict(x[held]) == y[held]).mean())

    start = time.perf_counter()
    scores = {exponent: score(exponent) for exponent in (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)}
    for step in (1.0, 0.5, 0.25, 0.125):
        best = min(scores, key=lambda e: (-scores[e], e))
        for exponent in (best - step, best + step):
            if -6 <= exponent <= 6 and exponent not in scores:
                scores[exponent] = score(exponent)
    best = min(scores, key=lambda e: (-scores[e], e))
    model = LogisticRegression(C=10.0**best, max_iter=1000, tol=1e-4).fit(x, y)
    hits = float((model.predict(query.trunk.numpy()) == query.labels["kind"].numpy()).mean())
    seconds["peer"] = time.perf_counter() - start
    found = {
        "`repr.metrics.linear.logistic`": (values["repr"]["linear_kind"], values["repr"]["linear_kind_C"]),
        "scikit-learn `LogisticRegression`": (hits, 10.0**best),
    }
    return [
        f"Linear sweep of {num:,} x {width}, {num_classes} classes, float32: CLIP's search of C, {len(scores)} fits "
        "and the last one on all rows, tolerance 1e-4, at most 1,000 steps:",
        "",
        "| | seconds | of scikit-learn's | accuracy | C |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {took:.1f} | {took / seconds['peer']:.2f} | {value:.4f} | {c:.3g} |"
            for (name, (value, c)), took in zip(found.items(), seconds.values(), strict=True)
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it works")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--peak", nargs=3, metavar=("MEMORY", "BANK", "WIDTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(float(options.peak[0]), int(options.peak[1]), int(options.peak[2]))
        return
    num, queries, width = (20_000, 4_000, 768) if options.quick else (100_000, 100_000, 768)
    command = " ".join(["python -m benchmarks.evaluation", *sys.argv[1:]])
    lines = [
        "# Evaluation: kNN and the linear probe",
        "",
        f"`{command}`: {hardware('torch', 'lightly', 'scikit-learn')}",
        "",
    ]
    lines += knn(num, queries, width, 1000)
    lines += memory(num, width)
    lines += linear(*((2_000, 512, 20) if options.quick else (10_000, 768, 50)))
    publish(lines, RESULTS if options.write else None)


if __name__ == "__main__":
    main()
