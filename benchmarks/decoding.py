"""What decoding at a scale of the JPEG and resizing by torch change: pixels of views, and a trained model's numbers.

Run from the root of the repository::

    python -m benchmarks.decoding --train DIR/train-*.tar --val DIR/val-00000.tar --runs RUNS
    python -m benchmarks.decoding ... --write    # also writes benchmarks/results/decoding.md

Pixels: photographs that come with scikit-learn and matplotlib. Numbers: SimCLR with views of 32 px for 12 epochs on tar
shards of JPEGs with a category, decoded exactly and scaled, three seeds each; a run of RUNS that has ended is not
repeated. On two cores a run of 3,400 pictures takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/decoding.md"
SEEDS, VIEWS = (0, 1, 2), 200
MEASURES = ("val/knn_category", "val/ridge_category")


def photographs() -> dict[str, bytes]:
    import matplotlib
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    files = [folder / "china.jpg", folder / "flower.jpg"]
    files.append(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg")
    return {file.name: file.read_bytes() for file in files}


def pixel_table() -> list[str]:
    """Views of the photographs, exact against scaled."""
    from repr.data.sources.pictures import decode
    from repr.data.views import View, crop_views, draw, reduction
    from repr.seeds import sample_seed

    table = ["| picture | view | sides divided by | views | PSNR in dB, median | least |"]
    table.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, data in photographs().items():
        whole = decode(data, name)
        for size in (224, 64, 32):
            views = [View(size=size, scale=(0.08, 1), flip=0.5)]
            draws, _ = draw(sample_seed(0, 0, torch.arange(VIEWS)), views)
            fitting = [decode(data, name, reduction=partial(reduction, sample, views)) for sample in draws.tolist()]
            (exact,), _ = crop_views([whole] * VIEWS, draws, views)
            (scaled,), _ = crop_views(fitting, draws, views)
            error = (exact.float() - scaled.float()).square().mean((1, 2, 3))
            values = (10 * torch.log10(255**2 / error)).numpy()
            divisors = np.array([image.info["scaled"][2] for image in fitting])
            for divisor in np.unique(divisors):
                part = values[divisors == divisor]
                cells = f"{divisor} | {len(part)} | {np.median(part):.1f} | {part.min():.1f}"
                table.append(f"| {name}, {whole.width} x {whole.height} | {size} px | {cells} |")
    return table


def trained(runs: Path, train: str, val: str, decode: str, seed: int) -> dict[str, float]:
    """The numbers of a run, which is made where it has not ended."""
    results = runs / f"{decode}-{seed}" / "results.json"
    if not results.exists():
        shards = f"{{_target_: repr.data.sources.shards.Shards, files: '{val}', labels: ['json:category']}}"
        options = [
            "experiment=simclr_emoji", "data=shards", f"data.train.files={train}", "data.train.captions=[]",
            "data.train.labels=['json:category']", f"+data.eval.val={shards}", "tokenizer=none",
            "views.main.scale=[0.3,1]", "trainer.max_epochs=12", "trainer.check_val_every_n_epoch=12",
            f"data.decode={decode}", f"seed={seed}", f"run_folder={results.parent}",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "repr.fit", *options], cwd=ROOT, check=True)
    return {name: found["value"] for name, found in json.loads(results.read_text()).items()}


def numbers_table(runs: Path, train: str, val: str) -> list[str]:
    """A trained model's numbers by the way of decoding: each seed's, and their mean."""
    table = [f"| decode | {' | '.join(MEASURES)} |", f"| --- |{' --- |' * len(MEASURES)}"]
    for decode in ("exact", "scaled"):
        found = [trained(runs, train, val, decode, seed) for seed in SEEDS]
        cells = []
        for name in MEASURES:
            values = [numbers[name] for numbers in found]
            cells.append(f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})")
        table.append(f"| {decode} | {' | '.join(cells)} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="shards with JPEGs and json:category")
    parser.add_argument("--val", required=True, help="likewise, for evaluation")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    lines = [
        "# Decoding at a scale of the JPEG",
        "",
        "`data.decode=scaled` against `exact`: `python -m benchmarks.decoding`, whose head says what is trained.",
        "",
        hardware("torch", "torchvision", "pillow"),
        "",
        f"## Pixels: {VIEWS} views of a share of .08 to 1 of a photograph",
        "",
        *pixel_table(),
        "",
        "Divided by 1: what torch's resizing differs by from Pillow's, and that it sees no pixels around the crop.",
        "",
        "## Numbers: SimCLR on drawings of at most 128 px, nearly all of them halved for views of 32 px",
        "",
        "Mean of three seeds, in brackets each:",
        "",
        *numbers_table(args.runs.absolute(), args.train, args.val),
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
