"""Run folders as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repr.callbacks.metrics_file import Row, read_rows
from repr.config import load_run
from repr.files import replacing

RESULTS = "results.json"  # name -> {"value", "chance"} of the last evaluation
PAGE = "report.html"
POINTS = 1000  # of a curve; longer ones are averaged in so many parts
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #f8fafc; margin: 0 auto; max-width: 1180px;
       padding: 24px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 10px; } h3 { font-size: 14px; margin: 0; }
.dim, small { color: #64748b; } code { font-size: 13px; }
.tiles, .plots { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.card { background: white; border: 1px solid #e2e8f0; border-radius: 10px; padding: 12px 16px; overflow: hidden; }
.value { font-size: 26px; font-weight: 600; font-variant-numeric: tabular-nums; margin-right: 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.dim { padding-left: 0; }
figure { margin: 0 0 14px; } figure img { max-width: 100%; display: block; margin-top: 6px; }
pre { overflow-x: auto; font-size: 12px; }
"""


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path

    @cached_property
    def config(self) -> DictConfig:
        """The composed config."""
        return load_run(self.folder)

    def option(self, key: str) -> Any:
        """A value of the config; None where it is not set."""
        return OmegaConf.select(self.config, key)

    @cached_property
    def rows(self) -> list[Row]:
        """Of ``metrics.csv``."""
        return read_rows(self.folder / "metrics.csv")

    @cached_property
    def results(self) -> dict[str, dict[str, float | None]]:
        """Of the last evaluation, value and level at chance; empty before the run has ended."""
        path = self.folder / RESULTS
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def pictures(self) -> list[Path]:
        """The views first."""
        return sorted(self.folder.glob("pictures/*.png"), key=lambda path: (path.stem != "views", path.stem))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column."""
        points = [(int(row["step"]), float(row[name])) for row in self.rows if name in row]
        size = -(-len(points) // POINTS)
        parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
        return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of one run, or of several side by side.

    Args:
        folders: run folders.
        out: the file; replaced as a whole.

    Raises:
        ConfigError: a folder is not that of a run.
    """
    with replacing(out) as file:
        file.write("\n".join(_page([Run(folder) for folder in folders])).encode())


def _page(runs: Sequence[Run]) -> Iterator[str]:
    import plotly.offline

    title = html.escape(", ".join(dict.fromkeys(str(run.config.name) for run in runs)))
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<link rel="icon" href="data:,">'  # or a browser asks for one
    yield f"<style>{STYLE}</style><script>{plotly.offline.get_plotlyjs()}</script></head><body><h1>{title}</h1>"
    for run, colour in zip(runs, _colours(runs), strict=True):
        steps = max((int(row["step"]) + 1 for row in run.rows), default=0)
        mark = f'<span style="color:{colour}">&#9632;</span> ' if len(runs) > 1 else ""
        yield f'<div class="dim">{mark}<code>{html.escape(str(run.folder))}</code> · {steps} steps</div>'
    yield from _tiles(runs)
    losses, evaluated, other = _curve_names(runs)
    yield from _plots("Losses", losses, runs)
    yield from _table(runs)
    yield from _pictures(runs)
    yield from _plots("Evaluation over time", evaluated, runs)
    yield from _plots("Also logged in training", other, runs)
    for run in runs:
        config = html.escape((run.folder / "config.yaml").read_text())
        yield f"<h2>Config{_of(run, runs)}</h2><details><summary>config.yaml</summary><pre>{config}</pre></details>"
    yield "</body></html>"


def _tiles(runs: Sequence[Run]) -> Iterator[str]:
    """The headline of the evaluation, large."""
    headline = runs[0].option("callbacks.evaluation.headline") or ()
    names = [name for name in headline if any(name in run.results for run in runs)]
    yield '<h2></h2><div class="tiles">' if names else "<div>"
    for name in names:
        yield f'<div class="card"><h3>{html.escape(name)}</h3>'
        for run, colour in zip(runs, _colours(runs), strict=True):
            if (result := run.results.get(name)) is not None:
                yield f'<span class="value" style="color:{colour}">{_number(name, result["value"])}</span>'
        chance = next((result["chance"] for run in runs if (result := run.results.get(name))), None)
        yield "</div>" if chance is None else f"<br><small>chance {chance:.4f}</small></div>"
    yield "</div>"


def _curve_names(runs: Sequence[Run]) -> tuple[list[str], list[str], list[str]]:
    """The loss and its terms, what was evaluated more than once, and whatever else was logged."""
    logged = sorted({name for run in runs for row in run.rows for name in row} - {"step", "epoch"})
    terms = {f"train/{name}" for run in runs for name in run.option("objective.weights") or ()}
    losses = [name for name in logged if name == "train/loss"] + [name for name in logged if name in terms]
    evaluated = [name for name in logged if not name.startswith("train/")]
    several = [name for name in evaluated if any(len(run.curve(name)[0]) > 1 for run in runs)]
    return losses, several, [name for name in logged if name not in {*losses, *evaluated}]


def _plots(title: str, names: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    if names:
        yield f'<h2>{title}</h2><div class="plots">'
        yield from (_plot(name, runs) for name in names)
        yield "</div>"


def _plot(name: str, runs: Sequence[Run]) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for run, colour in zip(runs, _colours(runs), strict=True):
        steps, values = run.curve(name)
        mode = "lines" if len(steps) > 30 else "lines+markers"
        figure.add_scatter(x=steps, y=values, mode=mode, line={"color": colour, "width": 2}, name=run.folder.name)
        if (chance := run.results.get(name, {}).get("chance")) is not None:
            figure.add_hline(y=chance, line={"dash": "dot", "color": "#94a3b8"}, annotation_text="chance")
    figure.update_layout(
        template="plotly_white", height=220, margin={"l": 45, "r": 10, "t": 12, "b": 30}, showlegend=False,
        xaxis_title=None, font={"size": 11},
    )  # fmt: skip
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
    return f'<div class="card"><h3>{html.escape(name)}</h3>{plot}</div>'


def _table(runs: Sequence[Run]) -> Iterator[str]:
    """A row a metric; for every set and run the value beside its level at chance."""
    names = list(dict.fromkeys(name for run in runs for name in run.results))
    sets = list(dict.fromkeys(name.split("/", 1)[0] for name in names))
    metrics = list(dict.fromkeys(name.split("/", 1)[1] for name in names))
    if not names:
        return
    yield '<h2>Evaluation</h2><div class="card scroll"><table><tr><th></th>'
    for name in sets:
        yield f'<th colspan="{len(runs) + 1}">{html.escape(name)}</th>'
    yield "</tr>"
    if len(runs) > 1:
        marks = "".join(f'<th style="color:{colour}">&#9632;</th>' for colour in _colours(runs))
        yield f"<tr><th></th>{(marks + '<th></th>') * len(sets)}</tr>"
    for metric in metrics:
        yield f"<tr><td>{html.escape(metric)}</td>"
        for name in sets:
            results = [run.results.get(f"{name}/{metric}", {}) for run in runs]
            yield "".join(f"<td>{_number(metric, result.get('value'))}</td>" for result in results)
            chance = next((result["chance"] for result in results if result.get("chance") is not None), None)
            yield f'<td class="dim">{"" if chance is None else f"{chance:.4f}"}</td>'
        yield "</tr>"
    yield "</table><small>In gray: the level at chance.</small></div>"


def _pictures(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.pictures:
            yield f"<h2>Pictures{_of(run, runs)}</h2>"
        for path in run.pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            name = html.escape(path.stem.replace("_", " "))
            yield f'<figure class="card"><h3>{name}</h3><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def _colours(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f' <span class="dim">{html.escape(str(run.folder))}</span>' if len(runs) > 1 else ""


def _number(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if name.split("/")[-1].startswith("num_") else f"{value:.3f}"
