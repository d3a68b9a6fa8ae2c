"""Workers leave signals to the main process, and end with it however it ends."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LOADER = """
import multiprocessing, os, signal, sys, time
from repr.data.workers import Loader

main, stops = os.getpid(), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for number in stops:
    signal.signal(number, lambda *_: os.getpid() == main or os._exit(9))
multiprocessing.set_start_method("forkserver")  # that of Python 3.14, which would import this script again

class Slow:
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(60 if i > 9 else 0)
        return i

batches = iter(Loader(Slow(), batch_size=1, num_workers=2))
next(batches)
print(flush=True)
[os.killpg(0, number) for number in stops if sys.argv[1] == "signal"]
"""
ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "exit": "[next(batches) for _ in range(5)]; sys.exit(3)",
    "signal": "[next(batches) for _ in range(5)]; sys.exit(4)",
}


@pytest.mark.parametrize(("end", "status"), [("killed", -signal.SIGKILL), ("exit", 3), ("signal", 4)])
def test_workers_end_with_the_main_process_and_with_nothing_else(end: str, status: int, tmp_path: Path) -> None:
    script = tmp_path / "loader.py"
    script.write_text(LOADER + ENDS[end])
    read, write = os.pipe()
    # The pipe is closed once the last process that has it is gone.
    with subprocess.Popen(
        [sys.executable, script, end], start_new_session=True, pass_fds=[write], stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write)
        ready, _, _ = select.select([read], [], [], 40)
        assert ready
        assert os.read(read, 1) == b""
        out = process.stderr.read()
        assert process.wait() == status, out
        assert "Traceback" not in out
    os.close(read)
