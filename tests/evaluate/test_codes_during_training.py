"""Statistics of codes in a run: SwAV's prototypes have them, SimCLR has none."""

import math
from pathlib import Path

import pytest

from repr.config import compose
from repr.fit import fit, main

RUN = ["smoke=true", "+evaluate=codes", "eval.codes.num_images=8", "callbacks.progress=null", "logger.tensorboard=null"]


@pytest.mark.slow
def test_prototypes_have_statistics(tmp_path: Path) -> None:
    small = ["experiment=swav_emoji", "+backbone.output_stride=8", "objective.hidden_dim=16", "eval.exhibits=null"]
    results = fit(compose([*RUN, *small, f"run_folder={tmp_path}"]))
    value, chance = results["val/codes_entropy"]
    assert 0 < value <= chance + 0.5
    assert chance == pytest.approx(math.log(60))
    assert {"codes_used", "codes_conditional_entropy", "codes_compression", "codes_granularity_picture"} <= {
        name.partition("/")[2] for name in results
    }


@pytest.mark.slow
def test_an_encoder_without_codes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval.codes needs codes of the cells .* set objective=swav or obow"):
        main([*RUN, "experiment=simclr_emoji", f"run_folder={tmp_path}"])
