"""A disk that cannot be written: every program says so in one line."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from repr.config import compose
from repr.fit import fit
from tests.conftest import Ended
from tests.test_fit import TINY


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Path]:
    """A run on a disk that is read-only by now."""
    fit(compose([*TINY, f"run_folder={small_disk}/run", "eval.zero_shot=null", "eval.headline=[]"]))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    yield small_disk / "run"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.slow
def test_a_read_only_disk_is_told_in_one_line(read_only: Path, tmp_path: Path, program: Callable[..., Ended]) -> None:
    commands = {
        "fit": [f"resume={read_only}", "trainer.max_epochs=2"],
        "evaluate": [f"model={read_only}", "eval=[geometry]", "trainer.accelerator=cpu"],
        "export": [f"run={read_only}", "to=timm", f"out={read_only}/export"],
        "report": [str(read_only)],
    }
    for name, words in commands.items():
        told = program(f"repr.{name}", *words, status=1).err
        assert "Traceback" not in told, (name, told)
        assert "Read-only file system" in told.splitlines()[-1], (name, told)
    program("repr.export", f"run={read_only}", "to=timm", f"out={tmp_path}/export")
    assert (tmp_path / "export" / "model.safetensors").is_file()
