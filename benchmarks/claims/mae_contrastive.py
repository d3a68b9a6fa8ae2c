"""Does a contrastive term lift what a linear probe finds in a masked autoencoder?

The same ViT, pictures, optimizer and number of steps; only the objective changes. Encoders are probed on unmasked
pictures, by the mean of their patches (what the contrast sees) and by their class token. CLIP is the same flow with
nothing masked and nothing rebuilt. Contrastive MAE alone has two views a picture, with changed colours.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained

TITLE = "Masked autoencoding with contrast on the embedded emoji"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (6, 1)
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


def train(method: str, seed: int, epochs: int) -> dict[str, Values]:
    """One run; the metrics of its evaluation, by pooling."""
    results = evaluated(METHODS[method], seed, epochs)
    return {
        pooling: {
            f"{data}/{name}": results[f"{data}/{prefix}{PROBES[name]}"][0] for data in SETS for name in SETS[data]
        }
        for pooling, prefix in POOLINGS.items()
    }


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures, a "
        "ViT of 4 blocks, width 128, on 16 patches of 8 pixels, AdamW; the recipes of "
        "`conf/experiment/mae_emoji.yaml` and, beside it, `mae_clip_emoji`, `mae_clip_tgm_emoji`, `cmae_emoji`. kNN "
        "and ridge probe on unmasked pictures. `test_style`: concepts of the training set, drawn by a vendor never "
        "trained on; `val`: concepts never trained on. Captions name the concept, so the image-text methods are told "
        "what the probes ask; MAE and contrastive MAE see pictures alone. Text-guided masks come from the flow's own "
        "towers."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    for pooling in POOLINGS:
        pooled = {method: [value[pooling] for value in values] for method, values in runs.items()}
        names = list(pooled["MAE"][0])
        chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
        yield table(pooled, names, corner=pooling, chance=chance)
    patches = {method: [value["mean of patches"] for value in values] for method, values in runs.items()}
    lines = ["By the mean of patches, averaged over the sets (a paired t-test over seeds, 5 %):", ""]
    for ours, theirs in (
        ("MAE", "random encoder"),
        ("MAE + CLIP, random", "MAE"),
        ("MAE + CLIP, text-guided", "MAE"),
        ("contrastive MAE", "MAE"),
        ("MAE + CLIP, random", "CLIP"),
        ("MAE + CLIP, text-guided", "MAE + CLIP, random"),
    ):
        told = []
        for kind in ("probe", "kNN"):
            columns = [name for name in patches[ours][0] if name.split("/")[1].startswith(kind)]
            result = compared(patches[ours], patches[theirs], columns)
            told.append(f"{kind} {result.word} ({result.told})")
        lines.append(f"- {ours} against {theirs}: {', '.join(told)}.")
    yield lines
