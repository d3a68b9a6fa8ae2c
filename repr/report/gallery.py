"""Pictures of a page: the map of the features, galleries of nearest neighbours."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from repr.metrics.exhibits import Exhibits
from repr.report.exhibits import COLUMNS, gallery_kinds
from repr.report.run import Run, Sheets, label

FEW = range(2, 13)  # classes that can have a colour each
KINDS = {
    "image_to_text": "Which captions a picture finds",
    "text_to_image": "Which pictures a caption finds",
    "image_to_image": "Which pictures of the training set a picture is nearest to",
}


def embed_json(name: str, value: Any) -> str:
    """Data for the page's script; nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    return f'<script type="application/json" id="{name}">{text}</script>'


def select(name: str, title: str) -> str:
    """A labelled choice that the page's script fills."""
    return f'<label>{title} <select id="{name}"></select></label>'


def sets_of(runs: Sequence[Run]) -> list[str]:
    """Evaluation sets of which a run has exhibits."""
    return list(dict.fromkeys(name for run in runs for name in run.exhibits))


# The map ------------------------------------------------------------------------------------------------------------


def maps(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """A map a run, of the set, layout and attribute that are chosen."""
    data = {name: [_map(run.exhibits.get(name, {}), sheets) for run in runs] for name in sets_of(runs)}
    data = {name: found for name, found in data.items() if any(found)}
    if not data:
        return
    yield '<p class="lead">A point is a sample, evenly spread over the set; what lies together looks alike to the'
    yield " encoder. Point at one to see it.</p>"
    choices = (("map-set", "set"), ("map-layout", "layout"), ("map-attribute", "coloured by"))
    yield f'<div class="controls">{"".join(select(*choice) for choice in choices)}</div><div class="side">'
    yield from (
        f'<div class="card">{label(run, runs)}<div class="map"></div><div class="legend"></div></div>' for run in runs
    )
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
    labels = {name.removeprefix("labels/"): values for name, values in arrays.items() if name.startswith("labels/")}
    return {
        "rows": list(range(len(arrays["rows"]))),
        "layouts": layouts,
        "labels": {name: values.tolist() for name, values in labels.items()},
        "names": {name: arrays[f"names/{name}"].tolist() for name in labels},
        # Those whose classes can be told apart by colour come first.
        "order": sorted(labels, key=lambda name: len(set(labels[name].tolist()) - {-1}) not in FEW),
        "captions": arrays["captions"].tolist() if "captions" in arrays else None,
        "sheet": sheets.sheet(arrays["sheet/map"].tobytes()) if "sheet/map" in arrays else None,
        "columns": COLUMNS,
    }


def _xy(points: np.ndarray, digits: int) -> list[list[float]]:
    return [[round(float(value), digits) for value in points[:, i]] for i in (0, 1)]


# Galleries ----------------------------------------------------------------------------------------------------------


def galleries(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """Queries and what they find, nearest first, right or wrong; runs beside each other."""
    found = {name: gallery_kinds(arrays) for run in runs for name, arrays in run.exhibits.items()}
    found = {name: kinds for name, kinds in found.items() if kinds}
    if not found:
        return
    yield '<p class="lead">Queries are evenly spread over the set, not picked. Nearest first; ✓ right, ✗ wrong.</p>'
    options = "".join(f"<option>{html.escape(name)}</option>" for name in found)
    yield f'<div class="controls"><label>set <select id="gallery-set">{options}</select></label>'
    if attributes := _marked(runs):
        options = "".join(f"<option>{html.escape(name)}</option>" for name in attributes)
        yield f'<label>pictures are right if they share the <select id="gallery-attribute">{options}</select></label>'
    yield "</div>"
    for name in found:
        yield f'<div data-set="{html.escape(name)}">'
        for kind, title in KINDS.items():
            having = [run for run in runs if kind in gallery_kinds(run.exhibits.get(name, {}))]
            if having:
                yield f'<h4>{title}</h4><div class="side">'
                yield from (_gallery(run, runs, name, kind, sheets) for run in having)
                yield "</div>"
        yield "</div>"


def _marked(runs: Sequence[Run]) -> list[str]:
    """Attributes by which neighbours are marked."""
    start = "gallery/image_to_image/right/"
    keys = (key for run in runs for arrays in run.exhibits.values() for key in arrays if key.startswith(start))
    return list(dict.fromkeys(key.removeprefix(start) for key in keys))


def _gallery(run: Run, runs: Sequence[Run], name: str, kind: str, sheets: Sheets) -> str:
    arrays, start = run.exhibits[name], f"gallery/{kind}/"
    num_queries, num_nearest = arrays[f"{start}nearest"].shape
    asked, found = (_items(arrays, kind, part, sheets) for part in ("query", "nearest"))
    right = {
        key.removeprefix(f"{start}right/"): arrays[key].tolist() for key in arrays if key.startswith(f"{start}right/")
    }
    parts = []
    for q in range(num_queries):
        picture, caption = asked[q]
        cells = []
        for k in range(num_nearest):
            marks = {of: values[q][k] for of, values in right.items()}
            near, words = found[q * num_nearest + k]
            cells.append(_cell(near, words, marks, pictures=kind.endswith("_image")))
        style = "pictures" if kind.endswith("_image") else "texts"
        parts.append(
            f'<div class="ask"><div>{picture if kind.startswith("image_") else ""}'
            f'<div>{html.escape(caption)}</div></div><ol class="found {style}">{"".join(cells)}</ol></div>'
        )
    return f'<div class="card">{label(run, runs)}<div class="asks">{"".join(parts)}</div></div>'


def _cell(picture: str, caption: str, marks: dict[str, int], *, pictures: bool) -> str:
    if "caption" in marks:
        state = {1: ' class="right"', 0: ' class="wrong"'}.get(marks["caption"], "")
    else:
        state = f" data-right='{html.escape(json.dumps(marks), quote=True)}'" if marks else ""
    if pictures:
        return f'<li{state} title="{html.escape(caption)}">{picture}</li>'
    return f"<li{state}>{html.escape(caption)}</li>"


def _items(arrays: Exhibits, kind: str, part: str, sheets: Sheets) -> list[tuple[str, str]]:
    """Picture, as HTML, and caption of each."""
    captions = arrays[f"captions/{kind}/{part}"].tolist()
    data = arrays.get(f"sheet/{kind}/{part}")
    sheet = None if data is None else sheets.sheet(data.tobytes())
    return [("" if data is None else _thumb(sheet, i, captions[i]), captions[i]) for i in range(len(captions))]


def _thumb(sheet: str | None, position: int, caption: str) -> str:
    line, column = divmod(position, COLUMNS)
    style = f"--n:{COLUMNS};--x:{column};--y:{line}" + ("" if sheet else ";background:#e2e8f0")
    name = html.escape(caption or "picture")
    return f'<span class="thumb {sheet or ""}" role="img" aria-label="{name}" style="{style}"></span>'


def left_out(runs: Sequence[Run], parts: Sequence[str]) -> Iterator[str]:
    """Why sets have no such part."""
    reasons: dict[str, list[str]] = {}
    for name in sets_of(runs):
        arrays = next(run.exhibits[name] for run in runs if name in run.exhibits)
        for part in parts:
            if (said := arrays.get(f"left_out/{part}")) is not None:
                reasons.setdefault(str(said), []).append(name)
    for reason, names in reasons.items():
        yield f'<p class="dim"><small>{html.escape(", ".join(names))}: {html.escape(reason)}.</small></p>'
