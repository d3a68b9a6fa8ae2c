"""Every recipe of conf/experiment runs."""

import shutil
from pathlib import Path

import pytest

from repr.config import CONF
from repr.fit import main

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# A few blocks of a tower are as good as twelve here; of mcl_clip_vit_b16_openai five are trained.
SHORT = {name: 5 if name == "mcl_clip_vit_b16_openai" else 2 for name in EXPERIMENTS if "_vit_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_in_smoke_size(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["smoke=true", "trainer.precision=32-true"]
    if experiment in SHORT:
        small.append(f"++backbone.depth={SHORT[experiment]}")
    if experiment.startswith("mcl"):
        small.append("procedure.num_stages=2")
    main([f"experiment={experiment}", f"run_folder={tmp_path}", *small])
    assert "Evaluation" in capsys.readouterr().out
    shutil.rmtree(tmp_path)  # gigabytes of checkpoints, which pytest would keep
