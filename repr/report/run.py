"""The runs of a page, as their folders hold them, and the pictures of the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, cycle
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repr.metrics.exhibits import Exhibits
from repr.report.exhibits import load_exhibits
from repr.runs.folder import EVALUATIONS, METRICS, is_run, load_evaluations, load_facts, load_results, load_run
from repr.training.metrics_file import Row, read_rows

CHANCE = ".chance"  # ends the name of a column that holds the level at chance of another
POINTS = 1000  # of a curve; a longer one is averaged in so many parts
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")


@dataclass(frozen=True)
class Run:
    """A run folder, or a folder of ``repr.evaluate``.

    Attributes:
        folder: where it lies.
        name: the end of its path, which tells it from the other runs of the page.
        colour: as CSS and plotly have it.
        mark: a square of that colour, as HTML; '' where the page has one run only.
    """

    folder: Path
    name: str = ""
    colour: str = COLOURS[0]
    mark: str = ""

    @property
    def label(self) -> str:
        """Mark and name as HTML; '' where the page has one run only."""
        return self.mark and f'<div class="dim">{self.mark}{html.escape(self.name)}</div>'

    @property
    def is_trained(self) -> bool:
        """Whether the run was trained here, and not only evaluated."""
        return is_run(self.folder)

    @cached_property
    def config(self) -> DictConfig:
        """The composed config; of an encoder that was only evaluated, its name."""
        if self.evaluations and not self.is_trained:
            return OmegaConf.create({"name": next(iter(self.evaluations.values()))["model"]["name"]})
        return load_run(self.folder, built=())

    def option(self, key: str) -> Any:
        """A value of the config; None where it is not set."""
        return OmegaConf.select(self.config, key)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """How long the run took, where it ran, what its numbers mean: see :class:`repr.training.facts.Facts`."""
        return load_facts(self.folder)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of ``metrics.csv``."""
        return read_rows(self.folder / METRICS)

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Name -> ``value`` and ``chance`` of the last evaluation; empty before the run has ended."""
        return load_results(self.folder)

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """What ``repr.evaluate`` has written, the latest last: folder -> content of ``metrics.json``."""
        contents = load_evaluations(self.folder).items()
        return {folder.name: content for folder, content in contents if content.get("format") == 1}

    @cached_property
    def exhibits(self) -> dict[str, Exhibits]:
        """Set -> exhibits of the last evaluation, those of the headline first, then those of ``repr.evaluate``."""
        own = load_exhibits(self.folder)
        headline = self.option("callbacks.evaluation.headline") if self.is_trained else None
        sets = dict.fromkeys(name.split("/", 1)[0] for name in [*(headline or ()), *self.results])
        exhibits = {name: own[name] for name in sets if name in own} | own
        for folder in sorted(self.folder.glob(f"{EVALUATIONS}/*" if self.is_trained else "*")):
            exhibits |= {f"{name} ({folder.name})": arrays for name, arrays in load_exhibits(folder).items()}
        return exhibits

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column."""
        points = [(int(row["step"]), float(row[name])) for row in self.rows if name in row]
        size = -(-len(points) // POINTS)
        parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
        return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of a page, each with a name and a colour of its own."""
    paths = [folder.absolute().parts for folder in folders]
    length = next(n for n in count(1) if len({path[-n:] for path in paths}) == len(set(paths)))
    runs = []
    for folder, path, colour in zip(folders, paths, cycle(COLOURS), strict=False):
        mark = f'<span class="mark" style="--k:{colour}"></span>' if len(folders) > 1 else ""
        runs.append(Run(folder, "/".join(path[-length:]), colour, mark))
    return runs


def explained(name: str, runs: Sequence[Run]) -> str:
    """What a number of the runs means, as HTML; '' where none of them says it."""
    told = next((run.facts["meanings"][name] for run in runs if name in run.facts.get("meanings", {})), "")
    return explanation(told)


def explanation(sentence: Any) -> str:
    """A sentence on a number as HTML; '' where there is none."""
    return sentence and f'<div class="meaning">{html.escape(str(sentence))}</div>'


def exhibit_names(runs: Sequence[Run], prefix: str) -> list[tuple[str, str]]:
    """Set and rest of the name of each exhibit whose name begins with ``prefix``, in any of the runs."""
    names = [(of_set, name) for run in runs for of_set, arrays in run.exhibits.items() for name in arrays]
    return [(of_set, name.removeprefix(prefix)) for of_set, name in dict.fromkeys(names) if name.startswith(prefix)]


class Sheets:
    """The WebP pictures of a page, equal ones once.

    Args:
        budget: bytes of all pictures together, before base64; ``full`` tells whether one was left out for them.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.full = budget, False
        self._classes: dict[bytes, str] = {}  # picture -> CSS class

    def add(self, picture: bytes) -> str | None:
        """The CSS class whose background a picture is; None where there is no room for it."""
        if picture not in self._classes:
            if len(picture) > self.budget:
                self.full = True
                return None
            self.budget -= len(picture)
            self._classes[picture] = f"sheet-{len(self._classes)}"
        return self._classes[picture]

    def style(self, page: str) -> str:
        """The style sheet of the classes that a page uses."""
        used = [(name, picture) for picture, name in self._classes.items() if name in page]
        rules = [f".{name} {{ background-image: url({webp_url(picture)}); }}" for name, picture in used]
        return f"<style>{''.join(rules)}</style>"


def webp_url(picture: bytes) -> str:
    """A WebP picture as a URL that holds all of it."""
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
