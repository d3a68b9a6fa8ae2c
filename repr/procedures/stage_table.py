"""The results of all stages side by side, on the terminal and as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from repr.files import replacing
from repr.runs.folder import Results


def stage_table(columns: Mapping[str, Results], attributes: Sequence[str], headline: Sequence[str]) -> Table:
    """The probes of each attribute and the numbers of the headline, of every stage and of all joined, beside chance."""
    names = [name for name in list(columns.values())[-1] if _of_interest(name, attributes, headline)]
    table = Table(title="Evaluation by stage and attribute", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column.removeprefix("stage-"), justify="right")
    table.add_column("chance", justify="right", style="dim")
    for name in names:
        values = [results.get(name, (None, None)) for results in columns.values()]
        table.add_row(name, *(_short(value) for value, _ in values), _short(values[-1][1]))
    return table


def _of_interest(name: str, attributes: Sequence[str], headline: Sequence[str]) -> bool:
    """A probe of an attribute, or a number of the headline with its parts (``mmvp/image_score`` and ``_colour``)."""
    parts = any(name == shown or name.startswith(f"{shown}_") for shown in headline)
    return parts or any(name.endswith(f"_{attribute}") for attribute in attributes)


def _short(value: float | None) -> str:
    shown = "" if value is None else f"{value:.3f}"
    return shown.removeprefix("0") if shown.startswith("0.") else shown


def write_table(path: Path, columns: Mapping[str, Results]) -> None:
    """All results as CSV: a row a number, a column a stage, then ``joined`` and the level at chance."""
    names = dict.fromkeys(name for results in columns.values() for name in results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *columns, "chance"])
    for name in names:
        values = [results.get(name, (None, None)) for results in columns.values()]
        chance = next((chance for _, chance in values if chance is not None), None)
        writer.writerow([name, *(value for value, _ in values), chance])
    with replacing(path) as file:
        file.write(text.getvalue().encode())
