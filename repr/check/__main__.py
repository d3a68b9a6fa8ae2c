"""Look at a data set before training on it: ``python -m repr.check [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from repr.cli import command, importing, one_line_errors
from repr.config import compose
from repr.files import replacing
from repr.runs.inputs import check_inputs, data_module

if TYPE_CHECKING:
    from repr.data.datamodule import DataModule

WIDTH = 100  # columns of the terminal at most


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = command(
        "check", "Tell what is in a data set, and draw what the model will see.", "as for fit: data=folder"
    )
    result.add_argument("--out", type=Path, default=Path("data-check"), help="folder of check.json, contact_sheet.png")
    result.add_argument(
        "--rows", type=int, help="read at most so many rows of each set, evenly spread (all; of one in a store 1,000)"
    )
    result.add_argument("--font", help="a TrueType font for the captions on the contact sheet")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; leaves with 1 where training would stop because too many rows are bad."""
    options = parser().parse_intermixed_args(arguments)
    with one_line_errors():
        if options.rows is not None and options.rows < 1:
            raise ValueError(f"--rows {options.rows}; set it to 1 or more")
        cfg = compose(options.overrides, config_dir=options.config_dir)
        with importing():
            check_inputs(cfg)
        status = run(cfg, options.out, options.rows, options.font)
    sys.exit(status)


def run(cfg: DictConfig, out: Path, num_rows: int | None, font: str | None) -> int:
    """Check the data of a config, print and write the report; the exit status.

    Raises:
        ValueError: the data module cannot be built, with what to set.
    """
    # Imported here, so that a mistyped option is refused before the seconds that these take.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from repr.check.contact_sheet import contact_sheet
    from repr.check.facts import check_data, joined_labels, unread_rows
    from repr.check.tables import show

    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    datamodule, remarks = build(cfg)
    if not datamodule.views:
        raise ValueError("there are no pictures to look at: views is empty. NumericTables itself checks every cell")
    out.mkdir(parents=True, exist_ok=True)
    terminal = Console(stderr=True)  # standard output stays the report's
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        report = check_data(datamodule, num_rows=num_rows, progress=progress)
    sheet, undrawn = contact_sheet(datamodule, font)
    report["too_many_bad"] = unusable(report, datamodule)
    joined = [remark for name, source in datamodule.sources.items() for remark in joined_labels(name, source)]
    report["remarks"] = [*unread_rows(report), *remarks, *undrawn, *joined]
    with replacing(out / "check.json") as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    with replacing(out / "contact_sheet.png") as file:
        sheet.save(file, "PNG")
    show(report, console)
    console.print(f"written: {out / 'check.json'}, {out / 'contact_sheet.png'}", soft_wrap=True)
    return int(bool(report["too_many_bad"]))


def unusable(report: dict[str, Any], datamodule: DataModule) -> list[str]:
    """A sentence for each set on which training would stop: it counts rows without caption too, if it needs them."""
    sentences = []
    for name, facts in report["sets"].items():
        bad, limit = len(facts["unreadable"]), datamodule.max_bad_fraction
        if name == "train" and datamodule.tokenizer is not None:
            bad += facts["captions"]["rows_without"]
        if bad > int(limit * facts["read"]):
            sentences.append(
                f"{name}: {bad:,} of {facts['read']:,} rows cannot be used, more than data.max_bad_fraction={limit:g} "
                "allows; mend or remove them"
            )
    return sentences


def build(cfg: DictConfig) -> tuple[DataModule, list[str]]:
    """The data module, also where the batch is larger than the training set; remarks on what training will refuse."""
    batch_size = cfg.data.batch_size
    cfg.data.update({"batch_size": 1, "lanes": None})
    datamodule = data_module(cfg)
    num = len(datamodule.order)
    datamodule.batch_size = min(batch_size, num)
    if batch_size <= num:
        return datamodule, []
    return datamodule, [f"an epoch of train has {num} samples, fewer than a batch: set data.batch_size={num} or less"]


if __name__ == "__main__":
    main()
