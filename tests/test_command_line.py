"""The command, its usage lines, and what docs/command_line.md tells to type."""

import gc
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest

from repr.__main__ import VERBS, main
from repr.cli import importing
from repr.config import compose
from repr.sweep.trials import parse
from tests.test_docs import ROOT, commands

PAGE = "docs/command_line.md"
WORDS = [shlex.split(command)[1:] for command in commands(PAGE)]
TOLD = [words for words in WORDS if words[0] in ("list", "explain", "completion") or {"--show", "--help"} & {*words}]


def test_the_page_has_a_command_of_each_verb() -> None:
    assert {words[0] for words in WORDS} == VERBS.keys()
    page = (ROOT / PAGE).read_text()
    assert all(f"| `{verb}` |" in page for verb in VERBS)


@pytest.mark.parametrize("words", TOLD, ids=" ".join)
def test_what_only_prints_runs_as_it_stands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0?$") if "--help" in words else nullcontext():
        main(words)
    told = capsys.readouterr().out
    assert len(told) > 50
    if words == ["explain", "optim.lr", "experiment=clip_vit_b32"]:
        assert told in (ROOT / PAGE).read_text()


@pytest.mark.parametrize("words", [words for words in WORDS if words not in TOLD], ids=" ".join)
def test_what_trains_or_reads_takes_these_options(words: list[str]) -> None:
    options = import_module(VERBS[words[0]][0]).parser().parse_intermixed_args(words[1:])
    if words[0] in ("fit", "check") and not any(word.startswith("resume=") for word in words):
        is_sweep = getattr(options, "sweep", False)
        for overrides in parse(options.overrides, None).trials().values() if is_sweep else [options.overrides]:
            compose(overrides)


def test_the_usage_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for called, usage in (
        ("/usr/bin/repr-pretrain", "repr-pretrain {}"),
        ("/x/repr/__main__.py", "python -m repr {}"),
        ("/x/repr/evaluate/__main__.py", "python -m repr.{}"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        for verb, (module, _) in VERBS.items():
            assert import_module(module).parser().format_usage().startswith(f"usage: {usage.format(verb)} ")


def test_nothing_heavy_is_imported_before_a_verb_is_known(tmp_path: Path) -> None:
    for name in ("torch", "hydra", "omegaconf"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")  # found before the real one
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "repr", "--help"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "completion" in done.stdout


def test_the_collector_rests_while_a_program_imports_and_no_longer() -> None:
    with importing():
        assert gc.isenabled()  # torch is here: it is somebody else's program
    program = """
import gc
from repr.cli import importing
try:
    with importing():
        print(gc.isenabled(), gc.get_freeze_count())
        raise ValueError("the config is at fault")
except ValueError as error:
    print(gc.isenabled(), gc.get_freeze_count() > 0, error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False 0\nTrue True the config is at fault\n"


def test_a_program_that_has_imported_all_ends_without_a_word() -> None:
    """Triton tells of leaks where the collector is kept from what it has made."""
    program = """
from contextlib import suppress
from repr.cli import importing
with importing():
    import torch
    with suppress(ImportError):
        import triton._C.libtriton
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_letters_that_the_output_does_not_have_are_spelled_out() -> None:
    program = "from repr.cli import one_line_errors\nwith one_line_errors():\n    print('\\xe4')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout == b"\\xe4\n"
