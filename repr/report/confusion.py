"""Confusions of classes, as matrices and as lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repr.report.gallery import embed_json, select
from repr.report.run import Run, label

MOST_CLASSES = 30  # of more, those that are confused most are drawn
NUM_PAIRS = 12  # of confused classes that are listed
SHADES = [[0, "#f8fafc"], [0.02, "#dbeafe"], [0.5, "#3b82f6"], [1, "#1e3a8a"]]


def confusions(runs: Sequence[Run]) -> Iterator[str]:
    """A matrix a run, of the set and classes that are chosen, and the classes that are confused most."""
    keys = [(name, key) for run in runs for name, arrays in run.exhibits.items() for key in arrays]
    keys = [(name, key) for name, key in dict.fromkeys(keys) if key.startswith("confusion/")]
    keys.sort(key=lambda item: item[1].startswith("confusion/nearest/"))  # zero-shot first
    data = {}
    for name, key in keys:
        arrays = [run.exhibits.get(name, {}) for run in runs]
        kept = _classes([each[key] for each in arrays if key in each])
        _, kind, attribute = key.split("/", 2)
        how = "nearest neighbour" if kind == "nearest" else kind.replace("_", " ")
        title = f"{name}: {attribute} by {how}"
        data[title] = [
            _confusion(each[key], each[f"names/{attribute}"].tolist(), kept) if key in each else None for each in arrays
        ]
    if not data:
        return
    yield '<p class="lead">Rows are true classes, columns what was said, each as a share of its row. Of many classes'
    yield " those that are confused most are drawn.</p>"
    yield f'<div class="controls">{select("confusion-choice", "classes")}</div><div class="side">'
    for run in runs:
        parts = '<div class="confusion"></div><p class="dim"></p><ol class="pairs"></ol>'
        yield f'<div class="card">{label(run, runs)}{parts}</div>'
    yield f"</div>{embed_json('confusion-data', data)}"


def _classes(tables: Sequence[np.ndarray]) -> list[int]:
    """The labels that are drawn, the same of all runs: all, or those of the pairs that are confused most."""
    pairs = np.concatenate(tables)
    if len(every := set(pairs[:, :2].ravel().tolist())) <= MOST_CLASSES:
        return sorted(every)
    kept: set[int] = set()
    for true, said, _ in sorted(pairs.tolist(), key=lambda pair: -pair[2]):
        if true != said and len(kept | {true, said}) <= MOST_CLASSES:
            kept |= {true, said}
    return sorted(kept)


def _confusion(counts: np.ndarray, names: Sequence[str], kept: Sequence[int]) -> dict[str, Any]:
    """What plotly draws, and the list of pairs."""
    place = {one: i for i, one in enumerate(kept)}
    table, total = np.zeros((len(kept), len(kept)), dtype=int), dict[int, int]()
    for true, said, count in counts.tolist():
        total[true] = total.get(true, 0) + count
        if true in place and said in place:
            table[place[true], place[said]] += count
    share = table / np.array([max(1, total.get(one, 0)) for one in kept])[:, None]
    axis = [names[one] if len(names[one]) <= 22 else f"{names[one][:21]}…" for one in kept]
    numbers = list(range(len(kept)))
    ticks = {"tickvals": numbers, "ticktext": axis, "showgrid": False, "zeroline": False}
    hover = [
        [f"{names[a]} → {names[b]}: {table[i, j]} of {total.get(a, 0)}" for j, b in enumerate(kept)]
        for i, a in enumerate(kept)
    ]
    heat = {
        "type": "heatmap", "x": numbers, "y": numbers, "z": share.round(3).tolist(), "zmin": 0, "zmax": 1,
        "colorscale": SHADES, "showscale": False, "xgap": 1, "ygap": 1, "text": hover, "hoverinfo": "text",
    }  # fmt: skip
    size = 10 if len(kept) > 15 else 12
    room = 14 + 0.58 * size * max(map(len, axis))  # pixels of the longest name
    layout = {
        "height": 2 * room + max(200, 16 * len(kept)), "margin": {"l": room, "r": 10, "t": 10, "b": room},
        "font": {"size": size}, "plot_bgcolor": "#f8fafc",
        "xaxis": {**ticks, "tickangle": -50}, "yaxis": {**ticks, "autorange": "reversed"},
    }  # fmt: skip
    pairs = [(true, said, count) for true, said, count in counts.tolist() if true != said][:NUM_PAIRS]
    lines = [f"{names[true]} taken for {names[said]}: {count} of {total[true]}" for true, said, count in pairs]
    right = sum(count for true, said, count in counts.tolist() if true == said)
    note = f"{right} of {sum(total.values())} are right. Confused most often:"
    return {"data": [heat], "layout": layout, "pairs": lines, "note": note}
