"""Where a step's time goes: the tables of tools/profile.py."""

import json
from pathlib import Path

import pytest

from tools.profile import WARM_UP, main

TINY = ["experiment=simclr_emoji", "smoke=true"]


@pytest.mark.slow
def test_phases_and_operations_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    main([*TINY, f"trainer.limit_train_batches={WARM_UP + 2}", "--steps", "1", "--trace", str(trace)])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shares = [float(cells[3].strip(" %")) for cells in lines if len(cells) == 5]
    assert [cells[1].strip() for cells in lines[:7]] == [
        "load", "transfer", "colour", "forward", "backward", "optimizer", "rest"
    ]  # fmt: skip
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert any("aten::" in cells[1] for cells in lines)
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_run_that_is_too_short_says_so() -> None:
    with pytest.raises(SystemExit, match="the run has fewer than 23 batches"):
        main([*TINY, "trainer.limit_train_batches=1"])
