"""The exhibits on a page: the map of the features, galleries of nearest neighbours, confusions of classes."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repr.metrics.exhibits import Exhibits
from repr.report.exhibits import COLUMNS, gallery_kinds
from repr.report.run import Run, Sheets, exhibit_names

FEW = range(2, 13)  # classes that can have a colour each
KINDS = {
    "image_to_text": "Which captions a picture finds",
    "text_to_image": "Which pictures a caption finds",
    "image_to_image": "Which pictures of the training set a picture is nearest to",
}
MOST_CLASSES = 30  # of a confusion; of more, those that are confused most are drawn
NUM_PAIRS = 12  # of confused classes that are listed


def embed_json(name: str, value: Any) -> str:
    """Data for the page's script; nothing in it can end the element, or begin a comment or script inside it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def select(name: str, title: str, options: Sequence[str] = ()) -> str:
    """A labelled choice; the page's script fills one without options."""
    items = "".join(f"<option>{html.escape(option)}</option>" for option in options)
    return f'<label>{title} <select id="{name}">{items}</select></label>'


def left_out(runs: Sequence[Run], parts: Sequence[str]) -> Iterator[str]:
    """Why sets have no such part."""
    reasons: dict[str, list[str]] = {}  # reason -> sets
    for of_set in dict.fromkeys(of_set for run in runs for of_set in run.exhibits):
        arrays = next(run.exhibits[of_set] for run in runs if of_set in run.exhibits)
        for name in (f"left_out/{part}" for part in parts):
            if name in arrays:
                reasons.setdefault(str(arrays[name]), []).append(of_set)
    for reason, sets in reasons.items():
        yield f'<p class="dim"><small>{html.escape(", ".join(sets))}: {html.escape(reason)}.</small></p>'


# The map ------------------------------------------------------------------------------------------------------------


def maps(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """A map a run, of the set, layout and attribute that are chosen."""
    sets = [of_set for of_set, _ in exhibit_names(runs, "rows")]
    data = {of_set: [_map(run.exhibits.get(of_set, {}), sheets) for run in runs] for of_set in sets}
    if not data:
        return
    yield '<p class="lead">A point is a sample, evenly spread over the set; what lies together looks alike to the'
    yield " encoder. Point at one to see it.</p>"
    choices = (("map-set", "set"), ("map-layout", "layout"), ("map-attribute", "coloured by"))
    yield f'<div class="controls">{"".join(select(*choice) for choice in choices)}</div><div class="side">'
    yield from (f'<div class="card">{run.label}<div class="map"></div><div class="legend"></div></div>' for run in runs)
    yield f"</div>{embed_json('map-data', data)}"


def _map(arrays: Exhibits, sheets: Sheets) -> dict[str, Any] | None:
    if "rows" not in arrays:
        return None
    layouts = {}
    if "map/tsne" in arrays:
        layouts["neighbours (t-SNE)"] = {"picture": _xy(arrays["map/tsne"], 2)}
    layouts["principal axes"] = {"picture": _xy(arrays["map/pca"], 4)}
    if "map/pairs" in arrays:
        both = {part: _xy(arrays["map/pairs"][:, i], 4) for i, part in enumerate(("picture", "caption"))}
        layouts["pictures and captions (principal axes)"] = both
    labels = {name.removeprefix("labels/"): arrays[name].tolist() for name in arrays if name.startswith("labels/")}
    return {
        "rows": list(range(len(arrays["rows"]))),
        "layouts": layouts,
        "labels": labels,
        "names": {name: arrays[f"names/{name}"].tolist() for name in labels},
        # Those whose classes can be told apart by colour come first.
        "order": sorted(labels, key=lambda name: len({*labels[name]} - {-1}) not in FEW),
        "captions": arrays["captions"].tolist() if "captions" in arrays else None,
        "sheet": sheets.add(arrays["sheet/map"].tobytes()) if "sheet/map" in arrays else None,
        "columns": COLUMNS,
    }


def _xy(points: np.ndarray, digits: int) -> list[list[float]]:
    return [[round(float(value), digits) for value in points[:, i]] for i in (0, 1)]


# Galleries ----------------------------------------------------------------------------------------------------------


def galleries(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """Queries and what they find, nearest first, right or wrong; runs beside each other."""
    sets = dict.fromkeys(of_set for of_set, name in exhibit_names(runs, "gallery/") if name.endswith("/query"))
    if not sets:
        return
    yield '<p class="lead">Queries are evenly spread over the set, not picked. Nearest first; ✓ right, ✗ wrong.</p>'
    yield f'<div class="controls">{select("gallery-set", "set", list(sets))}'
    if attributes := dict.fromkeys(name for _, name in exhibit_names(runs, "gallery/image_to_image/right/")):
        yield select("gallery-attribute", "pictures are right if they share the", list(attributes))
    yield "</div>"
    for of_set in sets:
        yield f'<div data-set="{html.escape(of_set)}">'
        for kind, title in KINDS.items():
            having = [run for run in runs if kind in gallery_kinds(run.exhibits.get(of_set, {}))]
            if having:
                yield f'<h4>{title}</h4><div class="side">'
                for run in having:
                    queries = "".join(_queries(run.exhibits[of_set], kind, sheets))
                    yield f'<div class="card">{run.label}<div class="asks">{queries}</div></div>'
                yield "</div>"
        yield "</div>"


def _queries(arrays: Exhibits, kind: str, sheets: Sheets) -> Iterator[str]:
    """Each query of a gallery, with what it finds."""
    queries, neighbours = (_items(arrays, f"{kind}/{part}", sheets) for part in ("query", "nearest"))
    marked = f"gallery/{kind}/right/"
    right = {name.removeprefix(marked): arrays[name] for name in arrays if name.startswith(marked)}  # (Q, k) each
    finds_pictures = kind.endswith("_image")
    num_nearest = arrays[f"gallery/{kind}/nearest"].shape[1]
    for q, (picture, caption) in enumerate(queries):
        cells = []
        for k, (near, words) in enumerate(neighbours[q * num_nearest : (q + 1) * num_nearest]):
            state = _state({of: int(values[q, k]) for of, values in right.items()})
            cells.append(f"<li{state}>{_captioned(near, words) if finds_pictures else html.escape(words)}</li>")
        yield f'<div class="ask"><div>{picture}<div>{html.escape(caption)}</div></div>'
        yield f'<ol class="found {"pictures" if finds_pictures else "texts"}">{"".join(cells)}</ol></div>'


def _state(marks: dict[str, int]) -> str:
    """HTML attributes that mark a neighbour as right or wrong, or by which the page's script does so."""
    if "caption" in marks:
        return {1: ' class="right"', 0: ' class="wrong"'}.get(marks["caption"], "")
    return f" data-right='{html.escape(json.dumps(marks))}'" if marks else ""


def _items(arrays: Exhibits, part: str, sheets: Sheets) -> list[tuple[str, str]]:
    """Picture as HTML, '' where texts are shown, and caption of each row."""
    captions = arrays[f"captions/{part}"].tolist()
    if f"sheet/{part}" not in arrays:
        return [("", caption) for caption in captions]
    sheet = sheets.add(arrays[f"sheet/{part}"].tobytes())
    return [(_thumb(sheet, position, caption), caption) for position, caption in enumerate(captions)]


def _captioned(picture: str, caption: str) -> str:
    """A picture over its caption, of which three lines are shown."""
    words = html.escape(caption)
    return f'{picture}<div class="caption" title="{words}">{words}</div>' if caption else picture


def _thumb(sheet: str | None, position: int, caption: str) -> str:
    line, column = divmod(position, COLUMNS)
    style = f"--n:{COLUMNS};--x:{column};--y:{line}" + ("" if sheet else ";background:#e2e8f0")
    name = html.escape(caption or "picture")
    return f'<span class="thumb {sheet or ""}" role="img" aria-label="{name}" style="{style}"></span>'


# Clusters -----------------------------------------------------------------------------------------------------------


def clusters(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """Some clusters of each stage of a multistage run, a row of pictures each."""
    having = [run for run in runs if "clusters/size" in run.exhibits.get("bank", {})]
    if not having:
        return
    yield '<p class="lead">The training set after each stage, from whose clusters the next one draws its batches.'
    yield " Clusters are evenly spread over their sizes, and pictures over a cluster; none is picked.</p>"
    for run in having:
        arrays = run.exhibits["bank"]
        sizes, rows = arrays["clusters/size"], arrays["clusters/rows"]
        items = iter(_items(arrays, "clusters", sheets))
        yield f'<div class="card">{run.label}<h3>{int(arrays["clusters/number"])} clusters</h3>'
        for size, of_cluster in zip(sizes.tolist(), rows.tolist(), strict=True):
            cells = [f"<li>{_captioned(*next(items))}</li>" for row in of_cluster if row >= 0]
            yield f'<div class="ask"><div><b>{size}</b> samples</div>'
            yield f'<ol class="found pictures">{"".join(cells)}</ol></div>'
        yield "</div>"


# Confusions ---------------------------------------------------------------------------------------------------------


def confusions(runs: Sequence[Run]) -> Iterator[str]:
    """A matrix a run, of the set and classes that are chosen, and the classes that are confused most."""
    names = exhibit_names(runs, "confusion/")
    data = {}
    for of_set, name in sorted(names, key=lambda pair: pair[1].startswith("nearest/")):  # zero-shot first
        kind, attribute = name.split("/", 1)
        how = "nearest neighbour" if kind == "nearest" else kind.replace("_", " ")
        of_runs = [run.exhibits.get(of_set, {}) for run in runs]
        counts = [arrays.get(f"confusion/{name}") for arrays in of_runs]
        kept = _classes([table for table in counts if table is not None])
        data[f"{of_set}: {attribute} by {how}"] = [
            None if table is None else _confusion(table, arrays[f"names/{attribute}"].tolist(), kept)
            for table, arrays in zip(counts, of_runs, strict=True)
        ]
    if not data:
        return
    yield '<p class="lead">Rows are true classes, columns what was said, each as a share of its row. Of many classes'
    yield " those that are confused most are drawn.</p>"
    yield f'<div class="controls">{select("confusion-choice", "classes")}</div><div class="side">'
    parts = '<div class="confusion"></div><p class="dim"></p><ol class="pairs"></ol>'
    yield from (f'<div class="card">{run.label}{parts}</div>' for run in runs)
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
        "showscale": False, "xgap": 1, "ygap": 1, "text": hover, "hoverinfo": "text",
    }  # fmt: skip
    size = 10 if len(kept) > 15 else 12
    room = 14 + 0.58 * size * max(map(len, axis))  # pixels of the longest name
    layout = {
        "height": 2 * room + max(200, 16 * len(kept)), "margin": {"l": room, "r": 10, "t": 10, "b": room},
        "font": {"size": size},
        "xaxis": {**ticks, "tickangle": -50}, "yaxis": {**ticks, "autorange": "reversed"},
    }  # fmt: skip
    confused = counts[counts[:, 0] != counts[:, 1]][:NUM_PAIRS].tolist()
    pairs = [f"{names[true]} taken for {names[said]}: {count} of {total[true]}" for true, said, count in confused]
    right = counts[counts[:, 0] == counts[:, 1], 2].sum()
    note = f"{right} of {total.sum()} are right. Confused most often:"
    return {"data": [heat], "layout": layout, "pairs": pairs, "note": note}
