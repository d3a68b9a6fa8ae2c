"""Folders that are replaced as a whole: what a killed process leaves is cleared away by the next one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from repr.files import replacing_folder

KILLED = """
import os, signal, sys
from pathlib import Path
import repr.files
if sys.argv[2] == "renaming":
    replace = os.replace
    def killed(source, target):
        replace(source, target)
        os.kill(os.getpid(), signal.SIGKILL)  # the old one has lost its name
    os.replace = killed
with repr.files.replacing_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "waiting":
        print("writes", flush=True)
        sys.stdin.read()
"""


def kill(path: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, path, when], check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_killed_processes_leave_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with replacing_folder(path) as folder:
        (folder / "a").write_text("old")
    kill(path, "writing")
    kill(tmp_path / "made.other", "writing")
    assert len(list(tmp_path.iterdir())) == 3
    assert (path / "a").read_text() == "old"
    kill(path, "renaming")
    assert not path.exists()

    waits = [sys.executable, "-c", KILLED, path, "waiting"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writes\n"
        assert (path / "a").read_text() == "old"  # it is back
        try:
            with replacing_folder(path) as folder:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        left = {entry.name for entry in tmp_path.iterdir()}
        assert any(str(other.pid) in name for name in left)  # it is still being written
        assert not any(f"-{os.getpid()}." in name for name in left)
    assert (path / "a").read_text() == "new"
    assert {entry.name.partition(".")[2].partition(".")[0] for entry in tmp_path.iterdir()} == {"", "other"}
