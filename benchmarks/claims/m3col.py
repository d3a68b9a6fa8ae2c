"""Does a contrast of mixed samples lift the accuracy of a classifier of several modalities?

The same encoders, heads, optimizer, epochs and seeds; only terms of the loss change: the fusion head alone, unimodal
heads beside it, a plain CLIP term beside these, M3CoL. Run from the root of the repository::

    python -m benchmarks.claims.m3col            # five seeds, at most half an hour on two cores
    python -m benchmarks.claims.m3col --quick    # one seed and few epochs, at most three minutes
    python -m benchmarks.claims.m3col --write    # also writes benchmarks/results/m3col.md

Both cores work on one run each (``--jobs``); accuracy does not depend on it. Two sets: the embedded emoji with noise
over picture or caption, and drawn tables of three views.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.claims.seeds import ROOT, compared, evaluated, in_process
from benchmarks.report import hardware, publish

RESULTS = ROOT / "benchmarks/results/m3col.md"
WIDTHS = "[100,128,128]"
TABLES = [
    "experiment=m3col_tabular", "data.train.widths=[100,100,100]", "data.batch_size=120", "optim.lr=1e-3",
    *(f"objective.tables.view{i}.widths={WIDTHS}" for i in (1, 2, 3)), "objective.head_widths=[128]",
    "data.train.noise=4.0", "trainer.log_every_n_steps=50",
]  # fmt: skip
SETS = {  # overrides, evaluation set, heads, epochs, epochs with --quick
    "emoji": (["experiment=m3col_emoji", "data.bank_size=64"], "test_style", ["image_head", "text_head"], 4, 1),
    "tables": (TABLES, "val", ["view1_head", "view2_head", "view3_head"], 150, 20),
}
METHODS: dict[str, tuple[float, float, list[str]]] = {  # weights of the unimodal heads and of the contrast, overrides
    "concatenation": (0.0, 0.0, []),
    "+ unimodal heads": (1.0, 0.0, []),
    "+ CLIP": (1.0, 0.1, ["objective.switch=1", "objective.draw.fraction=0"]),  # as objective=m3col_clip
    "M3CoL": (1.0, 0.1, []),
}
METRICS = ("accuracy", "f1_macro", "f1_weighted", "auc")
Values = dict[str, float]  # metric of the fusion head -> value, and <head>_accuracy


def train(method: str, seed: int, quick: int) -> Values:
    """One run; the metrics of its evaluation. ``method`` is ``<set>: <method>``."""
    name, kind = method.split(": ")
    overrides, data, heads, epochs, few = SETS[name]
    unimodal, contrast, more = METHODS[kind]
    weights = [f"objective.weights.{head}={unimodal}" for head in heads] + [f"objective.weights.contrast={contrast}"]
    results = evaluated(
        [*overrides, *weights, *more, "eval.knn=null", "eval.ridge=null"], seed, few if quick else epochs
    )
    values = {metric: results[f"{data}/fusion_{metric}"][0] for metric in METRICS}
    values["chance"] = results[f"{data}/fusion_accuracy"][1] or 0.0
    return values | {head: results[f"{data}/{head}_accuracy"][0] for head in heads if unimodal}


def table(runs: dict[str, list[Values]], heads: list[str]) -> list[str]:
    columns = [*METRICS, *heads]
    names = [*(f"fusion {metric}" for metric in METRICS), *(f"{head} accuracy" for head in heads)]
    lines = [f"| method | {' | '.join(names).replace('_', ' ')} |", "|---|" + "---:|" * len(names)]
    for method, values in runs.items():
        cells = []
        for column in columns:
            found = [value[column] for value in values if column in value]
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chance = next(iter(runs.values()))[0]["chance"]
    return [*lines, f"| chance | {chance:.3f} |{' |' * (len(names) - 1)}"]


def verdict(runs: dict[str, list[Values]]) -> list[str]:
    """In words that follow from the numbers; a difference counts if a paired t-test over seeds finds it (5 %)."""
    lines = []
    for ours, theirs in (
        ("+ unimodal heads", "concatenation"),
        ("M3CoL", "concatenation"),
        ("M3CoL", "+ unimodal heads"),
        ("M3CoL", "+ CLIP"),
        ("+ CLIP", "+ unimodal heads"),
    ):
        pairs = [a["accuracy"] - b["accuracy"] for a, b in zip(runs[ours], runs[theirs], strict=True)]
        word, mean, error = compared(pairs)
        lines.append(f"- {ours} is {word} {theirs} ({mean:+.3f}{'' if error is None else f' ± {error:.3f}'}).")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, help="runs of each method; default 5, quick 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 5)
    start, load = time.monotonic(), hardware("torch", "timm", "open-clip-torch", "torchmetrics")
    with ThreadPoolExecutor(args.jobs) as pool:
        keys = [(f"{name}: {method}", seed) for seed in range(seeds) for name in SETS for method in METHODS]
        found = {key: pool.submit(in_process, "benchmarks.claims.m3col", *key, int(args.quick)) for key in keys}
        for (method, seed), future in found.items():
            if (error := future.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            accuracy = future.result()["accuracy"]
            print(
                f"{time.monotonic() - start:.0f} s: {method}, seed {seed}: {accuracy:.3f}", file=sys.stderr, flush=True
            )
    lines = [
        "# M3CoL: a contrast of mixed samples beside the cross-entropies",
        "",
        f"Mean and deviation over {seeds} seed(s). Encoders, heads, optimizer and epochs are the same; the terms "
        "of the loss differ.",
        "",
        f"`{' '.join(['python -m benchmarks.claims.m3col', *sys.argv[1:]])}`, {time.monotonic() - start:.0f} s; the "
        "load is that before.",
        "",
        load,
    ]
    for name, (_, data, heads, epochs, few) in SETS.items():
        runs = {m: [found[f"{name}: {m}", seed].result() for seed in range(seeds)] for m in METHODS}
        lines += [
            "",
            f"## {TITLES[name]}",
            "",
            f"{TEXTS[name]} {few if args.quick else epochs} epochs; set `{data}`.",
            "",
        ]
        lines += [*table(runs, heads), "", "Accuracy of the fusion head (paired t-test over seeds, 5 %):", ""]
        lines += verdict(runs)
    publish(lines, RESULTS if args.write else None)


TITLES = {"emoji": "Embedded emoji with noise", "tables": "Drawn tables of three views"}
TEXTS = {
    "emoji": "The category (nine classes) from picture and caption; three rows of ten have noise over the picture, "
    "five have other words in the caption (weight and share .8). The recipe of `conf/experiment/m3col_emoji.yaml`: a "
    "ViT of 4 blocks, width 128, at 32 pixels, batches of 64.",
    "tables": "Five classes from three blocks of 100 columns, 240 rows to train on and 1,000 to test; the blocks are "
    "views of one latent, with noise of their own. Encoders and heads of width 128, batches of 120.",
}

if __name__ == "__main__":
    main()
