"""Do claims of papers show here? ``python -m benchmarks.claims NAME [--quick] [--write]`` from the repository's root.

NAME is a module of this folder, which says what is compared; it runs half an hour on two cores, with ``--quick`` three
minutes. ``--write`` also writes ``benchmarks/results/NAME.md``. Runs go on both cores, each with one
thread (``--jobs``); no number depends on that. ``--device cuda --minutes M`` trains all on one GPU, as long as
short runs say that this allows, and writes ``NAME-<card>.md`` beside what the CPU gave.

``--kept benchmarks/results/runs`` takes the results of single runs that are in this folder, and adds those of the
others: with more ``--seeds`` only the new ones are run. One that the code would not give any more is to be deleted.

A claim is a module with a ``TITLE``; ``LIBRARIES`` whose versions are told; ``SEEDS`` and, where all runs have the
same, their ``LENGTH`` in epochs, each for a whole and for a quick start; ``settings(options)``, a paragraph on what is
run; and ``report(options)``, which runs it and gives blocks of lines, each when it is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.report import card_name, hardware, publish

HERE = Path(__file__).parent
CLAIMS = sorted(path.stem for path in HERE.glob("*.py") if "\nTITLE = " in path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CLAIMS)
    parser.add_argument("--quick", action="store_true", help="one seed, short runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/NAME.md")
    parser.add_argument("--seeds", type=int, help="runs of each method; default: what the claim says")
    parser.add_argument("--length", type=int, help="of each run; default: what the claim says")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that runs train on")
    parser.add_argument("--minutes", type=float, help="for all runs; their length follows from it")
    parser.add_argument("--kept", type=Path, help="a folder for results of single runs; those in it are not run again")
    options = parser.parse_args()
    claim = import_module(f"benchmarks.claims.{options.name}")
    if options.minutes is not None and (options.minutes <= 0 or options.length):
        parser.error("--minutes takes a number above 0, and no --length beside it")
    if (options.minutes or options.device == "cuda") and not hasattr(claim, "train"):
        parser.error(f"{options.name} trains in stages, for which there is neither --minutes nor --device cuda")
    card = card_name() if options.device == "cuda" else ""
    if card is None:
        parser.error("--device cuda: this machine has no GPU")
    options.seeds = options.seeds or claim.SEEDS[options.quick]
    options.length = options.length or getattr(claim, "LENGTH", (None, None))[options.quick]
    command = " ".join(["python -m benchmarks.claims", *sys.argv[1:]])
    start, load = time.monotonic(), hardware(*claim.LIBRARIES)
    file = f"{'-'.join([options.name, *card.lower().split()])}.md"
    options.made = set()  # when and on what machines kept runs were made
    blocks: list[str] = []
    try:
        for block in claim.report(options):
            blocks += ["", *block]
    finally:  # what is known is not lost
        seconds = f"`{command}`, {time.monotonic() - start:.0f} s; the load is that before."
        before = [f"Runs are among them from {'; '.join(sorted(options.made))}.", ""] if options.made else []
        lines = [f"# {claim.TITLE}", "", claim.settings(options), "", seconds, "", *before, load, *blocks]
        publish(lines, HERE.parent / "results" / file if options.write and blocks else None)


if __name__ == "__main__":
    main()
