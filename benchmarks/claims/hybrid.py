"""Do captions and hidden patches beside SigLIP's loss help what is asked of cells, and of whole pictures?

SigLIP 2 and TIPS say that captions carry retrieval and hidden patches dense tasks. The same ViT, drawn scenes with
captions and masks, optimizer and number of steps; only the parts of the hybrid change. The control has the loss of
SigLIP alone for about as many seconds as the longest of the others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, against, evaluated, table, trained

TITLE = "Parts of SigLIP 2 on drawn scenes"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (4, 1)
SIGMOID = "{_target_: repr.losses.contrastive.sigmoid, _partial_: true}"
SIGLIP = "_target_: repr.objectives.image_text.ImageText, _partial_: true, temperature: 0.1, logit_bias: -4.85"
ALONE = [  # no decoder
    "~objective.parts.siglip",
    f"+objective.parts.siglip={{{SIGLIP}, temperature_range: [0.001, 1.0], losses: {{contrast: {SIGMOID}}}}}",
    "~objective.weights.siglip.caption",
]
NEVER = [f"~objective.{option}.distillation" for option in ("parts", "views", "weights", "stages")]
ALWAYS = ["objective.stages.distillation=[0,1]"]
METHODS = {
    "random encoder": [*ALONE, *NEVER, "optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"],
    "SigLIP": [*ALONE, *NEVER],
    "SigLIP, as many seconds": [*ALONE, *NEVER],
    "+ caption": NEVER,
    "+ hidden patches from 80 %": ALONE,
    "+ hidden patches": [*ALONE, *ALWAYS],
    "+ all patches predicted": [*ALONE, *ALWAYS, "+objective.parts.distillation.predict_seen=true"],
    "SigLIP 2": [],
}
LONGER = 2.5  # what a step of the longest costs, in steps of SigLIP
COLUMNS = {
    "val/linear_miou_figure": "mIoU of figures",
    "val/linear_miou_shape": "mIoU of shapes",
    "val/correspondence@0.5": "correspondence",
    "val/i2t_R@1": "R@1 of texts",
    "val/t2i_R@1": "R@1 of pictures",
    "val/knn_shape": "kNN",
}


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    length = round(epochs * LONGER) if method == "SigLIP, as many seconds" else epochs
    results = evaluated(["experiment=siglip2_scenes", *METHODS[method]], seed, length)
    return {title: results[name][0] for name, title in COLUMNS.items()}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of `conf/experiment/"
        f"siglip2_scenes.yaml`; the control {LONGER:g} times as many. Dense numbers by a linear probe on the last map."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    columns = list(COLUMNS.values())
    yield table(runs, columns)
    dense, whole = [c for c in columns if "mIoU" in c or c == "correspondence"], [c for c in columns if "R@1" in c]
    kinds = {"dense": dense, "retrieval": whole}
    yield against(runs, list(METHODS)[3:], ("SigLIP", "SigLIP, as many seconds"), kinds)
