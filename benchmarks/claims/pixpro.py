"""Does training on cells (PixPro, PixContrast) beat training on whole pictures (SimCLR) on dense tasks?

The same backbone, pictures, views, optimizer and number of steps; only the objective changes. Run from the root of the
repository::

    python -m benchmarks.claims.pixpro            # three seeds, at most half an hour on two cores
    python -m benchmarks.claims.pixpro --quick    # one seed and few steps, at most three minutes
    python -m benchmarks.claims.pixpro --write    # also writes benchmarks/results/pixpro.md

Both cores work on one run each (``--jobs``); the numbers do not depend on it. All methods are evaluated on the same
drawn scenes: the crops of correspondence, and the cells of the bank, are the same in every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.claims.seeds import ROOT, compared, evaluated, in_process
from benchmarks.report import hardware, publish

RESULTS = ROOT / "benchmarks/results/pixpro.md"
METHODS = {
    "random encoder": [
        "experiment=simclr_scenes",
        "optim.lr=0",
        "optim.warmup_steps=0",
        "trainer.limit_train_batches=1",
    ],
    "SimCLR": ["experiment=simclr_scenes"],
    "PixContrast": ["experiment=pixcontrast_scenes"],
    "PixPro": ["experiment=pixpro_scenes"],
    "PixPro + instance": ["experiment=pixpro_scenes", "objective.weights.instance=1"],
}
MASKS = ("figure", "shape", "colour", "texture")
DENSE = {f"linear mIoU {mask}": f"linear_miou_{mask}" for mask in MASKS}
DENSE |= {f"kNN mIoU {mask}": f"knn_miou_{mask}" for mask in MASKS}
DENSE |= {"correspondence": "correspondence@0.5", "within a cell": "correspondence@1"}
WHOLE = {f"kNN {name}": f"knn_{name}" for name in ("shape", "colour", "texture", "count")}
Values = dict[str, tuple[float, float]]  # column -> value and level at chance


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the numbers of its evaluation."""
    results = evaluated(METHODS[method], seed, epochs)
    return {column: results[f"val/{metric}"] for column, metric in (DENSE | WHOLE).items()}


def run(method: str, seed: int, epochs: int) -> Values:
    """The same in a process with one thread."""
    values = in_process("benchmarks.claims.pixpro", method, seed, epochs)
    return {column: tuple(pair) for column, pair in values.items()}


def table(runs: dict[str, list[Values]], columns: Sequence[str]) -> str:
    lines = [f"| method | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for method, values in runs.items():
        cells = []
        for column in columns:
            numbers = [value[column][0] for value in values]
            spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.mean(numbers):.3f}{spread}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chance = next(iter(runs.values()))[0]
    return "\n".join([*lines, f"| chance | {' | '.join(f'{chance[column][1]:.3f}' for column in columns)} |"])


def verdict(runs: dict[str, list[Values]]) -> list[str]:
    """In words that follow from the numbers; a difference counts if a paired t-test over seeds finds it (5 %)."""

    def compare(ours: str, theirs: str, what: str, columns: Sequence[str]) -> str:
        pairs = [
            statistics.mean(a[column][0] - b[column][0] for column in columns)
            for a, b in zip(runs[ours], runs[theirs], strict=True)
        ]
        word, mean, error = compared(pairs)
        return f"- {what}: {ours} {word} {theirs}, {mean:+.3f}" + (
            "." if error is None else f" ± {error:.3f} on average."
        )

    kinds = {
        "linear mIoU": [column for column in DENSE if column.startswith("linear")],
        "kNN mIoU": [column for column in DENSE if column.startswith("kNN")],
        "correspondence": ["correspondence"],
        "kNN of whole pictures": list(WHOLE),
    }
    pairs = [(method, "SimCLR") for method in ("PixContrast", "PixPro", "PixPro + instance")]
    pairs += [(method, "random encoder") for method in METHODS if method != "random encoder"]
    return [compare(*pair, what, columns) for what, columns in kinds.items() for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, help="runs of each method; default 3, quick 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    args = parser.parse_args()
    epochs, seeds = (1, args.seeds or 1) if args.quick else (3, args.seeds or 3)
    start = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        found = {(method, seed): pool.submit(run, method, seed, epochs) for method in METHODS for seed in range(seeds)}
        for (method, seed), future in found.items():
            if (error := future.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            numbers = {name: round(value, 3) for name, (value, _) in future.result().items()}
            print(f"{time.monotonic() - start:.0f} s: {method}, seed {seed}: {numbers}", file=sys.stderr, flush=True)
    runs = {method: [found[method, seed].result() for seed in range(seeds)] for method in METHODS}
    lines = [
        "# Training on cells and on whole pictures, on drawn scenes",
        "",
        f"Mean and deviation over {seeds} seed(s), {epochs} epoch(s) of 62 steps with 64 pictures, timm's "
        "`test_resnet` with a map of 6 x 6 cells at 48 pixels, AdamW; views and learning rate of "
        "`conf/experiment/simclr_scenes.yaml`. Segmentation: mIoU of the pixels of scenes never trained on, the ground "
        "as a class, from frozen cells. Correspondence: the share of cells whose nearest neighbour in another crop "
        "shows the same place. kNN: shape, colour and texture of the largest object, and the number of objects.",
        "",
        f"`{' '.join(['python -m benchmarks.claims.pixpro', *sys.argv[1:]])}`, {time.monotonic() - start:.0f} s.",
        "",
        hardware("torch", "timm"),
        "",
        table(runs, [column for column in DENSE if "mIoU" in column]),
        "",
        table(runs, [column for column in (*DENSE, *WHOLE) if "mIoU" not in column]),
        "",
        *verdict(runs),
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
