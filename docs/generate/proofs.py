"""What holds an objective: its loss functions, and the tests of them with numbers of the authors' code."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from docs.generate.text import ROOT

GOLDEN = {path.stem for path in (ROOT / "tests" / "golden").glob("*.npz")}


class Held(NamedTuple):
    """A test that reads files of ``tests/golden``, and what of the package it uses."""

    file: str
    test: str
    golden: frozenset[str]
    uses: frozenset[str]


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name in a module -> what is imported by that name."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def _used(node: ast.AST, imported: Mapping[str, str]) -> set[str]:
    """Every imported thing that a piece of code names, also as an attribute of an imported module."""
    found = {imported[part.id] for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in imported}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in imported:
            found.add(f"{imported[part.value.id]}.{part.attr}")
    return found


def _path(dotted: str) -> Path:
    return ROOT / (dotted.rpartition(".")[0].replace(".", "/") + ".py")


@cache
def _is_loss(dotted: str) -> bool:
    """Whether it is a function of repr.losses that gives a tensor."""
    path, name = _path(dotted), dotted.rpartition(".")[2]
    if not dotted.startswith("repr.losses.") or not path.is_file():
        return False
    functions = (node for node in _parsed(path).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return any(node.returns is not None and ast.unparse(node.returns) == "Tensor" for node in functions)


def losses(flow: str, terms: Iterable[str], chosen: Mapping[str, str]) -> list[str]:
    """The loss functions of a flow's terms: those that a config chooses, or that the flow's file names by the term.

    Where the file names none so, it is all functions of repr.losses that it uses.
    """
    tree = _parsed(_path(flow))
    imported, by_term = _imports(tree), dict[str, set[str]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    by_term.setdefault(key.value, set()).update(filter(_is_loss, _used(value, imported)))
    found = set().union(*({chosen[term]} if term in chosen else by_term.get(term, set()) for term in terms))
    return sorted(found or filter(_is_loss, _used(tree, imported)))


@cache
def golden_tests() -> list[Held]:
    """Every test that reads a file of ``tests/golden``, itself or through what its module defines."""
    return [held for path in sorted((ROOT / "tests").rglob("test_*.py")) for held in _held(path)]


def _held(path: Path) -> Iterator[Held]:
    if "golden" not in path.read_text(encoding="utf-8"):
        return
    tree = _parsed(path)
    imported, defined, read = _imports(tree), dict[str, set[ast.stmt]](), dict[str, set[str]]()
    for node in tree.body:
        targets = _defines(node)
        reads = "golden" in {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} or ".npz" in ast.unparse(
            node
        )
        files = [n.value.removesuffix(".npz") for n in ast.walk(node) if reads and _names_a_file(n)]
        in_order = len(targets) == len(files) > 1  # A, B = (golden(name) for name in ("a", "b"))
        for index, name in enumerate(targets):
            defined.setdefault(name, set()).add(node)
            read.setdefault(name, set()).update(files[index : index + 1] if in_order else files)
    for test in (name for name in defined if name.startswith("test_")):
        reached = _reached(test, defined)
        if golden := set().union(*(read[name] for name in reached)):
            uses = set().union(*(_used(node, imported) for name in reached for node in defined[name]))
            yield Held(path.relative_to(ROOT).as_posix(), test, frozenset(golden), frozenset(uses))


def _names_a_file(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.removesuffix(".npz") in GOLDEN


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _reached(name: str, defined: Mapping[str, set[ast.stmt]]) -> set[str]:
    """What a definition uses of its module, and what that uses, and so on; arguments are fixtures."""
    reached, waiting = set[str](), {name}
    while waiting:
        reached.add(one := waiting.pop())
        parts = [part for node in defined[one] for part in ast.walk(node)]
        used = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        used |= {part.arg for part in parts if isinstance(part, ast.arg)}
        waiting |= used & defined.keys() - reached
    return reached
