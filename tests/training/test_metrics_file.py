"""metrics.csv never loses a row that was written."""

import csv
from pathlib import Path

import pytest

from repr.training.metrics_file import MetricsFile, read_rows
from tests.signals import fill


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_the_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"train/loss": 0.5, "epoch": 0}, 0)
    assert table(tmp_path) == [{"epoch": "0", "step": "0", "train/loss": "0.5"}]
    log.log_metrics({"train/loss": float("nan"), "epoch": 0}, 1)
    log.log_metrics({"val/x": 1e-9, "epoch": 1}, 1)  # a new column
    log.log_metrics({"train/loss": 2, "epoch": 1}, 2)
    assert [row["train/loss"] for row in table(tmp_path)] == ["0.5", "nan", "", "2"]
    assert table(tmp_path)[2] == {"epoch": "1", "step": "1", "train/loss": "", "val/x": "1e-09"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_resumed_run_keeps_the_rows_that_are_wanted_and_whole(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    for step in range(4):
        log.log_metrics({"train/loss": step / 10}, step)
    with log.path.open("a") as file:
        file.write("12")  # cut short
    again = MetricsFile(tmp_path)
    again.keep(lambda row: int(row["step"]) < 2)
    again.log_metrics({"train/loss": 0.25}, 2)
    assert [(row["step"], row["train/loss"]) for row in table(tmp_path)] == [("0", "0.0"), ("1", "0.1"), ("2", "0.25")]
    MetricsFile(tmp_path).keep(lambda row: False)
    assert list(tmp_path.iterdir()) == []


def log_many(log: MetricsFile, start: int, stop: int) -> None:
    for step in range(start, stop):
        log.log_metrics({"train/loss": step / 10}, step)


def test_a_full_disk_leaves_all_rows(small_disk: Path) -> None:
    log = MetricsFile(small_disk)
    log_many(log, 0, 2000)
    fill(small_disk / "filler")
    with pytest.raises(OSError, match="cannot be written"):
        log.log_metrics({"val/x": 1.0}, 2000)  # the file has to be written anew
    assert len(read_rows(log.path)) == 2000
    with pytest.raises(OSError, match="No space left"):
        log_many(log, 2000, 4000)
    kept = [row["step"] for row in read_rows(log.path)]
    assert kept == [str(step) for step in range(len(kept))]
    assert len(kept) >= 2000
