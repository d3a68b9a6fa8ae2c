"""Does a look at picture and caption together put the nearest captions in a better order, and what do soft targets add?

The same towers, pictures, optimizer and number of steps. Re-ranking is compared with the cosines of the same model.
Controls: wrong pairs that are drawn evenly; the contrast alone, for as many steps and for about the same time. Then the
contrast alone, with and without soft targets, where the captions of some training rows have words of others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained

TITLE = "Matching and soft targets (ALBEF) on the embedded emoji"
LIBRARIES = ("torch", "timm", "open-clip-torch")
SEEDS, LENGTH = (3, 1), (4, 1)
BASE = ["experiment=albef_emoji", "data.train.captions=[caption,keywords]"]
CONTRAST = ["objective.weights={contrast: 1}", "eval.rerank=null"]
LONGER = 3  # epochs of the contrast alone that take as long as one of all terms, on the CPU
FUSED = {
    "ALBEF": BASE,
    "even negatives": [*BASE, "objective.hard_negatives=false"],
    "contrast alone": [*BASE, *CONTRAST],
    "contrast alone, as long": [*BASE, *CONTRAST],
}
NOISE = ["experiment=albef_emoji", "data=noisy_emoji", "data.train.pictures=0"]
NOISE += [f"data.eval.{name}.captions=0" for name in ("val", "test_style")]  # no noise where it is asked
SOFT = {
    f"noise {share}, alpha {alpha}": [*NOISE, *CONTRAST, f"data.train.captions={share}", f"objective.alpha={alpha}"]
    for share in (0, 0.5)
    for alpha in (0, 0.4)
}
WAYS = ("i2t", "t2i")
COSINES = [f"test_style/{way}_R@1" for way in WAYS]
PAIRS = [f"test_style/reranked_{way}_R@1" for way in WAYS]
ASKED = ["test_style/i2t_R@5", "test_style/t2i_R@5", "val/zero_shot_top1"]


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the numbers of its evaluation that are shown."""
    long = epochs * LONGER if method.endswith("as long") else epochs
    results = evaluated({**FUSED, **SOFT}[method], seed, long)
    return {name: results[name][0] for name in (*COSINES, *PAIRS, *ASKED) if name in results}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures, "
        "`conf/experiment/albef_emoji.yaml`: a ViT of 4 blocks, width 128, on 16 patches of 8 pixels, two layers of "
        "text and two of fusion, a queue of 512; captions, or keywords, of a sample. `test_style`: concepts of the "
        "training set, drawn by a vendor never trained on; `val`: concepts never trained on. Re-ranked: the 16 nearest "
        f'by cosine, in the order of the match logit. "As long": {LONGER} times the epochs. Noise: the share of '
        "training rows whose captions have words of others."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained([*FUSED, *SOFT], options)
    yield table({name: runs[name] for name in FUSED}, [*COSINES, *PAIRS])
    reranked = {
        name: [dict(zip(COSINES, (value[pair] for pair in PAIRS), strict=True)) for value in runs[name]]
        for name in ("ALBEF", "even negatives")
    }
    lines = ["R@1 of both directions (a paired t-test over seeds, 5 %):", ""]
    for told, ours, theirs in (
        ("ALBEF, re-ranked, against its own cosines", reranked["ALBEF"], runs["ALBEF"]),
        ("even negatives, re-ranked, against their own cosines", reranked["even negatives"], runs["even negatives"]),
        ("re-ranked, hard against even negatives", reranked["ALBEF"], reranked["even negatives"]),
        ("ALBEF, re-ranked, against the contrast alone, as long", reranked["ALBEF"], runs["contrast alone, as long"]),
        ("cosines, ALBEF against the contrast alone", runs["ALBEF"], runs["contrast alone"]),
    ):
        result = compared(ours, theirs, COSINES)
        lines.append(f"- {told}: {result.word} ({result.told}).")
    yield lines
    yield table({name: runs[name] for name in SOFT}, ASKED)
    lines = ["Soft targets (alpha 0.4) against none, in the mean of these columns:", ""]
    for share in (0, 0.5):
        result = compared(*(runs[f"noise {share}, alpha {alpha}"] for alpha in (0.4, 0)), ASKED)
        lines.append(f"- noise {share}: {result.word} ({result.told}).")
    yield lines
