"""Run folders as one self-contained HTML page: ``python -m repr.report RUN_FOLDER [RUN_FOLDER ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from repr.cli import one_line_errors, program
from repr.runs.folder import REPORT


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = argparse.ArgumentParser(prog=program("report"), description="Make the page of one or more runs.")
    result.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="several are shown side by side")
    result.add_argument("--out", type=Path, help=f"default: {REPORT} in the folder of the first run")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_args(arguments)
    out = options.out or options.folders[0] / REPORT
    with one_line_errors():
        from repr.report.page import write_report  # here, so that --help does not wait for what it imports

        write_report(options.folders, out)
        print(out)


if __name__ == "__main__":
    main()
