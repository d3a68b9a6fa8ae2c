"""Does a loss of images beside CLIP's help on the embedded emoji, and more than the seconds that it takes?

SLIP adds SimCLR to CLIP; the other rows add another loss in its place, the last one a contrast of distorted views with
distorted captions (Fini et al., 2023, arXiv 2305.08675, who find that it gives most of what such losses do). The same
backbone, text tower, optimizer and number of steps. Controls: CLIP for about as many seconds, and CLIP on a distorted
view (the pictures of SLIP, without its loss).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, against, evaluated, table, trained

TITLE = "CLIP beside losses of images, on the embedded emoji"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (6, 1)
SMALL = ["image_size=32", "small_size=16", "backbone.name=test_resnet", "data.batch_size=128", "data.num_workers=0"]
HYBRID = ["experiment=slip_emoji"]
NO_SIMCLR = [f"~objective.{option}.simclr" for option in ("parts", "views", "weights")]
METHODS = {
    "random encoder": [*HYBRID, *NO_SIMCLR, "optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"],
    "CLIP": [*HYBRID, *NO_SIMCLR],
    "CLIP, as many seconds": [*HYBRID, *NO_SIMCLR],
    "CLIP, distorted view": [*HYBRID, *NO_SIMCLR, "objective.views.clip=[1]"],
    "+ SimCLR (SLIP)": HYBRID,
    "+ BYOL": ["experiment=clip_byol_emoji"],
    "+ SimSiam": ["experiment=clip_simsiam_emoji"],
    "+ Barlow Twins": ["experiment=clip_barlow_twins_emoji"],
    "+ SwAV": ["experiment=clip_swav_emoji"],
    "+ distorted views and captions": ["experiment=clip_rocket_emoji"],
}
LONGER = 2.5  # what a step with three views costs, in steps with one
COLUMNS = {
    "test_style/i2t_R@5": "R@5 of texts",
    "test_style/t2i_R@5": "R@5 of pictures",
    "val/zero_shot_top1": "zero-shot",
    "test_style/ridge_category": "probe category",
    "test_style/knn_category": "kNN category",
}


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    length = round(epochs * LONGER) if method == "CLIP, as many seconds" else epochs
    results = evaluated([*METHODS[method], *SMALL], seed, length)
    return {title: results[name][0] for name, title in COLUMNS.items()}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 43 steps with 128 pictures, "
        "timm's `test_resnet` at 32 pixels; else `conf/experiment/slip_emoji.yaml` and its kin. `test_style`: concepts "
        f"of the training set, drawn by a vendor never trained on. The longer control has {LONGER:g} times the epochs."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    yield table(runs, list(COLUMNS.values()))
    aligned, probes = list(COLUMNS.values())[:3], list(COLUMNS.values())[3:]
    kinds = {"retrieval and zero-shot": aligned, "probes": probes}
    yield against(runs, list(METHODS)[2:], ("CLIP", "CLIP, as many seconds"), kinds)
