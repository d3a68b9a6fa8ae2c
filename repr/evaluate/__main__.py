"""Evaluate any encoder by the published protocols: ``python -m repr.evaluate model=MODEL [data=...] [eval=[knn,...]]``.

``metrics.json`` in the folder that ``out`` names, or ``<run folder>/evaluation/<data>-<protocol hash>/``, holds::

    {
      "format": 1,
      "protocol_hash": "3f0c9a1b",          # of everything below "protocol" of all numbers, and of what was asked for
      "model": {"name": ..., "hash": ...},   # the hash is of the weights and the architecture
      "data": {"name": "emoji", "sets": {"bank": {"rows": 5610, "unread": 0, "hash": ...}, "val": ...}},
      "results": {
        "val/knn_category_k20_t0.07": {
          "value": 0.61, "chance": 0.19,     # chance: null where there is no such level
          "protocol": {"eval": "knn", "resolution": 224, "resize": ..., "crop": ..., "mean": ..., "k": 20, ...},
          "protocol_hash": "9ce0d5b2"        # of that protocol: equal hashes may be compared
        }, ...
      },
      "left_out": {"val/zero_shot": "why"},  # what was asked for and not computed, or computed on fewer rows
      "notes": ["..."],
      "versions": {"repr": ..., "torch": ..., "timm": ..., "open_clip_torch": ...}
    }
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from repr.cli import command, importing, one_line_errors
from repr.evaluate.evaluation import config, evaluate
from repr.explain import add_show, shown_key
from repr.explain import show as show_config
from repr.runs.folder import EVALUATION
from repr.runs.inputs import check_inputs


def show(evaluation: Mapping[str, Any], *, every_number: bool = False) -> None:
    """Print the numbers beside chance, what was left out, and where all of it lies.

    Args:
        evaluation: from :func:`repr.evaluate.evaluation.evaluate`.
        every_number: print all numbers with the hashes of their protocols, not about ten.
    """
    from rich.console import Console

    from repr.evaluate.printed import Entry, first_lines

    console, results = Console(highlight=False), evaluation["results"]
    if every_number:
        console.print(_table(evaluation))
    elif results:
        entries = {
            name: Entry(one["value"], one["chance"], one["meaning"], one["protocol"].get("eval", ""))
            for name, one in results.items()
        }
        console.print(first_lines(entries))
        console.print(f"--all shows every number; {EVALUATION} has them, too", style="dim")
    lines = [f"left out: {name}: {why}" for name, why in evaluation["left_out"].items()]
    for line in lines + [f"note: {note}" for note in evaluation["notes"]]:
        console.print(line, soft_wrap=True)
    print(f"numbers   {evaluation['folder'] / EVALUATION} (protocol {evaluation['protocol_hash']})")


def _table(evaluation: Mapping[str, Any]) -> Table:
    table = Table(title=f"Evaluation of {evaluation['model']['name']}", title_justify="left", header_style="bold")
    table.add_column("number", overflow="fold")
    for column in ("value", "chance", "protocol"):
        table.add_column(column, justify="right", style="dim" if column != "value" else None, no_wrap=True)
    for name, entry in evaluation["results"].items():
        chance = "" if entry["chance"] is None else f"{entry['chance']:.4f}"
        table.add_row(name, f"{entry['value']:.4g}", chance, entry["protocol_hash"])
    return table


def parser() -> argparse.ArgumentParser:
    """The arguments of the command line."""
    result = command("evaluate", "Evaluate an encoder.", "model=MODEL, data=emoji, eval=[knn], ...")
    add_show(result)
    result.add_argument("--all", action="store_true", help="print every number, not ten")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parser().parse_intermixed_args(arguments)
    with one_line_errors():
        key = shown_key(options)
        with importing():
            cfg, data_name, class_files = config(options.overrides, options.config_dir)
            if key is not None:
                print(show_config(cfg, key))
                return
            check_inputs(cfg)
        evaluation = evaluate(cfg, data_name=data_name, class_files=class_files)
        if evaluation:
            show(evaluation, every_number=options.all)


if __name__ == "__main__":
    main()
