"""Run folders as one self-contained HTML page: ``python -m repr.report RUN_FOLDER [RUN_FOLDER ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from repr.cli import one_line_errors
from repr.report.page import write_report
from repr.runs.folder import REPORT


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m repr.report", description="Make the page of one or more runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="several are shown side by side")
    parser.add_argument("--out", type=Path, help=f"default: {REPORT} in the folder of the first run")
    options = parser.parse_args(arguments)
    out = options.out or options.folders[0] / REPORT
    with one_line_errors():
        write_report(options.folders, out)
        print(out)


if __name__ == "__main__":
    main()
