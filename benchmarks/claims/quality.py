"""Do our methods learn what other libraries' do in as many steps, and in how many seconds?

The same backbone, pictures, views, optimizer and number of steps, in the same Trainer with the same evaluation; only
heads, loss and teacher are those of lightly or stable-pretraining, put together as in their documentation and as wide
as ours. The libraries' own views, loops and schedules are not compared. lightly has no MoCo v3. SwAV's prototypes move
from the first step, as they do there; stable-pretraining assigns all views to them, lightly the large ones, as the
authors do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.claims.peers import MAKES, become_peer
from benchmarks.claims.runs import Values, against, composed, table, trained
from benchmarks.claims.swav import CHANCE, numbers
from repr.fit import fit
from repr.runs.folder import Results

TITLE = "Methods beside those of other libraries, on the embedded emoji"
LIBRARIES = ("torch", "timm", "lightly", "stable-pretraining")
SEEDS, LENGTH = (3, 1), (10, 1)
RANDOM = ["optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"]
SWAV = ["experiment=swav_emoji", "objective.queue_length=0", "objective.freeze_steps=0"]
RECIPES = {
    "random ResNet": ["experiment=simclr_emoji", *RANDOM],
    "random ViT": ["experiment=mae_emoji", *RANDOM],
    "SimCLR": ["experiment=simclr_emoji"],
    "SwAV": SWAV,
    "SwAV, all views assigned": [*SWAV, "objective.assign_views=[0,1,2,3,4,5]"],
    "BYOL": ["experiment=byol_emoji"],
    "MoCo v3": ["experiment=mocov3_emoji"],
    "DINO": ["experiment=dino_emoji"],
    "iBOT": ["experiment=ibot_emoji", "backbone.dynamic_img_size=false"],  # with which stable-pretraining's fails
    "MAE": ["experiment=mae_emoji"],
    "I-JEPA": ["experiment=ijepa_emoji"],
}
OURS = "ours"
METHODS = [
    f"{method} | {library}"
    for method in RECIPES
    for library in (OURS, "lightly", "stable-pretraining")
    if library == OURS or (library, method) in MAKES
]
MEAN, SECONDS = "mean", "CPU s"


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation, and what it took."""
    results, seconds = outcome(method, seed, epochs)
    return numbers(results) | {SECONDS: seconds}


def outcome(method: str, seed: int, epochs: int, *changed: str) -> tuple[Results, float]:
    """What a run gives with some options changed, and the seconds of one thread that it took."""
    name, library = method.split(" | ")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cfg = composed([*RECIPES[name], *changed], seed, epochs, folder)
        if library != OURS:
            become_peer(cfg, name, library)
        results = fit(cfg)
    return results, time.process_time() - start


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures of "
        "32 pixels, AdamW, `conf/experiment/*_emoji.yaml`; timm's `test_resnet`, for iBOT, MAE and I-JEPA a ViT of 4 "
        "blocks and width 128. kNN and ridge probe on the trunk. `test_style`: concepts of the training set, drawn by "
        "a vendor never trained on; `val`: concepts never trained on. Seconds of one core are of the whole run, with "
        "data and evaluation, which are ours in every row, and with another run beside it."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(METHODS, options)
    names = [name for name in runs[METHODS[0]][0] if name != SECONDS]
    yield from compared_blocks(runs, {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names})


def compared_blocks(
    runs: Mapping[str, list[Values]], chance: Values, more: Sequence[str] = (SECONDS,)
) -> Iterator[list[str]]:
    """The table of all rows with the numbers that have a level at chance and ``more``, and how ours differ."""
    runs = {
        method: [values | {MEAN: statistics.mean(values[name] for name in chance)} for values in over_seeds]
        for method, over_seeds in runs.items()
    }
    yield table(runs, [*chance, MEAN, *more], corner="method | library", chance=chance)
    kinds = {kind: [name for name in chance if f"/{kind}" in name] for kind in ("kNN", "probe")}
    lines = []
    for method in RECIPES:
        others = [name for name in runs if name.startswith(f"{method} | ") and not name.endswith(OURS)]
        if others:
            lines += against(runs, [f"{method} | {OURS}"], others, kinds)
    yield [line.replace(" | ", ", ") for line in lines]
