"""Does MCL's staging teach what a contrastive run suppresses, beyond what joining several models does anyway?

Stage 0 and two further stages, and the three joined, against two controls of the same size: three stage-0 models of
different seeds joined, and stages whose cluster ids are random. Then, with two stages against two seeds, under which
conditions it does so.

All are runs of ``procedure=multistage``. Every model has the same number of steps; attributes are read by the ridge
probe of pictures whose combination of attributes, or whose concept, was never trained on.
"""

from __future__ import annotations

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.claims.mcl_runs import EMOJI, RENDERS, TRIFEATURE, Job, Runner, Setting, chance, prepare
from benchmarks.claims.runs import Values, compared, table

TITLE = "Multistage contrastive learning"
LIBRARIES = ("torch", "scikit-learn", "lightning")
SEEDS, LENGTH = (3, 1), (250, 30)  # steps
STAGES = 3  # stage 0 included
JOINED, SEEDS_JOINED, RANDOM = "stages joined", "control: seeds joined", "control: random ids, joined"


def rarely(share: float) -> dict[str, float]:
    """Captions that always name the colour, and shape and texture each in this share of cases."""
    names = {
        "a {colour} thing": (1 - share) ** 2,
        "a {colour} {shape}": share * (1 - share),
        "a {texture} {colour} thing": share * (1 - share),
        "a {texture} {colour} {shape}": share**2,
    }
    return {template: weight for template, weight in names.items() if weight > 0}


OBJECT = ("colour", "shape", "texture")


def drawn(hues: int, clusters: int = 16) -> Setting:
    """SimCLR on trifeature, whose canvas has so many hues."""
    attributes = (("canvas",) if hues else ()) + OBJECT
    return Setting("SimCLR", TRIFEATURE, clusters, attributes, ("shape", "texture"), {"hues": hues})


def captioned(share: float) -> Setting:
    """CLIP on trifeature, whose captions name shape and texture in this share of cases."""
    return Setting("CLIP", TRIFEATURE, 10, OBJECT, ("shape", "texture"), {"templates": rarely(share)})


EMOJI_ATTRIBUTES = ("category", "style")
MAIN = {
    "SimCLR, trifeature on 16 hues of canvas": drawn(16),
    "CLIP, trifeature, a fifth of the captions name the shape, a fifth the texture": captioned(0.2),
    "SimCLR, emoji": Setting("SimCLR", EMOJI, 10, EMOJI_ATTRIBUTES, EMOJI_ATTRIBUTES),
    "CLIP, emoji": Setting("CLIP", EMOJI, 10, EMOJI_ATTRIBUTES, EMOJI_ATTRIBUTES),
}
GREY, TRUTH = "SimCLR, grey canvas, 10 clusters", "SimCLR, grey canvas, clusters that are the colours"
CURVES = {
    GREY: drawn(0, 10),
    "SimCLR, 64 hues, 16 clusters": drawn(64),
    "CLIP, all captions name shape and texture": captioned(1.0),
}


def stages_of(job: Job, num: int) -> list[str]:
    return [f"{job.name}/stage-{stage}" for stage in range(num)]


def seeds_of(jobs: Sequence[Job], first: int, num: int) -> list[str]:
    return [f"{jobs[(first + i) % len(jobs)].name}/stage-0" for i in range(num)]


def claim(runner: Runner, number: int, steps: int, seeds: int) -> dict[str, list[Values]]:
    """Row of the table of a setting -> what each seed found."""
    setting = list(MAIN.values())[number]
    pool = range(max(seeds + 1, STAGES))  # of stage 0, of which each control joins three
    jobs = [Job(setting, f"main{number}-{seed}", seed, steps, STAGES if seed < seeds else 1) for seed in pool]
    random = [replace(job, name=f"random-{job.name}", random=True, start=job.name) for job in jobs[:seeds]]
    runner.run(jobs)
    runner.run(random)
    found = [runner.found[job.name] for job in jobs[:seeds]]
    return {
        **{f"stage {stage}": [columns[f"stage-{stage}"] for columns in found] for stage in range(STAGES)},
        JOINED: [columns["joined"] for columns in found],
        SEEDS_JOINED: runner.join([(jobs[seed], seeds_of(jobs, seed, STAGES)) for seed in range(seeds)]),
        RANDOM: [runner.found[job.name]["joined"] for job in random],
        "chance": [chance(setting)],
    }


def conditions(runner: Runner, steps: int, seeds: int) -> list[str]:
    """The table of conditions: two stages joined against two seeds joined, after :func:`claim`."""
    jobs = {
        name: [
            Job(setting, f"curve{number}-{seed}", seed, steps, 2 if seed < seeds else 1) for seed in range(seeds + 1)
        ]
        for number, (name, setting) in enumerate(CURVES.items())
    }
    hues = [Job(drawn(16), f"main0-{seed}", seed, steps, 2) for seed in range(seeds + 1)]  # done by `claim`, as are
    text = [Job(captioned(0.2), f"main1-{seed}", seed, steps, 2) for seed in range(seeds + 1)]  # these
    coarse = {
        num: [replace(job, setting=drawn(16, num), name=f"k{num}-{job.seed}", start=job.name) for job in hues[:seeds]]
        for num in (4, 64)
    }
    grey = jobs[GREY]
    truth = [Job(grey[0].setting, f"truth-{seed}", seed + 100, steps, 1, truth="colour") for seed in range(seeds)]
    runner.run([*(job for group in (*jobs.values(), *coarse.values()) for job in group), *truth])

    def pairs(group: Sequence[Job]) -> list[list[str]]:
        return [stages_of(job, 2) for job in group[:seeds]]

    rows: dict[str, tuple[Sequence[Job], list[list[str]], Sequence[Job]]] = {  # for seeds; for stages; for purity
        GREY: (grey, pairs(grey), grey),
        TRUTH: (grey, [[f"{a.name}/stage-0", f"{b.name}/stage-0"] for a, b in zip(grey, truth, strict=False)], []),
        **{name: (group, pairs(group), group) for name, group in jobs.items() if "hues" in name},
        "SimCLR, 16 hues, 16 clusters": (hues, pairs(hues), hues),
        **{f"SimCLR, 16 hues, {num} clusters": (hues, pairs(group), group) for num, group in coarse.items()},
        **{name: (group, pairs(group), group) for name, group in jobs.items() if "CLIP" in name},
        "CLIP, a fifth names the shape, a fifth the texture": (text, pairs(text), text),
    }
    lines = [
        "| condition | purity | stage 0 | seeds joined | stages joined | gain of staging |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (group, stages, clustered) in rows.items():
        ours = runner.join([(group[seed], stages[seed]) for seed in range(seeds)])
        theirs = runner.join([(group[seed], seeds_of(group, seed, 2)) for seed in range(seeds)])
        alone = [runner.found[job.name]["stage-0"] for job in group[:seeds]]
        easy = group[0].setting.attributes[0]
        purity = statistics.mean([runner.found[job.name]["purity"][easy] for job in clustered[:seeds]] or [1.0])
        cells = [f"{name}", f"{purity:.2f} ({easy})", *(both(found) for found in (alone, theirs, ours))]
        gain = [
            " / ".join(f"{mean(ours, attribute) - mean(theirs, attribute):+.3f}" for attribute in ("shape", "texture"))
        ]
        lines.append(f"| {' | '.join(cells + gain)} |")
    return lines


def mean(found: Sequence[Values], attribute: str) -> float:
    return statistics.mean(values[attribute] for values in found)


def both(found: Sequence[Values]) -> str:
    return f"{mean(found, 'shape'):.3f} / {mean(found, 'texture'):.3f}"


def verdict(setting: Setting, rows: Mapping[str, Sequence[Values]]) -> list[str]:
    """In words that follow from the numbers; a difference counts if a paired t-test over seeds finds it (5 %)."""
    lines = []
    below = [
        f"{name} ({mean(rows[stage], name):.3f} of {stage})"
        for name in setting.attributes
        for stage in (f"stage {number}" for number in range(STAGES))
        if mean(rows[stage], name) > mean(rows[JOINED], name)
    ]
    told = f"no: {', '.join(below)}" if below else "yes"
    lines.append(f"- Joined, at least as good as every stage on every attribute: {told}.")
    for other in ("stage 0", SEEDS_JOINED, RANDOM):
        told = [compare(rows[JOINED], rows[other], name) for name in setting.suppressed]
        lines.append(f"- Joined against {other}: {'; '.join(told)}.")
    return lines


def compare(ours: Sequence[Values], theirs: Sequence[Values], attribute: str) -> str:
    result = compared(ours, theirs, [attribute])
    return f"{attribute} {result.word.split()[0]} ({result.mean:+.3f} ± {result.limit:.3f})"


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s); every model {options.length} steps of 64 pictures, a "
        "network of four convolutions at 32 pixels, AdamW. Accuracy of the ridge probe on the trunk; the controls "
        f"join as many models. Trifeature: 800 combinations {RENDERS} times, probed on 200 others; emoji: probed on "
        "concepts never trained on. k-means of what `encode_image` gives, 16 clusters for SimCLR on trifeature, else "
        "10; small ones merged."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    # Processes that are started anew, since a forked one would inherit torch's threads.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, get_context("spawn"), prepare) as pool,
    ):
        runner = Runner(pool, Path(folder))
        for number, (name, setting) in enumerate(MAIN.items()):
            rows = claim(runner, number, options.length, options.seeds)
            shown = table(rows, list(rows[JOINED][0]), corner="")
            yield [f"## {name}", "", *shown, "", *verdict(setting, rows)]
        if not options.quick:
            yield [
                "## When staging adds to joining",
                "",
                "Shape / texture, two stages joined against two seeds joined, mean of two seeds. Purity: share of "
                "samples whose value of the easiest attribute is the most frequent one in their cluster of stage 0.",
                "",
                *conditions(runner, options.length, seeds=2),
            ]
