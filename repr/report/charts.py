"""Curves over the steps of a run, and spectra."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from repr.config import flat
from repr.metrics.exhibits import Exhibits
from repr.report.run import CHANCE, Run, exhibit_names, explained

LEAST = 3  # points that a curve is drawn of
AT_CHANCE = {"mode": "lines", "line": {"color": "#94a3b8", "width": 1.5, "dash": "dot"}, "name": "chance"}
CLEAR = "rgba(0, 0, 0, 0)"  # the page lies behind
LAYOUT = {
    "showlegend": False, "font": {"size": 11}, "hovermode": "x unified", "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR,
    "margin": {"l": 52, "r": 10, "t": 8, "b": 26},
}  # fmt: skip
AXES = {"showline": False, "gridcolor": "#eef2f7", "zeroline": False, "automargin": False}


def curve_names(runs: Sequence[Run]) -> tuple[list[str], list[str], list[str]]:
    """The loss and its terms, what was evaluated more than once, and whatever else was logged."""
    logged = sorted(name for name in _columns(runs) - {"step", "epoch"} if not name.endswith(CHANCE))
    weights = [flat(run.option("objective.weights")) for run in runs]
    terms = {f"train/{name}" for each in weights for name in each}
    losses = [name for name in logged if name in terms]
    if len(losses) != 1 or any(weight != 1 for each in weights for weight in each.values() if weight):
        losses = [name for name in logged if name == "train/loss"] + losses  # else the loss is its only term
    evaluated = [name for name in logged if not name.startswith("train/")]
    several = [name for name in evaluated if any(len(run.curve(name)[0]) > 1 for run in runs)]
    return losses, several, [name for name in logged if name not in {"train/loss", *terms, *evaluated}]


def _columns(runs: Sequence[Run]) -> set[str]:
    return {name for run in runs for row in run.rows for name in row}


def losses(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """The losses, whose value at chance is a level to get away from."""
    if not _columns(runs).isdisjoint(name + CHANCE for name in names):
        yield '<p class="lead">Chance, dotted: the value of features that have no relation to each other.</p>'
    yield from plots(names, runs)


def plots(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """The columns of training."""
    yield from _drawn([(name, name.removeprefix("train/"), explained(name, runs)) for name in names], runs, "plots")


def over_time(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """The columns of evaluation, set by set, in the order of the results, which say what they mean."""
    order = {name: place for run in reversed(runs) for place, name in enumerate(run.results)}
    sets: dict[str, list[tuple[str, str, str]]] = {}  # set -> (column, metric, no sentence)
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        of_set, metric = name.split("/", 1)
        sets.setdefault(of_set, []).append((name, metric, ""))
    for of_set, columns in sets.items():
        yield f"<h4>{html.escape(of_set)}</h4>"
        yield from _drawn(columns, runs, "plots small")


def _drawn(columns: Sequence[tuple[str, str, str]], runs: Sequence[Run], kind: str) -> Iterator[str]:
    """A card a column (name, title, sentence as HTML); those with too few points for a line are rows of a table."""
    few = [column for column in columns if max(len(run.curve(column[0])[0]) for run in runs) < LEAST]
    if few:
        rows = {column: _cells(column[0], runs) for column in few}
        heads = [head for head in ("first", "last", "chance") if any(cells[head] for cells in rows.values())]
        yield '<div class="tables"><div class="card scroll"><table class="numbers"><tr><th></th>'
        yield "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
        for (_, title, meaning), cells in rows.items():
            shown = "".join(f'<td data-head="{head}">{cells[head]}</td>' for head in heads)
            yield f"<tr><td>{html.escape(title)}{meaning}</td>{shown}</tr>"
        yield "</table></div></div>"
    if curves := [_curves(*column, runs) for column in columns if column not in few]:
        yield f'<div class="{kind}">{"".join(curves)}</div>'


def _cells(name: str, runs: Sequence[Run]) -> dict[str, str]:
    """A column of one point or two as HTML: of each run the first and the last value with their steps, and chance."""
    parts: dict[str, dict[str, None]] = {"first": {}, "last": {}, "chance": {}}  # what runs have in common once
    for run in runs:
        steps, values = run.curve(name)
        colour = f' style="color:{run.colour}"' if run.mark else ""
        points = [f"<span{colour}>{y:.5g}</span> <small>step {x}</small>" for x, y in zip(steps, values, strict=True)]
        levels = [f"{level:.4g}" for level in _levels(name, run, len(steps))]
        for head, shown in (("first", points[:-1]), ("last", points[-1:]), ("chance", levels[-1:])):
            parts[head] |= dict.fromkeys(shown)
    return {head: "<br>".join(shown) for head, shown in parts.items()}


def _levels(name: str, run: Run, num: int) -> list[float]:
    """The level at chance of a column at each of its points: the logged one, or that of the last evaluation."""
    levels = run.curve(name + CHANCE)[1]
    constant = run.results.get(name, {}).get("chance")
    return levels if levels or constant is None else [constant] * num


def _curves(name: str, title: str, meaning: str, runs: Sequence[Run]) -> str:
    """A column over the steps, with its level at chance."""
    lines, constants, last = list[dict[str, Any]](), dict[float, list[int]](), []
    for run in runs:
        steps, values = run.curve(name)
        lines.append({"x": steps, "y": values, "mode": "lines" if len(steps) > 30 else "lines+markers", **_style(run)})
        levels = _levels(name, run, len(steps))
        if steps and len(set(levels)) == 1:  # equal ones of several runs are one line
            constants.setdefault(levels[0], []).extend(steps)
        elif levels:
            lines.append({"x": steps, "y": levels, **AT_CHANCE})
        last += levels[-1:]
    for level, steps in constants.items():
        lines.append({"x": [min(steps), max(steps)], "y": [level, level], **AT_CHANCE})
    shown = dict.fromkeys(f"{level:.4g}" for level in last)
    note = meaning + (f"chance {', '.join(shown)}" if shown else "")
    return _card(title, lines, {"height": 215, "yaxis": {"tickformat": ".5~g"}}, note)


def spectra(runs: Sequence[Run]) -> Iterator[str]:
    """For each set and table of features the eigenvalues of their covariance, as shares of the variance."""
    names = exhibit_names(runs, "spectrum/")
    if not names:
        return
    yield '<p class="lead">Eigenvalues of the covariance, as shares of the variance, the strongest first.'
    yield ' A steep fall is a representation that uses few of its dimensions.</p><div class="plots">'
    for of_set, table in names:
        exhibits = [(run, run.exhibits.get(of_set, {})) for run in runs]
        name = f"spectrum/{table}"
        spectra = [(run, arrays[name], _num_rows(arrays, name)) for run, arrays in exhibits if name in arrays]
        yield _spectrum(f"{of_set}: {table}", spectra)
    yield "</div>"


def _num_rows(arrays: Exhibits, name: str) -> int:
    """The samples of a spectrum; where a run has not kept it, as many as leave its rank free."""
    return int(arrays.get("num_samples", len(arrays[name]) + 1))


def _spectrum(title: str, spectra: Sequence[tuple[Run, np.ndarray, int]]) -> str:
    from scipy.stats import entropy

    lines, ranks, most = list[dict[str, Any]](), [], dict[int, None]()
    for run, eigenvalues, num_rows in spectra:
        if not eigenvalues.sum():
            continue
        share = eigenvalues / eigenvalues.sum()
        kept = share > 1e-12  # what rounding leaves is none
        directions = np.arange(1, len(share) + 1)
        lines.append({"x": directions[kept].tolist(), "y": share[kept].tolist(), "mode": "lines", **_style(run)})
        rank = np.exp(entropy(np.sqrt(eigenvalues)))  # as repr.metrics.geometry.effective_rank
        ranks.append(f'<b style="color:{run.colour}">{rank:.1f}</b>')
        most[min(len(eigenvalues), num_rows - 1)] = None
    layout = {
        "height": 230, "margin": {"l": 52, "r": 10, "t": 8, "b": 38},
        "xaxis": {"title": {"text": "direction", "standoff": 4}},
        "yaxis": {"type": "log", "exponentformat": "power", "dtick": 2},
    }  # fmt: skip
    note = (
        f"effective rank {' · '.join(ranks)} of at most {', '.join(map(str, most))}"
        if ranks
        else "all features are equal"
    )
    return _card(title, lines, layout, note)


def _style(run: Run) -> dict[str, Any]:
    return {"line": {"color": run.colour, "width": 2}, "name": run.name}


def _card(title: str, lines: Sequence[dict[str, Any]], layout: Mapping[str, Any], note: str) -> str:
    """A small figure under its title; lines and layout are plotly's, and the note is HTML."""
    import plotly.io

    axes = {axis: {**layout.get(axis, {}), **AXES} for axis in ("xaxis", "yaxis")}
    # As they are: plotly's classes take a quarter of a short run's time to check them.
    figure = {"data": [{"type": "scatter", **line} for line in lines], "layout": {**LAYOUT, **layout, **axes}}
    config = {"displayModeBar": False, "responsive": True}
    plot = plotly.io.to_html(figure, config=config, include_plotlyjs=False, full_html=False, validate=False)
    note = note and f'<div class="dim">{note}</div>'
    return f'<div class="card"><h3>{html.escape(title)}</h3>{note}{plot}</div>'
