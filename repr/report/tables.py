"""Numbers beside chance, of the run and of published protocols; the facts of runs and what they differ in."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from repr.config import flat
from repr.report.run import Run, explained, explanation

NUM_TILES = 5
PLACES = ("run_folder", "resume")  # differ in any two runs
FOLDED_FROM = 15  # options that differ
MAX_CHARS = 160  # of a value of the config

Entries = dict[Run, Mapping[str, Any]]  # of each run that has a number: its value, level at chance, ...


def header(runs: Sequence[Run]) -> Iterator[str]:
    """What was trained on what, in a line or two a run."""
    yield '<div class="runs">'
    for run in runs:
        facts = "".join(f"<li><span>{name}</span>{html.escape(str(value))}</li>" for name, value in _facts(run).items())
        folder = html.escape(str(run.folder))
        yield f'<div class="run">{run.mark}<code>{folder}</code><ul class="facts">{facts}</ul></div>'
    yield "</div>"


def _facts(run: Run) -> dict[str, Any]:
    weights = {name: weight for name, weight in flat(run.option("objective.weights")).items() if weight}
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
        **_circumstances(run),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _circumstances(run: Run) -> dict[str, Any]:
    """Time, device and versions, of runs that have kept them."""
    facts = run.facts
    known = [told["versions"] for told in (facts, *run.evaluations.values()) if "versions" in told]
    versions: dict[str, str] = known[0] if known else {}
    processes = f"{facts['processes']} x " if facts.get("processes", 1) != 1 else ""
    return {
        "time": duration(facts["seconds"]) if "seconds" in facts else None,
        "device": f"{processes}{facts['device']}" if "device" in facts else None,
        "precision": facts.get("precision"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    }


def duration(seconds: float) -> str:
    """A time in its two largest units, such as ``3 h 12 min``."""
    for size, unit, part in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if seconds >= size:
            rest = int(seconds % size // {"h": 3600, "min": 60, "s": 1}[part])
            return f"{int(seconds // size)} {unit} {rest} {part}"
    return f"{seconds:.1f} s"


def _class_name(run: Run, node: str) -> str | None:
    target = run.option(f"{node}._target_")
    return target and target.rpartition(".")[2]


def headline(runs: Sequence[Run]) -> list[str]:
    """The numbers that come first: the headline of the evaluation, or else the first that have a level at chance."""
    chosen = [name for run in runs for name in run.option("callbacks.evaluation.headline") or ()]
    names = [name for name in chosen if any(name in run.results for run in runs)]
    if not names:
        results = [item for run in runs for item in run.results.items()]
        names = [name for name, result in results if result["chance"] is not None and not name.startswith("bank/")]
    return list(dict.fromkeys(names))[:NUM_TILES]


def tiles(runs: Sequence[Run]) -> Iterator[str]:
    """The headline of the evaluation, large."""
    if not (names := headline(runs)):
        return
    yield '<div class="tiles">'
    for name in names:
        yield f'<div class="card"><h3>{html.escape(name)}</h3>'
        entries = _entries(name, runs)
        for run, entry in entries.items():
            yield f'<span class="value" style="color:{run.colour}">{_number(name, entry["value"])}</span>'
        chance = _chance(entries)
        yield "" if chance is None else f"<br><small>chance {chance:.4f}</small>"
        yield explained(name, runs) + "</div>"
    yield "</div>"


def evaluation(runs: Sequence[Run]) -> Iterator[str]:
    """A row a metric, a column a set, a bar a run: first what has a level at chance, then the rest."""
    names = {name: name.split("/", 1) for run in runs for name in run.results}  # name -> set, metric
    beside = {metric for name, (_, metric) in names.items() if _chance(_entries(name, runs)) is not None}
    if not names:
        return
    yield '<p class="lead">Dotted, and in gray: the level at chance.</p><div class="tables">'
    for title, has_chance in (("beside chance", True), ("without a level at chance", False)):
        pairs = [(of_set, metric) for of_set, metric in names.values() if (metric in beside) == has_chance]
        if not pairs:
            continue
        sets = dict.fromkeys(of_set for of_set, _ in pairs)
        yield f'<div class="card scroll"><table class="numbers"><tr><th class="dim">{title}</th>'
        yield "".join(f"<th>{html.escape(of_set)}</th>" for of_set in sets) + "</tr>"
        for metric in dict.fromkeys(metric for _, metric in pairs):
            cells = "".join(
                f'<td data-head="{html.escape(of_set)}">{_cell(f"{of_set}/{metric}", runs)}</td>' for of_set in sets
            )
            meaning = next((told for of_set in sets if (told := explained(f"{of_set}/{metric}", runs))), "")
            yield f"<tr><td>{html.escape(metric)}{meaning}</td>{cells}</tr>"
        yield "</table></div>"
    yield "</div>"


def _cell(name: str, runs: Sequence[Run]) -> str:
    entries = _entries(name, runs)
    shown, chance = _shown(name, entries), _chance(entries)
    return shown if chance is None else f'<div class="beside"><div>{shown}</div><small>{chance:.4f}</small></div>'


def _entries(name: str, runs: Sequence[Run]) -> Entries:
    return {run: run.results[name] for run in runs if name in run.results}


def _chance(entries: Entries) -> float | None:
    return next((entry["chance"] for entry in entries.values() if entry["chance"] is not None), None)


def _shown(name: str, entries: Entries) -> str:
    """A number of each run: as a bar from 0 to 1 with chance dotted, or as text where it has no level at chance."""
    texts = [(run, entry["value"], _number(name, entry["value"])) for run, entry in entries.items()]
    chance = _chance(entries)
    if chance is None:
        coloured = [f'<span style="color:{run.colour}">{text}</span>' if run.mark else text for run, _, text in texts]
        return "<br>".join(coloured)
    dots = f'<i style="--c:{_share(chance)}"></i>'
    bars = [
        f'<div class="bar" style="--v:{_share(value)};--k:{run.colour}">{dots}<span>{text}</span></div>'
        for run, value, text in texts
    ]
    return "".join(bars)


def _share(value: float) -> str:
    return f"{min(max(value, 0.0), 1.0):.4f}"


def _number(name: str, value: float) -> str:
    """A number as it is shown; counts have no digits after the point."""
    return f"{value:.0f}" if name.split("/")[-1].startswith("num_") else f"{value:.3f}"


def protocols(runs: Sequence[Run]) -> Iterator[str]:
    """What ``repr.evaluate`` has written: a table a data set, a row a number and protocol; then what it left out."""
    rows: dict[tuple[str, str, str], Entries] = {}  # data, name of the number, hash of its protocol
    for run in runs:
        for content in run.evaluations.values():
            for name, entry in content["results"].items():
                key = (str(content["data"]["name"]), name, str(entry["protocol_hash"]))
                rows.setdefault(key, {})[run] = entry  # of equal ones the latest
    if rows:
        yield '<p class="lead">Rows of one protocol may be compared; open a protocol to read it.</p>'
    for data in sorted({data for data, _, _ in rows}):
        yield f"<h4>{html.escape(data)}</h4>" + '<div class="card scroll"><table class="numbers">'
        yield "<tr><th></th><th>value</th><th>chance</th><th>protocol</th></tr>"
        yield from (_protocol_row(*key[1:], entries) for key, entries in rows.items() if key[0] == data)
        yield "</table></div>"
    for run in runs:
        for folder, content in run.evaluations.items():
            reasons = [f"{name}: {why}" for name, why in content.get("left_out", {}).items()] + content.get("notes", [])
            if reasons:
                items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
                yield f"{run.label}<details><summary>What {html.escape(folder)} left out, and notes</summary>"
                yield f"<ul>{items}</ul></details>"


def _protocol_row(name: str, protocol_hash: str, entries: Entries) -> str:
    """A number of one protocol, which is folded behind its hash."""
    chance, meaning = _chance(entries), next((e["meaning"] for e in entries.values() if e.get("meaning")), "")
    protocol = html.escape(json.dumps(next(iter(entries.values()))["protocol"], indent=1, ensure_ascii=False))
    return (
        f'<tr><td>{html.escape(name)}{explanation(meaning)}</td><td data-head="value">{_shown(name, entries)}</td>'
        f'<td class="dim" data-head="chance">{"" if chance is None else f"{chance:.4f}"}</td>'
        f'<td class="left" data-head="protocol"><details><summary><code>{html.escape(protocol_hash)}</code></summary>'
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
