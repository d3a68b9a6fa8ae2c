"""Confusions of classes, as matrices and as lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repr.report.gallery import embed_json, select
from repr.report.run import Run, exhibit_names

MOST_CLASSES = 30  # of more, those that are confused most are drawn
NUM_PAIRS = 12  # of confused classes that are listed
SHADES = [[0, "#f8fafc"], [0.02, "#dbeafe"], [0.5, "#3b82f6"], [1, "#1e3a8a"]]


def confusions(runs: Sequence[Run]) -> Iterator[str]:
    """A matrix a run, of the set and classes that are chosen, and the classes that are confused most."""
    names = exhibit_names(runs, "confusion/")
    data = {}
    for of_set, name in sorted(names, key=lambda pair: pair[1].startswith("nearest/")):  # zero-shot first
        kind, attribute = name.split("/", 1)
        how = "nearest neighbour" if kind == "nearest" else kind.replace("_", " ")
        of_runs = [run.exhibits.get(of_set, {}) for run in runs]
        kept = _classes([arrays[f"confusion/{name}"] for arrays in of_runs if f"confusion/{name}" in arrays])
        data[f"{of_set}: {attribute} by {how}"] = [
            _confusion(arrays[f"confusion/{name}"], arrays[f"names/{attribute}"].tolist(), kept)
            if f"confusion/{name}" in arrays
            else None
            for arrays in of_runs
        ]
    if not data:
        return
    yield '<p class="lead">Rows are true classes, columns what was said, each as a share of its row. Of many classes'
    yield " those that are confused most are drawn.</p>"
    yield f'<div class="controls">{select("confusion-choice", "classes")}</div><div class="side">'
    for run in runs:
        parts = '<div class="confusion"></div><p class="dim"></p><ol class="pairs"></ol>'
        yield f'<div class="card">{run.label}{parts}</div>'
    yield f"</div>{embed_json('confusion-data', data)}"


def _classes(tables: Sequence[np.ndarray]) -> list[int]:
    """The labels that are drawn, the same of all runs: all, or those of the pairs that are confused most."""
    pairs = np.concatenate(tables)
    if len(every := np.unique(pairs[:, :2])) <= MOST_CLASSES:
        return every.tolist()
    kept: set[int] = set()
    for true, said, _ in sorted(pairs.tolist(), key=lambda pair: -pair[2]):
        if true != said and len(kept | {true, said}) <= MOST_CLASSES:
            kept |= {true, said}
    return sorted(kept)


def _confusion(counts: np.ndarray, names: Sequence[str], kept: Sequence[int]) -> dict[str, Any]:
    """What plotly draws, and the list of pairs; ``counts`` (P, 3): true label, predicted label, how often."""
    total, table = np.zeros(len(names), dtype=int), np.zeros((len(kept), len(kept)), dtype=int)
    np.add.at(total, counts[:, 0], counts[:, 2])
    drawn = counts[np.isin(counts[:, :2], kept).all(1)]
    table[np.searchsorted(kept, drawn[:, 0]), np.searchsorted(kept, drawn[:, 1])] = drawn[:, 2]
    share = table / np.maximum(1, total[kept])[:, None]
    axis = [names[one] if len(names[one]) <= 22 else f"{names[one][:21]}…" for one in kept]
    numbers = list(range(len(kept)))
    ticks = {"tickvals": numbers, "ticktext": axis, "showgrid": False, "zeroline": False}
    hover = [
        [f"{names[a]} → {names[b]}: {count} of {total[a]}" for b, count in zip(kept, row, strict=True)]
        for a, row in zip(kept, table, strict=True)
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
    right = counts[counts[:, 0] == counts[:, 1], 2].sum()
    note = f"{right} of {total.sum()} are right. Confused most often:"
    return {"data": [heat], "layout": layout, "pairs": lines, "note": note}
