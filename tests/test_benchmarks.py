"""The results at a glance, and the command that measures them."""

import json
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.claims.__main__ import CLAIMS
from benchmarks.claims.runs import kept_file, trained
from benchmarks.summary import RESULTS, SECTIONS, summary, tables
from repr.config import ConfigError, compose
from repr.config_check import check

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_tables_are_read_with_the_line_above_and_the_first_of_two_equal_titles() -> None:
    one, other = tables("a\n\n| x | n | n |\n|---|---:|---:|\n| y | 1 | 2 |\n\n| z |\n|---|\n")
    assert one == ("a", [{"x": "y", "n": "1"}])
    assert other == ("a", [])


def test_the_summary_tells_what_the_pages_tell() -> None:
    lines = summary(lambda path: path.name)
    for pages in SECTIONS.values():
        for name in pages:
            path = (RESULTS / f"{name}.md").resolve()
            rows = [line for line in lines if line.endswith(f"({path.name}) |")]
            assert rows, name
            text = path.read_text(encoding="utf-8").replace(",", "")
            for row in rows:
                number = row.split(" | ")[1].split()[0].removesuffix("/s").replace(",", "")
                assert number in text or name == "plan", row
    assert any("iBOT" in line and "| 1.0" in line for line in lines)  # what is worse is told, too


def test_a_name_that_there_is_not_is_one_error() -> None:
    done = run("step_tme")
    assert done.returncode == 2
    assert "there is no step_tme; there are clustering, data" in done.stderr


def test_runs_that_are_kept_are_not_made_again_and_their_machines_are_told(tmp_path: Path) -> None:
    made = {"SimCLR | ours": "2026-01-01, a CPU", "SimCLR | lightly": "2026-01-02, another"}
    for method, machine in made.items():
        for seed in range(2):
            file = kept_file(tmp_path, "quality", method, seed, 30, "cpu")
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"made": machine, "result": {"kNN": seed + len(method)}}))
    assert len([*tmp_path.rglob("*.json")]) == 4  # each has a file of its own
    options = Namespace(
        name="quality", kept=tmp_path, made=set(), seeds=2, length=30, jobs=2, minutes=None, device="cpu"
    )
    found = trained([*made], options)
    assert found == {method: [{"kNN": seed + len(method)} for seed in range(2)] for method in made}
    assert options.made == {*made.values()}


@pytest.mark.slow
def test_chosen_scripts_run_and_are_summed_up() -> None:
    done = run("epoch_order", "--quick")
    assert done.returncode == 0, done.stderr
    assert "| a million |" in done.stdout
    assert "### A step" in done.stdout
    assert "epoch_order: done in" in done.stderr


@pytest.mark.slow
def test_what_claims_train_can_be_trained() -> None:
    faults = {}
    for name in CLAIMS:
        methods = getattr(import_module(f"benchmarks.claims.{name}"), "METHODS", {})
        for method, overrides in methods.items() if isinstance(methods, dict) else ():
            if isinstance(overrides, list) and any(word.startswith("experiment=") for word in overrides):
                try:
                    check(compose(overrides))
                except ConfigError as error:
                    faults[name, method] = str(error)
    assert faults == {}
