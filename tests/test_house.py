"""Rules of the house that no linter knows."""

import ast
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("repr", "tests", "tools", "benchmarks") for p in (ROOT / folder).rglob("*.py")]


def test_no_file_imports_the_package_under_the_name_of_the_builtin() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                bad = [a.name for a in node.names if a.name.split(".")[0] == "repr" and a.asname is None]
                assert not bad, f"{path}:{node.lineno}: `import {bad[0]}` hides the builtin repr"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "repr", (
                    f"{path}:{node.lineno}: import from a module of repr, not from the package"
                )


def test_packages_are_empty_but_for_the_version() -> None:
    for path in (ROOT / "repr").rglob("__init__.py"):
        if path != ROOT / "repr" / "__init__.py":
            assert path.read_text() == "", path


def test_no_module_takes_the_name_of_a_standard_module_or_dependency() -> None:
    taken = set(sys.stdlib_module_names) | {
        "open_clip",
        "timm",
        "torch",
        "lightning",
        "hydra",
        "yaml",
        "sklearn",
        "rich",
    }
    assert not {path.stem for path in (ROOT / "repr").rglob("*.py")} & taken - {"__init__"}


def test_the_changelog_and_the_citation_name_this_version() -> None:
    version = runpy.run_path(str(ROOT / "repr" / "__init__.py"))["__version__"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    head = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert head.groups() == (version, str(citation["date-released"]))
    assert citation["version"] == version
    notes = subprocess.run(
        ["make", "--silent", "release-notes"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert notes.startswith(f"## {version} (")
    assert notes.count("\n## ") == 0


def test_the_dockerfile_copies_what_there_is_and_has_no_fault_that_a_linter_knows() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    ]
    assert {"repr", "conf", "pyproject.toml"} <= set(copied)
    assert {f"!{name}" for name in copied} <= set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    assert all((ROOT / name).exists() for name in copied)
    if not (hadolint := Path(sys.executable).with_name("hadolint")).exists():
        pytest.skip("hadolint is not there")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """It borrows the dependencies by a path file; path files that lie there, such as the checkout's, have no effect."""
    pip, wheels, venv = [sys.executable, "-m", "pip", "-q"], tmp_path / "wheels", tmp_path / "venv"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (*(ROOT / "repr").rglob("*.py"), ROOT / "repr/data/sources/emoji64.zip", ROOT / "repr/py.typed"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"repr/{path.relative_to(ROOT).as_posix()}" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "tools/")) for name in names)

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", str(venv), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(program: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(venv / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "from repr.config import CONF, __file__ as ours; print(ours, CONF)"
    assert run("python", "-c", where).split() == [str(site / "repr" / "config.py"), str(site / "repr" / "conf")]
    assert "temperature" in run("python", "-m", "repr.fit", "--show")
    out = run("python", "-m", "repr.fit", "smoke=true", "run_folder=run", "trainer.accelerator=cpu")
    assert "val/zero_shot_top1" in out
    assert (empty / "run" / "report.html").is_file()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("scripts", {})
    for script in scripts:
        assert script in run(script, "--help")
