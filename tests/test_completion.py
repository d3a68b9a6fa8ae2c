"""What the shell offers after a tab."""

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from repr.catalog import CONF
from repr.completion import _of_export, _overrides

ROOT = Path(__file__).parents[1]


def offered(prefix: str, *before: str, verb: str = "fit", config_dir: str | None = None) -> set[str]:
    found = _overrides(prefix, verb, Namespace(overrides=list(before), config_dir=config_dir))
    return {word for word in found if word.startswith(prefix)}


def test_groups_choices_and_keys_are_offered(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "clip_of_mine.yaml").write_text("# Mine.\ndefaults: [clip]\n")
    choices = {f"objective={path.stem}" for path in (CONF / "objective").glob("clip*.yaml")}
    assert offered("objective=clip") == choices
    assert offered("objective=clip", config_dir=str(tmp_path)) == choices | {"objective=clip_of_mine"}
    assert {"experiment=", "data=", "seed="} <= offered("") < {word for word in offered("") if "." not in word} | {""}
    assert offered("optim.lr") == {"optim.lr="}
    assert offered("objective.hidden", "objective=simclr") == {"objective.hidden_dim="}
    assert offered("objective.queue", "objective=clip", "objctive=x") == set()
    assert offered("smoke=") == {"smoke=true", "smoke=false"}
    assert offered("+trainer.benchm") == {"+trainer.benchmark="}
    assert "+evaluate=linear" in offered("+evaluate=lin")
    assert offered("gpu", verb="plan") == {"gpus="}
    assert offered("model", verb="evaluate") == {"model="}
    assert offered(f"data.train.root={tmp_path}/ob", "data=folder") == {f"data.train.root={tmp_path}/objective/"}
    assert [*_of_export("to=")] == ["to=open_clip", "to=timm", "to=hf", "to=onnx"]


def test_bash_completes_the_command_without_torch(tmp_path: Path) -> None:
    """In a real bash, with the function that the command itself has printed, and a folder that nothing else changes."""
    torch = tmp_path / "torch.py"
    torch.write_text("raise SystemExit('torch was imported')")  # which is found before the real one
    program = tmp_path / "repr-pretrain"
    program.write_text(f"#!{sys.executable}\nfrom repr.__main__ import main\nmain()\n")
    program.chmod(0o755)
    lines = ["repr-pretrain re", f"repr-pretrain fit --config-dir {tmp_path} objective=sim"]
    script = ['eval "$(repr-pretrain completion bash)"']
    for line in lines:
        script += [f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9 COMPREPLY=()"]
        script += ["_python_argcomplete repr-pretrain", 'echo "${COMPREPLY[@]}"']
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(["bash", "-c", "\n".join(script)], env=env, capture_output=True, text=True, check=True)
    verb, objectives = done.stdout.splitlines()
    assert verb == "report "
    assert set(objectives.split()) == {path.stem for path in (CONF / "objective").glob("sim*.yaml")}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_own_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    from repr.completion import main

    main([shell])
    assert "repr-pretrain" in capsys.readouterr().out
