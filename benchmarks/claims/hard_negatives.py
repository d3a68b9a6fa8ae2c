"""Do wrong captions, neighbours and minimal pairs teach a contrast which word belongs to which?

The same towers, pictures, optimizer and number of steps on drawn questions of composition; wrong captions (NegCLIP),
the other half of an item in the same batch (its hard pictures) and a loss of such pairs (S-VCO's, for two towers) come
on top of CLIP, each with a control that costs as much: captions of any rows, mates drawn at random, and CLIP alone
for longer. With six colours and six shapes few rows of a batch have the same words by chance. It takes an hour.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.claims.runs import Values, compared, evaluated, table, trained
from repr.data.drawn.composition import KINDS, DrawnComposition
from repr.data.hard_captions import HardCaptions
from repr.data.neighbours import save_neighbours
from repr.data.sources.source import Source

TITLE = "Wrong captions, neighbours and pairs, on drawn questions of composition"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (10, 2)  # of 41 steps
HERE = "benchmarks.claims.hard_negatives"
ALONE, BESIDE = ["data.neighbours=null"], ["data.neighbours=items"]
PLAIN, WRONG = ["hard_captions=none"], ["hard_captions=distractors"]
ANY = [*WRONG, f"hard_captions._target_={HERE}.AnyCaptions"]
PAIRS = ["+objective.weights.pairs=1"]
RANDOM_MATES = "+ pairs of random mates"
METHODS: dict[str, tuple[list[str], float]] = {  # overrides, relative length
    "CLIP": ([*ALONE, *PLAIN], 1),
    "CLIP, for longer": ([*ALONE, *PLAIN], 1.2),  # as wrong captions cost here
    "+ wrong captions": ([*ALONE, *WRONG], 1),
    "+ captions of any rows": ([*ALONE, *ANY], 1),
    "+ neighbours": ([*BESIDE, *PLAIN], 1),
    "+ wrong captions, neighbours": ([*BESIDE, *WRONG], 1),
    "+ pairs": ([*BESIDE, *PLAIN, *PAIRS], 1),
    RANDOM_MATES: ([*PLAIN, *PAIRS], 1),
}
TRANSFER = {  # an epoch of two kinds alone has 23 steps
    f"{method}; no relations in training": (METHODS[method][0], 41 / 23)
    for method in ("CLIP", "+ wrong captions, neighbours")
}
ALL = METHODS | TRANSFER
COMPARED = [(ours, "CLIP") for ours in list(METHODS)[1:]]
COMPARED += [
    ("+ wrong captions", "+ captions of any rows"),
    ("+ wrong captions, neighbours", "CLIP, for longer"),
    ("+ pairs", RANDOM_MATES),
    tuple(reversed(TRANSFER)),
]
TWO = [kind for kind in KINDS if kind != "order"]  # kinds whose items are two pictures with two captions
COLUMNS = [f"{score} {kind}" for kind in TWO for score in ("text", "image")]
COLUMNS += ["text order", "pictures of others", "i2t R@1", "t2i R@1", "seconds"]


class AnyCaptions(HardCaptions):
    """Captions of any other rows of the set, in place of wrong ones that are hard."""

    def check(self, source: Source) -> None:
        """Every set has some."""

    def wrong(self, source: Source, row: int, caption: str) -> Sequence[str]:
        """Some of them, the same each time."""
        rows = np.random.Generator(np.random.Philox(key=row)).integers(len(source), size=32).tolist()
        return [text for other in rows if (text := source.captions(other)[0]) != caption]


class OthersPictures(DrawnComposition):
    """The questions with pictures of other items: what is told of them comes from the words alone."""

    def draw(self, index: int) -> Image.Image:
        """The picture of a row some items further on."""
        return super().draw((index + 20) % len(self))


def train(method: str, seed: int, length: int) -> Values:
    """One run; scores of its questions, retrieval, and how long it took.

    Args:
        method: one of ``ALL``.
        seed: of the run.
        length: of the run, in 41 steps.
    """
    options, relative = ALL[method]
    kinds = ["data.train.kinds=[attribute,count]"] if method in TRANSFER else []
    questions = ["data.eval.composition.kinds=[attribute,relation,count,order]"]
    others = f"+data.eval.others={{_target_: {HERE}.OthersPictures, size: 32, num_items: 200, colours: 6, shapes: 6}}"
    with tempfile.TemporaryDirectory() as folder:
        if method == RANDOM_MATES:
            options = [*options, f"data.neighbours={_random_mates(Path(folder), seed)}"]
        is_beside = ALONE[0] not in options
        start = time.monotonic()
        results = evaluated(
            ["experiment=negclip_composition", *options, *kinds, *questions, others],
            seed,
            max(1, round(length * relative / (1 + is_beside))),  # each row comes twice in an epoch with neighbours
        )
    values = {
        f"{score} {kind}": results[f"composition/{score}_score_{kind}"][0]
        for kind in TWO
        for score in ("text", "image")
    }
    values |= {f"{way} R@1": results[f"composition/{way}_R@1"][0] for way in ("i2t", "t2i")}
    values["text order"] = results["composition/text_score_order"][0]
    values["pictures of others"] = np.mean([results[f"others/text_score_{kind}"][0] for kind in TWO]).item()
    return values | {"seconds": time.monotonic() - start}


def _random_mates(folder: Path, seed: int) -> Path:
    """Neighbours that are any rows."""
    source = DrawnComposition(size=32, num_items=1500, seed=1)
    path = folder / "random.npz"
    save_neighbours(path, np.random.default_rng(seed).integers(len(source), size=(len(source), 1)), source)
    return path


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {41 * options.length} steps with 256 pictures "
        "(`CLIP, for longer`: 1.2 times as many), `experiment=negclip_composition`: a ResNet-10 at 32 pixels, "
        "10,500 pictures of six colours and six shapes. Scores of 200 items of each kind from another seed; `pictures "
        "of others`: the text score of attribute, relation and count where pictures belong to other items, which is "
        "at chance unless the words alone tell. Seconds of one thread, evaluation included. Without relations in "
        "training: attribute and count alone, for as many steps."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(ALL), options)
    chance = dict.fromkeys(COLUMNS, 0.25) | {"text order": 0.2}
    del chance["seconds"], chance["i2t R@1"], chance["t2i R@1"]
    yield table(runs, COLUMNS, chance=chance)
    lines = []
    for ours, theirs in COMPARED:
        for score in ("text", "image"):
            columns = [f"{score} relation"] if ours in TRANSFER else [f"{score} {kind}" for kind in TWO]
            result = compared(runs[ours], runs[theirs], columns)
            told = " of relations" if ours in TRANSFER else ""
            lines.append(f"- {ours}: {score} score{told} {result.word} {theirs} ({result.told}).")
    yield ["Paired t-tests over seeds (5 %), scores over attribute, relation and count:", "", *lines]
