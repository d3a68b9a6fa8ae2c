"""What ``repr.evaluate`` has found: numbers beside chance, with the protocol folded behind each."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from repr.report.run import Run, label
from repr.report.tables import bar, number

Key = tuple[str, str, str]  # data, name of the number, hash of its protocol: equal ones may be compared


def evaluations(runs: Sequence[Run]) -> Iterator[str]:
    """A table a data set: a row a number and protocol, a bar a run; then what was left out, and why."""
    entries = [_entries(run) for run in runs]
    keys = sorted(dict.fromkeys(key for found in entries for key in found), key=lambda key: key[0])
    if keys:
        yield '<p class="lead">Rows of one protocol may be compared; open a protocol to read it.</p>'
    for data in dict.fromkeys(key[0] for key in keys):
        yield f"<h4>{html.escape(data)}</h4>" + '<div class="card scroll"><table>'
        yield "<tr><th></th><th>value</th><th>chance</th><th>protocol</th></tr>"
        for key in keys:
            if key[0] == data:
                yield _row(key, runs, entries)
        yield "</table></div>"
    for run in runs:
        for folder, found in run.evaluations.items():
            reasons = [f"{name}: {why}" for name, why in found.get("left_out", {}).items()] + found.get("notes", [])
            if reasons:
                items = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
                yield f"{label(run, runs)}<details><summary>What {html.escape(folder)} left out, and notes</summary>"
                yield f"<ul>{items}</ul></details>"


def _entries(run: Run) -> dict[Key, Mapping[str, Any]]:
    """The numbers of all evaluations of a run; of equal ones the latest."""
    return {
        (str(found["data"]["name"]), name, str(entry["protocol_hash"])): entry
        for found in run.evaluations.values()
        for name, entry in found["results"].items()
    }


def _row(key: Key, runs: Sequence[Run], entries: Sequence[Mapping[Key, Mapping[str, Any]]]) -> str:
    _, name, protocol_hash = key
    having = [(run, found[key]) for run, found in zip(runs, entries, strict=True) if key in found]
    chance = next((entry["chance"] for _, entry in having if entry["chance"] is not None), None)
    if chance is None:
        values = "<br>".join(f'<span style="color:{run.colour}">{number(name, e["value"])}</span>' for run, e in having)
    else:
        values = "".join(bar(number(name, e["value"]), e["value"], chance, run.colour) for run, e in having)
    told = html.escape(json.dumps(having[0][1]["protocol"], indent=1, ensure_ascii=False))
    protocol = f"<details><summary><code>{html.escape(protocol_hash)}</code></summary><pre>{told}</pre></details>"
    shown = "" if chance is None else f"{chance:.4f}"
    return (
        f'<tr><td>{html.escape(name)}</td><td>{values}</td><td class="dim">{shown}</td>'
        f'<td class="left">{protocol}</td></tr>'
    )
