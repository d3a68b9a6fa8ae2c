"""The report on data, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from repr.cli import printable

NUM_LISTED = 10  # faults that are printed; check.json has all


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    sets = report["sets"]
    tables = [_overview(report), _kinds(sets), _captions(sets), _labels(sets), _frequent(sets["train"]["captions"])]
    tables += [_equal_pictures(sets), *_leakage(report["leakage"]), _unreadable(sets)]
    for table in tables:
        if table.row_count:
            console.print(table, "")
    for remark in report["remarks"]:
        console.print(f"note: {_plain(remark, 500)}")
    for sentence in report["too_many_bad"]:
        console.print(f"[bold red]{sentence}")


def _table(title: str, rows: Iterable[Sequence[str]], *columns: str) -> Table:
    """A rich table; columns that start with > hold numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, min_width=len(title))
    table.title_justify, table.title_style, table.caption_justify = "left", "bold", "left"
    for column in columns:
        number = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*row)
    return table


def _overview(report: dict[str, Any]) -> Table:
    columns: dict[str, dict[str, str]] = {}
    for name, facts in report["sets"].items():
        leaked = report["leakage"].get(name)
        cells = {"rows": f"{facts['rows']:,}", "rows read": f"{facts['read']:,}"}
        cells |= {"unreadable": _some(len(facts["unreadable"])), "duplicates": _some(facts["duplicates"]["surplus"])}
        cells |= {"also in train": "" if leaked is None else _some(leaked["rows"])}
        columns[name] = cells | {f"{key}, pixels": _spread(facts[key]) for key in ("width", "height")}
    return _by_set("Sets; sizes upright, as least / median / greatest", columns)


def _kinds(sets: dict[str, Any]) -> Table:
    rows = [(name, _shares(facts["formats"]), _shares(facts["modes"])) for name, facts in sets.items()]
    return _table("Formats and modes", [row for row in rows if row[1]], "set", "format", "mode")


def _captions(sets: dict[str, Any]) -> Table:
    columns: dict[str, dict[str, str]] = {}
    for name, facts in sets.items():
        captions = facts["captions"]
        columns[name] = cells = {"rows without": _some(captions["rows_without"])}
        if captions["captions"]:
            cells |= {"captions": f"{captions['captions']:,}", "distinct": f"{captions['distinct']:,}"}
            cells |= {key: _spread(captions.get(key)) for key in ("characters", "words", "tokens")}
        if "cut" in captions:
            cells |= {f"longer than {captions['context_length']} tokens": f"{captions['cut_share']:.1%}"}
    has_any = any("captions" in cells for cells in columns.values())
    return _by_set("Captions; lengths as least / median / greatest", columns if has_any else {})


def _by_set(title: str, columns: dict[str, dict[str, str]]) -> Table:
    """A row a fact and a column a set, which stays narrow."""
    labels = dict.fromkeys(label for cells in columns.values() for label in cells)
    rows = [[label, *(cells.get(label, "") for cells in columns.values())] for label in labels]
    return _table(title, [row for row in rows if any(row[1:])], "", *(f">{name}" for name in columns))


def _labels(sets: dict[str, Any]) -> Table:
    rows = []
    for name, facts in sets.items():
        for attribute, labels in facts["labels"].items():
            sizes = list(labels["counts"].items())
            cells = [f"{_plain(label, 24)} {count:,}" for label, count in (sizes[0], sizes[-1])] if sizes else ["", ""]
            cells.append(_some(len(labels["not_in_train"])) if "not_in_train" in labels else "")
            rows.append([name, _plain(attribute, 30), f"{labels['classes']:,}", _some(labels["unlabelled"]), *cells])
    columns = ("set", "attribute", ">classes", ">unlabelled", "largest", "smallest", ">not in train")
    return _table("Labels", rows, *columns)


def _frequent(captions: dict[str, Any]) -> Table:
    rows = [
        (_plain(entry["caption"], 200), f"{entry['count']:,}", f"{entry['count'] / captions['captions']:.1%}")
        for entry in captions.get("frequent", [])[:5]
        if entry["count"] > 1
    ]
    return _table("Most frequent captions of train", rows, "caption", ">rows", ">share")


def _equal_pictures(sets: dict[str, Any]) -> Table:
    groups = [(name, keys) for name, facts in sets.items() for keys in facts["duplicates"]["keys"]]
    total = sum(facts["duplicates"]["groups"] for facts in sets.values())
    title = f"Equal pictures within a set, {min(total, 5)} of {total:,} groups"
    return _table(title, [(name, _keys(keys)) for name, keys in groups[:5]], "set", "keys")


def _leakage(leakage: dict[str, Any]) -> Iterator[Table]:
    """For each evaluation set, its pictures that training sees."""
    for name, leaked in leakage.items():
        rows = [(_keys(pair["train"]), _keys(pair["set"])) for pair in leaked["keys"][:5]]
        table = _table(f"{name}: {leaked['rows']:,} of its pictures are in train too", rows, "in train", f"in {name}")
        table.title_style = "bold red"
        yield table


def _unreadable(sets: dict[str, Any]) -> Table:
    faults = [(name, fault) for name, facts in sets.items() for fault in facts["unreadable"]]
    title = "Unreadable rows" + (f", the first {NUM_LISTED} of {len(faults):,}" if len(faults) > NUM_LISTED else "")
    rows = [(name, _plain(fault["reason"], 300)) for name, fault in faults[:NUM_LISTED]]
    return _table(title, rows, "set", "reason")


def _keys(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(_plain(key, 60) for key in keys[:3]) + more


def _some(count: int) -> str:
    """A number that is well where it is 0."""
    return f"[yellow]{count:,}[/]" if count else "0"


def _spread(values: dict[str, float] | None) -> str:
    return "" if values is None else " / ".join(f"{values[key]:,.0f}" for key in ("min", "median", "max"))


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items())


def _plain(text: str, length: int) -> str:
    """Text from the data: on one line, not too long, nothing in it taken for markup."""
    text = printable(" ".join(text.split()))
    return escape(text if len(text) <= length else text[: length - 3] + "...")
