"""A run folder is not taken twice, and a finished run is left as it is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repr.config import compose
from repr.fit import main
from repr.runs.claim import claimed
from tests.test_fit import TINY

SMALL = [*TINY, "eval.zero_shot=null", "eval.headline=[]"]
HOLD = """
import sys, time
from repr.config import compose
from repr.runs.claim import claimed
with claimed(compose([f"run_folder={sys.argv[1]}", f"resume={sys.argv[1]}"])):
    print("holds", flush=True)
    time.sleep(600)
"""


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as refused:
        main(list(words))
    return str(refused.value)


def test_a_run_folder_is_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    main([f"run_folder={folder}", *SMALL])
    before = content(folder)
    assert f"resume={folder} goes on with it" in refusal(f"run_folder={folder}", *SMALL)
    capsys.readouterr()
    main([f"resume={folder}"])
    assert f"{folder} has ended after 2 steps, so there is nothing to do" in capsys.readouterr().out
    assert content(folder) == before

    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        message = refusal(f"resume={folder}", "trainer.max_epochs=2")
        assert f"is being trained by process {holder.pid} of " in message
        assert content(folder) == before
        holder.send_signal(signal.SIGKILL)
    main([f"resume={folder}", "trainer.max_epochs=2"])  # who was killed holds nothing
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=4.ckpt"]
    main([f"resume={folder}"])
    assert "has ended after 4 steps" in capsys.readouterr().out


def test_a_run_that_has_saved_nothing_is_resumed_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    main([f"run_folder={folder}", *SMALL])
    for path in (folder / "checkpoints" / "step=2.ckpt", folder / "results.json"):
        path.unlink()
    main([f"resume={folder}"])
    assert "has saved nothing yet: the run starts from its beginning" in capsys.readouterr().out
    assert (folder / "checkpoints" / "step=2.ckpt").exists()


def test_starts_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(5):
        for smoke in ("true", "false"):
            cfg = compose([f"smoke={smoke}"])
            with claimed(cfg):
                folders.add(cfg.run_folder)
    assert len(folders) == 10
    assert sum(folder.startswith("runs/smoke/demo/") for folder in folders) == 5


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert refusal(f"run_folder={file}", *SMALL) == f"error: run_folder={file} is a file: name another place"
    assert f"{file}/run: Not a directory" in refusal(f"run_folder={file}/run", *SMALL)
    assert file.read_text() == "mine"
