"""Nothing touches the network unless it is asked to: fit, with several processes too, evaluate, export and report."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.network import asked, guarded

SMALL = ["smoke=true", "backbone.name=test_resnet", "text.layers=1", "trainer.accelerator=cpu"]


def test_the_guard_sees_what_asks(tmp_path: Path) -> None:
    """In a process that another one starts, and where the caller hides the error, too."""
    program = "import huggingface_hub\ntry: huggingface_hub.HfApi().model_info('a/b')\nexcept Exception: pass"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}], check=True)"
    subprocess.run([sys.executable, "-c", outer], env=guarded(tmp_path), check=True)
    assert "huggingface.co" in asked(tmp_path)


def test_nothing_asks_for_the_network(run_and_export: tuple[Path, Path]) -> None:
    """The run of these tests, its page, its export and its evaluation were made under the guard."""
    assert (run_and_export[0] / "report.html").is_file()
    assert (run_and_export[0].parent / "evaluation" / "metrics.json").is_file()
    assert asked(run_and_export[0].parent) == ""


@pytest.mark.slow
def test_nothing_asks_for_the_network_with_processes_and_stages(tmp_path: Path) -> None:
    environment, run = guarded(tmp_path), tmp_path / "run"
    staged = ["procedure=multistage", "procedure.num_stages=2", "procedure.export=open_clip", "objective=clip"]
    by_two = [*SMALL, f"run_folder={run}", "trainer=ddp", "trainer.devices=2", "data.num_workers=1"]
    commands = [
        ("fit", [*SMALL, *staged, f"run_folder={tmp_path}/staged"]),
        ("export.__main__", [f"run={run}", "to=hf", f"out={tmp_path}/hf"]),
        ("check.__main__", ["data=emoji"]),
        ("report.__main__", [str(run)]),
    ]
    program = "\n".join(f"from repr.{module} import main\nmain({words!r})" for module, words in commands)
    for words in (["-m", "repr.fit", *by_two], ["-c", program]):
        command = [sys.executable, *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert asked(tmp_path) == ""
