"""Look at a data set before training on it: ``python -m repr.check [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from repr.cli import one_line_errors
from repr.config import check, compose
from repr.files import replacing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from repr.data.datamodule import DataModule

WIDTH = 100  # columns of the terminal at most
NUM_LISTED = 10  # faults and groups that are printed; check.json has all


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; leaves with 1 where training would stop because too many rows are bad."""
    parser = argparse.ArgumentParser(
        prog="python -m repr.check",
        description="Tell what is in a data set, and draw what the model will see.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for repr.fit: data=folder, ...")
    parser.add_argument("--config-dir", help="a folder of your own, laid out like conf/, whose files come first")
    parser.add_argument(
        "--out", type=Path, default=Path("data-check"), help="folder for check.json and contact_sheet.png"
    )
    parser.add_argument("--rows", type=int, help="read at most so many rows of each set, evenly spread")
    parser.add_argument("--font", help="a TrueType font for the captions on the contact sheet")
    options = parser.parse_intermixed_args(arguments)
    with one_line_errors():
        if options.rows is not None and options.rows < 1:
            raise ValueError(f"--rows {options.rows}; set it to 1 or more")
        cfg = compose(options.overrides, config_dir=options.config_dir)
        check(cfg)
        status = run(cfg, options.out, options.rows, options.font)
    sys.exit(status)


def run(cfg: DictConfig, out: Path, num_rows: int | None, font: str | None) -> int:
    """Check the data of a config, print and write the report; the exit status.

    Raises:
        ValueError: the data module cannot be built, with what to set.
    """
    # Imported here, so that a mistyped option is refused before the seconds that these take.
    from rich.console import Console

    from repr.check.contact_sheet import contact_sheet
    from repr.check.facts import check_data

    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
    console = Console(width=min(WIDTH, Console().width), highlight=False)
    datamodule, remarks = build(cfg)
    if not datamodule.views:
        raise ValueError("there are no pictures to look at: views is empty. NumericTables itself checks every cell")
    out.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:

        def start(name: str, num: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=num)
            return lambda done: progress.advance(task, done)

        report = check_data(datamodule, num_rows=num_rows, progress=start)
    sheet, undrawn = contact_sheet(datamodule, font)
    report["too_many_bad"] = too_many_bad(report, datamodule)
    report["remarks"] = remarks + undrawn
    with replacing(out / "check.json") as file:
        file.write(json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    with replacing(out / "contact_sheet.png") as file:
        sheet.save(file, "PNG")
    show(report, console)
    console.print(f"written: {out / 'check.json'}, {out / 'contact_sheet.png'}", soft_wrap=True)
    return int(bool(report["too_many_bad"]))


def too_many_bad(report: dict[str, Any], datamodule: DataModule) -> list[str]:
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
    from hydra.utils import instantiate

    batch_size, cfg.data.batch_size = cfg.data.batch_size, 1
    datamodule = instantiate(cfg.data)
    num = len(datamodule.order)
    datamodule.batch_size = min(batch_size, num)
    if batch_size <= num:
        return datamodule, []
    return datamodule, [f"an epoch of train has {num} samples, fewer than a batch: set data.batch_size={num} or less"]


def _progress() -> Progress:
    """A bar for each set, on a terminal only; standard output stays the report's."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# Tables -------------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    sets = report["sets"]
    for table in (_overview(report), _kinds(sets), _captions(sets), _labels(sets)):
        if table.row_count:
            console.print(table, "")
    frequent = sets["train"]["captions"].get("frequent", [])
    if frequent and frequent[0]["count"] > 1:
        table = _table("Most frequent captions of train", "caption", ">rows", ">share")
        for entry in (entry for entry in frequent[:5] if entry["count"] > 1):
            share = entry["count"] / sets["train"]["captions"]["captions"]
            table.add_row(_plain(entry["caption"], 200), f"{entry['count']:,}", f"{share:.1%}")
        console.print(table, "")
    _show_groups(report, console)
    faults = [(name, fault) for name, facts in sets.items() for fault in facts["unreadable"]]
    if faults:
        title = "Unreadable rows" + (f", the first {NUM_LISTED} of {len(faults):,}" if len(faults) > NUM_LISTED else "")
        table = _table(title, "set", "reason")
        for name, fault in faults[:NUM_LISTED]:
            table.add_row(name, _plain(fault["reason"], 300))
        console.print(table, "")
    for remark in report["remarks"]:
        console.print(f"note: {_plain(remark, 500)}")
    for sentence in report["too_many_bad"]:
        console.print(f"[bold red]{sentence}")


def _table(title: str, *columns: str) -> Any:
    """A rich table; columns that start with > hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, min_width=len(title))
    table.title_justify, table.title_style, table.caption_justify = "left", "bold", "left"
    for column in columns:
        number = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _overview(report: dict[str, Any]) -> Any:
    columns: dict[str, dict[str, str]] = {}
    for name, facts in report["sets"].items():
        leaked = report["leakage"].get(name)
        cells = {"rows": f"{facts['rows']:,}", "rows read": f"{facts['read']:,}"}
        cells |= {"unreadable": _some(len(facts["unreadable"])), "duplicates": _some(facts["duplicates"]["surplus"])}
        cells |= {"also in train": "" if leaked is None else _some(leaked["rows"])}
        columns[name] = cells | {f"{key}, pixels": _spread(facts[key]) for key in ("width", "height")}
    return _by_set("Sets; sizes upright, as least / median / greatest", columns)


def _kinds(sets: dict[str, Any]) -> Any:
    table = _table("Formats and modes", "set", "format", "mode")
    for name, facts in sets.items():
        if facts["formats"]:
            table.add_row(name, *(_shares(facts[key]) for key in ("formats", "modes")))
    return table


def _captions(sets: dict[str, Any]) -> Any:
    columns: dict[str, dict[str, str]] = {}
    for name, facts in sets.items():
        captions = facts["captions"]
        columns[name] = cells = {"rows without": _some(captions["rows_without"])}
        if captions["captions"]:
            cells |= {"captions": f"{captions['captions']:,}", "distinct": f"{captions['distinct']:,}"}
            cells |= {key: _spread(captions.get(key)) for key in ("characters", "words", "tokens")}
        if "cut" in captions:
            cells |= {f"longer than {captions['context_length']} tokens": f"{captions['cut_share']:.1%}"}
    has_any = any("captions" in cells for cells in columns.values())
    return _by_set("Captions; lengths as least / median / greatest", columns if has_any else {})


def _by_set(title: str, columns: dict[str, dict[str, str]]) -> Any:
    """A row a fact and a column a set, which stays narrow."""
    table = _table(title, "", *(f">{name}" for name in columns))
    for label in dict.fromkeys(label for cells in columns.values() for label in cells):
        row = [cells.get(label, "") for cells in columns.values()]
        if any(row):
            table.add_row(label, *row)
    return table


def _labels(sets: dict[str, Any]) -> Any:
    table = _table("Labels", "set", "attribute", ">classes", ">unlabelled", "largest", "smallest", ">not in train")
    for name, facts in sets.items():
        for attribute, labels in facts["labels"].items():
            sizes = list(labels["counts"].items())
            cells = [f"{_plain(label, 24)} {count:,}" for label, count in (sizes[0], sizes[-1])] if sizes else ["", ""]
            missing = labels.get("not_in_train")
            cells.append("" if missing is None else _some(len(missing)))
            table.add_row(name, _plain(attribute, 30), f"{labels['classes']:,}", _some(labels["unlabelled"]), *cells)
    return table


def _show_groups(report: dict[str, Any], console: Console) -> None:
    """Pictures that occur more than once, and those of evaluation sets that training sees."""
    groups = [(name, keys) for name, facts in report["sets"].items() for keys in facts["duplicates"]["keys"]]
    if groups:
        total = sum(facts["duplicates"]["groups"] for facts in report["sets"].values())
        table = _table(f"Equal pictures within a set, {min(total, 5)} of {total:,} groups", "set", "keys")
        for name, keys in groups[:5]:
            table.add_row(name, _keys(keys))
        console.print(table, "")
    for name, leaked in report["leakage"].items():
        if leaked["rows"]:
            table = _table(f"{name}: {leaked['rows']:,} of its pictures are in train too", "in train", f"in {name}")
            table.title_style = "bold red"
            for pair in leaked["keys"][:5]:
                table.add_row(_keys(pair["train"]), _keys(pair["set"]))
            console.print(table, "")


def _keys(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(_plain(key, 60) for key in keys[:3]) + more


def _some(count: int) -> str:
    """A number that is well where it is 0."""
    return f"[yellow]{count:,}[/]" if count else "0"


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else " / ".join(f"{values[key]:,.0f}" for key in ("min", "median", "max"))


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items())


def _plain(text: str, length: int) -> str:
    """Text from the data: on one line, not too long, nothing in it taken for markup."""
    from rich.markup import escape

    text = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return escape(text if len(text) <= length else text[: length - 3] + "...")


if __name__ == "__main__":
    main()
