"""The numbers of a sweep in the terminal: a row a run, the best of each number marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from repr.report.run import Run
from repr.report.tables import duration, headline

MAX_NUMBERS = 4  # that fit beside each other


def table(runs: Mapping[str, Run]) -> Table:
    """A row a run with its headline, the best of each number marked."""
    names = headline([*runs.values()])[:MAX_NUMBERS]
    result = Table(title="Sweep; * is the best", title_justify="left", header_style="bold", box=box.SIMPLE)
    result.add_column("run", overflow="fold")
    for name in (*names, "time"):
        result.add_column(name.replace("/", "/\n").replace("_", "_\n"), justify="right", overflow="fold")
    best = {name: _best(name, runs) for name in names}
    for label, run in runs.items():
        cells = [_cell(run.results.get(name), best[name]) for name in names]
        result.add_row(
            label.replace("+", "\n"), *cells, duration(run.facts["seconds"]) if "seconds" in run.facts else ""
        )
    chances = [
        next((run.results[name]["chance"] for run in runs.values() if name in run.results), None) for name in names
    ]
    result.add_section()
    result.add_row("chance", *("" if chance is None else f"{chance:.4f}" for chance in chances), style="dim")
    return result


def _best(name: str, runs: Mapping[str, Run]) -> float | None:
    """The best value of a number, by the sentence that says what it means; None where neither direction is better."""
    meaning = next((run.facts["meanings"][name] for run in runs.values() if name in run.facts.get("meanings", {})), "")
    values = [run.results[name]["value"] for run in runs.values() if name in run.results]
    if "higher is better" in meaning:
        return max(values)
    return min(values) if "lower is better" in meaning else None


def _cell(result: Any, best: float | None) -> str:
    if result is None:
        return ""
    return f"[bold]* {result['value']:.3f}[/]" if result["value"] == best else f"{result['value']:.3f}"
