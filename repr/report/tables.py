"""Numbers beside chance: the headline, the table of all sets, and what the configs of several runs differ in."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from repr.report.run import Run, short_name

NUM_TILES = 5
PLACES = ("run_folder", "resume")  # differ in any two runs
FOLDED_FROM = 15  # options that differ
MAX_CHARS = 160  # of a value of the config


def header(runs: Sequence[Run]) -> Iterator[str]:
    """What was trained on what, in a line or two a run."""
    yield '<div class="runs">'
    for run in runs:
        mark = f'<span class="mark" style="--k:{run.colour}"></span>' if len(runs) > 1 else ""
        facts = "".join(f"<li><span>{html.escape(k)}</span>{html.escape(v)}</li>" for k, v in _facts(run).items())
        yield f'<div class="run">{mark}<code>{html.escape(str(run.folder))}</code><ul class="facts">{facts}</ul></div>'
    yield "</div>"


def _facts(run: Run) -> dict[str, str]:
    weights = {name: weight for name, weight in (run.option("objective.weights") or {}).items() if weight}
    flow = _last(run.option("objective._target_"))
    terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    found = {
        "objective": flow and f"{flow} ({terms})",
        "backbone": run.option("backbone.name"),
        "text": _last(run.option("text._target_")) if run.option("objective.text") else None,
        "data": _last(run.option("data.train._target_")),
        "pixels": run.option("image_size"),
        "batch": run.option("data.batch_size"),
        "optimizer": f"{run.option('optim.name')}, lr {run.option('optim.lr'):g}" if run.option("optim.lr") else None,
        "steps": run.num_steps or None,
        "seed": run.option("seed"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _last(target: str | None) -> str | None:
    return target and target.rpartition(".")[2]


def tiles(runs: Sequence[Run]) -> Iterator[str]:
    """The headline of the evaluation, large; where there is none, the first numbers that have a level at chance."""
    headline = [name for run in runs for name in run.option("callbacks.evaluation.headline") or ()]
    names = [name for name in dict.fromkeys(headline) if any(name in run.results for run in runs)]
    if not names:
        names = [name for run in runs for name, result in run.results.items() if result["chance"] is not None]
        names = [name for name in dict.fromkeys(names) if not name.startswith("bank/")]
    if names:
        yield '<div class="tiles">'
    for name in names[:NUM_TILES]:
        yield f'<div class="card"><h3>{html.escape(name)}</h3>'
        for run in runs:
            if (result := run.results.get(name)) is not None:
                yield f'<span class="value" style="color:{run.colour}">{number(name, result["value"])}</span>'
        chance = _chance(name, runs)
        yield "</div>" if chance is None else f"<br><small>chance {chance:.4f}</small></div>"
    if names:
        yield "</div>"


def evaluation(runs: Sequence[Run]) -> Iterator[str]:
    """A row a metric, a column a set, a bar a run: first what has a level at chance, then the rest."""
    names = list(dict.fromkeys(name for run in runs for name in run.results))
    metrics = list(dict.fromkeys(name.split("/", 1)[1] for name in names))
    beside = [
        metric for metric in metrics if any(_chance(n, runs) is not None for n in names if n.endswith(f"/{metric}"))
    ]
    rest = [metric for metric in metrics if metric not in beside]
    if names:
        yield '<p class="lead">Dotted, and in gray: the level at chance.</p><div class="tables">'
        yield from _table("beside chance", beside, names, runs, _bars)
        yield from _table("without a level at chance", rest, names, runs, _plain)
        yield "</div>"


def _table(title: str, metrics: Sequence[str], names: Sequence[str], runs: Sequence[Run], cell: Any) -> Iterator[str]:
    sets = list(dict.fromkeys(name.split("/", 1)[0] for name in names if name.split("/", 1)[1] in metrics))
    if not metrics:
        return
    yield f'<div class="card scroll"><table><tr><th class="dim">{title}</th>'
    yield "".join(f"<th>{html.escape(name)}</th>" for name in sets) + "</tr>"
    for metric in metrics:
        cells = "".join(f"<td>{cell(f'{name}/{metric}', runs)}</td>" for name in sets)
        yield f"<tr><td>{html.escape(metric)}</td>{cells}</tr>"
    yield "</table></div>"


def _bars(name: str, runs: Sequence[Run]) -> str:
    """A bar a run."""
    values = [run.results.get(name, {}).get("value") for run in runs]
    chance = _chance(name, runs)
    parts = [
        bar(number(name, value), value, chance, run.colour)
        for run, value in zip(runs, values, strict=True)
        if value is not None
    ]
    shown = "" if chance is None else f"<small>{chance:.4f}</small>"
    return f'<div class="beside"><div>{"".join(parts)}</div>{shown}</div>' if parts else ""


def bar(text: str, value: float, chance: float | None, colour: str) -> str:
    """A number as a bar from 0 to 1, with chance dotted."""
    length, tick = (min(max(share, 0.0), 1.0) for share in (value, chance or 0.0))
    mark = "" if chance is None else f'<i style="--c:{tick:.4f}"></i>'
    style = f"--v:{length:.4f};--k:{colour}"
    return f'<div class="bar" style="{style}">{mark}<span>{text}</span></div>'


def _plain(name: str, runs: Sequence[Run]) -> str:
    values = [(run.colour, run.results[name]["value"]) for run in runs if name in run.results]
    if len(runs) == 1:
        return "".join(number(name, value) for _, value in values)
    return "<br>".join(f'<span style="color:{colour}">{number(name, value)}</span>' for colour, value in values)


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """What the configs of trained runs differ in, a row an option; many are folded."""
    trained = [run for run in runs if run.is_trained]
    flat = [_flat(OmegaConf.to_container(run.config, resolve=False)) for run in trained]
    names = [name for name in dict.fromkeys(name for one in flat for name in one) if name not in PLACES]
    names = [name for name in names if len({one.get(name) for one in flat}) > 1]
    if not names:
        return
    folded = "" if len(names) > FOLDED_FROM else " open"
    yield f"<details{folded}><summary>{len(names)} options</summary>"
    yield '<div class="tables"><div class="card scroll"><table><tr><th></th>'
    for run in trained:
        yield f'<th><span class="mark" style="--k:{run.colour}"></span>{html.escape(short_name(run, runs))}</th>'
    yield "</tr>"
    for name in names:
        cells = "".join(f'<td class="long">{html.escape(one.get(name, "–")[:MAX_CHARS])}</td>' for one in flat)
        yield f"<tr><td><code>{html.escape(name)}</code></td>{cells}</tr>"
    yield "</table></div></div></details>"


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Option -> value as text; lists are values."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": "null" if value is None else str(value)}
        )
    return found


def number(name: str, value: float | None) -> str:
    """A number as it is shown; counts have no digits after the point."""
    return "" if value is None else f"{value:.0f}" if name.split("/")[-1].startswith("num_") else f"{value:.3f}"


def _chance(name: str, runs: Sequence[Run]) -> float | None:
    results = [run.results.get(name) for run in runs]
    return next((result["chance"] for result in results if result and result["chance"] is not None), None)
