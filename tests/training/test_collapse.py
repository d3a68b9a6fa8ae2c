"""The collapse callback in real runs: what it logs, when it warns."""

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from repr.config import compose
from repr.fit import fit
from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import last_checkpoint

RUN = [
    "experiment=swav_emoji", "smoke=true", "backbone.name=test_resnet", "objective.hidden_dim=16", "objective.dim=8",
    "objective.num_prototypes=6", "objective.queue_length=0", "trainer.limit_train_batches=3",
    "callbacks.collapse.every=1", "callbacks.collapse.start=2", "optim.lr=1e-3",
]  # fmt: skip


def run(folder: Path, *overrides: str, start: Sequence[str] = RUN) -> list[str]:
    """Warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(compose([*start, f"run_folder={folder}", *overrides]))
    return [str(warning.message) for warning in caught if "collapse" in str(warning.message)]


def logged(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def test_a_run_logs_the_signs_beside_their_chance_line_and_does_not_warn(tmp_path: Path) -> None:
    assert run(tmp_path) == []
    values = logged(tmp_path)
    assert values["train/swapped_prediction.chance"] == pytest.approx(math.log(6))
    assert 0 < values["train/assignment_entropy"] < math.log(6)
    assert 0 < values["train/prototype_entropy"] <= math.log(6)
    assert 0.05 < values["train/std_embedding"] <= 1
    assert 1 < values["train/rank_embedding"] <= 8


def test_pictures_that_are_all_the_same_are_told_once(tmp_path: Path) -> None:
    """Black, however they are cropped and coloured."""
    for i in range(24):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    told = run(tmp_path / "run", "~views.small", "data=folder", f"data.train.root={tmp_path}")
    assert len(told) == len(set(told)) > 0
    assert all(text.startswith("step 2: ") for text in told)
    assert any("entropy" in text for text in told)


LEJEPA = [
    "experiment=lejepa_emoji", "smoke=true", "backbone.name=test_resnet", "objective.hidden_dim=64",
    "trainer.limit_train_batches=60", "optim.lr=5e-3", "optim.warmup_steps=0", "callbacks.collapse.every=20",
    "callbacks.collapse.start=60",
]  # fmt: skip


@pytest.mark.parametrize(("sigreg", "collapses"), [(0.02, False), (0, True)])
def test_features_that_draw_together_are_told_before_they_are_one(
    sigreg: float, collapses: bool, tmp_path: Path
) -> None:
    """Without the Gaussian nothing keeps LeJEPA's features apart; what they were at first is in the checkpoint."""
    told = run(tmp_path, f"objective.weights.sigreg={sigreg}", start=LEJEPA)
    assert [text.partition("(")[0] for text in told] == ["step 60: the features 'embedding' draw together "] * collapses
    with (tmp_path / "metrics.csv").open(newline="") as file:
        column = [row["train/std_embedding"] for row in csv.DictReader(file)]
    looks = list(dict.fromkeys(filter(None, column)))  # rows in between repeat the last
    assert len(looks) == 4  # the first step is one
    kept = read_checkpoint(last_checkpoint(tmp_path))["callbacks"]["Collapse"]["first"]
    assert kept["std_embedding"] == pytest.approx(float(looks[0]), abs=1e-6)
