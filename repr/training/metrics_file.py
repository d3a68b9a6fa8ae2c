"""The numbers of a run as ``metrics.csv``: a kill, a full disk or a resume loses no row that was written."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from repr.files import replacing
from repr.runs.folder import METRICS

Row = dict[str, str]


class MetricsFile(Logger):
    """Write ``<folder>/metrics.csv``: a row a logged step, a column a name, empty where a row has no such value.

    Lightning's CSVLogger truncates the file to write it again whenever a new name comes (a run that dies there has lost
    all rows) and deletes it when a run is resumed. Here a row is one appended line, and the file is only ever replaced
    by a complete one.
    """

    name, version = "metrics", ""  # which Lightning wants

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder, METRICS)
        self._columns: list[str] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing, since ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; where the disk is full, the rows before stay whole."""
        row = _row(metrics, step)
        if not row.keys() <= set(self._columns):
            self._write([*read_rows(self.path), row])
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines(self._columns, [row]))

    @rank_zero_only
    def keep(self, wanted: Callable[[Row], bool], last: Row | None = None) -> None:
        """Keep the wanted rows of the file alone, and add ``last``, a row of training, if it is not among them."""
        rows = [row for row in read_rows(self.path) if wanted(row)]
        if last and not any(_is_of_training(row) and row["step"] == last["step"] for row in rows):
            rows.append(last)
        if rows:
            self._write(rows)
        else:
            self.path.unlink(missing_ok=True)

    def _write(self, rows: Sequence[Row]) -> None:
        columns = sorted({name for row in rows for name in row})
        header = dict(zip(columns, columns, strict=True))
        with replacing(self.path) as file:
            file.write(_lines(columns, [header, *rows]).encode())
        self._columns = columns


def keep_rows(trainer: pl.Trainer, saved: Mapping[str, Any]) -> None:
    """Keep the rows up to a checkpoint in the :class:`MetricsFile` of a run; those after it will be written again.

    ``saved`` is what the checkpoint holds beside weights and optimizer; it is empty where a run begins.
    """
    steps = saved.get("global_step", 0)
    state = saved.get("callbacks", {}).get("Checkpoints", {})
    evaluates_again = state.get("evaluate") is not None
    last = _row(state["row"], steps - 1) if state.get("row") else None  # a kill may have come before it was written

    def wanted(row: Row) -> bool:  # the step of a row, of training or evaluation, counts from 0
        return int(row["step"]) < (steps - 1 if evaluates_again and not _is_of_training(row) else steps)

    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.keep(wanted, last)


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a file, without empty values; no rows if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in file if line.endswith("\n")]  # a full disk may have cut the last one short
        rows = list(csv.DictReader(lines, strict=True))
        if any(None in row or None in row.values() for row in rows) or (lines and "step" not in lines[0]):
            raise ValueError("columns are missing")
        rows = [{name: value for name, value in row.items() if value} for row in rows]
        for row in rows:
            int(row["step"]), [float(value) for value in row.values()]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error!r}); move it away, and its numbers are no longer shown") from error
    return rows


def _row(metrics: Mapping[str, float], step: int | None) -> Row:
    row = {name: str(value if isinstance(value, int) else float(value)) for name, value in metrics.items()}
    return {**row, "step": str(step)}


def _is_of_training(row: Row) -> bool:
    return any(name.startswith("train/") for name in row)


def _lines(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
