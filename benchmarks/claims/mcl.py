"""Does MCL's staging teach what a contrastive run suppresses, beyond what joining several models does anyway?

Stage 0 and two further stages, and the three joined, against two controls of the same size: three stage-0 models of
different seeds joined, and stages whose cluster ids are random. Then, with two stages against two seeds, under which
conditions it does so. Run from the root of the repository::

    python -m benchmarks.claims.mcl            # three seeds and the conditions, at most half an hour on two cores
    python -m benchmarks.claims.mcl --quick    # one seed and few steps, at most three minutes
    python -m benchmarks.claims.mcl --write    # also writes benchmarks/results/mcl.md

All are runs of ``procedure=multistage``. Every model has the same number of steps; attributes are read by the ridge
probe of pictures whose combination of attributes, or whose concept, was never trained on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from scipy import stats

from benchmarks.claims.mcl_runs import EMOJI, RENDERS, TRIFEATURE, Job, Runner, Setting, Values, chance, prepare
from benchmarks.report import hardware, publish

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/mcl.md"
STAGES = 3  # stage 0 included
JOINED, SEEDS, RANDOM = "stages joined", "control: seeds joined", "control: random ids, joined"


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
        SEEDS: runner.join([(jobs[seed], seeds_of(jobs, seed, STAGES)) for seed in range(seeds)]),
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


def table(rows: Mapping[str, Sequence[Values]]) -> list[str]:
    """Mean and deviation over seeds of every attribute."""
    names = list(rows[JOINED][0])
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row, found in rows.items():
        cells = []
        for name in names:
            column = [values[name] for values in found]
            spread = f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else ""
            cells.append(f"{statistics.mean(column):.3f}{spread}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


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
    for other in ("stage 0", SEEDS, RANDOM):
        told = [compare(rows[JOINED], rows[other], name) for name in setting.suppressed]
        lines.append(f"- Joined against {other}: {'; '.join(told)}.")
    return lines


def compare(ours: Sequence[Values], theirs: Sequence[Values], attribute: str) -> str:
    """Whether one is above the other."""
    differences = [a[attribute] - b[attribute] for a, b in zip(ours, theirs, strict=True)]
    difference, limit = statistics.mean(differences), float("inf")
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        limit = stats.t.ppf(0.975, len(differences) - 1) * error
    word = "level" if abs(difference) <= limit else "above" if difference > 0 else "below"
    return f"{attribute} {word} ({difference:+.3f} ± {limit:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, two settings, no conditions")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    args = parser.parse_args()
    steps, seeds = (30, 1) if args.quick else (250, 3)
    start = time.monotonic()
    lines = [
        "# Multistage contrastive learning",
        "",
        f"Mean and deviation over {seeds} seed(s); every model {steps} steps of 64 pictures, a network of four "
        "convolutions at 32 pixels, AdamW. Accuracy of the ridge probe on the trunk; the controls join as many models. "
        f"Trifeature: 800 combinations {RENDERS} times, probed on 200 others; emoji: probed on concepts never trained "
        "on. k-means of what `encode_image` gives, 16 clusters for SimCLR on trifeature, else 10; small ones merged.",
        "",
        f"`{' '.join(['python -m benchmarks.claims.mcl', *sys.argv[1:]])}`",
        "",
        hardware("torch", "scikit-learn", "lightning"),
    ]
    # Processes that are started anew, since a forked one would inherit torch's threads.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.jobs, get_context("spawn"), prepare) as pool,
    ):
        runner = Runner(pool, Path(folder))
        for number, (name, setting) in enumerate(MAIN.items()):
            rows = claim(runner, number, steps, seeds)
            lines += ["", f"## {name}", "", *table(rows), "", *verdict(setting, rows)]
            publish(lines, RESULTS if args.write else None)  # what is done is not lost
        if not args.quick:
            lines += [
                "",
                "## When staging adds to joining",
                "",
                "Shape / texture, two stages joined against two seeds joined, mean of two seeds. Purity: share of "
                "samples whose value of the easiest attribute is the most frequent one in their cluster of stage 0.",
                "",
                *conditions(runner, steps, seeds=2),
            ]
    lines += ["", f"{time.monotonic() - start:.0f} s in all."]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
