"""Every recipe of conf/experiment runs, and begins as it did: tests/curves holds what the first steps give.

Where numbers are meant to change, ``pytest -m slow tests/test_experiments.py --renew`` writes tests/curves anew; the change
belongs in CHANGELOG.md, too.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

from repr.config import CONF
from repr.fit import main
from repr.runs.folder import METRICS

CURVES = Path(__file__).parent / "curves"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# A few blocks of a tower are as good as twelve here; of mcl_clip_vit_b16_openai five are trained.
SHORT = {name: 5 if name == "mcl_clip_vit_b16_openai" else 2 for name in EXPERIMENTS if "_vit_" in name}
TOLERANCE = 1e-3  # relative; see test_curves_tell... below


def curves(folder: Path) -> dict[str, list[float]]:
    """What the runs below a folder have logged of training: name of the number, after that of the stage -> its values."""
    values: dict[str, list[float]] = {}
    for path in sorted(folder.rglob(METRICS)):
        stage = path.parent.relative_to(folder)
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if name.startswith("train/") and not name.endswith(".chance") and value:
                    values.setdefault((stage / name).as_posix(), []).append(float(f"{float(value):.6g}"))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_in_smoke_size(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    small = ["smoke=true", "trainer.precision=32-true"]
    if experiment in SHORT:
        small.append(f"++backbone.depth={SHORT[experiment]}")
    if experiment.startswith("mcl"):
        small.append("procedure.num_stages=2")
    main([f"experiment={experiment}", f"run_folder={tmp_path}", *small])
    assert "Evaluation" in capsys.readouterr().out
    found, path = curves(tmp_path), CURVES / f"{experiment}.json"
    shutil.rmtree(tmp_path)  # gigabytes of checkpoints, which pytest would keep
