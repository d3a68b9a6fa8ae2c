"""What a run folder holds, and the pictures of a page."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repr.metrics.exhibits import Exhibits
from repr.report.exhibits import load_exhibits
from repr.runs.folder import EVALUATIONS, METRICS, PICTURES, is_run, load_evaluations, load_results, load_run
from repr.training.metrics_file import Row, read_rows

CHANCE = ".chance"  # ends the name of a column that holds the level at chance of another
POINTS = 1000  # of a curve; longer ones are averaged in so many parts
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it lies.
        number: its place on the page, from 0; decides its colour.
    """

    folder: Path
    number: int = 0

    @property
    def colour(self) -> str:
        """As CSS and plotly have it."""
        return COLOURS[self.number % len(COLOURS)]

    @property
    def is_trained(self) -> bool:
        """Whether it was trained here, and not evaluated alone."""
        return is_run(self.folder)

    @cached_property
    def config(self) -> DictConfig:
        """The composed config; that of a model of others, which was only evaluated, has a name."""
        if self.evaluations and not self.is_trained:
            return OmegaConf.create({"name": next(iter(self.evaluations.values()))["model"]["name"]})
        return load_run(self.folder, built=())

    def option(self, key: str) -> Any:
        """A value of the config; None where it is not set."""
        return OmegaConf.select(self.config, key)

    @cached_property
    def rows(self) -> list[Row]:
        """Of ``metrics.csv``."""
        return read_rows(self.folder / METRICS)

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were logged."""
        return max((int(row["step"]) + 1 for row in self.rows), default=0)

    @cached_property
    def results(self) -> dict[str, dict[str, float | None]]:
        """Of the last evaluation, value and level at chance; empty before the run has ended."""
        return load_results(self.folder)

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """What ``repr.evaluate`` has written, the latest last: folder -> content of ``metrics.json``."""
        told = {folder.name: content for folder, content in load_evaluations(self.folder).items()}
        return {name: content for name, content in told.items() if content.get("format") == 1}  # of others none

    @cached_property
    def exhibits(self) -> dict[str, Exhibits]:
        """Set -> what is shown of its last evaluation, in the order of the results; then of ``repr.evaluate``."""
        found = load_exhibits(self.folder)
        order = list(dict.fromkeys(name.split("/", 1)[0] for name in self.results))
        ordered = {
            name: found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))
        }
        for folder in sorted(self.folder.glob(f"{EVALUATIONS}/*" if self.is_trained else "*")):
            ordered |= {f"{name} ({folder.name})": arrays for name, arrays in load_exhibits(folder).items()}
        return ordered

    @property
    def pictures(self) -> list[Path]:
        """The views first."""
        return sorted(self.folder.glob(f"{PICTURES}/*.png"), key=lambda path: (path.stem != "views", path.stem))

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column."""
        points = [(int(row["step"]), float(row[name])) for row in self.rows if name in row]
        size = -(-len(points) // POINTS)
        parts = [points[start : start + size] for start in range(0, len(points), size or 1)]
        return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]


def label(run: Run, runs: Sequence[Run]) -> str:
    """The mark of a run where there are several, as HTML; '' where there is one."""
    if len(runs) == 1:
        return ""
    name = html.escape(short_name(run, runs))
    return f'<div class="dim"><span class="mark" style="--k:{run.colour}"></span>{name}</div>'


def short_name(run: Run, runs: Sequence[Run]) -> str:
    """The end of the folder's path that tells the runs apart."""
    parts = [other.folder.absolute().parts for other in runs]
    own = run.folder.absolute().parts
    length = next((n for n in range(1, len(own)) if len({part[-n:] for part in parts}) == len(set(parts))), len(own))
    return "/".join(own[-length:])


class Sheets:
    """The pictures of a page, each once, up to a number of bytes; CSS classes of sheets of small pictures.

    Args:
        budget: bytes of all pictures together, before base64.

    Attributes:
        full: whether a picture was left out.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.full = budget, False
        self._urls: dict[str, tuple[str, str]] = {}  # hash -> (class, URL)

    def _add(self, data: bytes, kind: str) -> tuple[str, str] | None:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._urls:
            if len(data) > self.budget:
                self.full = True
                return None
            self.budget -= len(data)
            url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            self._urls[key] = (f"sheet-{len(self._urls)}", url)
        return self._urls[key]

    def sheet(self, data: bytes) -> str | None:
        """The class of a sheet's small pictures; None where there is no room."""
        found = self._add(data, "webp")
        return found and found[0]

    def url(self, data: bytes) -> str | None:
        """A WebP picture as a URL; None where there is no room."""
        found = self._add(data, "webp")
        return found and found[1]

    def style(self, page: str) -> str:
        """The style sheet of the classes that a page uses."""
        rules = [f".{name} {{ background-image: url({url}); }}" for name, url in self._urls.values() if name in page]
        return f"<style>{''.join(rules)}</style>"
