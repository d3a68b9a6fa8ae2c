"""Curves over the steps of a run, and spectra."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repr.report.run import CHANCE, Run, short_name

DOTTED = {"color": "#94a3b8", "width": 1.5, "dash": "dot"}
AXES = {"showline": False, "gridcolor": "#eef2f7", "zeroline": False, "automargin": False}


def curve_names(runs: Sequence[Run]) -> tuple[list[str], list[str], list[str]]:
    """The loss and its terms, what was evaluated more than once, and whatever else was logged."""
    logged = sorted({name for run in runs for name in row_names(run) if not name.endswith(CHANCE)})
    weights = [run.option("objective.weights") or {} for run in runs]
    terms = {f"train/{name}" for each in weights for name in each}
    losses = [name for name in logged if name in terms]
    if len(losses) != 1 or any(weight != 1 for each in weights for weight in each.values() if weight):
        losses = [name for name in logged if name == "train/loss"] + losses  # else the loss is its only term
    evaluated = [name for name in logged if not name.startswith("train/")]
    several = [name for name in evaluated if any(len(run.curve(name)[0]) > 1 for run in runs)]
    return losses, several, [name for name in logged if name not in {"train/loss", *terms, *evaluated}]


def row_names(run: Run) -> set[str]:
    """Columns of the metrics of a run."""
    return {name for row in run.rows for name in row} - {"step", "epoch"}


def plots(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """A card a column."""
    if names:
        yield f'<div class="plots">{"".join(_curves(name, name.removeprefix("train/"), runs) for name in names)}</div>'


def losses(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """Likewise of losses, where chance is a level to get away from."""
    if any(name + CHANCE in row_names(run) for run in runs for name in names):
        yield '<p class="lead">Dotted: the value at chance, of features that have no relation to each other.</p>'
    yield from plots(names, runs)


def over_time(names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    """Likewise of evaluations, set by set, in the order of the results."""
    order = {name: place for run in reversed(runs) for place, name in enumerate(run.results)}
    names = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    for group in dict.fromkeys(name.split("/", 1)[0] for name in names):
        mine = [name for name in names if name.split("/", 1)[0] == group]
        yield f"<h4>{html.escape(group)}</h4>"
        yield f'<div class="plots small">{"".join(_curves(name, name.split("/", 1)[1], runs) for name in mine)}</div>'


def _curves(name: str, title: str, runs: Sequence[Run]) -> str:
    """A column over the steps, with its level at chance: the logged one, or that of the last evaluation."""
    import plotly.graph_objects as go

    figure, constants, last = go.Figure(), dict[float, list[int]](), []
    for run in runs:
        steps, values = run.curve(name)
        mode = "lines" if len(steps) > 30 else "lines+markers"
        line = {"color": run.colour, "width": 2}
        figure.add_scatter(x=steps, y=values, mode=mode, line=line, name=short_name(run, runs))
        _, levels = run.curve(name + CHANCE)
        constant = run.results.get(name, {}).get("chance")
        if not levels and constant is not None:
            levels = [constant] * len(steps)
        if steps and levels and len(set(levels)) == 1:  # equal ones of several runs are one line
            constants.setdefault(levels[0], []).extend(steps)
        elif levels:
            figure.add_scatter(x=steps, y=levels, mode="lines", line=DOTTED, name="chance")
        last += levels[-1:]
    for level, steps in constants.items():
        figure.add_scatter(x=[min(steps), max(steps)], y=[level, level], mode="lines", line=DOTTED, name="chance")
    shown = dict.fromkeys(f"{level:.4g}" for level in last)
    note = f"chance {', '.join(shown)}" if shown else ""
    figure.update_yaxes(tickformat=".5~g")
    return card(title, figure, note=note)


def spectra(runs: Sequence[Run]) -> Iterator[str]:
    """For each set and table of features the eigenvalues of their covariance, as shares of the variance."""
    import plotly.graph_objects as go

    keys = [(name, key) for run in runs for name, arrays in run.exhibits.items() for key in arrays]
    keys = [(name, key) for name, key in dict.fromkeys(keys) if key.startswith("spectrum/")]
    if keys:
        yield '<p class="lead">Eigenvalues of the covariance, as shares of the variance, the strongest first.'
        yield ' A steep fall is a representation that uses few of its dimensions.</p><div class="plots">'
    for name, key in keys:
        figure, ranks = go.Figure(), []
        for run in runs:
            values = run.exhibits.get(name, {}).get(key)
            if values is None or not values.sum():
                continue
            share = values / values.sum()
            kept = share > 1e-12  # what rounding leaves is none
            x, y = np.arange(1, len(share) + 1)[kept], share[kept]
            figure.add_scatter(
                x=x, y=y, mode="lines", line={"color": run.colour, "width": 2}, name=short_name(run, runs)
            )
            ranks.append(f'<b style="color:{run.colour}">{effective_rank(values):.1f}</b>')
        figure.update_yaxes(type="log", exponentformat="power", dtick=2)
        figure.update_xaxes(title={"text": "direction", "standoff": 4})
        dim = max(len(run.exhibits[name][key]) for run in runs if key in run.exhibits.get(name, {}))
        note = f"effective rank {' · '.join(ranks)} of {dim}" if ranks else "all features are equal"
        yield card(f"{name}: {key.removeprefix('spectrum/')}", figure, note=note, legible=True)
    if keys:
        yield "</div>"


def effective_rank(eigenvalues: np.ndarray) -> float:
    """Exponential of the entropy of the singular values, see :func:`repr.metrics.geometry.effective_rank`."""
    singular = np.sqrt(eigenvalues[eigenvalues > 0])
    p = singular / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def card(title: str, figure: Any, *, note: str = "", legible: bool = False) -> str:
    """A small figure under its title; the note is HTML."""
    figure.update_layout(
        template="plotly_white", height=230 if legible else 215, showlegend=False, font={"size": 11},
        hovermode="x unified", margin={"l": 52, "r": 10, "t": 8, "b": 38 if legible else 26},
    )  # fmt: skip
    figure.update_xaxes(**AXES)
    figure.update_yaxes(**AXES)
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    note = f'<div class="dim">{note}</div>' if note else ""
    return f'<div class="card"><h3>{html.escape(title)}</h3>{note}{plot}</div>'
