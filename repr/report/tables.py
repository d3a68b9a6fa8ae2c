"""Numbers beside chance, of the run and of published protocols; the facts of runs and what they differ in."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from repr.report.run import Run

NUM_TILES = 5
PLACES = ("run_folder", "resume")  # differ in any two runs
FOLDED_FROM = 15  # options that differ
MAX_CHARS = 160  # of a value of the config


def header(runs: Sequence[Run]) -> Iterator[str]:
    """What was trained on what, in a line or two a run."""
    yield '<div class="runs">'
    for run in runs:
        facts = "".join(f"<li><span>{name}</span>{html.escape(str(value))}</li>" for name, value in _facts(run).items())
        folder = html.escape(str(run.folder))
        yield f'<div class="run">{run.mark}<code>{folder}</code><ul class="facts">{facts}</ul></div>'
    yield "</div>"


def _facts(run: Run) -> dict[str, Any]:
    weights = {name: weight for name, weight in (run.option("objective.weights") or {}).items() if weight}
    terms = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items())
    flow, text, data = (_class_name(run, node) for node in ("objective", "text", "data.train"))
    facts = {
        "objective": flow and f"{flow} ({terms})",
        "backbone": run.option("backbone.name"),
        "text": text if run.option("objective.text") else None,
        "data": data,
        "pixels": run.option("image_size"),
        "batch": run.option("data.batch_size"),
        "optimizer": f"{run.option('optim.name')}, lr {run.option('optim.lr'):g}" if run.option("optim.lr") else None,
        "steps": max((int(row["step"]) + 1 for row in run.rows), default=None),
        "seed": run.option("seed"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _class_name(run: Run, node: str) -> str | None:
    target = run.option(f"{node}._target_")
    return target and target.rpartition(".")[2]


def tiles(runs: Sequence[Run]) -> Iterator[str]:
    """The headline of the evaluation, large; where there is none, the first numbers that have a level at chance."""
    headline = [name for run in runs for name in run.option("callbacks.evaluation.headline") or ()]
    names = [name for name in headline if any(name in run.results for run in runs)]
    if not names:
        results = [item for run in runs for item in run.results.items()]
        names = [name for name, result in results if result["chance"] is not None and not name.startswith("bank/")]
    if not names:
        return
    yield '<div class="tiles">'
    for name in list(dict.fromkeys(names))[:NUM_TILES]:
        yield f'<div class="card"><h3>{html.escape(name)}</h3>'
        for run, value in _values(name, runs):
            yield f'<span class="value" style="color:{run.colour}">{_number(name, value)}</span>'
        chance = _chance(name, runs)
        yield "</div>" if chance is None else f"<br><small>chance {chance:.4f}</small></div>"
    yield "</div>"


def evaluation(runs: Sequence[Run]) -> Iterator[str]:
    """A row a metric, a column a set, a bar a run: first what has a level at chance, then the rest."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    metrics = list(dict.fromkeys(name.split("/", 1)[1] for name in names))
    beside = {name.split("/", 1)[1] for name in names if _chance(name, runs) is not None}
    if names:
        yield '<p class="lead">Dotted, and in gray: the level at chance.</p><div class="tables">'
        yield from _table("beside chance", [metric for metric in metrics if metric in beside], runs)
        yield from _table("without a level at chance", [metric for metric in metrics if metric not in beside], runs)
        yield "</div>"


def _table(title: str, metrics: Sequence[str], runs: Sequence[Run]) -> Iterator[str]:
    names = [name.split("/", 1) for run in runs for name in run.results]
    sets = list(dict.fromkeys(of_set for of_set, metric in names if metric in metrics))
    if not metrics:
        return
    yield f'<div class="card scroll"><table><tr><th class="dim">{title}</th>'
    yield "".join(f"<th>{html.escape(of_set)}</th>" for of_set in sets) + "</tr>"
    for metric in metrics:
        cells = "".join(f"<td>{_cell(f'{of_set}/{metric}', runs)}</td>" for of_set in sets)
        yield f"<tr><td>{html.escape(metric)}</td>{cells}</tr>"
    yield "</table></div>"


def _cell(name: str, runs: Sequence[Run]) -> str:
    values, chance = _values(name, runs), _chance(name, runs)
    shown = _shown(name, values, chance)
    return shown if chance is None else f'<div class="beside"><div>{shown}</div><small>{chance:.4f}</small></div>'


def _shown(name: str, values: Sequence[tuple[Run, float]], chance: float | None) -> str:
    """A number of each run: as a bar from 0 to 1 with chance dotted, or as text where it has no level at chance."""
    if chance is None:
        texts = [(run, _number(name, value)) for run, value in values]
        return "<br>".join(
            f'<span style="color:{run.colour}">{text}</span>' if run.mark else text for run, text in texts
        )
    dots = f'<i style="--c:{_share(chance)}"></i>'
    return "".join(
        f'<div class="bar" style="--v:{_share(value)};--k:{run.colour}">{dots}<span>{_number(name, value)}</span></div>'
        for run, value in values
    )


def _share(value: float) -> str:
    return f"{min(max(value, 0.0), 1.0):.4f}"


def _number(name: str, value: float) -> str:
    """A number as it is shown; counts have no digits after the point."""
    return f"{value:.0f}" if name.split("/")[-1].startswith("num_") else f"{value:.3f}"


def _values(name: str, runs: Sequence[Run]) -> list[tuple[Run, float]]:
    return [(run, run.results[name]["value"]) for run in runs if name in run.results]


def _chance(name: str, runs: Sequence[Run]) -> float | None:
    levels = (run.results[name]["chance"] for run in runs if name in run.results)
    return next((level for level in levels if level is not None), None)


def protocols(runs: Sequence[Run]) -> Iterator[str]:
    """What ``repr.evaluate`` has written: a table a data set, a row a number and protocol; then what it left out."""
    entries: dict[tuple[str, str, str], list[tuple[Run, dict[str, Any]]]] = {}  # (data, number, hash of its protocol)
    for run in runs:
        latest = {
            (str(content["data"]["name"]), name, str(entry["protocol_hash"])): entry
            for content in run.evaluations.values()
            for name, entry in content["results"].items()
        }
        for key, entry in latest.items():
            entries.setdefault(key, []).append((run, entry))
    if entries:
        yield '<p class="lead">Rows of one protocol may be compared; open a protocol to read it.</p>'
    for data in sorted({data for data, _, _ in entries}):
        yield f"<h4>{html.escape(data)}</h4>" + '<div class="card scroll"><table>'
        yield "<tr><th></th><th>value</th><th>chance</th><th>protocol</th></tr>"
        for key, of_runs in entries.items():
            if key[0] == data:
                yield _protocol_row(*key[1:], of_runs)
        yield "</table></div>"
    for run in runs:
        for folder, content in run.evaluations.items():
            reasons = [f"{name}: {why}" for name, why in content.get("left_out", {}).items()] + content.get("notes", [])
            if reasons:
                items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
                yield f"{run.label}<details><summary>What {html.escape(folder)} left out, and notes</summary>"
                yield f"<ul>{items}</ul></details>"


def _protocol_row(name: str, protocol_hash: str, entries: Sequence[tuple[Run, Mapping[str, Any]]]) -> str:
    """A number of one protocol, which is folded behind its hash."""
    chance = next((entry["chance"] for _, entry in entries if entry["chance"] is not None), None)
    values = _shown(name, [(run, entry["value"]) for run, entry in entries], chance)
    protocol = html.escape(json.dumps(entries[0][1]["protocol"], indent=1, ensure_ascii=False))
    return (
        f'<tr><td>{html.escape(name)}</td><td>{values}</td><td class="dim">{"" if chance is None else f"{chance:.4f}"}'
        f'</td><td class="left"><details><summary><code>{html.escape(protocol_hash)}</code></summary>'
        f"<pre>{protocol}</pre></details></td></tr>"
    )


def differences(runs: Sequence[Run]) -> Iterator[str]:
    """What the configs of trained runs differ in, a row an option; many are folded."""
    trained = [run for run in runs if run.is_trained]
    flat = [_flat(OmegaConf.to_container(run.config, resolve=False)) for run in trained]
    names = [name for name in dict.fromkeys(name for options in flat for name in options) if name not in PLACES]
    names = [name for name in names if len({options.get(name) for options in flat}) > 1]
    if not names:
        return
    folded = "" if len(names) > FOLDED_FROM else " open"
    yield f"<details{folded}><summary>{len(names)} options</summary>"
    yield '<div class="tables"><div class="card scroll"><table><tr><th></th>'
    yield from (f"<th>{run.mark}{html.escape(run.name)}</th>" for run in trained)
    yield "</tr>"
    for name in names:
        cells = "".join(f'<td class="long">{html.escape(options.get(name, "–")[:MAX_CHARS])}</td>' for options in flat)
        yield f"<tr><td><code>{html.escape(name)}</code></td>{cells}</tr>"
    yield "</table></div></div></details>"


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted option -> value as text; lists are values."""
    options: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            options |= _flat(value, f"{prefix}{key}.")
        else:
            options[f"{prefix}{key}"] = "null" if value is None else str(value)
    return options
