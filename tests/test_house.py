"""Rules of the house that no linter knows."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_wheel_holds_code_configs_and_pictures(tmp_path: Path) -> None:
    """Built, installed aside, and used from another folder."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (*(ROOT / "repr").rglob("*.py"), ROOT / "repr/data/sources/emoji64.zip"):
        assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"repr/{path.relative_to(ROOT).as_posix()}" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "tools/")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "from repr.config import CONF, compose\nprint(CONF)\ncompose([])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "site/repr/conf")
