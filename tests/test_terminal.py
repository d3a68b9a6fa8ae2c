"""Ctrl-C in a terminal and SIGTERM to a job reach every process of a run: it saves, leaves, says how to go on."""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from repr.runs.checkpoints import checkpoints, damage
from tests.test_fit import LONGER, TINY, rows, same, weights

SETUP = [*TINY, *LONGER, "trainer.log_every_n_steps=1", "+callbacks.tell._target_=tests.signals.Tell"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


class Terminal:
    """A command in a terminal of its own, which is that of no other process."""

    def __init__(self, *arguments: str) -> None:
        self.out = b""
        self.process, self.screen = pty.fork()
        if self.process == 0:
            os.environ["COLUMNS"] = "200"
            os.execv(sys.executable, [sys.executable, "-X", "faulthandler", *arguments])

    def read_until(self, words: bytes = b"") -> None:
        """Read what comes until some words do or, without words, until the end."""
        hangs = threading.Timer(240, os.kill, (self.process, signal.SIGABRT))  # it tells where it stands, and ends
        hangs.start()
        with suppress(OSError):  # the last process has closed it
            while not (words and words in self.out):
                self.out += os.read(self.screen, 65536)
        hangs.cancel()
        assert words in self.out, self.out.decode()

    def press_ctrl_c(self) -> None:
        os.write(self.screen, b"\x03")

    def send(self, number: int) -> None:
        """A signal to the whole group of processes, as Ctrl-C and the end of a job send it."""
        os.killpg(self.process, number)

    def close(self) -> None:
        """Close the window: its processes get SIGHUP, and can write to it no more."""
        os.close(self.screen)

    def status(self) -> int:
        self.read_until()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def fit(folder: Path, *overrides: str) -> Terminal:
    return Terminal("-m", "repr.fit", f"run_folder={folder}", *SETUP, *overrides)


def stop(terminal: Terminal, number: int) -> None:
    if number == signal.SIGINT:
        terminal.press_ctrl_c()
    else:
        terminal.send(number)


@pytest.fixture(scope="module")
def whole(run: Callable[..., tuple[int, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, out = run(f"run_folder={folder}", *SETUP)
    assert status == 0, out
    return folder


@pytest.fixture(scope="module")
def whole_of_two(run_group: Callable[..., list[tuple[int, str]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "of two"
    for status, out in run_group(2, f"run_folder={folder}", *SETUP, *DDP):
        assert status == 0, out
    return folder


@pytest.mark.parametrize(
    ("number", "step", "workers"),
    [
        (signal.SIGINT, 2, 2),
        pytest.param(signal.SIGINT, 5, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 6, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_a_terminal_stops_goes_on(
    number: int, step: int, workers: int, run: Callable[..., tuple[int, str]], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    terminal = fit(folder, f"data.num_workers={workers}")
    terminal.read_until(b"at step %d" % step)
    stop(terminal, number)
    assert_stopped(terminal, number, folder)
    status, out = run(f"resume={folder}", "trust=true")
    assert status == 0, out
    assert "Evaluation" in out
    assert same(weights(folder), weights(whole))
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole)]
    assert losses(folder) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step", "workers", "world"), [(signal.SIGINT, 3, 2, 2), (signal.SIGTERM, 5, 1, 1)])
def test_two_processes_that_a_terminal_stops_go_on_as_two_or_as_one(
    number: int,
    step: int,
    workers: int,
    world: int,
    run_group: Callable[..., list[tuple[int, str]]],
    whole_of_two: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    terminal = fit(folder, *DDP, f"data.num_workers={workers}")
    terminal.read_until(b"at step %d" % step)
    stop(terminal, number)
    assert_stopped(terminal, number, folder)
    alone = ["trainer.devices=1", "trainer.strategy=auto"] if world == 1 else []
    for status, out in run_group(world, f"resume={folder}", "trust=true", *alone):
        assert status == 0, out
    assert world == 1 or same(weights(folder), weights(whole_of_two))
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(whole_of_two)]
    assert losses(folder) == pytest.approx(losses(whole_of_two), rel=1e-3)


@pytest.mark.parametrize("what", [pytest.param("terminal", marks=pytest.mark.slow), "pipe"])
def test_a_run_whose_output_nobody_can_read_any_more_saves(
    what: str, run: Callable[..., tuple[int, str]], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if what == "terminal":
        terminal = fit(folder, "data.num_workers=2")
        terminal.read_until(b"at step 2")
        terminal.close()
        status = os.waitstatus_to_exitcode(os.waitpid(terminal.process, 0)[1])
    else:  # as of tee, which Ctrl-C ends first
        command = [sys.executable, "-m", "repr.fit", f"run_folder={folder}", *SETUP, "data.num_workers=1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            assert any(b"at step 2" in line for line in process.stdout)
        status = process.returncode
    assert status == 128 + signal.SIGHUP
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert damage(checkpoint) is None
    assert checkpoint.name in ("step=2.ckpt", "step=3.ckpt", "step=4.ckpt")
    status, out = run(f"resume={folder}", "trust=true")
    assert status == 0, out
    assert same(weights(folder), weights(whole))
    assert losses(folder) == losses(whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    terminal = fit(tmp_path, "data.num_workers=1", "+callbacks.wait._target_=tests.signals.WaitForSignals")
    terminal.read_until(b"waits")
    terminal.press_ctrl_c()
    terminal.read_until(b"one")
    terminal.press_ctrl_c()
    assert terminal.status() == 130, terminal.out.decode()
    assert b"Traceback" not in terminal.out, terminal.out.decode()
    assert not checkpoints(tmp_path / "checkpoints")


def assert_stopped(terminal: Terminal, number: int, folder: Path) -> None:
    status, out = terminal.status(), terminal.out.decode()
    assert status == 128 + number, out
    assert "Traceback" not in out, out
    assert len(re.findall(re.escape(f"stopped; to go on: python -m repr.fit resume={folder}"), out)) == 1, out
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert damage(checkpoint) is None
    deadline = time.monotonic() + 20  # the first process does not wait for those that it has started
    while left := alive(terminal.process):
        assert time.monotonic() < deadline, left


def alive(group: int) -> list[str]:
    """What still runs of a group of processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
    return found


def losses(folder: Path) -> dict[int, float]:
    """The loss that was logged after each step."""
    return {int(row["step"]): float(row["train/loss"]) for row in rows(folder) if "train/loss" in row}


def test_a_program_whose_output_nobody_reads_ends_quietly_and_warns_in_one_line() -> None:
    """Here the one error of a broken pipe is that of the output; that of another pipe is a bug as before."""
    code = """
import os, sys, warnings
from repr.cli import one_line_errors
with one_line_errors():
    exec(compile("import warnings; warnings.warn('mind the gap')", sys.modules['repr.cli'].__file__, "exec"))
    ours, theirs = os.pipe()
    os.close(ours)
    os.write(theirs if sys.argv[1] == "other" else 1, b"words" * 10)
    print("words" * 10_000)
"""
    for what, status in (("own", 128 + signal.SIGPIPE), ("other", 1)):
        read, write = os.pipe()
        if what == "own":
            os.close(read)
        done = subprocess.run([sys.executable, "-c", code, what], stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        told = done.stderr.splitlines()
        assert (done.returncode, told[0]) == (status, "warning: mind the gap"), done.stderr
        assert len(told) == 1 or (what == "other" and told[-1].startswith("BrokenPipeError"))
