"""Do samples of arbitrary classes teach the classes, and is it the gate that lets them?

The same backbone, pictures, views, optimizer and number of steps; pairs, gate or the objective change. Of drawn objects
only the shape is told; ridge probes look at all three attributes, on combinations of them that were never trained on.

The claim (Wu et al., 2024, arXiv 2410.18200): any two classes may be drawn together in the dimensions that a learned
gate opens for them. So without a gate such pairs must teach nothing of the class, and with it as much as pairs of one
class, which is supervised contrast.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained

TITLE = "Contrast of pairs of classes"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (3, 1), (4, 4)
SMALL = ["experiment=class_pairs_trifeature", "eval.knn=null", "eval.exhibits=null"]
OPEN, ONE_CLASS = "objective.gate=open", "objective.pairs=identical"
ARBITRARY, UNGATED, SUPERVISED = "arbitrary pairs, gate", "arbitrary pairs, gate open", "pairs of one class, gate open"
METHODS = {
    "random encoder": [*SMALL, "optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"],
    SUPERVISED: [*SMALL, OPEN, ONE_CLASS],
    ARBITRARY: SMALL,
    "arbitrary pairs, gate of each class": [*SMALL, "objective.gate=product"],
    "arbitrary pairs, gate, renormalised": [*SMALL, "objective.renormalise=true"],
    UNGATED: [*SMALL, OPEN],
}
METRICS = {
    **{name: f"held_out/ridge_{name}" for name in ("shape", "colour", "texture")},
    "effective rank": "held_out/effective_rank_image",
}


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the numbers of its evaluation."""
    results = evaluated(METHODS[method], seed, epochs)
    return {name: results[key][0] for name, key in METRICS.items()}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 37 steps with 128 pictures, "
        "timm's `test_resnet` at 32 pixels, AdamW; the recipe of `conf/experiment/class_pairs_trifeature.yaml`. Ridge "
        "probe on the trunk, of 200 combinations of shape, colour and texture that were never trained on; the shape is "
        "the label, so its probe is not that of a method without labels."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    lines = [*table(runs, list(METRICS), chance=dict.fromkeys(("shape", "colour", "texture"), 0.1)), ""]
    for ours, theirs in ((ARBITRARY, UNGATED), (ARBITRARY, SUPERVISED), (UNGATED, "random encoder")):
        told = []
        for name in ("shape", "colour", "texture"):
            result = compared(runs[ours], runs[theirs], [name])
            told.append(f"{name} {result.word} ({result.told})")
        lines.append(f"- {ours} against {theirs}: {', '.join(told)}.")
    yield lines
