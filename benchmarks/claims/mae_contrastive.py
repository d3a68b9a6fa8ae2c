"""Does a contrastive term lift what a linear probe finds in a masked autoencoder?

The same ViT, pictures, optimizer and number of steps; only the objective changes. Run from the root of the repository::

    python -m benchmarks.claims.mae_contrastive            # three seeds, at most half an hour on two cores
    python -m benchmarks.claims.mae_contrastive --quick    # one seed and few steps, at most three minutes
    python -m benchmarks.claims.mae_contrastive --write    # also writes benchmarks/results/mae_contrastive.md

Both cores work on one run each (``--jobs``); accuracy does not depend on it. Encoders are probed on unmasked pictures,
by the mean of their patches (what the contrast sees) and by their class token. CLIP is the same flow with nothing
masked and nothing rebuilt. Contrastive MAE alone has two views a picture, with changed colours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.claims.seeds import ROOT, compared, evaluated, in_process
from benchmarks.report import hardware, publish

RESULTS = ROOT / "benchmarks/results/mae_contrastive.md"
METHODS = {
    "random encoder": ["experiment=mae_emoji", "optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"],
    "MAE": ["experiment=mae_emoji"],
    "CLIP": ["experiment=mae_clip_emoji", "+objective.masking.ratio=0", "objective.weights.reconstruction=0"],
    "MAE + CLIP, random": ["experiment=mae_clip_emoji"],
    "MAE + CLIP, text-guided": ["experiment=mae_clip_tgm_emoji"],
    "contrastive MAE": ["experiment=cmae_emoji"],
}
PROBES = {
    "kNN category": "knn_category",
    "probe category": "ridge_category",
    "kNN concept": "knn_concept",
    "probe concept": "ridge_concept",
}
SETS = {"test_style": list(PROBES), "val": ["kNN category", "probe category"]}
POOLINGS = {"mean of patches": "", "class token": "class_token_"}
CHANCE = {"test_style/category": 0.222, "val/category": 0.189, "test_style/concept": 0.0007}
Values = dict[str, dict[str, float]]  # pooling -> number -> value


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    results = evaluated(METHODS[method], seed, epochs)
    return {
        pooling: {
            f"{data}/{name}": results[f"{data}/{prefix}{PROBES[name]}"][0] for data in SETS for name in SETS[data]
        }
        for pooling, prefix in POOLINGS.items()
    }


def run(method: str, seed: int, epochs: int, kept: Path | None) -> Values:
    """The same in a process with one thread; or what ``kept`` holds of it, where it was run before."""
    file = None if kept is None else kept / f"{method}, seed {seed}, {epochs} epochs.json"
    if file is not None and file.is_file():
        return json.loads(file.read_text())
    values = in_process("benchmarks.claims.mae_contrastive", method, seed, epochs)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return values


def table(runs: dict[str, list[Values]], pooling: str) -> str:
    names = list(next(iter(runs.values()))[0][pooling])
    lines = [f"| {pooling} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for method, values in runs.items():
        columns = [[value[pooling][name] for value in values] for name in names]
        cells = [
            f"{statistics.mean(column):.3f}" + (f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else "")
            for column in columns
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chance = [CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names]
    return "\n".join([*lines, f"| chance | {' | '.join(str(value) for value in chance)} |"])


def verdict(runs: dict[str, list[Values]], pooling: str) -> list[str]:
    """In words that follow from the numbers; a difference counts if a paired t-test over seeds finds it (5 %)."""

    def compare(ours: str, theirs: str, kind: str) -> str:
        names = [name for name in runs[ours][0][pooling] if name.split("/")[1].startswith(kind)]
        pairs = [
            statistics.mean(a[pooling][name] - b[pooling][name] for name in names)
            for a, b in zip(runs[ours], runs[theirs], strict=True)
        ]
        word, mean, error = compared(pairs)
        spread = "" if error is None else f" ± {error:.3f}"
        return f"{kind} {word} ({mean:+.3f}{spread})"

    pairs = [
        ("MAE", "random encoder"),
        ("MAE + CLIP, random", "MAE"),
        ("MAE + CLIP, text-guided", "MAE"),
        ("contrastive MAE", "MAE"),
        ("MAE + CLIP, random", "CLIP"),
        ("MAE + CLIP, text-guided", "MAE + CLIP, random"),
    ]
    return [
        f"- {ours} against {theirs}: {compare(ours, theirs, 'probe')}, {compare(ours, theirs, 'kNN')}."
        for ours, theirs in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, help="runs of each method; default 3, quick 1")
    parser.add_argument("--epochs", type=int, help="of each run; default 6, quick 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--kept", type=Path, help="a folder for results of single runs; those in it are not run again")
    args = parser.parse_args()
    epochs, seeds = args.epochs or (1 if args.quick else 6), args.seeds or (1 if args.quick else 3)
    start, load = time.monotonic(), hardware("torch", "timm", "open-clip-torch")
    with ThreadPoolExecutor(args.jobs) as pool:
        keys = [(method, seed) for seed in range(seeds) for method in METHODS]
        found = {key: pool.submit(run, *key, epochs, args.kept) for key in keys}
        for (method, seed), future in found.items():
            if (error := future.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            numbers = {name: round(value, 3) for name, value in future.result()["mean of patches"].items()}
            print(f"{time.monotonic() - start:.0f} s: {method}, seed {seed}: {numbers}", file=sys.stderr, flush=True)
    runs = {method: [found[method, seed].result() for seed in range(seeds)] for method in METHODS}
    lines = [
        "# Masked autoencoding with contrast on the embedded emoji",
        "",
        f"Mean and deviation over {seeds} seed(s), {epochs} epoch(s) of 87 steps with 64 pictures, a ViT of 4 blocks, "
        "width 128, on 16 patches of 8 pixels, AdamW; the recipes of `conf/experiment/mae_emoji.yaml` and, beside it, "
        "`mae_clip_emoji`, `mae_clip_tgm_emoji`, `cmae_emoji`. kNN and ridge probe on unmasked pictures. `test_style`: "
        "concepts of the training set, drawn by a vendor never trained on; `val`: concepts never trained on. Captions "
        "name the concept, so the image-text methods are told what the probes ask; MAE and contrastive MAE see "
        "pictures alone. Text-guided masks come from the flow's own towers.",
        "",
        f"`{' '.join(['python -m benchmarks.claims.mae_contrastive', *sys.argv[1:]])}`, "
        f"{time.monotonic() - start:.0f} s; the load is that before.",
        "",
        load,
        "",
    ]
    for pooling in POOLINGS:
        lines += [table(runs, pooling), ""]
    lines += ["By the mean of patches, averaged over the sets (a paired t-test over seeds, 5 %):", ""]
    publish([*lines, *verdict(runs, "mean of patches")], RESULTS if args.write else None)


if __name__ == "__main__":
    main()
