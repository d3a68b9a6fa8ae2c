"""Does training on cells (PixPro, PixContrast) beat training on whole pictures (SimCLR) on dense tasks?

The same backbone, pictures, views, optimizer and number of steps; only the objective changes. All methods are evaluated
on the same drawn scenes: the crops of correspondence, and the cells of the bank, are the same in every run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained

TITLE = "Training on cells and on whole pictures, on drawn scenes"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (3, 1), (12, 1)
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
KINDS = {
    "linear mIoU": [column for column in DENSE if column.startswith("linear")],
    "kNN mIoU": [column for column in DENSE if column.startswith("kNN")],
    "correspondence": ["correspondence"],
    "kNN of whole pictures": list(WHOLE),
}
CHANCE = " at chance"  # ends the name of the level at chance of a number


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the numbers of its evaluation, and their levels at chance."""
    results = evaluated(METHODS[method], seed, epochs)
    pairs = {column: results[f"val/{metric}"] for column, metric in (DENSE | WHOLE).items()}
    return {c: value for c, (value, _) in pairs.items()} | {f"{c}{CHANCE}": level for c, (_, level) in pairs.items()}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 62 steps with 64 pictures, "
        "timm's `test_resnet` with a map of 6 x 6 cells at 48 pixels, AdamW; views and learning rate of "
        "`conf/experiment/simclr_scenes.yaml`. Segmentation: mIoU of the pixels of scenes never trained on, the ground "
        "as a class, from frozen cells. Correspondence: the share of cells whose nearest neighbour in another crop "
        "shows the same place. kNN: shape, colour and texture of the largest object, and the number of objects."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    first = runs["SimCLR"][0]
    chance = {column: first[f"{column}{CHANCE}"] for column in DENSE | WHOLE}
    yield table(runs, [column for column in DENSE if "mIoU" in column], chance=chance)
    yield table(runs, [column for column in DENSE | WHOLE if "mIoU" not in column], chance=chance)
    pairs = [(method, "SimCLR") for method in ("PixContrast", "PixPro", "PixPro + instance")]
    pairs += [(method, "random encoder") for method in METHODS if method != "random encoder"]
    lines = []
    for kind, columns in KINDS.items():
        for ours, theirs in pairs:
            result = compared(runs[ours], runs[theirs], columns)
            lines.append(f"- {kind}: {ours} {result.word} {theirs}, {result.told} on average.")
    yield lines
