"""The results at a glance: what ours took beside the best peer of the same run, read from benchmarks/results.

No number is kept here: each is read from the page that the benchmark wrote, with what it ran on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]  # by the titles of the columns; of two columns of one title the first


class Table(NamedTuple):
    """A table of a page."""

    above: str  # the line before it
    rows: list[Row]


class Line(NamedTuple):
    """A row of the summary."""

    what: str
    ours: str
    peer: str  # whose, and how much
    ratio: str  # of ours to the peer's


def tables(text: str) -> list[Table]:
    """The tables of a page."""
    found: list[Table] = []
    above, titles = "", []
    for line in text.splitlines():
        if not line.startswith("|"):
            above, titles = line or above, []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not titles:
            titles = cells
            found.append(Table(above, []))
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            row = Row()
            for title, cell in zip(titles, cells, strict=False):
                row.setdefault(title, cell)
            found[-1].rows.append(row)
    return found


def with_columns(page: Sequence[Table], *titles: str) -> Iterator[Table]:
    """Those of the tables that have these columns."""
    return (table for table in page if table.rows and set(titles) <= table.rows[0].keys())


def steps(page: Sequence[Table]) -> Iterator[Line]:
    """A step of a method, by our Trainer and by the fastest peer."""
    cases: dict[str, list[Row]] = {}
    for table in with_columns(page, "method", "library", "ours / it"):
        measured: dict[str, list[Row]] = {}
        for row in table.rows:
            measured.setdefault(f"{row['method']}, {row['backbone']}, {row['views']}", []).append(row)
        cases |= measured  # a later table measures anew
    for case, rows in cases.items():
        ours, *others = rows
        peer = min((row for row in others if not row["library"].startswith("ours")), key=lambda row: float(row["ms"]))
        yield Line(case, f"{ours['ms']} ms", f"{peer['library']}, {peer['ms']} ms", peer["ours / it"])


def overheads(page: Sequence[Table]) -> Iterator[Line]:
    """What the Trainer adds to a step of a bare loop, and the start."""
    for table in with_columns(page, "case", "our Trainer", "a bare loop"):
        for row in table.rows:
            ratio = float(row["our Trainer"]) / float(row["a bare loop"])
            what = f"Trainer, {row['case']}"
            yield Line(what, f"{row['our Trainer']} ms", f"bare loop of ours, {row['a bare loop']} ms", f"{ratio:.2f}")
    for table in with_columns(page, "seconds", "ours / it"):
        own, peer, *_ = table.rows
        yield Line("start to first step", f"{own['seconds']} s", f"{peer['']}, {peer['seconds']} s", peer["ours / it"])


def qualities(data: str = "") -> Callable[[Sequence[Table]], Iterator[Line]]:
    """The mean of kNN and probe of a method, by ours and by the best peer; with steps, where their number differs."""

    def lines(page: Sequence[Table]) -> Iterator[Line]:
        for table in with_columns(page, "method", "library", "mean"):
            methods: dict[str, list[Row]] = {}  # ours first
            for row in table.rows:
                methods.setdefault(row["method"], []).append(row)
            for method, [ours, *others] in methods.items():
                if others:
                    peer = max(others, key=lambda row: _first(row["mean"]))
                    yield _beside(f"{method}{data}: mean of kNN and probe", "mean", ours, peer, peer["library"])

    return lines


def retrievals(page: Sequence[Table]) -> Iterator[Line]:
    """What CLIP finds, by ours and by open_clip."""
    for table in with_columns(page, "CLIP of", "R@5 of texts", "zero-shot"):
        ours, peer = table.rows
        for title in ("R@5 of texts", "zero-shot"):
            yield _beside(f"CLIP: {title}", title, ours, peer, peer["CLIP of"])


def _beside(what: str, title: str, ours: Row, peer: Row, name: str) -> Line:
    """The numbers of one column, with steps where they are told."""
    told = [
        f"{_first(row[title]):.3f}" + (f" ({_first(row['steps']):.0f} steps)" if "steps" in row else "")
        for row in (ours, peer)
    ]
    return Line(what, told[0], f"{name}, {told[1]}", f"{_first(ours[title]) - _first(peer[title]):+.3f}")


def _first(cell: str) -> float:
    """The mean, of a cell that may tell a deviation, too."""
    return float(cell.partition(" ")[0])


def losses(page: Sequence[Table]) -> Iterator[Line]:
    """Time and memory of a loss in chunks, for the largest batch that its peer could take."""
    for table in with_columns(page, "loss", "N", "implementation", "peak MiB"):
        best: dict[str, tuple[Row, Row]] = {}
        ours: dict[tuple[str, str], Row] = {}
        for row in table.rows:
            if row["implementation"] == "ours, chunks":
                ours[row["loss"], row["N"]] = row
            elif not row["implementation"].startswith("ours") and row.get("peak MiB"):
                best[row["loss"]] = ours[row["loss"], row["N"]], row
        for loss, (own, peer) in best.items():
            ratio = float(own["ms"]) / float(peer["ms"]), float(own["peak MiB"]) / float(peer["peak MiB"])
            told = [f"{int(row['ms']):,} ms, {int(row['peak MiB']):,} MiB" for row in (own, peer)]
            what = f"{loss} of {int(own['N']):,} rows, forward and backward"
            yield Line(what, told[0], f"{peer['implementation']}, {told[1]}", "{:.2f}, {:.2f}".format(*ratio))


def shares(page: Sequence[Table]) -> Iterator[Line]:
    """What each of eight processes multiplies and sends for CLIP's loss."""
    for table in with_columns(page, "loss", "W = 8", "sent, 8"):
        rows = {row["loss"]: row for row in table.rows}
        own, peer = rows["clip, plain"], rows["open_clip's clip, plain"]
        for column, what in (("W = 8", "products of N² D"), ("sent, 8", "rows sent of N D")):
            ratio = f"{float(own[column]) / float(peer[column]):.2f}"
            yield Line(f"CLIP's loss on each of 8 processes: {what}", own[column], f"open_clip, {peer[column]}", ratio)
    for table in with_columns(page, "loss", "W", "N", "s", "peak MiB a process"):
        rows = {row["loss"]: row for row in table.rows if row["W"] == "2"}
        own, peer = rows["clip, plain"], rows["open_clip's clip"]
        ratio = f"{float(own['s']) / float(peer['s']):.2f}"
        yield Line("CLIP's loss, 2 processes, N = 8,192", f"{own['s']} s", f"open_clip, {peer['s']} s", ratio)


def pairs(what: str, ratio: str, unit: str = "s") -> Callable[[Sequence[Table]], Iterator[Line]]:
    """Of tables whose rows are ours, and a peer's at 1.00 in the column ``ratio``."""

    def lines(page: Sequence[Table]) -> Iterator[Line]:
        for table in with_columns(page, ratio, "seconds"):
            own, peer = table.rows[0], next(row for row in table.rows if row[ratio] == "1.00")
            name = peer[""].replace("the authors' call", "scikit-learn as the authors call it")
            yield Line(f"{what}{own[''] if own[''] != 'ours' else ''}", f"{own['seconds']} {unit}",
                       f"{name}, {peer['seconds']} {unit}", own[ratio])  # fmt: skip

    return lines


def pipelines(what: str, ours: str) -> Callable[[Sequence[Table]], Iterator[Line]]:
    """Pictures a second, with the ratio to a peer in brackets."""

    def lines(page: Sequence[Table]) -> Iterator[Line]:
        for table in with_columns(page, "pipeline"):
            rows = {row["pipeline"]: row for row in table.rows}
            column = list(table.rows[0])[1]
            peer = next((name for name, row in rows.items() if "(1.00)" in row[column]), None)
            if ours in rows and peer:
                number, ratio = rows[ours][column].rstrip(")").split(" (")
                told = f"{peer}, {rows[peer][column].split()[0]}/s"
                size = re.fullmatch(r"\d+ x \d+:", table.above)
                of_size = f" of {table.above[:-1]}" if size else ""
                yield Line(f"{what}{of_size}, {column}", f"{number}/s", told, f"{ratio} of its speed")

    return lines


def growths(page: Sequence[Table]) -> Iterator[Line]:
    """Exponents of time and memory as one number grows, and where one fails."""
    for table in with_columns(page, "grows", "library", "of time", "of memory", "fails at"):
        for own, peer in zip(table.rows[::2], table.rows[1::2], strict=True):
            told = []
            for row in (own, peer):
                ends = f", fails at {row['fails at']}" if row["fails at"] else ""
                told.append(f"{row['of time'] or '?'}, {row['of memory'] or '?'}{ends}")
            what = f"{own['method']}, exponents of time and memory by {own['grows']}"
            yield Line(what, told[0], f"{peer['library']}, {told[1]}", "")


def parity(page: Sequence[Table]) -> Iterator[Line]:
    """Lengths of the gradient on two processes over that on one."""
    for table in with_columns(page, "loss", "of", "flags", "ratio, 2", "cosine, 2"):
        ours = {row["loss"]: row for row in table.rows if row["of"] == "ours"}
        for row in table.rows:
            if row["of"] != "ours" and not (row["ratio, 2"] == row["cosine, 2"] == "1.000"):
                own = ours[row["loss"]]
                what = f"{row['loss']}: gradient on 2 processes over that on one, cosine"
                name = ", ".join(filter(None, (row["of"], row["flags"])))
                cells = [f"{x['ratio, 2']}, {x['cosine, 2']}" for x in (own, row)]
                yield Line(what, cells[0], f"{name}: {cells[1]}", "")


def forecasts(page: Sequence[Table]) -> Iterator[Line]:
    """The largest error of the planner."""
    errors = [abs(float(row["error"].rstrip("%"))) for table in with_columns(page, "planned MB") for row in table.rows]
    yield Line(f"memory of a step before it runs, {len(errors)} cases: largest error", f"{max(errors):.1f} %", "", "")


QUALITY = "Quality after as many steps", "Quality after as many seconds"
SECTIONS: dict[str, dict[str, Callable[[Sequence[Table]], Iterator[Line]]]] = {
    "A step": {
        "step_time": steps,
        "pair_step_time": steps,
        "teacher_step_time": steps,
        "image_text_step_time": steps,
        "overhead": overheads,
    },
    QUALITY[0]: {"quality": qualities(), "quality_cifar10": qualities(", CIFAR-10")},
    QUALITY[1]: {"minutes": qualities(), "minutes_clip": retrievals},
    "Losses": {"loss_memory": losses, "loss_share": shares},
    "Data": {
        "data": pipelines("JPEGs to views on one core", "ours, shards"),
        "remote": pipelines("shards in a store", "ours, cache: shards"),
    },
    "Evaluation and clustering": {
        "evaluation": lambda page: (
            line for column in ("of lightly's", "of scikit-learn's") for line in pairs("", column)(page)
        ),
        "clustering": pairs("k-means of 1,000,000 x 512", "of the authors'"),
    },
    "Growth": {"growth": growths},
    "Several processes": {"../../docs/parity": parity},
    "Memory": {"plan": forecasts},
}


def summary(link: Callable[[Path], str]) -> list[str]:
    """The lines of the summary.

    Args:
        link: page of results -> where it is.
    """
    lines: list[str] = []
    for section, pages in SECTIONS.items():
        last = "ours - theirs" if section in QUALITY else "ours / theirs"
        lines += [f"### {section}", "", f"| | ours | peer | {last} | from |", "|---|---|---|---:|---|"]
        for name, read in pages.items():
            path = (RESULTS / f"{name}.md").resolve()
            where = f"[{path.stem}]({link(path)})"
            found = read(tables(path.read_text(encoding="utf-8")))
            lines += [f"| {' | '.join(_unbroken(cell) for cell in line)} | {where} |" for line in found]
        lines.append("")
    return lines


def _unbroken(cell: str) -> str:
    """A number and its unit stay in one line."""
    return re.sub(r"(?<=\d) (?=(?:ms|s|MiB)\b|%)", "\N{NO-BREAK SPACE}", cell)
