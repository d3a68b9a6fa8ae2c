"""The counters of Lightning's loops, derived from the optimizer's steps, are those that it counts itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from repr.training.loop_state import loop_state
from tests.training.test_every_step import run

pytestmark = pytest.mark.filterwarnings("ignore")


def within(part: Any, whole: Any) -> bool:
    """Whether two states agree; Lightning leaves out what cannot happen to a thing that it counts."""
    if isinstance(part, dict):
        return all(name in whole and within(value, whole[name]) for name, value in part.items())
    return part == whole


@pytest.mark.parametrize("accumulate", [1, 2, 4, 9])
def test_they_are_what_lightning_counts(accumulate: int, tmp_path: Path) -> None:
    run(tmp_path, accumulate_grad_batches=accumulate, max_epochs=3, val_check_interval=2)
    paths = list((tmp_path / "all").iterdir())
    assert len(paths) == 3 * -(-5 // accumulate)
    for path in paths:
        saved = torch.load(path, weights_only=True)
        ours, loops = loop_state(saved["global_step"], 5, accumulate), saved["loops"]["fit_loop"]
        for name, state in ours.items():
            assert within(loops[name], state), (path.name, name, state)


def test_a_run_that_is_resumed_at_every_step_in_turn_ends_as_one(tmp_path: Path) -> None:
    """Each resume starts from a checkpoint that a resumed run has written."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 4, "val_check_interval": 2}
    events, weight, rows = run(tmp_path / "whole", **options)
    folder, steps = tmp_path / "again", 4 * 3
    shutil.copytree(tmp_path / "whole", folder)
    for step in range(1, steps):
        shutil.copy(folder / "all" / f"step={step}.ckpt", folder / "start.ckpt")
        found, end, logged = run(folder, folder / "start.ckpt", **options)
        assert found == [event for event in events if event[1] >= step], step
        assert torch.equal(end, weight), step
        assert logged == rows, step


def test_a_kill_between_checkpoint_and_row_loses_no_row(tmp_path: Path) -> None:
    options = {"max_epochs": 2, "val_check_interval": 2}
    _, _, rows = run(tmp_path / "whole", **options)
    for step in (1, 2, 5):  # after the second and the last step of the epoch an evaluation is due
        folder = tmp_path / str(step)
        folder.mkdir()
        lines = (tmp_path / "whole" / "metrics.csv").read_text().splitlines(keepends=True)
        before = [line for line, row in zip(lines[1:], rows, strict=True) if int(row["step"]) < step - 1]
        (folder / "metrics.csv").write_text("".join([lines[0], *before]))
        _, _, logged = run(folder, tmp_path / "whole" / "all" / f"step={step}.ckpt", **options)
        assert logged == rows, step


def test_the_steps_alone_say_where_a_run_stands(tmp_path: Path) -> None:
    """Whatever an earlier version of a loop has counted is not looked at."""
    _, weight, _ = run(tmp_path / "whole", max_epochs=3)
    path = tmp_path / "whole" / "all" / "step=7.ckpt"
    saved = torch.load(path, weights_only=True)
    text = json.dumps(saved["loops"]["fit_loop"])
    for number in range(1, 9):
        text = text.replace(f'"completed": {number}', f'"completed": {number + 3}')
    saved["loops"]["fit_loop"] = json.loads(text)
    torch.save(saved, path)
    _, end, _ = run(tmp_path / "again", path, max_epochs=3)
    assert torch.equal(end, weight)
