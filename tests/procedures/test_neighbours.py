"""A run that finds neighbours first, and is then an ordinary one."""

from pathlib import Path

import numpy as np
import pytest

from repr.config import ConfigError, compose
from repr.config_check import check
from repr.fit import main
from repr.runs.folder import NEIGHBOURS, load_run


def test_options_that_do_not_fit_are_told_together() -> None:
    options = ["procedure.by=projection", "procedure.num=0", "data.neighbours=items"]
    with pytest.raises(ConfigError) as error:
        check(compose(["objective=clip", "procedure=neighbours", *options]))
    told = ("procedure.by=projection; ImageText gives image, trunk, text", "set it to 1 or more", "set it to null")
    assert all(any(words in fault for fault in error.value.faults) for words in told)


@pytest.mark.slow
def test_neighbours_are_found_before_the_first_step(tmp_path: Path) -> None:
    options = ["objective=clip", "+objective.weights.pairs=1", "procedure=neighbours", "procedure.num=2", "smoke=true"]
    options += ["data=composition", "data.train.num_items=8", "data.eval.composition.num_items=2", "eval=compositional"]
    main([*options, f"run_folder={tmp_path}"])
    cfg = load_run(tmp_path)
    assert (cfg.data.neighbours, cfg.procedure._target_) == (str(tmp_path / NEIGHBOURS), "repr.fit.single")
    kept = np.load(tmp_path / NEIGHBOURS)["neighbours"]
    assert kept.shape == (56, 2)
    assert (kept >= 0).all()
    assert not (kept == np.arange(56)[:, None]).any()
