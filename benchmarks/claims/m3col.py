"""Does a contrast of mixed samples lift the accuracy of a classifier of several modalities?

The same encoders, heads, optimizer, epochs and seeds; only terms of the loss change: the fusion head alone, unimodal
heads beside it, a plain CLIP term beside these, M3CoL. Two sets: the embedded emoji with noise over picture or caption,
and drawn tables of three views.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained

TITLE = "M3CoL: a contrast of mixed samples beside the cross-entropies"
LIBRARIES = ("torch", "timm", "open-clip-torch", "torchmetrics")
SEEDS, LENGTH = (5, 1), (4, 1)
WIDTHS = "[100,128,128]"
TABLES = [
    "experiment=m3col_tabular", "data.train.widths=[100,100,100]", "data.batch_size=120", "optim.lr=1e-3",
    *(f"objective.tables.view{i}.widths={WIDTHS}" for i in (1, 2, 3)), "objective.head_widths=[128]",
    "data.train.noise=4.0", "trainer.log_every_n_steps=50",
]  # fmt: skip
SETS = {  # overrides, evaluation set, heads, epochs for each unit of length
    "emoji": (["experiment=m3col_emoji", "data.bank_size=64"], "test_style", ["image_head", "text_head"], 1.0),
    "tables": (TABLES, "val", ["view1_head", "view2_head", "view3_head"], 37.5),
}
METHODS: dict[str, tuple[float, float, list[str]]] = {  # weights of the unimodal heads and of the contrast, overrides
    "concatenation": (0.0, 0.0, []),
    "+ unimodal heads": (1.0, 0.0, []),
    "+ CLIP": (1.0, 0.1, ["objective.mixing.switch=1", "objective.mixing.draw.fraction=0"]),  # as objective=m3col_clip
    "M3CoL": (1.0, 0.1, []),
}
METRICS = ("accuracy", "f1_macro", "f1_weighted", "auc")
PAIRS = [
    ("+ unimodal heads", "concatenation"),
    ("M3CoL", "concatenation"),
    ("M3CoL", "+ unimodal heads"),
    ("M3CoL", "+ CLIP"),
    ("+ CLIP", "+ unimodal heads"),
]
TITLES = {"emoji": "Embedded emoji with noise", "tables": "Drawn tables of three views"}
TEXTS = {
    "emoji": "The category (nine classes) from picture and caption; three rows of ten have noise over the picture, "
    "five have other words in the caption (weight and share .8). The recipe of `conf/experiment/m3col_emoji.yaml`: a "
    "ViT of 4 blocks, width 128, at 32 pixels, batches of 64.",
    "tables": "Five classes from three blocks of 100 columns, 240 rows to train on and 1,000 to test; the blocks are "
    "views of one latent, with noise of their own. Encoders and heads of width 128, batches of 120.",
}


def train(method: str, seed: int, length: int) -> Values:
    """One run; metrics of the fusion head, their level at chance, and the accuracy of the other heads.

    Args:
        method: ``<set>: <method>``.
        seed: of the run.
        length: of the run; 4 are 4 epochs of the emoji, and 150 of the tables.
    """
    name, kind = method.split(": ")
    overrides, data, heads, epochs = SETS[name]
    unimodal, contrast, more = METHODS[kind]
    weights = [f"objective.weights.{head}={unimodal}" for head in heads] + [f"objective.weights.contrast={contrast}"]
    results = evaluated([*overrides, *weights, *more, "eval.knn=null", "eval.ridge=null"], seed, round(epochs * length))
    values = {metric: results[f"{data}/fusion_{metric}"][0] for metric in METRICS}
    values["chance"] = results[f"{data}/fusion_accuracy"][1] or 0.0
    return values | {head: results[f"{data}/{head}_accuracy"][0] for head in heads if unimodal}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s). Encoders, heads, optimizer and epochs are the same; the "
        "terms of the loss differ."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    every = trained([f"{name}: {method}" for name in SETS for method in METHODS], options)
    for name, (_, data, heads, epochs) in SETS.items():
        runs = {method: every[f"{name}: {method}"] for method in METHODS}
        columns = {metric: f"fusion {metric}".replace("_", " ") for metric in METRICS}
        columns |= {head: f"{head} accuracy".replace("_", " ") for head in heads}
        yield [f"## {TITLES[name]}", "", f"{TEXTS[name]} {round(epochs * options.length)} epochs; set `{data}`."]
        yield table(runs, columns, chance={"accuracy": runs["M3CoL"][0]["chance"]})
        lines = ["Accuracy of the fusion head (paired t-test over seeds, 5 %):", ""]
        for ours, theirs in PAIRS:
            result = compared(runs[ours], runs[theirs], ["accuracy"])
            lines.append(f"- {ours} is {result.word} {theirs} ({result.told}).")
        yield lines
