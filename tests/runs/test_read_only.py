"""A disk that cannot be written: every program says so in one line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repr.config import compose
from repr.fit import fit
from tests.test_fit import TINY


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Path]:
    """A run on a disk that is read-only by now."""
    fit(compose([*TINY, f"run_folder={small_disk}/run", "eval.zero_shot=null", "eval.headline=[]"]))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    yield small_disk / "run"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.slow
def test_a_read_only_disk_is_told_in_one_line(read_only: Path, tmp_path: Path) -> None:
    programs = {
        "fit": [f"resume={read_only}", "trainer.max_epochs=2"],
        "evaluate": [f"model={read_only}", "eval=[geometry]", "trainer.accelerator=cpu"],
        "export": [f"run={read_only}", "to=timm", f"out={read_only}/export"],
        "report": [str(read_only)],
    }
    for program, words in programs.items():
        command = [sys.executable, "-m", f"repr.{program}", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1, (program, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, (program, done.stderr)
        assert "Read-only file system" in done.stderr.splitlines()[-1], (program, done.stderr)
    out = tmp_path / "export"
    words = [f"run={read_only}", "to=timm", f"out={out}"]
    subprocess.run([sys.executable, "-m", "repr.export", *words], capture_output=True, check=True)
    assert (out / "model.safetensors").is_file()
