"""What a terminal shows of an evaluation: the numbers that a person wants first, or all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from repr.runs.folder import load_facts, load_results

NUM_FIRST = 10
OF_THE_RUN = ("num_bad", "num_retries")  # counts that no protocol computes: they are shown wherever there are any


class Entry(NamedTuple):
    """One number of an evaluation, its level at chance, what it means, and the key of its protocol."""

    value: float
    chance: float | None
    meaning: str = ""
    protocol: str = ""


def of_run(folder: str | Path) -> dict[str, Entry]:
    """``<set>/<metric>`` -> what the last evaluation of a run has found; empty where there was none."""
    facts, results = load_facts(folder), dict[str, Any](load_results(folder))
    meanings, protocols = facts.get("meanings", {}), facts.get("protocols", {})
    return {
        name: Entry(one["value"], one["chance"], meanings.get(name, ""), protocols.get(name, ""))
        for name, one in results.items()
    }


def first(entries: Mapping[str, Entry], headline: Sequence[str] = ()) -> list[str]:
    """Choose about ten numbers: those of ``headline``, then one of each protocol and set.

    Numbers with a level at chance come before others, the first set of each protocol before the second set of any,
    and all sets of a protocol show the same metric. Counts of the run itself come last.
    """
    families: dict[str, dict[str, list[str]]] = {}  # protocol -> set -> names
    for name, entry in entries.items():
        if _metric(name) not in OF_THE_RUN:
            families.setdefault(entry.protocol, {}).setdefault(name.split("/", 1)[0], []).append(name)
    chosen = [name for name in headline if name in entries]
    metrics = set(map(_metric, chosen))
    others = []
    for sets in families.values():
        for place, names in enumerate(sets.values()):
            name = min(names, key=lambda name: (_metric(name) not in metrics, entries[name].chance is None))
            metrics.add(_metric(name))
            if not set(names) & set(chosen):
                others.append((entries[name].chance is None, place, name))
    others.sort(key=lambda other: other[:2])
    chosen += [name for _, _, name in others[: max(0, NUM_FIRST - len(chosen))]]
    return chosen + [name for name in entries if _metric(name) in OF_THE_RUN]


def first_lines(entries: Mapping[str, Entry], headline: Sequence[str] = ()) -> RenderableType:
    """Lay out what :func:`first` chooses: a line a number, and below those of one metric what it means."""
    names = first(entries, headline)
    width = max(map(len, names))
    lines: list[RenderableType] = [Text(f"{'Evaluation':{width}}  {'value':>8}  {'chance':>8}", style="bold")]
    for metric in dict.fromkeys(map(_metric, names)):
        of_metric = [name for name in names if _metric(name) == metric]
        for name in of_metric:
            value, chance = _cells(name, entries)
            lines.append(Text(f"{name:{width}}  {value:>8}  ").append(f"{chance:>8}", style="dim"))
        lines += [Padding(Text(entries[of_metric[0]].meaning, style="dim"), (0, 0, 0, 2))]
    return Group(*lines)


def all_lines(entries: Mapping[str, Entry]) -> Table:
    """Lay out all numbers: a row a metric, and of each set the value beside its level at chance."""
    sets = list(dict.fromkeys(name.split("/", 1)[0] for name in entries))
    table = Table(title="Evaluation", title_justify="left", header_style="bold")
    table.add_column("metric")
    for of_set in sets:
        table.add_column(of_set, justify="right")
        table.add_column("chance", justify="right", style="dim")
    for metric in dict.fromkeys(map(_metric, entries)):
        table.add_row(metric, *(cell for of_set in sets for cell in _cells(f"{of_set}/{metric}", entries)))
    return table


def _cells(name: str, entries: Mapping[str, Entry]) -> tuple[str, str]:
    """Value and level at chance as they are printed; counts have no digits after the point."""
    if name not in entries:
        return "", ""
    value, chance, *_ = entries[name]
    shown = f"{value:.0f}" if _metric(name).startswith("num_") else f"{value:.3f}"
    return shown, "" if chance is None else f"{chance:.4f}"


def _metric(name: str) -> str:
    return name.split("/", 1)[-1]
