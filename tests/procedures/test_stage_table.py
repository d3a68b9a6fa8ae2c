"""The table of a multistage run: which rows, how wide, what the file holds."""

import csv
from pathlib import Path

from rich.console import Console

from repr.procedures.stage_table import stage_table, write_table

NAMES = ("test_style/ridge_subcategory", "mmvp/image_score", "mmvp/image_score_colour", "val/uniformity_image")
COLUMNS = {
    column: {name: (value + i / 100, 0.25 if i < 3 else None) for i, name in enumerate(NAMES)}
    for column, value in {"stage-0": 0.5, "stage-1": 0.996, "stage-2": 10.0, "stage-3": 0.0, "joined": -0.25}.items()
}


def test_attributes_and_headline_by_stage_fit_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(stage_table(COLUMNS, ["subcategory"], ["mmvp/image_score"]))
    rows = [line.split() for line in capture.get().splitlines() if line.strip()]
    assert rows[1] == ["0", "1", "2", "3", "joined", "chance"]
    assert rows[3:] == [
        ["test_style/ridge_subcategory", ".500", ".996", "10.000", ".000", "-0.250", ".250"],
        ["mmvp/image_score", ".510", "1.006", "10.010", ".010", "-0.240", ".250"],
        ["mmvp/image_score_colour", ".520", "1.016", "10.020", ".020", "-0.230", ".250"],
    ]


def test_the_file_holds_every_number(tmp_path: Path) -> None:
    write_table(tmp_path / "stages.csv", {**COLUMNS, "joined": {"val/new": (float("nan"), None)}})
    with (tmp_path / "stages.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*NAMES, "val/new"]
    assert rows["mmvp/image_score"]["stage-1"] == str(0.996 + 0.01)
    assert rows["mmvp/image_score"]["chance"] == "0.25"
    assert rows["mmvp/image_score"]["joined"] == rows["val/uniformity_image"]["chance"] == ""
    assert rows["val/new"]["joined"] == "nan"
