"""Measure what the pages of results tell, all of it or some: ``python -m benchmarks [NAME ...] [--quick] [--write]``.

A NAME is a script of this folder or a claim. They run one after the other, each in a process of its own, best on an
otherwise idle machine; without names all do, which takes hours, with ``--quick`` some minutes each. The peers come by
``pip install -e '.[bench]'``; one that is not there is left out. A script that fails does not stop the others. With
``--write`` each writes its page in ``benchmarks/results``. Then all pages of results, also those that were written
before, are summed up: ours beside the best peer of the same run. ``--summary`` does that alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.claims.__main__ import CLAIMS
from benchmarks.summary import ROOT, summary

SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if "def main()" in path.read_text() and path != Path(__file__)
)
WITH_DATA = {"decoding"}  # wants data of one's own


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*SCRIPTS, *CLAIMS]))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/NAME.md")
    parser.add_argument("--summary", action="store_true", help="only sum up the pages that there are")
    options = parser.parse_args()
    known = [*(name for name in SCRIPTS if name not in WITH_DATA), *CLAIMS]
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    failed = []
    for name in [] if options.summary else options.names or known:
        flags = [flag for flag in ("--quick", "--write") if getattr(options, flag[2:])]
        module = ["benchmarks.claims", name] if name in CLAIMS else [f"benchmarks.{name}"]
        print(f"python -m {' '.join([*module, *flags])}", file=sys.stderr, flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *module, *flags], cwd=ROOT, check=False).returncode
        print(f"{name}: {'done' if code == 0 else f'failed with {code}'} in {time.monotonic() - start:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        failed += [name] if code else []
    print("\n".join(summary(lambda path: str(path.relative_to(ROOT)))))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
