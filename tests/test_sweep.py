"""Sweeps: what is refused before the first run, and a real one whose runs are killed, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repr.config import ConfigError
from repr.fit import main
from repr.runs.folder import load_results, load_run
from repr.sweep.running import run_process, sweep
from repr.sweep.trials import check_all, load_sweep, parse, save_sweep
from tests.test_fit import TINY


def test_values_are_those_of_hydra_and_every_combination_is_a_run() -> None:
    plan = parse(["smoke=true", "views.main.scale=[0.5,1.0],[0.9,1.0]", '+note="a, b"', "seed=range(0,2)"], None)
    assert plan.fixed == ["smoke=true", '+note="a, b"']
    assert plan.trials() == {
        f"views.main.scale=0.{low}-1.0+seed={seed}": [*plan.fixed, f"views.main.scale=[0.{low},1.0]", f"seed={seed}"]
        for low in (5, 9)
        for seed in (0, 1)
    }


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["seed=0"], "no option has several values"),
        (["seed=0,0"], "two runs of the sweep have the name seed=0"),
        (["seed=interval(0,1)"], "give the values"),
        (["optim.lr=1e-3,abc", "seed=0,1"], "optim.lr takes a number (it is 0.005), but got 'abc'"),
        (["objective=clip,simclr,dnio"], "objective has no option 'dnio'; did you mean 'dino'?"),
        (["trainer.devices=1,3"], "3 processes cannot share it evenly"),
        (["resume=nowhere"], "nowhere is not the folder of a sweep"),
        (["resume=nowhere", "seed=1"], "give no others"),
    ],
)
def test_a_fault_of_any_run_is_one_error_before_the_first(
    words: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(["--sweep", *words])
    assert str(refused.value).startswith("error: ")
    assert fault in str(refused.value)
    assert not [*tmp_path.iterdir()]


def test_a_folder_holds_one_sweep_which_a_stranger_cannot_give(tmp_path: Path) -> None:
    plan = parse(["smoke=true", "seed=0,1"], None)
    save_sweep(plan, tmp_path)
    assert load_sweep(tmp_path) == plan
    save_sweep(parse(["smoke=true", "seed=0,1,2"], None), tmp_path)  # more values
    with pytest.raises(ConfigError, match="holds a sweep of other options"):
        save_sweep(parse(["smoke=false", "seed=0,1"], None), tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({**plan._asdict(), "fixed": ["+callbacks.x._target_=os.system"]}))
    with pytest.raises(ConfigError, match=r"callbacks.x: os.system.*trust=true"):
        check_all(load_sweep(tmp_path), tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        load_sweep(tmp_path)


def test_a_sweep_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun or srun"):
        sweep(["seed=0,1"], None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once(number: int, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(int(sys.argv[1]), lambda number, frame: sys.exit(7))\n"
        "os.kill(os.getppid(), int(sys.argv[1]))\n"
        "while True: time.sleep(0.01)"
    )
    assert run_process([sys.executable, "-c", program, str(int(number))]) == (7, number)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_run_of_a_sweep_that_is_killed_is_told_to_stop(number: int, tmp_path: Path) -> None:
    told = tmp_path / "told"
    run = (
        "import pathlib, signal, sys, time\n"
        "told = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(told.write_text('\\ntold')))\n"
        "told.write_text('\\nruns')\n"
        "while True: time.sleep(0.01)"
    )
    parent = (
        "import sys; from repr.sweep.running import run_process; run_process([sys.executable, '-c', *sys.argv[1:]])"
    )
    told.touch()
    with subprocess.Popen([sys.executable, "-c", parent, run, str(told)]) as process:
        wait_for(told, "runs")
        process.send_signal(number)
    assert process.returncode == -number
    wait_for(told, "told")


def wait_for(path: Path, words: str, after: str = "") -> None:
    """Until a program has printed something, after something else."""
    deadline = time.monotonic() + 240
    while words not in path.read_text().partition(after or "\n")[2]:
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_outlives_a_killed_run_and_goes_on_after_a_stop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is killed after a checkpoint, the second one stopped with the sweep; then both are resumed."""
    monkeypatch.setenv("COLUMNS", "120")
    log, folder = tmp_path / "log", tmp_path / "sweep"
    words = [*TINY, "trainer.max_epochs=2", "trainer.limit_train_batches=4", "seed=0,1", f"run_folder={folder}"]
    words += ["+callbacks.tell._target_=tests.signals.Tell", "eval=images"]
    command = [sys.executable, "-m", "repr.fit", "--sweep", *words]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        wait_for(log, "at step 6")
        holder = (folder / "seed=0" / ".lock").read_text().split()[1]
        os.kill(int(holder), signal.SIGKILL)
        wait_for(log, "run 2 of 2: seed=1")
        wait_for(log, "at step 2", after="run 2 of 2")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"to go on: python -m repr.fit --sweep resume={folder}" in log.read_text()
    assert [load_results(folder / f"seed={seed}") for seed in (0, 1)] == [{}, {}]
    again = [f"resume={folder}", "trust=true"]
    assert sweep(again, None) == 0
    first, _, rest = capfd.readouterr().out.partition("run 2 of 2")
    assert "at step 4" in first
    assert "at step 3" not in first  # it goes on after its first epoch
    shown = rest.partition("Sweep; * is the best")[2]
    for seed in (0, 1):
        assert load_run(folder / f"seed={seed}", trust=True).seed == seed
        assert f"{load_results(folder / f'seed={seed}')['val/knn_category']['value']:.3f}" in shown
    assert "* " in shown
    assert (folder / "report.html").is_file()
    assert sweep(again, None) == 0
    told = capfd.readouterr().out
    assert told.count(", which has ended") == 2
    assert "at step" not in told
