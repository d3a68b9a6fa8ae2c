"""Real processes that are killed and go on as if nothing had happened: same samples, same weights to the bit."""

import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_fit import LONGER, TINY, rows, same, weights

Run = Callable[..., tuple[int, str]]
EPOCHS, BATCHES = 3, 5  # two micro-batches a step: an epoch has three steps, and the last has one batch
STEPS = 9
SETUP = [
    *TINY, *LONGER, f"trainer.max_epochs={EPOCHS}", f"trainer.limit_train_batches={BATCHES}",
    "+backbone.drop_path_rate=0.2", "trainer.accumulate_grad_batches=2", "trainer.limit_val_batches=0",
    "callbacks.checkpoints.every_n_steps=2", "+callbacks.record._target_=tests.signals.Record",
]  # fmt: skip


def start(folder: Path, *overrides: str) -> list[str]:
    return [f"run_folder={folder}", *SETUP, f"+callbacks.record.file={folder}.jsonl", *overrides]


def trained(folder: Path) -> list:
    """The steps of all processes of a run, in the order in which they were written."""
    return [json.loads(line) for line in Path(f"{folder}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, out = run(*start(folder, "data.num_workers=1"))
    assert status == 0, out
    assert [step for step, *_ in trained(folder)] == list(range(1, STEPS + 1))
    assert [len(index) for _, _, index in trained(folder)] == [16, 16, 8] * EPOCHS
    return folder


def assert_as_whole(folder: Path, whole: Path, killed_after: int, resumed_from: int) -> None:
    """The two processes of a run did together what the whole run did: no step twice, none left out."""
    expected, steps = trained(whole), trained(folder)
    assert steps == expected[:killed_after] + expected[resumed_from:]
    assert same(weights(folder), weights(whole))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step={STEPS}.ckpt"]
    names = ("step", "epoch", "train/loss", "train/contrast", "train/lr")
    table = [[[row.get(name) for name in names] for row in rows(f) if "train/loss" in row] for f in (folder, whole)]
    assert table[0] == table[1]


def last_saved(step: int) -> int:
    """The checkpoint of a run killed after ``step`` steps: at every second step, and at the end of each epoch."""
    return max(s for s in range(step + 1) if s % 2 == 0 or s % 3 == 0)


# The run is killed at a step of the first, a middle and the last epoch, which the seed draws.
STEP = {epoch: random.Random(f"epoch {epoch}").randint(max(2, 3 * epoch), 3 * epoch + 2) for epoch in range(EPOCHS)}
SHORT = [(0, 0, 3, "SIGKILL"), (1, 3, 1, "SIGKILL")]
WORKERS = itertools.permutations((0, 1, 3), 2)
# Each epoch with each signal and each change of workers once; tests/test_kills.py has the chains.
GRID = [(epoch, *next(WORKERS), number) for epoch in range(EPOCHS) for number in ("SIGKILL", "SIGTERM")]


@pytest.mark.parametrize(
    ("epoch", "workers", "resumed_workers", "number"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID if case not in SHORT)],
)
def test_a_killed_run_goes_on_where_it_was(
    epoch: int, workers: int, resumed_workers: int, number: str, run: Run, whole: Path, tmp_path: Path
) -> None:
    folder, step = tmp_path / "run", STEP[epoch]
    kill = ["+callbacks.kill._target_=tests.signals.SignalAt", f"+callbacks.kill.step={step}"]
    kill += [f"+callbacks.kill.number={int(signal.Signals[number])}", f"data.num_workers={workers}"]
    status, out = run(*start(folder, *kill))
    if number == "SIGKILL":
        assert status == -signal.SIGKILL, out
        killed_after, saved = step, last_saved(step)
    else:  # leaves at once if this step is saved, else finishes the next one and saves it
        assert status == 128 + signal.SIGTERM, out
        killed_after = saved = step if last_saved(step) == step else step + 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step={saved}.ckpt"]
    status, out = run(f"resume={folder}", "trust=true", "callbacks.kill.step=-1", f"data.num_workers={resumed_workers}")
    assert status == 0, out
    assert_as_whole(folder, whole, killed_after, saved)


@pytest.mark.parametrize(
    "after", ["step", *(pytest.param(after, marks=pytest.mark.slow) for after in ("micro_batch", "evaluation"))]
)
def test_a_run_that_a_callback_stops_loses_nothing(after: str, run: Run, whole: Path, tmp_path: Path) -> None:
    folder, step = tmp_path / "run", 7  # that is saved for no other reason, in the middle of an epoch
    stop = ["+callbacks.stop._target_=tests.signals.StopAt", f"+callbacks.stop.step={step}"]
    stop += [f"+callbacks.stop.after={after}", "data.num_workers=0"]
    if after == "evaluation":
        stop += ["trainer.limit_val_batches=1.0", "trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=1"]
    status, out = run(*start(folder, *stop))
    assert status == 0, out
    assert f"stopped after {step} steps, by trainer.max_time or a callback" in out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step={step}.ckpt"]
    assert not any("train/loss" in row and int(row["step"]) >= step for row in rows(folder))
    status, out = run(f"resume={folder}", "trust=true", "callbacks.stop.step=-1")
    assert status == 0, out
    steps = [line for line in trained(folder) if line[1] != "evaluation"]
    Path(f"{folder}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    assert_as_whole(folder, whole, step, step)


def test_a_kill_while_a_checkpoint_is_written_loses_only_that_one(run: Run, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill = ["+callbacks.kill._target_=tests.signals.KillWhileSaving", f"+callbacks.kill.folder={folder}/checkpoints"]
    status, out = run(*start(folder, *kill, "+callbacks.kill.step=6"))
    assert status == -signal.SIGKILL, out
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step=4.ckpt", "step=6.ckpt.part"]
    assert (folder / "pictures" / "views.png").is_file()  # from the first step on
    status, out = run(f"resume={folder}", "trust=true", "callbacks.kill.step=-1")
    assert status == 0, out
    assert_as_whole(folder, whole, 6, 4)


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    step: int, run: Run, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    folder = small_disk / "run"
    fill = ["+callbacks.fill._target_=tests.signals.FillDisk", f"+callbacks.fill.folder={small_disk}"]
    record = f"+callbacks.record.file={tmp_path}/run.jsonl"
    status, out = run(f"run_folder={folder}", *SETUP, record, *fill, f"+callbacks.fill.step={step}")
    assert status == 1, out
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "space" in line
    assert "Traceback" not in out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step={step}.ckpt"]
    assert [row["step"] for row in rows(folder) if "train/loss" in row][:step] == [str(s) for s in range(step)]
    (small_disk / "filler").unlink()
    status, out = run(f"resume={folder}", "trust=true", "callbacks.fill.step=-1")
    assert status == 0, out
    assert same(weights(folder), weights(whole))
    loss = [[row["train/loss"] for row in rows(f) if "train/loss" in row] for f in (folder, whole)]
    assert loss[0] == loss[1]


def test_a_damaged_checkpoint_is_skipped_and_another_batch_size_refused(run: Run, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    data = (whole / "checkpoints" / f"step={STEPS}.ckpt").read_bytes()
    middle = len(data) // 2
    damaged = folder / "checkpoints" / f"step={STEPS + 1}.ckpt"
    damaged.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    before = {path: path.read_bytes() for path in (folder / "config.yaml", folder / "metrics.csv")}
    status, out = run(
        f"resume={folder}", "trust=true", f"run_folder={folder}", "data.batch_size=4", "trainer.max_epochs=4"
    )
    assert status == 1, out
    assert "Traceback" not in out
    assert f"skipped: {damaged} is damaged" in out
    assert "cannot resume: data.batch_size was 8 and is 4" in out
    assert {path: path.read_bytes() for path in before} == before
    status, out = run(
        f"resume={folder}", "trust=true", "trainer.max_epochs=4", f"callbacks.record.file={tmp_path}/run.jsonl"
    )
    assert status == 0, out
    assert [step for step, *_ in trained(folder)] == [10, 11, 12]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=12.ckpt"]
