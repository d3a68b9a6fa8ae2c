"""Run folders as one self-contained HTML page, which loads nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from repr.files import replacing
from repr.report import charts, gallery, tables
from repr.report.run import Run, Sheets, read_runs, webp_url
from repr.runs.folder import CONFIG, PICTURES

BUDGET = 2_100_000  # bytes of all pictures, so that a page with plotly's 4.8 MB stays below 8 MB


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the page of one run, or of several side by side, to ``out``, which is replaced as a whole.

    Raises:
        ConfigError: a folder is not that of a run.
    """
    runs = read_runs(folders)
    with replacing(out) as file:
        file.write("\n".join(_page(runs)).encode())


def _page(runs: Sequence[Run]) -> Iterator[str]:
    import plotly.offline

    title = html.escape(", ".join(dict.fromkeys(str(run.config.name) for run in runs)))
    sheets = Sheets(BUDGET)
    sections = [(name, heading, "\n".join(parts)) for name, heading, parts in _sections(runs, sheets)]
    sections = [section for section in sections if section[2]]
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<link rel="icon" href="data:,">'  # or a browser asks for one
    yield f"<style>{_asset('page.css')}</style><script>{plotly.offline.get_plotlyjs()}</script></head><body>"
    yield f"<h1>{title}</h1>"
    yield from tables.header(runs)
    yield "<nav>" + "".join(f'<a href="#{name}">{name}</a>' for name, _, _ in sections) + "</nav>"
    yield from (f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in sections)
    if sheets.full:
        yield '<p class="dim">Some pictures were left out, so that the page stays below 8 MB: show fewer runs.</p>'
    yield sheets.style("".join(body for _, _, body in sections))
    yield f'<div id="tip" hidden></div><script>{_asset("page.js")}</script></body></html>'


def _sections(runs: Sequence[Run], sheets: Sheets) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Name, title and content of each section, in the order of the page; empty ones are not shown."""
    losses, evaluated, other = charts.curve_names(runs)
    yield "results", "Results", tables.tiles(runs)
    yield "differences", "What the runs differ in", tables.differences(runs)
    yield "losses", "Losses", charts.losses(losses, runs)
    yield "evaluation", "Evaluation", tables.evaluation(runs)
    yield "protocols", "Evaluation by published protocols", tables.protocols(runs)
    yield "map", "Map of the features", (*gallery.maps(runs, sheets), *gallery.left_out(runs, ["all", "labels"]))
    yield "neighbours", "Nearest neighbours", (
        *gallery.galleries(runs, sheets), *gallery.left_out(runs, ["image_to_text", "galleries"]),
    )  # fmt: skip
    yield "clusters", "Clusters between the stages", gallery.clusters(runs, sheets)
    yield "confusion", "Confusion of classes", (*gallery.confusions(runs), *gallery.left_out(runs, ["zero_shot"]))
    yield "spectrum", "Spectrum of the features", charts.spectra(runs)
    yield "pictures", "What it was trained on", _pictures(runs, sheets)
    yield "progress", "Evaluation over time", charts.over_time(evaluated, runs)
    yield "training", "Also logged in training", charts.plots(other, runs)
    yield "config", "Config", _configs(runs)


def _pictures(runs: Sequence[Run], sheets: Sheets) -> Iterator[str]:
    """The pictures of each run, the views first, made smaller as files."""
    for run in runs:
        for path in sorted(run.folder.glob(f"{PICTURES}/*.png"), key=lambda path: (path.stem != "views", path.stem)):
            buffer = io.BytesIO()
            with Image.open(path) as picture:
                picture.save(buffer, "WEBP", quality=85)
            if sheets.add(buffer.getvalue()):
                name = html.escape(path.stem.replace("_", " "))
                image = f'<div class="scroll"><img alt="{name}" src="{webp_url(buffer.getvalue())}"></div>'
                yield f'<figure class="card">{run.label}<h3>{name}</h3>{image}</figure>'


def _configs(runs: Sequence[Run]) -> Iterator[str]:
    texts = [(run, html.escape((run.folder / CONFIG).read_text(encoding="utf-8"))) for run in runs if run.is_trained]
    yield from (f"{run.label}<details><summary>{CONFIG}</summary><pre>{text}</pre></details>" for run, text in texts)


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
