"""Do positives that are hallucinated help SimCLR on the embedded emoji, and what do they cost?

The controls have all of it but the step beyond a view, a third real view in its place, and twice the loss. The form is
ours, since the paper (Wu et al., 2023, arXiv 2307.12168) has no code; its gains, after hundreds of epochs, are .3 to 3
points, at the edge of what seeds differ by here.
"""

from __future__ import annotations

import csv
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.claims.runs import Values, against, composed, table, trained
from benchmarks.claims.swav import CHANCE, numbers
from repr.fit import fit

TITLE = "Hallucinated positives on the embedded emoji"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (3, 1), (6, 1)
BEYOND = "+ hallucination"
METHODS = {
    "SimCLR": ["experiment=simclr_emoji"],
    BEYOND: ["experiment=simclr_hallucination_emoji"],
    "+ hallucination, not beyond the view": ["experiment=simclr_hallucination_emoji", "+objective.extrapolation=0"],
    "SimCLR, three views": ["experiment=simclr_emoji", "views.main.count=3"],
    "SimCLR, twice the loss": ["experiment=simclr_emoji", "objective.weights.contrast=2"],
}
COSINE, SECONDS = "cosine of the hallucinated", "CPU s"


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation, the last cosine of the hallucinated with its view, and what it took."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = fit(composed(METHODS[method], seed, epochs, folder))
        with (Path(folder) / "metrics.csv").open(newline="") as file:
            cosines = [float(cell) for row in csv.DictReader(file) if (cell := row.get("train/cos_extrapolated"))]
    return numbers(results) | ({COSINE: cosines[-1]} if cosines else {}) | {SECONDS: time.process_time() - start}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures, "
        "timm's `test_resnet` at 32 pixels, AdamW, `conf/experiment/simclr_emoji.yaml`. kNN and ridge probe on the "
        "trunk. `test_style`: concepts of the training set, drawn by a vendor never trained on; `val`: concepts never "
        "trained on. Seconds of one core are of the whole run, with data and evaluation, beside another run."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    names = [name for name in runs["SimCLR"][0] if name != SECONDS]
    chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
    yield table(runs, [*names, COSINE, SECONDS], chance=chance)
    kinds = {kind: [name for name in names if f"/{kind}" in name] for kind in ("kNN", "probe")}
    yield against(runs, [BEYOND], [method for method in METHODS if method != BEYOND], kinds)
