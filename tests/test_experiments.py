"""Every recipe of conf/experiment runs, and begins as it did: tests/curves holds what its first steps give.

Where numbers are meant to change, ``pytest -m slow tests/test_experiments.py --renew`` writes tests/curves anew; such a
change belongs in CHANGELOG.md, too.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest

from repr.config import CONF
from repr.fit import main
from repr.runs.folder import METRICS
from repr.training.throughput import Throughput

CURVES = Path(__file__).parent / "curves"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# A few blocks of a tower are as good as twelve here; of mcl_clip_vit_b16_openai five are trained.
SHORT = {name: "depth=2" for name in EXPERIMENTS if "_vit_" in name} | {"mcl_clip_vit_b16_openai": "depth=5"}
SHORT |= {name: "layers=[1,1,1,1]" for name in EXPERIMENTS if "_rn" in name}
# Relative. Other CPUs and versions of torch round otherwise, by less than 1e-4 here; another seed, weight, learning
# rate or view moves the numbers of two steps by 1e-2 and more.
TOLERANCE = 1e-3
SIGNS = ("train/std_", "train/rank_", "train/prototype_entropy", "train/assignment_entropy")  # of collapse


def curves(folder: Path) -> dict[str, list[float]]:
    """What the runs below a folder have logged of losses and schedules: ``<stage>/train/<name>`` -> its values."""
    values: dict[str, list[float]] = {}
    for path in sorted(folder.rglob(METRICS)):
        stage = path.parent.relative_to(folder)
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                told = name.startswith("train/") and not name.endswith(".chance") and name not in Throughput.meanings
                if told and value and not name.startswith(SIGNS):
                    values.setdefault((stage / name).as_posix(), []).append(float(f"{float(value):.6g}"))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_in_smoke_size_and_begins_as_it_did(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if experiment == "negclip_vit_b32":
        pytest.importorskip("textblob")
    small = ["smoke=true", "trainer.precision=32-true"]
    if experiment in SHORT:
        small.append(f"++backbone.{SHORT[experiment]}")
    if experiment == "obow_rn50":
        small += ["objective.num_words=256", "optim.lr=1e-4"]  # a step of its own rate is far
    if experiment.startswith("mcl"):
        small.append("procedure.num_stages=2")
    else:
        small.append("callbacks.checkpoints=null")  # of all experiments together they take gigabytes
    if experiment == "mcl_clip_vit_b16_openai":
        small.append("procedure.export=null")  # as of mcl_vit_b
    main([f"experiment={experiment}", f"run_folder={tmp_path}", *small])
    assert "Evaluation" in capsys.readouterr().out
    values, path = curves(tmp_path), CURVES / f"{experiment}.json"
    shutil.rmtree(tmp_path)  # which pytest would keep
    if request.config.getoption("--renew"):
        lines = (f" {json.dumps(name)}: {json.dumps(values[name])}" for name in sorted(values))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    stored = json.loads(path.read_text())
    assert values.keys() == stored.keys()
    for name, expected in stored.items():
        assert values[name] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE * 1e-2), name


def test_every_curve_is_that_of_an_experiment() -> None:
    assert {path.stem for path in CURVES.glob("*.json")} == set(EXPERIMENTS)
