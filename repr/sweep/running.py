"""Running a sweep: one run after another, each a process of its own, so that a crash of one does not end the others."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig

from repr.cli import is_first
from repr.config import ConfigError
from repr.runs.folder import JOINED, REPORT, RESULTS, can_resume, is_run
from repr.sweep.trials import Sweep, check_all, load_sweep, parse, save_sweep

STOPS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent has gone


def sweep(words: Sequence[str], config_dir: str | None) -> int:
    """Run or go on with a sweep, write the report of all runs side by side, and print their numbers.

    Runs that were finished are left alone, those that were begun are resumed.

    Args:
        words: overrides, some with several values; ``run_folder`` is that of the sweep, ``resume`` one to go on with.
        config_dir: as in ``--config-dir``.

    Returns:
        The exit status: 0, 1 where a run has failed, or 128 and the number of the signal that has stopped the sweep.

    Raises:
        ConfigError: what is wrong with any of the runs, told before the first one starts.
    """
    if not is_first() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            ["--sweep starts the processes of each run by itself: start it once, without torchrun or srun"]
        )
    given = {key: value for key, _, value in (word.partition("=") for word in words)}
    trust = given.get("trust", "false").lower() == "true"
    words = [word for word in words if word.partition("=")[0] not in ("run_folder", "resume", "trust")]
    if resumed := given.get("resume"):
        if words or config_dir:
            raise ConfigError([f"--sweep resume={resumed} goes on with the options of that sweep: give no others"])
        plan = load_sweep(Path(resumed))
    else:
        plan = parse(words, config_dir)
    first = check_all(plan, Path(resumed) if resumed and not trust else None)
    place = resumed or given.get("run_folder")
    folder = Path(place) if place else _new_folder(first)
    save_sweep(plan, folder)
    failed, trials = dict[str, int](), plan.trials()
    for number, (name, overrides) in enumerate(trials.items(), start=1):
        has_ended = (_evaluated(folder / name) / RESULTS).is_file()
        print(f"run {number} of {len(trials)}: {name}" + ", which has ended" * has_ended, flush=True)
        if has_ended:
            continue
        status, stopped = run_process(_command(plan, folder / name, overrides, trust))
        if stopped:
            print(f"stopped; to go on: {_again(folder, trust)}", file=sys.stderr)
            return 128 + stopped
        if status:
            failed[name] = status
    _conclude(folder, {name: _evaluated(folder / name) for name in trials})
    for name, status in failed.items():
        how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        print(f"{name} {how}; to try again: {_again(folder, trust)}", file=sys.stderr)
    return int(bool(failed))


def run_process(command: Sequence[str]) -> tuple[int, int | None]:
    """Run a program to its end; Ctrl-C and SIGTERM are passed on to it, once each.

    On Linux it gets SIGTERM, too, when this process is killed, or its terminal closed, before it can pass anything on.

    Returns:
        Its exit status, and the first signal that has come.
    """
    stopped, child = list[int](), list[subprocess.Popen[bytes]]()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for process in child:
            process.send_signal(number)

    linux = sys.platform == "linux"
    told = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM) if linux else None
    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        # In a group of its own, or it would get Ctrl-C from the terminal as well, and a second one ends a run at once.
        child.append(subprocess.Popen(command, process_group=0, preexec_fn=told))
        if stopped:
            child[0].send_signal(stopped[0])
        return child[0].wait(), stopped[0] if stopped else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _again(folder: Path, trust: bool) -> str:
    return f"python -m repr.fit --sweep resume={folder}" + " trust=true" * trust


def _new_folder(cfg: DictConfig) -> Path:
    time_now = time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path("runs", *(["smoke"] if cfg.smoke else []), cfg.name, f"sweep-{time_now}")


def _command(plan: Sweep, run: Path, overrides: Sequence[str], trust: bool) -> list[str]:
    """What starts a run, or goes on with it."""
    path = str(run).replace("\\", "\\\\").replace('"', '\\"')
    words = [f"resume={run}"] if can_resume(run) else [*overrides, f'run_folder="{path}"']
    if plan.config_dir and not can_resume(run):
        words += ["--config-dir", plan.config_dir]
    return [sys.executable, "-m", "repr.fit", *words, *["trust=true"] * trust]


def _evaluated(run: Path) -> Path:
    """The folder with the results of a run: its own, or that of all its stages together."""
    return run / JOINED if is_run(run / JOINED) else run


def _conclude(folder: Path, runs: Mapping[str, Path]) -> None:
    """Write the report of the runs that have ended, and print their numbers."""
    from rich.console import Console

    from repr.report.page import write_report
    from repr.report.run import read_runs
    from repr.sweep.table import table

    ended = {name: run for name, run in runs.items() if (run / RESULTS).is_file()}
    if ended:
        write_report([*ended.values()], folder / REPORT)
        Console().print(table(dict(zip(ended, read_runs([*ended.values()]), strict=True))))
        print(f"report: {folder / REPORT}")
